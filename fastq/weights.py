"""Canonical int8 weights and the geometry of a convolution. Panels packed for a machine are a
derived cache on these objects: built at the first use, never pickled, never saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.qparams import FLT_MAX, MAX_K

Pair = int | tuple[int, int]
Padding = int | str | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]


def _weight(where: str, data: Any, ndim: int, layout: str) -> NDArray[np.int8]:
    array = np.asarray(data)
    if array.dtype != np.int8 or array.ndim != ndim:
        raise TypeError(
            f"{where}: weight {array.shape} {array.dtype}; wanted int8 {layout}. "
            "quantize_weight(w) turns a float32 weight into int8 data and scales"
        )
    if array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")  # a later write to the caller's array must not matter
        array.flags.writeable = False
    return array


def check_k(where: str, k: int) -> None:
    """ValueError for more products in a sum than int32 has room for."""
    if k > MAX_K:
        raise ValueError(
            f"{where}: K={k} products are summed into int32, which is exact up to K={MAX_K}; "
            "split the layer along its inputs and add the float outputs"
        )


_DERIVED = "panels", "checked"


class _Panels:
    """What is shared by both weights: what was packed, and calls that were checked. Both are left
    out of pickles; the second is no field of theirs. Nobody wants to read all values of `data`."""

    data: NDArray[np.int8]
    panels: dict[Any, Any]
    checked: dict[Any, Any]

    def __repr__(self) -> str:
        shown = {name: v for name, v in vars(self).items() if name not in ("data", *_DERIVED)}
        geometry = "".join(f", {name}={value}" for name, value in sorted(shown.items()))
        return f"{type(self).__name__}(int8 {self.data.shape}{geometry})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **{name: {} for name in _DERIVED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True, eq=False, repr=False)
class LinearWeight(_Panels):
    """int8 weight of a linear layer, (N, K) as in torch.nn.Linear: N outputs, K inputs.

    The array is copied, unless it is contiguous and read-only.

    Raises TypeError unless int8 (N, K), ValueError if K is beyond the int32 bound (65,793).
    """

    data: NDArray[np.int8]
    panels: dict[Any, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "checked", {})
        object.__setattr__(self, "data", _weight("LinearWeight", self.data, 2, "(N, K)"))
        check_k("LinearWeight", self.k)

    @property
    def n(self) -> int:
        return self.data.shape[0]

    @property
    def k(self) -> int:
        return self.data.shape[1]


LARGEST = 2**20  # of a stride, a padding or a dilation: products of sizes stay within int64
WORDS = ("no", "one", "two", "three", "four", "five", "six")


def several(name: str, value: Any, count: int, least: int, hint: str = "") -> tuple[int, ...]:
    """An int or so many ints as a tuple of them, each from `least` to LARGEST."""
    each: Any = (value,) * count if isinstance(value, int | np.integer) else value
    if (
        not isinstance(each, tuple | list)
        or len(each) != count
        or not all(isinstance(v, int | np.integer) and least <= v <= LARGEST for v in each)
    ):
        raise ValueError(
            f"{name}: got {value!r}, wanted an int or {WORDS[count]} ints, at least {least}, at "
            f"most {LARGEST}{hint}"
        )
    return tuple(int(v) for v in each)


def pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    """An int or a pair of ints as a pair, each from `least` to LARGEST."""
    first, second = several(name, value, 2, least)
    return first, second


def explicit_padding(
    padding: Padding | tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    name: str = "padding",
) -> tuple[tuple[int, int], ...]:
    """Any accepted padding as (before, after) of each axis: ((top, bottom), (left, right)). name:
    what an error calls it."""
    axes = len(kernel)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * axes
        if padding != "same":
            raise ValueError(f"{name}: got {padding!r}, wanted 'same', 'valid' or numbers")
        if set(stride) != {1}:
            raise ValueError(
                f"{name}='same' wants stride 1, got {stride}; numbers go with any stride"
            )
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)  # torch puts the odd one at the end
    if isinstance(padding, tuple | list) and any(isinstance(p, tuple | list) for p in padding):
        if len(padding) != axes:
            raise ValueError(f"{name}: got {padding!r}, wanted ((top, bottom), (left, right))")
        return tuple(pair(name, sides, 0) for sides in padding)  # type: ignore[arg-type]
    hint = "; or ((top, bottom), (left, right))"
    return tuple((p, p) for p in several(name, padding, axes, 0, hint))


def outputs_first(weight: Any, groups: int) -> Any:
    """A transposed convolution's weight (C, N / groups, ...), an array or a tensor, as
    (N, C / groups, ...); and back."""
    c, n, *kernel = weight.shape
    split = weight.reshape(groups, c // groups, n, *kernel).swapaxes(1, 2)
    return split.reshape(groups * n, c // groups, *kernel)


def per_output(values: Any, ndim: int) -> Any:
    """Values (N,), an array or a tensor, shaped to broadcast with a weight of so many axes whose
    outputs are first."""
    return values.reshape(-1, *[1] * (ndim - 1))


def scale_outputs(weight: Any, factor: Any, groups: int = 0) -> Any:
    """A weight times a factor for each of its outputs; groups: of a transposed convolution."""
    first = outputs_first(weight, groups) if groups else weight
    first = first * per_output(factor, first.ndim)
    return outputs_first(first, groups) if groups else first


MAX_BIAS = 2**30  # steps of the sums, whose products have the other half of int32 in most layers


def with_room(data: Any, scale: Any, bias: Any, x_scale: float) -> tuple[Any, Any]:
    """An int8 weight and the scales of its outputs, coarser by a power of 2 for those whose bias
    would be beyond MAX_BIAS steps: where an input, or a filter, is nearly zero.

    What the products lose is nothing next to such a bias: half a step of a weight times 255 is
    2**-22 of it, for each of the K products at most, and of both signs.
    """
    steps = np.abs(bias.astype(np.float64)) / (x_scale * scale.astype(np.float64))
    exponent = np.maximum(np.frexp(steps / MAX_BIAS)[1], 0)
    if not exponent.any():
        return data, scale
    factor = np.ldexp(1.0, exponent)
    coarse = np.rint(data / per_output(factor, data.ndim)).astype(np.int8)
    return coarse, np.minimum(scale * factor, FLT_MAX).astype(np.float32)


@dataclass(frozen=True, eq=False, repr=False)
class Conv2dWeight(_Panels):
    """int8 weight of a convolution and its geometry; the weight as in torch.nn.Conv2d.

    data      int8 (N, C / groups, KH, KW).
    stride    int or (sh, sw), at least 1.       dilation  int or (dh, dw), at least 1.
    padding   int, (ph, pw), ((top, bottom), (left, right)), 'same' or 'valid'; kept as the third.
    groups    divides C and N.

    Raises TypeError unless int8 with four axes, ValueError for an impossible geometry or
    for C / groups * KH * KW beyond the int32 bound (65,793).
    """

    data: NDArray[np.int8]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    panels: dict[Any, Any] = field(default_factory=dict)

    def __init__(
        self,
        data: Any,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
    ) -> None:
        array = _weight("Conv2dWeight", data, 4, "(N, C/groups, KH, KW)")
        n, c_group, kh, kw = array.shape
        whole = isinstance(groups, int | np.integer)
        if not whole or groups < 1 or n % groups or min(kh, kw) < 1:
            raise ValueError(
                f"Conv2dWeight: weight {array.shape} with groups={groups}; "
                "wanted an int >= 1 that divides N, and KH, KW >= 1"
            )
        check_k("Conv2dWeight", c_group * kh * kw)
        put = object.__setattr__
        put(self, "data", array)
        put(self, "stride", pair("Conv2dWeight: stride", stride, 1))
        put(self, "dilation", pair("Conv2dWeight: dilation", dilation, 1))
        put(self, "groups", int(groups))
        walk = self.kernel_size, self.stride, self.dilation
        put(self, "padding", explicit_padding(padding, *walk, "Conv2dWeight: padding"))
        put(self, "panels", {})
        put(self, "checked", {})

    @property
    def n(self) -> int:
        return self.data.shape[0]

    @property
    def c(self) -> int:
        return self.data.shape[1] * self.groups

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.data.shape[2], self.data.shape[3]

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """(OH, OW) for an input of h x w pixels; ValueError where the kernel does not fit."""
        (_, _, kh, kw), (sh, sw), (dh, dw) = self.data.shape, self.stride, self.dilation
        (top, bottom), (left, right) = self.padding
        rows = h + top + bottom - dh * (kh - 1) - 1
        columns = w + left + right - dw * (kw - 1) - 1
        if rows < 0 or columns < 0:
            raise ValueError(
                f"conv2d: input {h}x{w} with padding {self.padding} is smaller than the "
                f"kernel {self.kernel_size} with dilation {self.dilation}"
            )
        return rows // sh + 1, columns // sw + 1
