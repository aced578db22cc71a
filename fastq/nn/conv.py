"""QConv1d, QConv2d, QConv3d and the transposed ones: torch's convolutions with int8 weights.

All are convolved by `convolve`; torch.compile and torch.export see one operator for all of them,
`fastq::convolution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, float32, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling
from torch.nn import functional as F

from fastq.nn.convolve import Geometry, as_weight, channels_last, convolve, products
from fastq.nn.layer import QLayer, accept, check_sizes, check_tensor, operands_of
from fastq.weights import Conv2dWeight, check_k, explicit_padding, outputs_first, several

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
NO_MORE = (0, 0, 0)
Sizes = int | tuple[int, ...]


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
        """The size of the kernel; TypeError or ValueError for what no convolution has."""
        name = type(self).__name__
        check_sizes(name, in_channels=in_channels, out_channels=out_channels)
        check_sizes(name, 1, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: in_channels={in_channels}, out_channels={out_channels}, "
                f"groups={groups}; wanted groups that divide both"
            )
        if mode not in modes:
            raise ValueError(f"{name}: padding_mode={mode!r}, wanted one of {', '.join(modes)}")
        return several(f"{name}: kernel_size", kernel_size, self.AXES, 1)

    def _set(self, geometry: Geometry, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        g = self._geometry = geometry
        sums = products(self.weight.shape, g.stride, g.dilation, g.transposed, g.groups)
        check_k(type(self).__name__, sums)
        self._prepare()

    def _as_weight(self, data: Any) -> Conv2dWeight:
        return as_weight(data, self._geometry)

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
        return convolve(x, self._operands(), self.kernel_size, self._geometry, more)

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


class _QConvPlain(QConv):
    """What QConv1d, QConv2d and QConv3d share: torch's arguments, and padding of every mode."""

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
        sides = explicit_padding(padding, kernel, stride, dilation, f"{name}: padding")
        # zeros are padded by the kernel, the rest by F.pad before it, the last axis first
        inside = padding_mode == "zeros"
        flat = [side for pair in sides for side in pair]
        before = [side for pair in reversed(sides) for side in pair]
        # "circular" pads by nothing, too: torch's copy may be contiguous where x is channels_last
        padded = any(flat) or padding_mode == "circular"
        self._pad_before = tuple(before) if padded and not inside else ()
        geometry = Geometry(
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


class QConv2d(_QConvPlain):
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


class QConv1d(_QConvPlain):
    """torch.nn.Conv1d in int8: float32 (B, C, L) or (C, L) -> float32 (B, N, OL), contiguous.

    All else as in QConv2d, of images of one row.
    """

    FLOAT = nn.Conv1d
    AXES = 1


class QConv3d(_QConvPlain):
    """torch.nn.Conv3d in int8: float32 (B, C, D, H, W) or (C, D, H, W) -> float32 (B, N, OD, OH,
    OW), contiguous.

    The frames that each frame of the result reads are copied side by side, KD times the memory of
    x; the range of x (dynamic) is that of all frames which are read. All else as in QConv2d.
    """

    FLOAT = nn.Conv3d
    AXES = 3


class _QConvTranspose(QConv):
    """What QConvTranspose1d, 2d and 3d share: torch's arguments, and output_size of a call."""

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
            Geometry(stride, sides, dilation, True, groups), in_channels=in_channels,
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
    """ValueError for an output_padding that torch has not."""
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
    g = Geometry(
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
    operands = operands_of(partial(as_weight, g=g), g, state, prod(stride) if transposed else 1)
    return convolve(x, operands, weight.shape[2:], g, output_padding)


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
    g = Geometry(stride, padding, dilation, transposed, groups)
    n = weight.shape[1] * groups if transposed else weight.shape[0]
    sizes = g.sizes(x.shape[2:], weight.shape[2:], output_padding)
    if channels_last(x):
        return x.new_empty((x.shape[0], *sizes, n)).movedim(-1, 1)
    return x.new_empty((x.shape[0], n, *sizes))
