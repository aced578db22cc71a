"""The product of two activations == its definition, on each tier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rows import CANARY, KINDS, u8

from fastq import ops, reference
from fastq.kernels import isa as isa_room
from fastq.kernels import matmul
from fastq.kernels.call import At, Call, View, address_of
from fastq.kernels.products import ACTIVATIONS
from fastq.kernels.simd import emitter
from fastq.qparams import MAX_K

# leading axes of a and of b, M, N, K
SHAPES: dict[str, tuple[Any, ...]] = {
    "one": ((), (), 1, 1, 1),
    "k_2": ((), (), 3, 5, 2),
    "k_4": ((), (), 7, 8, 4),
    "k_5": ((2,), (2,), 6, 9, 5),
    "k_7": ((), (), 13, 64, 7),
    "wide": ((3,), (3,), 17, 65, 33),
    "attention": ((2, 3), (2, 3), 16, 16, 32),
    "one_b": ((3, 2), (), 5, 12, 16),
    "one_a": ((), (4,), 5, 12, 16),
    "broadcast": ((3, 1), (1, 2), 4, 40, 10),
    "four_leading": ((2, 1, 2, 3), (3, 1, 3), 3, 17, 6),
    "no_k": ((2,), (2,), 3, 4, 0),
}
RULE = {"a_zero_point": 77, "zero_point": 120, "qmin": 3, "qmax": 250}


def operands(rng: Any, case: str, transpose_b: bool) -> tuple[np.ndarray, np.ndarray]:
    a_leading, b_leading, m, n, k = SHAPES[case]
    return u8(rng, *a_leading, m, k), u8(rng, *b_leading, *((n, k) if transpose_b else (k, n)))


@pytest.mark.parametrize("transpose_b", [False, True], ids=["kn", "nk"])
@pytest.mark.parametrize("case", SHAPES)
def test_matmul(isa: str, threads: int, rng: Any, case: str, transpose_b: bool) -> None:
    a, b = operands(rng, case, transpose_b)
    for multiplier in (0.001, 0.1, -3e7):  # the last: beyond int32
        want = reference.matmul(a, b, multiplier, transpose_b=transpose_b, **RULE)
        assert_array_equal(ops.matmul(a, b, multiplier, transpose_b=transpose_b, **RULE), want)


@pytest.mark.parametrize("transpose_b", [False, True], ids=["kn", "nk"])
@pytest.mark.parametrize("case", SHAPES)
def test_means(isa: str, threads: int, rng: Any, case: str, transpose_b: bool) -> None:
    """Each row divided by its weights' sum; some rows have none."""
    a, b = operands(rng, case, transpose_b)
    a[..., ::3, :] = 0
    rule = {"transpose_b": transpose_b, "mean": True, **RULE, "a_zero_point": 0}
    for multiplier in (0.01, 1.0, 3.7, 2.0**40):
        want = reference.matmul(a, b, multiplier, **rule)
        assert_array_equal(ops.matmul(a, b, multiplier, **rule), want)


@pytest.mark.parametrize("transpose_b", [False, True], ids=["kn", "nk"])
@pytest.mark.parametrize("case", SHAPES)
def test_float32(isa: str, threads: int, rng: Any, case: str, transpose_b: bool) -> None:
    """The products themselves, and means, to the last bit; beside them nothing is written."""
    a, b = operands(rng, case, transpose_b)
    a[..., ::3, :] = 0
    for rule in ({"a_zero_point": 77}, {"mean": True}):
        for multiplier in (0.001, -3.7, 2.0**40):
            rule = {**rule, "transpose_b": transpose_b, "dtype": "float32"}
            want = reference.matmul(a, b, multiplier, **rule)
            room = np.full(want.size + 128, CANARY, np.float32)
            out = room[64:-64].reshape(want.shape)
            got = ops.matmul(a, b, multiplier, **rule, out=out)
            assert want.dtype == np.float32 and got is out
            assert_array_equal(got.view(np.int32), want.view(np.int32))
            assert (room[:64] == CANARY).all() and (room[-64:] == CANARY).all()


@pytest.mark.parametrize("transpose_b", [False, True], ids=["kn", "nk"])
@pytest.mark.parametrize("mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize("case", ["attention", "wide", "k_5"])
def test_rows_of_the_kind_of_the_tier(
    isa: str, rng: Any, case: str, transpose_b: bool, mean: bool
) -> None:
    """Heads side by side in wider rows, whose leading axes do not join; a canary around out."""
    a, b = operands(rng, case, transpose_b)
    rule = {**RULE, "a_zero_point": 0 if mean else 77, "transpose_b": transpose_b, "mean": mean}
    want = reference.matmul(a, b, 0.002, **rule)
    kind = ACTIVATIONS[emitter(isa).a_bytes]
    whole, out = spread(np.zeros_like(want), kind)
    arrays = [spread(a, kind)[1], spread(b, kind)[1], out]
    call = Call(3)
    views = [View(At(i), x.shape, x.strides, kind) for i, x in enumerate(arrays)]
    matmul.matmul_row(call, *views, 0.002, isa, **rule)
    call.run(*map(address_of, arrays))
    assert_array_equal(out, want)
    out[...] = CANARY
    assert (whole == CANARY).all()


def spread(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(whole, inner) in memory as (..., rows, heads, columns), with canaries around and behind."""
    *leading, rows, columns = values.shape
    groups = leading[-1] if leading else 1
    whole = np.full((*leading[:-1], rows + 1, groups + 1, columns + 3), CANARY, KINDS[kind])
    whole = np.concatenate([whole.ravel(), np.full(256, CANARY, whole.dtype)])
    shape = (*leading[:-1], rows + 1, groups + 1, columns + 3)
    inner = whole[:-256].reshape(shape)[..., :rows, :groups, :columns].swapaxes(-2, -3)
    inner = inner if leading else inner[0]
    inner[...] = values
    return whole, inner


def test_corners_are_exact(isa: str) -> None:
    """The largest products, and the deepest K."""
    for a, b in ((255, 255), (255, 0), (0, 0)):
        x, y = np.full((3, 133), a, np.uint8), np.full((133, 70), b, np.uint8)
        for zero_point in (0, 255):
            want = reference.matmul(x, y, 1e-4, a_zero_point=zero_point, zero_point=128)
            got = ops.matmul(x, y, 1e-4, a_zero_point=zero_point, zero_point=128)
            assert_array_equal(got, want)
    x, y = np.full((1, MAX_K), 255, np.uint8), np.zeros((MAX_K, 1), np.uint8)
    assert ops.matmul(x, y, -(2.0**-24)).item() == 128  # 255 * 128 * MAX_K / 2**24
    with pytest.raises(ValueError, match=f"exact up to K={MAX_K}"):
        ops.matmul(np.zeros((1, MAX_K + 1), np.uint8), np.zeros((MAX_K + 1, 1), np.uint8), 1.0)


def test_strided_arrays(rng: Any) -> None:
    """Queries, keys and values as slices of one projection."""
    qkv = u8(rng, 2, 9, 3, 4, 16)  # batch, tokens, which, heads, features
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = ops.matmul(q, k, 1e-3, a_zero_point=128, transpose_b=True, zero_point=128)
    want = reference.matmul(q, k, 1e-3, a_zero_point=128, transpose_b=True, zero_point=128)
    assert_array_equal(scores, want)
    out = ops.matmul(scores, v, 1e-3)
    assert_array_equal(out, reference.matmul(scores, v, 1e-3))


X, Y = np.zeros((3, 5), np.uint8), np.zeros((5, 4), np.uint8)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "k": (lambda: ops.matmul(X, X, 1.0), ValueError, r"wanted \(..., M, K\)"),
    "axes": (lambda: ops.matmul(X[0], Y, 1.0), ValueError, r"wanted \(..., M, K\)"),
    "leading": (
        lambda: ops.matmul(np.stack([X] * 2), np.stack([Y] * 3), 1.0),
        ValueError,
        "do not broadcast",
    ),
    "dtype": (lambda: ops.matmul(X, Y.astype(np.int8), 1.0), TypeError, "wanted uint8"),
    "result": (lambda: ops.matmul(X, Y, 1.0, dtype="int16"), TypeError, "wanted uint8 or float32"),
    "clamp": (
        lambda: ops.matmul(X, Y, 1.0, zero_point=3, dtype="float32"),
        ValueError,
        "of float32, which has none",
    ),
    "overlap": (lambda: ops.matmul(X, Y, 1.0, out=X[:, :4]), ValueError, "C-contiguous"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_nothing_to_multiply(isa: str) -> None:
    assert isa in isa_room.runnable()
    for m, n, k in ((0, 4, 5), (3, 0, 5)):
        a, b = np.zeros((m, k), np.uint8), np.zeros((k, n), np.uint8)
        assert ops.matmul(a, b, 1.0).shape == (m, n)
    empty = np.zeros((2, 0, 3), np.uint8)
    assert ops.matmul(empty, empty, 1.0, transpose_b=True).shape == (2, 0, 0)
