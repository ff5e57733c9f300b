"""The tables by which the GPU kernels walk the blocks of a layer, in each of its three directions.

A table lists what each row of output channels gathers: entry k names an input channel, how far it moves along depth,
and the N connections whose weights it meets. Where blocks are 16 inputs wide or more, entries come in runs of
neighbouring channels, which a GPU loads as long words; else channels are gathered one by one.

Shapes: O output channels, C input channels, G blocks of outputs, J blocks of inputs, R rows, K entries, N columns of
a row, M chunks, S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

NARROW = 16  # the least that a matrix unit multiplies at once, in each direction
TAPS = 9  # of the kernels that are computed by tiles
Pair = tuple[int, int]
_TENSORS = ("rows", "channels", "shifts", "index")  # of a table
_NONE = torch.empty(0, TAPS, NARROW * NARROW, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Table:
    """What is gathered for each row of N output channels; O · C stands for "no connection" in ``index``."""

    rows: Tensor  # (R + 1) int32: row r has the entries rows[r] .. rows[r + 1] - 1
    channels: Tensor  # (K) int32
    shifts: Tensor  # (K) int32: by how many voxels the channel moves towards higher depths
    index: Tensor  # (K, N) int64: o · C + c, where in the weight the entry's weights are
    run: int  # so many entries in a row are neighbouring channels with the same shift; 1: none

    @property
    def chunk(self) -> int:
        """Entries per step of a kernel."""
        return max(self.run, NARROW)


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables of the convolution and of its input gradient, and what else the gradients need.

    The input gradient gathers output channels: those of all blocks above a block of inputs, if the latter are wide.
    If they are narrow, it has one column, or slot, per entry of the forward table instead, and ``terms`` says which
    slots add up to which input channel: so matrix units stay full. ``moves`` is the shift of each of its columns.

    ``order`` and ``back_order`` say where in the weight (O · C · T, then T zeros) the weights of each block of 16 × 16
    lie, as the lanes of the kernels in tiles.cu read them; empty where Triton's kernels compute.
    """

    forward: Table
    back: Table
    chunks: Tensor  # (M, 2) int32: the row, and the first entry, of what one program of the weight gradient computes
    moves: Tensor  # (C) or (S) int32
    terms: Tensor  # (C, most) int32, -1 for none; (0, 0): the columns are the channels
    shifted: bool  # whether any channel moves
    order: Tensor  # (M, T, 256) int64, or empty
    back_order: Tensor  # likewise, of the input gradient's table, with the taps turned round

    @property
    def tiled(self) -> bool:
        """Whether the kernels of tiles.cu compute."""
        return len(self.order) > 0

    def parts(self) -> tuple[list[Tensor], list[int]]:
        """The plan as an operator of torch can take it."""
        tables = [getattr(table, name) for table in (self.forward, self.back) for name in _TENSORS]
        others = (self.chunks, self.moves, self.terms, self.order, self.back_order)
        return [*tables, *others], [self.forward.run, self.back.run, int(self.shifted)]

    @classmethod
    def of_parts(cls, tensors: Sequence[Tensor], numbers: Sequence[int]) -> "Plan":
        """The inverse of ``parts``."""
        run, back_run, shifted = numbers
        rows, entries, shifts, index, *others = tensors
        forward = Table(rows, entries, shifts, index, run)
        rows, entries, shifts, index, *others = others
        back = Table(rows, entries, shifts, index, back_run)
        chunks, moves, terms, order, back_order = others
        return cls(forward, back, chunks, moves, terms, bool(shifted), order, back_order)

    def to(self, device: torch.device) -> "Plan":
        """The same tables on a device."""
        tensors, numbers = self.parts()
        return Plan.of_parts([tensor.to(device) for tensor in tensors], numbers)


def make_plan(active_GJ: Tensor, size: Pair, channels: Pair, shifts: tuple[int, ...]) -> Plan:
    """The tables of the active blocks; ``shifts`` are those of contiguous groups of channels, as in layers.shift."""
    outputs, inputs = channels
    per_group = -(-inputs // len(shifts))
    moves = torch.tensor([shifts[c // per_group] for c in range(inputs)], dtype=torch.int32)
    forward = _table(active_GJ, size, channels, moves)
    chunks = _chunks(forward)
    out, into = size
    if into < NARROW <= out:
        back, terms, moves = _slots(forward, chunks, channels, moves)
        return Plan(forward, back, chunks, moves, terms, any(shifts), _NONE, _NONE)
    still = torch.zeros(outputs, dtype=torch.int32)
    back = _table(active_GJ.T, (into, out), (inputs, outputs), still)
    turned = back.index % outputs * inputs + back.index // outputs  # from c · O + o
    none = back.index == outputs * inputs
    back = replace(back, index=turned.masked_fill(none, outputs * inputs))
    return Plan(forward, back, chunks, moves, torch.empty(0, 0, dtype=torch.int32), any(shifts), _NONE, _NONE)


def plan_tiles(active_GJ: Tensor, size: Pair, channels: Pair, shifts: tuple[int, ...]) -> Plan:
    """The tables for kernels that compute tiles, in blocks of 16 × 16, whose multiples ``size`` are."""
    out, into = (extent // NARROW for extent in size)
    fine = active_GJ.repeat_interleave(out, 0).repeat_interleave(into, 1)
    outputs, inputs = (-(-extent // NARROW) for extent in channels)
    plan = make_plan(fine[:outputs, :inputs], (NARROW, NARROW), channels, shifts)
    tap = torch.arange(TAPS)
    return replace(plan, order=_order(plan.forward, tap), back_order=_order(plan.back, tap.flip(0)))


def _order(table: Table, tap: Tensor) -> Tensor:
    """Where the weights of each block lie, for each tap in the order of the lanes: see multiply() in tiles.cu."""
    lane, four, pair = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(2), indexing="ij")
    k = 2 * (lane % 4) + 8 * (four % 2) + pair
    n = 4 * (lane // 8) + 2 * (four // 2) + lane // 4 % 2  # so that a lane's results are four channels side by side
    blocks = table.index.reshape(-1, NARROW * NARROW)[:, (k * NARROW + n).flatten()]
    return blocks[:, None] * TAPS + tap[:, None]


def _table(active_GJ: Tensor, size: Pair, channels: Pair, moves: Tensor) -> Table:
    outputs, inputs = channels
    out, into = size
    run = into if into >= NARROW else 1
    # a run whose channels move differently is listed once for each shift, every time with the weights of its part
    parts = [(c, move) for c in range(0, inputs, run) for move in moves[c : c + run].unique().tolist()]
    first, move = (torch.tensor(column) for column in zip(*parts, strict=True))
    listed = active_GJ[:, first // into]
    row, part = listed.nonzero().unbind(1)
    channel = first[part, None] + torch.arange(run)  # (runs, run)
    reached = (channel < inputs) & (pad(moves, (0, run))[channel] == move[part, None])
    output = row[:, None, None] * out + torch.arange(out)
    exists = reached[..., None] & (output < outputs)
    index = torch.where(exists, output * inputs + channel[..., None], outputs * inputs)
    counts = listed.sum(dim=1) * run
    return Table(
        rows=pad(counts.cumsum(0), (1, 0)).int(),
        channels=channel.flatten().int(),
        shifts=move[part].repeat_interleave(run).int(),
        index=index.flatten(0, 1),
        run=run,
    )


def _chunks(table: Table) -> Tensor:
    starts = table.rows.tolist()
    pairs = [(r, k) for r in range(len(starts) - 1) for k in range(starts[r], starts[r + 1], table.chunk)]
    return torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)


def _slots(forward: Table, chunks: Tensor, channels: Pair, moves: Tensor) -> tuple[Table, Tensor, Tensor]:
    """A row of slots per chunk of entries, which gathers the outputs of that chunk's block; then terms, and moves."""
    outputs, inputs = channels
    out = forward.index.shape[1]
    row, start = chunks.long().unbind(1)
    entry = start[:, None] + torch.arange(NARROW)  # (M, 16)
    used = entry < forward.rows[row + 1, None]
    padded = pad(forward.index, (0, 0, 0, NARROW), value=outputs * inputs)
    index = padded[entry].masked_fill(~used[..., None], outputs * inputs).transpose(1, 2)  # (M, out, 16)
    gathered = row[:, None] * out + torch.arange(out)
    back = Table(
        rows=(torch.arange(len(row) + 1) * out).int(),
        channels=gathered.flatten().int(),
        shifts=torch.zeros(gathered.numel(), dtype=torch.int32),
        index=index.flatten(0, 1),
        run=out,
    )
    channel = pad(forward.channels, (0, NARROW))[entry].masked_fill(~used, inputs).flatten().long()  # of each slot
    order = channel.argsort(stable=True)
    counts = torch.bincount(channel, minlength=inputs + 1)
    place = torch.arange(len(order)) - pad(counts.cumsum(0), (1, 0))[channel[order]]
    terms = torch.full((inputs + 1, max(int(counts[:inputs].max()), 1)), -1)
    kept = channel[order] < inputs
    terms[channel[order][kept], place[kept]] = order[kept]
    return back, terms[:inputs].int(), pad(moves, (0, 1))[channel]
