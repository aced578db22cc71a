"""What QLinear, the convolutions and QEmbedding share: their state, and the operands derived from
it.

The state is five plain tensors. What `fastq.ops` wants (weight object, epilogue, qparams) is
derived from them once and kept: ops packs panels for those very objects, so new objects would
mean packing again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from fastq.ops import Operands
from fastq.qconfig import DEFAULT, QConfig
from fastq.qparams import Dequant, QParams, check_dense
from fastq.weights import per_output

STATE = {
    "weight": torch.int8,
    "weight_scale": torch.float32,
    "bias": torch.float32,
    "input_scale": torch.float32,
    "input_zero_point": torch.int32,
}

# the tensors of STATE, in its order
State = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class QLayer(nn.Module):
    """The state of a quantized layer.

    FLOAT      torch's class.
    ARGUMENTS  that both are made with, `bias` aside; attributes of both.
    path       its name in the model that `quantize_layers` made, for errors; or ''.

    weight            int8, the shape of the float layer's weight; symmetric, full range.
    weight_scale      float32 (N,), finite, > 0.
    bias              float32 (N,), finite, or None.
    input_scale       float32 (), finite, > 0; None, and absent from state_dict, when dynamic.
    input_zero_point  int32 (), within [0, 255]; None with input_scale.

    The state stays as it is, on the CPU: `.half()`, `.double()` and `.to(dtype)` leave it alone,
    `.cuda()` is refused. Any change that torch counts (load_state_dict, in-place operations,
    assignment) is seen by the next call; a write through `.data` or a NumPy view is not.
    """

    FLOAT: ClassVar[Any]
    ARGUMENTS: ClassVar[tuple[str, ...]]
    path: str = ""
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self, weight_shape: tuple[int, ...], n: int, bias: bool, device: Any, dtype: Any
    ) -> None:
        """n: of outputs, each of which has a scale."""
        super().__init__()
        name = type(self).__name__
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(
                f"{name}: got device {device}, wanted None or 'cpu'; the int8 kernels run there"
            )
        if dtype is not None and dtype is not torch.float32:
            raise ValueError(
                f"{name}: got dtype {dtype}, wanted None or torch.float32, the dtype of "
                "its input and output; the weight is always int8"
            )
        self._ready: tuple[Any, Operands] | None = None
        self._repeats = 1  # outputs of the operands' weight for each of the layer's
        self._shapes = {"weight": weight_shape, "weight_scale": (n,), "bias": (n,),
                        "input_scale": (), "input_zero_point": ()}  # fmt: skip
        self.register_buffer("weight", torch.zeros(weight_shape, dtype=torch.int8, device="cpu"))
        self.register_buffer("weight_scale", torch.ones(n, dtype=torch.float32, device="cpu"))
        zeros = torch.zeros(n, dtype=torch.float32, device="cpu") if bias else None
        self.register_buffer("bias", zeros)
        self.register_buffer("input_scale", None)
        self.register_buffer("input_zero_point", None)

    def _as_weight(self, data: Any) -> Any:
        """`data`, int8, as the weight object that ops wants."""
        raise NotImplementedError

    def _outputs_first(self, weight: Tensor) -> Tensor:
        """The weight with the axis of its outputs in front; its inverse, too."""
        return weight

    def _called(self) -> str:
        """What an error calls this layer."""
        kind = type(self).__name__
        return f"{kind} {self.path!r}" if self.path else kind

    @classmethod
    def made_with(cls, module: Any) -> dict[str, Any]:
        """The arguments that make a layer like this one, int8 or torch's."""
        given = {name: getattr(module, name) for name in cls.ARGUMENTS}
        return {**given, "bias": module.bias is not None}

    @classmethod
    def from_float(
        cls, module: Any, *, input_qparams: QParams | None = None, config: QConfig = DEFAULT
    ) -> Self:
        """Quantize a float layer; its weight per output, its bias stays float32.

        input_qparams  uint8 QParams per tensor of the input, or None to quantize it dynamically.
        config         the bits of its weight, and how its range is found.
        Raises TypeError unless `module` is torch's of this kind, ValueError if it is not finite or
        on the meta device.
        """
        check_kind(cls, module)
        return cls(**cls.made_with(module))._quantize(module, input_qparams, config)

    def to_float(self) -> Any:
        """torch's layer with the dequantized weight, weight * weight_scale, and the bias."""
        module = float_twin(self)
        self._dequantize(module)
        return module

    def _quantize(self, module: Any, input_qparams: QParams | None, config: QConfig) -> Self:
        """Take over the weight, bias and mode of a float module of the same shape."""
        weight = self._outputs_first(module.weight.detach().to("cpu", torch.float32))
        data, scale = config.quantize_weight(weight.numpy())
        with torch.no_grad():
            self.weight.copy_(self._outputs_first(torch.from_numpy(data)))
            self.weight_scale.copy_(torch.tensor(scale))
            if self.bias is not None and module.bias is not None:
                self.bias.copy_(module.bias)
        self.set_input_qparams(input_qparams)
        self._prepare()  # a bias that is not finite is refused here, not at the first call
        return self.train(module.training)

    def _dequantize(self, module: Any) -> None:
        """Give the weight, bias and mode to a float module of the same shape."""
        weight = self._outputs_first(self.weight)
        scale = per_output(self.weight_scale, weight.dim())
        with torch.no_grad():
            module.weight.copy_(self._outputs_first(weight * scale))
            if self.bias is not None and module.bias is not None:
                module.bias.copy_(self.bias)
        module.train(self.training)

    @property
    def input_qparams(self) -> QParams | None:
        """The uint8 QParams of the input, or None when it is quantized dynamically."""
        return self._operands().x_qparams

    def set_input_qparams(self, qparams: QParams | None) -> None:
        """Quantize the input with these parameters (static), or by its own range (None).

        qparams  uint8, per tensor. TypeError for anything but QParams or None, ValueError for
                 another dtype or an axis.
        """
        name = type(self).__name__
        if qparams is None:
            self.input_scale = self.input_zero_point = None
            return
        if not isinstance(qparams, QParams):
            raise TypeError(
                f"{name}: input_qparams is a {type(qparams).__name__}, wanted fastq.QParams "
                "(fastq.choose_qparams(minimum, maximum) makes them) or None"
            )
        if qparams.dtype != np.uint8 or qparams.axis is not None:
            raise ValueError(
                f"{name}: input_qparams are {qparams.dtype} with axis={qparams.axis}, "
                "wanted uint8 per tensor (axis=None)"
            )
        self.input_scale = torch.tensor(qparams.scale.item(), dtype=torch.float32, device="cpu")
        self.input_zero_point = torch.tensor(
            qparams.zero_point.item(), dtype=torch.int32, device="cpu"
        )

    def _operands(self) -> Operands:
        """What ops wants, derived anew only if a tensor of the state was changed or replaced."""
        ready = self._ready
        if ready is not None:
            seen, operands = ready
            buffers = self._buffers
            for name, tensor, version, pointer in seen:
                if buffers[name] is not tensor or (
                    tensor is not None
                    and (tensor._version != version or tensor.data_ptr() != pointer)
                ):
                    break
            else:
                return operands
        return self._prepare()

    def _prepare(self) -> Operands:
        buffers = self._buffers
        for name in STATE:
            tensor = buffers[name]
            if tensor is not None and tensor.shape != self._shapes[name]:
                raise ValueError(
                    f"{type(self).__name__}: {name} is {tuple(tensor.shape)}, wanted "
                    f"{tuple(self._shapes[name])}; another size wants another layer"
                )
            if tensor is not None and tensor.is_inference():  # these have no version to watch
                with torch.inference_mode(False):
                    buffers[name] = tensor.clone()
        tensors: Any = tuple(buffers[name] for name in STATE)
        seen = tuple(
            (name, t, 0, 0) if t is None else (name, t, t._version, t.data_ptr())
            for name, t in zip(STATE, tensors, strict=True)
        )
        operands = _derive(self._as_weight, tensors, self._repeats, type(self).__name__)
        self._ready = (seen, operands)
        return operands

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        hint = "; keep this module there, or move its to_float()"
        super()._apply(stay(type(self).__name__, fn, hint), recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
        static = "input_scale" in given
        problems = [
            f"{prefix}{name}: {problem}"
            for name, value in given.items()
            if isinstance(value, Tensor) and (problem := _problem(name, value))
        ]
        if static != ("input_zero_point" in given):
            problems.append(
                f"{prefix}input_scale and {prefix}input_zero_point come together or not"
            )
        if problems:
            error_msgs.extend(problems)
            return
        if static and self.input_scale is None:
            self.set_input_qparams(QParams(np.ones((), np.float32)))  # room for what is loaded
        elif not static and "weight" in given:
            self.set_input_qparams(None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _repr_quantization(self, dynamic: str) -> str:
        if self.input_scale is None or self.input_zero_point is None:
            given = f"dynamic {dynamic}"
        else:
            scale, zero_point = self.input_scale.item(), self.input_zero_point.item()
            given = f"uint8 scale={scale:.4g} zero_point={zero_point}"
        return f"weight=int8 per channel, input={given}"


def check_sizes(name: str, least: int = 0, **sizes: Any) -> None:
    """TypeError or ValueError unless each is an int of at least so much, or what torch takes as
    one."""
    for what, size in sizes.items():
        whole = hasattr(size, "__index__")
        if not whole or size < least:
            raise (ValueError if whole else TypeError)(
                f"{name}: {what}={size!r:.80}; wanted an int of at least {least}"
            )


def check_kind(kind: Any, module: Any) -> None:
    """TypeError unless a module is torch's of this kind of layer, and computes what it does;
    ValueError unless its parameters have values, all finite."""
    if not isinstance(module, kind.FLOAT):
        raise TypeError(
            f"{kind.__name__}.from_float: got {type(module).__name__}, wanted "
            f"torch.nn.{kind.FLOAT.__name__}"
        )
    for name in ("forward", "_conv_forward"):
        own = getattr(type(module), name, None) is not getattr(kind.FLOAT, name, None)
        if own or name in vars(module):
            raise TypeError(
                f"{kind.__name__}.from_float: this {type(module).__name__} has a {name} of its "
                f"own, which the int8 layer would lack; wanted torch.nn.{kind.FLOAT.__name__}. "
                "fastq.quantize_layers(model) reads what a subclass computes"
            )
    for name, parameter in module.named_parameters():
        what = f"{kind.__name__}.from_float: {name}"
        if is_lazy(parameter):
            raise ValueError(f"{what} has no size yet; wanted a {type(module).__name__} that ran")
        if parameter.is_meta:
            raise ValueError(
                f"{what} {tuple(parameter.shape)} is on the meta device, where it has no values; "
                f"wanted a {type(module).__name__} on the CPU: module.to_empty(device='cpu'), then "
                "module.load_state_dict(state)"
            )
        check_dense(what, parameter)
        if not bool(parameter.detach().float().isfinite().all()):
            raise ValueError(f"{what} has NaN or infinite values; wanted finite ones")


def float_twin(layer: Any) -> Any:
    """torch's layer of the same arguments, float32 on the CPU, its parameters not written yet."""
    made = layer.FLOAT(**layer.made_with(layer), device="meta", dtype=torch.float32)
    return made.to_empty(device="cpu")


def stay(name: str, fn: Callable[[Tensor], Tensor], hint: str = "") -> Callable[[Tensor], Tensor]:
    """fn of `nn.Module._apply` for state whose dtypes are part of the arithmetic: another dtype
    is not taken over, and RuntimeError, with the hint, for another device than the CPU."""

    def applied(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.device.type != "cpu":
            raise RuntimeError(
                f"{name}: cannot move to {result.device}, the int8 kernels run on the CPU{hint}"
            )
        return result if result.dtype == tensor.dtype else tensor

    return applied


def _problem(name: str, value: Tensor) -> str | None:
    """Why this tensor cannot be the state called `name`, or None. Shapes are left to torch."""
    if value.dtype != STATE[name]:
        message = f"got {value.dtype} from the checkpoint, wanted {STATE[name]}"
        if name == "weight":
            message += "; from_float(module) quantizes a float layer"
        return message
    if value.device.type != "cpu":
        return f"is on {value.device}, wanted the CPU; torch.load(..., map_location='cpu')"
    if name.endswith("scale") and not bool((value.isfinite() & (value > 0)).all()):
        return "has values that are not finite or not greater than 0"
    if name == "bias" and not bool(value.isfinite().all()):
        return "has NaN or infinite values"
    if name == "input_zero_point" and not bool(((value >= 0) & (value <= 255)).all()):
        return f"got {value.tolist()}, wanted 0 to 255"
    return None


def _derive(
    as_weight: Callable[[Any], Any], state: State, repeats: int, name: str = "an int8 layer"
) -> Operands:
    weight, weight_scale, bias, input_scale, input_zero_point = state
    if (input_scale is None) != (input_zero_point is None):
        raise ValueError(
            "input_scale and input_zero_point: got one without the other; "
            "set_input_qparams sets both"
        )
    x_qparams = None
    if input_scale is not None and input_zero_point is not None:
        x_qparams = QParams(_copy(input_scale), _copy(input_zero_point))
    scale = np.repeat(_copy(weight_scale), repeats)
    epilogue = Dequant(scale, bias=None if bias is None else np.repeat(_copy(bias), repeats))
    # detach: the array then holds the memory, but not the tensor that _derived has as its key
    data = weight.detach().numpy()
    data.flags.writeable = False  # not to be copied: changes of the tensor are watched here
    return Operands(as_weight(data), epilogue, x_qparams, name)


def _copy(tensor: Tensor) -> Any:
    return tensor.detach().numpy().copy()


# weight -> {geometry: (stamps, state, operands)}, for the custom operators, which see no module
_derived = WeakTensorKeyDictionary()  # type: ignore[no-untyped-call]


def operands_of(
    as_weight: Callable[[Any], Any], geometry: Hashable, state: State, repeats: int = 1
) -> Operands:
    """The operands of a custom operator's tensors; kept as long as the weight tensor lives."""
    stamps = [
        (id(t), -1 if t.is_inference() else t._version, t.data_ptr())
        for t in state
        if t is not None
    ]
    entries = _derived.setdefault(state[0], {})  # type: ignore[no-untyped-call]
    entry = entries.get(geometry)
    if entry is None or entry[0] != stamps:
        # state[1:] is held so that those ids are not used again
        entry = entries[geometry] = (stamps, state[1:], _derive(as_weight, state, repeats))
    operands: Operands = entry[2]
    return operands


def accept(name: str, x: Tensor, expected: str, fits: bool, what: str = "x") -> Tensor:
    """x, called `what`, without its gradient; or the reason why it is not accepted, as an error.

    Autocast hands over what its float layers made, in half precision: that becomes float32 here.
    """
    if fits and x.dtype is torch.float32 and not x.requires_grad:
        return x
    if x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled("cpu"):
        x = x.float()
    if x.dtype != torch.float32 or not fits:
        dtype, shape = str(x.dtype).removeprefix("torch."), tuple(x.shape)
        if fits:
            hint = f"{what}.float() works"
            if x.dtype == torch.int8:  # nobody's picture
                hint = (
                    "the model probably converts to the dtype of this layer's weight, or of "
                    "another's: skip= of quantize_layers or quantize_model keeps that one float"
                )
            raise TypeError(f"{name}: {what} is {dtype} {shape}, wanted float32; {hint}")
        raise ValueError(f"{name}: {what} is {dtype} {shape}, wanted float32 {expected}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: {what} requires grad, and this layer is for inference: it has no gradient; "
            f"call it under torch.no_grad() or give it {what}.detach()"
        )
    return x.detach()


def check_tensor(name: str, x: Any, wanted: str = "float32") -> None:
    """TypeError unless x is a tensor."""
    if not isinstance(x, Tensor):
        hint = ": torch.from_numpy(x)" if hasattr(x, "__array__") else ""
        raise TypeError(f"{name}: x is a {type(x).__name__}; wanted a tensor of {wanted}{hint}")


def address_of(x: Tensor) -> int:
    """Where a tensor's first value lies; 0 of one that has no memory, as within torch.func."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0


def array_of(what: str, x: Tensor) -> Any:
    """The NumPy view of a float32 tensor; TypeError, which calls it so, for one that has no memory
    to look at."""
    try:
        array = x.numpy()
        if x.data_ptr() or not x.numel():  # else torch.func's wrapper of a tensor: not its values
            return array
    except (RuntimeError, TypeError):
        if x.is_neg():  # NumPy has no lazy negation, as in z.conj().imag
            return x.resolve_neg().numpy()
    if x.layout is not torch.strided:
        problem = f"is {x.layout}; wanted a dense tensor: .to_dense() gives one"
    elif not x.is_cpu:
        problem = f"is on {x.device}; wanted the CPU"
    else:
        problem = "has no memory, as within torch.func; wanted a call of the layer outside of it"
    raise TypeError(f"{what} {problem}")
