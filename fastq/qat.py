"""Quantization-aware training: a network that trains with the values that its integer program has.

Each forward lowers the network with its present parameters and runs that program's steps, so every
value that training sees is scale * (q - zero_point) of the integers that `convert` will give, and
every output is the same bits. Beside each value runs a float surrogate, the same operation on those
values with weights on their grid; its gradient is the value's, and zero where a value or a weight
was clipped: the straight-through estimator (Bengio et al., 2013; Jacob et al., CVPR 2018).

Batch norm is folded as it is deployed, with its running statistics. While these still move, the
gradient also goes through the batch's statistics, as if they were corrected to the running ones:
batch renormalization (Ioffe, NeurIPS 2017). Nothing is ever divided by the batch norm's weight.

With learned=True, step sizes are parameters (LSQ: Esser et al., ICLR 2020).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from fastq.batches import Batches
from fastq.fuse import fold
from fastq.graph import MOVES, Node, evaluate, normalization, shapes_of
from fastq.lower import SUFFIX, mirrored, weight_of
from fastq.modules import Config, Selector, check_module
from fastq.network import (
    build,
    calibrate,
    call_of,
    forward_names,
    prepare_model,
    summarize,
)
from fastq.nn.model import QuantizedModel, check_constant, leaves_of
from fastq.parameters import Place, parameters_of, places_of
from fastq.prepare import (
    Prepared,
    Watcher,
    Weight,
    grid_steps,
)
from fastq.processes import Processes
from fastq.qconfig import QConfig
from fastq.qparams import FLT_MIN, quantize_weight
from fastq.read import CannotCapture
from fastq.recipe import read_recipe
from fastq.sizes import Shapes, sized
from fastq.straight_through import RegionIntegers, TrainedRange, TrainedSteps, on_grid
from fastq.summaries import QuantizationSummary, summary
from fastq.trace import Forward
from fastq.weights import per_output

FROZEN = "norms_frozen", "ranges_frozen"


def prepare_qat(
    model: nn.Module,
    data: Any = None,
    *,
    forward: Forward | None = None,
    config: Config | None = None,
    skip: Selector | Iterable[Selector] = (),
    learned: bool = False,
    progress: bool = True,
    distributed: Any = False,
) -> QATModel:
    """A trainable copy of the model whose forward is the integer network's, bit for bit.

    It is trained as the model would be: any loop, optimizer and scheduler; its parameters have the
    model's names and, at first, values. `fastq.convert` makes the integer network of it.

    model     a float model, trained already: ranges and statistics follow an untrained one slowly.
              Or what `fastq.quantize_model` or `fastq.load` returned: its weights, scales and zero
              points are then the start, and the first forward gives its outputs.
    data      calibration data for a float model, as in `quantize_model`. Not for a quantized one.
    forward, config, skip, progress, distributed   as in `quantize_model`; for a float model. The
              processes of DistributedDataParallel find their first ranges together.
    learned   whether the scales of weights and activations are parameters. Otherwise a weight's
              scale follows the weight (a quantized model's stays), and in training mode the range
              of an activation is the moving average of its smallest and largest value. So is that
              of a sum in int16 always.

    Dropout is off, as it is when the network is deployed. Float32, on the CPU.

    Its submodules hold the parameters and buffers; the forward is the graph's. So hooks on them are
    not called, and settings that change later do not count, but for a batch norm's momentum and
    mode: `.eval()` keeps the statistics of that one.

    Raises TypeError for a model or data of a wrong kind; ValueError if nothing can become int8;
    ValueError too if torch.export cannot follow the model.
    """
    if isinstance(model, QuantizedModel):
        if data is not None or config is not None or skip:
            raise TypeError(
                "prepare_qat: got data, config or skip with a quantized model, which has its "
                "ranges, bits and layers already; wanted prepare_qat(quantized)"
            )
        if model.has_layers_alone:
            raise ValueError(
                "prepare_qat: this network has int8 layers between its programs, which have no "
                "gradient; wanted the float model, in which they stay float: prepare_qat(model, "
                "data)"
            )
        prepared = read_recipe(model)
        return QATModel(
            prepared, parameters_of(prepared.graph), model.layout.names, summary(model), learned
        )
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule | QATModel):
        raise TypeError(
            f"prepare_qat: got {type(model).__name__}; wanted a float torch.nn.Module, not "
            "scripted or prepared already, or what quantize_model returned"
        )
    if data is None:
        raise TypeError(
            "prepare_qat: a float model wants data to follow it with and to find the first ranges, "
            "such as a batch of training inputs: prepare_qat(model, images[:64])"
        )
    processes, batches = Processes(distributed), Batches(data, "data")
    args, kwargs = call_of(model, batches.first(), forward)
    try:
        prepared, twin = prepare_model(model, args, kwargs, config=config, skip=skip)
    except CannotCapture as error:
        raise ValueError(
            f"prepare_qat: there is no graph of this {type(model).__name__}, which training in "
            f"integers wants: {error}{_in_float32(model)}"
        ) from error
    if not prepared.regions:
        raise ValueError(
            f"prepare_qat: nothing in this {type(model).__name__} can become int8; wanted at "
            f"least one product in float32 on the CPU{_in_float32(model)}\n"
            f"{summarize(prepared, model)}"
        )
    calibrate(prepared, model, batches, forward, progress=progress, processes=processes)
    report = summarize(prepared, model)
    return QATModel(prepared, twin, forward_names(model), report, learned)


def _in_float32(model: nn.Module) -> str:
    """What makes float32 of a model's parameters, if some are of other kinds of real numbers."""
    real = [p.dtype for p in model.parameters() if p.is_floating_point()]
    others = sorted({str(dtype).removeprefix("torch.") for dtype in real} - {"float32"})
    if not others:
        return ""
    return f"; its parameters are {' and '.join(others)}: model.float() makes them float32"


def convert(model: nn.Module) -> QuantizedModel:
    """The integer network of a model from `prepare_qat`, also inside DistributedDataParallel,
    AveragedModel or what torch.compile returned.

    Its outputs are those of the trained model in eval mode, the same bits. The model stays as it
    is and may be trained on. TypeError for another model.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    if isinstance(model, nn.parallel.DistributedDataParallel | AveragedModel):
        model = model.module
    if not isinstance(model, QATModel):
        raise TypeError(
            f"convert: got {type(model).__name__}; wanted what fastq.prepare_qat returned. "
            "fastq.quantize_model makes an integer network of a float one"
        )
    return model.converted()


def check_float(name: str, model: Any) -> None:
    """TypeError unless it is a module that was not made an integer network yet."""
    check_module(name, model)
    if isinstance(model, QuantizedModel | QATModel):
        wanted = "fastq.convert(model)" if isinstance(model, QATModel) else "a float model"
        kind = type(model).__name__
        raise TypeError(f"{name}: this {kind} is quantized already; wanted {wanted}")


class QATModel(nn.Module):
    """A network with the values of its integer program and the gradients of a float one.

    `fastq.prepare_qat` makes it. Parameters and buffers have the float model's names; what belongs
    to the quantization is under "fastq.", called as in the program: "fastq.conv2d_u8.scale" is
    a value's, "fastq.conv2d_s8.scale" a weight's. How many bits weights have, and how their
    ranges are found, is no tensor: a state of a training with others is refused.

    In training mode a forward moves the running statistics of batch norms and, unless scales are
    learned, the ranges of activations; both from the next forward on. `freeze_batch_norm` and
    `freeze_ranges` end that: well before the end of a training, for both are deployed as they are
    then. What is frozen is part of the state.
    """

    def __init__(
        self,
        prepared: Prepared,
        model: nn.Module,
        names: Sequence[str],
        report: QuantizationSummary,
        learned: bool,
    ) -> None:
        super().__init__()
        if "fastq" in model._modules:
            raise ValueError("prepare_qat: the model has a module 'fastq'; wanted another name")
        for name, module in model._modules.items():
            self.add_module(name, module)
        for name, parameter in model._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in model._buffers.items():
            self.register_buffer(name, buffer, name not in model._non_persistent_buffers_set)
        self._prepared, self._names, self._fastq_summary = prepared, list(names), report
        named = self._named()
        self._places = {node: places_of(node, named) for node in prepared.graph}
        self.fastq = nn.ModuleDict()
        for frozen in FROZEN:  # 0 or 1: a bool cannot be averaged, as AveragedModel does
            self.fastq.register_buffer(frozen, torch.tensor(0))
        for stands in prepared.stand_ins():
            centered = stands in prepared.ranges.symmetric
            self.fastq[self._value(stands)] = TrainedRange(
                prepared.qparams(stands), centered, learned
            )
        for node in prepared.layers():
            if learned or node in prepared.chosen:
                self.fastq[f"{node.name}_s8"] = TrainedSteps(_first_steps(prepared, node), learned)
        prepared.forget()
        self.train()

    def freeze_batch_norm(self) -> QATModel:
        """Keep the running statistics of batch norms, and let no gradient through a batch's."""
        self.fastq.get_buffer("norms_frozen").fill_(1)
        return self

    def freeze_ranges(self) -> QATModel:
        """Keep the ranges of activations. Learned scales are parameters, and go on."""
        self.fastq.get_buffer("ranges_frozen").fill_(1)
        return self

    def moves(self, frozen: str) -> bool:
        """Whether a forward moves what one of FROZEN would keep."""
        return self.training and not self.fastq.get_buffer(frozen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `convert(self)` returns for these arguments, the same bits, with a gradient.

        Torch's float operators between programs may round otherwise for tensors that ask for a
        gradient: with them, the bits are the same under torch.no_grad.

        float32 tensors on the CPU, as the float model took them; under autocast too. TypeError
        and ValueError for other arguments. In what a program takes NaN counts as 0, as it does
        in the integer network: results and gradients are finite, the gradient of that value is 0.
        Infinities saturate. Neither counts in the ranges that training moves. So a loss does not
        show that a batch has NaN: look for them in the data.
        """
        if torch.compiler.is_compiling():  # Dynamo would look for torch in the kernels
            return torch.compiler.disable(self._forward)(*args, **kwargs)
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        captured = self._prepared.captured
        leaves = leaves_of(self, args, kwargs, captured.in_spec, captured.arguments, self._names)
        values: dict[Node, Any] = {}
        for i, (wanted, leaf) in enumerate(zip(captured.arguments, leaves, strict=True)):
            if isinstance(wanted, Node):
                values[wanted] = leaf
            else:
                check_constant(self, i, leaf, wanted)
        shapes = shapes_of(leaves)
        with torch.autocast("cpu", enabled=False):
            one = _Pass(self._prepared, self._trained(), values, shapes)
        for node in captured.graph:
            if node.op != "input":
                values[node] = one.value(node)
        one.finish()
        outputs = [
            values[v] if isinstance(v, Node) else sized(v, shapes) for v in captured.graph.outputs
        ]
        return pytree.tree_unflatten(outputs, captured.out_spec)

    def converted(self) -> QuantizedModel:
        """The integer network: see `fastq.convert`."""
        with torch.no_grad():
            self._deploy(self._tensors())
        return build(self._prepared, self._names, self._fastq_summary)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["weights"] = self._weights()

    def _load_from_state_dict(self, *args: Any) -> None:
        """Refuses the state of weights quantized otherwise, also as a part of another model."""
        _, prefix, metadata, *_ = args
        given = metadata.get("weights", {})
        for name, now in self._weights().items():
            was = given.get(name, now)  # of a layer that is float there, the keys say so
            if was != now:
                raise RuntimeError(
                    f"{prefix or type(self).__name__}: the state is of a training in which the "
                    f"weight of '{name}' has {was}; here {now}. Wanted prepare_qat with the same "
                    "config= as there"
                )
        super()._load_from_state_dict(*args)

    def _weights(self) -> dict[str, str]:
        """How each layer's weight is quantized, but for what is a tensor of the state."""
        found = {}
        for node in self._prepared.layers():
            config = self._prepared.config(node)
            follows = "" if self._steps(node) is not None else f", range {config.weight_range!r}"
            found[node.layer or node.name] = f"{config.weight_bits} bits{follows}"
        return found

    def _named(self) -> dict[str, Tensor]:
        """All parameters and buffers; a tensor with several names has each."""
        return dict(
            itertools.chain(
                self.named_buffers(remove_duplicate=False),
                self.named_parameters(remove_duplicate=False),
            )
        )

    def _tensors(self) -> dict[Node, dict[str, Tensor]]:
        """The parameters of each node, before a batch norm is folded."""
        named = self._named()
        return {
            node: {
                key: place if isinstance(place, Tensor) else place.find(named)
                for key, place in places.items()
            }
            for node, places in self._places.items()
        }

    def _deploy(self, tensors: Mapping[Node, dict[str, Tensor]]) -> dict[Node, dict[str, Tensor]]:
        """Lets the graph have the present parameters and scales; returns its tensors as functions
        of the parameters."""
        prepared = self._prepared
        deployed = {node: _folded(node, given) for node, given in tensors.items()}
        for node, own in deployed.items():
            node.tensors = {key: tensor.detach() for key, tensor in own.items()}
        for node in prepared.ranges.parent:
            moving = self._range(node)
            if moving is not None and prepared.ranges.find(node) is node:
                prepared.set_qparams(node, moving.qparams())
        for node in prepared.layers():
            prepared.chosen[node] = self._weight(node)
        return deployed

    def _trained(self) -> _Trained:
        """All that a forward has of this model."""
        prepared, given = self._prepared, self._tensors()
        normed = [n for n in prepared.graph if self.moves("norms_frozen") and "norm" in n.attrs]
        return _Trained(
            given=given,
            deployed=self._deploy(given),
            ranges={node: self._range(node) for node in prepared.ranges.parent},
            steps={node: self._steps(node) for node in prepared.layers()},
            norms={node: norm for node in normed if (norm := self._norm(node)).training},
            follows=self.moves("ranges_frozen"),
        )

    def _norm(self, node: Node) -> nn.Module:
        """The module that has the statistics of a node's batch norm; without one, the whole."""
        place = self._places[node]["running_mean"]
        return self.get_submodule(place.name.rpartition(".")[0] if isinstance(place, Place) else "")

    def _range(self, node: Node) -> TrainedRange | None:
        """The range of a value; None if it is fixed."""
        return getattr(self.fastq, self._value(self._prepared.ranges.find(node)), None)

    def _value(self, stands: Node) -> str:
        """The name of a range."""
        return f"{stands.name}_{SUFFIX[self._prepared.ranges.dtype(stands)]}"

    def _steps(self, node: Node) -> Tensor | None:
        """The scale of a layer's weight if it is state, not a function of the weight."""
        name = f"{node.name}_s8"
        return getattr(getattr(self.fastq, name, None), "scale", None)

    def _weight(self, node: Node) -> Weight:
        """The int8 weight of a layer and its scale, outputs first."""
        real, config = weight_of(node).numpy(), self._prepared.config(node)
        steps = self._steps(node)
        if steps is None:
            return quantize_weight(real, range=config.weight_range, bits=config.weight_bits)
        scale, limit = steps.detach().clamp(min=FLT_MIN).numpy(), _limit(config)
        data = np.rint(real / per_output(scale, real.ndim))
        return np.clip(data, -limit, limit).astype(np.int8), scale


def _first_steps(prepared: Prepared, node: Node) -> Tensor:
    """The scale of a layer's weight that training starts from."""
    data, scale = prepared.weight(node)
    empty = ~data.any(axis=tuple(range(1, data.ndim)))
    if empty.any() and node.origin:  # a batch norm's weight of 0 says nothing; the layer's own does
        own = mirrored(node, node.origin["weight"]).numpy()
        scale = np.where(
            empty, quantize_weight(own, bits=prepared.config(node).weight_bits)[1], scale
        )
    return torch.from_numpy(scale.copy())


def _limit(config: QConfig) -> int:
    """The largest magnitude of a weight, in steps."""
    return int(2 ** (config.weight_bits - 1) - 1)


def _folded(node: Node, given: Mapping[str, Tensor], *affine: Tensor) -> dict[str, Tensor]:
    """The tensors that a node has in the integer network: with its batch norm, by default that of
    the running statistics, folded into it."""
    if "norm" not in node.attrs:
        own = {name: tensor for name, tensor in given.items() if name not in ("factor", "shift")}
        constants = given.get("factor"), given.get("shift")
        plain = node.op in ("affine", "grid") or constants == (None, None)  # their own
        return dict(given) if plain else fold(node, own, *constants)
    factor, shift = affine or normalization(node.attrs["norm"]["eps"], given)
    if node.op == "affine":
        return {"factor": factor, "shift": shift}
    return fold(node, given, factor, shift)


def _share(module: nn.Module, momentum: float) -> float:
    """How much of this batch is in the running statistics; counts it where torch does.

    momentum  for a module that is no batch norm. Exported, that of a mean of all batches is 0.
    """
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return momentum
    share, count = module.momentum, module.num_batches_tracked
    if count is not None:
        count += 1
        share = 1 / count.item() if share is None else share
    return share or 0.0


@dataclass(frozen=True)
class _Trained:
    """What a forward has of its model, and what it moves there.

    given     the parameters of each node, before a batch norm is folded.
    deployed  those that it has in the integer network, as functions of the parameters.
    ranges    of values; None where a range is fixed.
    steps     the scale of a layer's weight; None where it is a function of the weight.
    norms     the modules of the batch norms whose statistics move.
    follows   whether ranges that are not learned follow the values of this forward.
    """

    given: dict[Node, dict[str, Tensor]]
    deployed: dict[Node, dict[str, Tensor]]
    ranges: dict[Node, TrainedRange | None]
    steps: dict[Node, Tensor | None]
    norms: dict[Node, nn.Module]
    follows: bool


class _Pass:
    """One forward: the integers of each value, and beside them what has the gradient."""

    def __init__(
        self, prepared: Prepared, trained: _Trained, values: dict[Node, Any], shapes: Shapes
    ) -> None:
        self.prepared, self.trained = prepared, trained
        self.values, self.shapes = values, shapes
        # whether float values are wanted, for a gradient or for statistics, beside the integers
        self.floats = torch.is_grad_enabled() or trained.follows or bool(trained.norms)
        self.runs: dict[Node, RegionIntegers] = {}
        for region in prepared.regions:
            self.runs |= dict.fromkeys(region.nodes, RegionIntegers(prepared, region, shapes))
        self.quantized = set(prepared.ranges.parent)
        # sees what ranges follow; None where they stay
        self.watcher = Watcher(prepared) if trained.follows else None
        self.seen: dict[TrainedRange, list[Tensor]] = {}
        self.statistics: list[Callable[[], None]] = []

    def value(self, node: Node) -> Any:
        """The value of a node, of which all inputs are known."""
        run = self.runs.get(node)
        if run is None:
            stand_in = replace(node, tensors=self.trained.deployed[node])
            if not torch.is_grad_enabled():  # with one to compute, torch may round otherwise
                stand_in.tensors = {key: t.detach() for key, t in stand_in.tensors.items()}
            with torch.autocast("cpu", enabled=False):  # as the integer network computes it
                return evaluate(stand_in, [self.values[v] for v in node.inputs], self.shapes)
        for v in node.inputs:
            if v not in run.values:  # it comes from without
                run.take(v, self.values[v])
                given = self.values[v]
                if v not in self.quantized:
                    run.values[v] = given
                else:
                    run.values[v] = self.on_grid(run, v, given) if self.floats else None
        if self.floats:
            y = self.surrogate(node, [run.values[v] for v in node.inputs])
            run.values[node] = self.on_grid(run, node, y)
        else:
            run.values[node] = run.real(node) if node in run.region.outputs else None
        return run.values[node]

    def surrogate(self, node: Node, inputs: list[Tensor]) -> Tensor:
        """The float operation, on values of the grid, with weights of the grid."""
        tensors = self.trained.deployed[node]
        if node.op == "constant":
            return tensors["value"]
        with torch.autocast("cpu", enabled=False):
            if node in self.trained.norms and inputs[0].numel():
                tensors = self.renormalized(node, inputs[0])
            if node in self.prepared.chosen:
                tensors = {**tensors, "weight": self.weight_on_grid(node, tensors["weight"])}
        return evaluate(replace(node, tensors=tensors), inputs, self.shapes)

    def renormalized(self, node: Node, x: Tensor) -> dict[str, Tensor]:
        """The deployed tensors with the gradient of this batch's mean and variance; these are
        kept for the running ones."""
        given, norm = self.trained.given[node], node.attrs["norm"]
        if node.op != "affine":
            unclamped = {**node.attrs, "clamp": (-math.inf, math.inf)}
            product = replace(node, tensors=given, attrs=unclamped)
            x = evaluate(product, [x])
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(
                f"{node.layer}: one value per channel, of input {tuple(x.shape)}; a batch norm "
                "wants more while its statistics move: see freeze_batch_norm"
            )
        variance, mean = torch.var_mean(x.double(), axes, correction=0)
        running = {key: given[key].double() for key in ("running_mean", "running_var")}
        deviation = (variance + norm["eps"]).sqrt()
        wanted = (running["running_var"] + norm["eps"]).sqrt()
        ratio = (deviation / wanted).detach()
        offset = ((mean - running["running_mean"]) / wanted).detach()
        factor = ratio / deviation
        if "norm_weight" in given:
            factor = factor * given["norm_weight"].double()
            offset = offset * given["norm_weight"].double()
        shift = offset - mean * factor
        if "norm_bias" in given:
            shift = shift + given["norm_bias"].double()

        def move() -> None:
            unbiased = variance * (count / (count - 1))
            share = _share(self.trained.norms[node], norm["momentum"])
            given["running_mean"].lerp_(mean.to(given["running_mean"].dtype), share)
            given["running_var"].lerp_(unbiased.to(given["running_var"].dtype), share)

        self.statistics.append(move)
        return _folded(node, given, factor, shift)

    def weight_on_grid(self, node: Node, weight: Tensor) -> Tensor:
        data, scale = self.prepared.chosen[node]
        steps = torch.from_numpy(per_output(scale, data.ndim))
        limit = _limit(self.prepared.config(node))
        result = on_grid(
            mirrored(node, weight), self.trained.steps[node],
            lambda: torch.from_numpy(data) * steps, steps, -limit, limit, data[0].size,
        )  # fmt: skip
        return mirrored(node, result)

    def on_grid(self, run: RegionIntegers, node: Node, value: Tensor) -> Tensor:
        """What the integers of a node are, with the gradient of `value`."""
        if run.ends_float(node):
            return on_grid(value, None, partial(run.real, node), 1.0, -math.inf, math.inf, 1)
        qparams, moving = self.prepared.qparams(node), self.trained.ranges[node]
        # what is moved is on the grid already: its scale is learned where it was made
        learned = None if moving is None or node.op in MOVES else moving.scale
        if self.watcher is not None:
            for source, counts in self.watcher.see(node, value.detach()):
                self.follow(source, counts)
        return on_grid(
            value, learned, partial(run.real, node), float(qparams.scale), *grid_steps(qparams),
            value[:1].numel(),
        )  # fmt: skip

    def follow(self, node: Node, value: Tensor) -> None:
        """A range that follows the values of training goes where these are."""
        moving = self.trained.ranges[node]
        if moving is None or moving.learned or not value.numel():
            return
        ends = torch.stack(value.aminmax())
        if not bool(ends.isfinite().all()):
            value = value[value.isfinite()]
            if not value.numel():
                return
            ends = torch.stack(value.aminmax())
        self.seen.setdefault(moving, []).append(ends)

    def finish(self) -> None:
        """Moves what moves in training: from the next forward on."""
        with torch.no_grad():
            for move in self.statistics:
                move()
            for moving, ends in self.seen.items():
                moving.follow(torch.stack(ends).float())
