"""From a float model to an int8 one: watch the ranges, fold batch norm, swap the layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastq.batches import Batches, add_hint, arguments_of
from fastq.graph import normalization, scaled
from fastq.modules import (
    INT8,
    TABLES,
    Config,
    Names,
    Selector,
    check_module,
    choose,
    listed,
    module_names,
    replace,
    select,
)
from fastq.nn.embedding import LEAST_ROW
from fastq.nn.layer import QLayer
from fastq.nn.model import QuantizedModel
from fastq.observer import Observer, make_observer, qparams_of
from fastq.outlook import SWAPS, leave_fast_path, outlook
from fastq.processes import Processes
from fastq.progress import bar
from fastq.qconfig import QConfig
from fastq.rebuild import rebuild
from fastq.restoring import python_modules, remember, unmarked
from fastq.source import PARAMETERS, PRODUCTS
from fastq.summaries import ASKED, QuantizationSummary, Result, Row, keep_summary
from fastq.trace import Forward, Trace, duplicate, trace

TRIFLE = 1024  # a summary leaves out parameters in no layer if there are no more of them
MINMAX = QConfig(observer="minmax")


def quantize_layers(
    model: nn.Module,
    calibration_data: Any = None,
    *,
    forward: Forward | None = None,
    config: Config | None = None,
    skip: Selector | Iterable[Selector] = (),
    dynamic: Selector | Iterable[Selector] = (),
    strict: bool = False,
    inplace: bool = False,
    progress: bool = True,
    distributed: Any = False,
) -> nn.Module:
    """The model with int8 layers: same class, same call, in eval mode, for inference.

    Every nn.Linear and convolution, transposed or not, becomes a QLinear or QConv2d (QConv1d, ...),
    after the batch norm that follows it, if any, was folded into it; a subclass too, if its forward
    is no more than one of them between other modules and padding. The calibration data fixes the
    ranges of their inputs (static); a layer that it never reaches, or all of them without
    calibration data, take the range of each input as it comes (dynamic). So do always nn.LSTM,
    nn.GRU, nn.RNN, their cells (QLSTM, ...) and nn.MultiheadAttention (QMultiheadAttention). Of an
    nn.Embedding or nn.EmbeddingBag the rows become int8 (QEmbedding, QEmbeddingBag), but those of
    fewer than 32 values, which a scale for each would not make smaller; no summary lists these.
    `fastq.summary(result)` says for each layer what it became and why. What stays float gets
    requires_grad=False, since int8 layers have no gradient to pass on. Images are faster in
    torch.channels_last: the result is, then, and torch's own pooling is, too.

    calibration_data  one batch (a tensor or a dict), or an iterable of batches, such as a
        DataLoader. A batch is a tensor: model(batch); a dict: model(**batch); or a tuple or list
        whose first element is one of these, and the input: most data sets give
        (images, labels). Batches are not collected. None: all layers are dynamic.
    forward   forward(model, batch) runs the model on a batch of any other kind.
    config    a `QConfig` for all layers, or a dict from name, pattern or class of modules to a
        QConfig, or to None: float. Of several that match, the last one holds. Its observer is that
        of the layer's input here. None: "minmax", weights of 8 bits.
    skip      layers to keep float: a name ('features.0'), a pattern ('*.attn.*'), a class, or
        several of these. What holds for a module holds for all within it.
    dynamic   layers to keep dynamic though there is calibration data, given likewise.
    strict    raise ValueError if a layer stays float and neither skip nor config asks for it.
        Layers are linear, convolution, recurrent, attention, bilinear and batch norm, and modules
        that multiply by parameters of their own, as by those of experts.
    inplace   change the given model instead of a copy; after an error it is as it was. A model
        that is itself one layer cannot be changed in place: use what is returned.
    progress  show a progress bar if standard error is a terminal.
    distributed  True, or a torch.distributed ProcessGroup: each of its processes makes this call
        with its part of the data, and all get the same layers.

    Raises TypeError for a model, data or batch of a wrong kind; ValueError for empty data, for
    a name in skip or dynamic that matches nothing, and if no layer can become int8. An error
    that the model raises passes through, with a note.
    """
    check_module("quantize_layers", model)
    if isinstance(model, QuantizedModel):
        raise TypeError(
            "quantize_layers: this QuantizedModel is int8 already, as a whole; wanted a float model"
        )
    processes = Processes(distributed)
    try:
        result = model if inplace else duplicate(model)
    except Exception as error:
        error.add_note("quantize_layers copied the model; inplace=True changes it without a copy")
        raise
    undo = remember(result)
    try:
        return swap_layers(
            "quantize_layers", result, calibration_data, forward, config, skip, dynamic,
            strict=strict, progress=progress, processes=processes,
        )  # fmt: skip
    except BaseException:
        undo()  # matters with inplace=True: the caller has this model
        raise


def swap_layers(
    name: str,
    result: nn.Module,
    calibration_data: Any,
    forward: Forward | None,
    config: Config | None,
    skip: Any,
    dynamic: Any,
    *,
    strict: bool,
    progress: bool,
    processes: Processes,
) -> nn.Module:
    """`quantize_layers` on this very model; name: of the function that was called, for errors."""
    result.eval()
    leave_fast_path(result)
    names = module_names(result)
    configs = choose(names, config, skip, MINMAX)
    left_dynamic = select(names, dynamic, "dynamic")
    result, rebuilt = _rebuild_all(result, names, configs, left_dynamic)
    names = module_names(result)
    plan = _plan(names, configs, left_dynamic)
    _refuse_nothing(name, result, plan)

    batch = None
    if calibration_data is None:
        traced = trace(result)
        for layer in plan:
            layer.keep_dynamic("no calibration data")
    else:
        progress = progress and processes.rank == 0
        with unmarked(result):
            traced, batch = _calibrate(name, result, calibration_data, forward, plan, progress)
        _merge(plan, processes)
    plan += _bare(names, traced.products, configs)
    order = {module: i for i, module in enumerate(names)}
    plan.sort(key=lambda layer: order[layer.module])
    _leave_read(plan, traced)
    _refuse_nothing(name, result, plan)

    folds = _choose_folds(plan, traced)
    report = QuantizationSummary(tuple(layer.row() for layer in plan), tuple(rebuilt))
    left = [layer for layer in plan if layer.result == "float" and not layer.asked]
    if strict and not all(isinstance(layer.module, TABLES) for layer in left):
        raise ValueError(
            f"{name}: strict=True, and layers stay float; name them in skip= to accept that\n"
            f"{report}"
        )
    result = _swap(result, plan, folds)
    keep_summary(result, report)
    if calibration_data is not None:
        with unmarked(result):
            _run(
                name,
                result,
                batch,
                forward,
                "the int8 model, on the last calibration batch. If a module reads a layer's weight "
                "instead of calling it, keep that layer float with skip=",
            )
    return result


def _rebuild_all(
    model: nn.Module,
    names: Names,
    configs: dict[str, QConfig | None],
    left_dynamic: set[nn.Module],
) -> tuple[nn.Module, list[str]]:
    """The model with the subclasses that shall be int8 said with torch's own layers, and the names
    of these. What holds for one holds for its layers: added to configs and left_dynamic."""
    rebuilt = []
    for module, paths in names.items():
        config = configs[paths[0]]
        plain = rebuild(module) if config else None
        if plain is not None:
            model = replace(model, paths, plain)
            rebuilt.append(paths[0])
            left_dynamic |= set(plain.modules()) if module in left_dynamic else set()
            for name, _ in plain.named_modules(prefix=paths[0]):
                configs.setdefault(name, config)
    return model, rebuilt


def _plan(
    names: Names, configs: Mapping[str, QConfig | None], left_dynamic: set[nn.Module]
) -> list[_Layer]:
    """What each layer shall become, before the model was run."""
    plan = [
        _Layer(module, paths, configs[paths[0]] or MINMAX, *outlook(module))
        for module, paths in listed(names).items()
    ]
    for layer in plan:
        if configs[layer.name] is None:
            layer.keep_float(ASKED, asked=True)
        elif layer.module in left_dynamic:
            layer.keep_dynamic(ASKED)
    return plan


def _leave_read(plan: Sequence[_Layer], traced: Trace) -> None:
    """Keeps layers float whose weight others read, too: its integers would mislead them."""
    for layer in plan:
        caster = traced.casters.get(layer.name)
        reader = traced.readers.get(layer.name, "" if layer.read else None)
        for who, what in (
            (caster, "converts to the dtype of its weight"),
            (reader, "computes with its weight itself instead of calling it"),
        ):
            if who is not None:
                layer.keep_float(f"{repr(who) if who else 'the model'} {what}")


def _swap(
    model: nn.Module, plan: Sequence[_Layer], folds: Sequence[tuple[_Layer, _Layer]]
) -> nn.Module:
    """The model with batch norms folded and int8 layers in the place of float ones."""
    for layer, batch_norm in folds:
        fold_batch_norm(layer.module, batch_norm.module)
        model = replace(model, batch_norm.names, nn.Identity())
    for layer in plan:
        if layer.becomes_int8():
            static = layer.result == "int8 static"
            given = {"input_qparams": qparams_of(layer.observer, layer.name)} if static else {}
            int8 = SWAPS[type(layer.module)].from_float(layer.module, config=layer.config, **given)
            if isinstance(int8, QLayer):
                int8.path = layer.name
            model = replace(model, layer.names, int8)
    for parameter in model.parameters():
        if parameter.is_leaf:
            parameter.requires_grad = False
        else:  # a scripted module's, in a copy
            parameter.detach_()
    return model


def _bare(
    names: Names, products: Mapping[str, set[str]], configs: Mapping[str, QConfig | None]
) -> list[_Layer]:
    """The modules with parameters that are multiplied by and that no layer has, if these are many:
    tensors of two axes or more."""
    layers, found = listed(names), []
    for module, paths in names.items():
        torchs = type(module).__module__.startswith("torch.")
        if module in layers or (torchs and not isinstance(module, PARAMETERS)):
            continue
        given = {
            name: module.get_parameter(name) for path in paths for name in products.get(path, ())
        }
        own = sorted(name for name, p in given.items() if sum(n > 1 for n in p.shape) > 1)
        if sum(given[name].numel() for name in own) > TRIFLE:
            shown = ", ".join([*own[:3], *["..."] * (len(own) > 3)])
            why = f"its parameters are in no layer: {shown}"
            layer = _Layer(module, paths, MINMAX, "float", why)
            layer.asked = configs.get(paths[0], MINMAX) is None
            found.append(layer)
    return found


def _merge(plan: Sequence[_Layer], processes: Processes) -> None:
    """Lets each layer know what its like in other processes saw; those that saw nothing have no
    range."""
    observers = processes.merge({layer.name: layer.observer for layer in plan})
    axes = processes.gather({layer.name: layer.axes for layer in plan})
    for layer in plan:
        layer.observer = observers[layer.name]
        layer.axes = set().union(*(part[layer.name] for part in axes))
        if not layer.axes:
            layer.keep_dynamic("the calibration data never reached it")
        elif not layer.observer.count:
            layer.keep_dynamic("the calibration data gave it no finite value")


@dataclass(eq=False)
class _Layer:
    """A layer on its way to a row: what it shall become, and what its inputs looked like."""

    module: Any
    names: list[str]
    config: QConfig
    result: Result
    reason: str = ""
    asked: bool = False
    axes: set[int] = field(default_factory=set)
    read: bool = False  # its parameters, by others than itself
    observer: Observer = field(init=False)

    def __post_init__(self) -> None:
        self.observer = make_observer(self.config.observer)

    @property
    def name(self) -> str:
        return self.names[0]

    def becomes_int8(self) -> bool:
        return type(self.module) in SWAPS and self.result != "float"

    def keep_float(self, reason: str, asked: bool = False) -> None:
        if isinstance(self.module, INT8):
            return
        if self.result != "float" or not self.reason:  # the first reason stands
            self.result, self.reason = "float", reason
        self.asked |= asked

    def keep_dynamic(self, reason: str) -> None:
        if self.becomes_int8() and self.result == "int8 static":
            self.result, self.reason = "int8 dynamic", reason

    def watch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        self.axes.add(x.dim())
        for part in x.unbind() if x.is_nested else (x,):
            self.observer.update(part.detach().to("cpu", torch.float32).numpy())

    def row(self) -> Row:
        return Row(self.name, type(self.module).__name__, self.result, self.reason)


def _refuse_nothing(name: str, model: nn.Module, plan: list[_Layer]) -> None:
    """ValueError unless something is going to change."""
    if any(layer.becomes_int8() for layer in plan):
        return
    table = f"\n{QuantizationSummary(tuple(x.row() for x in plan))}" if plan else ""
    which = f"{name}: no layer of this {type(model).__name__} can become int8"
    if any(layer.reason == ASKED for layer in plan):
        which += ": skip= and config= keep those float that could; wanted one that they leave"
    elif any(isinstance(layer.module, INT8) for layer in plan):
        which += ": int8 already are those that could; wanted the float model"
    else:
        which += (
            "; wanted at least one plain nn.Linear, convolution, embedding (of rows of at least "
            f"{LEAST_ROW} values), recurrent or attention layer, float32, on the CPU"
        )
    raise ValueError(which + table)


def _calibrate(
    name: str, model: nn.Module, data: Any, forward: Forward | None, plan: list[_Layer],
    progress: bool,
) -> tuple[Trace, Any]:  # fmt: skip
    """Run the model on all batches, watched; the trace on the first batch, and the last batch."""
    batches = data if isinstance(data, Batches) else Batches(data)
    batches.first()
    traced = None
    batch = None
    handles = []
    shown = bar(batches, "calibrate", progress, batches.total, unit="batch")
    try:
        for number, batch in enumerate(shown):
            if traced is None:
                args, kwargs = _arguments(batch, forward)
                traced = trace(model, args, kwargs, forward)
                handles = [
                    layer.module.register_forward_pre_hook(layer.watch, with_kwargs=True)
                    for layer in plan
                    if layer.result == "int8 static"
                ]
            with _Readers(model, plan, traced) if number == 0 else contextlib.nullcontext():
                _run(name, model, batch, forward, f"the float model, on calibration batch {number}")
    finally:
        shown.close()
        for handle in handles:
            handle.remove()
    assert traced is not None  # there is a first batch
    return traced, batch


class _Readers(TorchFunctionMode):
    """Watches every torch function of one pass, for two things.

    Who computes with a layer's parameters? If others than the layer do, `_Layer.read` is set: the
    integers of an int8 layer would mislead them. To ask for a shape or a dtype is no reading.
    Which parameters that are in no layer are multiplied by? `Trace.products` gets their names.
    """

    def __init__(self, model: nn.Module, plan: list[_Layer], traced: Trace) -> None:
        super().__init__()
        self.products = traced.products
        self.stored = {memory_of(p): name for name, p in model.named_parameters() if not is_lazy(p)}
        self.stored.pop(0, None)
        self.layers = {layer.module: layer for layer in plan}
        self.owners: dict[int, list[nn.Module]] = {}  # several modules may share a parameter
        for module in python_modules(model):
            for parameter in module.parameters(recurse=module in self.layers):
                self.owners.setdefault(id(parameter), []).append(module)
        self.running: list[nn.Module] = []
        self.handles = [
            handle
            for module in {module for owners in self.owners.values() for module in owners}
            for handle in (
                module.register_forward_pre_hook(lambda m, _: self.running.append(m)),
                module.register_forward_hook(self._left, always_call=True),
            )
        ]

    def _left(self, *_: Any) -> None:
        self.running.pop()

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        within = self.running and self.running[-1] in self.layers
        if not within and getattr(function, "__name__", "") in PRODUCTS:
            for leaf in pytree.tree_leaves((args, kwargs)):
                name = self.stored.get(memory_of(leaf)) if isinstance(leaf, Tensor) else None
                if name is not None:
                    owner, _, own = name.rpartition(".")
                    self.products.setdefault(owner, set()).add(own)
        result = function(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in pytree.tree_leaves(result)):
            for leaf in pytree.tree_leaves((args, kwargs)):
                owners = self.owners.get(id(leaf), [])
                if not any(module in self.running for module in owners):
                    for layer in filter(None, map(self.layers.get, owners)):
                        layer.read = True
        return result


def memory_of(tensor: Tensor) -> int:
    """Where its memory is, a view's where that of the whole is; 0: it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, or within torch.func
        return 0


def _arguments(batch: Any, forward: Forward | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a batch gives to the model, or to `forward` after the model."""
    return ((batch,), {}) if forward is not None else arguments_of(batch)


def _run(name: str, model: nn.Module, batch: Any, forward: Forward | None, what: str) -> None:
    args, kwargs = _arguments(batch, forward)
    try:
        with torch.no_grad():
            if forward is None:
                model(*args, **kwargs)
            else:
                forward(model, *args)
    except Exception as error:
        error.add_note(f"{name} ran {what}")
        add_hint(error, batch, forward)
        raise


def _choose_folds(plan: list[_Layer], traced: Trace) -> list[tuple[_Layer, _Layer]]:
    """(layer, batch norm) of all that fold; the others learn why they stay float."""
    layers = {layer.name: layer for layer in plan}
    folds = []
    for batch_norm in plan:
        if not isinstance(batch_norm.module, _BatchNorm) or batch_norm.reason:
            continue
        layer = layers.get(traced.batch_norms.get(batch_norm.name, ""))
        if traced.reason:
            batch_norm.keep_float(f"not folded, the model has no graph: {traced.reason}")
        elif layer is None:
            batch_norm.keep_float("not folded: it is not all that follows one conv or linear layer")
        elif not layer.becomes_int8():
            batch_norm.keep_float(f"'{layer.name}' before it stays float", asked=layer.asked)
        elif not layer.axes and not _same_channels(layer, batch_norm):
            batch_norm.keep_float(
                f"not folded: no calibration data shows the shape of the input of '{layer.name}'"
            )
        elif not _same_channels(layer, batch_norm):
            batch_norm.keep_float(f"not folded: its channels are not the outputs of '{layer.name}'")
        elif not _folds_to_finite(batch_norm.module):
            batch_norm.keep_float("not folded: has no running statistics, or none that are finite")
        else:
            batch_norm.result, batch_norm.reason = "folded", f"into '{layer.name}'"
            folds.append((layer, batch_norm))
    return folds


def _same_channels(layer: _Layer, batch_norm: _Layer) -> bool:
    """Whether the batch norm's channels, axis 1, are the layer's outputs in all that was seen:
    after (B, L, N) of a linear layer, or (N, L) of a convolution, it would run along L."""
    rank = layer.module.weight.dim()  # that of a batch
    certain = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, ())  # these take no other
    return layer.axes == {rank} or isinstance(batch_norm.module, certain)


def _affine(batch_norm: Any) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as y = factor * x + shift, float64 (C,)."""
    own = {"running_mean": batch_norm.running_mean, "running_var": batch_norm.running_var,
           "norm_weight": batch_norm.weight, "norm_bias": batch_norm.bias}  # fmt: skip
    given = {name: tensor.detach() for name, tensor in own.items() if tensor is not None}
    return normalization(batch_norm.eps, given)


def _folds_to_finite(batch_norm: Any) -> bool:
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        return False
    return all(bool(part.float().isfinite().all()) for part in _affine(batch_norm))


def fold_batch_norm(layer: Any, batch_norm: Any) -> None:
    """Give a layer the weight and bias that do the work of its batch norm as well; new parameters,
    so that another layer with the same parameter keeps it."""
    groups = layer.groups if getattr(layer, "transposed", False) else 0
    made = scaled(layer.weight, layer.bias, *_affine(batch_norm), groups)
    for name, tensor in made.items():
        setattr(layer, name, nn.Parameter(tensor.detach()))
