"""NumPy's float operators: each against torch's of its name, dtypes and shapes too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastq import operators
from fastq.graph import FUNCTIONS, OPERATIONS, Node, check_target
from fastq.layout import Ref, Stage
from fastq.nn.model import NAMED
from fastq.sizes import Size

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(3, 4, generator=G), torch.randn(4, generator=G)
POSITIVE = X.abs() + 0.1
CUBE = torch.randn(2, 3, 4, generator=G)
WHOLE = torch.arange(12).reshape(3, 4) - 5
SMALL = WHOLE.to(torch.int32)
FLAGS = WHOLE > 0
ONE = torch.tensor(2.5, dtype=torch.float64)  # no axes: the others' dtype
BYTES = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
PAIRS = [(X, Y), (X, 2), (WHOLE, X), (WHOLE, 3), (X, ONE), (SMALL, WHOLE), (WHOLE, 2.5),
         (BYTES, 7), (WHOLE, BYTES)]  # fmt: skip
COMPARED = [*PAIRS, (WHOLE, 3), (X, X)]
LOGICAL = [(FLAGS, ~FLAGS), (WHOLE, FLAGS)]
REAL = [(POSITIVE,), (WHOLE.abs() + 1,)]
I64, F32 = torch.int64, torch.float32
PLAIN = {"dtype": F32, "layout": torch.strided, "device": torch.device("cpu"), "pin_memory": False}
PLACES = torch.tensor([[2, 0], [1, 1]])
FAR = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.5])
# of activations that have more arguments
MORE: dict[str, list[tuple[Any, ...]]] = {
    "softplus.default": [(X, 2.0, 1.0)],
    "gelu.default": [(X, {"approximate": "tanh"})],
    "elu.default": [(X, 0.5), (X, 0.5, 2.0, 3.0)],
    "celu.default": [(X, 0.5)],
    "leaky_relu.default": [(X, 0.3)],
    "rrelu.default": [(X, 0.1, 0.5), (X, 0.1, 0.5, False)],
    "hardshrink.default": [(X, 0.1)],
    "softshrink.default": [(X, 0.1)],
    "hardtanh.default": [(X, -0.2, 0.3)],
}

# operator -> the arguments of its samples; a dict that is the last one is of arguments by name
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "getitem": [([X, Y], 1)],
    "fastq.embedding.default": [
        (PLACES, torch.arange(12, dtype=torch.int8).reshape(3, 4), POSITIVE[:, 0])],
    "add.Tensor": [*PAIRS, (X, Y, {"alpha": 2}), (WHOLE, SMALL, {"alpha": 3}), (X, FLAGS)],
    "add.Scalar": [(X, 2.5), (WHOLE, 2.5), (WHOLE, 1), (FLAGS, 1)],
    "sub.Tensor": [*PAIRS, (X, Y, {"alpha": 2})],
    "sub.Scalar": [(X, 2.5), (WHOLE, 3, 2)],
    "rsub.Scalar": [(X, 1.0), (WHOLE, 1), (X, 1, 2)],
    "mul.Tensor": [*PAIRS, (FLAGS, X), (FLAGS, FLAGS)],
    "mul.Scalar": [(X, 3), (WHOLE, 0.5)],
    "div.Tensor": [(X, Y), (WHOLE, SMALL), (WHOLE, 2)],
    "div.Scalar": [(X, 3), (WHOLE, 2), (WHOLE, 0)],
    "pow.Tensor_Scalar": [(X, 2), (WHOLE, 2), (POSITIVE, 0.5), (WHOLE, 2.0)],
    "pow.Tensor_Tensor": [(POSITIVE, Y), (WHOLE, WHOLE.abs() % 3)],
    "pow.Scalar": [(2.0, X), (2, WHOLE.abs())],
    "maximum.default": [(X, Y), (WHOLE, X)], "max.other": [(X, Y)],
    "minimum.default": [(X, Y), (WHOLE, X)], "min.other": [(X, Y)],
    **{f"{name}.Tensor": [p for p in COMPARED if isinstance(p[1], Tensor)]
       for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"{name}.Scalar": [p for p in COMPARED if not isinstance(p[1], Tensor)]
       for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"logical_{name}.default": LOGICAL for name in ("and", "or", "xor")},
    "logical_not.default": [(FLAGS,), (WHOLE,), (X,)],
    **{name: [*LOGICAL, (WHOLE, SMALL)] for name in (
        "bitwise_and.Tensor", "__and__.Tensor", "bitwise_or.Tensor", "__or__.Tensor")},
    "bitwise_not.default": [(FLAGS,), (WHOLE,)],
    **{f"{name}.default": [(X,), (WHOLE,)] for name in ("neg", "abs", "sign", "square", "relu")},
    **{f"{name}.default": REAL for name in (
        "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "sigmoid")},
    **{f"{name}.default": REAL for name in (
        "exp2", "expm1", "log2", "log10", "log1p", "tan", "sinh", "cosh", "atan", "asinh", "erf",
        "erfc")},
    **{f"{name}.default": [(POSITIVE / 4,)] for name in ("asin", "acos", "atanh")},
    "acosh.default": [(POSITIVE + 1,)],
    **{f"{name}.default": [(10 * X,)] for name in ("floor", "ceil", "trunc", "round", "frac")},
    "atan2.default": [(X, Y), (X, X.flip(1))],
    **{f"{name}.Scalar": [(X, 0.3), (X, -0.3), (WHOLE, 3)] for name in ("fmod", "remainder")},
    **{f"{name}.Tensor": [(X, Y)] for name in ("fmod", "remainder")},
    "nan_to_num.default": [(FAR,), (FAR, 2.0, 3.0, -3.0), (FAR, None, 1.0)],
    "logit.default": [(POSITIVE / 4,), (X, 0.1)],
    **{f"{name}.default": [(X,), (100 * X,)] for name in (
        "silu", "relu6", "hardsigmoid", "hardswish", "log_sigmoid", "mish", "selu", "softplus",
        "gelu", "elu", "celu", "leaky_relu", "rrelu", "hardshrink", "softshrink", "hardtanh")},
    "threshold.default": [(X, 0.2, 20.0), (X, 0, 1)],
    "clamp.default": [(X, -0.5, 0.5), (X, None, 0.5), (WHOLE, 1), (WHOLE, 0.5),
                      (X, {"min": -0.5})],
    "clamp_min.default": [(X, 0.1), (WHOLE, 1)], "clamp_max.default": [(X, 0.1), (X, {"max": 0})],
    "where.self": [(FLAGS, X, Y), (FLAGS, WHOLE, X)],
    "where.ScalarOther": [(FLAGS, X, 0.0), (FLAGS, WHOLE, 1)],
    "where.ScalarSelf": [(FLAGS, 0.0, X)],
    "where.Scalar": [(FLAGS, 0.0, -torch.inf), (FLAGS, 1, 2)],
    "masked_fill.Scalar": [(X, FLAGS, -torch.inf), (WHOLE, FLAGS, 0), (CUBE, FLAGS, 2)],
    "masked_fill.Tensor": [(X, FLAGS, ONE)],
    "to.dtype": [(X, I64), (FLAGS, F32), (WHOLE, torch.bool)],
    "to.dtype_layout": [(FLAGS, PLAIN)],
    "to.device": [(X, torch.device("cpu"), I64)],
    "_to_copy.default": [(X, {"dtype": I64}), (X,)],
    "type_as.default": [(X, WHOLE)],
    **{f"{name}.default": [(X,)] for name in ("clone", "alias", "detach", "lift_fresh_copy")},
    "contiguous.default": [(X.T,)],
    "dropout.default": [(X, 0.5, False)],
    "arange.default": [(5,), (5, {"dtype": F32}), (2.5,), (5, PLAIN)],
    "arange.start": [(2, 5)], "arange.start_step": [(1, 9, 3), (5, 0, -2)],
    "full.default": [([2, 3], 1.5), ([2], True), ([], 4), ([2, 3], 1, PLAIN)],
    "zeros.default": [([2, 3],), ([2], {"dtype": I64})], "ones.default": [([2, 3],), ([2], PLAIN)],
    "scalar_tensor.default": [(2.5,), (1, {"dtype": F32})],
    "full_like.default": [(X, 2), (WHOLE, 2, {"dtype": F32})],
    "zeros_like.default": [(X,), (WHOLE,), (X, {"dtype": torch.bool})],
    "ones_like.default": [(X,), (X, PLAIN)],
    "new_zeros.default": [(WHOLE, [2, 3])], "new_ones.default": [(X, [2], {"dtype": torch.bool})],
    "unsqueeze.default": [(X, 0), (X, -1), (X, 2)],
    "squeeze.default": [(X[:, None, :1],), (X,)],
    "squeeze.dim": [(X[:, None], 1), (X, 0), (X[None], -3)],
    "squeeze.dims": [(X[None, :, None], [0, 2])],
    "expand.default": [(Y, [2, 3, 4]), (X[:, None], [-1, 5, -1]), (Y, [2, -1])],
    "view.default": [(X, [4, -1]), (X, [12])], "reshape.default": [(CUBE, [2, -1])],
    "_unsafe_view.default": [(CUBE, [6, 4])],
    "flatten.using_ints": [(CUBE,), (CUBE, 1), (CUBE, 0, 1), (CUBE, -2, -1)],
    "permute.default": [(CUBE, [2, 0, 1]), (CUBE, [0, -1, 1])],
    "transpose.int": [(CUBE, 0, -1)], "t.default": [(X,), (Y,)],
    "numpy_T.default": [(X,), (Y,)],
    "repeat.default": [(X, [2, 1]), (X, [2, 1, 3])],
    "flip.default": [(CUBE, [0, 2])],
    "slice.Tensor": [(X, 1, 1, 3), (X, 0, 0, 2**63 - 1), (X, 1, -2), (CUBE, 2, 0, 4, 2), (X,)],
    "select.int": [(CUBE, 1, 2), (CUBE, 0, -1)],
    "split.Tensor": [(X, 3, 1), (CUBE, 1)],
    "split_with_sizes.default": [(X, [1, 3], 1), (X, [2, 1])],
    "chunk.default": [(X, 2, 1), (X, 2), (Y, 3)], "unbind.int": [(CUBE,), (CUBE, 2)],
    "index.Tensor": [(CUBE, [None, PLACES]), (X, [FLAGS]), (CUBE, [PLACES % 2, None, PLACES]),
                     (CUBE, [torch.tensor([-1])])],
    "index_select.default": [(CUBE, 1, torch.tensor([2, 0, 2]))],
    "gather.default": [(X, 1, PLACES), (WHOLE, 0, PLACES)],
    "cat.default": [([X, X], 1), ([X, WHOLE],), ([torch.empty(0), X],)],
    "stack.default": [([X, X], 1), ([X, WHOLE], -1)],
    "tril.default": [(X,), (CUBE, -1), (FLAGS, 1)], "triu.default": [(X, 1), (CUBE,)],
    "constant_pad_nd.default": [(X, [1, 2], 0.5), (CUBE, [0, 1, -1, 2]), (WHOLE, [1, -1])],
    "sum.default": [(X,), (WHOLE,), (FLAGS,), (X, {"dtype": torch.float64})],
    "sum.dim_IntList": [(X, [1]), (CUBE, [0, 2], True), (FLAGS, [-1]), (X, [])],
    "mean.default": [(X,), (WHOLE, {"dtype": F32})],
    "mean.dim": [(CUBE, [1]), (CUBE, [0, -1], True)],
    "amax.default": [(CUBE, [1]), (CUBE,), (X, [0, 1], True), (X, [])],
    "amin.default": [(CUBE, [2], True)],
    "any.default": [(FLAGS,)], "any.dim": [(FLAGS, 1), (FLAGS, 0, True)],
    "any.dims": [(FLAGS, [0, 1])],
    "all.default": [(FLAGS,)], "all.dim": [(FLAGS, 1)], "all.dims": [(FLAGS, [1], True)],
    "argmax.default": [(X, 1), (X,), (X, 0, True)], "argmin.default": [(X, 1)],
    "max.dim": [(X, 1), (X, 0, True)],
    "cumsum.default": [(X, 1), (WHOLE, 0), (FLAGS, 1), (SMALL, 0)],
    "diff.default": [(X,), (WHOLE, 1, 0), (X, 2), (WHOLE, 1, -1, WHOLE[:, :1] - 1)],
    "softmax.int": [(X, -1), (100 * CUBE, 1), (X, 1, torch.float64)],
    "log_softmax.int": [(X, -1), (100 * CUBE, 1)],
    "linalg_vector_norm.default": [(X,), (X, 2, [1], True), (X, 1, [0])],
    "layer_norm.default": [(X, [4]), (CUBE, [3, 4]), (X, [4], Y, Y), (X, [4], None, None, 0.1)],
    "linear.default": [(CUBE, X), (CUBE, X, Y[:3])],
    "matmul.default": [(X, CUBE.mT), (CUBE, Y)], "bmm.default": [(CUBE, CUBE.mT)],
    "embedding.default": [(X, PLACES), (X, PLACES, 1)],
}  # fmt: skip


def named(name: str) -> str:
    return name if name in operators.FUNCTIONS else f"aten.{name}"


def in_numpy(value: Any) -> Any:
    """The same argument, as a saved network has it."""
    for kind, names in NAMED.items():
        for name, known in names.items():
            if type(value) is type(known) and value == known:
                return operators.NAMED[kind][name]
    return value.numpy() if isinstance(value, Tensor) else value


def test_each_operator_has_samples() -> None:
    assert {*map(named, SAMPLES)} == operators.FUNCTIONS.keys()
    for name in operators.FUNCTIONS:
        check_target(name)  # torch has it, by this name


@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_torchs(name: str) -> None:
    target = named(name)
    function = FUNCTIONS.get(target)
    if function is None:
        namespace, packet, overload = target.split(".")
        function = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    for sample in [*SAMPLES[name], *MORE.get(name, ())]:
        args, kwargs = (sample[:-1], sample[-1]) if isinstance(sample[-1], dict) else (sample, {})
        wanted = function(*args, **kwargs)
        given, given_kwargs = pytree.tree_map(in_numpy, (args, kwargs))
        stage = Stage("aten", (), ("y",), {"target": target, "args": given, "kwargs": given_kwargs})
        found = operators.evaluate(stage, [], {}, ())
        ones, twos = pytree.tree_leaves(wanted), pytree.tree_leaves(found)
        assert len(ones) == len(twos)
        for x, y in zip(ones, twos, strict=True):
            assert isinstance(y, np.ndarray), sample
            assert (str(x.dtype), tuple(x.shape)) == (f"torch.{y.dtype}", y.shape), sample
            torch.testing.assert_close(torch.from_numpy(y.copy()), x, equal_nan=True)


@pytest.mark.parametrize(
    ("op", "attrs", "inputs", "tensors"),
    [
        ("softmax", {"dim": 1, "uniform": False}, (CUBE,), {}),
        ("softmax", {"dim": -1, "uniform": True}, (X, WHOLE % 3), {}),
        ("softmax", {"dim": 1, "uniform": True}, (X, FLAGS), {}),
        ("softmax", {"dim": 1, "uniform": False}, (X, FLAGS), {}),
        *(
            ("pad", {"pad": (1, 2, 0, 1), "mode": mode}, (CUBE[None],), {})
            for mode in ("constant", "reflect", "replicate", "circular")
        ),
        ("pad", {"pad": (-1, 2), "mode": "constant", "value": -3.0}, (CUBE,), {}),
        (
            "pad",
            {"pad": (1, 1, 0, 1), "mode": "constant", "size": {"size": (5, 9)}},
            (CUBE[None],),
            {},
        ),
        (
            "pad",
            {"pad": (1, 1, 0, 1), "mode": "constant", "size": {"size": (2, None)}},
            (CUBE[None],),
            {},
        ),
        ("prelu", {}, (X,), {"weight": Y}),
        ("prelu", {}, (CUBE,), {"weight": Y[:3]}),
        ("prelu", {}, (CUBE,), {"weight": Y[:1]}),
    ],
)
def test_an_operation_of_a_graph_is_the_graphs(
    op: str, attrs: dict[str, Any], inputs: tuple[Tensor, ...], tensors: dict[str, Tensor]
) -> None:
    wanted = OPERATIONS[op](Node("y", op, attrs=attrs, tensors=tensors), *inputs)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    stage = Stage(op, tuple("abc"[: len(inputs)]), ("y",), attrs)
    found = operators.evaluate(stage, [x.numpy() for x in inputs], arrays, ())
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), wanted)


def test_places_that_are_not_there_are_refused() -> None:
    table, beyond = X.numpy(), np.array([0, 3])
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("embedding.default", (table, beyond)), ("embedding.default", (table, np.array([-1]))),
        ("index_select.default", (table, 0, beyond)), ("index.Tensor", (table, [beyond])),
        ("gather.default", (table, 0, np.array([[3]]))),
        ("gather.default", (table, 0, np.array([[-1]]))),
    ]  # fmt: skip
    for name, args in calls:
        with pytest.raises(IndexError, match="places from"):
            operators.FUNCTIONS[f"aten.{name}"](*args)
    with pytest.raises(ValueError, match="ord=inf"):
        operators.FUNCTIONS["aten.linalg_vector_norm.default"](table, np.inf)
    with pytest.raises(TypeError, match="wanted integers"):
        operators.FUNCTIONS["aten.embedding.default"](table, table)


def test_inputs_tensors_and_sizes_are_filled_in() -> None:
    args = (Ref(1), [Size(1, 0, 2), -1])
    stage = Stage("aten", ("a", "b"), ("y",), {"target": "aten.view.default", "args": args,
                                              "kwargs": {}})  # fmt: skip
    x = np.arange(12)
    assert operators.evaluate(stage, [None, x], {}, [(9,), (3,)]).shape == (6, 2)
    stage = Stage("aten", ("a",), ("y",), {"target": "aten.add.Tensor", "kwargs": {"alpha": 2},
                                          "args": (Ref(0), "%other")})  # fmt: skip
    assert operators.evaluate(stage, [x], {"other": x}, ()).tolist() == (3 * x).tolist()


def test_what_is_not_here_is_refused() -> None:
    stage = Stage("aten", ("a",), ("y",), {"target": "aten.sort.default"}, why="no integer form")
    with pytest.raises(ValueError, match=r"y takes aten.sort.default.*torch's \(no integer form\)"):
        operators.check_operator(stage)
    with pytest.raises(ValueError, match="y takes conv3d"):
        operators.check_operator(Stage("conv3d", ("a",), ("y",), {}))
    calls = [("aten.erfinv.default", (Ref(0),), {})]
    with pytest.raises(ValueError, match=r"y takes aten\.erfinv"):
        operators.check_operator(Stage("pointwise", ("a",), ("y",), {"calls": calls}))
