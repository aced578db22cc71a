"""What the tests of whole-array operations share: views with canaries around them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import numpy as np
from numpy.testing import assert_array_equal

from fastq.kernels.call import Call, View

CANARY = 0xA5
KINDS = {"u8": np.uint8, "u8x2": np.int16, "f32": np.float32}


def u8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Full-range uint8, the ends more often than by chance."""
    return rng.choice(np.r_[0, 255, np.arange(256)].astype(np.uint8), shape)


def view(array: np.ndarray) -> View:
    kind = next(kind for kind, dtype in KINDS.items() if array.dtype == dtype)
    return View(array, array.shape, array.strides, kind)


def bordered(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(whole, inner): a copy of the values inside a larger array that holds canaries."""
    dtype = KINDS[kind]
    whole = np.full([size + 3 for size in values.shape], CANARY, dtype)
    inner = whole[(..., *(slice(1, 1 + size) for size in values.shape))]
    inner[...] = values
    return whole, inner


def check_row(
    kind: str, want: np.ndarray, inputs: list[np.ndarray], row: Callable[..., None],
    in_place: bool = False,
) -> None:  # fmt: skip
    """row(call, *inputs, out) on strided views writes `want`, and nothing around it."""
    views = [bordered(x, kind)[1] for x in inputs]
    whole, out = bordered(np.zeros_like(want), kind)
    if in_place:
        whole, out = bordered(inputs[0], kind)
        views[0] = out
    call = Call(0)
    row(call, *map(view, views), view(out))
    call.run()
    assert_array_equal(out, want)
    out[...] = CANARY
    assert (whole == CANARY).all()


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last before a page that must not be touched."""
    page = mmap.PAGESIZE
    pages = -(-max(array.nbytes, 1) // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    protect = libc.mprotect(ctypes.c_void_p(base + pages * page), page, 0)
    assert protect == 0
    whole = np.frombuffer(memory, np.uint8)
    tail = whole[pages * page - array.nbytes : pages * page]
    copy = tail.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
