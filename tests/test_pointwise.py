"""Operations on whole arrays == their definition: kinds, strides, in place, threads, borders."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rows import CANARY, KINDS, check_row, u8, view

from fastq import ops, reference
from fastq.kernels import lookup, pointwise
from fastq.kernels.call import Call, View
from fastq.kernels.isa import target_features

U8 = np.uint8
SHAPES = [
    (), (1,), (7,), (33,), (64,), (20_011,), (3, 5), (9, 17), (300, 40), (1, 1, 1, 1),
    (2, 3, 4, 5), (2, 9, 7, 33), (2, 5, 6, 1), (1, 1, 1, 70),
]  # fmt: skip
# shapes of a and b
PAIRS = [
    *((shape, shape) for shape in SHAPES),
    ((2, 5, 7, 33), (2, 1, 1, 33)), ((2, 1, 1, 33), (2, 5, 7, 33)), ((5, 7), (7,)), ((5, 7), ()),
    ((1, 9), (5, 1)), ((5, 1, 3, 1), (2, 1, 40)), ((2, 5, 7, 1), (33,)), ((3, 5, 7, 33), (5, 1, 1)),
]  # fmt: skip
CLAMP = (10, 3, 250)


@pytest.mark.parametrize("a_shape, b_shape", PAIRS, ids=str)
def test_add_and_mul(kind: str, threads: int, rng: Any, a_shape: Any, b_shape: Any) -> None:
    a, b = u8(rng, *a_shape), u8(rng, *b_shape)
    named = {"zero_point": 10, "qmin": 3, "qmax": 250, "a_zero_point": 255, "b_zero_point": 7}
    want = reference.add(a, b, 0.37, -0.81, **named)
    check_row(kind, want, [a, b], lambda call, x, y, out: pointwise.add_row(
        call, x, y, out, (0.37, -0.81), (255, 7), *CLAMP))  # fmt: skip
    assert_array_equal(ops.add(a, b, 0.37, -0.81, **named), want)
    want = reference.mul(a, b, 0.0071, **named)
    check_row(kind, want, [a, b], lambda call, x, y, out: pointwise.mul_row(
        call, x, y, out, 0.0071, (255, 7), *CLAMP))  # fmt: skip
    assert_array_equal(ops.mul(a, b, 0.0071, **named), want)
    if a.shape == want.shape:
        check_row(kind, want, [a, b], lambda call, x, y, out: pointwise.mul_row(
            call, x, y, out, 0.0071, (255, 7), *CLAMP), in_place=True)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine_and_table(kind: str, threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    x, channels = u8(rng, *shape), shape[-1:]
    named = {"x_zero_point": 99, "zero_point": 10, "qmin": 3, "qmax": 250}
    for size in {(), channels}:
        multiplier = rng.normal(size=size).astype(np.float32)
        shift = (rng.normal(size=size) * 50).astype(np.float32)
        want = reference.affine(x, multiplier, shift, **named)

        def affine(call: Call, x: View, out: View, m: Any = multiplier, s: Any = shift) -> None:
            pointwise.affine_row(call, x, out, m, s, 99, *CLAMP)

        check_row(kind, want, [x], affine)
        check_row(kind, want, [x], affine, in_place=True)
        assert_array_equal(ops.affine(x, multiplier, shift, **named), want)
        values = u8(rng, *size, 256)
        want = reference.table(x, values)
        for in_place in (False, True):
            check_row(kind, want, [x], lambda call, x, out, v=values: pointwise.table_row(
                call, x, out, v), in_place)  # fmt: skip
        assert_array_equal(ops.table(x, values), want)


# images, and the shape of what is the same on their pixels
REPEATED = [
    ((2, 6, 8, 3), (2, 1, 1, 3)), ((1, 7, 9, 24), (24,)), ((3, 4, 5, 116), (3, 1, 1, 116)),
    ((2, 3, 5, 7, 9), (2, 3, 1, 1, 9)), ((1, 13, 13, 40), (1, 1, 1, 40)), ((2, 5, 6, 600), (600,)),
    ((2, 6, 8, 3), (2, 6, 1, 3)), ((2, 6, 8, 3), (1, 8, 3)), ((2, 6, 8, 3), (2, 6, 8, 1)),
]  # fmt: skip


@pytest.mark.parametrize("frame", [0, 1])
@pytest.mark.parametrize("shape, y_shape", REPEATED, ids=str)
def test_vectors_of_channels(
    kind: str, threads: int, rng: Any, shape: Any, y_shape: Any, frame: int
) -> None:
    """Pixels that lie side by side, in lines that do or do not, with what is repeated on them."""
    whole = u8(rng, *shape[:-2], shape[-2] + frame, shape[-1]).astype(KINDS[kind])
    x, y = whole[..., : shape[-2], :], u8(rng, *y_shape).astype(KINDS[kind])
    scales = rng.normal(size=shape[-1]).astype(np.float32)
    shifts = (rng.normal(size=shape[-1]) * 50).astype(np.float32)
    a, b = x.astype(U8), y.astype(U8)
    named = {"zero_point": 10, "qmin": 3, "qmax": 250}
    zeros = named | {"a_zero_point": 255, "b_zero_point": 7}
    rows: list[tuple[Any, Any]] = [
        (reference.add(a, b, 0.37, -0.81, **zeros), lambda call, x, y, out: pointwise.add_row(
            call, x, y, out, (0.37, -0.81), (255, 7), *CLAMP)),
        (reference.mul(b, a, 0.0071, **zeros), lambda call, x, y, out: pointwise.mul_row(
            call, y, x, out, 0.0071, (255, 7), *CLAMP)),
        (reference.affine(a, scales, shifts, x_zero_point=99, **named), lambda call, x, y, out:
            pointwise.affine_row(call, x, out, scales, shifts, 99, *CLAMP)),
    ]  # fmt: skip
    for want, row in rows:
        for in_place in (False, True):
            target = whole.copy() if in_place else np.full_like(whole, CANARY)
            out = target[..., : shape[-2], :]
            call = Call(0)
            row(call, view(out if in_place else x), view(y), view(out))
            for _ in range(1 if in_place else 2):
                call.run()
            assert_array_equal(out, want)
            rest = whole if in_place else np.full_like(whole, CANARY)
            assert_array_equal(target[..., shape[-2] :, :], rest[..., shape[-2] :, :])


def test_vectors_of_channels_that_change(rng: Any) -> None:
    """An operand is read when the call runs."""
    x, y = u8(rng, 2, 6, 8, 3), u8(rng, 2, 1, 1, 3)
    call, out = Call(0), np.zeros_like(x)
    pointwise.mul_row(call, view(x), view(y), view(out), 0.0071, (3, 4))
    for _ in range(2):
        y[...] = u8(rng, *y.shape)
        call.run()
        want = reference.mul(x, y, 0.0071, a_zero_point=3, b_zero_point=4)
        assert_array_equal(out, want)


def test_all_bytes_of_add_and_mul(rng: Any) -> None:
    """Every pair of bytes; ties go to the even neighbour."""
    a, b = np.arange(256, dtype=U8)[:, None], np.arange(256, dtype=U8)
    for m in (0.5, -0.5, 0.1, 2.0**96, 0.0):
        assert_array_equal(ops.add(a, b, m, 0.5), reference.add(a, b, m, 0.5))
        want = reference.mul(a, b, m, a_zero_point=128, zero_point=128)
        assert_array_equal(ops.mul(a, b, m, a_zero_point=128, zero_point=128), want)
    assert ops.add(a[:6], b[:1], 0.5, 1.0)[:, 0].tolist() == [0, 0, 1, 2, 2, 2]


def test_any_multiplier(rng: Any) -> None:
    x = np.arange(256, dtype=U8)
    rule = {"zero_point": 9, "qmin": 1, "qmax": 254}
    for multiplier in (1e-9, -3e7, 4e6, 2.0**96):
        for shift in (0.0, 1e9, -(2.0**96)):
            got = ops.affine(x, multiplier, shift, x_zero_point=128, **rule)
            want = reference.affine(x, multiplier, shift, x_zero_point=128, **rule)
            assert_array_equal(got, want)
            want = reference.add(x, x[::-1], multiplier, shift, a_zero_point=128, **rule)
            got = ops.add(x, x[::-1], multiplier, shift, a_zero_point=128, **rule)
            assert_array_equal(got, want)


@pytest.mark.parametrize("method", ["avx512vbmi", "avx2", "scalar"])
def test_each_way_to_read_a_table(
    method: str, kind: str, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method != "scalar" and method not in target_features():
        pytest.skip(f"this CPU lacks {method}")
    monkeypatch.setattr(pointwise, "choose_lookup", lambda: method)
    pointwise.pointwise_kernel.cache_clear()
    x, values = np.arange(256, dtype=U8).repeat(3), rng.permutation(256).astype(U8)
    check_row(kind, values[x], [x], lambda call, x, out: pointwise.table_row(call, x, out, values))
    pointwise.pointwise_kernel.cache_clear()


def test_more_than_four_axes_and_none(rng: Any) -> None:
    a = u8(rng, 2, 3, 4, 5, 6)[:, ::2, :, ::3]
    b = u8(rng, 2, 4, 1, 1)
    assert_array_equal(ops.add(a, b, 0.5, 0.5), reference.add(a, b, 0.5, 0.5))
    multiplier = rng.random(6).astype(np.float32)
    assert_array_equal(ops.affine(a, multiplier), reference.affine(a, multiplier))
    for shape in ((0,), (3, 0), (0, 4)):
        empty = np.zeros(shape, U8)
        assert ops.add(empty, empty, 1.0, 1.0).shape == shape
        assert ops.mul(empty, empty[..., :1] if shape[-1] else empty, 1.0).shape == shape
        assert ops.affine(empty, 1.0).shape == shape
        assert ops.table(empty, np.zeros(256, U8)).shape == shape


def test_strided_arrays(rng: Any) -> None:
    x = u8(rng, 6, 8, 10)
    for a in (x[::2, ::-1], x.transpose(2, 0, 1), x[..., ::2], x[:, :, 3:4]):
        b = u8(rng, *a.shape)
        assert_array_equal(ops.add(a, b, 0.5, 0.7), reference.add(a, b, 0.5, 0.7))
        assert_array_equal(ops.affine(a, 0.5), reference.affine(a, 0.5))


def test_fill(kind: str, threads: int) -> None:
    for shape in SHAPES:
        want = np.full(shape, 77)
        check_row(kind, want, [], lambda call, out: pointwise.fill_row(call, out, 77))


@pytest.mark.parametrize("cpu, instruction", [("znver4", "vperm[it]2b"), ("haswell", "vpshufb")])
def test_assembly_of_a_table(cpu: str, instruction: str) -> None:
    """A whole vector by in-register look-ups, for CPUs that are not here."""
    from llvmlite import binding, ir

    from fastq.kernels import simd

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    method = {"znver4": "avx512vbmi", "haswell": "avx2"}[cpu]
    module = ir.Module()
    module.triple = "x86_64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [simd.ptr] * 3), "f")
    b = ir.IRBuilder(function.append_basic_block())
    table, x, out = function.args
    rows = lookup.load_table(b, method, table)
    (width, *_) = lookup.lookup_widths(method)
    loaded = simd.load(b, simd.vec(simd.i8, width), x)
    simd.store(b, lookup.emit_lookup(b, method, rows, table, loaded), out)
    b.ret_void()
    machine = binding.Target.from_triple(module.triple).create_target_machine(cpu=cpu, opt=3)
    text = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert len(re.findall(instruction, text)) == {"znver4": 2, "haswell": 16}[cpu]


X = np.zeros((3, 5), U8)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (lambda: ops.add(X, X.astype(np.int8), 1.0, 1.0), TypeError, "uint8 or int16"),
    "shapes": (lambda: ops.add(X, X[:2], 1.0, 1.0), ValueError, "do not broadcast"),
    "nan": (lambda: ops.mul(X, X, float("nan")), ValueError, "one finite number"),
    "huge": (lambda: ops.mul(X, X, 1e30), ValueError, "magnitude up to"),
    "channels": (lambda: ops.affine(X, [1.0, 2.0]), ValueError, "one per channel"),
    "shift": (lambda: ops.affine(X, 1.0, np.inf), ValueError, "finite numbers"),
    "table": (lambda: ops.table(X, np.zeros((4, 256), U8)), ValueError, r"wanted \(256,\)"),
    "zero_point": (lambda: ops.affine(X, 1.0, x_zero_point=256), ValueError, "0 to 255"),
    "zero_points": (lambda: ops.affine(X, 1.0, zero_point=[1]), ValueError, "one integer"),
    "clamp": (lambda: ops.add(X, X, 1.0, 1.0, qmin=9, qmax=8), ValueError, "qmin <= qmax"),
    "overlap": (lambda: ops.add(X, X, 1.0, 1.0, out=X), ValueError, "overlaps"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()
