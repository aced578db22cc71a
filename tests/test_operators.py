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
IMAGE = torch.randn(2, 3, 5, 6, generator=G)
GRID = 1.3 * torch.randn(2, 4, 3, 2, generator=G)
TIES = torch.tensor([[2.0, 1.0, 2.0, torch.nan, 1.0], [0.0, -1.0, torch.inf, 0.0, 0.0]])
FIRSTS, ENDS = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 3, 3, 6])
BAGGED = torch.tensor([2, 0, 1, 1, 2, 0])
SHARES = torch.rand(6, generator=G)
COMPLEX = torch.complex(X, X.flip(1))
FAR = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.5])
TIED = torch.tensor([[3, 1, 3, 1, 2], [2, 2, 0, 0, 0]])
LINE, VOLUME = IMAGE[:, :, 0], torch.randn(2, 4, 4, 5, 6, generator=G)
CHANNELS = torch.randn(2, 6, 6, 5, generator=G)
EMPTY = torch.empty(0, 3, 5, 6)
MATRICES = torch.randn(2, 2, 3, generator=G)
# by the number of axes that windows move along
WINDOWED = {1: LINE, 2: IMAGE, 3: VOLUME}
HOLES = {  # equal values, and NaN
    n: [torch.where(x > 1, torch.nan, x.round()), torch.full_like(x, -torch.inf)]
    for n, x in WINDOWED.items()
}
FILTERS = {n: torch.randn(4, x.shape[1], *(3, 2, 3)[:n], generator=G) for n, x in WINDOWED.items()}
BACK = {n: torch.randn(x.shape[1], 4, *(3, 2, 3)[:n], generator=G) for n, x in WINDOWED.items()}
FOUR = torch.randn(4, generator=G)
NUMBERS = {n: {"stride": [2, 1, 3][:n], "padding": [1, 0, 2][:n], "dilation": [1, 2, 1][:n]}
           for n in WINDOWED}  # fmt: skip
RESIZED = {n: [([9, 3, 7][:n], None), (None, [1.7, 0.6, 2.3][:n])] for n in WINDOWED}
HALF = {1: [2], 2: [2, 3], 3: [2, 2, 3]}  # of the lines, images and volumes
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
    "subtract.Tensor": [(X, Y)], "multiply.Tensor": [(X, WHOLE)],
    "true_divide.Tensor": [(WHOLE, SMALL)],
    **{f"div.{name}_mode": [
        (*pair, {"rounding_mode": mode})
        for pair in given for mode in (None, "floor", "trunc")]
       for name, given in {
           "Tensor": [(10 * X, Y), (WHOLE, SMALL.abs() + 2), (WHOLE, -(SMALL.abs() + 2)),
                      (WHOLE, X), (X, 0 * Y)],
           "Scalar": [(10 * X, 0.3), (WHOLE, 3), (WHOLE, -3), (X, 0), (BYTES, 3)]}.items()},
    "floor_divide.default": [(10 * X, Y), (WHOLE, SMALL.abs() + 2), (WHOLE, X), (X, 0.3)],
    "floor_divide.Scalar": [(10 * X, -3), (WHOLE, 3), (WHOLE, 0.7), (SMALL, -2)],
    "sub.Scalar": [(X, 2.5), (WHOLE, 3, 2)],
    "rsub.Tensor": [(X, Y), (WHOLE, X, {"alpha": 2})],
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
        "bitwise_and.Tensor", "__and__.Tensor", "bitwise_or.Tensor", "__or__.Tensor",
        "bitwise_xor.Tensor", "__xor__.Tensor")},
    **{f"{name}.default": [(FAR,), (WHOLE,)] for name in ("isnan", "isinf", "isfinite")},
    **{f"{name}.default": [(X, Y, POSITIVE), (X, Y, POSITIVE, {"value": 0.3})]
       for name in ("addcmul", "addcdiv")},
    "lerp.Scalar": [(X, Y, 0.3), (X, Y, 0.8)], "lerp.Tensor": [(X, Y, POSITIVE)],
    "logaddexp.default": [(X, Y), (100 * X, X)], "hypot.default": [(X, Y)],
    "round.decimals": [(X, {"decimals": 1}), (100 * X, {"decimals": -1})],
    "bitwise_not.default": [(FLAGS,), (WHOLE,)],
    **{f"{name}.default": [(X,), (WHOLE,)] for name in (
        "neg", "abs", "absolute", "sign", "square", "relu")},
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
    "clip.default": [(X, -0.5, 0.5), (X, {"max": 0.5})],
    **{f"{name}.Tensor": [(X, Y, Y + 1), (X, None, Y), (X, {"min": Y})] for name in (
        "clamp", "clip")},
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
    "linspace.default": [(-1.0, 1, 7), (0, 10, 4), (3, 3, 1), (1, 0, 5, {"dtype": torch.float64}),
                         (-5, 5, 4, {"dtype": I64}), (0, 1, 5, PLAIN)],
    "linspace.Tensor_Tensor": [(ONE, 2 * ONE, 5)],
    "eye.default": [(3,), (2, {"dtype": I64}), (2, PLAIN)], "eye.m": [(2, 4), (4, 2)],
    "meshgrid.default": [([X[0], Y[:2]],), ([Y],)],
    "meshgrid.indexing": [([Y, Y[:3], Y[:2]], {"indexing": way}) for way in ("ij", "xy")],
    "new_full.default": [(WHOLE, [2, 3], 7), (X, [2], 1, {"dtype": torch.bool})],
    "fill.Scalar": [(X, 2), (WHOLE, 3)],
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
    "broadcast_to.default": [(Y, [2, 3, 4])],
    "expand_as.default": [(Y, CUBE), (X[:, :1], X), (ONE, X)],
    "broadcast_tensors.default": [([X[:, :1], Y, WHOLE[None]],)],
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
    "unfold.default": [(CUBE, 2, 2, 1), (CUBE, -2, 2, 2), (X, 0, 3, 1)],
    "diagonal.default": [(X,), (CUBE, 1, 0, 2), (CUBE, -1, -1, 1)],
    "diag.default": [(X,), (X, -1), (Y, 1)],
    "index_put.default": [(CUBE, [None, PLACES[0]], torch.ones(2, 4)), (X, [FLAGS], ONE.float()),
                          (X, [PLACES % 3, PLACES % 2], PLACES.float(), True),
                          (X, [torch.tensor([-1, 2])], Y, True)],
    "index_add.default": [(X, 0, PLACES[1], X[:2]), (CUBE, -1, PLACES[0], CUBE[..., :2]),
                          (WHOLE, 1, PLACES[1], WHOLE[:, :2], {"alpha": 3})],
    "take_along_dim.default": [(X[:2], PLACES[:, :1], 1), (X, PLACES[:1], 1), (X, PLACES),
                               (X, X.argsort(0), 0)],
    "scatter.value": [(X, 1, PLACES, 7.5), (X, -2, PLACES, 1), (WHOLE, 0, PLACES, 3)],
    "scatter.src": [(X, 1, PLACES[:, :1], CUBE[0]), (CUBE, -1, PLACES[None], -CUBE)],
    "scatter_add.default": [(X, 1, PLACES, CUBE[0]), (X, -2, PLACES, X), (WHOLE, 1, PLACES, WHOLE)],
    "scatter.reduce": [(X, 1, PLACES, CUBE[0], {"reduce": how}) for how in ("add", "multiply")],
    "scatter.value_reduce": [(WHOLE, 0, PLACES, 3, {"reduce": how}) for how in ("add", "multiply")],
    "scatter_reduce.two": [
        (x, dim, PLACES, source, how, {"include_self": own})
        for x, dim, source in ((X, 1, CUBE[0]), (X, -2, TIES[:, :4]), (WHOLE, 1, WHOLE - 3))
        for how in ("sum", "prod", "mean", "amax", "amin") for own in (True, False)],
    "index_reduce.default": [
        (x, dim, PLACES.flatten(), source, how, {"include_self": own})
        for x, dim, source in ((X, 0, X[[0, 1, 2, 0]]), (CUBE, -2, CUBE[:, [0, 0, 2, 1]]),
                               (WHOLE, 1, WHOLE - 3))
        for how in ("prod", "mean", "amax", "amin") for own in (True, False)],
    "max_unpool2d.default": [
        (*torch.ops.aten.max_pool2d_with_indices(x, [2, 2], [1, 2]), [5, 6])
        for x in (IMAGE, IMAGE[0])],
    "max_unpool3d.default": [
        (*torch.ops.aten.max_pool3d_with_indices(VOLUME, [2] * 3), [4, 6, 6], [2] * 3, [0] * 3)],
    "one_hot.default": [(PLACES,), (PLACES, 5)],
    "bucketize.Tensor": [(X, torch.tensor([-0.5, 0.0, 1.0])),
                         *((WHOLE, torch.tensor([-3, 0, 4]), {"right": right, "out_int32": right})
                           for right in (False, True))],
    "bucketize.Scalar": [(0.1, torch.tensor([0.1, 0.2]), {"right": True}),
                         (2, TIED[0].sort()[0]), (2.5, TIED[0].sort()[0], {"out_int32": True})],
    "searchsorted.Tensor": [
        (X.sort()[0], TIES[[0, 1, 1]]), (Y.sort()[0], CUBE, {"right": True}),
        (Y.sort()[0], TIES, {"side": "left", "out_int32": True}),
        (X, X, {"sorter": X.argsort(), "side": "right"}), (TIED.sort()[0], WHOLE[:2]),
        (X[:0], X[:0]), (Y.sort()[0], X[0, 0])],
    "searchsorted.Scalar": [(torch.tensor([0.1, 0.2]), 0.1), (TIED[0].sort()[0], 2.5)],
    "index_select.default": [(CUBE, 1, torch.tensor([2, 0, 2]))],
    "gather.default": [(X, 1, PLACES), (WHOLE, 0, PLACES)],
    "cat.default": [([X, X], 1), ([X, WHOLE],), ([torch.empty(0), X],)],
    "stack.default": [([X, X], 1), ([X, WHOLE], -1)],
    "hstack.default": [([X, WHOLE],), ([Y, Y],)], "vstack.default": [([X, Y],)],
    "tril.default": [(X,), (CUBE, -1), (FLAGS, 1)], "triu.default": [(X, 1), (CUBE,)],
    "constant_pad_nd.default": [(X, [1, 2], 0.5), (CUBE, [0, 1, -1, 2]), (WHOLE, [1, -1])],
    "sum.default": [(X,), (WHOLE,), (FLAGS,), (X, {"dtype": torch.float64})],
    "sum.dim_IntList": [(X, [1]), (CUBE, [0, 2], True), (FLAGS, [-1]), (X, [])],
    "mean.default": [(X,), (WHOLE, {"dtype": F32})],
    "mean.dim": [(CUBE, [1]), (CUBE, [0, -1], True)],
    "prod.default": [(X,), (SMALL[:1, :4],), (X, {"dtype": torch.float64})],
    "prod.dim_int": [(X, 1), (CUBE, -2, True), (SMALL, 0), (FLAGS, 1)],
    **{f"{name}.default": [(X,), (CUBE, False), (CUBE[:1, :1, :1],), (CUBE, True)]
       for name in ("var", "std", "var_mean", "std_mean")},
    **{f"{name}.dim": [(X, [1]), (CUBE, [0, -1], False), (CUBE, [1], True, True),
                       (X, [-1], False, True), (X[:1], [0]), (X, None),
                       (CUBE, [2], {"unbiased": False, "keepdim": True})]
       for name in ("var", "std", "var_mean", "std_mean")},
    **{f"{name}.correction": [(X,), (X, [1]), (CUBE, [0, 2], {"correction": 0, "keepdim": True}),
                              (X, {"dim": [-1], "correction": 2}), (X[:1], [0], {"correction": 5})]
       for name in ("var", "std", "var_mean", "std_mean")},
    "count_nonzero.default": [(FLAGS,), (WHOLE, 1), (WHOLE, -2)],
    "count_nonzero.dim_IntList": [(FLAGS, [0, 1]), (WHOLE, [-1])],
    "max.default": [(X,), (WHOLE,)], "min.default": [(X,), (WHOLE,)],
    "min.dim": [(X, 1), (X, -2, True)],
    "sort.default": [(X,), (X, 0, True), (WHOLE, -1, True), (BYTES, -2, True)],
    "sort.stable": [(TIES, {"stable": True, "dim": dim, "descending": down})
                    for dim in (-1, 0) for down in (False, True)],
    "argsort.default": [(X,), (X, 0, True), (WHOLE, -1, True)],
    "argsort.stable": [(TIES, {"stable": True, "descending": down}) for down in (False, True)],
    "topk.default": [(X, 2), (X, 2, 0), (X, 3, -1, False), (WHOLE, 2, -2, False), (CUBE, 4),
                     (X, 1, 1, True, False), (X, 1, {"largest": False, "sorted": False}),
                     (TIES[:, 2:], 2)],
    "median.default": [(X,), (Y,), (WHOLE,), (TIES,), (TIED,), (X[:0],), (ONE,)],
    "median.dim": [(X, 1), (CUBE, -2, True), (TIES, 1), (TIES, 0, True), (X[:0], 1), (WHOLE, 0)],
    "nanmedian.default": [(X,), (TIES,), (FAR[:1],), (WHOLE,)],
    "nanmedian.dim": [(X, 1), (CUBE, 0, True), (TIES[:1, 1:], -1), (TIES[:, 3:4], 0),
                      (FAR[:1], 0)],
    "kthvalue.default": [(X, 2), (CUBE, 1, 0, True), (TIES[:, 1:4], 3), (WHOLE, 3, 0), (X[:0], 2)],
    "mode.default": [(TIED,), (TIED, 0, True), (TIED.float(), 1), (X,), (FLAGS, 0), (X[:0],)],
    **{f"{name}.default": [(X, 1), (TIES, -1), (TIES.flip(1), 1), (TIED, 1), (FLAGS, 0), (X[:0], 1)]
       for name in ("cummax", "cummin")},
    "cumprod.default": [(X, 1), (WHOLE, -2), (FLAGS, 1)],
    "logsumexp.default": [(X, [1]), (100 * CUBE, [0, -1], True), (FAR[1:], [0]),
                          (torch.full((2, 3), -torch.inf), [1])],
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
    "linalg_vector_norm.default": [
        (X,), (X, 2, [1], True), (X, 1, [0]),
        *((X, ord, [-1]) for ord in (0, 3, -1, torch.inf, -torch.inf))],
    "cosine_similarity.default": [(X, Y), (CUBE, -2 * CUBE, -1), (CUBE, X, 0), (X, 0 * X, 1, 0.1),
                                  (X / 100, Y / 100, 1, 0.1)],
    "pairwise_distance.default": [(X, Y), (X, -X, 1.0, 0.1, True), (X, X)],
    "cdist.default": [(X, CUBE[0]), (CUBE, -CUBE[:, :2]), (X, -X, 1.0), (X, X + 1, torch.inf)],
    "rms_norm.default": [(X, [4]), (CUBE, [3, 4], X, 0.1)],
    "group_norm.default": [(IMAGE, 3), (EMPTY, 3), (CUBE, 1, Y[:3], Y[1:]),
                           (IMAGE, 1, None, None, 0.1)],
    "upsample_bicubic2d.vec": [(IMAGE, size, corners, None)
                               for size in ([10, 13], [3, 4], [1, 6]) for corners in (True, False)]
                              + [(IMAGE, None, corners, [1.7, 2.3]) for corners in (True, False)],
    "upsample_bicubic2d.default": [(IMAGE, [8, 9], False), (IMAGE, [8, 13], False, 1.7, 2.3)],
    "grid_sampler.default": [(IMAGE, GRID, kind, edges, corners) for kind in (0, 1, 2)
                             for edges in (0, 1, 2) for corners in (True, False)],
    **{f"upsample_{kind}.vec": [(WINDOWED[n], size, corners, factors)
                                for size, factors in RESIZED[n] for corners in (True, False)]
                               + [(WINDOWED[n], None, False, [1.1] * n)]
       for n, kind in ((1, "linear1d"), (2, "bilinear2d"), (3, "trilinear3d"))},
    **{f"upsample_{kind}.default": [(WINDOWED[n], HALF[n], True),
                                    (WINDOWED[n], HALF[n], False, *[0.5] * n)]
       for n, kind in ((1, "linear1d"), (2, "bilinear2d"), (3, "trilinear3d"))},
    **{f"{kind}{n}d.vec": [(WINDOWED[n], *given) for given in (*RESIZED[n], (None, [1.1] * n))]
       for n in WINDOWED for kind in ("upsample_nearest", "_upsample_nearest_exact")},
    **{f"{kind}{n}d.default": [(WINDOWED[n], HALF[n]), (WINDOWED[n], HALF[n], *[0.5] * n)]
       for n in WINDOWED for kind in ("upsample_nearest", "_upsample_nearest_exact")},
    **{f"_upsample_{kind}2d_aa.vec": [
        *((image, size, corners, None) for image in (IMAGE, EMPTY)
          for size in ([2, 3], [10, 2], [1, 4], [7, 9]) for corners in (True, False)),
        (IMAGE, None, False, [0.4, 0.7]), (IMAGE, None, False, [0.3, 1.1]),
        (torch.where(IMAGE > 2, torch.nan, IMAGE), [3, 2], False, None)]
       for kind in ("bilinear", "bicubic")},
    **{f"_upsample_{kind}2d_aa.default": [(IMAGE, [2, 4], False), (IMAGE, [2, 3], False, 0.5, 0.5)]
       for kind in ("bilinear", "bicubic")},
    "affine_grid_generator.default": [
        *((MATRICES, [2, 3, *size], corners) for size in ([3, 4], [1, 5])
          for corners in (True, False)),
        (VOLUME[:, 0, :3, :4, 0], [2, 1, 2, 1, 3], False)],
    "batch_norm.default": [
        (IMAGE, Y[:3], Y[1:], X[0, :3], POSITIVE[0, :3], False, 0.1, 0.1, False),
        (X, None, None, Y, POSITIVE[0], False, 0.1, 1e-5, False)],
    "instance_norm.default": [
        (IMAGE, None, None, None, None, True, 0.1, 1e-5, False),
        (LINE, Y[:3], Y[1:], None, None, True, 0.1, 0.1, False),
        (IMAGE, Y[:3], Y[1:], X[0, :3], POSITIVE[0, :3], False, 0.1, 0.1, False)],
    **{f"conv{n}d.default": [
        (x, FILTERS[n]), (x[0], FILTERS[n], FOUR), (x, FILTERS[n], FOUR, NUMBERS[n]),
        (x[:0], FILTERS[n])] for n, x in WINDOWED.items()},
    **{f"conv{n}d.padding": [
        (x, FILTERS[n], None, {"padding": "same", "dilation": [2, 1, 1][:n]}),
        (x, FILTERS[n], FOUR, [2] * n, "valid")] for n, x in WINDOWED.items()},
    **{f"conv_transpose{n}d.{'default' if n == 1 else 'input'}": [
        (x, BACK[n]), (x[0], BACK[n], FOUR), (x[:0], BACK[n]),
        (x, BACK[n], FOUR, {**NUMBERS[n], "output_padding": [1, 0, 2][:n]})]
       for n, x in WINDOWED.items()},
    "convolution.default": [
        (CHANNELS, CHANNELS[:2, :3, :3, :2], None, [1, 1], [1, 0], [1, 1], False, [0, 0], 2),
        (CHANNELS, CHANNELS[0, :, None, :3, :3], Y[[0, 1, 2, 3, 0, 1]], [2, 1], [0, 1], [1, 2],
         False, [0, 0], 6),
        (CHANNELS, CHANNELS[0, :, :4, :3, None], X.flatten(), [2, 1], [1, 0], [1, 1], True, [1, 0],
         3)],
    **{f"max_pool{n}d{also}.default": [
        (x, [2]), (x[0], [2] * n, [1] * n, [1] * n), (x[:0], [2] * n),
        (x, [2, 3, 1][:n], [3, 2, 2][:n], [1, 1, 0][:n], [1] * n, True),
        (x, [2] * n, [2] * n, [1] * n, [2] * n),
        *((holes, [3] * n, [2] * n, [1] * n) for holes in HOLES[n])]
       for n, x in WINDOWED.items() for also in ("", "_with_indices")},
    **{f"avg_pool{n}d.default": [
        (x, [2]), (x[0], [2] * n, [1] * n, [1] * n, False, False), (x[:0], [2] * n),
        *((x, [2, 3, 1][:n], [3, 2, 2][:n], [1, 1, 0][:n], True, counts)
          for counts in (True, False)),
        ((100 * x).to(I64), [3] * n, [1] * n, [0] * n),
        *[(x, [2] * n, [2] * n, [1] * n, False, False, 3)] * (n > 1)]
       for n, x in WINDOWED.items()},
    **{f"adaptive_{kind}_pool{n}d.default": [
        (x, HALF[n]), (x[0], [3, 4, 9][:n]), (x[:0], HALF[n]),
        *((holes, HALF[n]) for holes in HOLES[n])]
       for n, x in WINDOWED.items() for kind in ("avg", "max")},
    "im2col.default": [
        (IMAGE, [2, 3], [1, 1], [0, 0], [1, 1]), (IMAGE[0], [3, 2], [1, 2], [1, 0], [2, 1]),
        (IMAGE[:0], [2, 2], [1, 1], [1, 1], [2, 2])],
    "col2im.default": [
        (CHANNELS.flatten(2), [5, 7], [2, 3], [1, 1], [1, 0], [1, 1]),
        (CHANNELS[0].flatten(1), [12, 11], [3, 2], [1, 2], [1, 0], [2, 2])],
    "bilinear.default": [(X, CUBE[0, :, :2], torch.arange(40.0).reshape(5, 4, 2)),
                         (CUBE, CUBE, CUBE[0, :, :, None] * Y, Y[:3])],
    "einsum.default": [("bi,bj->bij", [X, CUBE[0]]), ("...ij, jk", [CUBE, X.T]),
                       ("ii->i", [X[:, :3]]), ("bij,bkj,j->bik", [CUBE, CUBE, Y])],
    "mm.default": [(X, X.T)], "mv.default": [(X, Y)], "dot.default": [(Y, X[0])],
    "outer.default": [(Y, X[:, 0])],
    "addmm.default": [(Y[:3], X, X.T), (X @ X.T, X, X.T, {"beta": 0.5, "alpha": 2}),
                      (FAR[0], X, X.T, {"beta": 0})],
    "baddbmm.default": [(X[:, :3], CUBE, CUBE.mT), (X[:, :3], CUBE, CUBE.mT, {"alpha": 0.1})],
    "polar.default": [(POSITIVE, X)], "view_as_real.default": [(COMPLEX,)],
    "view_as_complex.default": [(CUBE[..., :2],)],
    "real.default": [(COMPLEX,)], "imag.default": [(COMPLEX,)],
    **{f"fft_{name}.default": [(value,), (value, size, dim), (value, {"norm": "ortho"})]
       for value, names in {
           X: ("fft", "rfft", "fft2", "rfft2"),
           COMPLEX: ("ifft", "irfft", "ifft2", "irfft2")}.items()
       for name in names
       for size, dim in [((2, 5), (-1, 0)) if name.endswith("2") else (3, 0)]},
    "layer_norm.default": [(X, [4]), (CUBE, [3, 4]), (X, [4], Y, Y), (X, [4], None, None, 0.1)],
    "linear.default": [(CUBE, X), (CUBE, X, Y[:3])],
    "matmul.default": [(X, CUBE.mT), (CUBE, Y)], "bmm.default": [(CUBE, CUBE.mT)],
    "embedding.default": [(X, PLACES), (X, PLACES, 1)],
    "embedding_bag.default": [
        *((X, BAGGED, FIRSTS, False, mode) for mode in (0, 1, 2)),
        (X, BAGGED, FIRSTS), (X, BAGGED, FIRSTS, False, 0, False, SHARES),
        (X, BAGGED, ENDS, False, 1, False, None, True)],
    "embedding_bag.padding_idx": [
        *((X, BAGGED, FIRSTS, False, mode, False, None, False, 0) for mode in (0, 1, 2)),
        (X, BAGGED, FIRSTS, False, 0, False, SHARES, False, 1),
        (X, BAGGED, FIRSTS, False, 0, False, SHARES, False, None)],
    "fastq.embedding_bag.default": [
        (BAGGED, torch.arange(12, dtype=torch.int8).reshape(3, 4), POSITIVE[:, 0],
         ENDS if mode == 1 else FIRSTS, mode, None if mode else SHARES, mode == 1, padding)
        for mode in (0, 1, 2) for padding in (None, 2)],
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
    names = [name for room in operators.ROOMS for key in room.OPERATORS for name in key.split()]
    assert len(names) == len({*names})  # in one room, once


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
        wanted = wanted[:1] if "embedding_bag" in name else wanted  # the rest is its gradient's
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
        ("rms_norm", {"shape": (4,), "eps": 0.1}, (CUBE,), {}),
        ("rms_norm", {"shape": (4,), "eps": None}, (CUBE,), {"weight": Y[None]}),
        ("group_norm", {"groups": 1, "eps": 0.1}, (CUBE,), {"weight": Y[:3], "bias": Y[1:]}),
        ("group_norm", {"groups": 3, "eps": 1e-5}, (IMAGE,), {}),
        ("affine", {}, (IMAGE,), {"factor": Y[:3].double(), "shift": Y[1:]}),
        *(
            (
                f"upsample_{kind}2d",
                {"size": size, **({"align_corners": corners} if kind == "bilinear" else {})},
                (IMAGE,),
                {},
            )
            for size in (
                {"size": (9, 4)},
                {"size": (3, 13)},
                {"size": (1, 6)},
                {"scale_factor": (2.0, 3.0)},
                {"scale_factor": (1.7, 0.6)},
                {"scale_factor": (1.1, 1.1)},
            )
            for kind, corners in (("nearest", None), ("bilinear", False), ("bilinear", True))
        ),
        ("prelu", {}, (CUBE,), {"weight": Y[:3]}),
        ("prelu", {}, (CUBE,), {"weight": Y[:1]}),
        *(
            (
                f"conv{n}d",
                {**NUMBERS[n], "padding": ((1, 2), (0, 0), (0, 1))[:n], "groups": 1},
                (WINDOWED[n],),
                {"weight": FILTERS[n], **bias},
            )
            for n in (2, 3)
            for bias in ({}, {"bias": FOUR})
        ),
        *(
            (
                f"conv_transpose{n}d",
                {**NUMBERS[n], "output_padding": (1, 0, 2)[:n], "groups": 1},
                (WINDOWED[n],),
                {"weight": BACK[n], **bias},
            )
            for n in (2, 3)
            for bias in ({}, {"bias": FOUR})
        ),
        *(
            (f"{kind}_pool2d", {"pool": {**pool, **more}}, (IMAGE,), {})
            for pool in (
                {"kernel_size": (2, 3)},
                {"kernel_size": 3, "stride": (2, 1), "padding": (1, 0), "ceil_mode": True},
            )
            for kind, more in (("max", {"dilation": (1, 1)}), ("avg", {"count_include_pad": False}))
        ),
        *(
            (f"adaptive_{kind}_pool2d", {"output_size": size}, (IMAGE,), {})
            for kind in ("avg", "max")
            for size in ((2, 4), (None, 1), 3)
        ),
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
        ("scatter.value", (table, 0, np.array([[-1]]), 1.0)),
        ("scatter_add.default", (table, 0, np.array([[3]]), table)),
        ("take_along_dim.default", (table, np.array([[-1]]), 0)),
        ("index_put.default", (table, [beyond], table[:2])),
        ("index_add.default", (table, 0, np.array([-1, 0]), table[:2])),
        ("one_hot.default", (beyond, 3)),
        ("scatter_reduce.two", (table, 0, np.array([[3]]), table, "amax")),
        ("max_unpool2d.default", (table[None], np.full((1, 3, 4), 16), [4, 4])),
        ("index_reduce.default", (table, 0, np.array([-1, 0]), table[:2], "mean")),
        ("embedding_bag.default", (table, beyond, np.array([0]))),
    ]  # fmt: skip
    for name, args in calls:
        with pytest.raises(IndexError, match="places from"):
            operators.FUNCTIONS[f"aten.{name}"](*args)
    volume, grid = np.zeros((1, 1, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match="grid_sampler of"):
        operators.FUNCTIONS["aten.grid_sampler.default"](volume, grid, 0, 0, False)
    image = np.zeros((1, 2, 3), np.float32)
    with pytest.raises(ValueError, match="windows of 4 along an axis of 3, padded by 0"):
        operators.FUNCTIONS["aten.max_pool1d.default"](image, [4])
    args = None, None, X.numpy()[0, :2], X.numpy()[1, :2], True, 0.1, 1e-5
    with pytest.raises(ValueError, match="batch_norm in training"):
        operators.FUNCTIONS["aten.batch_norm.default"](image, *args)
    with pytest.raises(TypeError, match="wanted integers"):
        operators.FUNCTIONS["aten.embedding.default"](table, table)


@pytest.mark.parametrize(
    "name", ["abs", "neg", "erf", "gelu", "relu6", "hardsigmoid", "hardswish", "mish", "silu"]
)
def test_a_value_without_axes_keeps_its_dtype(name: str) -> None:
    target = f"aten.{name}.default"
    calls = [(target, (Ref(0),), {}), ("aten.add.Tensor", (Ref(1), Ref(1)), {})]
    stage = Stage("pointwise", ("a",), ("y",), {"calls": calls})
    wanted = 2 * getattr(torch.ops.aten, name).default(ONE)
    found = operators.evaluate(stage, [ONE.numpy()], {}, ())
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    torch.testing.assert_close(torch.from_numpy(found), wanted)


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
    stage = Stage("aten", ("a",), ("y",), {"target": "aten.erfinv.default"}, why="no integer form")
    with pytest.raises(ValueError, match=r"y takes aten.erfinv.*torch's \(no integer form\)"):
        operators.check_operator(stage)
    with pytest.raises(ValueError, match="y takes recurrent"):
        operators.check_operator(Stage("recurrent", ("a",), ("y",), {}))
    calls = [("aten.erfinv.default", (Ref(0),), {})]
    with pytest.raises(ValueError, match=r"y takes aten\.erfinv"):
        operators.check_operator(Stage("pointwise", ("a",), ("y",), {"calls": calls}))
