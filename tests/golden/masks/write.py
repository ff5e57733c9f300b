"""Writes files with masks as other tools write them, each to be run where that tool is installed.

    pip install torch==2.13.0 nncf==3.4.0                                      # nncf
    pip install torch==2.13.0 torchvision rigl-torch==0.5.2                    # rigl
    pip install torch==2.13.0 transformers==5.24.0 compressed-tensors==0.12.2  # compressed
    python tests/golden/masks/write.py nncf

Beside each file lies ``*_weights.safetensors``: what the tool itself says that its weights are, zeros and all. Knows
nothing of dstlib, and is imported by tests for its networks alone.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent


class Net(nn.Module):
    """What all tools but the last one prune: nested layers, a norm that has a weight, too: (B, 2, 6, 6) → (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.ModuleDict({"fc_1": nn.Linear(4, 8), "norm": nn.LayerNorm(8)})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block["fc_1"](self.body(x).mean(dim=(2, 3)))
        return self.head(self.block["norm"](y).relu())


class LikeLlama(nn.Module):
    """The linear layers of the transformer that the last tool compresses, by their names."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"self_attn": {"q": (8, 8), "k": (8, 4), "v": (8, 4), "o": (8, 8)}}
        sizes["mlp"] = {"gate": (8, 12), "up": (8, 12), "down": (12, 8)}
        layer = nn.Module()
        for name, parts in sizes.items():
            setattr(layer, name, nn.ModuleDict({f"{p}_proj": nn.Linear(*s, bias=False) for p, s in parts.items()}))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def write_nncf() -> None:
    """The state of a pruned model, whose weights are dense: a hook multiplies them by the mask at each forward."""
    import nncf
    from safetensors.torch import save_file

    x = torch.randn(1, 2, 6, 6)
    pruned = nncf.prune(net(), mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.6, examples_inputs=x)
    torch.save(pruned.state_dict(), HERE / "nncf_magnitude.pt")
    effective = {}
    for name in ("body.0.weight", "block.fc_1.weight", "head.weight"):
        layer, _, key = name.rpartition(".")
        hook = getattr(pruned.__nncf_hooks.post_hooks, f"{layer.replace('.', ':')}:{key}__0")["0"]
        effective[name] = hook(pruned.get_parameter(name)).detach()
    save_file(effective, HERE / "nncf_magnitude_weights.safetensors")
    learned = nncf.prune(net(), mode=nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED, examples_inputs=x)
    learned.eval()
    effective = {}
    for name in ("body.0.weight", "block.fc_1.weight", "head.weight"):
        layer, _, key = name.rpartition(".")
        hook = getattr(learned.__nncf_hooks.post_hooks, f"{layer.replace('.', ':')}:{key}__0")["0"]
        with torch.no_grad():
            hook.mask.copy_(torch.randn_like(hook.mask))
        effective[name] = hook(learned.get_parameter(name)).detach()
    torch.save(learned.state_dict(), HERE / "nncf_learned.pt")
    save_file(effective, HERE / "nncf_learned_weights.safetensors")


def write_rigl() -> None:
    """The state of its scheduler after an update, and the weights of its model."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # whose binary may not fit torch's
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from rigl_torch.RigL import RigLScheduler
    from safetensors.torch import save_file

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = RigLScheduler(
        model, optimizer, dense_allocation=0.4, T_end=8, delta=2, ignore_linear_layers=False, alpha=0.3
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6)).square().sum().backward()
        if scheduler():
            optimizer.step()
    torch.save({"scheduler": scheduler.state_dict(), "epoch": 3}, HERE / "rigl_torch.pt")
    save_file(model.state_dict(), HERE / "rigl_torch_weights.safetensors")


def write_compressed() -> None:
    """A folder as of ``save_pretrained`` for both formats, and the weights as the package unpacks them."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    for folder, sparsity in (
        ("sparse_bitmask", BitmaskConfig(targets=["Linear"], ignore=["lm_head"])),
        ("sparse_24_bitmask", Sparse24BitMaskConfig(targets=["Linear"], ignore=["lm_head"])),
    ):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith("model.layers"):
                groups = parameter.detach().view(-1, 4)
                smallest = groups.abs().argsort(dim=1)[:, :2]
                groups.scatter_(1, smallest, 0.0)
                if folder == "sparse_bitmask":
                    groups[torch.rand_like(groups.float()) < 0.3] = 0.0
        model.model.layers[0].mlp.up_proj.weight.detach()[0] = 0.0  # live zeros, of which 2:4 keeps two of four
        compressor = ModelCompressor.from_pretrained_model(model, sparsity_config_or_format=sparsity)
        state = compressor.compress(model)
        (HERE / folder).mkdir(exist_ok=True)
        model.config.save_pretrained(HERE / folder)
        save_file(state, HERE / folder / "model.safetensors", {"format": "pt"})
        compressor.update_config(HERE / folder)
        unpacked = dict(compressor.sparsity_compressor.decompress(str(HERE / folder)))
        save_file(unpacked, HERE / f"{folder}_weights.safetensors")


if __name__ == "__main__":
    {"nncf": write_nncf, "rigl": write_rigl, "compressed": write_compressed}[sys.argv[1]]()
