"""QConv2d: torch.nn.Conv2d with int8 weights."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, float32, from_numpy, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.utils import skip_init

from fastq.nn.layer import QLayer, accept, as_array, operands_of
from fastq.ops import Operands, conv2d_float
from fastq.qparams import QParams
from fastq.weights import Conv2dWeight, Pair, explicit_padding, pair

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class QConv2d(QLayer):
    """torch.nn.Conv2d in int8: float32 (B, C, H, W) or (C, H, W) -> float32 (B, N, OH, OW).

    The weight is int8, one scale per output channel. x is quantized to uint8: by the range of all
    of x (dynamic), or with the parameters given to `from_float` or `set_input_qparams` (static).
    Products are summed exactly in int32, then scaled and shifted by the bias in float32:
    `fastq.reference.conv2d_float` is the definition. NaN in x counts as 0, infinities saturate.
    The result has channels_last memory; x is read in place, whatever its strides.

    Arguments as for nn.Conv2d, all of them; device must be None or CPU, dtype None or float32. A
    new module has weight 0 and scale 1: load a state_dict into it, or use `from_float`. State: see
    QLayer.

    Raises ValueError for an impossible geometry or C / groups * KH * KW beyond 65,793 (the int32
    bound). A call raises TypeError unless x is float32, ValueError for wrong channels or an image
    smaller than the kernel, RuntimeError if x requires grad in grad mode: the module is for
    inference, under torch.no_grad() or on x.detach(). Under torch.autocast("cpu") x may be bfloat16
    or float16; y is float32 all the same.

    torch.compile and torch.export see one operator, `fastq::conv2d` (and the padding, where
    padding_mode is not zeros); an exported program needs `import fastq.nn` where it is loaded.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"QConv2d: in_channels={in_channels}, out_channels={out_channels}, "
                f"groups={groups}; wanted groups >= 1 that divides both"
            )
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"QConv2d: padding_mode={padding_mode!r}, wanted one of {', '.join(PADDING_MODES)}"
            )
        kernel_size = pair("QConv2d: kernel_size", kernel_size, 1)
        shape = (out_channels, in_channels // groups, *kernel_size)
        super().__init__(shape, bias, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = pair("QConv2d: stride", stride, 1)
        self.padding = padding if isinstance(padding, str) else pair("QConv2d: padding", padding, 0)
        self.dilation = pair("QConv2d: dilation", dilation, 1)
        self.groups = groups
        self.padding_mode = padding_mode
        rows, cols = explicit_padding(self.padding, kernel_size, self.stride, self.dilation)
        # zeros are padded by the kernel (top, bottom, left, right), the rest by F.pad before it
        inside = padding_mode == "zeros"
        self._padding = (*rows, *cols) if inside else (0, 0, 0, 0)
        self._pad_before = () if inside or not any(rows + cols) else (*cols, *rows)
        self._prepare()

    @classmethod
    def from_float(cls, module: nn.Conv2d, *, input_qparams: QParams | None = None) -> Self:
        """Quantize a float layer; its weight per output channel, its bias stays float32.

        input_qparams  uint8 QParams per tensor of the input, or None to quantize it dynamically.
        Raises TypeError unless `module` is an nn.Conv2d, ValueError if it is not finite.
        """
        if not isinstance(module, nn.Conv2d):
            raise TypeError(
                f"{cls.__name__}.from_float: got {type(module).__name__}, wanted torch.nn.Conv2d"
            )
        return cls(**_arguments(module))._quantize(module, input_qparams)

    def to_float(self) -> nn.Conv2d:
        """An nn.Conv2d with the dequantized weight, weight * weight_scale, and the bias."""
        module = skip_init(nn.Conv2d, **_arguments(self), device="cpu", dtype=float32)
        self._dequantize(module)
        return module

    def _as_weight(self, data: Any) -> Conv2dWeight:
        return _weight(data, self.stride, self._padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        fits = 3 <= len(shape) <= 4 and shape[-3] == self.in_channels
        if not fits or x.dtype is not float32 or x.requires_grad:
            c = self.in_channels
            wanted = f"(B, {c}, H, W) or ({c}, H, W) for weight {tuple(self.weight.shape)} int8"
            if self.groups > 1:
                wanted += f" in {self.groups} groups"
            x = accept("QConv2d", x, wanted, fits)
        if len(shape) == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if self._pad_before:
            x = F.pad(x, self._pad_before, mode=self.padding_mode)
        if is_compiling() or type(x) is not Tensor or _get_tracing_state():
            y: Tensor = torch.ops.fastq.conv2d(
                x,
                self.weight,
                self.weight_scale,
                self.bias,
                self.input_scale,
                self.input_zero_point,
                self.stride,
                self._padding,
                self.dilation,
                self.groups,
            )
            return y
        return _run(x, self._operands())

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, {self._repr_quantization('per tensor')}"


def _arguments(module: nn.Conv2d | QConv2d) -> dict[str, Any]:
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "bias": module.bias is not None,
        "padding_mode": module.padding_mode,
    }


def _weight(
    data: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Conv2dWeight:
    (sh, sw), (dh, dw), (top, bottom, left, right) = stride, dilation, padding
    return Conv2dWeight(data, (sh, sw), ((top, bottom), (left, right)), (dh, dw), groups)


def _run(x: Tensor, operands: Operands) -> Tensor:
    shape = b, _, h, w = x.shape
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    if dense and not x.is_neg():
        oh, ow = operands.weight.output_size(h, w)
        n = operands.weight.n
        if b and n:
            size, strides = (b, n, oh, ow), (oh * ow * n, 1, ow * n, n)
            y = x.new_empty_strided(size, strides)
            operands.conv2d(shape, x.stride(), x.data_ptr(), y.data_ptr())
            return y
    nhwc = as_array(x).transpose(0, 2, 3, 1)
    out = conv2d_float(nhwc, operands.weight, operands.epilogue, x_qparams=operands.x_qparams)
    return from_numpy(out.transpose(0, 3, 1, 2))


@torch.library.custom_op("fastq::conv2d", mutates_args=(), device_types="cpu")
def _conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    def as_weight(data: Any) -> Conv2dWeight:
        return _weight(data, stride, padding, dilation, groups)

    c = weight.shape[1] * groups
    x = accept("fastq::conv2d", x, f"(B, {c}, H, W)", x.dim() == 4 and x.shape[1] == c)
    state = (weight, weight_scale, bias, input_scale, input_zero_point)
    geometry = (*stride, *padding, *dilation, groups)
    return _run(x, operands_of(as_weight, geometry, state))


@_conv2d.register_fake
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
    groups: int,
) -> Tensor:
    batch, _, h, w = x.shape
    n, _, kh, kw = weight.shape
    top, bottom, left, right = padding
    oh = (h + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (w + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    return x.new_empty((batch, oh, ow, n)).permute(0, 3, 1, 2)
