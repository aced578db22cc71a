"""Recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.arguments import check_cell
from fastq.kernels import isa
from fastq.kernels.call import Call, View
from fastq.kernels.layers import BoundLinear, Source
from fastq.kernels.layout import copy_row
from fastq.kernels.products import ACTIVATIONS, PackedLinear
from fastq.kernels.recurrent import BoundRecurrent, recurrent_row
from fastq.kernels.simd import emitter
from fastq.ops.checks import (
    FLOAT32,
    INT16,
    UINT8,
    as_clamp,
    as_scale,
    as_values,
    check_float_product,
    output_array,
    typed_array,
)
from fastq.ops.products import bound_layer
from fastq.ops.rows import run_row
from fastq.qparams import GATES, MAX_FACTOR, Dequant, QParams
from fastq.weights import LinearWeight


def recurrent(
    x: NDArray[np.int16],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    cell: str,
    x_scale: float,
    multiplier: float,
    axis: int = 1,
    reverse: bool = False,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The hidden states of an LSTM, a GRU or a plain recurrent layer, (.., .., H) uint8.

    x           int16 (.., .., gates * H): the layer's products with its inputs, for each gate of
                the cell, with zero_point 0. Of the first two axes `axis` is the sequence.
    weight      LinearWeight (gates * H, H), of the hidden state; gates in torch's order.
    epilogue    Dequant of that product, without a clamp; its x_scale is that of the result.
    cell        "lstm", "gru", "tanh" or "relu".
    x_scale     of x; finite, > 0, up to 2**96.
    multiplier  1 / scale of the result; finite, > 0.
    reverse     whether it begins at the last step. The result is in order of x.

    Products are exact in int32, the cell is float32 in the order of reference.recurrent, the same
    bits on every CPU. Raises TypeError and ValueError for other dtypes, shapes or values.
    """
    x = _sequence("recurrent", x, INT16, cell, axis)
    if not isinstance(weight, LinearWeight) or not isinstance(epilogue, Dequant):
        kinds = f"{type(weight).__name__}, {type(epilogue).__name__}"
        raise TypeError(f"recurrent: weight, epilogue are {kinds}; wanted LinearWeight, Dequant")
    check_cell("recurrent", cell, weight, epilogue)
    if x.shape[2] != weight.n:
        raise ValueError(f"recurrent: x {x.shape}; wanted (.., .., {weight.n}), as the weight has")
    factors = as_scale("recurrent: x_scale", x_scale), as_scale("recurrent: multiplier", multiplier)
    if not all(isinstance(factor, float) for factor in factors) or x_scale > MAX_FACTOR:
        raise ValueError(
            f"recurrent: x_scale={x_scale}, multiplier={multiplier}; wanted numbers, x_scale up "
            "to 2**96"
        )
    clamp = as_clamp("recurrent", zero_point, qmin, qmax)
    x = as_values("recurrent: x", x)
    result = output_array("recurrent", out, (*x.shape[:2], weight.k), UINT8, x)
    return run_row(_recurrent_row, [x, result], weight, epilogue, isa.current(), cell, *factors,
                int(axis), bool(reverse), *clamp)  # fmt: skip


def _recurrent_row(
    call: Call, x: View, out: View, weight: LinearWeight, epilogue: Dequant, tier: str, cell: str,
    x_scale: float, multiplier: float, axis: int, reverse: bool, zero_point: int, qmin: int,
    qmax: int,
) -> None:  # fmt: skip
    layer = PackedLinear(weight, epilogue, 0, tier)
    # products read beyond the end of a line
    made = call.dense(out.shape, ACTIVATIONS[emitter(tier).a_bytes])
    recurrent_row(
        call, x, made, layer, cell=cell, x_scale=x_scale, multiplier=multiplier, axis=axis,
        reverse=reverse, zero_point=zero_point, qmin=qmin, qmax=qmax,
    )  # fmt: skip
    copy_row(call, made, out)


def recurrent_float(
    x: NDArray[np.float32],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    cell: str,
    hidden: NDArray[np.float32] | None = None,
    state: NDArray[np.float32] | None = None,
    axis: int = 1,
    reverse: bool = False,
    x_qparams: QParams | None = None,
    projection: tuple[LinearWeight, Dequant, QParams | None] | None = None,
    out: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The hidden states of a recurrent layer between float layers, and its last state.

    x           float32 (.., .., gates * H): the layer's products with its inputs, for each gate of
                the cell. Of the first two axes `axis` is the sequence, the other one has rows.
    weight      LinearWeight (gates * H, H), of the hidden state; gates in torch's order.
    epilogue    Dequant of that product; its x_scale is replaced by the scale of the hidden state.
    cell        "lstm", "gru", "tanh" or "relu".
    hidden      the first hidden state, float32 (rows, H); None: zeros.
    state       of an lstm the first c, float32 (rows, H); None: zeros.
    reverse     whether it begins at the last step. The result is in order of x.
    x_qparams   uint8, per tensor, of the hidden state; None quantizes each of its rows by its own
                range, at each step.
    projection  of an lstm: weight (P, H), Dequant and qparams, as linear_float takes them. The
                hidden state is this product, (rows, P), and `weight` is (gates * H, P).

    Returns the hidden states, float32 (.., .., H or P), and the state after the last step, (rows,
    H): c of an lstm, the hidden state of the others. A sequence in parts, each begun with what the
    one before gave, has the same bits as the whole, as has each of its rows alone. NaN in x and the
    states counts as 0, infinities as 2**96. Raises TypeError and ValueError for other dtypes or
    shapes.
    """
    name = "recurrent_float"
    x = _sequence(name, x, FLOAT32, cell, axis)
    check_float_product(name, weight, LinearWeight, epilogue, x_qparams)
    rows, features = x.shape[1 - axis], weight.n // GATES[cell]
    width, projected = features, None
    if projection is not None:
        if cell != "lstm":
            raise ValueError(f"{name}: a projection of a cell {cell!r}; wanted an lstm's")
        p_weight, p_epilogue, p_qparams = projection
        check_float_product(f"{name}: projection", p_weight, LinearWeight, p_epilogue, p_qparams)
        if p_weight.k != features:
            raise ValueError(f"{name}: projection of {p_weight.k} features; wanted {features}")
        width = p_weight.n
        source: Source = "dynamic" if p_qparams is None else "static"
        projected = bound_layer(BoundLinear, p_weight, p_epilogue, source, p_qparams, 0)
    if weight.data.shape != (GATES[cell] * features, width) or not width:
        raise ValueError(
            f"{name}: weight {weight.data.shape} of a cell {cell!r}; wanted "
            f"({GATES[cell]} * H, {'H' if projection is None else width}), H > 0"
        )
    if x.shape[2] != weight.n:
        raise ValueError(f"{name}: x {x.shape}; wanted (.., .., {weight.n}), as the weight has")
    if state is not None and cell != "lstm":
        raise ValueError(f"{name}: state of a cell {cell!r}; wanted its first hidden state alone")
    first = _first_state(f"{name}: hidden", hidden, (rows, width))
    last = _first_state(f"{name}: state", state, (rows, features)) if cell == "lstm" else first
    last = last.copy() if last is first or last is state else last  # written at each step
    if x.strides[2] != 4 or not x.flags.aligned:
        x = np.array(x, order="C")
    result = output_array(name, out, (*x.shape[:2], width), FLOAT32, x)
    if result.size:
        source = "dynamic" if x_qparams is None else "static"
        layer = bound_layer(BoundRecurrent, weight, epilogue, source, x_qparams, 0)
        layer.recur(cell, projected, int(axis), bool(reverse), x, result, first, last)
    return result, last


def _sequence(name: str, x: Any, dtype: np.dtype[Any], cell: Any, axis: Any) -> NDArray[Any]:
    """x; TypeError or ValueError unless it is gates of a cell, whose sequence is an axis."""
    x = typed_array(f"{name}: x", x, dtype, 3)
    if not isinstance(cell, str) or cell not in GATES:
        raise ValueError(f"{name}: cell={cell!r}; wanted one of {', '.join(GATES)}")
    if axis not in (0, 1):
        raise ValueError(f"{name}: axis={axis!r}; wanted 0 or 1")
    return x


def _first_state(what: str, given: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A contiguous array of this shape: the one given, or zeros."""
    if given is None:
        return np.zeros(shape, np.float32)
    if not isinstance(given, np.ndarray) or given.dtype != FLOAT32 or given.shape != shape:
        found = f"{given.shape} {given.dtype}" if isinstance(given, np.ndarray) else given
        raise ValueError(f"{what} is {found!r:.60}; wanted None or float32 {shape}")
    flags = given.flags
    return given if flags.c_contiguous and flags.aligned else np.array(given, order="C")
