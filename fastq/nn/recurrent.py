"""QLSTM, QGRU, QRNN and their cells: torch's recurrent layers with int8 weights.

Each product with a weight is a QLinear: of the inputs (ih), of the hidden state (hh), of an LSTM's
projection (hr). What is between them, the cell, is `fastq.ops.recurrent_float`. torch.compile and
torch.export see one operator for all layers, `fastq::recurrent`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastq.graph import CELL_LAYER, FUNCTIONS, RECURRENT_LAYER
from fastq.nn.layer import (
    STATE,
    State,
    accept,
    array_of,
    check_kind,
    check_sizes,
    check_tensor,
    float_twin,
    operands_of,
)
from fastq.nn.linear import QLinear, linear
from fastq.ops import Operands, recurrent_float
from fastq.qconfig import DEFAULT, QConfig
from fastq.qparams import GATES
from fastq.weights import LinearWeight, check_k


class _Products(NamedTuple):
    """The products of one layer in one direction: with inputs (ih), hidden states (hh) and, of a
    projection, what a cell gives (hr)."""

    ih: Operands
    hh: Operands
    hr: Operands | None = None


class _Plan(NamedTuple):
    """How layers are put together.

    sizes  rows of each step of packed sequences, no more than of the one before; () for sequences
           of one length, whose steps are axis `time` of three.
    """

    cell: str
    sizes: Sequence[int]
    time: int
    bidirectional: bool
    dropout: float


def _layers(
    x: Tensor, states: Sequence[Tensor], products: Sequence[_Products], plan: _Plan
) -> list[Tensor]:
    """All layers: the last one's hidden states, then for all layers and directions the last ones,
    and the last c of an LSTM; states has their first ones.

    ValueError for what does not fit together: products take addresses.
    """
    count = 1 + (plan.cell == "lstm")
    if len(states) != count or any(len(state) != len(products) for state in states):
        raise ValueError(
            f"recurrent: states {[tuple(state.shape) for state in states]}; wanted {count}, of "
            f"{len(products)} layers and directions"
        )
    sizes = plan.sizes
    if sizes and (
        sum(sizes) != len(x) or min(sizes) < 1 or sorted(sizes, reverse=True) != [*sizes]
    ):
        raise ValueError(
            f"recurrent: batch_sizes {list(sizes)!s:.60} for {len(x)} rows; wanted sizes greater "
            "than 0 that do not grow, and that sum up to the rows"
        )
    ends, made = [], []
    for number, product in enumerate(products):
        reverse = plan.bidirectional and number % 2 == 1
        first = [state[number] for state in states]
        if x.shape[-1] != product.ih.weight.k:
            raise ValueError(
                f"recurrent: layer {number} takes {product.ih.weight.k} features, and is given "
                f"{x.shape[-1]}"
            )
        gates = linear(x, x.shape, product.ih)
        y, *last = _direction(gates, first, product, plan, reverse)
        made.append(y)
        ends.append(last)
        if len(made) == 1 + plan.bidirectional:
            x = y if len(made) == 1 else torch.cat(made, -1)
            made = []
            if plan.dropout and number + 1 < len(products):
                x = F.dropout(x, plan.dropout)
    if len(ends) == 1:
        return [x, *(state.unsqueeze(0) for state in ends[0])]
    return [x, *(torch.stack(parts) for parts in zip(*ends, strict=True))]


def _direction(
    gates: Tensor, states: list[Tensor], products: _Products, plan: _Plan, reverse: bool
) -> list[Tensor]:
    """One layer in one direction: its hidden states, the last of them, the last c of an LSTM."""
    if not plan.sizes:
        return _steps(gates, states, products, plan.cell, plan.time, reverse)
    # as many steps at once as have the same rows
    counts = [(rows, len(list(steps))) for rows, steps in itertools.groupby(plan.sizes)]
    ends = list(itertools.accumulate(rows * steps for rows, steps in counts))
    states = [state.clone() for state in states]
    y = gates.new_empty(len(gates), states[0].shape[1])
    for (rows, steps), end in list(zip(counts, ends, strict=True))[:: -1 if reverse else 1]:
        part = slice(end - rows * steps, end)
        part_gates = gates[part].unflatten(0, (steps, rows))
        first = [state[:rows] for state in states]
        made, *last = _steps(part_gates, first, products, plan.cell, 0, reverse)
        y[part] = made.flatten(0, 1)
        for state, now in zip(states, last, strict=True):
            state[:rows] = now
    return [y, *states]


def _steps(
    gates: Tensor, states: list[Tensor], products: _Products, cell: str, time: int, reverse: bool
) -> list[Tensor]:
    """One layer in one direction, of sequences of one length: `ops.recurrent_float`."""
    _, hh, hr = products
    given, *held = (array_of(f"{hh.name}: x", x) for x in (gates, *states))
    hidden, state = (*held, None)[:2]
    y, last = recurrent_float(
        given, hh.weight, hh.epilogue, cell=cell, hidden=hidden, state=state,
        axis=time, reverse=reverse, x_qparams=hh.x_qparams,
        projection=None if hr is None else (hr.weight, hr.epilogue, hr.x_qparams),
    )  # fmt: skip
    made, state_after = torch.from_numpy(y), torch.from_numpy(last)
    if cell != "lstm":
        return [made, state_after]
    return [made, made.select(time, 0 if reverse else -1).clone(), state_after]


def _recurrent(
    x: Tensor,
    states: Sequence[Tensor],
    layers: Sequence[Tensor],
    projected: bool,
    cell: str,
    sizes: Sequence[int],
    time: int,
    bidirectional: bool,
    dropout: float,
) -> list[Tensor]:
    """_layers; `layers` has the five tensors of each QLinear, one after the other, an empty one for
    what it has not: torch.jit.trace knows no lists with None."""
    parts = [operands_of(LinearWeight, (), _state(*layers[i : i + 5]))
             for i in range(0, len(layers), 5)]  # fmt: skip
    x = accept("fastq::recurrent", x, "(steps, B, ..) or (sum of sizes, ..)", x.dim() in (2, 3))
    plan = _Plan(cell, sizes, time, bidirectional, dropout)
    return _layers(x, states, _grouped(parts, projected), plan)


_operator = torch.library.custom_op(
    "fastq::recurrent", _recurrent, mutates_args=(), device_types="cpu"
)
FUNCTIONS[RECURRENT_LAYER] = _recurrent


def _cell(x: Tensor, states: Sequence[Tensor], layers: Sequence[Tensor], cell: str) -> Any:
    """One step of a cell: its states, as torch's operator gives them."""
    first = [state[None] for state in states]
    _, *last = _recurrent(x[None], first, layers, False, cell, (), 0, False, 0.0)
    return [state[0] for state in last] if cell == "lstm" else last[0][0]


FUNCTIONS[CELL_LAYER] = _cell


@_operator.register_fake
def _(
    x: Tensor,
    states: Sequence[Tensor],
    layers: Sequence[Tensor],
    projected: bool,
    cell: str,
    sizes: Sequence[int],
    time: int,
    bidirectional: bool,
    dropout: float,
) -> list[Tensor]:
    width = states[0].shape[-1] * (1 + bidirectional)
    return [x.new_empty(*x.shape[:-1], width), *map(torch.empty_like, states)]


def _state(weight: Tensor, scale: Tensor, *rest: Tensor) -> State:
    bias, input_scale, input_zero_point = (t if t.shape != (0,) else None for t in rest)
    return weight, scale, bias, input_scale, input_zero_point


def _grouped(parts: Sequence[Operands], projected: bool) -> list[_Products]:
    each = 2 + projected
    return [_Products(*parts[i : i + each]) for i in range(0, len(parts), each)]


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
        check_k(type(self).__name__, max(hidden_size, *sizes.values()))
        n, width, where = GATES[self.cell] * hidden_size, proj_size or hidden_size, (device, dtype)
        for suffix, inputs in sizes.items():
            self.add_module(f"ih{suffix}", QLinear(inputs, n, bias, *where))
            self.add_module(f"hh{suffix}", QLinear(width, n, bias, *where))
            if proj_size:
                self.add_module(f"hr{suffix}", QLinear(hidden_size, proj_size, False, *where))

    @property
    def products(self) -> dict[str, QLinear]:
        """By the names that torch's parameters have after "weight_" and "bias_"."""
        return cast(dict[str, QLinear], self._modules)

    def run(self, x: Tensor, states: Sequence[Tensor], plan: _Plan) -> list[Tensor]:
        """All hidden states and the last states, of inputs and first states."""
        layers = self.products.values()
        if is_compiling() or type(x) is not Tensor or _get_tracing_state():
            absent = x.new_empty(0)
            held = (layer._buffers[name] for layer in layers for name in STATE)
            tensors = [absent if tensor is None else tensor for tensor in held]
            results: list[Tensor] = torch.ops.fastq.recurrent(
                x, states, tensors, bool(self.proj_size), *plan
            )
            return results
        parts = [layer._operands() for layer in layers]
        return _layers(x, states, _grouped(parts, bool(self.proj_size)), plan)

    @classmethod
    def made_with(cls, module: Any) -> dict[str, Any]:
        """The arguments that make a layer like this one, int8 or torch's."""
        return {name: getattr(module, name) for name in (*cls.ARGUMENTS, "bias")}

    @classmethod
    def from_float(cls, module: Any, *, config: QConfig = DEFAULT) -> Self:
        """Quantize a float layer: its weights per output, its biases stay float32.

        Raises TypeError unless `module` is torch's of this kind, ValueError if it is not finite or
        on the meta device.
        """
        check_kind(cls, module)
        made = cls(**cls.made_with(module))
        for name, product in made.products.items():
            weight, bias = (getattr(module, f"{kind}_{name}", None) for kind in ("weight", "bias"))
            part = SimpleNamespace(weight=weight, bias=bias, training=module.training)
            product._quantize(part, None, config)
        return made.train(module.training)

    def to_float(self) -> Any:
        """torch's module with the dequantized weights, and the biases."""
        module = float_twin(self)
        with torch.no_grad():
            for name, product in self.products.items():
                for kind, value in product.to_float().named_parameters():
                    getattr(module, f"{kind}_{name}").copy_(value)
        return module.train(self.training)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*self.ARGUMENTS, "bias"))

    def flatten_parameters(self) -> None:
        """Does nothing. torch's layer has it, and some networks call it before each forward."""

    def _states(self, hx: Any, lead: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """The first hidden state, and c of an LSTM, of these leading sizes."""
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 1 + (self.cell == "lstm")]
        if hx is None:
            return [like.new_zeros(*lead, size) for size in sizes]
        given = hx if self.cell == "lstm" else (hx,)
        name = type(self).__name__
        fits = isinstance(given, tuple | list) and len(given) == len(sizes)
        if not fits or not all(isinstance(x, Tensor) for x in given):
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
        check_sizes(
            type(self).__name__, 1, input_size=input_size, hidden_size=hidden_size,
            num_layers=num_layers,
        )  # fmt: skip
        check_sizes(type(self).__name__, proj_size=proj_size)
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
        check_tensor(type(self).__name__, x)
        batched = packed or x.dim() == 3
        name, k = type(self).__name__, self.input_size
        wanted = f"(steps, {k}) or ({'B, steps' if self.batch_first else 'steps, B'}, {k})"
        fits = x.dim() in ((2,) if packed else (2, 3)) and x.shape[-1] == k
        x = accept(name, x, wanted, fits)
        time = int(self.batch_first and batched and not packed)
        sizes = input.batch_sizes.tolist() if packed else ()
        if not batched:
            x = x.unsqueeze(1)
        if not packed and not x.shape[time]:
            raise ValueError(f"{name}: x {tuple(x.shape)} has no steps; wanted one or more")
        rows = sizes[0] if sizes else x.shape[1 - time]
        number = self.num_layers * (1 + self.bidirectional)
        states = self._states(hx, (number, rows) if batched else (number,), x)
        if not batched:
            states = [state.unsqueeze(1) for state in states]
        if packed and input.sorted_indices is not None:
            states = [state[:, input.sorted_indices] for state in states]
        dropout = self.dropout if self.training else 0.0
        plan = _Plan(self.cell, sizes, time, self.bidirectional, dropout)
        y, *states = self.run(x, states, plan)
        if packed and input.unsorted_indices is not None:
            states = [state[:, input.unsorted_indices] for state in states]
        if not batched:
            y, states = y.squeeze(1), [state.squeeze(1) for state in states]
        result = PackedSequence(y, *input[1:]) if packed else y
        return result, (tuple(states) if self.cell == "lstm" else states[0])


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
        check_sizes(type(self).__name__, input_size=input_size, hidden_size=hidden_size)
        super().__init__({"": input_size}, hidden_size, 0, bias, device, dtype)
        self.input_size = input_size

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        check_tensor(type(self).__name__, input)
        k = self.input_size
        fits = input.dim() in (1, 2) and input.shape[-1] == k
        x = accept(type(self).__name__, input, f"(B, {k}) or ({k},)", fits)
        lead = tuple(x.shape[:-1])
        states = [state.reshape(1, -1, self.hidden_size) for state in self._states(hx, lead, x)]
        plan = _Plan(self.cell, (), 0, False, 0.0)
        _, *results = self.run(x.reshape(1, -1, k), states, plan)
        results = [result.reshape(*lead, self.hidden_size) for result in results]
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


RECURRENT_KINDS = (QLSTM, QGRU, QRNN, QLSTMCell, QGRUCell, QRNNCell)
