"""The operations read nothing beyond their arrays: each ends at a page that must not be touched."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rows import guarded, u8

from fastq import ops, reference

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="guard pages are made with Linux's mprotect"
)

# name: shapes of the arrays, and the other arguments
CASES: dict[str, tuple[list[tuple[int, ...]], tuple[Any, ...]]] = {
    "add": ([(3, 33), (33,)], (0.5, 0.25)),
    "mul": ([(2, 5, 17), (2, 1, 17)], (0.01,)),
    "affine": ([(5, 7)], (0.5, 1.0)),
    "table": ([(3, 50), (256,)], ()),
    "max_pool2d": ([(1, 5, 5, 37)], (3, 2, 1)),
    "avg_pool2d": ([(1, 5, 5, 37)], (3, 2, 1)),
    "adaptive_avg_pool2d": ([(2, 7, 7, 33)], (1,)),
    "adaptive_max_pool2d": ([(2, 7, 7, 33)], (2,)),
    "upsample_nearest2d": ([(1, 3, 3, 5)], ((6, 7),)),
    "upsample_bilinear2d": ([(1, 3, 3, 5)], ((6, 7),)),
    "softmax": ([(7, 13)], (0.1,)),
    "layer_norm": ([(7, 13)], (20.0, 0.5, 1.0)),
    "rms_norm": ([(7, 13)], (20.0, 1.0)),
    "group_norm": ([(2, 5, 7, 21)], (7, 20.0, 0.5, 1.0)),
    "global_response_norm": ([(2, 5, 7, 21)], (0.5, 0.5, 1.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_beyond_the_arrays(rng: Any, name: str) -> None:
    shapes, rest = CASES[name]
    arrays = [u8(rng, *shape) for shape in shapes]
    want = getattr(reference, name)(*arrays, *rest)
    out = guarded(np.zeros_like(want))
    got = getattr(ops, name)(*map(guarded, arrays), *rest, out=out)
    assert got is out
    assert_array_equal(out, want)


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (3, 5, 2), (7, 9, 13), (6, 64, 64), (5, 8, 4)])
def test_nothing_beyond_a_product(
    isa: str, rng: Any, m: int, n: int, k: int, transpose_b: bool
) -> None:
    a, b = u8(rng, m, k), u8(rng, *((n, k) if transpose_b else (k, n)))
    want = reference.matmul(a, b, 0.01, transpose_b=transpose_b)
    out = guarded(np.zeros_like(want))
    ops.matmul(guarded(a), guarded(b), 0.01, transpose_b=transpose_b, out=out)
    assert_array_equal(out, want)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8], ids=["u8", "s8"])
def test_nothing_beyond_arrays_of_floats(rng: Any, dtype: Any) -> None:
    """Lengths around every vector."""
    for n in (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 127, 129):
        x = guarded((rng.normal(size=n) * 60).astype(np.float32))
        x[rng.integers(n)] = rng.choice(np.float32([np.nan, np.inf, -np.inf]))
        acc = guarded(rng.integers(-(2**31), 2**31, n).astype(np.int32))
        out, real = guarded(np.zeros(n, dtype)), guarded(np.zeros(n, np.float32))
        named = {"scale": 0.5, "zero_point": -3 if dtype == np.int8 else 77}
        ops.quantize(x, **named, dtype=dtype, out=out)
        assert_array_equal(out, reference.quantize(x, **named, dtype=dtype))
        ops.dequantize(out, **named, out=real)
        assert_array_equal(real, reference.dequantize(out, **named))
        for multiplier in (1e-7, 0.3):
            rule = {"multiplier": multiplier, "zero_point": 5, "qmin": 2, "qmax": 100}
            ops.requantize(acc, **rule, dtype=dtype, out=out)
            assert_array_equal(out, reference.requantize(acc, **rule, dtype=dtype))
