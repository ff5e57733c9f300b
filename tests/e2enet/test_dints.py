"""DiNTS: the architecture as a value and a file, the network that it makes, and the space that is searched."""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dstlib
from dstlib.errors import SettingError, StateError
from dstlib.files import write_json
from dstlib.typed_json import sealed
from dstlib.zoo.e2enet import AMOS
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.baselines.architecture import ARCHITECTURE, Architecture, nodes, paths, read_architecture
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss

pytest.importorskip("monai")

ALL_PATHS = Architecture.of([[1] * 10] * 2, [[1] * 10] * 2)  # of two blocks of the published space; each a 3×3×3
TINY = Architecture.of([[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 2, 3, 4], [0, 1, 0, 2]])


def built(architecture: Architecture = TINY, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    asked: dict[str, Any] = {"in_channels": 2, "num_classes": 3, "patch_size": (16, 12, 8), "width": 1 / 8}
    return build_model("dints", config=AMOS, architecture=architecture, **(asked | changes))


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Draws feasible ones: in each block some paths from the nodes in use, at least one from each."""
    depths = draw(st.integers(1, 4))
    blocks, used, a = draw(st.integers(1, 4)), draw(st.sets(st.integers(0, depths - 1), min_size=1)), []
    for _ in range(blocks):
        row = [int(start in used and draw(st.booleans())) for start, _ in paths(depths)]
        for lonely in used - {start for (start, _), code in zip(paths(depths), row, strict=True) if code}:
            row[paths(depths).index((lonely, lonely))] = 1
        a.append(row)
        used = {depth for depth, code in enumerate(nodes(row, depths)[1]) if code}
    return Architecture.of(a, [[draw(st.integers(0, 4)) for _ in row] for row in a])


# ---- the value, and its files ----


@given(architecture=architectures())
@settings(deadline=None, max_examples=50)
def test_a_file_gives_back_the_very_architecture(
    tmp_path_factory: pytest.TempPathFactory, architecture: Architecture
) -> None:
    run = tmp_path_factory.mktemp("run")
    write_json(run / ARCHITECTURE, sealed(asdict(architecture)))
    assert read_architecture(run) == read_architecture(run / ARCHITECTURE) == architecture


def changed(**changes: Any) -> dict[str, Any]:
    return {**asdict(TINY), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": "dints"}, "model of architecture FILE: expected none but space, num_blocks"),
        (
            changed(space="monai-dints-2d"),
            "space of architecture FILE: expected 'monai-dints-3d', got 'monai-dints-2d'",
        ),
        (changed(num_blocks=3), "node_a of the architecture: expected 4 × 2, got 3 × {2}"),
        (changed(arch_code_a=[[1, 1, 1, 1], [1, 1, 1]]), "arch_code_a of the architecture: expected 2 × 4, got 2 × {"),
        (changed(arch_code_a=[[1, 1, 1, 1], [1, 1, 1, 2]]), "expected whole numbers from 0 to 1, got [2]"),
        (changed(arch_code_a=[[1, 1, 1, 1], [1, 1, 1, 1.0]]), "arch_code_a[1][3] of architecture FILE"),
        (changed(arch_code_c=[[0, 0, 0, 0], [5, 1, 1, 1]]), "expected whole numbers from 0 to 4, got [5]"),
        (changed(arch_code_a=[[1, 1, 1, 1], [0, 0, 0, 0]]), "expected a path in each block, got none in block 1"),
        (
            changed(arch_code_a=[[1, 1, 1, 1], [1, 0, 1, 0]]),
            "expected paths of block 1 from the nodes that block 0 leads to, [1, 1], got [1, 0]",
        ),
        (
            changed(node_a=[[1, 1], [1, 1], [1, 0]]),
            "node_a, rows 1 and 2, of the architecture: expected ((1, 1), (1, 1))",
        ),
        (changed(num_depths=0), "num_depths of the architecture: expected a whole number from 1 up, got 0"),
        (changed(num_blocks=0, arch_code_a=[], arch_code_c=[], node_a=[]), "num_blocks of the architecture"),
    ],
)
def test_what_is_no_architecture_is_refused_in_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "found.json"
    write_json(file, content)
    with pytest.raises(StateError) as caught:
        read_architecture(file)
    assert message.replace("FILE", str(file)) in str(caught.value)
    assert "Pass the run of a finished --model dints_search" in str(caught.value)


def test_a_damaged_or_missing_file_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / ARCHITECTURE, sealed(asdict(TINY)))
    text = (tmp_path / ARCHITECTURE).read_text()
    # another operation on one path: all of it still fits
    (tmp_path / ARCHITECTURE).write_text(text.replace("4", "3"))
    with pytest.raises(StateError, match="the checksum of the rest"):
        read_architecture(tmp_path)
    (tmp_path / ARCHITECTURE).write_text(text[:40])
    with pytest.raises(StateError, match=f"architecture {tmp_path / ARCHITECTURE}"):
        read_architecture(tmp_path)
    (tmp_path / ARCHITECTURE).unlink()
    with pytest.raises(StateError, match="No such file"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("names", [("arch_code_a", "arch_code_c"), ("code_a", "code_c")])
def test_what_monais_own_searches_save_is_read(tmp_path: Path, names: tuple[str, str]) -> None:
    codes = (np.array(TINY.arch_code_a, float), np.array(TINY.arch_code_c))  # as its decode() returns them
    others = {"node_a": np.array(TINY.node_a), "iter_num": 18590, "best_dsc": np.float64(0.5), "epochs": 1430}
    torch.save({**dict(zip(names, codes, strict=True)), **others}, tmp_path / "search_code_18590.pt")
    assert read_architecture(tmp_path / "search_code_18590.pt") == TINY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(2)}, "expected the arch_code_a and arch_code_c of MONAI's search, got weight"),
        ([1], r"got \[1\]"),
        ({"arch_code_a": np.ones((1, 4)), "arch_code_c": np.full((1, 4), 7)}, "expected whole numbers from 0 to 4"),
        ({"arch_code_a": np.ones(4), "arch_code_c": np.ones(4)}, "expected the arch_code_a"),
        (print, "a damaged or foreign file"),
    ],
)
def test_a_file_of_torch_with_anything_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "found.pt")
    with pytest.raises(StateError, match=message):
        read_architecture(tmp_path / "found.pt")


# ---- the network ----


def test_the_whole_space_has_the_parameters_of_its_sizes() -> None:
    """Counted by hand: blocks between nodes of 64, 128, 256, 512 channels, and the stem."""
    with torch.device("meta"):
        network = build_model(
            "dints", in_channels=1, num_classes=3, patch_size=(96,) * 3, config=AMOS, architecture=ALL_PATHS
        )
    stem, node = (32, 64, 128, 256), (64, 128, 256, 512)
    block = sum(27 * c * c + 2 * c for c in (node[end] for _, end in paths(4)))  # convolution and norm
    block += sum(node[s] * node[e] + 2 * node[e] for s, e in paths(4) if s != e)  # 1×1×1 up or down, and norm
    down = sum(27 * (1 * s + s * n) + 2 * (s + n) for s, n in zip(stem, node, strict=True))
    up = sum(27 * n * s + 2 * s for s, n in zip(stem, node, strict=True))
    final = 27 * 32 * 32 + 2 * 32 + 32 * 3 + 3
    assert sum(p.numel() for p in network.parameters()) == 2 * block + down + up + final == 52_172_611
    flops = dstlib.profile(network, (1, 1, 96, 96, 96)).flops
    assert flops == 2 * 96**3 * per_voxel(stem, node) + 3 * 96**3


def per_voxel(stem: tuple[int, ...], node: tuple[int, ...]) -> float:
    """Multiply-adds of the whole space for each voxel of the image."""
    finest = [8 ** -(depth + 1) for depth in range(4)]  # voxels of a node, for each of the image
    cells = sum(finest[e] * (27 * node[e] ** 2 + (node[s] * node[e] if s != e else 0)) for s, e in paths(4))
    down = sum(8 * f * 27 * s + f * 27 * s * n for f, s, n in zip(finest, stem, node, strict=True))
    up = sum(f * 27 * n * s for f, s, n in zip(finest, stem, node, strict=True))
    return 2 * cells + down + up + 27 * 32 * 32 + 32 * 3


@given(architecture=architectures())
@settings(deadline=None, max_examples=15)
def test_every_feasible_architecture_makes_a_network_that_runs(architecture: Architecture) -> None:
    network = built(architecture, width=1 / 16).eval()
    extent = 2 ** (architecture.num_depths + 1)
    with torch.no_grad():
        (logits,) = network(torch.rand(1, 2, extent, extent, extent))
    assert logits.shape == (1, 3, extent, extent, extent)
    assert logits.isfinite().all()


def test_odd_sizes_are_padded_to_what_the_strides_divide() -> None:
    (logits,) = built()(torch.rand(1, 2, 7, 9, 5))
    assert logits.shape == (1, 3, 7, 9, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_steps_reduce_the_loss(dtype: torch.dtype) -> None:
    network = built().train()
    images = torch.rand(2, 2, 16, 12, 8)  # of a depth of 2, torch 2.13's gradients of bf16 kernels are not even numbers
    labels = (images[:, :1] > 0.5).long() + (images[:, 1:] > 0.7).long()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            logits = network(images)
        loss = deep_supervision_loss(logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_masks_stay_through_training() -> None:
    network = built().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    method = replace(dstlib.RIGL, interval=1)
    sparsifier = dstlib.sparsify(network, optimizer, sparsity=0.8, method=method, total_steps=10)
    active = sum(int(mask.sum()) for mask in sparsifier.masks.values())
    for _ in range(2):
        optimizer.zero_grad()
        deep_supervision_loss(network(torch.rand(1, 2, 8, 8, 8)), torch.randint(0, 3, (1, 1, 8, 8, 8))).backward()
        optimizer.step()
    assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == active
    parameters = dict(network.named_parameters())
    assert all(not parameters[name].detach()[~mask].any() for name, mask in sparsifier.masks.items())
    sparsifier.detach()


def test_a_copy_computes_the_same() -> None:
    network = built().eval()
    x = torch.rand(1, 2, 8, 8, 8)
    assert torch.equal(network(x)[0], copy.deepcopy(network)(x)[0])


def test_the_architecture_is_asked_for_where_there_is_one_and_nowhere_else() -> None:
    asked: dict[str, Any] = {"in_channels": 1, "num_classes": 3, "patch_size": (16,) * 3, "config": AMOS}
    message = "architecture of dints: expected the result of a search, got none. Pass the run of a finished"
    with pytest.raises(SettingError, match=message):
        build_model("dints", **asked)
    with pytest.raises(SettingError, match=r"architecture of nnunet: expected none, got one\. Leave it out"):
        build_model("nnunet", architecture=TINY, **asked)


def test_nothing_is_printed_while_it_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    built()
    assert capsys.readouterr().out == ""
