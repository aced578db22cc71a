"""Where the time of a whole network goes, step by step, and the memory that it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
import torch

from fastq.batches import arguments_of
from fastq.graph import INT8_OPERATORS
from fastq.kernels import executor, isa, peak
from fastq.kernels.assembly import kernel_at, name_of
from fastq.kernels.call import address_of
from fastq.kernels.simd import emitter
from fastq.layout import Stage
from fastq.nn.model import QuantizedModel
from fastq.plan import BoundProgram
from fastq.sizes import Shapes
from fastq.steps import Step
from fastq.timing import check_count, medians

FLOAT_BYTES = 4
LEAST = 1e-3  # microseconds of a kernel: shares are over its time


@dataclass(frozen=True)
class KernelTime:
    """A kernel that a step runs, by its name in `fastq.explain`, and its microseconds."""

    name: str
    time: float


@dataclass(frozen=True)
class StepProfile:
    """One step of an integer program, or one float operator of torch. Times in microseconds.

    name     of its value.          layer  the float network's module that it comes from.
    kernels  in order: the step's own is the last one, before it what brings its input into form.
             None: strides say it all, nothing is moved. A float operator has one, torch's.
    macs     multiply-adds of a product, 0 of all else.
    read     bytes of its operands, packed weights among them; `written` of its value. 0 where
             nothing is moved.
    why      "" is int8; for a float operator why it has no integer form.
    """

    name: str
    layer: str
    op: str
    kernels: tuple[KernelTime, ...]
    macs: int
    read: int
    written: int
    why: str

    @property
    def time(self) -> float:
        return sum(kernel.time for kernel in self.kernels)

    @property
    def gops(self) -> float:
        """10^9 operations a second; 0 of what is no product."""
        return 2e-3 * self.macs / self.time if self.macs else 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes for inputs of one shape.

    weights  its state: int8 weights, multipliers, tables; what a file holds.
    panels   the same weights, packed for this machine.
    arena    the workspace of a thread that runs it: all values within its programs.
    floats   what lies between programs and float operators, inputs and outputs among them.
    """

    weights: int
    panels: int
    arena: int
    floats: int

    @property
    def total(self) -> int:
        return self.weights + self.panels + self.arena + self.floats

    def __str__(self) -> str:
        parts = ("weights", "panels", "arena", "floats")
        shown = ", ".join(f"{name} {getattr(self, name) / 2**20:.2f}" for name in parts)
        return f"memory {self.total / 2**20:.2f} MiB: {shown}"


@dataclass(frozen=True)
class Profile:
    """What `profile` found; printed, it is a table in the order of the program.

    call    microseconds of model(x), with all that Python does around the steps.
    peak    10^9 operations a second of exact dot products on registers: the machine's limit, which
            only convolutions that take fewer of them (Winograd) can pass.
    """

    isa: str
    threads: int
    steps: tuple[StepProfile, ...]
    call: float
    peak: float
    memory: Memory

    @property
    def time(self) -> float:
        """Microseconds of all steps."""
        return sum(step.time for step in self.steps)

    def by_operation(self) -> dict[str, tuple[StepProfile, ...]]:
        """The steps of each operation, the slowest operation first; "torch": float operators."""

        def key(step: StepProfile) -> str:
            return "torch" if step.why else step.op

        groups = {k: tuple(v) for k, v in groupby(sorted(self.steps, key=key), key)}
        return dict(sorted(groups.items(), key=lambda group: -sum(s.time for s in group[1])))

    def __str__(self) -> str:
        macs = sum(step.macs for step in self.steps)
        layers = max((len(s.layer or s.name) for s in self.steps), default=0)
        operations = max((len(s.op) for s in self.steps), default=0)
        lines = [
            f"{self.isa}, {self.threads} thread(s): {len(self.steps)} steps, {self.time:.0f} us; "
            f"a call {self.call:.0f} us; {macs / 1e6:.1f} MMAC, "
            f"{2e-3 * macs / self.time:.1f} GOP/s of {self.peak:.0f}",
            str(self.memory),
            "",
            f"{'layer':{layers}}  {'op':{operations}}  {_HEADER}  kernels",
        ]
        for step in self.steps:
            runs = Counter(kernel.name for kernel in step.kernels)
            named = [f"{n} x {name}" if n > 1 else name for name, n in runs.items()]
            kernels = " + ".join(named) or "nothing is moved"
            if step.why:
                kernels = f"float: {step.why}"
            lines.append(
                f"{step.layer or step.name:{layers}}  {step.op:{operations}}  "
                f"{self._numbers([step])}  {kernels}"
            )
        lines += ["", f"{'operation':{operations}}  {'steps':>5}  {_HEADER}"]
        for op, steps in self.by_operation().items():
            lines.append(f"{op:{operations}}  {len(steps):5}  {self._numbers(steps)}")
        lines += ["", "kernel" + " " * (_KERNEL - 6) + f"  {'runs':>5}  {'us':>9}  {'share':>6}"]
        for name, times in _by_kernel(self.steps).items():
            share = sum(times) / self.time
            lines.append(f"{name:{_KERNEL}}  {len(times):5}  {sum(times):9.1f}  {share:6.1%}")
        return "\n".join(lines)

    def _numbers(self, steps: Iterable[StepProfile]) -> str:
        steps = tuple(steps)
        time, macs = sum(s.time for s in steps), sum(s.macs for s in steps)
        read, written = (1e-3 * sum(getattr(s, k) for s in steps) for k in ("read", "written"))
        rate = of_peak = "-"
        if macs:
            gops = 2e-3 * macs / time
            rate, of_peak = f"{gops:.1f}", f"{gops / self.peak:.0%}"
        return (
            f"{time:9.1f}  {time / self.time:6.1%}  {rate:>7}  {of_peak:>5}  {read:8.1f}  "
            f"{written:8.1f}"
        )


_HEADER = f"{'us':>9}  {'share':>6}  {'GOP/s':>7}  {'peak':>5}  {'kB read':>8}  {'written':>8}"
_KERNEL = 48


def _by_kernel(steps: Iterable[StepProfile]) -> dict[str, list[float]]:
    """Kernel -> the times of its runs, the slowest kernel first."""
    times: dict[str, list[float]] = {}
    for step in steps:
        for kernel in step.kernels:
            times.setdefault(kernel.name, []).append(kernel.time)
    return dict(sorted(times.items(), key=lambda item: -sum(item[1])))


def profile(model: QuantizedModel, x: Any, *, passes: int = 20) -> Profile:
    """Runs a quantized model step by step, and says where its time goes.

    x       a batch, as calibration data have it: a tensor, a dict of arguments, or a tuple that
            starts with one of these.
    passes  each step's time is the median of so many runs of the whole network.

    Each kernel is started by itself, which costs several threads about 10 us more than in a call
    of the model; what it costs to start nothing is subtracted. Takes seconds: it measures the
    machine's limits. Raises TypeError for a model that is no QuantizedModel, ValueError for less
    than one pass, and what the model raises for a wrong x.
    """
    if not isinstance(model, QuantizedModel):
        raise TypeError(
            f"profile: got a {type(model).__name__}; wanted a fastq.QuantizedModel, which "
            "quantize_model makes of a network that torch.export can follow; fastq.explain takes "
            "single layers"
        )
    check_count("profile: passes", passes)
    args, kwargs = arguments_of(x)
    steps: list[StepProfile] = []

    def watch(stage: Stage, inputs: list[Any], bound: BoundProgram | None, shapes: Shapes) -> None:
        if bound is None:
            steps.append(_float_step(model, stage, inputs, shapes, passes))
        else:
            steps.extend(_integer_steps(bound, inputs, passes))

    _walk(model, x, watch)
    with torch.no_grad():
        (call,) = medians([lambda: model(*args, **kwargs)], passes)
    threads = executor.get_num_threads()
    return Profile(
        isa=isa.current(),
        threads=threads,
        steps=tuple(steps),
        call=call,
        peak=peak.compute_peak(threads),
        memory=memory(model, x),
    )


def memory(model: QuantizedModel, x: Any) -> Memory:
    """The bytes that model(x) takes; x as in `profile`."""
    arenas = [0]

    def watch(stage: Stage, inputs: list[Any], bound: BoundProgram | None, shapes: Shapes) -> None:
        if bound is not None:
            key, plan = bound.take(*inputs)
            arenas.append(plan.call.scratch_bytes)
            bound.give(key, plan)

    floats = _walk(model, x, watch)
    programs = model.programs
    return Memory(
        weights=sum(tensor.nbytes for tensor in model.state_dict().values()),
        panels=sum(_panel_bytes(step) for program in programs for step in program.steps),
        arena=max(arenas),
        floats=floats,
    )


Watch = Callable[[Stage, list[Any], BoundProgram | None, Shapes], None]


def _walk(model: QuantizedModel, x: Any, watch: Watch) -> int:
    """Runs the model; `watch` sees each stage and its inputs, arrays where it is a program.

    Returns the bytes of the float values, which are kept until the end.
    """
    args, kwargs = arguments_of(x)
    bound = model._bound()
    values: dict[int, Any] = {}

    def compute(stage: Stage, inputs: list[Any], shapes: Shapes) -> list[Any]:
        if stage.program < 0:
            watch(stage, inputs, None, shapes)
            results = [model.evaluate(stage, inputs, shapes)]
        else:
            program = bound[stage.program]
            arrays = model.arrays(program, stage, inputs)
            results = [torch.from_numpy(y) for y in program(*arrays)]
            watch(stage, arrays, program, shapes)
        values.update((id(value), value) for value in (*inputs, *results))
        return results

    with torch.no_grad():
        model.walk(compute, args, kwargs)
    return _tensor_bytes(values.values())


def _tensor_bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _float_step(
    model: QuantizedModel, stage: Stage, inputs: list[Any], shapes: Shapes, passes: int
) -> StepProfile:
    (time,) = medians([lambda: model.evaluate(stage, inputs, shapes)], passes)
    op = stage.attrs.get("target", stage.op)
    int8 = op in INT8_OPERATORS
    return StepProfile(
        name=stage.outputs[0],
        layer=stage.layer,
        op=op,
        kernels=(KernelTime("int8 layer" if int8 else "torch", time),),
        macs=0,
        read=_tensor_bytes(inputs),
        written=_tensor_bytes([model.evaluate(stage, inputs, shapes)]),
        why="" if int8 else stage.why,
    )


def _integer_steps(bound: BoundProgram, arrays: list[Any], passes: int) -> list[StepProfile]:
    program, kernels = bound.program, _kernel_times(bound, arrays, passes)
    shapes = program.shapes(*(x.shape for x in arrays))
    narrow = emitter(isa.current()).a_bytes  # of a uint8 in the arena
    items = {"float32": FLOAT_BYTES, "int16": 2, "uint8": narrow}
    sizes = {name: prod(shape) * items[program.dtypes[name]] for name, shape in shapes.items()}
    apart = {step.name: step.inputs[0] for step in program.steps if step.op == "dilate"}
    moved = {step.name for step, runs in zip(program.steps, kernels, strict=True) if runs}
    for name, source in apart.items():
        if name not in moved:  # its pixels are not set apart in memory
            sizes[name] = sizes[source]
    return [
        StepProfile(
            name=step.name,
            layer=step.layer,
            op=step.op,
            kernels=tuple(runs),
            macs=_macs(step, shapes, apart),
            read=sum(sizes[name] for name in step.inputs) + _panel_bytes(step) if runs else 0,
            written=sizes[step.name] if runs else 0,
            why="",
        )
        for step, runs in zip(program.steps, kernels, strict=True)
    ]


def _kernel_times(bound: BoundProgram, arrays: list[Any], passes: int) -> list[list[KernelTime]]:
    """The kernels of each step, started one by one; what it costs to start none is subtracted."""
    key, plan = bound.take(*arrays)
    outputs = [np.empty(shape, np.float32) for shape in plan.outputs]
    with executor.recording() as runs:
        plan.call.run(*map(address_of, (*arrays, *outputs)))
    (run,) = runs
    table = run.table
    parts = [table.part(0, 0), *(table.part(i, i + 1) for i in range(len(table.rows)))]
    nothing, *times = medians([partial(executor.run, part, run.bases) for part in parts], passes)
    addresses = table.rows[:, executor.KERNEL].tolist()
    names = {address: name_of(kernel_at(address)) for address in set(addresses)}
    kernels: list[list[KernelTime]] = [[] for _ in bound.program.steps]
    for step, address, time in zip(plan.steps, addresses, times, strict=True):
        kernels[step].append(KernelTime(names[address], max(time - nothing, LEAST)))
    bound.give(key, plan)
    return kernels


def _panel_bytes(step: Step) -> int:
    """Bytes of a product's weight as it is packed for the instruction set in use."""
    weight = step.arguments.get("weight")
    packed = None if weight is None else weight.panels.get(("packed", isa.current()))
    return 0 if packed is None else packed.panels.nbytes


def _macs(step: Step, shapes: dict[str, tuple[int, ...]], apart: dict[str, str]) -> int:
    """Multiply-adds; `apart` gives the pixels before a transposed convolution sets them apart."""
    if step.op == "matmul":
        return prod(shapes[step.name]) * shapes[step.inputs[0]][-1]
    weight = step.arguments.get("weight")
    if weight is None:
        return 0
    places = shapes[apart.get(step.inputs[0], step.name)][:-1]
    return prod(places) * weight.data.size
