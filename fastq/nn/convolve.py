"""Every convolution by one of two dimensions, which is what the kernel has:

1-D         a line is an image of one row
3-D         the frames that one frame of the result reads are stacked as channels; along the
            first axis alone, each frame is one line of an image
transposed  a plain one that gives each place between two pixels a channel of its own (sub-pixel
            convolution); the channels are then put side by side
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, from_numpy
from torch.nn import functional as F

from fastq.nn.layer import address_of, array_of
from fastq.ops import Operands, conv2d_float
from fastq.weights import Conv2dWeight, outputs_first


class Geometry(NamedTuple):
    """How a convolution walks over its input.

    padding  in front and behind, axis by axis; of a transposed one, what is cut off the result.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    groups: int

    def flat(self) -> tuple[Any, ...]:
        """The arguments of `fastq::convolution`, in order."""
        return self.stride, self.padding, self.dilation, self.transposed, self.groups

    def sizes(self, spatial: Sequence[Any], kernel: Sequence[int], more: Sequence[int]) -> Any:
        """The result's sizes, for an input of these; a transposed one's are `more` longer."""
        sides = zip(self.padding[::2], self.padding[1::2], strict=True)
        axes = zip(spatial, kernel, self.stride, self.dilation, sides, more, strict=True)
        if self.transposed:
            return tuple(
                (x - 1) * s + d * (k - 1) + 1 - before - after + extra
                for x, k, s, d, (before, after), extra in axes
            )
        return tuple(
            (x + before + after - d * (k - 1) - 1) // s + 1
            for x, k, s, d, (before, after), _ in axes
        )


class _Places(NamedTuple):
    """One axis of a transposed convolution as a plain one's: y[s * i + r] = sum over t of
    w[s * t + r] * x[i - t], a channel for each r.

    taps   that the plain one has.   padding  of its input.
    skip   values of the result that are not wanted, in front.
    """

    taps: int
    padding: tuple[int, int]
    skip: int


def _places(g: Geometry, kernel: Sequence[int]) -> list[_Places]:
    result = []
    sides = zip(g.padding[::2], g.padding[1::2], strict=True)
    for k, s, d, (before, after) in zip(kernel, g.stride, g.dilation, sides, strict=True):
        reach = d * (k - 1) + 1
        taps = -(-reach // s)
        # what is cut off need not be computed; behind, output_padding may want a part of it
        front = min(before // s, taps - 1)
        unwanted = (s * taps - reach + after - (max(s, d) - 1)) // s
        behind = max(min(unwanted, taps - 1), 0)
        padding = taps - 1 - front, taps - 1 - behind
        result.append(_Places(taps, padding, before - front * s))
    return result


def products(
    shape: Sequence[int], stride: Sequence[int], dilation: Sequence[int], transposed: bool,
    groups: int,
) -> int:  # fmt: skip
    """That the layer of a weight of this shape sums, zeros among them: the K of `Conv2dWeight`."""
    if not transposed:
        return prod(shape[1:])
    g = Geometry(stride, (0, 0) * len(stride), dilation, transposed, groups)
    return shape[0] // groups * prod(place.taps for place in _places(g, shape[2:]))


def _phases(data: Any, g: Geometry) -> Any:
    """A transposed convolution's (N, C / groups, *kernel) as the plain one's (N * places, C /
    groups, *taps): w[s * t + r] is tap t, from the end, of place r."""
    n, c, *kernel = data.shape
    taps = [p.taps for p in _places(g, kernel)]
    whole: Any = np.zeros((n, c, *(t * s for t, s in zip(taps, g.stride, strict=True))), np.int8)
    at: Any = [slice(0, d * (k - 1) + 1, d) for k, d in zip(kernel, g.dilation, strict=True)]
    whole[(..., *at)] = data
    pairs = [size for both in zip(taps, g.stride, strict=True) for size in both]
    split = whole.reshape(n, c, *pairs)
    tap_axes, place_axes = range(2, split.ndim, 2), range(3, split.ndim, 2)
    split = np.flip(split, tuple(tap_axes)).transpose(0, *place_axes, 1, *tap_axes)
    return split.reshape(n * prod(g.stride), c, *taps)


def as_weight(data: Any, g: Geometry) -> Conv2dWeight:
    """int8 in torch's shape as the weight of the two-dimensional convolution that it becomes."""
    stride, padding, dilation = list(g.stride), list(g.padding), list(g.dilation)
    if g.transposed:
        padding = [side for p in _places(g, data.shape[2:]) for side in p.padding]
        data = _phases(outputs_first(data, g.groups), g)
        stride, dilation = [1] * len(stride), [1] * len(stride)
    if data.ndim == 3:
        data = data[:, :, None]
        stride, padding, dilation = [1, *stride], [0, 0, *padding], [1, *dilation]
    elif data.ndim == 5 and _along_depth(data.shape[2:], stride, padding):
        data, padding = data[..., 0], padding[:4]
        stride, dilation = stride[:2], dilation[:2]
    elif data.ndim == 5:  # a group's channels: all of its frame 0, all of its frame 1, ...
        n, c, depth, *kernel = data.shape
        data = data.swapaxes(1, 2).reshape(n, depth * c, *kernel)
    top, bottom, left, right = padding[-4:]
    sides = (top, bottom), (left, right)
    return Conv2dWeight(data, tuple(stride[-2:]), sides, tuple(dilation[-2:]), g.groups)  # type: ignore[arg-type]


def _along_depth(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution of volumes takes each place of a frame alone."""
    alone = [*kernel[1:], *stride[1:]] == [1, 1, 1, 1] and not any(padding[2:])
    return alone and kernel[0] > 1


def convolve(
    x: Tensor, operands: Operands, kernel: Sequence[int], g: Geometry, more: Sequence[int]
) -> Tensor:
    """The convolution of x (B, C, *sizes), checked by the caller but for its sizes."""
    if not g.transposed:
        if len(kernel) == 2:  # the most usual
            return _images(x, operands, channels_last(x))
        return _plain(x, operands, kernel, g, False)
    last = channels_last(x)
    wanted = g.sizes(x.shape[2:], kernel, more)
    if min(*wanted, *x.shape[2:]) < 1:
        raise ValueError(
            f"convolution: a transposed one of {tuple(x.shape[2:])}, padding {tuple(g.padding)}, "
            f"leaves {wanted}; wanted 1 or more of both"
        )
    places = _places(g, kernel)
    axes = list(zip(places, g.stride, x.shape[2:], wanted, strict=True))
    # output_padding may reach beyond the last product
    missing = [
        max(-(-(p.skip + want) // s) - (size + sum(p.padding) - p.taps + 1), 0)
        for p, s, size, want in axes
    ]
    if any(missing):
        x = F.pad(x, [side for after in reversed(missing) for side in (0, after)])
    ones = (1,) * len(places)
    plain = Geometry(ones, [side for p in places for side in p.padding], ones, False, g.groups)
    y = _plain(x, operands, [p.taps for p in places], plain, last)
    if prod(g.stride) > 1:
        y = _side_by_side(y, g.stride, last)
    for axis, (p, _, _, want) in enumerate(axes, 2):
        y = y.narrow(axis, p.skip, want)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _side_by_side(y: Tensor, stride: Sequence[int], last: bool) -> Tensor:
    """(B, N * prod(stride), *sizes) -> (B, N, *sizes times stride)."""
    batch, channels, *sizes = y.shape
    n, count = channels // prod(stride), len(stride)
    split = y.reshape(batch, n, *stride, *sizes)
    pairs = [axis for i in range(count) for axis in (2 + count + i, 2 + i)]
    whole = [size * s for size, s in zip(sizes, stride, strict=True)]
    if last:
        return split.permute(0, *pairs, 1).reshape(batch, *whole, n).movedim(-1, 1)
    return split.permute(0, 1, *pairs).reshape(batch, n, *whole)


def _plain(x: Tensor, operands: Operands, kernel: Sequence[int], g: Geometry, last: bool) -> Tensor:
    """A convolution that is not transposed; the result is channels_last or contiguous."""
    axes = x.dim() - 2
    if axes == 1:
        return _images(x.unsqueeze(2), operands, last).squeeze(2)
    if axes == 2:
        return _images(x, operands, last)
    if _along_depth(kernel, g.stride, g.padding):
        y = _images(x.flatten(3), operands, False)
        return y.unflatten(3, x.shape[3:])
    (step, *_), (before, after, *_), (apart, *_) = g.stride, g.padding, g.dilation
    x = F.pad(x, (0, 0, 0, 0, before, after))
    batch, channels, depth, h, w = x.shape
    count = (depth - apart * (kernel[0] - 1) - 1) // step + 1
    if count < 1 or depth == before + after:
        raise ValueError(
            f"convolution: {depth} frames, padding included, for a kernel of {kernel[0]} with "
            f"dilation {apart}; wanted {apart * (kernel[0] - 1) + 1} or more, not of padding alone"
        )
    each = channels // g.groups
    frames = x.new_empty(batch, count, g.groups, kernel[0], each, h, w)
    for i in range(kernel[0]):
        tap = x[:, :, i * apart : i * apart + step * (count - 1) + 1 : step]
        frames[:, :, :, i] = tap.transpose(1, 2).unflatten(2, (g.groups, each))
    y = _images(frames.view(batch * count, channels * kernel[0], h, w), operands, False)
    return y.unflatten(0, (batch, count)).transpose(1, 2).contiguous()


def _images(x: Tensor, operands: Operands, last: bool) -> Tensor:
    """The two-dimensional convolution of x (B, C, H, W)."""
    weight, (b, c, h, w) = operands.weight, x.shape
    n = weight.n
    if c != weight.c:
        raise ValueError(f"convolution: x has {c} channels; wanted {weight.c}, as its weight has")
    if not (h and w):
        raise ValueError(f"convolution: x {tuple(x.shape)} has no pixels; wanted 1 or more")
    ordered = (not last and x.is_contiguous()) or x.is_contiguous(memory_format=torch.channels_last)
    at = address_of(x) if ordered and b and n and x.is_cpu and not x.is_neg() else 0
    if at:
        oh, ow = weight.output_size(h, w)
        if last:
            y = x.new_empty_strided((b, n, oh, ow), (oh * ow * n, 1, ow * n, n))
        else:
            y = x.new_empty(b, n, oh, ow)  # sooner than of a tuple
        planes = not last and n > 1 and oh * ow > 1  # or both orders are one
        operands.conv2d(x.shape, x.stride(), planes, at, y.data_ptr())
        return y
    nhwc = array_of(f"{operands.name}: x", x).transpose(0, 2, 3, 1)
    out = conv2d_float(nhwc, weight, operands.epilogue, x_qparams=operands.x_qparams)
    y = from_numpy(out.transpose(0, 3, 1, 2))
    return y if last else y.contiguous()


def channels_last(x: Tensor) -> bool:
    """Whether the result is channels_last: of images whose strides are in that order, with gaps or
    without, as torch has it (c10's is_channels_last_strides_2d)."""
    if x.dim() != 4:
        return False
    image, channel, line, pixel = x.stride()
    if pixel < channel or not channel:
        return False  # the most usual
    b, c, h, w = x.shape
    ordered = pixel >= channel * c and line >= pixel * w and image >= line * h
    return bool(ordered and b * c * h * w > 0 and line * h != channel)  # of one value: contiguous
