"""What int8 costs and gives on one's own data: a quantized network beside the float one."""

from __future__ import annotations

import copy
import io
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastq import ops
from fastq.batches import Batches
from fastq.capture import Captured
from fastq.fidelity import Comparison, Distribution, Outputs, StepReport
from fastq.graph import Graph, Node
from fastq.kernels import isa
from fastq.ladder import score
from fastq.network import call_of, prepare_model
from fastq.nn.model import QuantizedModel
from fastq.page import Bars, Block, Details, Heading, Histogram, Table, Text, html, markdown
from fastq.profiling import memory, profile
from fastq.program import VIEWS
from fastq.progress import bar
from fastq.serialize import save
from fastq.summaries import QuantizationSummary, summary
from fastq.timing import check_count, medians
from fastq.trace import Forward

SECONDS = 10.0  # of timing per batch size, at most


@dataclass(frozen=True)
class Report:
    """What `report` measured. Pairs are (float32, int8).

    samples    how many inputs were compared.
    scores     name -> pair: "top-1 accuracy" of labels, "score" of evaluate.
    agreement  the share of predictions equal to float32's, 0 to 1; None without classes.
    snr        of each output, in dB.
    latency    batch size -> pair of microseconds.    memory  name -> pair of bytes.
    busy       other programs took the processor while times were measured.
    """

    title: str
    machine: Mapping[str, str]
    samples: int
    scores: Mapping[str, tuple[float, float]]
    agreement: float | None
    snr: tuple[float, ...]
    latency: Mapping[int, tuple[float, float]]
    memory: Mapping[str, tuple[int, int]]
    steps: tuple[StepReport, ...]
    summary: QuantizationSummary
    busy: bool

    def html(self) -> str:
        """One HTML file; it loads nothing."""
        return html(self.title, self._blocks())

    def markdown(self) -> str:
        """The content of `html`, as Markdown."""
        return markdown(self.title, self._blocks())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the HTML to `path`, and the Markdown beside it, its suffix .md."""
        path = Path(path)
        path.write_text(self.html(), encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    def __str__(self) -> str:
        return self.markdown()

    def _blocks(self) -> list[Block]:
        counts = Counter(row.result for row in self.summary.rows)
        layers = ", ".join(f"{n} {result}" for result, n in counts.items())
        noise = tuple(step.snr for step in self.steps)
        labels = tuple(step.layer or step.name for step in self.steps)
        return [
            Text(f"int8 beside float32 on {self.samples} inputs. Layers: {layers}."),
            Table("Accuracy, speed and memory", "lrrr", _COMPARED, tuple(self.rows())),
            *([Text(_BUSY)] if self.busy else []),
            Heading("Signal-to-noise"),
            Text(
                "How far each step's value is from the float network's, every step before it being "
                "quantized too: 6 dB more is half the error. A sudden fall names the step to look "
                "at. Where a remedy scaled the channels of a value, it is compared with the scaled "
                "float value."
            ),
            Bars("Signal-to-noise at each step's output", "dB", labels, noise),
            Heading("Time"),
            Bars("Time of each step", "us", labels, tuple(step.time for step in self.steps)),
            Heading("Left in float"),
            *self._floats(),
            Heading("Steps"),
            Table(
                "Signal-to-noise in dB, time at the smallest batch",
                "lllrrr",
                _STEP,
                tuple(self.step_rows()),
            ),
            Heading("Weights and values on their grids"),
            Text(
                "The height of a bar is the logarithm of how often values in it were seen; shaded "
                "is the range that the integers cover. Weights are in steps of their output "
                "channel's scale, the values of a grid step in those of their channel's."
            ),
            *self._grids(),
            Heading("Machine"),
            Table(
                "What the numbers depend on", "ll", ("part", "here"), tuple(self.machine.items())
            ),
        ]

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Name, float32, int8, int8 against float32; "" where there is nothing to say."""
        for name, (a, b) in self.scores.items():
            if name == ACCURACY:
                yield name, f"{a:.2%}", f"{b:.2%}", f"{100 * (b - a):+.2f} points"
            else:
                yield name, f"{a:.5g}", f"{b:.5g}", f"{b - a:+.3g}"
        if self.agreement is not None:
            yield "predictions equal to float32's", "", f"{self.agreement:.2%}", ""
        for i, snr in enumerate(self.snr):
            which = f" {i}" if len(self.snr) > 1 else ""
            yield f"signal-to-noise of output{which}", "", f"{_decibels(snr)}\u00a0dB", ""
        for batch, (a, b) in self.latency.items():
            yield (
                f"latency, batch {batch}",
                f"{a / 1e3:.3f}\u00a0ms",
                f"{b / 1e3:.3f}\u00a0ms",
                f"{a / b:.2f}x speed",
            )
        for name, (a, b) in self.memory.items():
            ratio = f"{max(a, b) / min(a, b):.2f}x {'smaller' if a >= b else 'larger'}" if a else ""
            yield name, f"{a:,}\u00a0B" if a else "", f"{b:,}\u00a0B", ratio

    def step_rows(self) -> Iterator[tuple[str, ...]]:
        """Layer, operation, what it is, dB, us, share of the time; a row for each step."""
        total = sum(step.time for step in self.steps) or 1.0
        for step in self.steps:
            yield (
                step.layer or step.name,
                step.op,
                "float" if step.why else "int8",
                _decibels(step.snr) + (", scaled" if step.rescaled else ""),
                f"{step.time:.1f}",
                f"{step.time / total:.1%}",
            )

    def _floats(self) -> list[Block]:
        layers = [row for row in self.summary.rows if row.result == "float"]
        listed = {row.name for row in layers}
        operators = [
            step
            for step in self.steps
            if step.why and step.layer not in listed and step.op != "getitem"
        ]
        if not layers and not operators:
            return [Text("Nothing: every layer and operator runs in integers.")]
        rows = [(row.name or "(model)", row.kind, row.reason) for row in layers]
        rows += [(step.name, step.op, step.why) for step in operators]
        return [Table("Layers and operators", "lll", ("name", "kind", "why"), tuple(rows))]

    def _grids(self) -> Iterator[Block]:
        for step in self.steps:
            parts = {"weights": step.weights, "values": step.values}
            known = {what: d for what, d in parts.items() if d is not None}
            if not known:
                continue
            charts = tuple(
                Histogram(f"{what.capitalize()} of {step.name}", d.counts, d.low, d.high, d.grid)
                for what, d in known.items()
            )
            rows = tuple(_grid_row(what, d) for what, d in known.items())
            table = Table(f"Grids of {step.name}", "lrrrrr", _GRID, rows)
            line = f"{step.layer or step.name} ({step.op})"
            yield Details(line, (table, *charts))


ACCURACY = "top-1 accuracy"
_BUSY = (
    "The machine was busy with other programs while this was measured: do not trust the times, nor "
    "their ratios. Measure again when it is idle."
)
_COMPARED = ("measure", "float32", "int8", "change")
_STEP = ("layer", "operation", "runs in", "dB", "us", "share")
_GRID = ("what", "seen", "grid", "scale", "zero point", "clipped")


def _grid_row(what: str, d: Distribution) -> tuple[str, ...]:
    low, high = d.scale
    return (
        what,
        f"{d.seen[0]:.4g} to {d.seen[1]:.4g}",
        f"{d.grid[0]:.4g} to {d.grid[1]:.4g}",
        f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}",
        str(d.zero_point),
        f"{d.clipped:.3%}",
    )


def _decibels(snr: float | None) -> str:
    if snr is None:
        return ""
    return "∞" if snr == inf else f"{snr:.1f}"


def report(
    float_model: nn.Module,
    quantized: nn.Module,
    data: Any,
    *,
    labels: Any = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    path: str | os.PathLike[str] | None = "report.html",
    title: str | None = None,
    forward: Forward | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    passes: int = 20,
    progress: bool = True,
) -> Report:
    """Compares a quantized network with the float one that it was made from, and writes it down.

    Accuracy, agreement of the predictions, signal-to-noise of the outputs and of every step's
    value, speed, memory, the histograms of weights and values on their grids, and what stayed
    float. One HTML file, which loads nothing, and the same content as Markdown beside it.

    data         batches that were not used for calibration, as `fastq.quantize_model` takes them;
                 one is held at a time.
    labels       int (n,): the class of each input, in the order of the data. The model's first
                 output is then (n, classes, ...).
    evaluate     gives a model's score; called for both.
    path         of the HTML file; None: nothing is written.
    forward      forward(model, batch) runs the model on batches of another kind.
    batch_sizes  to time at, made of the first batch's inputs, repeated where it has fewer. The
                 steps are timed at the first one; memory is that of the last one.
    passes       a time is the median of so many runs, or of those that 10 seconds allow, float32
                 and int8 taking turns, with the same number of threads.

    Raises TypeError for a model that is no QuantizedModel or no module, ValueError for a float
    model of another graph, for labels that do not fit, no batch sizes, or less than one pass,
    FileNotFoundError if the path's folder is missing; and what the models raise.
    """
    int8 = _checked(float_model, quantized, batch_sizes, passes, path)
    known = None if labels is None else _classes(labels)
    batches = Batches(data, "data")
    first = batches.first()
    twin = copy.deepcopy(float_model).eval()
    args, kwargs = call_of(twin, first, forward)
    prepared, _ = prepare_model(twin, args, kwargs)
    comparison = Comparison(prepared.captured, int8)
    seen = _compared(twin, comparison, batches, forward, progress)
    scores = {}
    if known is not None:
        scores[ACCURACY] = seen.accuracy(known)
    if evaluate is not None:
        scores["score"] = score(evaluate, twin), score(evaluate, int8)
    calls = {n: _resized((args, kwargs), n, prepared.captured) for n in batch_sizes}
    shown = bar(None, "measure", progress, len(calls) + 1, unit="part")
    load = _load()
    with same_threads() as threads, shown:
        latency = {}
        for n, call in calls.items():
            latency[n] = _latency(twin, int8, call, passes)
            shown.update()
        steps = profile(int8, _as_batch(calls[batch_sizes[0]], int8), passes=passes).steps
        shown.update()
    result = Report(
        title=title or f"{type(float_model).__name__}: int8 beside float32",
        machine=_machine(threads),
        samples=seen.samples,
        scores=scores,
        agreement=seen.agreement(),
        snr=tuple(tally.snr for tally in seen.tallies),
        latency=latency,
        memory=_memory(twin, int8, prepared.graph, calls[batch_sizes[-1]], batch_sizes[-1]),
        steps=tuple(comparison.step(s.name, s.layer, s.op, s.why, s.time) for s in steps),
        summary=summary(int8),
        busy=load > 1.5,
    )
    if path is not None:
        result.save(path)
    return result


def _checked(
    float_model: Any, quantized: Any, batch_sizes: Sequence[int], passes: int, path: Any
) -> QuantizedModel:
    """The quantized network, if `report` takes all of these."""
    if not isinstance(float_model, nn.Module):
        raise TypeError(f"report: float_model is a {type(float_model).__name__}, wanted a Module")
    if not isinstance(quantized, QuantizedModel):
        raise TypeError(
            f"report: quantized is a {type(quantized).__name__}; wanted a fastq.QuantizedModel, "
            "which quantize_model makes of a network that torch.export can follow"
        )
    if not isinstance(batch_sizes, Sequence) or not batch_sizes:
        raise (ValueError if isinstance(batch_sizes, Sequence) else TypeError)(
            f"report: batch_sizes={batch_sizes!r:.80}, wanted one or more, as (1, 32)"
        )
    for size in batch_sizes:
        check_count("report: a size of batch_sizes", size)
    check_count("report: passes", passes)
    if path is not None and Path(path).suffix == ".md":
        raise ValueError(f"report: path={str(path)!r} is the Markdown's; wanted a .html beside it")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"report: there is no folder {Path(path).parent}")
    return quantized


def _compared(
    twin: nn.Module,
    comparison: Comparison,
    batches: Batches,
    forward: Forward | None,
    progress: bool,
) -> Outputs:
    """The results of both networks on all batches, whose values `comparison` gets to see."""
    seen = Outputs()
    shown = bar(batches, "compare", progress, batches.total, unit="batch")
    with torch.no_grad(), shown:
        for batch in shown:
            args, kwargs = call = call_of(twin, batch, forward)
            seen.add(twin(*args, **kwargs), comparison.add(args, kwargs), _batch_size(call))
    return seen


def _classes(labels: Any) -> Tensor:
    """The classes of the inputs; TypeError unless they are integers."""
    given = torch.as_tensor(labels)
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"report: labels are {given.dtype}; wanted the int class of each input")
    return given


def _batch_size(call: Any) -> int:
    tensors = [x for x in pytree.tree_leaves(call) if isinstance(x, Tensor) and x.dim()]
    return len(tensors[0]) if tensors else 1


def _resized(call: tuple[Any, Any], n: int, captured: Captured) -> tuple[Any, Any]:
    """The arguments with n inputs instead; tensors of another length stay."""
    size = _batch_size(call)
    index = torch.arange(n) % size
    leaves, spec = pytree.tree_flatten(call)
    resized = []
    for x, node in zip(leaves, captured.arguments, strict=True):
        axis = node.attrs.get("batch", 0) if isinstance(node, Node) else None
        fits = axis is not None and x.dim() > axis and x.shape[axis] == size
        resized.append(x.index_select(axis, index) if fits else x)
    return pytree.tree_unflatten(resized, spec)


def _as_batch(call: tuple[Any, Any], quantized: QuantizedModel) -> Any:
    """Arguments as one batch: the tensor, or a dict."""
    args, kwargs = call
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return args[0]
    return {**dict(zip(quantized.layout.names, args, strict=False)), **kwargs}


def _latency(
    twin: nn.Module, quantized: nn.Module, call: tuple[Any, Any], passes: int
) -> tuple[float, float]:
    args, kwargs = call
    with torch.inference_mode():
        before, after = medians(
            [lambda: twin(*args, **kwargs), lambda: quantized(*args, **kwargs)], passes, SECONDS
        )
    return before, after


@contextmanager
def same_threads() -> Iterator[int]:
    """Gives torch and fastq the same number of threads for a while: the smaller of their own."""
    before = torch.get_num_threads(), ops.get_num_threads()
    torch.set_num_threads(min(before))
    ops.set_num_threads(min(before))
    try:
        yield min(before)
    finally:
        torch.set_num_threads(before[0])
        ops.set_num_threads(before[1])


def _memory(
    twin: nn.Module, quantized: QuantizedModel, graph: Graph, call: tuple[Any, Any], batch: int
) -> dict[str, tuple[int, int]]:
    state = [t for t in twin.state_dict().values() if isinstance(t, Tensor)]
    ours = memory(quantized, _as_batch(call, quantized))
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.safetensors"
        save(quantized, path)
        disk = path.stat().st_size
    return {
        "parameters": (sum({t.data_ptr(): t.nbytes for t in state}.values()), ours.weights),
        "parameters packed for this CPU": (0, ours.panels),
        f"values at once, batch {batch}": (_held(graph, call), ours.arena + ours.floats),
        "file": (file.tell(), disk),
    }


def _held(graph: Graph, call: tuple[Any, Any]) -> int:
    """Bytes of the float values that wait for a reader at the same time, at most: what float32
    takes at best, batch norms folded and activations in place."""
    sizes: dict[Node, int] = {}

    def watch(node: Node, value: Any) -> None:
        sizes[node] = value.nbytes if isinstance(value, Tensor) and node.op != "constant" else 0

    with torch.no_grad():
        graph.run(pytree.tree_leaves(call), watch)
    owner: dict[Node, Node] = {}
    for node in graph:
        owner[node] = owner[node.inputs[0]] if node.op in VIEWS else node
    last = {owner[value]: node for node in graph for value in node.inputs}
    kept = {owner[node] for node in graph.output_nodes()}
    held = most = 0
    for node in graph:
        held += sizes[node] if owner[node] is node else 0
        most = max(most, held)
        done = {owner[value] for value in node.inputs} - kept
        held -= sum(sizes[value] for value in done if last[value] is node)
    return most


def _load() -> float:
    """Processes that want to run, over the last minute, for each processor; this one is one."""
    known = hasattr(os, "getloadavg")  # not on Windows
    return os.getloadavg()[0] / (os.cpu_count() or 1) if known else 0.0


def _machine(threads: int) -> dict[str, str]:
    packages: Iterable[str] = ("torch", "numpy", "numba", "llvmlite")
    return {
        "processor": _processor(),
        "instruction set": isa.current(),
        "threads": str(threads),
        "system": platform.platform(terse=True),
        "fastq": version("fastq-int8"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
