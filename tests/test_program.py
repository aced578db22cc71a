"""Programs on NumPy alone: what a step may be, and that nothing else comes to the kernels."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fastq.arguments import ARGUMENTS, NUMPY_MODES
from fastq.plan import BoundProgram
from fastq.program import RECURRENT, WAYS_IN, Program
from fastq.program import WIDE as TAKE_WIDE
from fastq.qparams import GATES, Dequant, Requant
from fastq.sizes import Size
from fastq.steps import OPERATIONS, Step
from fastq.weights import Conv2dWeight, LinearWeight

Shape = tuple[int, ...]


def quantized(name: str, source: str, rank: int, dtype: str = "uint8") -> Step:
    scale, zero_point = (0.1, 7) if dtype == "uint8" else (0.001, 0)
    arguments = {"scale": scale, "zero_point": zero_point, "axes": tuple(range(rank))}
    return Step("quantize", name, (source,), {**arguments, "dtype": dtype})


def real(name: str, source: str) -> Step:
    return Step("dequantize", name, (source,), {"scale": 0.1, "zero_point": 7})


def program(
    ranks: tuple[int, ...], *steps: Step, outputs: dict[str, int], dtype: str = "uint8"
) -> Program:
    """inputs x0, x1, ... of these ranks, quantized as q0, q1, ...; outputs and their ranks."""
    inputs = tuple(f"x{i}" for i in range(len(ranks)))
    first = [quantized(f"q{i}", f"x{i}", rank, dtype) for i, rank in enumerate(ranks)]
    ends = tuple((name, tuple(range(rank))) for name, rank in outputs.items())
    extents = tuple((None,) * rank for rank in ranks)
    return Program(inputs, (*first, *steps), ends, extents)


def i8(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(-128, 128, shape).astype(np.int8)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


TO = {"zero_point": 3, "qmin": 1, "qmax": 250}
POOL = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "ceil_mode": True}
EPILOGUE = Requant(f32(0.01, 0.02, 0.005), 3, np.array([5, -70, 3], np.int32))
ADDING = dataclasses.replace(EPILOGUE, add_multiplier=0.7, add_zero_point=9)
IMAGE = (2, 6, 5, 3)
WIDE = np.dtype(np.int16)

STATES = {"x_scale": 1e-3, "multiplier": 127.0, **TO}

# operation -> examples: the shapes of its inputs, uint8 (recurrent: int16), and its arguments
EXAMPLES: dict[str, list[tuple[tuple[Shape, ...], dict[str, Any]]]] = {
    "quantize": [
        ((IMAGE,), {"scale": 0.1, "zero_point": 7, "axes": (0, 2, 3, 1), "dtype": "uint8"}),
        ((IMAGE,), {"scale": 0.001, "zero_point": 0, "axes": (0, 2, 3, 1), "dtype": "int16"}),
    ],
    "grid": [
        (((2, 3, 6, 5),), {"factor": f32(9, 30, 2e9), "shift": f32(127.5, 0.25, -3),
                           "padding": ((1, 0), (0, 2)), "axes": (0, 2, 3, 1)}),
        (((7, 3),), {"factor": f32(9, 30, 7), "shift": f32(127.5, 0.25, -3),
                     "padding": ((0, 0), (0, 0)), "axes": (0, 1)}),
    ],
    "dequantize": [((IMAGE,), {"scale": 0.1, "zero_point": 7})],
    "constant": [
        ((), {"value": np.arange(24, dtype=np.uint8).reshape(2, 3, 4)}),
        ((), {"value": np.arange(-9000, 9000, 1000, dtype=np.int16).reshape(2, 9)}),
    ],
    "conv2d": [
        ((IMAGE,), {"weight": Conv2dWeight(i8(3, 3, 3, 2), (2, 1), 1, (1, 2)),
                    "epilogue": EPILOGUE, "x_zero_point": 7}),
        ((IMAGE, (2, 6, 5, 3)), {"weight": Conv2dWeight(i8(3, 1, 3, 3), 1, 1, 1, 3),
                                 "epilogue": ADDING, "x_zero_point": 7}),
    ],
    "linear": [
        ((IMAGE,), {"weight": LinearWeight(i8(3, 3)), "epilogue": EPILOGUE, "x_zero_point": 0}),
        (((4, 9), (4, 3)), {"weight": LinearWeight(i8(3, 9)), "epilogue": ADDING,
                            "x_zero_point": 255}),
        ((IMAGE,), {"weight": LinearWeight(i8(3, 3)), "epilogue": Requant(f32(2)[0], dtype=WIDE),
                    "x_zero_point": 0}),
    ],
    "matmul": [
        (((2, 3, 4, 5), (2, 3, 5, 6)), {"multiplier": 0.01, "a_zero_point": 7, "mean": False,
                                        "transpose_b": False, **TO, "dtype": "uint8"}),
        (((3, 4, 5), (6, 5)), {"multiplier": 0.01, "a_zero_point": 7, "transpose_b": True,
                               "mean": False, **TO, "dtype": "uint8"}),
        (((3, 4, 5), (5, 6)), {"multiplier": 1.5, "a_zero_point": 0, "transpose_b": False,
                               "mean": True, **TO, "dtype": "uint8"}),
    ],
    "add": [
        (((2, 3, 1), (4,)), {"a_multiplier": 0.5, "b_multiplier": -0.25, "a_zero_point": 3,
                             "b_zero_point": 4, **TO, "dtype": "uint8"}),
        (((2, 3, 1), (4,)), {"a_multiplier": 150.0, "b_multiplier": -90.0, "a_zero_point": 3,
                             "b_zero_point": 4, "zero_point": 0, "qmin": -9000, "qmax": 32767,
                             "dtype": "int16"}),
    ],
    "mul": [(((2, 3, 4), (1, 4)), {"multiplier": 0.01, "a_zero_point": 3, "b_zero_point": 4,
                                   **TO})],
    "affine": [((IMAGE,), {"multiplier": f32(1, -2, 0.5), "shift": f32(1, 2, 3),
                           "x_zero_point": 7, **TO})],
    "table": [
        ((IMAGE,), {"values": np.arange(256, dtype=np.uint8)[::-1]}),
        ((IMAGE,), {"values": np.arange(768).reshape(3, 256).astype(np.uint8)}),
    ],
    "recurrent": [
        (((2, 5, 12),), {"cell": "lstm", "weight": LinearWeight(i8(12, 3)), "axis": 1,
                         "epilogue": Dequant(f32(0.01)[0], f32(0.1)[0]), "reverse": False,
                         **STATES}),
        (((5, 2, 9),), {"cell": "gru", "weight": LinearWeight(i8(9, 3)), "axis": 0,
                        "epilogue": Dequant(f32(*range(1, 10)), bias=f32(*range(9))),
                        "reverse": True, **STATES}),
    ],
    "softmax": [
        ((IMAGE,), {"scale": 0.05, "uniform": False}),
        ((IMAGE, (1, 1, 1, IMAGE[-1])), {"scale": 0.05, "uniform": True}),
    ],
    "softmax_weights": [
        ((IMAGE,), {"scale": 0.05, "uniform": False}),
        ((IMAGE, (1, 1, 1, IMAGE[-1])), {"scale": 0.05, "uniform": True}),
    ],
    "layer_norm": [((IMAGE,), {"multiplier": f32(9, 8, 7), "shift": f32(1, 2, 3),
                               "epsilon": 1e-3, **TO})],
    "rms_norm": [((IMAGE,), {"multiplier": f32(9, 8, 7), "epsilon": 1e-3, "x_zero_point": 7,
                             **TO})],
    "group_norm": [((IMAGE,), {"groups": 3, "multiplier": f32(9, 8, 7), "shift": f32(1, 2, 3),
                               "epsilon": 1e-3, **TO})],
    "global_response_norm": [((IMAGE,), {"residual": 1.5, "x_zero_point": 7,
                                         "multiplier": f32(9, 8, 7), "shift": f32(1, 2, 3),
                                         "epsilon": 1e-3, **TO})],
    "max_pool2d": [((IMAGE,), {**POOL, "dilation": (2, 1)})],
    "avg_pool2d": [((IMAGE,), {**POOL, "count_include_pad": False, "divisor_override": None,
                               "multiplier": 0.9, "x_zero_point": 7, **TO})],
    "adaptive_avg_pool2d": [((IMAGE,), {"output_size": (4, None), "multiplier": 0.9,
                                        "x_zero_point": 7, **TO})],
    "adaptive_max_pool2d": [((IMAGE,), {"output_size": (None, 3)})],
    "upsample_nearest2d": [
        ((IMAGE,), {"output_size": (7, 11), "scale_factor": None}),
        ((IMAGE,), {"output_size": None, "scale_factor": (1.5, 2.0)}),
        ((IMAGE,), {"output_size": (Size(0, 2, before=1, stride=2), 3), "scale_factor": None}),
    ],
    "upsample_bilinear2d": [((IMAGE,), {"output_size": (7, 11), "scale_factor": None,
                                        "align_corners": True})],
    "reshape": [
        ((IMAGE,), {"sizes": (((0,), 1), 3, ((1, 2, 3), 3)), "ones": ()}),
        (((1, 6), ), {"sizes": (((1,), 2), 2), "ones": (0,)}),
    ],
    "permute": [((IMAGE,), {"axes": (0, 3, 1, 2)})],
    "slice": [((IMAGE,), {"axis": 1, "start": -5, "end": None, "step": 2})],
    "concat": [
        ((IMAGE, (2, 6, 5, 1), IMAGE), {"axis": 3}),
        (((1, 1, 4), (2, 6, 4), (2, 1, 4)), {"axis": 1}),
        (((2, 1, 3), (2, 6, 4)), {"axis": 2}),
    ],
    "pad": [
        *(((IMAGE,), {"widths": ((0, 0), (1, 2), (0, 3), (0, 0)), "output_size": None, "value": 9,
                      "mode": mode}) for mode in NUMPY_MODES),
        ((IMAGE,), {"widths": ((0, 0), (-1, 2), (1, -3), (0, -1)), "output_size": None,
                    "value": 9, "mode": "constant"}),
        *(((IMAGE,), {"widths": ((0, 0), shares, (0, 1), (0, 0)), "value": 9, "mode": "constant",
                      "output_size": (None, Size(0, 1, 2, -3), width, None)})
          for shares in ((1, 1), (0, 1), (1, 0)) for width in (3, Size(0, 2, 1, 4))),
        *(((IMAGE,), {"widths": ((0, 0), (1, 1), (0, 1), (0, 0)), "value": 9, "mode": mode,
                      "output_size": (None, Size(0, 1, 1, 3), 8, None)}) for mode in NUMPY_MODES),
        (((2, 4, 3),), {"widths": ((0, 0), (1, 1), (0, 0)), "output_size": (None, 0, None),
                        "value": 9, "mode": "constant"}),
    ],
    "dilate": [((IMAGE,), {"stride": (2, 3), "padding": ((1, 0), (2, 1)), "value": 7})],
}  # fmt: skip
CASES = [(op, i) for op, examples in EXAMPLES.items() for i in range(len(examples))]
CASE_IDS = [f"{op}-{i}" for op, i in CASES]


def of(op: str, shapes: tuple[Shape, ...], arguments: dict[str, Any]) -> Program:
    """A program around one step, which is called "y" or made float as "out"."""
    ranks = tuple(map(len, shapes))
    sources = ("x0",) if op in WAYS_IN else tuple(f"q{i}" for i in range(len(ranks)))
    step = Step(op, "y", sources, arguments)
    dtype = "int16" if op in RECURRENT else "uint8"
    if op == "dequantize":
        return program(ranks, step, outputs={"y": len(shapes[0])})
    try:
        rank = len(program(ranks, step, outputs={}, dtype=dtype).shapes(*shapes)["y"])
    except ValueError as error:
        if "inputs of the program" not in str(error):
            raise
        rank = 0  # there is no such value
    return program(ranks, step, real("out", "y"), outputs={"out": rank}, dtype=dtype)


def inputs_of(shapes: tuple[Shape, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(len(shapes))
    return [rng.normal(5, 9, shape).astype(np.float32) for shape in shapes]


def check(made: Program, *inputs: np.ndarray) -> None:
    """The kernels give the bits of the specification."""
    wanted = made.reference(*inputs)
    for x, y in zip(wanted, BoundProgram(made)(*inputs), strict=True):
        np.testing.assert_array_equal(y, x, strict=True)


def test_every_operation_has_an_example() -> None:
    assert EXAMPLES.keys() == OPERATIONS.keys() == ARGUMENTS.keys()


@pytest.mark.parametrize(("op", "i"), CASES, ids=CASE_IDS)
def test_shapes_are_those_of_the_values(op: str, i: int) -> None:
    shapes, arguments = EXAMPLES[op][i]
    made = of(op, shapes, arguments)
    values = made.values(*inputs_of(shapes))
    assert made.shapes(*shapes) == {name: value.shape for name, value in values.items()}
    for value in values.values():
        assert value.dtype in (np.uint8, np.int16, np.float32)
    assert made.dtypes == {name: value.dtype for name, value in values.items()}
    check(made, *inputs_of(shapes))


@pytest.mark.parametrize(("op", "i"), CASES, ids=CASE_IDS)
def test_empty_batches(op: str, i: int) -> None:
    shapes, arguments = EXAMPLES[op][i]
    if shapes and len({len(shape) for shape in shapes}) == 1 and op != "matmul":
        empty = tuple((0, *shape[1:]) for shape in shapes)
        no_steps = op in RECURRENT and arguments["axis"] == 0
        if not arguments.get("ones") and not no_steps:
            check(of(op, empty, arguments), *inputs_of(empty))


@pytest.mark.parametrize("op", EXAMPLES)
def test_arguments_are_all_there_and_no_other(op: str) -> None:
    shapes, arguments = EXAMPLES[op][0]
    for name in arguments:
        fewer = {key: value for key, value in arguments.items() if key != name}
        with pytest.raises(ValueError, match=f"y: {op} with .*; wanted .*'{name}'"):
            of(op, shapes, fewer)
    with pytest.raises(ValueError, match=r"\['.*more.*\]; wanted"):
        of(op, shapes, {**arguments, "more": 1})
    inputs = {"concat": (), **dict.fromkeys(WAYS_IN, ("x0", "x0"))}.get(op, ("q0",) * 3)
    dtype = "int16" if op in RECURRENT else "uint8"
    with pytest.raises(ValueError, match=r"y: .* of \d inputs; wanted"):
        program((2,), Step(op, "y", inputs, arguments), outputs={}, dtype=dtype)


# what stands where something else is wanted
ODD: tuple[Any, ...] = (
    None, "3", "", True, -1, 0, 1, 256, 2**20 + 1, 2**40 + 1, 2**63, -(2**70), 0.0, -1.0, 0.5,
    1e-300, 1e300, float("nan"), float("inf"), (), (1,), (2, 2), (0, 0), (-1, 1), (2**20, 2**20),
    (0, 1, 2, 3), (0, 0, 1, 1), (3, 2, 1, 9), (1e30, 1e30), (None, None), ((1, 1), (1, 1)),
    ((2**20, 2**20),) * 4, ((1, 1),) * 3, (((0, 9), 1),), (((0, 1), 0),), [2, 2], {}, object(),
    np.int64(3), np.array(3), f32(1), f32(1, 2, 3), f32(1, np.nan, 3), f32(1e30, 1, 1),
    np.zeros(256, np.uint8), np.zeros((4, 256), np.uint8), np.zeros(255, np.uint8),
    np.zeros((2, 3, 4)), i8(3, 3), np.zeros((1,) * 5, np.uint8), LinearWeight(i8(4, 3)),
    LinearWeight(i8(3, 8)), Conv2dWeight(i8(3, 3, 9, 9)), Conv2dWeight(i8(4, 3, 1, 1)),
    Conv2dWeight(i8(3, 3, 1, 1), 2**20, 2**20), Conv2dWeight(i8(3, 3, 9, 9), 1, "same", 2**20),
    Requant(f32(1, 2)), Requant(f32(1e30)[0]), Requant(f32(1)[0], 0, np.zeros(2, np.int32)),
    Dequant(f32(1)[0], f32(1, 2)), Dequant(f32(3e38)[0], f32(3e38)[0]),
    Requant(f32(1)[0], add_multiplier=1.0),
)  # fmt: skip


@pytest.mark.parametrize(("op", "i"), CASES, ids=CASE_IDS)
def test_an_odd_argument_is_refused_or_computed(op: str, i: int) -> None:
    """Whatever stands there, it is refused with its name, or the kernels do what it says."""
    shapes, arguments = EXAMPLES[op][i]
    refused = 0
    for name, check_of in ARGUMENTS[op].items():
        for odd in ODD:
            try:
                made = of(op, shapes, {**arguments, name: odd})
            except ValueError as error:
                refused += 1
                if not check_of.fits(odd):
                    assert f"y: {op} " in str(error) and "; wanted " in str(error)
                continue
            try:
                values = made.shapes(*shapes)
            except ValueError as error:
                assert str(error).startswith(("y: ", "out: ")) and "inputs of the" in str(error)
                continue
            if max(np.prod(shape) for shape in values.values()) > 10**6:
                continue  # large, and possible
            try:
                wanted = made.reference(*inputs_of(shapes))
            except ValueError:  # operands of other sizes
                with pytest.raises(ValueError, match=r"wanted|does not broadcast"):
                    BoundProgram(made)(*inputs_of(shapes))
                continue
            found = BoundProgram(made)(*inputs_of(shapes))
            for x, y in zip(wanted, found, strict=True):
                np.testing.assert_array_equal(y, x, f"{op}: {name}={odd!r:.80}", strict=True)
    assert refused > 25 * len(arguments)


SOFTMAX = {"scale": 1.0, "uniform": False}


def by(widths: tuple[tuple[int, int], ...], mode: str) -> dict[str, Any]:
    return {"widths": widths, "output_size": None, "value": 0, "mode": mode}


REFUSED: dict[str, tuple[Any, str]] = {
    "no operation": (lambda: step("relu", ("q0",)), "y is a 'relu', which is no operation"),
    "no such value": (lambda: step("softmax", ("z",), **SOFTMAX), "z, which is unknown"),
    "a float value": (lambda: step("softmax", ("x0",), **SOFTMAX), "x0, which is float32"),
    "an integer value": (
        lambda: step("quantize", ("q0",), scale=1.0, zero_point=0, axes=(0,), dtype="uint8"),
        "q0, which is uint8; wanted a float32",
    ),
    "itself": (lambda: step("softmax", ("y",), **SOFTMAX), "y, which is unknown"),
    "a later one": (
        lambda: program((2,), real("out", "y"), Step("softmax", "y", ("q0",), SOFTMAX),
                        outputs={"out": 2}),
        "out takes y, which is unknown; wanted a uint8 or int16 value that a step before it makes",
    ),
    "one name twice": (
        lambda: program((2,), Step("softmax", "q0", ("q0",), SOFTMAX), outputs={}),
        "two values are called q0",
    ),
    "the name of an input": (
        lambda: program((2,), Step("softmax", "x0", ("q0",), SOFTMAX), outputs={}),
        "two values are called x0",
    ),
    "an output of bytes": (lambda: program((2,), outputs={"q0": 2}), r"\['q0'\]; wanted each"),
    "an input as output": (lambda: program((2,), outputs={"x0": 2}), r"\['x0'\]; wanted each"),
    "an output twice": (
        lambda: Program(("x",), (quantized("q", "x", 1), real("y", "q")),
                        (("y", (0,)), ("y", (0,))), ((None,),)),
        "each float32 value of a step once",
    ),
    "a float value that nobody takes": (
        lambda: program((2,), real("y", "q0"), real("z", "q0"), outputs={"z": 2}),
        r"once: \['y', 'z'\]",
    ),
    "an axis that is no integer": (
        lambda: Program(("x",), (quantized("q", "x", 1), real("y", "q")), (("y", (0.0,)),),
                        ((None,),)),
        "axes as integers",
    ),
    "no extents": (lambda: Program(("x",), (), (), ()), "extents"),
    "a negative extent": (lambda: Program(("x",), (), (), ((-1,),)), "extents"),
    "padding over half": (
        lambda: step("max_pool2d", ("q0",), **{**POOL, "padding": (2, 0), "dilation": (1, 1)}),
        "wanted up to half",
    ),
    "two sizes": (
        lambda: step("upsample_nearest2d", ("q0",), output_size=(1, 1), scale_factor=(1.0, 1.0)),
        "output_size or scale_factor",
    ),
    "qmin over qmax": (
        lambda: step("mul", ("q0", "q0"), multiplier=0.1, a_zero_point=0, b_zero_point=0,
                     zero_point=0, qmin=9, qmax=8),
        "y: qmin=9, qmax=8; wanted 0 <= qmin <= qmax <= 255",
    ),
    "an operand that the epilogue adds": (
        lambda: step("linear", ("q0",), weight=LinearWeight(i8(3, 3)), epilogue=ADDING,
                     x_zero_point=0),
        "linear of 1 inputs; wanted 2",
    ),
    "a softmax of int16": (
        lambda: program((2,), quantized("w", "x0", 2, "int16"),
                        Step("softmax", "y", ("w",), SOFTMAX), outputs={}),
        "y takes w, which is int16; wanted a uint8 value",
    ),
    "a product of int16": (
        lambda: program((2,), quantized("w", "x0", 2, "int16"),
                        Step("linear", "y", ("w",), EXAMPLES["linear"][0][1]), outputs={}),
        "y takes w, which is int16; wanted a uint8 value",
    ),
    "int16 that is not symmetric": (
        lambda: step("quantize", ("x0",), scale=1.0, zero_point=3, axes=(0, 1, 2, 3),
                     dtype="int16"),
        "zero_point=3 of int16; wanted 0",
    ),
    "a sum beyond its dtype": (
        lambda: step("add", ("q0", "q0"), **{**EXAMPLES["add"][1][1], "dtype": "uint8"}),
        "qmin=-9000, qmax=32767; wanted 0 <=",
    ),
}  # fmt: skip


def step(op: str, inputs: tuple[str, ...], **arguments: Any) -> Program:
    return program((4,), Step(op, "y", inputs, arguments), real("out", "y"), outputs={"out": 4})


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_out_of_order_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


def conv(*shape: int, **geometry: Any) -> dict[str, Any]:
    weight = Conv2dWeight(i8(*shape), **geometry)
    return {"weight": weight, "epilogue": Requant(f32(0.01)[0]), "x_zero_point": 7}


BILINEAR = {"output_size": None, "align_corners": False}
SIZES: dict[str, tuple[Shape, str, dict[str, Any], str]] = {
    "few axes of an image": ((4, 4, 3), "conv2d", conv(2, 3, 1, 1), r"wanted \(B, H, W, 3\)"),
    "other channels": ((1, 4, 4, 2), "conv2d", conv(2, 3, 1, 1), r"wanted \(B, H, W, 3\)"),
    "a kernel beyond the image": ((1, 4, 4, 3), "conv2d", conv(2, 3, 5, 1), "smaller than the"),
    "dilation beyond the image": (
        (1, 4, 4, 3), "conv2d", conv(2, 3, 2, 2, dilation=2**20), "smaller than the kernel"),
    "padding of terabytes": (
        (99, 1, 1, 3), "conv2d", conv(2, 3, 1, 1, stride=2**20, padding=2**20), "up to 32 axes"),
    "an empty batch of them": (
        (0, 1, 1, 99), "conv2d", conv(2, 99, 1, 1, stride=2**20, padding=2**20), "up to 32 axes"),
    "the same, by dilation": (
        (1, 9, 9, 1), "conv2d", conv(2, 1, 9, 9, padding="same", dilation=2**20), "up to 32 axes"),
    "an empty image": ((1, 0, 4, 3), "conv2d", conv(2, 3, 1, 1, padding=1), "H, W > 0"),
    "a long list of windows": (
        (1, 64, 1, 1), "max_pool2d",
        {"kernel_size": (2**20, 1), "stride": (1, 1), "padding": (2**19, 0), "ceil_mode": False,
         "dilation": (1, 1)}, "wanted up to 16777216 taps"),
    "to a size of no axis": ((1, 4, 4, 3), "upsample_bilinear2d",
                             {**BILINEAR, "scale_factor": None, "output_size": (Size(0, 4), 1)},
                             "follows axis 4"),
    "to nothing": ((1, 4, 4, 3), "upsample_bilinear2d",
                   {**BILINEAR, "scale_factor": None, "output_size": (1, Size(0, 2, more=-4))},
                   "wanted a pixel at least"),
    "to more than there is": ((1, 4, 4, 3), "upsample_bilinear2d",
                              {**BILINEAR, "scale_factor": None,
                               "output_size": (Size(0, 1, 2**30), Size(0, 2, 2**30))},
                              "up to 32 axes"),
    "a large image": ((1, 4, 4, 3), "upsample_bilinear2d",
                      {**BILINEAR, "scale_factor": (1e9, 1e9)}, "up to 32 axes"),
    "a large image, none of them": ((0, 4, 4, 3), "upsample_bilinear2d",
                                    {**BILINEAR, "scale_factor": (1e15, 1e15)}, "up to 32 axes"),
    "a large reshape of nothing": (
        (0, 4), "reshape", {"sizes": (0, 2**40, 2**40), "ones": ()}, "up to 32 axes"),
    "many axes": ((1, 1), "reshape", {"sizes": (1,) * 33, "ones": ()}, "wanted up to 32 axes"),
    "a reshape of another size": (
        (2, 4), "reshape", {"sizes": (3, 3), "ones": ()}, r"\(2, 4\) into \(3, 3\)"),
    "a rest": ((2, 4), "reshape", {"sizes": (((0, 1), 3), 3), "ones": ()}, "into"),
    "an axis beyond": ((2, 4), "reshape", {"sizes": (((0, 2), 1),), "ones": ()}, "out of range"),
    "an axis that is not 1": ((2, 4), "reshape", {"sizes": (8,), "ones": (0,)}, "wanted size 1"),
    "some of the axes": ((2, 3, 4), "permute", {"axes": (1, 0)}, "wanted all axes"),
    "a slice beyond": (
        (2, 3), "slice", {"axis": 2, "start": 0, "end": 1, "step": 1}, "out of range"),
    "groups": (
        (2, 4, 6), "group_norm", {**EXAMPLES["group_norm"][0][1], "groups": 4}, "4 groups"),
    "no pixels": ((2, 0, 3), "group_norm", EXAMPLES["group_norm"][0][1], "wanted"),
    "rows without batch": ((3,), "group_norm", EXAMPLES["group_norm"][0][1], "2 to 4 axes"),
    "concatenation beyond": ((2, 3), "concat", {"axis": 2}, "along axis 2"),
    "widths of other axes": (
        (2, 3), "pad", by(((1, 1),), "circular"),
        "as many axes"),
    "nothing to pad": ((), "pad", by((), "constant"), "without axes"),
    "a reflection of more than there is": (
        (2, 3), "pad", by(((0, 0), (0, 3)), "reflect"), "0 up to 2"),
    "around more than once": (
        (2, 3), "pad", by(((3, 0), (0, 0)), "circular"), "0 up to 2"),
    "cut off more than there is": ((2, 3), "pad", by(((0, 0), (-2, -2)), "constant"), "is left"),
    "copies of nothing": (
        (2, 0), "pad", by(((0, 0), (0, 1)), "replicate"), "0 up to 0"),
    "other features": (
        (2, 4), "linear", {"weight": LinearWeight(i8(3, 5)), "epilogue": EPILOGUE,
                           "x_zero_point": 0}, r"wanted \(\.\.\., 5\)"),
    "no features": ((2, 0), "softmax", {"scale": 0.1, "uniform": False}, "0 < N"),
    "too many features": ((1, 2**19 + 1), "softmax", {"scale": 0.1, "uniform": False}, "0 < N"),
    "too many features of int16": (
        (1, 2**14 + 1), "layer_norm",
        {"multiplier": f32(1)[0], "shift": f32(1)[0], "epsilon": 1e-3, **TO}, "up to 16384"),
    "tables of other channels": (
        (2, 4), "table", {"values": np.zeros((3, 256), np.uint8)}, r"values \(3, 256\); wanted"),
    "factors of other channels": (
        (2, 4), "affine", {"multiplier": f32(1, 2, 3), "shift": f32(1)[0], "x_zero_point": 0,
                           **TO}, r"multiplier \(3,\); wanted"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    shape, op, arguments, message = SIZES[name]
    made = of(op, (shape,), arguments)
    if name.endswith("of int16"):
        first = quantized("q0", "x0", len(shape), "int16")
        made = dataclasses.replace(made, steps=(first, *made.steps[1:]))
    with pytest.raises(ValueError, match=message):
        made.shapes(shape)
    with pytest.raises(ValueError, match=message):
        BoundProgram(made)(np.zeros(shape, np.float32))


def test_operands_that_do_not_fit_are_refused() -> None:
    add, matmul = EXAMPLES["add"][0][1], EXAMPLES["matmul"][0][1]
    concat = {"axis": 1}
    for op, arguments, shapes, message in (
        ("add", add, ((2, 3), (2, 4)), "broadcast"),
        ("matmul", matmul, ((2, 3), (2, 3)), "by"),
        ("matmul", matmul, ((3,), (3,)), "two axes or more"),
        ("matmul", matmul, ((2, 2, 3), (3, 3, 4)), "broadcast"),
        ("matmul", matmul, ((1, 65794), (65794, 1)), "up to K=65793"),
        ("concat", concat, ((2, 3), (3, 3)), "along axis 1"),
        ("concat", concat, ((2, 3), (2, 3, 4)), "along axis 1"),
        ("concat", concat, ((2, 3), (2,)), "along axis 1"),
        ("linear", EXAMPLES["linear"][1][1], ((4, 9), (1, 3)), "add .* wanted"),
        ("conv2d", EXAMPLES["conv2d"][1][1], (IMAGE, (1, 6, 5, 3)), "add .* wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            BoundProgram(of(op, shapes, arguments))(*inputs_of(shapes))


def test_an_output_of_other_axes_is_refused() -> None:
    for axes in ((0,), (0, 0), (1, 2), (-1, 0)):
        made = Program(
            ("x",), (quantized("q", "x", 2), real("y", "q")), (("y", axes),), ((None,) * 2,)
        )
        with pytest.raises(ValueError, match=r"axes .* for a value of shape"):
            BoundProgram(made)(np.zeros((2, 3), np.float32))


def test_inputs_are_checked() -> None:
    run = BoundProgram(program((2, 1), real("y", "q0"), real("z", "q1"), outputs={"y": 2, "z": 1}))
    x, z = np.zeros((2, 3), np.float32), np.zeros(4, np.float32)
    assert [y.shape for y in run(x, z)] == [(2, 3), (4,)]
    for wrong in ((x,), (x, z, z), (z, x), (x, x)):
        with pytest.raises(ValueError, match=r"wanted \(any, any\), \(any\)"):
            run(*wrong)
    for odd in (x.astype(np.float64), x.astype(">f4"), x.tolist(), None):
        with pytest.raises(TypeError, match="wanted a float32 array"):
            run(odd, z)
    apart = np.ndarray(x.shape, x.dtype, bytearray(x.nbytes + 1), 1)
    apart[:] = [[1, 2, 3], [4, 5, 6]]
    assert not apart.flags.aligned and np.array_equal(run(apart, z)[0], run(apart.copy(), z)[0])
    with pytest.raises(TypeError, match="wanted a float32 array"):
        run(apart, None)
    fixed = dataclasses.replace(run.program, extents=((2, None), (4,)))
    with pytest.raises(ValueError, match=r"wanted \(2, any\), \(4\)"):
        BoundProgram(fixed)(x[:1], z)


def test_steps_do_not_change_after_they_were_checked() -> None:
    arguments, inputs, ends = {"axes": (1, 0)}, ["q0"], [("z", (0, 1))]
    made = Step("permute", "y", inputs, arguments)  # type: ignore[arg-type]
    steps = [quantized("q0", "x", 2), made, real("z", "y")]
    whole = Program(["x"], steps, ends, [(None,) * 2])  # type: ignore[arg-type]
    arguments["axes"], inputs[0] = (0, 1, 2), "x"
    steps.pop()
    ends.clear()
    assert made.arguments["axes"] == (1, 0) and made.inputs == ("q0",)
    assert len(whole.steps) == 3 and whole.outputs
    with pytest.raises(TypeError, match="does not support item assignment"):
        made.arguments["axes"] = (0, 1, 2)  # type: ignore[index]
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for again in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), copy.copy(whole)):
        np.testing.assert_array_equal(again.reference(x)[0], whole.reference(x)[0])
        check(again, x)


def test_a_transposed_convolution_of_a_large_stride() -> None:
    for stride in ((2**20, 2**20), (2**13, 1)):
        around = Step("dilate", "d", ("q0",), {**EXAMPLES["dilate"][0][1], "stride": stride})
        step = Step("conv2d", "y", ("d",), conv(2, 3, 2, 2))
        made = program((4,), around, step, real("z", "y"), outputs={"z": 4})
        check(made, np.ones((1, 1 if stride[1] > 1 else 2, 1, 3), np.float32))


def test_a_reshape_of_permuted_axes_that_a_convolution_pads() -> None:
    """Neither is what it makes a view of its input, nor lies it densely in a frame of zeros."""
    for padding in (0, 1):
        made = program(
            (4,),
            Step("permute", "p", ("q0",), {"axes": (0, 2, 1, 3)}),
            Step("reshape", "r", ("p",), {"sizes": (((0,), 1), 3, 4, ((2, 3), 1)), "ones": ()}),
            Step("conv2d", "c", ("r",), conv(2, 10, 3, 3, padding=padding)),
            real("y", "c"),
            outputs={"y": 4},
        )
        check(made, np.random.default_rng(0).normal(size=(2, 2, 12, 5)).astype(np.float32))


def test_a_program_can_be_read() -> None:
    shown = str(
        program(
            (4,),
            Step("conv2d", "c", ("q0",), conv(2, 3, 1, 1)),
            Step("table", "t", ("c",), {"values": np.zeros(256, np.uint8)}),
            real("y", "t"),
            outputs={"y": 4},
        )
    )
    assert shown.splitlines() == [
        "program(x0)",
        "  q0 = quantize(x0, scale=0.1, zero_point=7, axes=(0, 1, 2, 3), dtype=uint8)",
        "  c = conv2d(q0, weight=s8[2, 3, 1, 1], epilogue=u8(zero_point=0, 0..255), "
        "x_zero_point=7)",
        "  t = table(c, values=uint8[256])",
        "  y = dequantize(t, scale=0.1, zero_point=7)",
        "  return y",
    ]


# ------------------------------------------------------------------------------- random programs


class Random:
    """Programs of random operations on values of random shapes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs: dict[str, Shape] = {}
        self.steps: list[Step] = []
        self.shapes: dict[str, Shape] = {}  # of the integer values
        self.outputs: list[tuple[str, Shape]] = []

    def one(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def flag(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    def byte(self) -> int:
        return int(self.one(0, 7, 128, 255))

    def to(self) -> dict[str, Any]:
        qmin = self.one(0, 0, 100)
        return {"zero_point": self.byte(), "qmin": qmin, "qmax": self.one(255, 255, qmin)}

    def to_wide(self) -> dict[str, Any]:
        return {"zero_point": 0, "qmin": self.one(-32768, -9), "qmax": self.one(32767, 300)}

    def factor(self) -> float:
        return float(self.rng.uniform(0.01, 1.5))

    def requant(self, n: int, k: int, adds: bool) -> Requant:
        multiplier = self.rng.uniform(0.2, 1, self.one((), (n,))) / (50 * max(k, 1) ** 0.5)
        bias = self.one(None, self.rng.integers(-500, 500, n).astype(np.int32))
        wide = self.flag(0.3)
        to, times = (self.to_wide(), 200) if wide else (self.to(), 1)
        return Requant(
            np.asarray(times * multiplier, np.float32), to["zero_point"], bias, to["qmin"],
            to["qmax"], self.factor() if adds else None, self.byte(), WIDE if wide else np.uint8,
        )  # fmt: skip

    def weight(self, *shape: int) -> np.ndarray:
        return self.rng.integers(-128, 128, shape).astype(np.int8)

    def vector(self, n: int) -> np.ndarray:
        return np.asarray(self.rng.uniform(-2, 2, self.one((), (n,))), np.float32)

    def conv2d(self, c: int) -> Conv2dWeight:
        kernel = self.one((1, 1), (3, 3), (3, 3), (2, 1), (1, 4))
        groups = self.one(1, c, *(g for g in (2, 3) if c % g == 0)) if c else 1
        n = groups * self.one(1, 1, 2, 5) if groups > 1 else self.one(1, 4, 9, 17)
        dilation = self.one(1, 1, 1, 2)
        if self.flag(0.4):
            geometry = {"padding": "same"}
        else:
            sides = self.rng.integers(0, 3, 4).tolist()
            stride = self.one(1, 1, 2, (1, 3))
            geometry = {"stride": stride, "padding": (tuple(sides[:2]), tuple(sides[2:]))}
        data = self.weight(n, max(c, 0) // groups, *kernel)
        return Conv2dWeight(data, dilation=dilation, groups=groups, **geometry)

    def arguments(self, op: str, x: Shape) -> dict[str, Any]:
        c = x[-1] if x else 0
        axis = int(self.rng.integers(max(len(x), 1)))
        match op:
            case "conv2d":
                weight = self.conv2d(c)
                k = int(np.prod(weight.data.shape[1:]))
                epilogue = self.requant(weight.n, k, self.flag(0.3))
                return {"weight": weight, "epilogue": epilogue, "x_zero_point": self.byte()}
            case "linear":
                n = self.one(1, 4, 16, 33)
                epilogue = self.requant(n, c, self.flag(0.3))
                weight = LinearWeight(self.weight(n, c))
                return {"weight": weight, "epilogue": epilogue, "x_zero_point": self.byte()}
            case "matmul":
                return {"multiplier": self.factor() / 500, "a_zero_point": self.byte(),
                        "transpose_b": self.flag(), "mean": False, **self.to(),
                        "dtype": "uint8"}  # fmt: skip
            case "add":
                wide = self.flag(0.3)
                to, times = (self.to_wide(), 200) if wide else (self.to(), 1)
                return {"a_multiplier": times * self.factor(), "b_multiplier": -self.factor(),
                        "a_zero_point": self.byte(), "b_zero_point": self.byte(),
                        **to, "dtype": "int16" if wide else "uint8"}  # fmt: skip
            case "mul":
                return {"multiplier": self.factor() / 100, "a_zero_point": self.byte(),
                        "b_zero_point": self.byte(), **self.to()}  # fmt: skip
            case "affine":
                return {"multiplier": self.vector(c), "shift": self.vector(c),
                        "x_zero_point": self.byte(), **self.to()}  # fmt: skip
            case "table":
                shape = self.one((256,), (c, 256))
                return {"values": self.rng.integers(0, 256, shape).astype(np.uint8)}
            case "softmax" | "softmax_weights":
                return {"scale": self.factor() / 10, "uniform": self.flag()}
            case "layer_norm":
                return {"multiplier": 30 * self.vector(c), "shift": self.vector(c),
                        "epsilon": 0.01, **self.to()}  # fmt: skip
            case "rms_norm":
                return {"multiplier": 30 * self.vector(c), "epsilon": 0.01,
                        "x_zero_point": self.byte(), **self.to()}  # fmt: skip
            case "group_norm":
                return {"groups": self.one(1, max(c, 1)), "multiplier": 30 * self.vector(c),
                        "shift": self.vector(c), "epsilon": 0.01, **self.to()}  # fmt: skip
            case "global_response_norm":
                return {"multiplier": 3 * self.vector(c), "shift": self.vector(c),
                        "epsilon": 0.01, "residual": self.factor(), "x_zero_point": self.byte(),
                        **self.to()}  # fmt: skip
            case "max_pool2d" | "avg_pool2d":
                kernel, padding = self.one(((2, 2), (0, 0)), ((3, 3), (1, 1)), ((4, 1), (2, 0)))
                pool = {"kernel_size": kernel, "stride": self.one((1, 1), (2, 2), (3, 1)),
                        "padding": padding, "ceil_mode": self.flag()}  # fmt: skip
                if op == "max_pool2d":
                    return {**pool, "dilation": (1, 1)}
                return {**pool, "count_include_pad": self.flag(), "x_zero_point": self.byte(),
                        "divisor_override": self.one(None, 3), "multiplier": self.factor(),
                        **self.to()}  # fmt: skip
            case "adaptive_avg_pool2d":
                return {"output_size": self.one((1, 1), (None, 1), (3, 2)), **self.to(),
                        "multiplier": self.factor(), "x_zero_point": self.byte()}  # fmt: skip
            case "adaptive_max_pool2d":
                return {"output_size": self.one((1, 1), (None, 2))}
            case "upsample_nearest2d" | "upsample_bilinear2d":
                size, scale = self.one(
                    (None, (2.0, 2.0)), (None, (0.7, 1.5)), ((5, 3), None),
                    ((Size(0, 0, 2, more=1), 4), None), ((3, Size(0, 0, 3, -1, 2, before=1)), None),
                )  # fmt: skip
                corners = {"align_corners": self.flag()} if op == "upsample_bilinear2d" else {}
                return {"output_size": size, "scale_factor": scale, **corners}
            case "reshape":
                return self.reshape(x)
            case "permute":
                return {"axes": tuple(map(int, self.rng.permutation(len(x))))}
            case "slice":
                start, end = self.one((0, None), (1, None), (0, 2), (-3, -1), (2, 9))
                return {"axis": axis, "start": start, "end": end, "step": self.one(1, 1, 2)}
            case "concat":
                return {"axis": len(x) - 1 if self.flag(0.7) else axis}
            case "pad":
                low, sizes = self.one((0, None), (-1, None), (0, self.sizes(len(x))))
                widths = [tuple(map(int, w)) for w in self.rng.integers(low, 2, (len(x), 2))]
                for i, size in enumerate(sizes or ()):
                    widths[i] = widths[i] if size is None else self.one((1, 1), (0, 1), (1, 0))
                modes = () if low else NUMPY_MODES
                return {"widths": tuple(widths), "value": self.byte(), "output_size": sizes,
                        "mode": self.one("constant", *modes)}  # fmt: skip
            case "dilate":
                padding = tuple(tuple(map(int, w)) for w in self.rng.integers(0, 3, (2, 2)))
                return {"stride": self.one((2, 2), (1, 3)), "padding": padding,
                        "value": self.byte()}  # fmt: skip
        raise AssertionError(op)

    def sizes(self, rank: int) -> tuple[Any, ...]:
        """Of a value that is padded."""
        return tuple(self.one(None, None, 4, Size(0, 0, 2, more=1)) for _ in range(rank))

    def reshape(self, x: Shape) -> dict[str, Any]:
        sizes: list[Any] = [((i,), 1) for i in range(len(x))]
        i = int(self.rng.integers(max(len(x), 1)))
        if len(x) > 1 and self.flag():  # two axes become one
            i = min(i, len(x) - 2)
            sizes[i : i + 2] = [((i, i + 1), 1)]
        elif x and x[i] % 2 == 0:
            sizes[i : i + 1] = self.one([((i,), 2), 2], [2, ((i,), 2)])
        return {"sizes": tuple(sizes), "ones": ()}

    def partners(self, op: str, arguments: dict[str, Any], x: str) -> Iterator[tuple[str, ...]]:
        """The inputs that the operation may have, x the first."""
        others = [str(name) for name in self.rng.permutation(list(self.shapes))]
        epilogue = arguments.get("epilogue")
        if op == "concat":
            yield from ((x, *others[:n]) for n in (2, 1))
            yield from ((x, other) for other in others)
        elif op in ("matmul", "add", "mul") or getattr(epilogue, "add_multiplier", None):
            yield from ((x, other) for other in others)
        else:
            yield (x,)

    def append(self, op: str) -> None:
        names = list(self.shapes)
        x = names[-1] if self.flag(0.6) else self.one(*names)
        if op == "recurrent":
            self.recurrent(self.one(*(n for n in names if len(self.shapes[n]) == 3), x))
            return
        arguments = self.arguments(op, self.shapes[x])
        if op == "dilate" and self.flag(0.8) and len(self.shapes[x]) == 4:
            self.transposed(x, arguments)
            return
        for inputs in self.partners(op, arguments, x):
            if self.take(op, inputs, arguments):
                return

    def transposed(self, x: str, arguments: dict[str, Any]) -> None:
        """Pixels apart and the convolution that reads them."""
        if self.take("dilate", (x,), arguments):
            weight = Conv2dWeight(self.weight(5, self.shapes[x][3], 3, 2))
            epilogue = self.requant(5, 6 * weight.c, False)
            given = {"weight": weight, "epilogue": epilogue, "x_zero_point": arguments["value"]}
            self.take("conv2d", (list(self.shapes)[-1],), given)

    def recurrent(self, x: str) -> None:
        """The products with all inputs, in int16, and the layer that reads them."""
        cell, features, (*_, c) = self.one(*GATES), self.one(1, 4, 9, 17), self.shapes[x]
        n = GATES[cell] * features
        gates = Requant(f32(self.factor() * 40 / max(c, 1) ** 0.5)[0], dtype=WIDE)
        arguments = {"weight": LinearWeight(self.weight(n, c)), "epilogue": gates}
        if self.take("linear", (x,), {**arguments, "x_zero_point": self.byte()}):
            scale = self.rng.uniform(1e-4, 1e-2, self.one((), (n,))).astype(np.float32)
            bias = self.one(None, self.rng.normal(size=n).astype(np.float32))
            self.take("recurrent", (list(self.shapes)[-1],), {
                "cell": cell, "weight": LinearWeight(self.weight(n, features)),
                "epilogue": Dequant(scale, f32(1 / 127)[0], bias), "x_scale": 2e-4,
                "multiplier": 127.0, "axis": self.one(0, 1), "reverse": self.flag(), **self.to(),
            })  # fmt: skip

    def take(self, op: str, inputs: tuple[str, ...], arguments: dict[str, Any]) -> bool:
        """Appends the step if its operands fit and its value is small."""
        step = Step(op, f"v{len(self.steps)}", inputs, arguments)
        try:
            shape = self.program(step).shapes(*self.inputs.values())[step.name]
        except ValueError:
            return False
        if np.prod(shape) > 20_000 or len(shape) > 6:
            return False
        self.steps.append(step)
        self.shapes[step.name] = shape
        return True

    def program(self, *more: Step) -> Program:
        extents = tuple((None,) * len(shape) for shape in self.inputs.values())
        return Program(tuple(self.inputs), (*self.steps, *more), tuple(self.outputs), extents)

    def begin(self) -> None:
        for i in range(self.one(1, 1, 2)):
            rank = self.one(2, 3, 4, 4, 4, 5)
            sizes = self.one((1, 4, 6, 3), (2, 5, 7, 8), (3, 8, 6, 33), (0, 4, 5, 4), (2, 3, 1, 64))
            shape = ((2, *sizes) if rank == 5 else sizes)[-rank:]
            axes = tuple(map(int, self.rng.permutation(rank)))
            self.inputs[f"x{i}"] = tuple(shape[a] for a in np.argsort(axes))
            if rank in (2, 4) and self.flag(0.3):
                self.grid(i, shape, axes)
                continue
            arguments = {"scale": 0.05, "zero_point": self.byte(), "axes": axes, "dtype": "uint8"}
            if self.flag(0.2):
                arguments |= {"scale": 0.001, "zero_point": 0, "dtype": "int16"}
            self.steps.append(Step("quantize", f"q{i}", (f"x{i}",), arguments))
            self.shapes[f"q{i}"] = shape
        if self.flag(0.3):
            value = self.rng.integers(0, 256, shape[-1:]).astype(np.uint8)
            self.take("constant", (), {"value": value})

    def grid(self, i: int, shape: Shape, axes: Shape) -> None:
        factor, shift = self.rng.uniform(1, 40, (2, shape[-1])).astype(np.float32)
        sides = self.rng.integers(0, 3, (2, 2)) * (len(shape) == 4)
        padding = tuple(tuple(map(int, pair)) for pair in sides)
        arguments = {"factor": factor, "shift": 3 * shift, "padding": padding, "axes": axes}
        self.steps.append(Step("grid", f"q{i}", (f"x{i}",), arguments))
        self.shapes[f"q{i}"] = self.program().shapes(*self.inputs.values())[f"q{i}"]

    def end(self) -> None:
        names = list(self.shapes)
        for i, name in enumerate(dict.fromkeys([names[-1], self.one(*names), self.one(*names)])):
            shape, out = self.shapes[name], f"y{i}"
            zero_point = self.byte()
            narrow = self.program().dtypes[name] == "uint8"
            if shape and narrow and self.flag(0.3):
                n = self.one(1, 5, 20)
                scale = self.rng.uniform(0.01, 1, n).astype(np.float32)
                epilogue = Dequant(scale, f32(0.1)[0], scale[::-1], self.one(-np.inf, 0.0))
                arguments = {"weight": LinearWeight(self.weight(n, shape[-1])),
                             "epilogue": epilogue, "x_zero_point": zero_point}  # fmt: skip
                self.steps.append(Step("linear", out, (name,), arguments))
            elif len(shape) > 1 and narrow and self.flag(0.3):  # by itself, perhaps of zero points
                mean = self.flag()
                arguments = {"multiplier": 0.01, "a_zero_point": 0 if mean else zero_point,
                             "transpose_b": True, "mean": mean, "zero_point": 0, "qmin": 0,
                             "qmax": 255, "dtype": "float32"}  # fmt: skip
                self.steps.append(Step("matmul", out, (name, name), arguments))
            else:
                arguments = {"scale": 0.3, "zero_point": zero_point}
                self.steps.append(Step("dequantize", out, (name,), arguments))
            self.outputs.append((out, tuple(map(int, self.rng.permutation(len(shape))))))

    def array(self, shape: Shape) -> np.ndarray:
        """Values in memory of any order, direction and distance."""
        order = self.rng.permutation(len(shape))
        held = self.rng.normal(0, 5, [2 * shape[a] for a in order]).astype(np.float32)
        step = self.one(1, 1, 2, -1)
        parts = held[tuple(slice(None, None, step) for _ in shape)]
        parts = parts[tuple(slice(shape[a]) for a in order)].transpose(np.argsort(order))
        return parts if self.flag() else parts.copy()


KINDS = [op for op in OPERATIONS if op not in (*WAYS_IN, "dequantize", "constant")]
FAVOURITES = ["conv2d", "concat", "slice", "reshape", "permute", "linear", "add"]


def random_program(seed: int) -> tuple[Program, list[np.ndarray]]:
    made = Random(seed)
    made.begin()
    for _ in range(int(made.rng.integers(2, 12))):
        made.append(made.one(*KINDS, *FAVOURITES * 3))
    made.end()
    return made.program(), [made.array(shape) for shape in made.inputs.values()]


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_random_programs_give_the_bits_of_the_reference(first: int) -> None:
    for seed in range(first, first + 40):
        made, inputs = random_program(seed)
        wanted, run = made.reference(*inputs), BoundProgram(made)
        for x, y in zip(wanted, run(*inputs), strict=True):
            np.testing.assert_array_equal(y, x, f"seed {seed}: {made}", strict=True)


def test_random_programs_have_all_operations() -> None:
    programs = [random_program(seed)[0] for seed in range(160)]
    assert {step.op for made in programs for step in made.steps} == OPERATIONS.keys()
    wide = {
        (step.op, made.dtypes[name]) for made in programs for step in made.steps
        for name in (step.name, *step.inputs)
    }  # fmt: skip
    assert {op for op, dtype in wide if dtype == "int16"} == {"quantize", *TAKE_WIDE}
