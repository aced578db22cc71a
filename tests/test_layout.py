"""Copies, frames and float borders: every stride and kind, and nothing around them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rows import CANARY, KINDS, bordered, u8, view

from fastq import reference
from fastq.kernels import layout
from fastq.kernels.call import Call


def run(row: Any, *operands: Any) -> None:
    call = Call(0)
    row(call, *operands)
    call.run()


# a logical shape, and the order of its axes in the memory of x and of out
COPIES: dict[str, tuple[Any, ...]] = {
    "one": ((1,), (0,), (0,)),
    "line": ((77,), (0,), (0,)),
    "long": ((20_011,), (0,), (0,)),
    "image": ((2, 5, 7, 33), (0, 1, 2, 3), (0, 1, 2, 3)),
    "nhwc_to_nchw": ((2, 9, 5, 35), (0, 1, 2, 3), (0, 3, 1, 2)),
    "nchw_to_nhwc": ((2, 9, 7, 35), (0, 3, 1, 2), (0, 1, 2, 3)),
    "few_channels": ((2, 9, 7, 3), (0, 1, 2, 3), (0, 3, 1, 2)),
    "shuffle_2": ((1, 6, 58, 2), (0, 1, 3, 2), (0, 1, 2, 3)),
    "shuffle_3": ((1, 6, 20, 3), (0, 1, 3, 2), (0, 1, 2, 3)),
    "shuffle_4": ((2, 3, 16, 4), (0, 1, 3, 2), (0, 1, 2, 3)),
    "unshuffle_2": ((1, 6, 2, 58), (0, 1, 3, 2), (0, 1, 2, 3)),
    "heads": ((2, 9, 3, 32), (0, 1, 2, 3), (0, 2, 1, 3)),
    "keys": ((2, 9, 3, 32), (0, 1, 2, 3), (0, 2, 3, 1)),
    "square": ((33, 47), (0, 1), (1, 0)),
    "six_axes": ((2, 3, 2, 3, 2, 17), (0, 1, 2, 3, 4, 5), (4, 2, 0, 3, 5, 1)),
    "six_axes_lines": ((2, 3, 2, 3, 2, 17), (0, 1, 2, 3, 4, 5), (4, 2, 0, 3, 1, 5)),
}


def in_order(values: np.ndarray, order: tuple[int, ...], kind: str) -> tuple[Any, Any]:
    """(whole, inner): the values in memory with their axes in this order, canaries around."""
    whole, inner = bordered(values.transpose(order), kind)
    return whole, inner.transpose(np.argsort(order))


@pytest.mark.parametrize("case", COPIES)
def test_copy(threads: int, rng: Any, case: str) -> None:
    shape, x_order, out_order = COPIES[case]
    values = u8(rng, *shape)
    for source, target in [*itertools.product(("u8", "u8x2"), repeat=2), ("f32", "f32")]:
        _, x = in_order(values, x_order, source)
        whole, out = in_order(np.zeros_like(values), out_order, target)
        run(layout.copy_row, view(x), view(out))
        assert_array_equal(out, values)
        out[...] = CANARY
        assert (whole == CANARY).all()
        # dense arrays, whose axes join
        x = np.ascontiguousarray(values.transpose(x_order)).transpose(np.argsort(x_order))
        out = np.empty_like(values.transpose(out_order)).transpose(np.argsort(out_order))
        x, out = x.astype(KINDS[source], order="K"), out.astype(KINDS[target], order="K")
        run(layout.copy_row, view(x), view(out))
        assert_array_equal(out, values)


def test_copy_of_every_second_and_of_one_for_all(rng: Any) -> None:
    whole = u8(rng, 40, 60)
    for x in (
        whole[::2, ::3],
        whole[::-1, ::-2],
        np.broadcast_to(whole[:1, :7], (5, 7)),
        whole[:0],
    ):
        out = np.zeros(x.shape, np.uint8)
        run(layout.copy_row, view(x), view(out))
        assert_array_equal(out, x)


def test_border(kind: str, threads: int, rng: Any) -> None:
    for shape in ((2, 6, 7, 5), (1, 3, 3, 33), (3, 8, 8, 1)):
        for frame in ((1, 1, 1, 1), (0, 2, 1, 0), (3, 0, 0, 0), (0, 0, 2, 3), (0, 0, 0, 0)):
            values = u8(rng, *shape)
            top, bottom, left, right = frame
            if top + bottom > shape[1] or left + right > shape[2]:
                continue
            whole, inner = bordered(values, kind)
            want = np.full_like(values, 77)
            kept = (slice(None), slice(top, shape[1] - bottom), slice(left, shape[2] - right))
            want[kept] = values[kept]
            run(layout.border_row, view(inner), *frame, 77)
            assert_array_equal(inner, want)
            inner[...] = CANARY
            assert (whole == CANARY).all()
            dense = values.astype(KINDS[kind])
            run(layout.border_row, view(dense), *frame, 77)
            assert_array_equal(dense, want)


@pytest.mark.parametrize("case", [c for c in COPIES if not c.startswith("six")])
def test_quantize_and_dequantize(kind: str, threads: int, rng: Any, case: str) -> None:
    shape, x_order, out_order = COPIES[case]
    real = (rng.normal(size=shape) * 100).astype(np.float32)
    real.flat[0] = np.nan
    if real.size > 2:
        real.flat[1:3] = [np.inf, -np.inf]
    q = reference.quantize(real, scale=0.7, zero_point=99)
    _, x = in_order(real, x_order, "f32")
    whole, out = in_order(np.zeros_like(q), out_order, kind)
    run(layout.quantize_row, view(x), view(out), 0.7, 99)
    assert_array_equal(out, q)
    back, floats = in_order(np.zeros_like(real), x_order, "f32")
    run(layout.dequantize_row, view(out), view(floats), 0.7, 99)
    assert_array_equal(floats, reference.dequantize(q, 0.7, 99))
    out[...] = floats[...] = CANARY
    assert (whole == CANARY).all() and (back == CANARY).all()


def test_quantize_of_every_second(kind: str, rng: Any) -> None:
    x = rng.normal(size=(10, 12)).astype(np.float32)
    out = np.zeros((5, 4), KINDS[kind])
    run(layout.quantize_row, view(x[::2, ::3]), view(out), 0.01, 5)
    assert_array_equal(out, reference.quantize(x[::2, ::3], scale=0.01, zero_point=5))
    floats = np.zeros((10, 12), np.float32)
    run(layout.dequantize_row, view(out), view(floats[::2, ::3]), 0.01, 5)
    assert_array_equal(floats[::2, ::3], reference.dequantize(out.astype(np.uint8), 0.01, 5))
    assert np.count_nonzero(floats) <= 20
