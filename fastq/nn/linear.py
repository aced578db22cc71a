"""QLinear: torch.nn.Linear with int8 weights."""

from math import prod
from typing import Any

import torch
from torch import Tensor, float32, from_numpy, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling, is_dynamo_compiling

from fastq.nn.layer import (
    QLayer,
    accept,
    address_of,
    array_of,
    check_sizes,
    check_tensor,
    operands_of,
)
from fastq.ops import Operands, linear_float
from fastq.weights import LinearWeight, check_k


class QLinear(QLayer):
    """torch.nn.Linear in int8: float32 (*, in_features) -> float32 (*, out_features).

    The weight is int8, one scale per output. x is quantized to uint8: by the range of each row
    (dynamic), or with the parameters given to `from_float` or `set_input_qparams` (static).
    Products are summed exactly in int32, then scaled and shifted by the bias in float32:
    `fastq.reference.linear_float` is the definition. NaN in x counts as 0, infinities saturate.

    Arguments as for nn.Linear; device must be None or CPU, dtype None or float32. A new module has
    weight 0 and scale 1: load a state_dict into it, or use `from_float`. State: see QLayer.

    Raises ValueError for in_features beyond 65,793 (the int32 bound). A call raises TypeError
    unless x is float32, ValueError for a wrong number of features, RuntimeError if x requires grad
    in grad mode: the module is for inference, under torch.no_grad() or on x.detach(). Under
    torch.autocast("cpu") x may be bfloat16 or float16; y is float32 all the same.

    torch.compile and torch.export see one operator, `fastq::linear`; an exported program needs
    `import fastq.nn` where it is loaded.
    """

    FLOAT = nn.Linear
    ARGUMENTS = "in_features", "out_features"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        check_sizes(name, in_features=in_features, out_features=out_features)
        check_k(name, in_features)
        super().__init__((out_features, in_features), out_features, bias, device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self._prepare()

    def _as_weight(self, data: Any) -> LinearWeight:
        return LinearWeight(data)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            check_tensor("QLinear", x)
        elif x.is_nested:  # nn.TransformerEncoder makes these of padded input
            return torch.nested.as_nested_tensor([self.forward(part) for part in x.unbind()])
        shape = x.shape
        fits = len(shape) > 0 and shape[-1] == self.in_features
        if not fits or x.dtype is not float32 or x.requires_grad:
            wanted = f"(*, {self.in_features}) for weight {tuple(self.weight.shape)} int8"
            x = accept(self._called(), x, wanted, fits)
        if is_compiling() or type(x) is not Tensor or _get_tracing_state():
            y: Tensor = torch.ops.fastq.linear(
                x,
                self.weight,
                self.weight_scale,
                self.bias,
                self.input_scale,
                self.input_zero_point,
            )
            return y
        return linear(x, shape, self._operands())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._repr_quantization('per row')}"
        )


def linear(x: Tensor, shape: torch.Size, operands: Operands) -> Tensor:
    """x (*, K), float32, times the operands' weight (N, K)."""
    if is_dynamo_compiling():  # it gave up on who calls, after an error, and is here instead
        return torch.compiler.disable(linear)(x, shape, operands)
    n, features = operands.weight.data.shape
    if shape[-1] != features:
        raise ValueError(
            f"linear: x has {shape[-1]} features; wanted {features}, for weight {(n, features)}"
        )
    if len(shape) == 2:  # the most usual, and half a microsecond faster
        m, k = shape
        sizes: tuple[int, ...] = m, n
    else:
        m, k = prod(shape[:-1]), shape[-1]
        sizes = *shape[:-1], n
    if m and n and x.is_cpu and x.is_contiguous() and not x.is_neg():
        y = x.new_empty(*sizes)
        at = address_of(x)
        if at:
            operands.linear(m, 4 * k, at, y.data_ptr())
            return y
    rows = array_of(f"{operands.name}: x", x).reshape(m, k)
    out = linear_float(rows, operands.weight, operands.epilogue, x_qparams=operands.x_qparams)
    return from_numpy(out).reshape(sizes)


@torch.library.custom_op("fastq::linear", mutates_args=(), device_types="cpu")
def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> Tensor:
    k = weight.shape[-1]
    x = accept("fastq::linear", x, f"(*, {k})", x.dim() > 0 and x.shape[-1] == k)
    state = (weight, weight_scale, bias, input_scale, input_zero_point)
    return linear(x, x.shape, operands_of(LinearWeight, (), state))


@_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
