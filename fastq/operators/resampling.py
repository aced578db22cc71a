"""Images at other places, in NumPy: torch's interpolation between pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastq.operators.dtypes import Array

CUBIC = -0.75  # torch's a in the cubic convolution of Keys (IEEE ASSP, 1981)
WIDE_CUBIC = -0.5  # the same where an image is antialiased, as Pillow's
KINDS = "bilinear", "nearest", "bicubic"  # in the order of grid_sampler's numbers
EDGES = "zeros", "border", "reflection"


def resampled(
    x: Array,
    size: Sequence[int] | None,
    kind: str,
    align_corners: bool = False,
    factors: Sequence[float] | None = None,
    antialias: bool = False,
) -> Array:
    """Lines, images or volumes (B, C, ...) of another size, by torch's F.interpolate.

    size           of each axis; None for x's times the factors, rounded down.
    kind           of KINDS, or "nearest-exact".
    align_corners  whether the corners' pixels stay where they are.
    factors        of each axis: pixels are as far apart as these say, not the sizes.
    antialias      whether a smaller image's pixels are sums of all between them.
    """
    # an axis of the same size stays as it is then, whatever its factor
    stays = antialias or kind == "bilinear" or (kind == "nearest" and x.ndim == 4)
    for i, axis in enumerate(range(2, x.ndim)):
        n, factor = x.shape[axis], factors[i] if factors else 0.0
        count = math.floor(n * factor) if size is None else size[i]
        if count == n and stays:
            continue
        step = _step(n, count, align_corners, factor)
        step, number = x.dtype.type(step), np.arange(count, dtype=x.dtype)
        if antialias:
            taps = _wide_taps((number + 0.5) * step, n, max(step, x.dtype.type(1)), kind)
        else:
            taps = _taps(_between(number, step, kind, align_corners), kind)
        x = sum(  # type: ignore[assignment]
            x.take(pixels.clip(0, n - 1), axis) * share.reshape(-1, *[1] * (x.ndim - 1 - axis))
            for pixels, share in taps
        )
    return x


def _step(n: int, count: int, align_corners: bool, factor: float) -> float:
    """How far apart so many pixels are that are made of n."""
    if align_corners:
        return (n - 1) / (count - 1) if count > 1 else 0.0
    return 1 / factor if factor else n / count


def _between(number: Array, step: Any, kind: str, align_corners: bool) -> Array:
    """Where the new pixels are, in the old ones' numbers."""
    if kind == "nearest":
        return np.floor(number * step)
    if kind == "nearest-exact":
        return np.floor((number + 0.5) * step)
    places = number * step if align_corners else (number + 0.5) * step - 0.5
    return np.maximum(places, 0) if kind == "bilinear" else places


def _wide_taps(centers: Array, n: int, width: Any, kind: str) -> list[tuple[Array, Array]]:
    """The same of an antialiased image, where kernels are `width` as wide. A pixel of n is from its
    number to the next; one that is out of reach has no share, and is another's."""
    reach, share = (1, _linear) if kind == "bilinear" else (2, partial(_cubic, a=WIDE_CUBIC))
    first = (centers - reach * width + 0.5).astype(np.int64).clip(0)
    last = (centers + reach * width + 0.5).astype(np.int64).clip(None, n) - 1
    pixels = first + np.arange((last - first).max() + 1)[:, None]
    shares = share(np.abs(pixels + 0.5 - centers) / width) * (pixels <= last)
    shares = (shares / shares.sum(0)).astype(centers.dtype)
    return [*zip(np.minimum(pixels, last), shares, strict=True)]


def _linear(d: Array) -> Array:
    """The share of a pixel that is so far away, 0 to 1; further away it has none."""
    return np.maximum(1 - d, 0)


def _taps(places: Array, kind: str) -> list[tuple[Array, Array]]:
    """The pixels that a value between pixels is a sum of, with their shares."""
    if kind.startswith("nearest"):
        return [(np.rint(places).astype(np.int64), np.ones_like(places))]
    whole = np.floor(places)
    t, first = places - whole, whole.astype(np.int64)
    if kind == "bilinear":
        return [(first, 1 - t), (first + 1, t)]
    return [(first + i, _cubic(np.abs(t - i))) for i in (-1, 0, 1, 2)]


def _cubic(d: Array, a: float = CUBIC) -> Array:
    """The share of a pixel that is so far away, 0 to 2; further away it has none."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, d.dtype.type(0)))


def grid_sampled(x: Array, grid: Array, kind: str, edges: str, align_corners: bool) -> Array:
    """Images (B, C, H, W) at the places (B, h, w, 2), x first, -1 to 1: torch's F.grid_sample.

    kind, edges  of KINDS and EDGES.
    """
    axes = []  # for each, the pixels and their shares, (B, h, w)
    for axis, place in ((2, grid[..., 1]), (3, grid[..., 0])):
        n = x.shape[axis]
        place = (place + 1) / 2 * (n - 1) if align_corners else ((place + 1) * n - 1) / 2
        place = _inside(place, n, edges, align_corners) if kind != "bicubic" else place
        taps = []
        for pixels, weights in _taps(place, kind):
            if edges == "zeros":
                weights = weights * ((pixels >= 0) & (pixels < n))
            elif kind == "bicubic":
                pixels = _inside(pixels, n, edges, align_corners).astype(np.int64)
            taps.append((pixels.clip(0, n - 1), weights.astype(x.dtype)))
        axes.append(taps)
    of_image = np.arange(len(x))[:, None, None]
    lines = np.moveaxis(x, 1, -1)
    y = sum(
        lines[of_image, rows, columns] * (a * b)[..., None]
        for rows, a in axes[0]
        for columns, b in axes[1]
    )
    return np.moveaxis(np.asarray(y), -1, 1)


def _inside(place: Array, n: int, edges: str, align_corners: bool) -> Array:
    """A place among n pixels, for one that is none; where the edges are zeros, what it was."""
    if edges == "zeros":
        return place
    if edges == "reflection":
        least, span = (0.0, n - 1) if align_corners else (-0.5, n)
        far = np.abs(place - least) % (2 * span) if span else np.zeros_like(place)
        place = np.minimum(far, 2 * span - far) + least
    return np.clip(place, 0, n - 1)


def _resized(kind: str, antialias: bool = False) -> Callable[..., Array]:
    """The operator, whose factors are a list, or one after the other."""

    def run(x: Array, size: Any, align_corners: bool, *factors: Any) -> Array:
        given = factors[0] if factors and isinstance(factors[0], list | tuple) else factors
        some = given if given and given[0] is not None else None
        return resampled(x, size, kind, align_corners, some, antialias)

    return run


def _nearest(kind: str) -> Callable[..., Array]:
    """The same without corners."""
    run = _resized(kind)
    return lambda x, size, *factors: run(x, size, False, *factors)


def _affine_grid(theta: Array, size: Sequence[int], align_corners: bool) -> Array:
    """(B, ..., n): where matrices (B, n, n + 1) move the pixels of (B, C, ...), x first."""
    axes = []
    for n in size[2:]:
        line = np.linspace(-1, 1, n) if n > 1 else np.zeros(n)
        axes.append(line if align_corners else line * (n - 1) / n)
    grid = np.meshgrid(*axes, indexing="ij")[::-1]
    base = np.stack([*grid, np.ones(size[2:])], -1).astype(theta.dtype)
    moved = base.reshape(-1, theta.shape[2]) @ theta.mT
    return moved.reshape(len(theta), *size[2:], theta.shape[1])


def _grid_sampler(x: Array, grid: Array, kind: int, edges: int, align_corners: bool) -> Array:
    if x.ndim != 4:
        raise ValueError(f"grid_sampler of {x.shape}; fastq.load runs it with torch")
    return grid_sampled(x, grid, KINDS[kind], EDGES[edges], align_corners)


OPERATORS: dict[str, Callable[..., Any]] = {
    **{f"{name}.vec {name}.default": function for name, function in {
        "upsample_nearest1d": _nearest("nearest"),
        "upsample_nearest2d": _nearest("nearest"),
        "upsample_nearest3d": _nearest("nearest"),
        "_upsample_nearest_exact1d": _nearest("nearest-exact"),
        "_upsample_nearest_exact2d": _nearest("nearest-exact"),
        "_upsample_nearest_exact3d": _nearest("nearest-exact"),
        "upsample_linear1d": _resized("bilinear"),
        "upsample_bilinear2d": _resized("bilinear"),
        "upsample_trilinear3d": _resized("bilinear"),
        "upsample_bicubic2d": _resized("bicubic"),
        "_upsample_bilinear2d_aa": _resized("bilinear", antialias=True),
        "_upsample_bicubic2d_aa": _resized("bicubic", antialias=True),
    }.items()},
    "affine_grid_generator.default": _affine_grid,
    "grid_sampler.default": _grid_sampler,
}  # fmt: skip
