"""`pointwise`: a user's function of one tensor, element by element, as one operator.

torch.export does not look into it, and in integers it is a table of 256 values, whatever it does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastq.graph import POINTWISE_NAMESPACE

Function = Callable[[Tensor], Tensor]
_names: set[str] = set()


def pointwise(function: Function) -> Function:
    """Make a function of one tensor one int8 operation of a quantized network.

        @fastq.pointwise
        def snake(x):
            return x + torch.sin(3 * x) ** 2 / 3

    Called, it computes what it did, and has gradients where it had them. `quantize_model`
    evaluates it on the 256 values that its input can have there, and keeps the table: any Python
    and any library may compute it. What consists of torch's own pointwise functions is fused
    without a decorator as well.

    function  of a float32 tensor of any shape: a new float32 tensor of that shape, of which each
              element depends on the one in its place alone.

    Raises TypeError for anything but a function. A function that is not pointwise raises
    ValueError when it is first called with two elements or more.
    """
    if not callable(function) or isinstance(function, type | nn.Module):
        raise TypeError(f"pointwise: got {function!r:.80}; wanted a function of one tensor")
    title = getattr(function, "__qualname__", type(function).__name__)
    checked = False

    def compute(x: Tensor) -> Tensor:
        nonlocal checked
        y = function(x)
        if not checked and x.numel() > 1:
            _check(title, function, x, y)
            checked = True
        return y.clone() if y.data_ptr() == x.data_ptr() else y

    name, schema = f"{POINTWISE_NAMESPACE}::{_name(title)}", "(Tensor x) -> Tensor"
    op = torch.library.custom_op(name, compute, mutates_args=(), schema=schema)
    op.register_fake(torch.empty_like)

    def keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(function(x), x, grad)[0]

    op.register_autograd(backward, setup_context=keep)

    @functools.wraps(function)
    def call(x: Tensor) -> Tensor:
        return op(x)  # type: ignore[no-any-return]

    return call


def _name(title: str) -> str:
    """A name that no other operator has; the same in the next process."""
    plain = name = re.sub(r"\W+", "_", title).strip("_")
    count = 1
    while name in _names:
        name, count = f"{plain}_{count}", count + 1
    _names.add(name)
    return name


def _check(title: str, function: Function, x: Tensor, y: Any) -> None:
    """ValueError unless y is the function of x element by element."""
    if not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype):
        given = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"pointwise: {title} gives {given} for {x.dtype} {tuple(x.shape)}; wanted the same "
            "shape and dtype"
        )
    others = slice(None, None, 2)  # every other element, from the last one to the first
    with torch.inference_mode(False):  # whose tensors do not count what is written
        part, wanted = (t.reshape(-1).flip(0)[others].contiguous() for t in (x, y))
    before = part._version
    found = function(part)
    if part._version != before:
        raise ValueError(
            f"pointwise: {title} writes to its input, which others read too; wanted a new tensor: "
            "x.sin(), not x.sin_()"
        )
    if found.shape != wanted.shape or not torch.allclose(
        found, wanted, rtol=1e-3, atol=1e-5, equal_nan=True
    ):
        raise ValueError(
            f"pointwise: {title} gives other values for a part of its input, in another order; "
            "wanted a function of each element alone"
        )
