"""Which blocks of channels are active, and the tables by which the GPU kernels walk them in each of three directions.

A table lists what each row of output channels gathers: entry k names an input channel, how far it moves along depth,
and the N weights that it meets. Where blocks are 16 inputs wide or more, entries come in runs of neighbouring channels,
which a GPU loads as long words; else channels are gathered one by one.

Shapes: O output channels, C input channels, G blocks of outputs, J blocks of inputs, R rows, K entries, N columns of
a row, M chunks, P partial sums, T taps (elements of a kernel).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import pad

from dstlib.errors import require
from dstlib.layers.shift import channel_moves

NARROW = 16  # the least that a matrix unit multiplies at once, in each direction
TAPS = 9  # of the kernels that are computed by tiles
LARGEST = 64
Pair = tuple[int, int]
_SIZES = tuple(2**i for i in range(LARGEST.bit_length()))
_NONE = torch.empty(0, TAPS, NARROW * NARROW, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Table:
    """What is gathered for each row of N output channels."""

    run: int  # so many entries in a row are neighbouring channels with the same shift; 1: none
    row_ptr: Tensor  # (R + 1) int32: row r has the entries row_ptr[r] .. row_ptr[r + 1] - 1
    col_idx: Tensor  # (K) int32: the channel
    shifts: Tensor  # (K) int32: by how many voxels the channel moves towards higher depths
    weight_idx: Tensor  # (K, N) int64: o · C + c, where in the weight the entry's weights are; O · C: there is none

    @property
    def chunk(self) -> int:
        """Entries per step of a kernel."""
        return max(self.run, NARROW)

    @property
    def num_rows(self) -> int:
        """R, how many rows there are."""
        return len(self.row_ptr) - 1

    def pack(self, weight: Tensor) -> Tensor:
        """Returns the weights (K, T, N) of the entries of a weight (O, C, \\*kernel), zero where there is none."""
        listed = pad(weight.reshape(weight.shape[0] * weight.shape[1], -1), (0, 0, 0, 1))
        return listed[self.weight_idx].transpose(1, 2).contiguous()

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """Returns a weight ``like`` another, of which these (K, T, N) are the entries, and the rest zero."""
        by_entry = packed.transpose(1, 2).flatten(0, 1)  # (K · N, T)
        count = like.shape[0] * like.shape[1]
        listed = by_entry.new_zeros((count + 1, by_entry.shape[1]))  # the last is where entries without a weight go
        listed[self.weight_idx.flatten()] = by_entry
        return listed[:count].reshape(like.shape).to(like.dtype)


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables of the three directions of a convolution by blocks.

    The input's gradient gathers output channels: those of all blocks above a block of inputs, if the latter are wide.
    If they are narrow, it has one column per entry of the forward table instead, a partial sum, and ``terms`` says
    which partial sums add up to which input channel: so matrix units stay full. ``moves`` is the shift of each column.

    ``order`` and ``backward_order`` say where in the weight (O · C · T, then T zeros) the weights of each block of
    16 × 16 lie, as the lanes of the kernels in tiles.cu read them; empty where Triton's kernels compute.
    """

    forward: Table
    backward_input: Table
    chunks: Tensor  # (M, 2) int32: row and first entry of what one program of the weight's gradient computes
    moves: Tensor  # (C) or (P) int32
    terms: Tensor  # (C, most) int32, -1 for none; (0, 0): the columns are the channels
    order: Tensor = _NONE  # (M, T, 256) int64, or empty
    backward_order: Tensor = _NONE  # likewise, of the input gradient's table, with the taps turned round

    def tensors(self) -> list[Tensor]:
        """Returns all tensors of the plan, as an operator of torch takes them."""
        tables = [(t.row_ptr, t.col_idx, t.shifts, t.weight_idx) for t in (self.forward, self.backward_input)]
        return [*tables[0], *tables[1], self.chunks, self.moves, self.terms, self.order, self.backward_order]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], size: Pair) -> "Plan":
        """Returns the plan that has these tensors, of blocks of ``size``."""
        forward, backward_input, others = tensors[:4], tensors[4:8], tensors[8:]
        return cls(Table(_run(size[1]), *forward), Table(_run(size[0]), *backward_input), *others)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of ``size`` = (outputs, inputs) channels in which there is any active weight.

    Every kernel visits whole blocks: (16, 16) and above suit the matrix units of a GPU best, (16, 1) shares each
    input channel among 16 outputs. A finer mask than the blocks is covered by them; its zeros are then computed with.
    The last blocks may reach beyond the channels.

    >>> mask = torch.zeros(32, 64, 1, 3, 3, dtype=torch.bool)
    >>> mask[:16, 16:32] = True
    >>> blocks = Blocks.of(mask, (16, 16))
    >>> blocks.active.tolist(), blocks.density
    ([[False, True, False, False], [False, False, False, False]], 0.125)
    """

    active: Tensor  # (G, J) bool
    size: Pair
    channels: Pair  # O, C
    _plans: dict[tuple[tuple[int, ...], torch.device, bool], Plan] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, mask: Tensor, size: Pair) -> "Blocks":
        """Returns the blocks that cover the True entries of a mask (O, C, \\*kernel).

        Raises:
            SettingError: The size is not of two powers of two up to 64, or the mask is no such mask.
        """
        is_size, where = len(size) == 2 and all(extent in _SIZES for extent in size), "Blocks.of()"
        allowed, remedy = f"two powers of two up to {LARGEST}", "Cover a mask of Block(48, 24) by (16, 8), say."
        require(is_size, "size", where, allowed=allowed, given=size, remedy=remedy)
        is_mask, given = mask.ndim >= 2 and mask.dtype == torch.bool, f"{mask.dtype} {tuple(mask.shape)}"
        allowed, remedy = "bool (O, C, *taps)", "Pass sparsifier.masks[name], or weight != 0."
        require(is_mask, "mask", where, allowed=allowed, given=given, remedy=remedy)
        (outputs, inputs), (out, into) = mask.shape[:2], size
        active_OC = mask.detach().reshape(outputs, inputs, -1).any(dim=2)
        whole = pad(active_OC, (0, -inputs % into, 0, -outputs % out))
        return cls(reduce(whole, "(g out) (j into) -> g j", "any", out=out, into=into), (out, into), (outputs, inputs))

    @cached_property
    def density(self) -> float:
        """The share of blocks that are active: what there is to compute, relative to a dense layer."""
        return float(self.active.float().mean())

    @property
    def cover(self) -> Tensor:
        """The mask (O, C) of what lies inside active blocks."""
        (out, into), (outputs, inputs) = self.size, self.channels
        return self.active.repeat_interleave(out, 0).repeat_interleave(into, 1)[:outputs, :inputs]

    def plan(self, shifts: Sequence[int], device: torch.device, *, tiled: bool = False) -> Plan:
        """Returns the kernels' tables on a device, made once; groups of input channels move by ``shifts`` along depth.

        ``tiled``: for the kernels that compute tiles, which take blocks of multiples of 16.
        """
        key = (tuple(shifts), device, tiled)
        if key not in self._plans:
            make, size = (plan_tiles, (NARROW, NARROW)) if tiled else (make_plan, self.size)
            plan = make(self.active.cpu(), self.size, self.channels, key[0])
            self._plans[key] = Plan.of_tensors([x.to(device) for x in plan.tensors()], size)
        return self._plans[key]


def make_plan(active_GJ: Tensor, size: Pair, channels: Pair, shifts: tuple[int, ...]) -> Plan:
    """Makes the tables of the active blocks; ``shifts`` are those of contiguous groups of channels, as in layers.shift.

    >>> make_plan(torch.tensor([[True, False]]), (1, 1), (1, 2), (0,)).forward.col_idx
    tensor([0], dtype=torch.int32)
    """
    (outputs, inputs), (out, into) = channels, size
    moves = channel_moves(inputs, shifts)
    places_OC = torch.arange(outputs * inputs).reshape(channels)
    forward = _table(active_GJ, size, places_OC, moves)
    starts = forward.row_ptr.tolist()
    pairs = [(r, k) for r in range(forward.num_rows) for k in range(starts[r], starts[r + 1], forward.chunk)]
    chunks = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
    if into < NARROW <= out:
        return _by_partial_sums(forward, chunks, channels, moves)
    back = _table(active_GJ.T, (into, out), places_OC.T, torch.zeros(outputs, dtype=torch.int32))
    return Plan(forward, back, chunks, moves, torch.empty(0, 0, dtype=torch.int32))


def plan_tiles(active_GJ: Tensor, size: Pair, channels: Pair, shifts: tuple[int, ...]) -> Plan:
    """Makes the tables for kernels that compute tiles, in blocks of 16 × 16, whose multiples ``size`` are."""
    out, into = (extent // NARROW for extent in size)
    fine = active_GJ.repeat_interleave(out, 0).repeat_interleave(into, 1)
    outputs, inputs = (-(-extent // NARROW) for extent in channels)
    plan = make_plan(fine[:outputs, :inputs], (NARROW, NARROW), channels, shifts)
    tap = torch.arange(TAPS)
    return replace(plan, order=_order(plan.forward, tap), backward_order=_order(plan.backward_input, tap.flip(0)))


def _order(table: Table, tap: Tensor) -> Tensor:
    """Returns where the weights of each block lie, by tap, in the order of the lanes: see multiply() in tiles.cu."""
    lane, four, pair = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(2), indexing="ij")
    k = 2 * (lane % 4) + 8 * (four % 2) + pair
    n = 4 * (lane // 8) + 2 * (four // 2) + lane // 4 % 2  # so that a lane's results are four channels side by side
    blocks = table.weight_idx.reshape(-1, NARROW * NARROW)[:, (k * NARROW + n).flatten()]
    return blocks[:, None] * TAPS + tap[:, None]


def _run(extent: int) -> int:
    """Returns how many neighbouring channels of a block are gathered at once."""
    return extent if extent >= NARROW else 1


def _table(active_GJ: Tensor, size: Pair, places_OC: Tensor, moves: Tensor) -> Table:
    """Makes the table by which outputs gather inputs; ``places_OC`` says where in the weight theirs are."""
    (out, into), (_, inputs), none = size, places_OC.shape, places_OC.numel()
    run = _run(into)
    # a run whose channels move differently is listed once for each shift, every time with the weights of its part
    parts = [(c, move) for c in range(0, inputs, run) for move in moves[c : c + run].unique().tolist()]
    first, move = (torch.tensor(column) for column in zip(*parts, strict=True))
    listed = active_GJ[:, first // into]
    row, part = listed.nonzero().unbind(1)
    channel = first[part, None] + torch.arange(run)  # (runs, run)
    reached = (channel < inputs) & (pad(moves, (0, run))[channel] == move[part, None])
    output = row[:, None, None] * out + torch.arange(out)
    weight_idx = pad(places_OC, (0, run, 0, out), value=none)[output, channel[..., None]]
    counts = listed.sum(dim=1) * run
    return Table(
        run=run,
        row_ptr=pad(counts.cumsum(0), (1, 0)).int(),
        col_idx=channel.flatten().int(),
        shifts=move[part].repeat_interleave(run).int(),
        weight_idx=weight_idx.masked_fill(~reached[..., None], none).flatten(0, 1),
    )


def _by_partial_sums(forward: Table, chunks: Tensor, channels: Pair, moves: Tensor) -> Plan:
    """Makes a plan with a row of partial sums per chunk, which gathers the outputs of its block."""
    outputs, inputs = channels
    out = forward.weight_idx.shape[1]
    row, start = chunks.long().unbind(1)
    entry = start[:, None] + torch.arange(NARROW)  # (M, 16)
    used = entry < forward.row_ptr[row + 1, None]
    padded = pad(forward.weight_idx, (0, 0, 0, NARROW), value=outputs * inputs)
    weight_idx = padded[entry].masked_fill(~used[..., None], outputs * inputs).transpose(1, 2)  # (M, out, 16)
    gathered = row[:, None] * out + torch.arange(out)
    back = Table(
        run=out,
        row_ptr=(torch.arange(len(row) + 1) * out).int(),
        col_idx=gathered.flatten().int(),
        shifts=torch.zeros(gathered.numel(), dtype=torch.int32),
        weight_idx=weight_idx.flatten(0, 1),
    )
    channel = pad(forward.col_idx, (0, NARROW))[entry].masked_fill(~used, inputs).flatten().long()  # of each sum
    order = channel.argsort(stable=True)
    counts = torch.bincount(channel, minlength=inputs + 1)
    place = torch.arange(len(order)) - pad(counts.cumsum(0), (1, 0))[channel[order]]
    terms = torch.full((inputs + 1, max(int(counts[:inputs].max()), 1)), -1)
    kept = channel[order] < inputs
    terms[channel[order][kept], place[kept]] = order[kept]
    return Plan(forward, back, chunks, pad(moves, (0, 1))[channel], terms[:inputs].int())
