"""QConv1d, QConv2d, QConv3d and the transposed ones: torch's convolutions with int8 weights.

One kernel convolves, in two dimensions, and all others are said with it:

    1-D         a line is an image of one row
    3-D         the frames that one frame of the result reads are stacked as channels; along the
                first axis alone, each frame is one line of an image
    transposed  a plain one that gives each place between two pixels a channel of its own (sub-pixel
                convolution); the channels are then put side by side

torch.compile and torch.export see one operator for all of them, `fastq::convolution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, float32, from_numpy, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling
from torch.nn import functional as F

from fastq.nn.layer import QLayer, accept, address_of, array_of, check_tensor, operands_of
from fastq.ops import Operands, conv2d_float
from fastq.weights import Conv2dWeight, explicit_padding, outputs_first, several

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
NO_MORE = (0, 0, 0)
Sizes = int | tuple[int, ...]


class _Geometry(NamedTuple):
    """Of a convolution. padding: in front and behind, axis by axis; of a transposed one it is what
    is cut off the result."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    groups: int

    def flat(self) -> tuple[Any, ...]:
        """As torch's operator takes it."""
        return self.stride, self.padding, self.dilation, self.transposed, self.groups

    def sizes(self, spatial: Sequence[Any], kernel: Sequence[int], more: Sequence[int]) -> Any:
        """Of the result, for an input of these; `more` at the end of a transposed one's."""
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


def _places(g: _Geometry, kernel: Sequence[int]) -> list[_Places]:
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
    g = _Geometry(stride, (0, 0) * len(stride), dilation, transposed, groups)
    return shape[0] // groups * prod(place.taps for place in _places(g, shape[2:]))


def _phases(data: Any, g: _Geometry) -> Any:
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


def _as_weight(data: Any, g: _Geometry) -> Conv2dWeight:
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


def _run(
    x: Tensor, operands: Operands, kernel: Sequence[int], g: _Geometry, more: Sequence[int]
) -> Tensor:
    """The convolution of x (B, C, *sizes), checked by the caller but for its sizes."""
    if not g.transposed:
        if len(kernel) == 2:  # the most usual
            return _images(x, operands, _channels_last(x))
        return _plain(x, operands, kernel, g, False)
    last = _channels_last(x)
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
    plain = _Geometry(ones, [side for p in places for side in p.padding], ones, False, g.groups)
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


def _plain(
    x: Tensor, operands: Operands, kernel: Sequence[int], g: _Geometry, last: bool
) -> Tensor:
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
            f"dilation {apart}"
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
        raise ValueError(f"convolution: x has {c} channels, its weight is for {weight.c}")
    if not (h and w):
        raise ValueError(f"convolution: x {tuple(x.shape)} has no pixels; wanted 1 or more")
    dense = not last and x.is_contiguous()
    if (dense or x.is_contiguous(memory_format=torch.channels_last)) and not x.is_neg():
        oh, ow = weight.output_size(h, w)
        if b and n and x.is_cpu:
            if last:
                y = x.new_empty_strided((b, n, oh, ow), (oh * ow * n, 1, ow * n, n))
            else:
                y = x.new_empty(b, n, oh, ow)  # sooner than of a tuple
            planes = not last and n > 1 and oh * ow > 1  # or both orders are one
            at = address_of(x)
            if at:
                operands.conv2d(x.shape, x.stride(), planes, at, y.data_ptr())
                return y
    nhwc = array_of(x).transpose(0, 2, 3, 1)
    out = conv2d_float(nhwc, weight, operands.epilogue, x_qparams=operands.x_qparams)
    y = from_numpy(out.transpose(0, 3, 1, 2))
    return y if last else y.contiguous()


def _channels_last(x: Tensor) -> bool:
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


class QConv(QLayer):
    """What all convolutions share: their input, and the way to the kernel.

    AXES  1, 2 or 3: of lines, images or volumes.
    """

    AXES: ClassVar[int]
    LETTERS = "DHW"
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _check(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, groups: int, mode: str,
        modes: Sequence[str],
    ) -> tuple[int, ...]:  # fmt: skip
        """The size of the kernel; ValueError for what no convolution has."""
        name = type(self).__name__
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: in_channels={in_channels}, out_channels={out_channels}, "
                f"groups={groups}; wanted groups >= 1 that divides both"
            )
        if mode not in modes:
            raise ValueError(f"{name}: padding_mode={mode!r}, wanted one of {', '.join(modes)}")
        return several(f"{name}: kernel_size", kernel_size, self.AXES, 1)

    def _set(self, geometry: _Geometry, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        self._geometry = geometry
        self._prepare()

    def _as_weight(self, data: Any) -> Conv2dWeight:
        return _as_weight(data, self._geometry)

    def _accepted(self, x: Tensor) -> Tensor:
        """x as it may be convolved, or the reason why not, as an error."""
        if type(x) is not Tensor:
            check_tensor(type(self).__name__, x)
        axes = self.AXES
        fits = axes < x.dim() <= axes + 2 and x.shape[-axes - 1] == self.in_channels
        if fits and x.dtype is float32 and not x.requires_grad:
            return x
        one = ", ".join([str(self.in_channels), *self.LETTERS[-axes:]])
        wanted = f"(B, {one}) or ({one}) for weight {tuple(self.weight.shape)} int8"
        if self.groups > 1:
            wanted += f" in {self.groups} groups"
        return accept(self._called(), x, wanted, fits)

    def _convolve(self, x: Tensor, more: Sequence[int]) -> Tensor:
        if is_compiling() or type(x) is not Tensor or _get_tracing_state():
            y: Tensor = torch.ops.fastq.convolution(
                x, self.weight, self.weight_scale, self.bias, self.input_scale,
                self.input_zero_point, *self._geometry.flat(), more,
            )  # fmt: skip
            return y
        return _run(x, self._operands(), self.kernel_size, self._geometry, more)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        axes = self.AXES
        usual = {
            "padding": (0,) * axes, "output_padding": (0,) * axes, "dilation": (1,) * axes,
            "groups": 1,
        }  # fmt: skip
        for name, value in usual.items():
            if getattr(self, name, value) != value:
                text += f", {name}={getattr(self, name)}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, {self._repr_quantization('per tensor')}"


class _QConv(QConv):
    ARGUMENTS = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel = self._check(
            in_channels, out_channels, kernel_size, groups, padding_mode, PADDING_MODES
        )
        name, axes = type(self).__name__, self.AXES
        shape = (out_channels, in_channels // groups, *kernel)
        super().__init__(shape, out_channels, bias, device, dtype)
        stride = several(f"{name}: stride", stride, axes, 1)
        dilation = several(f"{name}: dilation", dilation, axes, 1)
        if not isinstance(padding, str):
            padding = several(f"{name}: padding", padding, axes, 0)
        sides = explicit_padding(padding, kernel, stride, dilation)
        # zeros are padded by the kernel, the rest by F.pad before it, the last axis first
        inside = padding_mode == "zeros"
        flat = [side for pair in sides for side in pair]
        before = [side for pair in reversed(sides) for side in pair]
        self._pad_before = () if inside or not any(flat) else tuple(before)
        geometry = _Geometry(
            stride, tuple(flat) if inside else (0,) * len(flat), dilation, False, groups
        )
        self._set(
            geometry, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel,
            stride=stride, padding=padding, dilation=dilation, groups=groups,
            padding_mode=padding_mode,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(self.padded(x))

    def padded(self, x: Tensor) -> Tensor:
        """x, checked, with the padding that the kernel does not do."""
        x = self._accepted(x)
        if self._pad_before:
            x = F.pad(x, self._pad_before, mode=self.padding_mode)
        return x

    def convolved(self, x: Tensor) -> Tensor:
        """The result, for what `padded` returned."""
        if x.dim() == self.AXES + 1:
            return self.convolved(x.unsqueeze(0)).squeeze(0)
        return self._convolve(x, NO_MORE[: self.AXES])


class QConv2d(_QConv):
    """torch.nn.Conv2d in int8: float32 (B, C, H, W) or (C, H, W) -> float32 (B, N, OH, OW).

    The weight is int8, one scale per output channel. x is quantized to uint8: by the range of all
    of x (dynamic), or with the parameters given to `from_float` or `set_input_qparams` (static).
    Products are summed exactly in int32, then scaled and shifted by the bias in float32:
    `fastq.reference.conv2d_float` is the definition. NaN in x counts as 0, infinities saturate.
    The result is contiguous; channels_last, and sooner made, where x is. x is read in place,
    whatever its strides.

    Arguments as for nn.Conv2d, all of them; device must be None or CPU, dtype None or float32. A
    new module has weight 0 and scale 1: load a state_dict into it, or use `from_float`. State: see
    QLayer.

    Raises ValueError for an impossible geometry or C / groups * KH * KW beyond 65,793 (the int32
    bound). A call raises TypeError unless x is float32, ValueError for wrong channels or an image
    smaller than the kernel, RuntimeError if x requires grad in grad mode: the module is for
    inference, under torch.no_grad() or on x.detach(). Under torch.autocast("cpu") x may be bfloat16
    or float16; y is float32 all the same.

    torch.compile and torch.export see one operator, `fastq::convolution` (and the padding, where
    padding_mode is not zeros); an exported program needs `import fastq.nn` where it is loaded.
    """

    FLOAT = nn.Conv2d
    AXES = 2


class QConv1d(_QConv):
    """torch.nn.Conv1d in int8: float32 (B, C, L) or (C, L) -> float32 (B, N, OL), contiguous.

    All else as in QConv2d, of images of one row.
    """

    FLOAT = nn.Conv1d
    AXES = 1


class QConv3d(_QConv):
    """torch.nn.Conv3d in int8: float32 (B, C, D, H, W) or (C, D, H, W) -> float32 (B, N, OD, OH,
    OW), contiguous.

    The frames that each frame of the result reads are copied side by side, KD times the memory of
    x; the range of x (dynamic) is that of all frames which are read. All else as in QConv2d.
    """

    FLOAT = nn.Conv3d
    AXES = 3


class _QConvTranspose(QConv):
    ARGUMENTS = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding",
        "groups", "dilation", "padding_mode",
    )  # fmt: skip

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel = self._check(
            in_channels, out_channels, kernel_size, groups, padding_mode, PADDING_MODES[:1]
        )
        name, axes = type(self).__name__, self.AXES
        shape = (in_channels, out_channels // groups, *kernel)
        super().__init__(shape, out_channels, bias, device, dtype)
        stride = several(f"{name}: stride", stride, axes, 1)
        dilation = several(f"{name}: dilation", dilation, axes, 1)
        padding = several(f"{name}: padding", padding, axes, 0)
        self.output_padding = several(f"{name}: output_padding", output_padding, axes, 0)
        _check_more(name, self.output_padding, stride, dilation)
        self._repeats = prod(stride)
        sides = tuple(side for p in padding for side in (p, p))
        self._set(
            _Geometry(stride, sides, dilation, True, groups), in_channels=in_channels,
            out_channels=out_channels, kernel_size=kernel, stride=stride, padding=padding,
            dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip

    def _outputs_first(self, weight: Tensor) -> Tensor:
        return outputs_first(weight, self.groups)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        x = self._accepted(x)
        if output_size is not None and len(output_size) not in (self.AXES, x.dim()):
            raise ValueError(
                f"{type(self).__name__}: output_size {tuple(output_size)}; wanted {self.AXES} "
                f"sizes, or all {x.dim()} of the result"
            )
        if x.dim() == self.AXES + 1:
            sizes = None if output_size is None else output_size[-self.AXES :]
            return self.forward(x.unsqueeze(0), sizes).squeeze(0)
        more = self.output_padding
        if output_size is not None:
            least = self._geometry.sizes(x.shape[2:], self.kernel_size, (0,) * self.AXES)
            wanted = tuple(output_size[-self.AXES :])
            more = tuple(size - low for size, low in zip(wanted, least, strict=True))
            if not all(0 <= m < s for m, s in zip(more, self.stride, strict=True)):
                most = tuple(low + s - 1 for low, s in zip(least, self.stride, strict=True))
                raise ValueError(
                    f"{type(self).__name__}: output_size {wanted}; wanted from {least} to {most}"
                )
        return self._convolve(x, more)


def _check_more(
    name: str, more: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> None:
    most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    if not all(0 <= m <= top for m, top in zip(more, most, strict=True)):
        raise ValueError(
            f"{name}: output_padding {tuple(more)}; wanted at most {tuple(most)}, less than stride "
            "or dilation"
        )


class QConvTranspose2d(_QConvTranspose):
    """torch.nn.ConvTranspose2d in int8: float32 (B, C, H, W) or (C, H, W) -> (B, N, OH, OW).

    The weight is (C, N / groups, KH, KW), as torch's, with a scale for each of N. It runs as a
    plain convolution of x with stride_h * stride_w channels for each of N, which are then put side
    by side; its sum of C / groups * KH * KW, each rounded up to a multiple of the stride and
    divided by it, products is exact in int32. Arguments as for nn.ConvTranspose2d, and output_size
    of a call. All else as in QConv2d.
    """

    FLOAT = nn.ConvTranspose2d
    AXES = 2


class QConvTranspose1d(_QConvTranspose):
    """torch.nn.ConvTranspose1d in int8: float32 (B, C, L) or (C, L) -> float32 (B, N, OL).

    All else as in QConvTranspose2d, of images of one row.
    """

    FLOAT = nn.ConvTranspose1d
    AXES = 1


class QConvTranspose3d(_QConvTranspose):
    """torch.nn.ConvTranspose3d in int8: float32 (B, C, D, H, W) or (C, D, H, W) -> (B, N, OD, OH,
    OW).

    All else as in QConvTranspose2d and QConv3d.
    """

    FLOAT = nn.ConvTranspose3d
    AXES = 3


CONVOLUTIONS = (
    QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d,
)  # fmt: skip


@torch.library.custom_op("fastq::convolution", mutates_args=(), device_types="cpu")
def _convolution(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    output_padding: Sequence[int],
) -> Tensor:
    name, axes = "fastq::convolution", weight.dim() - 2
    fits = weight.dtype is torch.int8 and 1 <= axes <= 3
    if not fits or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: weight {tuple(weight.shape)} {weight.dtype}, groups={groups}; wanted int8, 3 "
            "to 5 axes, groups >= 1 that divides the first"
        )
    g = _Geometry(
        several(f"{name}: stride", list(stride), axes, 1),
        several(f"{name}: padding", list(padding), 2 * axes, 0),
        several(f"{name}: dilation", list(dilation), axes, 1),
        transposed,
        groups,
    )
    output_padding = several(f"{name}: output_padding", list(output_padding), axes, 0)
    _check_more(name, output_padding, g.stride, g.dilation)
    c = weight.shape[0] if transposed else weight.shape[1] * groups
    wanted = ", ".join(["B", str(c), *QConv.LETTERS[-axes:]])
    x = accept(name, x, f"({wanted})", x.dim() == axes + 2 and x.shape[1] == c)
    state = (weight, weight_scale, bias, input_scale, input_zero_point)

    def as_weight(data: Any) -> Conv2dWeight:
        return _as_weight(data, g)

    operands = operands_of(as_weight, g, state, prod(stride) if transposed else 1)
    return _run(x, operands, weight.shape[2:], g, output_padding)


@_convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    output_padding: Sequence[int],
) -> Tensor:
    g = _Geometry(stride, padding, dilation, transposed, groups)
    n = weight.shape[1] * groups if transposed else weight.shape[0]
    sizes = g.sizes(x.shape[2:], weight.shape[2:], output_padding)
    if _channels_last(x):
        return x.new_empty((x.shape[0], *sizes, n)).movedim(-1, 1)
    return x.new_empty((x.shape[0], n, *sizes))
