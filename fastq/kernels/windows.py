"""Pooling and upsampling: each output pixel is made of a window of input pixels, named by tables.

    out[b, i, j, c] = reduce over taps (t, u) of  x[b, TAP_ROWS[i, t], TAP_COLUMNS[j, u], c]

    max        the largest
    sum        requantized: float32(sum - taps * zx) * FACTORS[i, j]
    bilinear   requantized: ((x00 * g + x01 * f) * G) + ((x10 * g + x11 * f) * F) with
               (g, f) = FACTORS[j] and (G, F) = ROW_FACTORS[i]

x and out are NHWC, uint8 or uint8 values in int16, with the channels side by side and any other
strides. The tables hold byte offsets, int64, (OH, KH) and (OW, KW), of which the first
COUNT_ROWS[i] and COUNT_COLUMNS[j] count: nothing outside of x is read, so padding needs no memory.
For max every tap counts; those outside of x repeat one inside. Where all windows are full and
small, the taps are unrolled.

A task is a block of BLOCK channels of one row of one image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastq.kernels import executor, simd
from fastq.kernels.call import ITEM_BYTES, Call, Place, View
from fastq.kernels.lines import ELEMENT, MAX_BOUNDED, emit_line, emit_loop, emit_rounded, widest
from fastq.kernels.native import native
from fastq.kernels.pointwise import float_parameters, int_parameters
from fastq.kernels.scalar import pointer
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import (
    address,
    const,
    f32,
    fields_of,
    i16,
    i32,
    i64,
    load,
    ptr,
    splat,
    store,
    vec,
)
from fastq.kernels.tiles import BYTES_PER_NANOSECOND

(
    X, X_IMAGE, OUT, OUT_IMAGE, OUT_ROW, OUT_PIXEL, HEIGHT, WIDTH, CHANNELS, BLOCK,
    TAP_ROWS, TAP_COLUMNS, COUNT_ROWS, COUNT_COLUMNS, KERNEL_ROWS, KERNEL_COLUMNS,
    FACTORS, FACTORS_ROW, FACTORS_PIXEL, ROW_FACTORS, FLOATS, INTS, FIELDS,
) = range(23)  # fmt: skip
WIDTHS = (64, 32, 16, 8, 1)  # channels at once
UNROLLED = 9  # taps
SHORT_TAPS = 257  # of 255 that an unsigned 16-bit sum holds
MAX_TAPS = (2**31 - 1) // 255

Operation = Literal["max", "sum", "bilinear"]


def emit_window(b: Any, config: tuple[Any, ...], field: Any, place: Any, count: Any) -> None:
    """One output pixel of `count` channels. place: x, out, row and column taps, factors."""
    operation, kind, taps_down, taps_across, sums, bounded = config
    x, out, down, across, down_count, across_count, factors, row_factors = place
    element = ELEMENT[kind]
    unrolled = [
        [
            address(b, address(b, x, load(b, i64, down, 8 * t)), load(b, i64, across, 8 * u))
            for u in range(taps_across)
        ]
        for t in range(taps_down)
    ]
    floats, ints = field(FLOATS, ptr), field(INTS, ptr)
    lo, hi = load(b, f32, floats), load(b, f32, floats, 4)
    zp, zx = load(b, i32, ints), load(b, i32, ints, 4)

    def body(channel: Any, width: int) -> None:
        at = b.mul(channel, i64(ITEM_BYTES[kind]))
        stored, floats_of = vec(element, width), vec(f32, width)

        def each_row(first: Any, body: Any) -> Any:
            """first, through body(total, pixel) for each pixel of a row, then to the next row."""
            (total,) = emit_loop(
                b, i64(0), down_count, 1, [first], lambda t, total: [body(total, line_at(t))]
            )[1]
            return total

        def line_at(t: Any) -> Any:
            return address(b, x, load(b, i64, down, b.mul(t, i64(8))))

        def each_column(line: Any, first: Any, body: Any) -> Any:
            def step(u: Any, total: Any) -> list[Any]:
                return [body(total, address(b, line, load(b, i64, across, b.mul(u, i64(8)))))]

            return emit_loop(b, i64(0), across_count, 1, [first], step)[1][0]

        def reduce(first: Any, body: Any) -> Any:
            """first, through body(total, address) for each tap."""
            if unrolled:
                total = first
                for line in unrolled:
                    for pixel in line:
                        total = body(total, pixel)
                return total
            return each_row(first, lambda total, line: each_column(line, total, body))

        def larger(total: Any, pixel: Any) -> Any:
            name = f"llvm.umax.v{width}i{element.width}"
            return simd.call(b, name, stored, [total, load(b, stored, pixel, at)])

        def summed(total: Any, pixel: Any) -> Any:
            value = load(b, stored, pixel, at)
            wider = value.type != total.type
            return b.add(total, b.zext(value, total.type) if wider else value)

        def bilinear() -> Any:
            def share(place: Any, n: int) -> Any:
                return splat(b, load(b, f32, place, 4 * n), width)

            def mixed(pair: list[Any], place: Any) -> Any:
                first, second = (b.fmul(value, share(place, n)) for n, value in enumerate(pair))
                return b.fadd(first, second)

            def real(pixel: Any) -> Any:
                return b.sitofp(b.zext(load(b, stored, pixel, at), vec(i32, width)), floats_of)

            lines = [mixed([real(pixel) for pixel in line], factors) for line in unrolled]
            return mixed(lines, row_factors)

        if operation == "max":
            store(b, reduce(const(stored, 0), larger), out, at)
            return
        if operation == "bilinear":
            value = bilinear()
        else:
            short, wide = vec(i16, width), vec(i32, width)
            if sums == "window":  # fits in 16 bits
                total = b.zext(reduce(const(short, 0), summed), wide)
            elif sums == "row":  # each row does

                def row(total: Any, line: Any) -> Any:
                    return b.add(total, b.zext(each_column(line, const(short, 0), summed), wide))

                total = each_row(const(wide, 0), row)
            else:
                total = reduce(const(wide, 0), summed)
            taps = b.trunc(b.mul(down_count, across_count), i32)
            steps = b.sub(total, splat(b, b.mul(taps, zx), width))
            value = b.fmul(b.sitofp(steps, floats_of), splat(b, load(b, f32, factors), width))
        store(b, emit_rounded(b, value, lo, hi, zp, kind, bool(bounded)), out, at)

    largest = widest() if operation == "bilinear" else WIDTHS[0]
    emit_line(b, count, body, [width for width in WIDTHS if width <= largest])


@intrinsic(prefer_literal=True)
def _window(
    typingctx: Any,
    config: Any,
    args: Any,
    x: Any,
    out: Any,
    down: Any,
    across: Any,
    down_count: Any,
    across_count: Any,
    factors: Any,
    row_factors: Any,
    count: Any,
) -> Any:
    settings = tuple(t.literal_value for t in config.types[:-1])
    signature = types.void(config, args, *[types.int64] * 9)

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        block = b.inttoptr(b.ptrtoint(values[1], i64), ptr)
        x, out, down, across = (b.inttoptr(v, ptr) for v in values[2:6])
        place = x, out, down, across, *values[6:8], *(b.inttoptr(v, ptr) for v in values[8:10])
        emit_window(b, settings, fields_of(b, block), place, values[10])
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def windows_kernel(
    operation: Operation,
    kind: str,
    taps_down: int,
    taps_across: int,
    sums: str = "",
    bounded: bool = True,
) -> Any:
    """kind "u8" or "u8x2"; taps 0 for a loop over the tables' counts, else unrolled.

    sums, of "sum": "window", "row" or "tap", by what fits in 16 bits; bounded: see emit_rounded.
    """
    config = (operation, kind, taps_down, taps_across, sums, int(bounded), sources_digest())
    item = ITEM_BYTES[kind]

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        height, width = args[HEIGHT], args[WIDTH]
        blocks = (args[CHANNELS] + args[BLOCK] - 1) // args[BLOCK]
        rows, columns = pointer(args[COUNT_ROWS], "s64"), pointer(args[COUNT_COLUMNS], "s64")
        for task in range(begin, end):
            first = task % blocks * args[BLOCK]
            row = task // blocks % height
            image = task // (blocks * height)
            count = min(args[BLOCK], args[CHANNELS] - first)
            x = args[X] + image * args[X_IMAGE] + first * item
            out = args[OUT] + image * args[OUT_IMAGE] + row * args[OUT_ROW] + first * item
            down = args[TAP_ROWS] + 8 * row * args[KERNEL_ROWS]
            across = args[TAP_COLUMNS]
            factors = args[FACTORS] + row * args[FACTORS_ROW]
            row_factors = args[ROW_FACTORS] + 8 * row
            for column in range(width):
                _window(
                    config, args, x, out, down, across, rows[row], columns[column],
                    factors, row_factors, count,
                )  # fmt: skip
                out += args[OUT_PIXEL]
                across += 8 * args[KERNEL_COLUMNS]
                factors += args[FACTORS_PIXEL]

    return kernel


@dataclass(frozen=True, eq=False)
class Windows:
    """The taps of an axis: positions (n, K), of which the first counts (n,) lie in the input.

    The others repeat one of them; sizes (n,) are what torch counts with the padding.
    """

    taps: NDArray[np.int64]
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]


def pool_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False
) -> int:
    """How many windows a pooling has along an axis, as torch counts."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - int(ceil_mode and (count - 1) * stride >= size + padding)


def pool_windows(
    size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False
) -> Windows:
    """The windows of torch's pooling along an axis."""
    start = (
        np.arange(pool_size(size, kernel, stride, padding, dilation, ceil_mode)) * stride - padding
    )
    taps = start[:, None] + np.arange(kernel) * dilation
    valid = (taps >= 0) & (taps < size)
    sizes = np.minimum(start + kernel, size + padding) - start
    return _windows(taps, valid, sizes)


def adaptive_windows(size: int, count: int) -> Windows:
    """The windows of torch's adaptive pooling along an axis."""
    i = np.arange(count)
    first, last = i * size // count, -(-(i + 1) * size // count)
    taps = first[:, None] + np.arange((last - first).max(initial=0))
    return _windows(taps, taps < last[:, None], last - first)


def _windows(taps: NDArray[Any], valid: NDArray[Any], sizes: NDArray[Any]) -> Windows:
    order = np.argsort(~valid, axis=1, kind="stable")  # those in the input first
    taps, valid = np.take_along_axis(taps, order, 1), np.take_along_axis(valid, order, 1)
    counts = valid.sum(axis=1)
    if taps.size:
        taps = np.where(valid, taps, taps[:, :1])
    return Windows(taps.astype(np.int64), counts.astype(np.int64), sizes.astype(np.int64))


def nearest_windows(size: int, count: int, scale_factor: float | None = None) -> Windows:
    """The one tap of each position of torch's mode "nearest"."""
    step = _step(size, count, scale_factor)
    if count in (size, 2 * size):  # whatever the factor says
        step = np.float32(size / count)
    taps = np.clip(np.floor(np.arange(count).astype(np.float32) * step), 0, size - 1)
    return _windows(taps[:, None].astype(np.int64), np.ones((count, 1), bool), np.ones(count))


def bilinear_windows(
    size: int, count: int, align_corners: bool, scale_factor: float | None = None
) -> tuple[Windows, NDArray[np.float32]]:
    """The two taps of each position of torch's mode "bilinear", and their shares (count, 2)."""
    one, half = np.float32(1), np.float32(0.5)
    i = np.arange(count).astype(np.float32)
    if count == size:
        where = i
    elif align_corners:
        where = i * (np.float32(size - 1) / np.float32(max(count - 1, 1)))
    else:
        where = np.maximum((i + half) * _step(size, count, scale_factor) - half, np.float32(0))
    low = np.clip(np.floor(where), 0, size - 1).astype(np.int64)
    share = np.clip(where - low.astype(np.float32), 0, one)
    taps = np.stack([low, np.minimum(low + 1, size - 1)], axis=1)
    windows = _windows(taps, np.ones((count, 2), bool), np.ones(count))
    return windows, np.stack([one - share, share], axis=1)


def _step(size: int, count: int, scale_factor: float | None) -> np.float32:
    """Input positions from one output position to the next."""
    if scale_factor is not None:
        return np.float32(1 / scale_factor)
    return np.float32(size) / np.float32(max(count, 1))


def _windows_row(
    call: Call,
    operation: Operation,
    x: View,
    out: View,
    rows: Windows,
    columns: Windows,
    values: dict[int, int],
    places: dict[int, Place],
    largest_factor: float = 0.0,
) -> None:
    """Appends a row; values and places are those of the operation."""
    images, height, width, channels = out.shape
    tasks = images * height
    if out.shape != (x.shape[0], len(rows.taps), len(columns.taps), x.shape[3]):
        raise ValueError(
            f"{operation}: out {out.shape} of x {x.shape}; wanted "
            f"{(x.shape[0], len(rows.taps), len(columns.taps), x.shape[3])}"
        )
    if not tasks * width * channels:
        return
    taps = (rows.taps.shape[1], columns.taps.shape[1])
    most = rows.counts.max() * columns.counts.max()
    if most > MAX_TAPS:
        raise ValueError(f"{operation}: {most} pixels in a window; wanted up to {MAX_TAPS}")
    full = operation != "sum" or bool(
        (rows.counts == taps[0]).all() and (columns.counts == taps[1]).all()
    )
    if operation != "sum":
        most = taps[0] * taps[1]
    sums = ""
    if operation == "sum":
        sums = "window" if most <= SHORT_TAPS else "row" if taps[1] <= SHORT_TAPS else "tap"
    bounded = bool(255.0 * most * largest_factor <= MAX_BOUNDED)
    unrolled = taps if full and taps[0] * taps[1] <= UNROLLED else (0, 0)
    counts = (
        [rows.counts, columns.counts]
        if operation == "sum"
        else [np.full(n, k, np.int64) for n, k in zip((height, width), taps, strict=True)]
    )
    block = channels
    wanted = 4 * executor.get_num_threads()
    if tasks < wanted:  # whole vectors of channels, to occupy all threads
        block = max(-(-channels * tasks // wanted // 32) * 32, 32)
    tasks *= -(-channels // block)
    reads = images * height * width * channels * most
    call.row(
        windows_kernel(operation, x.kind, *unrolled, sums, bounded),
        FIELDS,
        tasks,
        {
            X_IMAGE: x.strides[0],
            OUT_IMAGE: out.strides[0],
            OUT_ROW: out.strides[1],
            OUT_PIXEL: out.strides[2],
            HEIGHT: height,
            WIDTH: width,
            CHANNELS: channels,
            BLOCK: block,
            KERNEL_ROWS: taps[0],
            KERNEL_COLUMNS: taps[1],
            **values,
        },
        {
            X: x.place,
            OUT: out.place,
            TAP_ROWS: rows.taps * x.strides[1],
            TAP_COLUMNS: columns.taps * x.strides[2],
            COUNT_ROWS: counts[0],
            COUNT_COLUMNS: counts[1],
            **places,
        },
        float(reads) * x.item / BYTES_PER_NANOSECOND,
    )


def _requantized(zero_point: int, qmin: int, qmax: int, x_zero_point: int = 0) -> dict[int, Place]:
    floats = float_parameters(zero_point, qmin, qmax)
    return {FLOATS: floats, INTS: int_parameters(zero_point, x_zero_point)}


def max_windows_row(call: Call, x: View, out: View, rows: Windows, columns: Windows) -> None:
    """Appends the largest of each window: max_pool2d, adaptive_max_pool2d, upsample_nearest2d."""
    if not rows.counts.all() or not columns.counts.all():
        raise ValueError("max_pool2d: a window misses x; wanted less padding or dilation")
    _windows_row(call, "max", x, out, rows, columns, {}, _requantized(0, 0, 255))


def mean_windows_row(
    call: Call,
    x: View,
    out: View,
    rows: Windows,
    columns: Windows,
    counts: NDArray[np.int64],
    multiplier: float = 1.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends the mean of each window, counts (OH, OW): avg_pool2d, adaptive_avg_pool2d."""
    factors = np.ascontiguousarray(np.float32(multiplier) / counts.astype(np.float32))
    places = _requantized(zero_point, qmin, qmax, x_zero_point) | {FACTORS: factors}
    values = {FACTORS_ROW: factors.strides[0], FACTORS_PIXEL: factors.strides[1]}
    largest = np.abs(factors).max(initial=0.0)
    _windows_row(call, "sum", x, out, rows, columns, values, places, largest)


def max_pool2d_row(
    call: Call,
    x: View,
    out: View,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
) -> None:
    """Appends reference.max_pool2d."""
    rows, columns = (
        pool_windows(x.shape[1 + a], kernel_size[a], stride[a], padding[a], dilation[a], ceil_mode)
        for a in (0, 1)
    )
    max_windows_row(call, x, out, rows, columns)


def avg_pool2d_row(
    call: Call,
    x: View,
    out: View,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    multiplier: float = 1.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.avg_pool2d."""
    rows, columns = (
        pool_windows(x.shape[1 + a], kernel_size[a], stride[a], padding[a], 1, ceil_mode)
        for a in (0, 1)
    )
    sizes = [w.sizes if count_include_pad else w.counts for w in (rows, columns)]
    counts = np.multiply.outer(*sizes)
    if divisor_override is not None:
        counts = np.full_like(counts, divisor_override)
    mean_windows_row(
        call, x, out, rows, columns, counts,
        multiplier, x_zero_point, zero_point, qmin, qmax,
    )  # fmt: skip


def adaptive_max_pool2d_row(call: Call, x: View, out: View) -> None:
    """Appends reference.adaptive_max_pool2d to the size of out."""
    rows, columns = (adaptive_windows(x.shape[a], out.shape[a]) for a in (1, 2))
    max_windows_row(call, x, out, rows, columns)


def adaptive_avg_pool2d_row(
    call: Call,
    x: View,
    out: View,
    multiplier: float = 1.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.adaptive_avg_pool2d to the size of out; (1, 1) is the mean over H and W."""
    rows, columns = (adaptive_windows(x.shape[a], out.shape[a]) for a in (1, 2))
    counts = np.multiply.outer(rows.sizes, columns.sizes)
    mean_windows_row(
        call, x, out, rows, columns, counts,
        multiplier, x_zero_point, zero_point, qmin, qmax,
    )  # fmt: skip


def upsample_nearest2d_row(
    call: Call,
    x: View,
    out: View,
    scale_factor: tuple[float, float] | None = None,
) -> None:
    """Appends reference.upsample_nearest2d to the size of out."""
    scales = scale_factor or (None, None)
    rows, columns = (nearest_windows(x.shape[a], out.shape[a], scales[a - 1]) for a in (1, 2))
    max_windows_row(call, x, out, rows, columns)


def upsample_bilinear2d_row(
    call: Call,
    x: View,
    out: View,
    align_corners: bool = False,
    scale_factor: tuple[float, float] | None = None,
) -> None:
    """Appends reference.upsample_bilinear2d to the size of out."""
    (rows, down), (columns, across) = (
        bilinear_windows(
            x.shape[a], out.shape[a], align_corners, scale_factor and scale_factor[a - 1]
        )
        for a in (1, 2)
    )
    places = _requantized(0, 0, 255) | {FACTORS: across, ROW_FACTORS: down}
    values = {FACTORS_ROW: 0, FACTORS_PIXEL: 8}
    _windows_row(call, "bilinear", x, out, rows, columns, values, places)
