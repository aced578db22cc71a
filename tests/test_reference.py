"""The definition itself: cases worked by hand, and ONNX's own tests and reference operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.helper as oh
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator

from fastq import ops, reference
from fastq.qparams import Dequant, QParams, Requant, choose_qparams, limits, quantize_weight
from fastq.weights import Conv2dWeight, LinearWeight


def test_choose_qparams_by_hand() -> None:
    q = choose_qparams(-1.0, 3.0)
    assert q.scale == np.float32(4) / np.float32(255) and q.zero_point == 64  # 63.75
    assert choose_qparams(2.0, 3.0).zero_point == 0  # the range is widened to 0
    assert choose_qparams(-3.0, -2.0).zero_point == 255
    assert choose_qparams(0.0, 0.0) == QParams(np.float32(1))
    s = choose_qparams(-1.0, 0.5, np.int8, symmetric=True)
    assert s.scale == np.float32(1) / np.float32(127) and s.zero_point == 0
    per_channel = choose_qparams([-1.0, 0.0], [1.0, 0.0], np.int8, symmetric=True, axis=0)
    assert per_channel.scale.tolist() == [np.float32(1) / np.float32(127), 1.0]
    assert choose_qparams(-1e-45, 0.0).scale == np.finfo(np.float32).tiny
    with pytest.raises(ValueError, match="finite minimum <= maximum"):
        choose_qparams(0.0, np.inf)
    with pytest.raises(ValueError, match="finite minimum <= maximum"):
        choose_qparams(1.0, -1.0)
    with pytest.raises(ValueError, match=r"in float32, got 0 and 1e\+300"):
        choose_qparams(0, 1e300)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_a_range_whose_width_overflows_is_covered(dtype: Any) -> None:
    largest = float(np.finfo(np.float32).max)
    for lo, hi in ((-3e38, 3e38), (-largest, largest), (-1e38, largest), (-largest, 1e36)):
        q = choose_qparams(lo, hi, dtype)
        low, high = (float(q.scale) * (end - int(q.zero_point)) for end in limits(np.dtype(dtype)))
        half = float(q.scale) * 0.501  # the zero point is rounded
        assert low - half <= lo and hi <= high + half
    many = choose_qparams([-3e38, -1.0], [3e38, 3.0], axis=0)
    assert many.scale.tolist() == [choose_qparams(-3e38, 3e38).scale, np.float32(4 / 255)]


@pytest.mark.parametrize(
    "bad",
    [
        {"scale": np.float32(0)},
        {"scale": np.float32(np.nan)},
        {"scale": np.ones(3, np.float32)},
        {"scale": np.float32(1), "zero_point": np.int32(256)},
        {"scale": np.ones((2, 2), np.float32), "axis": 0},
        {"scale": np.float32(1), "dtype": np.dtype(np.uint16)},
    ],
)
def test_bad_qparams_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        QParams(**bad)


def test_quantize_by_hand() -> None:
    x = np.array([-1.0, -0.25, 0.25, 0.75, 1.25, 200.0, np.nan, np.inf, -np.inf], np.float32)
    # x / 0.5 = -2, -0.5, 0.5, 1.5, 2.5: ties to even
    assert reference.quantize(x, scale=0.5, zero_point=1).tolist() == [
        0, 1, 1, 3, 3, 255, 1, 255, 0,
    ]  # fmt: skip
    assert reference.quantize(x, scale=0.5, dtype=np.int8).tolist() == [
        -2, 0, 0, 2, 2, 127, 0, 127, -128,
    ]  # fmt: skip
    top = reference.quantize(x[-2:], scale=0.5, dtype=np.int32)
    assert top.tolist() == [2**31 - 1, -(2**31)]


def test_linear_by_hand() -> None:
    x = np.array([[1, 2], [255, 0]], np.uint8)
    weight = LinearWeight(np.array([[1, -1], [-128, 127], [0, 3]], np.int8))
    assert reference.linear(x, weight).tolist() == [[-1, 126, 6], [255, -32640, 0]]
    assert reference.linear(x, weight, x_zero_point=1).tolist() == [[-1, 127, 3], [255, -32639, -3]]
    bias = np.array([1, 2, -5], np.int32)
    y = reference.linear(x, weight, Requant(0.5, 10, bias))
    # (0, 128, 1) / 2 = 0, 64, 0.5 -> 0; (256, -32638, -5) / 2 = 128, .., -2.5 -> -2
    assert y.tolist() == [[10, 74, 10], [138, 0, 8]]
    y = reference.linear(x, weight, Dequant(0.5, 0.5, np.array([1, 0, 0], np.float32), 0.0, 9.0))
    assert y.tolist() == [[0.75, 9.0, 1.5], [9.0, 0.0, 0.0]]


def test_padding_is_real_zero() -> None:
    x = np.full((1, 2, 2, 1), 7, np.uint8)
    weight = Conv2dWeight(np.ones((1, 1, 3, 3), np.int8), padding=1)
    assert reference.conv2d(x, weight, x_zero_point=7).ravel().tolist() == [0, 0, 0, 0]
    assert reference.conv2d(x, weight, x_zero_point=5).ravel().tolist() == [8, 8, 8, 8]


def test_quantize_weight() -> None:
    w = np.array([[1.0, -2.0], [0.0, 0.0], [-127.0, 63.5]], np.float32)
    data, scale = quantize_weight(w)
    assert data.tolist() == [[64, -127], [0, 0], [-127, 64]]  # 63.5 ties to even
    assert scale.tolist() == [np.float32(2) / np.float32(127), 1.0, 1.0]
    with pytest.raises(ValueError, match="NaN"):
        quantize_weight(np.array([[np.nan]], np.float32))
    assert quantize_weight(np.zeros((0, 3), np.float32))[1].shape == (0,)
    by_column, scales = quantize_weight(w.T, axis=1)
    assert_array_equal(by_column, data.T)
    assert_array_equal(scales, scale)


def test_fewer_bits_by_hand() -> None:
    w = np.array([[7.0, -3.4, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]], np.float32)
    data, scale = quantize_weight(w, bits=4)
    assert data.tolist() == [[7, -3, 0, 2], [0, 0, 0, 0]]
    assert scale.tolist() == [1, 1]
    data, scale = quantize_weight(w, bits=2)
    assert data.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert scale.tolist() == [7, 1]
    for bits in range(2, 9):
        data, _ = quantize_weight(np.linspace(-3, 3, 999)[None], bits=bits)
        assert (data.min(), data.max()) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_least_squared_error_of_weights(rng: Any, bits: int) -> None:
    w = np.concatenate([rng.normal(size=(5, 200)), rng.laplace(size=(5, 200))]).astype(np.float32)
    w[3] *= 1e-6
    qmax = 2 ** (bits - 1) - 1

    def errors(data: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return ((data * scale.astype(np.float64)[:, None] - w) ** 2).sum(axis=1)

    whole, found = quantize_weight(w, bits=bits), quantize_weight(w, range="mse", bits=bits)
    assert np.abs(found[0]).max() == qmax
    assert (errors(*found) <= errors(*whole)).all()
    tried = [
        errors(np.clip(np.rint(w / s[:, None]), -qmax, qmax), s)
        for s in np.outer(np.linspace(0.3, 1, 141), whole[1]).astype(np.float32)
    ]
    assert_allclose(errors(*found), np.min(tried, axis=0), rtol=0.1)
    if bits < 8:
        assert (errors(*found) < 0.9 * errors(*whole)).all()
    by_column = quantize_weight(w.T, axis=1, range="mse", bits=bits)
    assert_array_equal(by_column[0], found[0].T)
    assert_array_equal(by_column[1], found[1])


def test_equal_errors_keep_the_largest_weight() -> None:
    w = np.array([[127, -64, 3], [0, 0, 0], [1e-45, 0, 0]], np.float32)  # on the grid already
    for got, want in zip(quantize_weight(w, range="mse"), quantize_weight(w), strict=True):
        assert_array_equal(got, want)
    empty = quantize_weight(np.zeros((3, 0), np.float32), range="mse")
    assert empty[0].shape == (3, 0) and empty[1].tolist() == [1, 1, 1]
    assert quantize_weight(np.zeros((0, 3, 3, 3), np.float32), range="mse")[1].shape == (0,)


def test_ranges_and_bits_that_cannot_be() -> None:
    w = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="range='min'; wanted 'max' or 'mse'"):
        quantize_weight(w, range="min")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits=9; wanted 2 to 8"):
        quantize_weight(w, bits=9)
    with pytest.raises(TypeError, match=r"bits=4\.0; wanted an int"):
        quantize_weight(w, bits=4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"quantize_weight: axis=7 for an array of shape \(1, 1\)"):
        quantize_weight(w, axis=7)
    with pytest.raises(TypeError, match="quantize_weight: axis='a'; wanted an int"):
        quantize_weight(w, axis="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight is a MaskedArray"):
        quantize_weight(np.ma.masked_array(w))


def test_a_weight_of_torch() -> None:
    import torch

    weight = torch.nn.Linear(3, 4).weight
    data, scale = quantize_weight(weight.detach().numpy())
    assert_array_equal(quantize_weight(weight)[0], data)  # type: ignore[arg-type]
    half = weight.detach().bfloat16()
    assert_array_equal(quantize_weight(half)[1], quantize_weight(half.float())[1])  # type: ignore[arg-type]
    assert scale.dtype == np.float32


def test_histogram_by_hand() -> None:
    bins, ends = np.zeros((2, 65536, 2), np.int64), np.zeros((2, 2), np.float32)
    one = 0x3F80  # the upper half of 1.0's bits; a rest of 0x4000 is 2**-9
    x = [1.0, 1 + 2.0**-9, -1.0, 0.0, -0.0, np.inf, -np.inf, 1e-45]
    reference.histogram(np.array(x, np.float32), bins, ends)
    reference.histogram(np.array([[1.0]], np.float32), bins, ends)
    assert bins[0, one].tolist() == [3, 0x4000]
    assert bins[0, 0x8000 + one].tolist() == [1, 0]
    assert bins[0, 0].tolist() == [2, 1]
    assert bins[0, [0x8000, 0x7F80, 0xFF80], 0].tolist() == [1, 1, 1]
    assert bins[..., 0].sum() == 9 and not bins[1].any()
    assert ends.tolist() == [[-1, float(np.float32(1 + 2.0**-9))], [0, 0]]


def onnx_op(op: str, inputs: dict[str, np.ndarray], outputs: int = 1, **attributes: Any) -> Any:
    """What ONNX's reference evaluator gives for one node."""
    tensors = [
        oh.make_tensor_value_info(n, oh.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    ]
    names = [f"y{i}" for i in range(outputs)]
    results = [oh.make_empty_tensor_value_info(n) for n in names]
    graph = oh.make_graph([oh.make_node(op, list(inputs), names, **attributes)], "g", tensors,
                          results)  # fmt: skip
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)])
    got = ReferenceEvaluator(model).run(None, dict(inputs))
    return got[0] if outputs == 1 else got


@pytest.fixture
def fuzz() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.mark.parametrize("room", [reference, ops], ids=["reference", "ops"])
def test_onnx_quantize_and_dequantize(room: Any, fuzz: Any) -> None:
    for dtype in (np.uint8, np.int8):
        x = (fuzz.normal(size=(5, 6)) * 40).astype(np.float32)
        scale = (fuzz.random(6) + 0.1).astype(np.float32)
        zero_point = fuzz.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 6).astype(dtype)
        q = onnx_op("QuantizeLinear", {"x": x, "s": scale, "z": zero_point}, axis=1)
        named = {"scale": scale, "zero_point": zero_point, "axis": 1}
        assert_array_equal(room.quantize(x, **named, dtype=dtype), q)
        real = onnx_op("DequantizeLinear", {"q": q, "s": scale, "z": zero_point}, axis=1)
        assert_array_equal(room.dequantize(q, **named), real)


@pytest.mark.parametrize("room", [reference, ops], ids=["reference", "ops"])
def test_onnx_dynamic_quantize_linear(room: Any, fuzz: Any) -> None:
    for shift in (-3.0, 0.0, 0.2, 3.0):
        x = (fuzz.normal(size=(4, 7)) + shift).astype(np.float32)
        q, scale, zero_point = onnx_op("DynamicQuantizeLinear", {"x": x}, outputs=3)
        got = room.dynamic_qparams(x, per_row=False)
        assert (got[0], got[1]) == (scale, zero_point)
        assert_array_equal(room.quantize(x, scale=got[0], zero_point=got[1]), q)


@pytest.mark.parametrize("room", [reference, ops], ids=["reference", "ops"])
def test_onnx_matmul_integer_and_qlinear_matmul(room: Any, fuzz: Any) -> None:
    for m, n, k in [(1, 3, 5), (4, 9, 17), (7, 20, 64)]:
        a = fuzz.integers(0, 256, (m, k)).astype(np.uint8)
        b = fuzz.integers(-128, 128, (k, n)).astype(np.int8)
        weight = LinearWeight(b.T)
        zeros = np.array(113, np.uint8), np.array(0, np.int8)
        want = onnx_op("MatMulInteger", {"a": a, "b": b, "za": zeros[0], "zb": zeros[1]})
        assert_array_equal(room.linear(a, weight, x_zero_point=113), want)
        a_scale, y_scale = np.float32(0.02), np.float32(0.7)
        b_scale = (fuzz.random(n) * 0.05 + 0.01).astype(np.float32)
        y = onnx_op(
            "QLinearMatMul",
            {"a": a, "as": a_scale, "az": zeros[0], "b": b, "bs": b_scale,
             "bz": np.zeros(n, np.int8), "ys": y_scale, "yz": np.array(99, np.uint8)},
        )  # fmt: skip
        last = Requant(a_scale * b_scale / y_scale, 99)
        assert_array_equal(room.linear(a, weight, last, x_zero_point=113), y)


@pytest.mark.parametrize("room", [reference, ops], ids=["reference", "ops"])
def test_onnx_conv_integer(room: Any, fuzz: Any) -> None:
    for stride, pads, dilation, groups in [
        ((1, 1), (1, 1, 1, 1), (1, 1), 1),
        ((2, 1), (0, 1, 2, 0), (1, 2), 2),
        ((1, 2), (1, 0, 1, 0), (1, 1), 4),
    ]:
        x = fuzz.integers(0, 256, (2, 4, 9, 8)).astype(np.uint8)
        w = fuzz.integers(-128, 128, (8, 4 // groups, 3, 2)).astype(np.int8)
        zeros = {"zx": np.array(31, np.uint8), "zw": np.array(0, np.int8)}
        want = onnx_op("ConvInteger", {"x": x, "w": w, **zeros}, strides=stride, pads=pads,
                       dilations=dilation, group=groups)  # fmt: skip
        padding = ((pads[0], pads[2]), (pads[1], pads[3]))
        weight = Conv2dWeight(w, stride, padding, dilation, groups)
        got = room.conv2d(np.moveaxis(x, 1, -1), weight, x_zero_point=31)
        assert_array_equal(np.moveaxis(got, -1, 1), want)


# One node of an ONNX model in terms of fastq: (inputs by name, attributes) -> outputs, or None
# where the case has a type that fastq does not know (int16, float8, float16 or blocked scales).
def as_quantize(room: Any, v: list[Any], attributes: dict[str, Any]) -> Any:
    x, scale = v[0], v[1]
    zero_point = v[2] if len(v) > 2 else np.array(0, np.uint8)
    if zero_point.dtype not in (np.uint8, np.int8) or scale.ndim > 1 or scale.dtype != np.float32:
        return None
    axis = attributes.get("axis", 1) if scale.ndim else None
    return [room.quantize(x, scale=scale, zero_point=zero_point, axis=axis, dtype=zero_point.dtype)]


def as_dequantize(room: Any, v: list[Any], attributes: dict[str, Any]) -> Any:
    q, scale = v[0], v[1]
    if q.dtype not in (np.uint8, np.int8, np.int32) or scale.ndim > 1 or scale.dtype != np.float32:
        return None
    axis = attributes.get("axis", 1) if scale.ndim else None
    return [room.dequantize(q, scale, v[2] if len(v) > 2 else 0, axis=axis)]


def as_dynamic(room: Any, v: list[Any], attributes: dict[str, Any]) -> Any:
    scale, zero_point = room.dynamic_qparams(v[0], per_row=False)
    q = room.quantize(v[0], scale=scale, zero_point=zero_point)
    return [q, np.float32(scale), np.uint8(zero_point)]


def int8_parts(b: np.ndarray, zero_point: Any) -> list[np.ndarray]:
    """Symmetric int8 weights that add up to b - zero_point, which may need 9 bits."""
    rest = b.astype(np.int32) - np.asarray(zero_point).astype(np.int32)
    parts = [np.clip(rest, -128, 127)]
    while (rest := rest - parts[-1]).any():
        parts.append(np.clip(rest, -128, 127))
    return [part.astype(np.int8) for part in parts]


def unsigned(a: np.ndarray, zero_point: Any) -> tuple[np.ndarray, int]:
    """uint8 activations and zero point; int8 ones are shifted by 128."""
    shift = 128 if a.dtype == np.int8 else 0
    return (a.astype(np.int16) + shift).astype(np.uint8), int(np.reshape(zero_point, ())) + shift


def product(room: Any, a: Any, a_zero: Any, b: Any, b_zero: Any) -> Any:
    """int32 (..., M, N) of a (..., M, K) and b (..., K, N)."""
    if a.ndim > 2:
        return np.stack([product(room, x, a_zero, y, b_zero) for x, y in zip(a, b, strict=True)])
    x, zero_point = unsigned(a, a_zero)
    parts = int8_parts(b, b_zero)
    return sum(room.linear(x, LinearWeight(w.T), x_zero_point=zero_point) for w in parts)


def as_matmul_integer(room: Any, v: list[Any], attributes: dict[str, Any]) -> Any:
    return [product(room, v[0], v[2], v[1], v[3])]


def as_qlinear_matmul(room: Any, v: list[Any], attributes: dict[str, Any]) -> Any:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = v
    if a_scale.dtype != np.float32:
        return None
    acc = product(room, a, a_zero, b, b_zero)
    multiplier = (a_scale * b_scale / y_scale).reshape(())
    return [room.requantize(acc, multiplier, int(y_zero.reshape(())), dtype=y_zero.dtype)]


def convolution(room: Any, x: Any, x_zero: Any, w: Any, w_zero: Any, pads: Any) -> Any:
    """int32 NCHW."""
    top, left, bottom, right = pads
    padding = ((top, bottom), (left, right))
    nhwc, zero_point = unsigned(np.moveaxis(x, 1, -1), x_zero)
    parts = int8_parts(w, np.reshape(w_zero, (-1, 1, 1, 1)))
    acc = sum(
        room.conv2d(nhwc, Conv2dWeight(part, padding=padding), x_zero_point=zero_point)
        for part in parts
    )
    return np.moveaxis(acc, -1, 1)


def as_qlinear_conv(room: Any, v: list[Any], attributes: dict[str, Any]) -> Any:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = v
    acc = convolution(room, x, x_zero, w, w_zero, (0, 0, 0, 0))
    return [room.requantize(acc, x_scale * w_scale / y_scale, int(y_zero), axis=1)]


def as_conv_integer(room: Any, v: list[Any], attributes: dict[str, Any]) -> Any:
    pads = attributes.get("pads", (0, 0, 0, 0))
    return [convolution(room, v[0], v[2], v[1], v[3] if len(v) > 3 else 0, pads)]


NODES: dict[str, Callable[..., Any]] = {
    "QuantizeLinear": as_quantize,
    "DequantizeLinear": as_dequantize,
    "DynamicQuantizeLinear": as_dynamic,
    "MatMulInteger": as_matmul_integer,
    "QLinearMatMul": as_qlinear_matmul,
    "QLinearConv": as_qlinear_conv,
    "ConvInteger": as_conv_integer,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("room", [reference, ops], ids=["reference", "ops"])
def test_onnx_backend_cases(room: Any) -> None:
    """All cases of ONNX's backend test suite that speak of 8-bit numbers, bit for bit."""
    run = []
    for case in load_model_tests(kind="node"):
        nodes = case.model.graph.node if case.model is not None else []
        if len(nodes) != 1 or nodes[0].op_type not in NODES:
            continue
        attributes = {a.name: oh.get_attribute_value(a) for a in nodes[0].attribute}
        for inputs, outputs in case.data_sets:
            if not all(isinstance(v, np.ndarray | np.generic) for v in inputs):
                continue  # a TensorProto: a type that NumPy lacks
            got = NODES[nodes[0].op_type](room, list(inputs), attributes)
            if got is not None:
                for mine, theirs in zip(got, outputs, strict=True):
                    assert_array_equal(mine, theirs, err_msg=case.name)
                run.append(case.name)
    kinds = {name.removeprefix("test_").split("_")[0] for name in run}
    assert kinds == {name.lower() for name in NODES}, run
