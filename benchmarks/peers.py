"""The peers, each behind one small builder: `build(problem, threads) -> (run, answer)`.

`run()` is what is timed: operands converted, weights packed, outputs allocated where the peer
lets us. `answer(result)` turns what run returned into an array to compare with `problem.expected`.
Scales are powers of two, so that every order of float multiplications gives the same multiplier,
and a difference from the reference is a difference in the integers (or in how ties are rounded).

A peer that is not installed, or cannot do a shape, raises; the caller says so.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastq
from benchmarks.shapes import Conv, Elementwise, Gemm, Shape
from fastq import ops, reference
from fastq.qparams import Dequant, Requant
from fastq.weights import Conv2dWeight, LinearWeight

Array = NDArray[Any]
Built = tuple[Callable[[], Any], Callable[[Any], Array]]

X_SCALE = np.float32(2**-5)
ZERO_POINT = 128
NO_SATURATION = 63  # 2 * 255 * 63 < 2**15: vpmaddubsw is exact for weights up to here


@dataclass
class Problem:
    """Operands of one shape, the same for every peer.

    x       uint8 (M, K) or (1, H, W, C), all 256 values.
    weight  int8 (N, K) or (N, C / groups, KH, KW), within +-peak.
    bias    int32 (N,), convolutions only: QLinearMatMul has none.
    """

    shape: Gemm | Conv
    peak: int = 127

    def __post_init__(self) -> None:
        s, rng = self.shape, np.random.default_rng(0)
        x_shape: tuple[int, ...]
        w_shape: tuple[int, ...]
        if isinstance(s, Gemm):
            x_shape, w_shape = (s.m, s.k), (s.n, s.k)
        else:
            x_shape, w_shape = (1, s.h, s.w, s.c), (s.n, s.c // s.groups, s.kh, s.kw)
        self.x: Array = rng.integers(0, 256, x_shape, dtype=np.uint8)
        self.weight: Array = rng.integers(-self.peak, self.peak + 1, w_shape, dtype=np.int8)
        self.bias: Array | None = None
        if isinstance(s, Conv):
            self.bias = rng.integers(-4096, 4096, s.n, dtype=np.int32)
        self.w_scale = np.where(np.arange(s.n) % 2, 2**-7, 2**-8).astype(np.float32)
        # outputs spread over about 40 steps: 74 and 0.58 peak are the deviations of x and weight
        spread = 74 * 0.58 * self.peak * s.k**0.5 * 2**-13
        self.y_scale = np.float32(2.0 ** np.ceil(np.log2(spread / 40)))

    @functools.cached_property
    def packed(self) -> Any:
        return self.pack()

    def pack(self) -> Any:
        """The weight as a new object, whose panels are packed at its first use."""
        s = self.shape
        if isinstance(s, Gemm):
            return LinearWeight(self.weight)
        padding = ((s.padding[0],) * 2, (s.padding[1],) * 2)
        return Conv2dWeight(self.weight, s.stride, padding, s.dilation, s.groups)

    @property
    def requant(self) -> Requant:
        return Requant(X_SCALE * self.w_scale / self.y_scale, ZERO_POINT, self.bias)

    @property
    def x_float(self) -> Array:
        return (self.x.astype(np.float32) - ZERO_POINT) * X_SCALE

    @property
    def w_float(self) -> Array:
        return self.weight * self.w_scale.reshape(-1, *[1] * (self.weight.ndim - 1))

    @property
    def bias_float(self) -> Array | None:
        if self.bias is None:
            return None
        return (self.bias * (X_SCALE * self.w_scale)).astype(np.float32)

    @property
    def y_shape(self) -> tuple[int, ...]:
        s = self.shape
        return (s.m, s.n) if isinstance(s, Gemm) else (1, *s.output_size, s.n)

    def op(self, module: Any) -> Any:
        return module.linear if isinstance(self.shape, Gemm) else module.conv2d

    @functools.cached_property
    def accumulator(self) -> Array:
        acc: Array = self.op(reference)(self.x, self.packed, x_zero_point=ZERO_POINT)
        return acc

    def expected(self, kind: str) -> Array:
        """What fastq.reference says: "int32" (no bias), "uint8" requantized, "float32" real."""
        acc = self.accumulator
        if kind == "int32":
            return acc
        biased = acc if self.bias is None else acc + self.bias
        if kind == "uint8":
            return reference.requantize(biased, self.requant.multiplier, ZERO_POINT, axis=-1)
        return biased * (X_SCALE * self.w_scale)


@dataclass
class ElementwiseProblem:
    """One flat array for one elementwise op: float32, uint8 or int32 as the op wants it."""

    shape: Elementwise

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        if self.shape.op == "quantize":
            self.x: Array = rng.standard_normal(self.shape.size, dtype=np.float32)
        elif self.shape.op == "dequantize":
            self.x = rng.integers(0, 256, self.shape.size, dtype=np.uint8)
        else:
            self.x = rng.integers(-(2**16), 2**16, self.shape.size, dtype=np.int32)

    def expected(self, kind: str) -> Array:
        return _elementwise(reference, self, None)


class Peer(NamedTuple):
    """kind: what comes out. "dynamic" is float32 through integers, within a few percent."""

    name: str
    kind: str
    build: Callable[[Any, int], Built]


def identity(result: Any) -> Array:
    return np.asarray(result)


# fastq


def fastq_uint8(problem: Problem, threads: int) -> Built:
    out = np.empty(problem.y_shape, np.uint8)
    op, x, weight, requant = problem.op(ops), problem.x, problem.packed, problem.requant
    return lambda: op(x, weight, requant, x_zero_point=ZERO_POINT, out=out), identity


def fastq_int32(problem: Problem, threads: int) -> Built:
    out = np.empty(problem.y_shape, np.int32)
    op, x, weight = problem.op(ops), problem.x, problem.packed
    return lambda: op(x, weight, x_zero_point=ZERO_POINT, out=out), identity


def fastq_linear_float(problem: Problem, threads: int) -> Built:
    x, weight, epilogue = problem.x_float, problem.packed, Dequant(problem.w_scale)
    out = np.empty(problem.y_shape, np.float32)
    return lambda: ops.linear_float(x, weight, epilogue, out=out), identity


def fastq_qlinear(problem: Problem, threads: int) -> Built:
    import torch

    layer = fastq.QLinear.from_float(_torch_linear(problem))
    x = torch.from_numpy(problem.x_float)
    return lambda: layer(x), lambda y: y.numpy()


# torch


def _torch_linear(problem: Problem) -> Any:
    import torch

    n, k = problem.weight.shape
    linear = torch.nn.Linear(k, n, bias=False).eval().requires_grad_(False)
    linear.weight.copy_(torch.from_numpy(problem.w_float))
    return linear


def torch_float32(problem: Problem, threads: int) -> Built:
    import torch

    s = problem.shape
    if isinstance(s, Gemm):
        linear, x = _torch_linear(problem), torch.from_numpy(problem.x_float)
        return lambda: linear(x), lambda y: y.numpy()
    # channels_last, as x is; it is also torch's faster one
    x = torch.from_numpy(problem.x_float).permute(0, 3, 1, 2)
    w = torch.from_numpy(problem.w_float).contiguous(memory_format=torch.channels_last)
    bias = torch.from_numpy(problem.bias_float)
    conv = torch.nn.functional.conv2d
    return (
        lambda: conv(x, w, bias, s.stride, s.padding, s.dilation, s.groups),
        lambda y: y.permute(0, 2, 3, 1).numpy(),
    )


def torch_int_mm(problem: Problem, threads: int) -> Built:
    import torch

    x = torch.from_numpy((problem.x.astype(np.int16) - ZERO_POINT).astype(np.int8))
    w = torch.from_numpy(problem.weight).t()
    y = torch.empty(problem.y_shape, dtype=torch.int32)
    return lambda: torch._int_mm(x, w, out=y), lambda y: y.numpy()


def torch_quantized(engine: str) -> Callable[[Problem, int], Built]:
    """torch.ao's quantized linear and conv2d, uint8 to uint8, on one engine."""

    def build(problem: Problem, threads: int) -> Built:
        import torch
        from torch.ao.nn import quantized

        s = problem.shape
        _use_engine(engine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that these layers will be removed
            x = torch._make_per_tensor_quantized_tensor(
                torch.from_numpy(problem.x), float(X_SCALE), ZERO_POINT
            )
            w = torch._make_per_channel_quantized_tensor(
                torch.from_numpy(problem.weight),
                torch.from_numpy(problem.w_scale).double(),
                torch.zeros(s.n, dtype=torch.long),
                0,
            )
            layer: Any
            if isinstance(s, Gemm):
                layer = quantized.Linear(s.k, s.n)
                bias = None
            else:
                layer = quantized.Conv2d(
                    s.c, s.n, (s.kh, s.kw), s.stride, s.padding, s.dilation, s.groups
                )
                x = x.permute(0, 3, 1, 2)
                bias = torch.from_numpy(problem.bias_float)
            layer.set_weight_bias(w, bias)
            layer.scale, layer.zero_point = float(problem.y_scale), ZERO_POINT

        def answer(y: Any) -> Array:
            y = y.int_repr()
            return (y if isinstance(s, Gemm) else y.permute(0, 2, 3, 1)).numpy()

        return lambda: layer(x), answer

    return build


def torch_dynamic(engine: str) -> Callable[[Problem, int], Built]:
    """torch.ao's dynamic linear, float32 to float32, on one engine."""

    def build(problem: Problem, threads: int) -> Built:
        import torch

        _use_engine(engine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(_torch_linear(problem)), dtype=torch.qint8
            )[0]
        x = torch.from_numpy(problem.x_float)
        return lambda: layer(x), lambda y: y.numpy()

    return build


def _use_engine(engine: str) -> None:
    import torch

    if engine not in torch.backends.quantized.supported_engines:
        raise RuntimeError(f"this torch has no {engine} engine")
    torch.backends.quantized.engine = engine


# ONNX graphs, for ONNX Runtime and OpenVINO


class _Graph:
    """One ONNX graph of a few nodes, from x to y."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def model(self, x: Array, y_shape: tuple[int, ...], y_dtype: Any) -> bytes:
        from onnx import helper

        def tensor(name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
            return helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
            )

        graph = helper.make_graph(
            self.nodes,
            "g",
            [tensor("x", x.dtype, x.shape)],
            [tensor("y", y_dtype, y_shape)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model: bytes = helper.make_model(
            graph, opset_imports=opsets, ir_version=10
        ).SerializeToString()
        return model


def _geometry(s: Conv) -> dict[str, Any]:
    return {
        "kernel_shape": [s.kh, s.kw],
        "strides": s.stride,
        "pads": [*s.padding, *s.padding],
        "dilations": s.dilation,
        "group": s.groups,
    }


def onnxruntime_call(
    model: bytes | str, x: Array, y: Array, threads: int, sizes: Mapping[str, int] | None = None
) -> Built:
    """A model, or its path, with input and output bound: nothing is allocated or copied per call.

    sizes  of the axes that have a name in the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, y.dtype.type, y.shape, y.ctypes.data)

    def run(held: Any = (x, y)) -> None:  # the binding has the addresses of x and y alone
        session.run_with_iobinding(binding)

    return run, lambda _: y


def ort_uint8(problem: Problem, threads: int) -> Built:
    """QLinearMatMul; QLinearConv in ONNX Runtime's own channels-last form."""
    s, graph = problem.shape, _Graph()
    x_q = [graph.constant(X_SCALE), graph.constant(np.uint8(ZERO_POINT))]
    w_q = [graph.constant(problem.w_scale), graph.constant(np.zeros(s.n, np.int8))]
    y_q = [graph.constant(problem.y_scale), graph.constant(np.uint8(ZERO_POINT))]
    if isinstance(s, Gemm):
        weight = graph.constant(problem.weight.T)
        graph.node("QLinearMatMul", ["x", *x_q, weight, *w_q, *y_q], ["y"])
    else:
        inputs = ["x", *x_q, graph.constant(problem.weight), *w_q, *y_q]
        inputs.append(graph.constant(problem.bias))
        graph.node(
            "QLinearConv", inputs, ["y"], domain="com.microsoft", channels_last=1, **_geometry(s)
        )
    y = np.empty(problem.y_shape, np.uint8)
    return onnxruntime_call(graph.model(problem.x, y.shape, y.dtype), problem.x, y, threads)


def ort_int32(problem: Problem, threads: int) -> Built:
    """MatMulInteger."""
    graph = _Graph()
    inputs = ["x", graph.constant(problem.weight.T), graph.constant(np.uint8(ZERO_POINT))]
    graph.node("MatMulInteger", inputs, ["y"])
    y = np.empty(problem.y_shape, np.int32)
    return onnxruntime_call(graph.model(problem.x, y.shape, y.dtype), problem.x, y, threads)


def ort_dynamic(problem: Problem, threads: int) -> Built:
    """What ONNX Runtime's dynamic quantizer writes for a linear layer."""
    graph = _Graph()
    graph.node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero_point"])
    graph.node("MatMulInteger", ["q", graph.constant(problem.weight.T), "zero_point"], ["acc"])
    graph.node("Cast", ["acc"], ["real"], to=1)
    graph.node("Mul", ["scale", graph.constant(problem.w_scale)], ["scales"])
    graph.node("Mul", ["real", "scales"], ["y"])
    x, y = problem.x_float, np.empty(problem.y_shape, np.float32)
    return onnxruntime_call(graph.model(x, y.shape, y.dtype), x, y, threads)


def _planes(x: Array) -> Array:
    """ONNX's order of ours: (1, C, H, W) of (1, H, W, C); (M, K) as it is."""
    return x if x.ndim == 2 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _with_planes(built: Built) -> Built:
    """The answer, which is in ONNX's order, in ours."""

    def answer(result: Any) -> Array:
        y = built[1](result)
        return y if y.ndim == 2 else y.transpose(0, 2, 3, 1)

    return built[0], answer


def _empty_planes(problem: Problem, dtype: Any) -> Array:
    return _planes(np.empty(problem.y_shape, dtype))


def _float_model(problem: Problem) -> bytes:
    s, graph = problem.shape, _Graph()
    inputs = ["x", graph.constant(problem.w_float)]
    if isinstance(s, Gemm):
        graph.node("Gemm", inputs, ["y"], transB=1)
    else:
        inputs.append(graph.constant(problem.bias_float))
        graph.node("Conv", inputs, ["y"], **_geometry(s))
    y = _empty_planes(problem, np.float32)
    return graph.model(_planes(problem.x_float), y.shape, y.dtype)


def ort_float32(problem: Problem, threads: int) -> Built:
    """Convolutions take and give planes: ONNX Runtime has no channels-last float form."""
    x, y = _planes(problem.x_float), _empty_planes(problem, np.float32)
    return _with_planes(onnxruntime_call(_float_model(problem), x, y, threads))


def openvino_call(model: Any, x: Array, threads: int, precision: str = "f32") -> Built:
    """An ONNX model, its path, or OpenVINO's own model, for inputs of x's shape.

    precision  of float operators: "f32"; "" lets OpenVINO choose bf16 where the CPU has it.
    """
    # at import it would fork to send usage statistics
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    network = core.read_model(model) if isinstance(model, bytes | str) else model.clone()
    network.reshape(x.shape)
    compiled = core.compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    output = request.get_output_tensor()

    def run(held: Any = x) -> None:  # the request has the address of x alone
        request.infer(share_outputs=True)

    return run, lambda _: output.data


def openvino_float32(problem: Problem, threads: int) -> Built:
    return _with_planes(openvino_call(_float_model(problem), _planes(problem.x_float), threads))


def openvino_uint8(problem: Problem, threads: int) -> Built:
    """Dequantize, op, quantize, which OpenVINO merges into one int8 primitive.

    Convolutions take and give planes: a transposition in the graph makes it convolve in float.
    """
    s, graph = problem.shape, _Graph()
    zero_point = graph.constant(np.uint8(ZERO_POINT))
    w_q = [graph.constant(problem.w_scale), graph.constant(np.zeros(s.n, np.int8))]
    graph.node("DequantizeLinear", ["x", graph.constant(X_SCALE), zero_point], ["x_real"])
    graph.node("DequantizeLinear", [graph.constant(problem.weight), *w_q], ["w_real"], axis=0)
    if isinstance(s, Gemm):
        graph.node("Gemm", ["x_real", "w_real"], ["y_real"], transB=1)
    else:
        bias = graph.constant(problem.bias_float)
        graph.node("Conv", ["x_real", "w_real", bias], ["y_real"], **_geometry(s))
    y_scale = graph.constant(problem.y_scale)
    graph.node("QuantizeLinear", ["y_real", y_scale, zero_point], ["y"])
    x, y = _planes(problem.x), _empty_planes(problem, np.uint8)
    return _with_planes(openvino_call(graph.model(x, y.shape, y.dtype), x, threads))


# elementwise


def _elementwise(module: Any, problem: ElementwiseProblem, out: Array | None) -> Array:
    """The op of `module` (fastq.ops or fastq.reference)."""
    x, op = problem.x, problem.shape.op
    result: Array
    if op == "quantize":
        result = module.quantize(x, scale=X_SCALE, zero_point=ZERO_POINT, out=out)
    elif op == "dequantize":
        result = module.dequantize(x, X_SCALE, ZERO_POINT, out=out)
    else:
        result = module.requantize(x, np.float32(2**-10), ZERO_POINT, out=out)
    return result


def _elementwise_out(problem: ElementwiseProblem) -> Array:
    dtype = np.float32 if problem.shape.op == "dequantize" else np.uint8
    return np.empty(problem.shape.size, dtype)


def fastq_elementwise(problem: ElementwiseProblem, threads: int) -> Built:
    out = _elementwise_out(problem)
    return lambda: _elementwise(ops, problem, out), identity


def numpy_elementwise(problem: ElementwiseProblem, threads: int) -> Built:
    """What a user would write, in float32."""
    x = problem.x
    runs = {
        "quantize": lambda: np.clip(np.rint(x / X_SCALE) + ZERO_POINT, 0, 255).astype(np.uint8),
        "dequantize": lambda: (x.astype(np.float32) - ZERO_POINT) * X_SCALE,
        "requantize": lambda: np.clip(np.rint(x * np.float32(2**-10)) + ZERO_POINT, 0, 255).astype(
            np.uint8
        ),
    }
    return runs[problem.shape.op], identity


def torch_elementwise(problem: ElementwiseProblem, threads: int) -> Built:
    """torch.quantize_per_tensor and its inverse; requantize from plain torch operators."""
    import torch

    x, op = torch.from_numpy(problem.x), problem.shape.op
    if op == "dequantize":
        q = torch._make_per_tensor_quantized_tensor(x, float(X_SCALE), ZERO_POINT)
        return q.dequantize, lambda y: y.numpy()
    if op == "quantize":
        quantize = torch.quantize_per_tensor
        return (
            lambda: quantize(x, float(X_SCALE), ZERO_POINT, torch.quint8),
            lambda y: y.int_repr().numpy(),
        )
    return (
        lambda: (x * 2**-10).round_().add_(ZERO_POINT).clamp_(0, 255).to(torch.uint8),
        lambda y: y.numpy(),
    )


def ort_elementwise(problem: ElementwiseProblem, threads: int) -> Built:
    """QuantizeLinear, DequantizeLinear."""
    names = {"quantize": "QuantizeLinear", "dequantize": "DequantizeLinear"}
    if problem.shape.op not in names:
        raise RuntimeError(f"ONNX has no operator for {problem.shape.op}")
    graph = _Graph()
    q = [graph.constant(X_SCALE), graph.constant(np.uint8(ZERO_POINT))]
    graph.node(names[problem.shape.op], ["x", *q], ["y"])
    y = _elementwise_out(problem)
    return onnxruntime_call(graph.model(problem.x, y.shape, y.dtype), problem.x, y, threads)


GEMM = (
    Peer("fastq", "uint8", fastq_uint8),
    Peer("fastq int32", "int32", fastq_int32),
    Peer("torch._int_mm", "int32", torch_int_mm),
    Peer("torch onednn", "uint8", torch_quantized("onednn")),
    Peer("torch fbgemm", "uint8", torch_quantized("fbgemm")),
    Peer("torch x86", "uint8", torch_quantized("x86")),
    Peer("onnxruntime QLinearMatMul", "uint8", ort_uint8),
    Peer("onnxruntime MatMulInteger", "int32", ort_int32),
    Peer("openvino int8", "uint8", openvino_uint8),
    Peer("torch float32", "float32", torch_float32),
    Peer("onnxruntime float32", "float32", ort_float32),
    Peer("openvino float32", "float32", openvino_float32),
)
CONV = (
    Peer("fastq", "uint8", fastq_uint8),
    Peer("torch onednn", "uint8", torch_quantized("onednn")),
    Peer("torch fbgemm", "uint8", torch_quantized("fbgemm")),
    Peer("torch x86", "uint8", torch_quantized("x86")),
    Peer("onnxruntime QLinearConv", "uint8", ort_uint8),
    Peer("openvino int8", "uint8", openvino_uint8),
    Peer("torch float32", "float32", torch_float32),
    Peer("onnxruntime float32", "float32", ort_float32),
    Peer("openvino float32", "float32", openvino_float32),
)
ELEMENTWISE = (
    Peer("fastq", "exact", fastq_elementwise),
    Peer("numpy", "exact", numpy_elementwise),
    Peer("torch", "exact", torch_elementwise),
    Peer("onnxruntime", "exact", ort_elementwise),
)
MODULES = (
    Peer("fastq.QLinear", "dynamic", fastq_qlinear),
    Peer("fastq linear_float", "dynamic", fastq_linear_float),
    Peer("torch dynamic onednn", "dynamic", torch_dynamic("onednn")),
    Peer("torch dynamic fbgemm", "dynamic", torch_dynamic("fbgemm")),
    Peer("torch dynamic x86", "dynamic", torch_dynamic("x86")),
    Peer("onnxruntime dynamic", "dynamic", ort_dynamic),
    Peer("torch float32", "float32", torch_float32),
    Peer("onnxruntime float32", "float32", ort_float32),
    Peer("openvino float32", "float32", openvino_float32),
)


def peers_of(shape: Shape) -> tuple[Peer, ...]:
    if isinstance(shape, Elementwise):
        return ELEMENTWISE
    if isinstance(shape, Conv):
        return CONV
    return MODULES if shape.name.startswith("module/") else GEMM


def problem_of(shape: Shape) -> Problem | ElementwiseProblem:
    return ElementwiseProblem(shape) if isinstance(shape, Elementwise) else Problem(shape)


def check(peer: Peer, problem: Any, built: Built, threads: int) -> str:
    """Compare the answer with fastq.reference: "exact", or how it differs.

    fastq must be exact in its integers. A peer may differ by one step (ties), or saturate: then
    it is run again on weights too small to saturate, where it has to be right. Raises
    AssertionError for an answer that is wrong.
    """
    difference, scale = _difference(peer, problem, built)
    if peer.kind in ("float32", "dynamic"):
        bound = 1e-3 if peer.kind == "float32" else 0.05
        if difference <= bound * scale:
            return f"within {difference / scale:.1e}"
    elif difference == 0:
        return "exact"
    elif not peer.name.startswith("fastq") and difference <= 1 and peer.kind != "int32":
        return "rounds differently, by 1"
    if peer.name.startswith("fastq") or getattr(problem, "peak", 0) <= NO_SATURATION:
        raise AssertionError(
            f"{peer.name} on {problem.shape.name}: differs from fastq.reference by {difference:g}"
        )
    small = Problem(problem.shape, NO_SATURATION)
    check(peer, small, peer.build(small, threads), threads)
    return f"saturates, by up to {difference:g}"


def _difference(peer: Peer, problem: Any, built: Built) -> tuple[float, float]:
    """Largest absolute difference, and largest value, of the answer and the reference."""
    run, answer = built
    got, want = answer(run()), problem.expected(peer.kind)
    if got.shape != want.shape:
        raise AssertionError(f"{peer.name}: answer {got.shape}, wanted {want.shape}")
    difference = np.abs(got.astype(np.float64) - want)
    return float(difference.max(initial=0)), float(np.abs(want).max(initial=0)) or 1.0
