"""linear, conv2d and matmul of integers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastq.kernels import isa
from fastq.kernels import matmul as products
from fastq.kernels.call import SLACK, address_of
from fastq.kernels.layers import BoundConv2d, BoundLinear, Source
from fastq.kernels.products import ALIGNED
from fastq.kernels.workers import team
from fastq.ops.checks import (
    FLOAT32,
    INT16,
    INT32,
    KIND,
    UINT8,
    as_byte,
    as_clamp,
    as_factor,
    as_uint8,
    as_zero_points,
    check_weight,
    described,
    output_array,
    typed_array,
)
from fastq.ops.known import MOST_CHECKED, Known, span_of
from fastq.ops.rows import run_row
from fastq.qparams import MAX_K, UNCLAMPED, Dequant, Epilogue, QParams, Requant
from fastq.weights import Conv2dWeight, LinearWeight

_BOUND_LAYERS = 8  # that a weight keeps: pairs of epilogue and input parameters


def _repeat(
    name: str, kind: type, x: Any, weight: Any, epilogue: Any, zero_point: Any, add: Any, out: Any
) -> tuple[NDArray[Any] | None, Any]:
    """The result of a call that was checked before, or None; and a key of all that its checks
    looked at, or None where there is no such key. For small products it is most of the time."""
    plain = type(x) is np.ndarray and type(weight) is kind and type(zero_point) is int
    if not plain or add is not None or not (x.dtype is UINT8 or x.dtype == UINT8):
        return None, None
    at = address_of(x)
    key = (x.shape, x.strides, id(epilogue), zero_point, at % ALIGNED == 0, isa.in_use,
           team.threads)  # fmt: skip
    known = weight.checked.get(key)
    if known is None:
        return None, key
    return known.run(name, x, at, out, at), key


def _remember(
    weight: Any, key: Any, layer: Any, call: tuple[Any, ...], x: NDArray[Any], out: NDArray[Any]
) -> None:
    if len(weight.checked) >= MOST_CHECKED:
        weight.checked.clear()
    weight.checked[key] = Known(
        out.shape, out.dtype, out.nbytes, span_of(x), layer.calls.idle(call),
        partial(layer.call, *call),
    )  # fmt: skip


def linear(
    x: NDArray[np.uint8],
    weight: LinearWeight,
    epilogue: Epilogue = None,
    *,
    x_zero_point: ArrayLike = 0,
    add: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """acc[m, n] = sum_k (x[m, k] - x_zero_point[m]) * weight[n, k], exact, then the epilogue.

    x             uint8 (M, K), any strides.
    weight        LinearWeight (N, K); its panels are packed at the first call.
    epilogue      None: int32. Requant: its dtype. Dequant: float32. Re-use the object between
                  calls.
    x_zero_point  0 to 255: a scalar, or (M,) where the epilogue is not a Requant.
    add           uint8 or int16 (M, N), summed in by a Requant that has an add_multiplier.
    out           written and returned if given: (M, N) of the epilogue's dtype, C-contiguous.

    Raises TypeError and ValueError for other dtypes, shapes or values.
    Source: ONNX MatMulInteger and QLinearMatMul.
    """
    given = x, weight, epilogue, x_zero_point, add, out
    repeated, key = _repeat("linear", LinearWeight, *given)
    if repeated is not None:
        return repeated
    x = typed_array("linear: x", x, UINT8, 2)
    check_weight("linear", weight, LinearWeight, epilogue)
    m, k = x.shape
    if k != weight.k:
        raise ValueError(
            f"linear: x has {k} features, weight wants {weight.k}; "
            f"x {x.shape} u8, weight {weight.data.shape} s8"
        )
    zeros: Any = as_zero_points("linear: x_zero_point", x_zero_point)
    if not isinstance(zeros, int):
        if zeros.shape != (m,):
            raise ValueError(f"linear: x_zero_point {zeros.shape} for {m} rows; wanted ({m},)")
        if isinstance(epilogue, Requant):
            raise ValueError("linear: x_zero_point per row with a Requant; wanted one integer")
    if isinstance(epilogue, Dequant) and epilogue.x_scale.shape not in ((), (m,)):
        raise ValueError(
            f"linear: Dequant.x_scale {epilogue.x_scale.shape} for {m} rows; wanted ({m},)"
        )
    result = output_array("linear", out, (m, weight.n), _out_dtype(epilogue), x)
    added, at = _added("linear", epilogue, add, result)
    if result.size == 0:
        return result
    layer = bound_layer(BoundLinear, weight, epilogue, "u8", None, zeros)
    lines = x.strides[1] == 1
    x = x if lines else np.ascontiguousarray(x)
    layer(m, x.strides[0], address_of(x), address_of(result), zeros, *at)
    if key is not None and lines:
        call = layer.key(m, x.strides[0], address_of(x), zeros)
        _remember(weight, key, layer, call, x, result)
    del added  # held until here
    return result


def conv2d(
    x: NDArray[np.uint8],
    weight: Conv2dWeight,
    epilogue: Epilogue = None,
    *,
    x_zero_point: int = 0,
    add: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """2-D cross-correlation of x (B, H, W, C) uint8, exact in int32, then the epilogue.

    acc[b, i, j, n] = sum over (kh, kw, c) of w[n, c, kh, kw]
                      * (x[b, i*sh + kh*dh - top, j*sw + kw*dw - left, c] - x_zero_point)

    x             uint8 NHWC, any strides.
    weight        Conv2dWeight (N, C/groups, KH, KW) with its stride, padding, dilation, groups.
    epilogue      None: int32. Requant: its dtype. Dequant (one x_scale): float32.
    x_zero_point  0 to 255; padding has this value, which stands for real 0.
    add           uint8 or int16 of the output's shape, summed in by a Requant that has an
                  add_multiplier.
    out           written and returned if given: (B, OH, OW, N), C-contiguous.

    Raises TypeError and ValueError for other dtypes, shapes or values.
    Source: ONNX ConvInteger and QLinearConv.
    """
    given = x, weight, epilogue, x_zero_point, add, out
    repeated, key = _repeat("conv2d", Conv2dWeight, *given)
    if repeated is not None:
        return repeated
    x = typed_array("conv2d: x", x, UINT8, 4)
    check_weight("conv2d", weight, Conv2dWeight, epilogue)
    zero_point: Any = as_zero_points("conv2d: x_zero_point", x_zero_point)
    if not isinstance(zero_point, int):
        raise ValueError(f"conv2d: x_zero_point {zero_point.shape}; wanted one integer")
    if isinstance(epilogue, Dequant) and epilogue.x_scale.ndim:
        raise ValueError(f"conv2d: Dequant.x_scale {epilogue.x_scale.shape}; wanted a scalar")
    result = conv_output("conv2d", x, weight, _out_dtype(epilogue), out)
    added, at = _added("conv2d", epilogue, add, result)
    if result.size:
        layer = bound_layer(BoundConv2d, weight, epilogue, "u8", None, zero_point)
        layer(x, result, zero_point, *at)
        if key is not None:
            _remember(weight, key, layer, layer.key(x, zero_point), x, result)
    del added  # held until here
    return result


def matmul(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    multiplier: float,
    *,
    a_zero_point: int = 0,
    transpose_b: bool = False,
    mean: bool = False,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    dtype: DTypeLike = np.uint8,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """y = clip(rint(float32(acc) * multiplier) + zero_point, qmin, qmax) of two activations.

    acc[..., m, n] = sum_k (a[..., m, k] - a_zero_point) * (b[..., k, n] - 128), exact in int32.

    a     uint8 (..., M, K).
    b     uint8 (..., K, N), or (..., N, K) with transpose_b; quantized symmetrically: its zero
          point is 128. The leading axes of a and b broadcast. K up to MAX_K.

    mean  divides by the sum of a's row: a mean of b's rows with the weights a, whose zero point is
          0; a row of zeros gives 0. multiplier is then b_scale / y_scale.

    dtype uint8, or float32: then y = float32(acc) * multiplier, without zero_point and clamp.

    multiplier is a_scale * b_scale / y_scale. Other arguments and errors as in `add`.
    """
    left, right = as_uint8("matmul: a", a), as_uint8("matmul: b", b)
    if left.ndim < 2 or right.ndim < 2 or left.shape[-1] != right.shape[-1 if transpose_b else -2]:
        raise ValueError(
            f"matmul: a {left.shape} and b {right.shape} with transpose_b={bool(transpose_b)}; "
            "wanted (..., M, K) and (..., K, N), or (..., N, K) with transpose_b"
        )
    if left.shape[-1] > MAX_K:
        raise ValueError(f"matmul: K={left.shape[-1]}; the sums are exact up to K={MAX_K}")
    try:
        leading = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except ValueError:
        raise ValueError(
            f"matmul: leading axes of a {left.shape} and b {right.shape} do not broadcast"
        ) from None
    factor = as_factor("matmul: multiplier", multiplier)
    zero = as_byte("matmul: a_zero_point", a_zero_point)
    if mean and zero:
        raise ValueError(f"matmul: a_zero_point={zero} with mean=True; weights have zero point 0")
    clamp, kind = as_clamp("matmul", zero_point, qmin, qmax), np.dtype(dtype)
    if kind not in (UINT8, FLOAT32):
        raise TypeError(f"matmul: dtype={kind}; wanted uint8 or float32")
    if kind == FLOAT32 and clamp != UNCLAMPED:
        raise ValueError(f"matmul: zero_point, qmin and qmax {clamp} of float32, which has none")
    shape = (*leading, left.shape[-2], right.shape[-2 if transpose_b else -1])
    if out is not None:
        output_array("matmul", out, shape, kind, left)
    result = output_array("matmul", out, shape, kind, right)
    if result.size == 0:
        return result
    target = result
    if len(leading) > 2:  # then they must join
        left, right = (
            np.broadcast_to(x, (*leading, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
            for x in (left, right)
        )
        target = result.reshape(-1, *shape[-2:])
    parameters = factor, zero, bool(transpose_b), bool(mean), *clamp
    run_row(products.matmul_array_row, [left, right, target], isa.current(), *parameters)
    return result


def _added(
    name: str, epilogue: Epilogue, add: Any, out: NDArray[Any]
) -> tuple[NDArray[Any] | None, tuple[int, str]]:
    """What the epilogue adds, copied to where reading beyond its end is safe; its address and
    kind."""
    wanted = isinstance(epilogue, Requant) and epilogue.add_multiplier is not None
    if not wanted and add is None:
        return None, (0, "")
    if wanted != (add is not None):
        raise ValueError(
            f"{name}: got {'no add=' if wanted else 'add='}; it goes with a Requant that has an "
            "add_multiplier"
        )
    fits = isinstance(add, np.ndarray) and add.dtype in (UINT8, INT16)
    if not fits or add.shape != out.shape:
        raise ValueError(f"{name}: add is {described(add)}; wanted {out.shape}, uint8 or int16")
    copy = np.empty(add.size + SLACK, add.dtype)
    copy[: add.size] = add.reshape(-1)
    return copy, (address_of(copy), KIND[add.dtype])


def _out_dtype(epilogue: Epilogue) -> np.dtype[Any]:
    if epilogue is None:
        return INT32
    return epilogue.dtype if isinstance(epilogue, Requant) else FLOAT32


def bound_layer(
    kind: Any,
    weight: Any,
    epilogue: Epilogue,
    source: Source,
    x_qparams: QParams | None,
    zero_point: Any,
) -> Any:
    """The layer bound to these, kept with the weight; it holds them, so their ids stay theirs."""
    folded = zero_point if isinstance(epilogue, Requant) else 0
    tier = isa.current()
    key = (kind, source, tier, id(epilogue), id(x_qparams), folded)
    layer = weight.panels.get(key)
    if layer is None:
        layer = kind(weight, epilogue, source, x_qparams, folded, tier)
        bound = [k for k, v in list(weight.panels.items()) if isinstance(v, kind)]
        if len(bound) >= _BOUND_LAYERS:
            weight.panels.pop(bound[0], None)
            weight.checked.clear()
        weight.panels[key] = layer
    return layer


def conv_output(
    name: str, x: NDArray[Any], weight: Conv2dWeight, dtype: np.dtype[Any], out: Any
) -> NDArray[Any]:
    batch, h, w, c = x.shape
    if c != weight.c:
        raise ValueError(
            f"{name}: x has {c} channels, weight wants {weight.c}; x {x.shape} (B, H, W, C), "
            f"weight {weight.data.shape} with groups={weight.groups}"
        )
    return output_array(name, out, (batch, *weight.output_size(h, w), weight.n), dtype, x)
