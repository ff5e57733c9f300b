"""Networks of other libraries, built small from their settings: what a user brings, and what it is given."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], tuple[Tensor, ...] | Mapping[str, Tensor]]


@dataclass(frozen=True)
class Network:
    """A network: the library that it is of, how it is made by it, and one batch of its inputs."""

    library: str
    make: Callable[[Any], nn.Module]
    inputs: Inputs

    def build(self) -> nn.Module:
        """Builds it, the same each time."""
        torch.manual_seed(0)
        return self.make(import_module(self.library))

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Returns a number that depends on all that the network returns for the batch of a step."""
        torch.manual_seed(step)
        inputs = self.inputs()
        output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        return torch.stack([x.float().square().mean() for x in floats(output)]).sum()


def floats(output: object) -> Iterator[Tensor]:
    """Yields what a network returned, however it is wrapped, as far as a loss can depend on it."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floats(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from floats(value)
    elif hasattr(output, "sample"):  # of a distribution
        yield from floats(output.sample())


def tokens() -> dict[str, Tensor]:
    ids = torch.arange(24).remainder(50).view(2, 12)
    return {"input_ids": ids}


def pairs() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"][:, :6]}


def pixels(size: int = 32) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def image(*shape: int) -> Inputs:
    return lambda: (torch.randn(shape),)


def graph(*, relations: bool = False) -> Inputs:
    edges = torch.stack([torch.arange(20), torch.arange(20).roll(1)])
    types = {"edge_type": torch.arange(20).remainder(3)} if relations else {}
    return lambda: {"x": torch.randn(20, 16), "edge_index": edges, **types}


# of a vocabulary as small beside the layers as it is in a real model
LANGUAGE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BERT = {k: v for k, v in LANGUAGE.items() if k != "num_key_value_heads"} | {"max_position_embeddings": 16}
T5 = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
SWITCH = T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
BART = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 16,
}
MIXTRAL = LANGUAGE | {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = LANGUAGE | {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
DEEPSEEK = LANGUAGE | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
SEGFORMER = {
    "hidden_sizes": [8, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 32,
}

TRANSFORMERS = {
    "GPT-2": (lambda tf: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)), tokens),
    "Llama": (lambda tf: tf.LlamaForCausalLM(tf.LlamaConfig(**LANGUAGE)), tokens),
    "Qwen3": (lambda tf: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LANGUAGE, head_dim=8)), tokens),
    "BERT": (lambda tf: tf.BertForSequenceClassification(tf.BertConfig(**BERT)), tokens),
    "T5": (lambda tf: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), pairs),
    "BART": (lambda tf: tf.BartForConditionalGeneration(tf.BartConfig(**BART)), pairs),
    "Mixtral": (lambda tf: tf.MixtralForCausalLM(tf.MixtralConfig(**MIXTRAL)), tokens),
    "Qwen2-MoE": (lambda tf: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**QWEN_MOE)), tokens),
    "DeepSeek-V3": (lambda tf: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**DEEPSEEK)), tokens),
    "gpt-oss": (lambda tf: tf.GptOssForCausalLM(tf.GptOssConfig(**MIXTRAL, head_dim=8)), tokens),
    "Llama 4": (
        lambda tf: tf.Llama4ForCausalLM(tf.Llama4TextConfig(**MIXTRAL, head_dim=8, intermediate_size_mlp=48)),
        tokens,
    ),
    "Switch Transformers": (
        lambda tf: tf.SwitchTransformersForConditionalGeneration(tf.SwitchTransformersConfig(**SWITCH)),
        pairs,
    ),
    "Mamba": (
        lambda tf: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2)),
        tokens,
    ),
    "ViT": (lambda tf: tf.ViTForImageClassification(tf.ViTConfig(**VIT, image_size=32, patch_size=8)), pixels()),
    "Swin": (lambda tf: tf.SwinForImageClassification(tf.SwinConfig(**SWIN)), pixels()),
    "SegFormer": (lambda tf: tf.SegformerForSemanticSegmentation(tf.SegformerConfig(**SEGFORMER)), pixels(64)),
}


class Two(nn.Module):
    """Two graph layers, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, edge_index: Tensor, *edges: Tensor, **more: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index, *edges, **more).relu(), edge_index, *edges, **more)


GRAPHS = {
    "GCN": (lambda g: g.GCN(16, 32, 2, 4), graph()),
    "GAT": (lambda g: g.GAT(16, 32, 2, 8), graph()),
    "GraphSAGE": (lambda g: g.GraphSAGE(16, 32, 2, 4), graph()),
    "GIN": (lambda g: g.GIN(16, 32, 2, 4), graph()),
    "graph Transformer": (lambda g: Two(g.TransformerConv(16, 8, heads=4), g.TransformerConv(32, 4)), graph()),
    "RGCN": (lambda g: Two(g.RGCNConv(16, 32, 3), g.RGCNConv(32, 4, 3)), graph(relations=True)),
    "RGCN of bases": (
        lambda g: Two(g.RGCNConv(16, 32, 3, num_bases=2), g.RGCNConv(32, 4, 3, num_bases=2)),
        graph(relations=True),
    ),
    "gated graph": (lambda g: g.GatedGraphConv(16, 3), graph()),
    "ARMA": (lambda g: g.ARMAConv(16, 8, num_stacks=2, num_layers=2), graph()),
}


def of_timm(name: str, size: int = 64, **settings: Any) -> tuple[Callable[[Any], nn.Module], Inputs]:
    return lambda timm: timm.create_model(name, num_classes=4, **settings), image(2, 3, size, size)


TIMM = {
    "ResNet": of_timm("test_resnet"),
    "ConvNeXt": of_timm("convnext_atto"),
    "vision transformer": of_timm("test_vit", 160),
    "Swin v1": of_timm("swin_tiny_patch4_window7_224", 32, img_size=32, embed_dim=24, depths=(1, 1), num_heads=(2, 2)),
    "EfficientNet": of_timm("test_efficientnet"),
    "MobileNetV3": of_timm("mobilenetv3_small_050"),
    "RegNet": of_timm("regnetx_002"),
    "MLP-Mixer": of_timm("mixer_s32_224", 32, img_size=32),
    "DenseNet": of_timm("densenet121"),
    "RepVGG": of_timm("repvgg_a0"),
    "NFNet": of_timm("test_nfnet"),
    "CondConv EfficientNet": of_timm("tf_efficientnet_cc_b0_4e"),
}

SCAN = image(2, 1, 32, 32, 32)
UNETR = {"feature_size": 4, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
MONAI = {
    "UNet": (lambda n: n.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), SCAN),
    "DynUNet": (lambda n: n.DynUNet(3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(8, 16, 32)), SCAN),
    "SegResNet": (lambda n: n.SegResNet(3, 8), SCAN),
    "UNETR": (lambda n: n.UNETR(1, 2, (32, 32, 32), **UNETR), SCAN),
    "Swin UNETR": (lambda n: n.SwinUNETR(1, 2, feature_size=12), image(1, 1, 64, 64, 64)),
    "Attention U-Net": (lambda n: n.AttentionUnet(3, 1, 2, (8, 16, 32), (2, 2)), SCAN),
    "Basic U-Net": (lambda n: n.BasicUNet(features=(8, 8, 16, 32, 32, 8)), SCAN),
    "DenseNet121 3D": (lambda n: n.DenseNet121(3, 1, 2), SCAN),
    "ViT 3D": (
        lambda n: n.ViT(
            1, (32,) * 3, (8,) * 3, hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4, classification=True
        ),
        SCAN,
    ),
    "SegResNetDS": (lambda n: n.SegResNetDS(init_filters=8), SCAN),
    "HighResNet": (lambda n: n.HighResNet(), image(2, 1, 16, 16, 16)),
    "AutoEncoder": (lambda n: n.AutoEncoder(3, 1, 1, (8, 16), (2, 2)), SCAN),
}


def noised(shape: tuple[int, ...], **more: Callable[[], Tensor]) -> Inputs:
    """An image or its latents, a time step, and what else a network is conditioned on."""
    rest = {name: make() for name, make in more.items()}
    return lambda: {"timestep": torch.tensor([3, 7]), **rest, "sample": torch.randn(shape)}


DOWN, ATTENDING = "DownBlock2D", "CrossAttnDownBlock2D"
UNET = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
DIFFUSERS = {
    "UNet2D": (
        lambda d: d.UNet2DModel(
            **UNET, down_block_types=(DOWN, "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
        ),
        noised((2, 3, 16, 16)),
    ),
    "UNet2DCondition": (
        lambda d: d.UNet2DConditionModel(
            **UNET,
            cross_attention_dim=32,
            attention_head_dim=8,
            down_block_types=(ATTENDING, DOWN),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        noised((2, 4, 16, 16), encoder_hidden_states=lambda: torch.randn(2, 5, 32)),
    ),
    "Stable Diffusion 3": (
        lambda d: d.SD3Transformer2DModel(
            sample_size=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            in_channels=4,
            out_channels=4,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 5, 32),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.tensor([3, 7]),
        },
    ),
    "AutoencoderKL": (
        lambda d: d.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
    ),
}
LIBRARIES = {
    "transformers": TRANSFORMERS,
    "torch_geometric.nn": GRAPHS,
    "timm": TIMM,
    "monai.networks.nets": MONAI,
    "diffusers": DIFFUSERS,
}
NETWORKS = {
    name: Network(library, make, inputs)
    for library, table in LIBRARIES.items()
    for name, (make, inputs) in table.items()
}
# with the settings that these classes have by themselves
AT_THEIR_SIZE = {
    "GPT-2, 124 million": lambda tf: tf.GPT2LMHeadModel(tf.GPT2Config()),
    "BERT, 110 million": lambda tf: tf.BertForSequenceClassification(tf.BertConfig()),
    "T5, 61 million": lambda tf: tf.T5ForConditionalGeneration(tf.T5Config()),
    "Llama, 6.7 billion": lambda tf: tf.LlamaForCausalLM(tf.LlamaConfig()),
    "Mixtral, 47 billion": lambda tf: tf.MixtralForCausalLM(tf.MixtralConfig()),
    "ViT, 86 million": lambda tf: tf.ViTForImageClassification(tf.ViTConfig()),
}
