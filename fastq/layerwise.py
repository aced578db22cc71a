"""Which layers int8 costs most: each one quantized alone, everything else in float."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastq.batches import Batches
from fastq.graph import Node, evaluate
from fastq.modules import Config, Selector
from fastq.network import calibrate, call_of, prepare_model
from fastq.prepare import Prepared, fake_quantize
from fastq.progress import bar
from fastq.qat import check_float
from fastq.read import CannotCapture
from fastq.remedies import Remedies, remedy_names
from fastq.summaries import text_table
from fastq.trace import Forward


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer, quantized alone.

    name, kind  as in `named_modules()`, and its operation.
    snr         of the layer's output, in dB: 10 log10 of the signal's energy over the error's.
    output_snr  of the network's output, in dB; infinite where no error gets there.
    """

    name: str
    kind: str
    snr: float
    output_snr: float


@dataclass(frozen=True)
class Sensitivity:
    """The layers in the order in which they run.

    Printed, it is a table, the worst layer first, with its share of the sum of the noise that each
    layer alone brings to the network's output.
    """

    rows: tuple[LayerSensitivity, ...]

    def worst(self) -> list[LayerSensitivity]:
        """The layers, the one that harms the network's output most first."""
        return sorted(self.rows, key=lambda row: row.output_snr)

    def __str__(self) -> str:
        head = ("layer", "kind", "SNR at its output", "at the network's", "share of its noise")
        noise = [10 ** (-row.output_snr / 10) for row in self.worst()]
        lines = [
            (
                row.name or "(model)",
                row.kind,
                f"{row.snr:.1f} dB",
                f"{row.output_snr:.1f} dB",
                f"{100 * one / (sum(noise) or 1):.0f} %",
            )
            for row, one in zip(self.worst(), noise, strict=True)
        ]
        return "\n".join(text_table(head, lines, 2))

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib Figure with both SNRs for each layer in network order; saved if a path is
        given. Raises ModuleNotFoundError without matplotlib."""
        from matplotlib.figure import Figure

        names = [row.name or "(model)" for row in self.rows]
        places = range(len(names))
        figure = Figure(figsize=(7, 1.2 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots()
        at_output = [row.output_snr for row in self.rows]
        at_layer = [row.snr for row in self.rows]
        axes.hlines(places, at_output, at_layer, color="0.8", zorder=1)
        axes.scatter(at_output, places, s=22, c="tab:red", label="at the network's output")
        axes.scatter(
            at_layer, places, s=22, c="tab:blue", marker="s", label="at the layer's output"
        )
        axes.set_yticks(places, names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(y=0.5 / max(len(names), 1))
        axes.set_xlabel("signal-to-noise ratio in dB, this layer alone quantized: less is worse")
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def sensitivity(
    model: nn.Module,
    calibration_data: Any,
    *,
    forward: Forward | None = None,
    config: Config | None = None,
    skip: Selector | Iterable[Selector] = (),
    remedies: Remedies = (),
    progress: bool = True,
) -> Sensitivity:
    """What quantizing each layer alone, its inputs and its weight, does to its output and to the
    network's.

    The arguments are those of `fastq.quantize_model`, but for the remedies: none unless told
    otherwise. The equalizations show what is left to lose after them; the others make up for the
    errors of the layers before, which are not there when a layer is quantized alone. All batches
    calibrate; the ratios are measured on the first one: a float pass for each layer.

    Raises ValueError when torch.export cannot follow the model; else as quantize_model does.
    """
    check_float("sensitivity", model)
    remedies = remedy_names(remedies)
    batches = Batches(calibration_data)
    first = batches.first()
    call = call_of(model, first, forward)
    try:
        prepared, _ = prepare_model(model, *call, config=config, skip=skip)
    except CannotCapture as error:
        raise ValueError(f"sensitivity: the model has no graph: {error}") from error
    calibrate(prepared, model, batches, forward, remedies=remedies, progress=progress)
    arguments = pytree.tree_leaves(call)
    layers = prepared.layers()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        real = _numbers(prepared.graph.run(arguments))
        shown = bar(layers, "sensitivity", progress, unit="layer")
        return Sensitivity(tuple(_alone(prepared, layer, arguments, real) for layer in shown))


def _alone(prepared: Prepared, layer: Node, arguments: list[Any], real: Tensor) -> LayerSensitivity:
    inputs: dict[Node, Any] = {}
    snr = math.inf

    def watch(node: Node, value: Any) -> Any:
        nonlocal snr
        if node in layer.inputs:
            inputs[node] = fake_quantize(value, prepared.qparams(node))
        if node is not layer:
            return None
        alone = replace(node, tensors=prepared.simulated_tensors(node))
        quantized = evaluate(alone, [inputs[v] for v in node.inputs])
        snr = decibels(value, quantized)
        return quantized

    output = _numbers(prepared.graph.run(arguments, watch))
    return LayerSensitivity(layer.layer, layer.op, snr, decibels(real, output))


def _numbers(outputs: list[Any]) -> Tensor:
    """All floats that a network gives, in one row."""
    floats = [v.flatten() for v in outputs if isinstance(v, Tensor) and v.is_floating_point()]
    return torch.cat(floats)


def decibels(real: Tensor, other: Tensor) -> float:
    """10 log10 of the signal's energy over the error's; infinite where there is no error."""
    signal = float(real.double().square().sum())
    return ratio(signal, float((other.double() - real.double()).square().sum()))


def ratio(signal: float, error: float) -> float:
    """10 log10 of one energy over another, in dB; infinite where there is no error."""
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal else -math.inf
