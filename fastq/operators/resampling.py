"""Images at other places, in NumPy: torch's interpolation between pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastq.operators.dtypes import Array

CUBIC = -0.75  # torch's a in the cubic convolution of Keys (IEEE ASSP, 1981)
KINDS = "bilinear", "nearest", "bicubic"  # in the order of grid_sampler's numbers
EDGES = "zeros", "border", "reflection"


def resampled(
    x: Array,
    size: Sequence[int] | None,
    kind: str,
    align_corners: bool = False,
    factors: Sequence[float] | None = None,
) -> Array:
    """Images (B, C, H, W) of another size, by torch's F.interpolate.

    size           (height, width); None for the image's times the factors, rounded down.
    kind           of KINDS.
    align_corners  whether the corners' pixels stay where they are.
    factors        of height and width: pixels are as far apart as these say, not the sizes.
    """
    for i, axis in enumerate((2, 3)):
        n, factor = x.shape[axis], factors[i] if factors else 0.0
        count = math.floor(n * factor) if size is None else size[i]
        step = (n - 1) / max(count - 1, 1) if align_corners else 1 / factor if factor else n / count
        step, number = x.dtype.type(step), np.arange(count, dtype=x.dtype)
        if kind == "nearest":
            places = np.floor(number * step)
        else:
            places = number * step if align_corners else (number + 0.5) * step - 0.5
        if kind == "bilinear":
            places = np.maximum(places, 0)
        x = sum(  # type: ignore[assignment]
            x.take(pixels.clip(0, n - 1), axis) * share.reshape(-1, *[1] * (3 - axis))
            for pixels, share in _taps(places, kind)
        )
    return x


def _taps(places: Array, kind: str) -> list[tuple[Array, Array]]:
    """The pixels that a value between pixels is a sum of, with their shares."""
    if kind == "nearest":
        return [(np.rint(places).astype(np.int64), np.ones_like(places))]
    whole = np.floor(places)
    t, first = places - whole, whole.astype(np.int64)
    if kind == "bilinear":
        return [(first, 1 - t), (first + 1, t)]
    return [(first + i, _cubic(np.abs(t - i))) for i in (-1, 0, 1, 2)]


def _cubic(d: Array) -> Array:
    """The share of a pixel that is so far away, 0 to 2."""
    near = ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
    far = CUBIC * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, far)


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


def _bicubic(x: Array, size: Any, align_corners: bool, factors: Any = None, *rest: Any) -> Array:
    """The factors are a list, or one after the other."""
    return resampled(x, size, "bicubic", align_corners, (factors, *rest) if rest else factors)


def _grid_sampler(x: Array, grid: Array, kind: int, edges: int, align_corners: bool) -> Array:
    if x.ndim != 4:
        raise ValueError(f"grid_sampler of {x.shape}; fastq.load runs it with torch")
    return grid_sampled(x, grid, KINDS[kind], EDGES[edges], align_corners)


OPERATORS: dict[str, Callable[..., Any]] = {
    "upsample_bicubic2d.vec upsample_bicubic2d.default": _bicubic,
    "grid_sampler.default": _grid_sampler,
}
