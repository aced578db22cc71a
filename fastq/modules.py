"""The modules of a model by name: which of them a user means, and how each is to be quantized."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastq.nn import QMultiheadAttention
from fastq.nn.embedding import LEAST_ROW
from fastq.nn.layer import QLayer
from fastq.nn.recurrent import Recurrent
from fastq.qconfig import QConfig

Selector = str | type[nn.Module]
Config = QConfig | Mapping[Selector, QConfig | None]
Names = dict[nn.Module, list[str]]

# What a summary lists: layers that multiply by weights or look them up, and batch norm. Not layer
# norm, which has no weights to sum over: int8 would win nothing there.
INT8 = (QLayer, Recurrent, QMultiheadAttention)
LISTED = (
    *INT8,
    nn.Linear,
    _ConvNd,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    _BatchNorm,
)
TABLES = (nn.Embedding, nn.EmbeddingBag)
SELECTORS = "names, patterns such as '*.attn.*', or classes of modules"


def check_module(name: str, model: Any) -> None:
    """TypeError unless it is a module that can be looked into."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        exported = isinstance(model, torch.export.ExportedProgram)
        hint = ": the one that was exported, or the program's .module(), if its batch is dynamic"
        raise TypeError(
            f"{name}: got {type(model).__name__}, wanted a torch.nn.Module, not "
            f"scripted{hint * exported}"
        )


def module_names(model: nn.Module) -> Names:
    """Each module of the model with all of its names, in the order of `named_modules()`."""
    names: Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def listed(names: Names) -> Names:
    """The modules that a summary lists: not what a layer is made of, nor short embeddings."""
    whole = (Recurrent, QMultiheadAttention, nn.MultiheadAttention)
    without = {part for m in names if isinstance(m, whole) for part in m.children()}
    without |= {m for m in names if isinstance(m, TABLES) and m.embedding_dim < LEAST_ROW}
    return {m: paths for m, paths in names.items() if isinstance(m, LISTED) and m not in without}


def selectors_of(selectors: Any, argument: str) -> tuple[Any, ...]:
    """One selector or several as a tuple, which can be read again."""
    if isinstance(selectors, str | type):
        return (selectors,)
    if not isinstance(selectors, Iterable):
        raise TypeError(f"{argument}: got {selectors!r:.80}, wanted {SELECTORS}; or () for none")
    return tuple(selectors)


def select(names: Names, selectors: Any, argument: str) -> set[nn.Module]:
    """The modules that match a name, pattern or class, and all modules within them."""
    modules = {name: module for module, paths in names.items() for name in paths}
    hits: set[str] = set()
    for selector in selectors_of(selectors, argument):
        if isinstance(selector, str):
            found = {name for name in modules if fnmatch.fnmatchcase(name, selector)}
        elif isinstance(selector, type) and issubclass(selector, nn.Module):
            found = {name for name, module in modules.items() if isinstance(module, selector)}
        else:
            raise TypeError(f"{argument} has {selector!r:.80}, wanted {SELECTORS}")
        if not found:
            layers = [name for paths in listed(names).values() for name in paths]
            raise ValueError(
                f"{argument} has {selector!r}, which matches nothing; the layers are "
                f"{', '.join(map(repr, layers))}"
            )
        hits |= found

    def selected(name: str) -> bool:
        parents = itertools.accumulate(name.split("."), "{}.{}".format)
        return "" in hits or any(parent in hits for parent in parents)

    return {module for name, module in modules.items() if selected(name)}


def choose(
    names: Names, config: Config | None, skip: Selector | Iterable[Selector], default: QConfig
) -> dict[str, QConfig | None]:
    """The configuration of each module by its name; None is float. `default` is that of modules of
    which config says nothing."""
    if not isinstance(config, QConfig | Mapping | None):
        raise TypeError(
            f"config: got {config!r:.80}, wanted a fastq.QConfig, or a dict from {SELECTORS} to "
            "one, or to None to keep them float"
        )
    base = config if isinstance(config, QConfig) else default
    chosen: dict[str, QConfig | None] = {n: base for paths in names.values() for n in paths}
    rules = list(config.items()) if isinstance(config, Mapping) else []
    for selector, one in [*rules, (skip, None)]:
        if one is not None and not isinstance(one, QConfig):
            raise TypeError(
                f"config has {type(one).__name__} for {selector!r}; wanted a fastq.QConfig, or "
                "None to keep it float"
            )
        for module in select(names, selector, "skip" if selector is skip else "config"):
            for name in names[module]:
                chosen[name] = one
    return chosen


def replace(model: nn.Module, names: list[str], new: nn.Module) -> nn.Module:
    """The model with `new` under all these names; `new` itself for the name ''."""
    for name in names:
        if name == "":
            return new
        model.set_submodule(name, new)
    return model
