"""Branches that are fused into one layer after training: the zeros that are left, and what the summary says of them."""

import re
from pathlib import Path

import pytest
import torch
from networks import of_timm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dstlib

PAGE = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()


class Branches(nn.Module):
    """RepVGG's block without its norms: 3×3, 1×1 and the identity, which ``fuse`` adds into one 3×3."""

    def __init__(self, channels):
        super().__init__()
        self.square = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x):
        return self.square(x) + self.point(x) + x

    def fuse(self):
        fused = nn.Conv2d(*self.square.weight.shape[:2], 3, padding=1, bias=False)
        with torch.no_grad():
            fused.weight.copy_(self.square.weight)
            fused.weight[:, :, 1, 1] += self.point.weight[:, :, 0, 0] + torch.eye(len(fused.weight))
        return fused


def trained(model, x, sparsity=0.9, steps=2):
    """Its sparsifier, after some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=sparsity, method="static")
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return sparsifier


def of_dense_with_zeros(sparsifier):
    """Their number, non-zeros and entries, as the summary says them."""
    found = re.search(
        r"^(\d+) dense weights? with zeros: ([\d,]+) of ([\d,]+) entries", str(sparsifier.summary()), re.M
    )
    return None if found is None else tuple(int(number.replace(",", "")) for number in found.groups())


def num_zero(parameter):
    return int((parameter == 0).sum())


def test_fused_branches_are_as_sparse_as_their_masks_together_and_the_summary_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(Branches(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 8, 6, 6)
    sparsifier = trained(model, x)
    assert of_dense_with_zeros(sparsifier) is None
    expected = sparsifier.masks["0.square.weight"].clone()
    expected[:, :, 1, 1] |= sparsifier.masks["0.point.weight"][:, :, 0, 0] | torch.eye(8).bool()
    before = model(x)
    model[0] = model[0].fuse()
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model[0].weight != 0, expected)
    assert of_dense_with_zeros(sparsifier) == (1, int(expected.sum()), 8 * 8 * 9)
    rows = {row.name: row for row in sparsifier.summary().rows}
    assert rows["0.weight"].num_active == int(expected.sum())
    assert rows["0.square.weight"].num_total == rows["0.point.weight"].num_total == 0
    text = str(sparsifier.summary())
    assert "1 sparse weight: " in text
    num_all = sum(p.numel() for p in model.parameters())
    num_nonzero = int(expected.sum()) + int(sparsifier.masks["2.weight"].sum()) + 4
    assert f"whole model: {num_nonzero:,} of {num_all:,} parameters" in text
    assert sparsifier.summary().params == num_nonzero


def test_a_step_after_fusion_is_one_warning_for_all_that_is_gone():
    torch.manual_seed(0)
    model = nn.Sequential(Branches(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 8, 6, 6)
    trained(model, x)
    model[0] = model[0].fuse()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match=r"0\.square\.weight: sparse until now.*\(1 more like it\)") as caught:
        optimizer.step()
    assert len([w for w in caught if "sparse until now" in str(w.message)]) == 1


def test_what_was_fused_becomes_sparse_again_without_a_loss():
    torch.manual_seed(0)
    model = nn.Sequential(Branches(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    trained(model, torch.randn(2, 8, 6, 6)).detach()
    model[0] = model[0].fuse()
    before = model[0].weight.detach().clone()
    masks = dstlib.sparsify(model, sparsity=0.5, method="static").masks
    assert torch.equal(model[0].weight, before)
    assert masks["0.weight"][before != 0].all()


def test_dense_weights_are_counted_as_they_are_in_the_model_now():
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model = nn.Sequential(depthwise, nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, groups=4))
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
    model[0] = nn.Identity()
    model[2].load_state_dict({name: x.clone() for name, x in model[2].state_dict().items()}, assign=True)
    rows = {row.name: row.reason for row in sparsifier.summary().rows}
    assert rows == {"1.weight": "", "2.weight": "depthwise: sparse only if included by name"}
    assert sparsifier.summary().params == 16 + 4 + 4 * 9 + 4


def test_a_norm_that_goes_into_its_convolution_leaves_every_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 4, 6, 6)
    sparsifier = trained(model, x)
    model.eval()
    before, mask, density = model(x), sparsifier.masks["0.weight"].clone(), sparsifier.density
    model[0], model[1] = fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model[0].weight != 0, mask)
    assert sparsifier.density == density
    assert of_dense_with_zeros(sparsifier) is None


@pytest.mark.long
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_the_summary_counts_what_is_left_of_the_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    make, inputs = of_timm(name)
    torch.manual_seed(0)
    model, (x,) = make(timm), inputs()
    sparsifier = trained(model, x)
    model.eval()
    reparameterize_model(model, inplace=True)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    rows = {row.name: row for row in sparsifier.summary().rows if row.num_total}
    assert {name: (row.num_total, row.num_total - row.num_active) for name, row in rows.items()} == {
        name: (p.numel(), num_zero(p)) for name, p in matrices.items()
    }
    came = [row for row in rows.values() if "came to the model" in row.reason and row.num_active < row.num_total]
    num_active, num_total = sum(row.num_active for row in came), sum(row.num_total for row in came)
    assert of_dense_with_zeros(sparsifier) == (len(came), num_active, num_total)
    assert f"| `{name}` | 0.1000 | {num_active / num_total:.4f} |" in PAGE, "docs/networks.md says something else"
    assert sparsifier.summary().params == sum(p.numel() - num_zero(p) * (p.ndim >= 2) for p in model.parameters())
