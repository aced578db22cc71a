"""softmax and layer norm == their definition, and the definition is close to torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rows import check_row, guarded, u8

from fastq import ops, reference
from fastq.kernels import norms
from fastq.qparams import MAX_FEATURES, MAX_WIDE_FEATURES

SHAPES = [
    (1,), (7,), (33,), (3, 5), (9, 64), (2, 3, 4, 128), (5, 1), (2, 5, 3, 17), (70, 31), (3, 1024),
    (2, 2500), (1, 100_003),
]  # fmt: skip


def inputs(rng: Any, shape: tuple[int, ...]) -> list[np.ndarray]:
    return [u8(rng, *shape), np.full(shape, 255, np.uint8), np.full(shape, 0, np.uint8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(kind: str, threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    for x in inputs(rng, shape):
        for scale in (1e-30, 0.004, 0.1, 9.0):
            want = reference.softmax(x, scale)
            assert_array_equal(ops.softmax(x, scale), want)
        for in_place in (False, True):
            check_row(kind, want, [x], lambda call, x, out: norms.softmax_row(call, x, out, 9.0),
                      in_place)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_softmax(kind: str, threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    """Every way to broadcast; all of some lines is masked."""
    for axes in range(2 ** (len(shape) - 1)):
        sizes = [1 if axes >> i & 1 else n for i, n in enumerate(shape[:-1])]
        mask = rng.choice(np.uint8([0, 0, 1, 255]), (*sizes, shape[-1]))
        mask.reshape(-1, shape[-1])[::3] = 0
        for x in inputs(rng, shape):
            for uniform in (False, True):
                want = reference.softmax(x, 0.1, mask, uniform=uniform)
                assert_array_equal(ops.softmax(x, 0.1, mask, uniform=uniform), want)
                assert_array_equal(ops.softmax(x, 0.1, mask != 0, uniform=uniform), want)
                for in_place in (False, True):
                    check_row(kind, want, [x, mask], lambda call, x, m, out, u=uniform: (
                        norms.softmax_row(call, x, out, 0.1, u, mask=m)), in_place)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_weights(kind: str, threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    mask = rng.choice(np.uint8([0, 1, 255]), shape)
    mask.reshape(-1, shape[-1])[::3] = 0
    for x in inputs(rng, shape):
        for scale in (1e-30, 0.004, 0.1, 9.0):
            for given in ((), (mask,), (mask[..., :1, :],) if len(shape) > 1 else (mask != 0,)):
                for uniform in (False, True):
                    want = reference.softmax_weights(x, scale, *given, uniform=uniform)
                    got = ops.softmax_weights(x, scale, *given, uniform=uniform)
                    assert_array_equal(got, want)
        for in_place in (False, True):
            check_row(kind, reference.softmax_weights(x, 0.1), [x], lambda call, x, out: (
                norms.softmax_weights_row(call, x, out, 0.1)), in_place)  # fmt: skip
            want = reference.softmax_weights(x, 0.1, mask, uniform=True)
            check_row(kind, want, [x, mask], lambda call, x, m, out: (
                norms.softmax_weights_row(call, x, out, 0.1, True, mask=m)), in_place)  # fmt: skip


def test_weights_divided_by_their_sum_are_the_softmax(rng: Any) -> None:
    """More exactly so than on a grid of 1 / 255, where there are many."""
    x = u8(rng, 20, 700) // 4
    weights = reference.softmax_weights(x, 0.02).astype(np.float64)
    exact = np.exp(0.02 * x) / np.exp(0.02 * x).sum(-1, keepdims=True)
    error = np.abs(weights / weights.sum(-1, keepdims=True) - exact).max()
    assert error < exact.max() / 255
    assert error < np.abs(reference.softmax(x, 0.02) / 255 - exact).max() / 4


def test_a_mask_leaves_elements_out(rng: Any) -> None:
    x, mask = u8(rng, 6, 40), rng.random((6, 40)) < 0.5
    got = reference.softmax(x, 0.05, mask)
    for line, taken, y in zip(x, mask, got, strict=True):
        assert_array_equal(y[taken], reference.softmax(line[taken], 0.05))
        assert not y[~taken].any()
    assert_array_equal(reference.softmax(x, 0.05, np.ones(40, bool)), reference.softmax(x, 0.05))
    assert not reference.softmax(x, 0.05, np.zeros(40, bool)).any()
    assert (reference.softmax(x, 0.05, np.zeros(40, bool), uniform=True) == 6).all()  # 255 / 40


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(kind: str, threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    multiplier = (rng.normal(size=shape[-1]) * 40).astype(np.float32)
    shift = (rng.normal(size=shape[-1]) * 30).astype(np.float32)
    for x in inputs(rng, shape):
        for epsilon in (1e-20, 3.7):
            rule = (multiplier, shift, epsilon)
            want = reference.layer_norm(x, *rule, zero_point=120, qmin=3, qmax=250)
            got = ops.layer_norm(x, *rule, zero_point=120, qmin=3, qmax=250)
            assert_array_equal(got, want)
        for in_place in (False, True):
            check_row(kind, want, [x], lambda call, x, out, rule=rule: norms.layer_norm_row(
                call, x, out, *rule, 120, 3, 250), in_place)  # fmt: skip
    plain = reference.layer_norm(x, 20.0, 0.5, 1.0, zero_point=128)
    assert_array_equal(ops.layer_norm(x, 20.0, 0.5, 1.0, zero_point=128), plain)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(kind: str, threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    multiplier = (rng.normal(size=shape[-1]) * 40).astype(np.float32)
    for x in inputs(rng, shape):
        for zero, epsilon in ((0, 1e-20), (77, 3.7), (255, 1e-20)):
            rule = (multiplier, epsilon)
            named = {"x_zero_point": zero, "zero_point": 120, "qmin": 3, "qmax": 250}
            want = reference.rms_norm(x, *rule, **named)
            assert_array_equal(ops.rms_norm(x, *rule, **named), want)
            for in_place in (False, True):
                check_row(kind, want, [x], lambda call, x, out, rest=(*rule, zero): (
                    norms.rms_norm_row(call, x, out, *rest, 120, 3, 250)), in_place)  # fmt: skip


@pytest.mark.parametrize("shape", [*SHAPES[:-1], (2, MAX_WIDE_FEATURES)], ids=str)
def test_rms_norm_of_int16(threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    multiplier = (rng.normal(size=shape[-1]) * 40).astype(np.float32)
    for x in (
        rng.integers(-(2**15), 2**15, shape), np.full(shape, -32768), rng.integers(-3, 4, shape)
    ):  # fmt: skip
        x = x.astype(np.int16)
        want = reference.rms_norm(x, multiplier, 2.0, zero_point=100, qmax=250)
        out = guarded(np.zeros_like(want))
        ops.rms_norm(guarded(x), multiplier, 2.0, zero_point=100, qmax=250, out=out)
        assert_array_equal(out, want)


def test_any_multiplier(rng: Any) -> None:
    x = u8(rng, 5, 70)
    for multiplier in (0.0, 1e-9, -3e7, 2.0**96):
        for shift in (0.0, 1e9):
            want = reference.layer_norm(x, multiplier, shift, 1.0, zero_point=9, qmin=1)
            got = ops.layer_norm(x, multiplier, shift, 1.0, zero_point=9, qmin=1)
            assert_array_equal(got, want)


def test_the_most_features() -> None:
    x = np.full((2, MAX_FEATURES), 255, np.uint8)
    x[1, ::2] = 0
    rule = 30.0, 0.0, 1.0
    want = reference.layer_norm(x, *rule, zero_point=128)
    assert_array_equal(ops.layer_norm(x, *rule, zero_point=128), want)
    assert sorted(set(want.ravel().tolist())) == [98, 128, 158]
    with pytest.raises(ValueError, match=f"up to {MAX_FEATURES}"):
        ops.layer_norm(np.zeros((1, MAX_FEATURES + 1), np.uint8), *rule)


def test_they_are_those_of_torch(rng: Any) -> None:
    import torch
    from torch.nn import functional as F

    x, zero_point = u8(rng, 20, 96), 77
    for scale in (0.01, 0.1):
        real = torch.from_numpy((x.astype(np.float32) - zero_point) * np.float32(scale))
        want = F.softmax(real, -1).numpy() * 255
        assert np.abs(reference.softmax(x, scale) - want).max() < 0.501
        weight, bias = (
            rng.normal(size=96).astype(np.float32),
            rng.normal(size=96).astype(np.float32),
        )
        y_scale = np.float32(0.05)
        named = {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
        want = F.layer_norm(real, (96,), **named, eps=1e-5).numpy() / y_scale + 128
        got = reference.layer_norm(
            x, weight / y_scale, bias / y_scale, 1e-5 / scale**2, zero_point=128
        )
        assert np.abs(got - np.clip(want, 0, 255)).max() < 0.502
        want = F.rms_norm(real, (96,), named["weight"], 1e-5).numpy() / y_scale + 128
        got = reference.rms_norm(
            x, weight / y_scale, 1e-5 / scale**2, x_zero_point=zero_point, zero_point=128
        )
        assert np.abs(got - np.clip(want, 0, 255)).max() < 0.502


def test_one_probability_is_held_exactly() -> None:
    assert reference.softmax(np.array([0, 255, 3], np.uint8), 1.0).tolist() == [0, 255, 0]


X = np.zeros((3, 5), np.uint8)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda: ops.softmax(X[:, :0], 1.0), ValueError, "N > 0"),
    "scalar": (lambda: ops.softmax(X[0, 0, None].reshape(()), 1.0), ValueError, "N > 0"),
    "scale": (lambda: ops.softmax(X, 0.0), ValueError, "finite values greater than 0"),
    "scales": (lambda: ops.softmax(X, [1.0, 2.0]), ValueError, "wanted one number"),
    "mask's type": (lambda: ops.softmax(X, 1.0, [True] * 5), TypeError, "mask is a list"),
    "mask's dtype": (
        lambda: ops.softmax(X, 1.0, X + 0.5),
        TypeError,
        "float64 array; wanted a bool",
    ),
    "mask's axis": (lambda: ops.softmax(X, 1.0, X[:, :1]), ValueError, r"wanted \(..., 5\)"),
    "mask's rows": (
        lambda: ops.softmax(X, 1.0, X[:2]),
        ValueError,
        r"mask \(2, 5\) for x \(3, 5\)",
    ),
    "mask's axes": (lambda: ops.softmax(X, 1.0, X[None]), ValueError, r"mask \(1, 3, 5\)"),
    "mask's memory": (lambda: ops.softmax(X + 1, 1.0, X, out=X), ValueError, "out overlaps"),
    "epsilon": (lambda: ops.layer_norm(X, 1.0, 0.0, 0.0), ValueError, "wanted a float from 1e-70"),
    "its zero point": (
        lambda: ops.rms_norm(X, 1.0, 1.0, x_zero_point=256),
        ValueError,
        "x_zero_point",
    ),
    "zero point of int16": (
        lambda: ops.rms_norm(X.astype(np.int16), 1.0, 1.0, x_zero_point=3),
        ValueError,
        "wanted 0",
    ),
    "features of int16": (
        lambda: ops.rms_norm(np.zeros((1, MAX_WIDE_FEATURES + 1), np.int16), 1.0, 1.0),
        ValueError,
        "rms_norm: x .* exact up to",
    ),
    "features": (lambda: ops.layer_norm(X, [1.0], 0.0, 1.0), ValueError, "one per channel"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_no_lines() -> None:
    empty = np.zeros((0, 5), np.uint8)
    assert ops.softmax(empty, 1.0).shape == (0, 5)
    assert ops.layer_norm(empty, 1.0, 0.0, 1.0).shape == (0, 5)
