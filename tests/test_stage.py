"""Float images become padded uint8 ones: every order in memory, width and channel, to the bit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rows import CANARY, KINDS, guarded, view

from fastq import reference
from fastq.kernels import lines, stage
from fastq.kernels.assembly import assembly_of
from fastq.kernels.call import Call, View, dense_strides
from fastq.kernels.layers import stage_image

Array = np.ndarray[Any, Any]
SCALE, ZERO_POINT = np.float32(0.037), 99
PADDING = (1, 2, 3, 0)  # top, bottom, left, right


def floats(rng: Any, *shape: int) -> Array:
    """About as wide as the quantized range, with ties and what is no finite number."""
    x = (rng.normal(size=shape) * 100 * SCALE).astype(np.float32)
    ties = (rng.integers(-300, 300, shape) + 0.5) * SCALE
    x = np.where(rng.random(shape) < 0.3, ties, x).astype(np.float32)
    odd = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0], np.float32)
    return np.where(rng.random(shape) < 0.1, rng.choice(odd, shape), x).astype(np.float32)


def check_image(
    x: Array, whole: int, kind: str, padding: tuple[int, ...] = PADDING, scale: Any = SCALE,
    keep: Callable[[Array], Array] = np.array,
) -> None:  # fmt: skip
    """x (B, H, W, C), any strides, staged to `whole` channels; keep copies the output's memory."""
    top, bottom, left, right = padding
    batch, h, w, c = x.shape
    shape = (batch, h + top + bottom, w + left + right, whole)
    want = np.full(shape, ZERO_POINT)
    inner = want[:, top : top + h, left : left + w]
    inner[..., :c] = reference.quantize(x, scale=scale, zero_point=ZERO_POINT)
    inner[..., c:] = 0
    out = keep(np.full(want.size, CANARY, KINDS[kind]))
    call = Call(0)
    target = View(out, shape, dense_strides(shape, out.itemsize), kind)
    parameters = np.array([scale], np.float32), np.array([ZERO_POINT], np.int32)
    stage_image(call, view(x), target, (top, left), *parameters)
    call.run()
    assert_array_equal(out.reshape(shape), want)


def check_grid(
    x: Array, whole: int, kind: str, padding: tuple[int, ...] = PADDING,
    keep: Callable[[Array], Array] = np.array,
) -> None:  # fmt: skip
    """The same with a factor and a shift for each channel."""
    top, bottom, left, right = padding
    batch, h, w, c = x.shape
    shape = (batch, h + top + bottom, w + left + right, whole)
    factor = np.linspace(9, 60, c, dtype=np.float32)
    shift = np.linspace(127.5, -20.5, c, dtype=np.float32)
    want = np.full(shape, CANARY)
    want[..., :c] = reference.grid(x, factor, shift, padding=((top, bottom), (left, right)))
    out = keep(np.full(want.size, CANARY, KINDS[kind]))
    call = Call(0)
    target = View(out, shape, dense_strides(shape, out.itemsize), kind)
    stage_image(call, view(x), target, (top, left), factor, shift, grid=True)
    call.run()
    got = out.reshape(shape)
    assert_array_equal(got[..., :c], want[..., :c])
    assert (got[:, top : top + h, left : left + w, c:] == 0).all()


WIDTHS = [1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 21, 37])
def test_planes(kind: str, threads: int, rng: Any, channels: int) -> None:
    for width in WIDTHS:
        x = floats(rng, 2, channels, 3, width).transpose(0, 2, 3, 1)
        for whole in {channels, max(channels, 4), channels + 3}:
            check_image(x, whole, kind)
            check_image(x, whole, kind, (0, 0, 0, 0))
            check_grid(x, whole, kind)
            check_grid(x, whole, kind, (0, 0, 0, 0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 21, 37])
def test_pixels(kind: str, rng: Any, channels: int) -> None:
    for width in (1, 5, 33, 65):
        for whole in {channels, max(channels, 4), channels + 3}:
            check_image(floats(rng, 2, 3, width, channels), whole, kind)
            check_image(floats(rng, 2, 3, width, channels), whole, kind, (0, 0, 0, 0))
            check_grid(floats(rng, 2, 3, width, channels), whole, kind)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_strides(kind: str, rng: Any, channels: int) -> None:
    planes = floats(rng, 3, 2 * channels, 8, 70)
    x = planes[::2, ::2, ::-1, 1:67].transpose(0, 2, 3, 1)
    check_image(x, 4 if channels < 4 else channels, kind)
    check_grid(x, 4 if channels < 4 else channels, kind)
    check_image(planes[..., ::2].transpose(0, 2, 3, 1)[..., :channels], channels, kind)
    check_image(planes[..., ::-1].transpose(0, 2, 3, 1)[..., :channels], channels, kind)
    check_image(np.broadcast_to(planes[:, :1, :, :66], (3, channels, 8, 66)).transpose(0, 2, 3, 1),
                channels, kind)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 19])
def test_nothing_beyond(kind: str, rng: Any, channels: int) -> None:
    for width in WIDTHS:
        x = guarded(floats(rng, 1, channels, 2, width)).transpose(0, 2, 3, 1)
        for whole in {channels, max(channels, 4)}:
            check_image(x, whole, kind, (1, 0, 1, 0), keep=guarded)
            check_grid(x, whole, kind, (1, 0, 1, 0), keep=guarded)


@pytest.mark.parametrize("fused", [True, False], ids=["fma", "division"])
def test_any_scale(fused: bool, rng: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The quotient is that of a division: subnormal scales, huge ones, and all about the ties."""
    if not fused:
        monkeypatch.setattr(lines, "target_features", frozenset)
        monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))  # of this target alone
    elif "fma" not in lines.target_features():
        pytest.skip("this CPU lacks fma")
    stage.stage_image_kernel.cache_clear()
    lines.widest.cache_clear()
    steps = np.arange(-300, 300, dtype=np.float64) / 2
    random = np.ldexp(rng.uniform(1, 2, 60), rng.integers(-149, 120, 60))
    for scale in np.float32([1e-45, 1.2e-38, 2.0**-60, 1, 2.0**60, 3e38, *random]):
        with np.errstate(over="ignore"):
            x = (steps * np.float64(scale)).astype(np.float32)
        x = np.stack([np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))])
        check_image(x[None, :, None].transpose(0, 2, 3, 1), 3, "u8", scale=scale)
        x[:, ::50] = np.inf
        check_image(x[None, :, None], x.shape[1], "u8", scale=scale)
    stage.stage_image_kernel.cache_clear()
    lines.widest.cache_clear()


def test_assembly_of_planes() -> None:
    """64 pixels of three channels: three packs a channel, six permutations, and no division."""
    if "avx512vbmi" not in lines.target_features():
        pytest.skip("this CPU lacks avx512vbmi")
    text = assembly_of(stage.stage_image_kernel("f32", "u8", 3, 3))
    assert len(re.findall(r"vpackuswb.*%zmm", text)) == 3
    assert len(re.findall(r"vperm[it]2b.*%zmm", text)) == 6
    assert not re.search(r"vdivps.*%zmm", text)
