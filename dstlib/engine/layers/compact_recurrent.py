"""Recurrent layers and cells that hold the active weights of their gates only.

Shapes: T steps, N batch, I inputs, R outputs of a step, H hidden, B rows of all steps, one behind the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import PackedSequence

from dstlib.engine.layers.active_matrix import ActiveMatrix, product
from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.errors import InputError

State = tuple[Tensor, ...]  # h (N, R), of an LSTM also c (N, H)


def lstm_step(gates: Tensor, c: Tensor) -> State:
    """Computes a step of an LSTM: gates (N, 4 · H) and c (N, H) → h and c, (N, H)."""
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(of_input: Tensor, of_hidden: Tensor, h: Tensor) -> State:
    """Computes a step of a GRU: what input and h give to the gates, (N, 3 · H) each, and h (N, H) → h (N, H)."""
    r, z = (of_input + of_hidden).chunk(3, dim=1)[:2]
    n = (of_input.chunk(3, dim=1)[2] + r.sigmoid() * of_hidden.chunk(3, dim=1)[2]).tanh()
    return (n + z.sigmoid() * (h - n),)


class Stepping(CompactLayer):
    """What recurrent layers and cells share."""

    kind = ActiveMatrix

    def step(self, mode: str, of_input: Tensor, state: State, suffix: str = "") -> State:
        """Computes a step from what the input gives to the gates, (N, gates · H)."""
        bias = self._parameters.get(f"bias_hh{suffix}")
        of_hidden = product(self, f"weight_hh{suffix}", state[0], bias)
        if mode == "GRU":
            return gru_step(of_input, of_hidden, state[0])
        if mode != "LSTM":
            return ((of_input + of_hidden).relu() if mode == "RNN_RELU" else (of_input + of_hidden).tanh(),)
        h, c = lstm_step(of_input + of_hidden, state[1])
        return product(self, f"weight_hr{suffix}", h, None) if f"weight_hr{suffix}" in self._parameters else h, c

    def gates(self, x: Tensor, suffix: str = "") -> Tensor:
        """Computes what inputs give to the gates, (B, I) → (B, gates · H)."""
        return product(self, f"weight_ih{suffix}", x, self._parameters.get(f"bias_ih{suffix}"))


class CompactRecurrent(Stepping):
    """An ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` that holds active weights alone: see :class:`CompactLSTM`."""

    mode: str
    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float
    hidden_size: int
    proj_size: int

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """(T, N, I) → (T, N, R), and the last states; axes, packed sequences and ``hx`` as of the plain layer.

        Raises:
            InputError: The states to begin with are of other shapes.
        """
        return self.alone(self._forward, input, hx)

    def _forward(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            y, last = self._run(data, sizes.tolist(), self._first(data, int(sizes[0]), hx, order))
            return PackedSequence(y, sizes, order, back), self._given(last, back)
        _check_axes(self, input, (2, 3))
        x = input if input.ndim == 3 else input.unsqueeze(0 if self.batch_first else 1)
        x = x.transpose(0, 1) if self.batch_first else x
        if input.ndim == 2 and hx is not None:
            hx = tuple(s.unsqueeze(1) for s in hx) if isinstance(hx, tuple | list) else hx.unsqueeze(1)
        length, num = x.shape[:2]
        y, last = self._run(x.flatten(0, 1), [num] * length, self._first(x, num, hx, None))
        y = y.unflatten(0, (length, num))
        y = y.transpose(0, 1) if self.batch_first else y
        if input.ndim == 2:
            y, last = y.squeeze(0 if self.batch_first else 1), tuple(s.squeeze(1) for s in last)
        return y, self._given(last, None)

    def flatten_parameters(self) -> None:
        """Leaves the weights where they are: on a GPU the plain layer puts whole matrices side by side for cuDNN."""

    def _given(self, last: State, back: Tensor | None) -> Any:
        """Returns states as the plain layer does, in the caller's order."""
        last = last if back is None else tuple(s.index_select(1, back) for s in last)
        return last if self.mode == "LSTM" else last[0]

    def _first(self, x: Tensor, num: int, hx: Any, order: Tensor | None) -> State:
        """Returns the states to begin with, (layers · directions, N, R) or H, sequences in the order of the data."""
        num_states = self.num_layers * (1 + self.bidirectional)
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        if hx is None:
            return tuple(x.new_zeros(num_states, num, size) for size in sizes)
        states = hx if isinstance(hx, tuple | list) else (hx,)
        wanted, given = [(num_states, num, size) for size in sizes], [tuple(s.shape) for s in states]
        if given != wanted:
            raise _unfit_states(self, wanted, given)
        return tuple(states) if order is None else tuple(s.index_select(1, order) for s in states)

    def _run(self, x: Tensor, sizes: Sequence[int], first: State) -> tuple[Tensor, State]:
        """Runs all layers: (B, I) → (B, R · directions), and the last states."""
        ways, last = ("", "_reverse") if self.bidirectional else ("",), []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            found = []
            for way, name in enumerate(ways):
                begin = tuple(s[layer * len(ways) + way] for s in first)
                y, end = self._pass(f"_l{layer}{name}", x, sizes, begin)
                found.append(y)
                last.append(end)
            x = torch.cat(found, dim=1)
        return x, tuple(torch.stack(states) for states in zip(*last, strict=True))

    def _pass(self, suffix: str, x: Tensor, sizes: Sequence[int], first: State) -> tuple[Tensor, State]:
        """Runs one direction of a layer: (B, I) → (B, R), and the last state of each sequence.

        Of T steps, step t has the first ``sizes[t]`` of N sequences, the longest first.
        """
        of_input, outputs = self.gates(x, suffix).split(list(sizes)), [x] * len(sizes)
        steps = range(len(sizes))
        state, ended = tuple(s[:0] for s in first), []
        for t in reversed(steps) if suffix.endswith("_reverse") else steps:
            begun, num = len(state[0]), sizes[t]
            if num < begun:  # the shorter ones are at their end
                ended.append(tuple(s[num:] for s in state))
                state = tuple(s[:num] for s in state)
            elif num > begun:  # backwards the shorter ones begin later
                state = tuple(torch.cat([s, s0[begun:num]]) for s, s0 in zip(state, first, strict=True))
            state = self.step(self.mode, of_input[t], state, suffix)
            outputs[t] = state[0]
        ended.append(state)
        return torch.cat(outputs), tuple(torch.cat(parts[::-1]) for parts in zip(*ended, strict=True))


def _check_axes(layer: nn.Module, input: Tensor, allowed: tuple[int, int]) -> None:
    if input.ndim not in allowed or (input.ndim == allowed[1] == 3 and 0 in input.shape[:2]):
        axes, remedy = f"{allowed[0]} or {allowed[1]} axes, none of them empty", "Pass what the plain layer takes."
        raise InputError.of("input", _where(layer), allowed=axes, given=tuple(input.shape), remedy=remedy)


def _unfit_states(layer: nn.Module, wanted: Sequence[object], given: Sequence[object]) -> InputError:
    remedy = "Pass what the plain layer takes."
    return InputError.of("hx", _where(layer), allowed=f"states of shapes {wanted}", given=given, remedy=remedy)


def _where(layer: nn.Module) -> str:
    return f"a {type(layer).__name__}"


class CompactLSTM(CompactRecurrent, nn.LSTM):
    """An ``nn.LSTM`` that holds the active weights of its gates alone, made by ``make_compact()``."""


class CompactGRU(CompactRecurrent, nn.GRU):
    """An ``nn.GRU`` that holds the active weights of its gates alone, made by ``make_compact()``."""


class CompactRNN(CompactRecurrent, nn.RNN):
    """An ``nn.RNN`` that holds its active weights alone, made by ``make_compact()``."""


class CompactCell(Stepping):
    """A recurrent cell that holds active weights alone."""

    hidden_size: int

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """(N, I) → (N, H), of an LSTM also c (N, H); or without N."""
        return self.alone(self._forward, input, hx)

    def _forward(self, input: Tensor, hx: Any) -> Any:
        _check_axes(self, input, (1, 2))
        x = input if input.ndim == 2 else input.unsqueeze(0)
        is_lstm = isinstance(self, nn.LSTMCell)
        given = hx if is_lstm and hx is not None else (hx,) * (1 + is_lstm)
        size = *input.shape[:-1], self.hidden_size
        if any(s is not None and s.shape != size for s in given):
            raise _unfit_states(self, [size] * len(given), [None if s is None else tuple(s.shape) for s in given])
        state = tuple(x.new_zeros(len(x), size[-1]) if s is None else s.view(len(x), size[-1]) for s in given)
        mode = "LSTM" if is_lstm else "GRU" if isinstance(self, nn.GRUCell) else f"RNN_{self.nonlinearity}".upper()
        found = self.step(str(mode), self.gates(x), state)
        found = found if input.ndim == 2 else tuple(s.squeeze(0) for s in found)
        return found if is_lstm else found[0]


class CompactLSTMCell(CompactCell, nn.LSTMCell):
    """An ``nn.LSTMCell`` that holds the active weights of its gates alone, made by ``make_compact()``."""


class CompactGRUCell(CompactCell, nn.GRUCell):
    """An ``nn.GRUCell`` that holds the active weights of its gates alone, made by ``make_compact()``."""


class CompactRNNCell(CompactCell, nn.RNNCell):
    """An ``nn.RNNCell`` that holds its active weights alone, made by ``make_compact()``."""
