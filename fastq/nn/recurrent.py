"""QLSTM, QGRU, QRNN and their cells: torch's recurrent layers with int8 weights.

Each product with a weight is a QLinear: of the inputs (ih), of the hidden state (hh), of an LSTM's
projection (hr). What is between them, the cell, is `fastq.ops.recurrent_float`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastq.nn.layer import State, accept, as_array, operands_of
from fastq.nn.linear import QLinear
from fastq.ops import recurrent_float
from fastq.qparams import GATES
from fastq.weights import LinearWeight


class _Products(NamedTuple):
    """Of one layer in one direction: products of inputs, of hidden states, of what a cell gives."""

    ih: QLinear
    hh: QLinear
    hr: QLinear | None = None

    def recur(
        self, cell: str, gates: Tensor, first: Sequence[Tensor], axis: int, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """recurrent_float of these products, begun with h, and c of an LSTM."""
        hidden, state = (*first, None)[:2]
        if is_compiling() or type(gates) is not Tensor or _get_tracing_state():
            projection = [None] * 5 if self.hr is None else _state(self.hr)
            result: tuple[Tensor, Tensor] = torch.ops.fastq.recurrent(
                gates, *_state(self.hh), *projection, hidden, state, cell, axis, reverse
            )
            return result
        of_hr = None if self.hr is None else self.hr._operands()
        return _run(gates, self.hh._operands(), of_hr, hidden, state, cell, axis, reverse)


def _state(layer: QLinear) -> State:
    return layer.weight, layer.weight_scale, layer.bias, layer.input_scale, layer.input_zero_point


def _run(
    gates: Tensor, hh: Any, hr: Any, hidden: Tensor, state: Tensor | None, cell: str, axis: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    projection = None if hr is None else (hr.weight, hr.epilogue, hr.x_qparams)
    y, last = recurrent_float(
        as_array(gates), hh.weight, hh.epilogue, cell=cell, hidden=as_array(hidden),
        state=None if state is None else as_array(state), axis=axis, reverse=reverse,
        x_qparams=hh.x_qparams, projection=projection,
    )  # fmt: skip
    return torch.from_numpy(y), torch.from_numpy(last)


@torch.library.custom_op("fastq::recurrent", mutates_args=(), device_types="cpu")
def _recurrent(
    gates: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    hr_weight: Tensor | None,
    hr_weight_scale: Tensor | None,
    hr_bias: Tensor | None,
    hr_input_scale: Tensor | None,
    hr_input_zero_point: Tensor | None,
    hidden: Tensor,
    state: Tensor | None,
    cell: str,
    axis: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    hr = None
    if hr_weight is not None and hr_weight_scale is not None:
        of_hr = hr_weight, hr_weight_scale, hr_bias, hr_input_scale, hr_input_zero_point
        hr = operands_of(LinearWeight, (), of_hr)
    of_hh = weight, weight_scale, bias, input_scale, input_zero_point
    hh = operands_of(LinearWeight, (), of_hh)
    return _run(gates, hh, hr, hidden, state, cell, axis, reverse)


@_recurrent.register_fake
def _(
    gates: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    hr_weight: Tensor | None,
    hr_weight_scale: Tensor | None,
    hr_bias: Tensor | None,
    hr_input_scale: Tensor | None,
    hr_input_zero_point: Tensor | None,
    hidden: Tensor,
    state: Tensor | None,
    cell: str,
    axis: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    shape = gates.shape[0], gates.shape[1], hidden.shape[1]
    return gates.new_empty(shape), torch.empty_like(hidden if state is None else state)


class Recurrent(nn.Module):
    """What layers and cells share: their products, made of a float module and made one again.

    FLOAT      torch's class.
    ARGUMENTS  that both are made with, `bias` aside; attributes of both.
    """

    FLOAT: ClassVar[Any]
    ARGUMENTS: ClassVar[tuple[str, ...]] = ("input_size", "hidden_size")
    cell: str  # a key of GATES

    def __init__(
        self, sizes: dict[str, int], hidden_size: int, proj_size: int, bias: bool, device: Any,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        """sizes: of the inputs of the products with this suffix, as torch's parameters have it."""
        super().__init__()
        self.hidden_size, self.proj_size, self.bias = hidden_size, proj_size, bias
        self.suffixes = tuple(sizes)
        n, width, where = GATES[self.cell] * hidden_size, proj_size or hidden_size, (device, dtype)
        for suffix, inputs in sizes.items():
            self.add_module(f"ih{suffix}", QLinear(inputs, n, bias, *where))
            self.add_module(f"hh{suffix}", QLinear(width, n, bias, *where))
            if proj_size:
                self.add_module(f"hr{suffix}", QLinear(hidden_size, proj_size, False, *where))

    def products(self, suffix: str) -> _Products:
        """Those of one suffix."""
        fields = _Products._fields[: 2 + bool(self.proj_size)]
        return _Products(*(getattr(self, f"{name}{suffix}") for name in fields))

    @classmethod
    def from_float(cls, module: Any) -> Self:
        """Quantize a float layer: its weights per output, its biases stay float32.

        Raises TypeError unless `module` is torch's of this kind, ValueError if it is not finite.
        """
        if not isinstance(module, cls.FLOAT):
            raise TypeError(
                f"{cls.__name__}.from_float: got {type(module).__name__}, wanted "
                f"torch.nn.{cls.FLOAT.__name__}"
            )
        made = cls(**{name: getattr(module, name) for name in cls.ARGUMENTS}, bias=module.bias)
        for name, product in made.named_children():
            weight, bias = (getattr(module, f"{kind}_{name}", None) for kind in ("weight", "bias"))
            linear: Any = SimpleNamespace(weight=weight, bias=bias, training=module.training)
            product._quantize(linear, None)
        return made.train(module.training)

    def to_float(self) -> Any:
        """torch's module with the dequantized weights, and the biases."""
        module = self.FLOAT(**{name: getattr(self, name) for name in self.ARGUMENTS},
                            bias=self.bias)  # fmt: skip
        with torch.no_grad():
            for name, product in self.named_children():
                for kind, value in product.to_float().named_parameters():
                    getattr(module, f"{kind}_{name}").copy_(value)
        return module.train(self.training)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*self.ARGUMENTS, "bias"))

    def _states(self, hx: Any, lead: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """The first hidden state, and c of an LSTM, of these leading sizes."""
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 1 + (self.cell == "lstm")]
        if hx is None:
            return [like.new_zeros(*lead, size) for size in sizes]
        given = hx if self.cell == "lstm" else (hx,)
        name = type(self).__name__
        if not isinstance(given, tuple | list) or [type(x) for x in given] != [Tensor] * len(sizes):
            wanted = "a tuple (h_0, c_0) of tensors" if self.cell == "lstm" else "a tensor"
            raise TypeError(f"{name}: hx is a {type(hx).__name__}; wanted {wanted}, or None")
        return [
            accept(name, x, f"{(*lead, size)}", x.shape == (*lead, size), what)
            for x, size, what in zip(given, sizes, ("h_0", "c_0"), strict=False)
        ]


class QRecurrent(Recurrent):
    """What the layers QLSTM, QGRU and QRNN share: torch's arguments, inputs, states and results.

    Without calibration each row of the inputs and, at each step, of the hidden state is quantized
    by its own range, as in a QLinear; `set_input_qparams` of the QLinears within makes one static.
    Products are exact in int32; gates and states are float32, their sigmoids and tangents
    computed so that the bits are the same on every CPU: `fastq.reference.recurrent_float`. A
    sequence that is passed in parts, each begun with the states of the one before, gives the bits
    of the whole; each sequence of a batch, packed or not, those that it gives alone.

    Arguments, inputs (batched, unbatched, a PackedSequence), first states and results as of torch's
    layer; device must be None or CPU, dtype None or float32. In training mode there is dropout
    between the layers. The state is that of QLinears called ih_l0, hh_l0, hr_l0 (an LSTM's
    projection), ih_l0_reverse, ...; a new module has weights of 0: load a state_dict into it, or
    use `from_float`.

    A call raises TypeError unless inputs and states are float32, ValueError for wrong shapes and
    for a sequence without steps, RuntimeError if one requires grad in grad mode.
    """

    ARGUMENTS = (*Recurrent.ARGUMENTS, "num_layers", "batch_first", "dropout", "bidirectional")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int = 0,
    ) -> None:
        # it refuses what torch would, and warns of a dropout that does nothing
        nn.LSTM(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                proj_size, device="meta")  # fmt: skip
        ends = ("", "_reverse")[: 1 + bidirectional]
        later = len(ends) * (proj_size or hidden_size)
        sizes = {
            f"_l{i}{end}": later if i else input_size
            for i, end in itertools.product(range(num_layers), ends)
        }
        super().__init__(sizes, hidden_size, proj_size, bias, device, dtype)
        self.input_size, self.num_layers, self.batch_first = input_size, num_layers, batch_first
        self.dropout, self.bidirectional = float(dropout), bidirectional

    def forward(self, input: Any, hx: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        x: Tensor = input.data if packed else input
        batched = packed or x.dim() == 3
        name, k = type(self).__name__, self.input_size
        wanted = f"(steps, {k}) or ({'B, steps' if self.batch_first else 'steps, B'}, {k})"
        fits = x.dim() in ((2,) if packed else (2, 3)) and x.shape[-1] == k
        x = accept(name, x, wanted, fits)
        time = int(self.batch_first and batched and not packed)
        sizes = input.batch_sizes.tolist() if packed else None
        if not batched:
            x = x.unsqueeze(1)
        if not packed and not x.shape[time]:
            raise ValueError(f"{name}: x {tuple(x.shape)} has no steps; wanted one or more")
        rows = sizes[0] if packed else x.shape[1 - time]
        states = self._states(hx, (len(self.suffixes), *((rows,) if batched else ())), x)
        if not batched:
            states = [state.unsqueeze(1) for state in states]
        if packed and input.sorted_indices is not None:
            states = [state[:, input.sorted_indices] for state in states]
        last, made = [], []
        for number, suffix in enumerate(self.suffixes):
            products, reverse = self.products(suffix), suffix.endswith("_reverse")
            first = [state[number] for state in states]
            gates = products.ih(x)
            if packed:
                y, *ends = self._run_packed(products, gates, first, sizes, reverse)
            else:
                y, *ends = self._run(products, gates, first, time, reverse)
            made.append(y)
            last.append(ends)
            if len(made) == 1 + self.bidirectional:
                x = made[0] if len(made) == 1 else torch.cat(made, -1)
                made = []
                if self.dropout and self.training and number + 1 < len(self.suffixes):
                    x = F.dropout(x, self.dropout)
        states = [torch.stack(parts) for parts in zip(*last, strict=True)]
        if packed:
            if input.unsorted_indices is not None:
                states = [state[:, input.unsorted_indices] for state in states]
            x = PackedSequence(x, *input[1:])
        if not batched:
            x, states = x.squeeze(1), [state.squeeze(1) for state in states]
        return x, (tuple(states) if self.cell == "lstm" else states[0])

    def _run(
        self, products: _Products, gates: Tensor, first: Sequence[Tensor], time: int, reverse: bool
    ) -> list[Tensor]:
        """One layer in one direction: its hidden states, the last of them, the last c of an LSTM.

        gates has three axes, of which `time` is the sequence; first are h and c.
        """
        y, state = products.recur(self.cell, gates, first, time, reverse)
        return [y, y.select(time, 0 if reverse else -1), state][: 1 + len(first)]

    def _run_packed(
        self, products: _Products, gates: Tensor, first: Sequence[Tensor], sizes: list[int],
        reverse: bool,
    ) -> list[Tensor]:  # fmt: skip
        """The same of gates (sum of sizes, ..), whose step t has sizes[t] rows, no more than the
        one before: as many steps of one size as there are at once."""
        states = [state.clone() for state in first]
        counts = [(rows, len(list(steps))) for rows, steps in itertools.groupby(sizes)]
        ends = list(itertools.accumulate(rows * steps for rows, steps in counts))
        y = gates.new_empty(len(gates), states[0].shape[1])
        for (rows, steps), end in list(zip(counts, ends, strict=True))[:: -1 if reverse else 1]:
            part = slice(end - rows * steps, end)
            part_gates = gates[part].unflatten(0, (steps, rows))
            made, *last = self._run(products, part_gates, [s[:rows] for s in states], 0, reverse)
            y[part] = made.flatten(0, 1)
            for state, now in zip(states, last, strict=True):
                state[:rows] = now
        return [y, *states]


class QRecurrentCell(Recurrent):
    """What QLSTMCell, QGRUCell and QRNNCell share: one step of a QRecurrent of one layer.

    Arguments, inputs (B, input_size) or (input_size,), first states and results as of torch's cell.
    The state is that of two QLinears called ih and hh. Errors as of a QRecurrent.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__({"": input_size}, hidden_size, 0, bias, device, dtype)
        self.input_size = input_size

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        k = self.input_size
        fits = input.dim() in (1, 2) and input.shape[-1] == k
        x = accept(type(self).__name__, input, f"(B, {k}) or ({k},)", fits)
        products, batched = self.products(""), x.dim() == 2
        states = self._states(hx, tuple(x.shape[:-1]), x)
        if not batched:
            x, states = x.unsqueeze(0), [state.unsqueeze(0) for state in states]
        y, state = products.recur(self.cell, products.ih(x).unsqueeze(0), states, 0, False)
        results = [y[0], state][: len(states)]
        if not batched:
            results = [result.squeeze(0) for result in results]
        return tuple(results) if self.cell == "lstm" else results[0]


class QLSTM(QRecurrent):
    """torch.nn.LSTM in int8: see QRecurrent.

    QLSTM(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, proj_size=0, device=None, dtype=None)
    """

    FLOAT, cell = nn.LSTM, "lstm"
    ARGUMENTS = (*QRecurrent.ARGUMENTS, "proj_size")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device, dtype, proj_size=proj_size,
        )  # fmt: skip


class QGRU(QRecurrent):
    """torch.nn.GRU in int8: see QRecurrent.

    QGRU(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, device=None, dtype=None)
    """

    FLOAT, cell = nn.GRU, "gru"


class QRNN(QRecurrent):
    """torch.nn.RNN in int8, with "tanh" or "relu" as its nonlinearity: see QRecurrent.

    QRNN(input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True, batch_first=False,
    dropout=0.0, bidirectional=False, device=None, dtype=None)
    """

    FLOAT = nn.RNN
    ARGUMENTS = (*QRecurrent.ARGUMENTS, "nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.cell = _activation(type(self).__name__, nonlinearity)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


class QLSTMCell(QRecurrentCell):
    """torch.nn.LSTMCell in int8: see QRecurrentCell."""

    FLOAT, cell = nn.LSTMCell, "lstm"


class QGRUCell(QRecurrentCell):
    """torch.nn.GRUCell in int8: see QRecurrentCell."""

    FLOAT, cell = nn.GRUCell, "gru"


class QRNNCell(QRecurrentCell):
    """torch.nn.RNNCell in int8, with "tanh" or "relu" as its nonlinearity: see QRecurrentCell.

    QRNNCell(input_size, hidden_size, bias=True, nonlinearity="tanh", device=None, dtype=None)
    """

    FLOAT = nn.RNNCell
    ARGUMENTS = (*Recurrent.ARGUMENTS, "nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.cell = _activation(type(self).__name__, nonlinearity)
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.nonlinearity = nonlinearity


def _activation(name: str, nonlinearity: Any) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"{name}: nonlinearity={nonlinearity!r}; wanted 'tanh' or 'relu'")
    return str(nonlinearity)


RECURRENT = (QLSTM, QGRU, QRNN, QLSTMCell, QGRUCell, QRNNCell)
