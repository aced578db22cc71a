"""Modules as they were: after a model was run, or when changing it failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def python_modules(model: nn.Module) -> list[nn.Module]:
    """Its modules but for scripted ones, which nothing here changes."""
    return [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _leaves(model: nn.Module) -> list[nn.Parameter]:
    """Its parameters but for a scripted module's, which are no leaves in a copy."""
    return [parameter for parameter in model.parameters() if parameter.is_leaf]


def remember(model: nn.Module) -> Callable[[], None]:
    """What gives the model its submodules, parameters and modes of now back."""
    flags = ("training", "activation_relu_or_gelu")
    modules: list[tuple[nn.Module, dict[str, Any], list[tuple[Any, Any]]]] = [
        (
            module,
            {flag: getattr(module, flag) for flag in flags if hasattr(module, flag)},
            [(members, dict(members)) for members in (module._modules, module._parameters)],
        )
        for module in python_modules(model)
    ]
    gradients = [(parameter, parameter.requires_grad) for parameter in _leaves(model)]

    def undo() -> None:
        for module, values, members in modules:
            vars(module).update(values)
            for now, before in members:
                now.clear()
                now.update(before)
        for parameter, requires_grad in gradients:
            parameter.requires_grad = requires_grad

    return undo


@contextlib.contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Whatever a forward stores on its modules, in buffers or elsewhere, is gone afterwards."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    containers: dict[int, tuple[Any, Any]] = {}  # each, and what is in it
    for module in python_modules(model):
        own = {name: v for name, v in vars(module).items() if not name.startswith("_")}
        attributes.append((vars(module), own))
        waiting = [module._buffers, *own.values()]
        while waiting:
            value: Any = waiting.pop()
            if type(value) in (list, dict, set) and id(value) not in containers:
                containers[id(value)] = value, value.copy()
                waiting += value.values() if isinstance(value, dict) else value
    try:
        yield
    finally:
        for now, before in attributes:
            for name in [name for name in now if not name.startswith("_")]:
                del now[name]
            now.update(before)
        for container, content in containers.values():
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)
