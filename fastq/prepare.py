"""A network between float and integers: its fused graph, what was seen of its values, and what its
weights shall become. Calibration fills it, remedies change it, `lower` gives the programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastq.capture import Captured
from fastq.graph import MOVES, PRODUCTS, Graph, Node
from fastq.layout import Ref
from fastq.lower import Lowered, lowered, mirrored, weight_of
from fastq.masks import MARK, fills_low
from fastq.observer import Observer, make_observer, qparams_of
from fastq.processes import Processes
from fastq.program import RECURRENT
from fastq.qconfig import DEFAULT, QConfig
from fastq.qparams import QParams, limits
from fastq.regions import WEIGHTED, Ranges, Region, bare_weights, find_regions
from fastq.summaries import ASKED
from fastq.weights import per_output

LAYERS = (*WEIGHTED, *RECURRENT)  # have a weight that becomes integers
# of the ranges of int16, whose steps are enough for outliers that calibration did not see
HEADROOM = 2.0
WIDER = 2.0  # steps, than those that a value has alone, may a concatenation's be
Weight = tuple[Any, Any]  # (int8 data, float32 scale per output)


class ChannelEnds:
    """The smallest and the largest finite value of each channel, axis 1.

    low, high  float32 (C,); infinite where there was none.   count  how many values a channel had.
    uneven     whether axis 1 had several sizes, as a mask's over keys has: it is none of channels.
    """

    def __init__(self) -> None:
        self.low, self.high = torch.tensor(math.inf), torch.tensor(-math.inf)
        self.count, self.uneven = 0, False

    def update(self, x: Tensor) -> None:
        if x.numel() and x.is_floating_point():
            channels = x.detach().float().movedim(1, 0).flatten(1)
            low, high = channels.aminmax(dim=1)
            if not bool((low + high).isfinite().all()):
                finite = channels.isfinite()
                low = torch.where(finite, channels, math.inf).amin(1)
                high = torch.where(finite, channels, -math.inf).amax(1)
            self._take(channels.shape[1], low, high)

    def merge(self, other: ChannelEnds) -> None:
        self.uneven |= other.uneven
        self._take(other.count, other.low, other.high)

    def _take(self, count: int, low: Tensor, high: Tensor) -> None:
        self.uneven |= self.low.dim() == low.dim() and self.low.shape != low.shape
        if self.uneven:
            return
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count += count


@dataclass(eq=False)
class Prepared:
    """What a network needs to become integer programs.

    graph      the fused float graph; remedies may change its tensors.
    regions    which nodes become which program.    reasons  why the other nodes stay float.
    ranges     which values share one quantization.
    configs    how nodes are quantized; the others by default.
    observers  what was seen, by the value that stands for its range.
    channels   the ends of each channel of the network's inputs, images and rows.
    chosen     weights that a remedy has chosen: node -> (int8 data, float32 scale per output),
               outputs first as in `weight_of`. All others are rounded to nearest.
    biases     float32 biases that a remedy has chosen, instead of the float network's own.
    alone      layers that are int8 on their own between the programs -> what they are in a summary,
               and why they are in no program.
    entries    values that such layers take with a range from data.   seen  what was seen of them.
    apart      identities before concatenations, see `set_apart`, until `settle`.
    """

    captured: Captured
    regions: list[Region]
    reasons: dict[Node, str]
    ranges: Ranges
    configs: dict[Node, QConfig]
    observers: dict[Node, Observer] = field(default_factory=dict)
    channels: dict[Node, ChannelEnds] = field(default_factory=dict)
    chosen: dict[Node, Weight] = field(default_factory=dict)
    biases: dict[Node, Tensor] = field(default_factory=dict)
    alone: dict[str, tuple[Any, str]] = field(default_factory=dict)
    entries: set[Node] = field(default_factory=set)
    seen: dict[Node, Observer] = field(default_factory=dict)
    apart: list[Node] = field(default_factory=list)
    _rounded: dict[Node, tuple[Any, Weight]] = field(default_factory=dict)
    _qparams: dict[Node, QParams] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.captured.graph

    def config(self, node: Node) -> QConfig:
        """How a node is quantized."""
        return self.configs.get(node, DEFAULT)

    def integer_nodes(self) -> list[Node]:
        return [node for region in self.regions for node in region.nodes]

    def layers(self) -> list[Node]:
        """The nodes with weights that become integers."""
        return [node for node in self.integer_nodes() if node.op in LAYERS]

    def products(self) -> list[Node]:
        """Those whose value is a product of their input, which remedies can make another."""
        return [node for node in self.integer_nodes() if node.op in WEIGHTED]

    def observe(self, arguments: Iterable[Any]) -> None:
        """One float pass over flat arguments, watched. Ranges grow."""
        watcher = Watcher(self)
        self._qparams.clear()

        def watch(node: Node, value: Any) -> None:
            if node.op == "input" and len(node.shape) in (2, 4):
                self.channels.setdefault(node, ChannelEnds()).update(value)
            if node in self.entries:
                if node not in self.seen:
                    self.seen[node] = make_observer(self.config(node).observer)
                self.seen[node].update(value.detach().numpy())
            for source, counts in watcher.see(node, value):
                stands = self.ranges.find(source)
                if stands not in self.observers:
                    spec = self.config(source).observer
                    if stands in self.ranges.wide and spec == DEFAULT.observer:
                        spec = "minmax"
                    self.observers[stands] = make_observer(spec)
                self.observers[stands].update(counts.detach().numpy())

        with torch.no_grad():
            self.graph.run(arguments, watch)

    def merge(self, processes: Processes) -> None:
        """Take what other processes observed into account, as if it had been observed here."""
        nodes = {node.name: node for node in self.graph}

        def merged(observers: dict[Node, Any]) -> dict[Node, Any]:
            found = processes.merge({node.name: made for node, made in observers.items()})
            return {nodes[name]: made for name, made in found.items()}

        self.observers, self.seen = merged(self.observers), merged(self.seen)
        self.channels = merged(self.channels)
        self._qparams.clear()

    def check_seen(self) -> None:
        """ValueError for a value of which nothing finite was observed."""
        for node, stands in self.ranges.watched().items():
            if stands not in self.observers or not self.observers[stands].count:
                raise ValueError(
                    f"the calibration data gave '{node.layer or node.name}' no finite value, so "
                    "there is no range"
                )

    def forget(self) -> None:
        """Drop what was seen: the graph's values have changed."""
        self.observers.clear()
        self.seen.clear()
        self.channels.clear()
        self._qparams.clear()

    def set_apart(self) -> None:
        """Let what others read, too, not have the range of a concatenation, which may be many times
        its own: an identity before that one has it instead. So has what a product takes on its
        right, if its own range is fixed."""
        alone, users, ends = Ranges(self.regions, joined=False), self.graph.users(), set[Node]()
        for region in self.regions:
            ends.update(region.outputs)
        read = {
            alone.find(node)
            for node in alone.parent
            if node in ends or any(user.op not in MOVES for user in users[node])
        }

        def parts(concat: Node) -> list[Node]:
            """Those that a concatenation gives a range to, and that others read."""
            stands = self.ranges.find(concat)
            one = len({alone.find(value) for value in concat.inputs}) == 1
            if one or stands in self.ranges.fixed or stands in self.ranges.wide:
                return []
            joined = (v for v in concat.inputs if self.ranges.find(v) is stands)
            return [v for v in joined if v.op != "constant" and alone.find(v) in read]

        for region in self.regions:
            made: dict[Node, Node] = {}
            for concat in [node for node in region.nodes if node.op == "concat"]:
                chosen = parts(concat)
                for value in chosen:
                    if value not in made:
                        made[value] = self._identity(value, region, concat)
                concat.inputs[:] = [made[v] if v in chosen else v for v in concat.inputs]
            self.apart += made.values()
            for product in [node for node in region.nodes if node.op == "matmul"]:
                right = product.inputs[1]
                if self.ranges.find(right) in self.ranges.fixed:  # where it is symmetric
                    product.inputs[1] = self._identity(right, region, product)
        self.ranges = Ranges(self.regions)

    def _identity(self, value: Node, region: Region, before: Node) -> Node:
        """A copy of a value, as a table makes one, in the nodes of a region. Its name is that of no
        other: a value may be copied in each region, and what is made of it apart is a step's name.
        """
        calls: Any = [("aten.clone.default", (Ref(0),), {})]
        same = Node(
            f"{value.name}_in_{before.name}", "pointwise", [value], {"calls": calls},
            layer=before.layer, kind=before.kind, shape=value.shape,
        )  # fmt: skip
        for nodes in (region.nodes, self.graph.nodes):
            nodes.insert(nodes.index(before), same)
        if value in self.configs:
            self.configs[same] = self.configs[value]
        return same

    def settle(self) -> None:
        """Now that values were seen: no identity where the concatenation's steps are hardly wider
        than those that the value has alone."""
        apart, self.apart = self.apart, []
        gone: dict[Node, Node] = {}
        for node in apart:
            ends = self.ranges.find(node), self.ranges.find(node.inputs[0])
            seen = [self.observers.get(end) for end in ends]
            if all(observer is not None and observer.count for observer in seen):
                wider, own = (float(self.qparams(end).scale) for end in ends)
                if type(seen[0]) is not type(seen[1]) or wider > WIDER * own:
                    continue
            gone[node] = node.inputs[0]
            self.graph.replace(node, node.inputs[0])
        self.graph.nodes = [node for node in self.graph.nodes if node not in gone]
        for region in self.regions:
            region.nodes = [node for node in region.nodes if node not in gone]
        self.regroup(gone)

    def regroup(self, gone: Mapping[Node, Node] | None = None) -> None:
        """Find anew which values share a range, for the regions have changed; what was seen of
        values that are still there stays, and of those that are gone, for what is in their place.
        """
        self.ranges = Ranges(self.regions)
        before, self.observers = self.observers, {}
        for node, seen in before.items():
            value = (gone or {}).get(node, node)
            if value not in self.ranges.parent:
                continue
            kept = self.observers.setdefault(self.ranges.find(value), seen)
            if kept is not seen:
                kept.merge(seen)
        self._qparams.clear()

    def qparams(self, node: Node) -> QParams:
        """The quantization of a value, uint8 or int16; ValueError when nothing finite was seen of
        it."""
        stands = self.ranges.find(node)
        if stands in self.ranges.fixed:
            return self.ranges.fixed[stands]
        found = self._qparams.get(stands)
        if found is None:
            observer = self.observers.get(stands)
            if observer is None or not observer.count:
                raise ValueError(f"{node.name}: no finite value was seen of it")
            found = qparams_of(observer, node.layer or node.name)
            if stands in self.ranges.symmetric:
                found = symmetric(found)
            if stands in self.ranges.wide:
                found = wide(found)
            self._qparams[stands] = found
        return found

    def stand_ins(self) -> list[Node]:
        """The nodes that stand for the ranges of quantized values, but for fixed ranges."""
        values = self.quantized_values()
        found = dict.fromkeys(self.ranges.find(node) for node in self.graph if node in values)
        return [node for node in found if node not in self.ranges.fixed]

    def set_qparams(self, node: Node, qparams: QParams) -> None:
        """Let a value have this quantization, until more is observed."""
        self._qparams[self.ranges.find(node)] = qparams

    def weight(self, node: Node) -> Weight:
        """(int8 data, float32 scale per output) of a layer, outputs first."""
        if node in self.chosen:
            return self.chosen[node]
        given = node.tensors["weight"]
        kept = self._rounded.get(node)
        if kept is None or kept[0] is not given:
            config = self.config(node)
            real = weight_of(node).float().numpy()
            data, scale = config.quantize_weight(real)
            kept = self._rounded[node] = (given, (data, scale))
        return kept[1]

    def bias(self, node: Node) -> Tensor | None:
        """float32 (n,) of a layer, or None."""
        given = self.biases.get(node, node.tensors.get("bias"))
        if node in self.biases or node.inputs[0].op != "grid" or given is None:
            return given
        # The steps of a grid run from 0, far from where the values lie: what the rounding errors
        # of the weights make of the way to the step of real 0 is taken out of the sum.
        groups = node.attrs.get("groups", 1)
        middle = node.inputs[0].tensors["shift"].double().reshape(groups, 1, -1)
        data, scale = self.weight(node)
        rounded = torch.from_numpy(data * per_output(scale, data.ndim))  # float32, as it is kept
        error = (weight_of(node).double() - rounded).reshape(*data.shape[:2], -1).sum(2)
        lost = (error.reshape(groups, -1, middle.shape[-1]) * middle).sum(2).flatten()
        return given + lost.float()

    def lowered(self, region: Region) -> Lowered:
        """A region's program, and where the values of the graph are in it."""
        return lowered(region, self.qparams, self.weight, self.bias)

    def quantized_values(self) -> set[Node]:
        """The nodes whose values lie on a grid: all that regions take and make, but for
        products that end a region in float, and weights, whose grid is another for each line."""
        values = {
            node for region in self.regions for node in (*region.quantized_inputs, *region.nodes)
        }
        taken = {value for node in self.integer_nodes() for value in node.inputs}
        ends = {
            node
            for region in self.regions
            for node in region.outputs
            if node.op in WEIGHTED and len(node.inputs) == 1
        }
        return values - (ends - taken) - bare_weights(self.regions)

    def simulated_tensors(self, node: Node) -> dict[str, Tensor]:
        """The tensors of a layer with its weight on its grid."""
        data, scale = self.weight(node)
        real = torch.from_numpy(data * per_output(scale, data.ndim))
        tensors = {**node.tensors, "weight": mirrored(node, real)}
        bias = self.bias(node)
        return tensors if bias is None else {**tensors, "bias": bias}


class Watcher:
    """Sees the values of one pass, and what of them says something about a range."""

    def __init__(self, prepared: Prepared) -> None:
        ranges, graph = prepared.ranges, prepared.graph
        self.watched, self.bare = ranges.watched(), bare_weights(prepared.regions)
        softmaxes = [node for node in prepared.integer_nodes() if node.op == "softmax"]
        self.scores = {ranges.find(node.inputs[0]) for node in softmaxes}
        self.alone: dict[Node, Node] = {}  # softmax -> what it alone reads, and whose range it is
        self.held: dict[Node, Tensor] = {}  # scores and masks, until their softmax
        members: dict[Node, list[Node]] = {}
        for node in ranges.parent:
            members.setdefault(ranges.find(node), []).append(node)
        users, kept = graph.users(), graph.output_nodes()
        for softmax in softmaxes:
            group = members[ranges.find(softmax.inputs[0])]
            sources = [node for node in group if node in self.watched]
            readers = {user for node in group for user in users[node]} - {*group}
            if len(sources) == 1 and readers == {softmax} and kept.isdisjoint(group):
                self.alone[softmax] = sources[0]
        self.wanted = {value for softmax in self.alone for value in softmax.inputs}
        self.later = {*self.alone.values()}

    def see(self, node: Node, value: Any) -> Iterator[tuple[Node, Tensor]]:
        """(node, what of its value counts) of all that can be told now."""
        if node in self.wanted:
            self.held[node] = value
        if node in self.alone:
            x, *masks = (self.held[v] for v in node.inputs)
            del self.held[node.inputs[0]]
            floor = WEIGHT_FLOOR if node in self.bare else FLOOR
            yield self.alone[node], near_the_largest(x, floor, node.attrs["dim"], *masks)
        if node in self.watched and node not in self.later:
            scores = self.watched[node] in self.scores
            if fills_low(node):  # what it marks is the least of the range
                value = value.masked_fill(value <= MARK, -math.inf)
            elif scores or _may_have_marks(node):
                value = _with_floor(value, scores)
            yield node, value


def grid_ends(qparams: QParams) -> tuple[float, float]:
    """The smallest and the largest number of a per-tensor quantization."""
    scale, (low, high) = float(qparams.scale), grid_steps(qparams)
    return low * scale, high * scale


def grid_steps(qparams: QParams) -> tuple[int, int]:
    """The same in steps of its scale."""
    (least, most), zero_point = limits(qparams.dtype), int(qparams.zero_point)
    return least - zero_point, most - zero_point


def symmetric(qparams: QParams) -> QParams:
    """The range of qparams with zero_point 128: int8 by another name."""
    peak = max(map(abs, grid_ends(qparams)))
    return QParams(np.array(peak / 127, np.float32), np.array(128, np.int32))


def wide(qparams: QParams) -> QParams:
    """The range of qparams, HEADROOM times as wide, in int16."""
    peak = max(map(abs, grid_ends(qparams)))
    scale = np.array(HEADROOM * peak / limits(np.dtype(np.int16))[1], np.float32)
    return QParams(scale, dtype=np.dtype(np.int16))


FLOOR = 16.0  # so far below the others' scores, exp leaves 1e-7 of a weight
WEIGHT_FLOOR = 8.0  # and none of 255 steps, where products sum the weights themselves
FAR = 2.0**64  # a range of marks is kept to this: what it is multiplied with stays finite
APART = 1000  # times all else: what is so far below it says that a place is not to be taken


def _may_have_marks(node: Node) -> bool:
    """Products alone make none, but what is added to them may; what a user gives is taken at its
    word."""
    return node.op not in (*PRODUCTS, "input") or len(node.inputs) == 2


def _marks(value: Tensor) -> Tensor | None:
    """Which values are none but marks, as of actions that are not allowed; None: there are none."""
    if not value.is_floating_point() or not value.numel() or not float(value.min()) <= MARK:
        return None  # or something is not a number
    low = value <= MARK
    rest = float(value.masked_fill(low, 0.0).nan_to_num().abs().max())
    return low if APART * rest < -float(value[low].max()) else None


def _with_floor(value: Tensor, scores: bool) -> Tensor:
    """A value of which marks have a place in the range, and of scores -inf, by a mask that was not
    known as one."""
    hidden = _marks(value)
    if hidden is None and scores:
        hidden = value == -math.inf
    if hidden is None or not bool(hidden.any()) or bool(hidden.all()):
        return value
    rest = value[~hidden].nan_to_num()
    if not bool(rest.any()):  # marks alone, which are added to others
        return value.clamp(min=-FAR)
    return value.masked_fill(hidden, float(rest.min()) - FLOOR)


def near_the_largest(x: Tensor, floor: float, dim: int, mask: Tensor | None = None) -> Tensor:
    """Scores as a softmax tells them apart: so far below the largest of their line all are alike.
    Those that the mask leaves out, 0 in it, say nothing of the range: they are the largest instead.
    """
    out = torch.zeros((), dtype=torch.bool) if mask is None else mask == 0
    top = x.masked_fill(out, -math.inf).amax(dim, keepdim=True)
    return torch.where(out, top, torch.maximum(x, top - floor))


def fake_quantize(x: Tensor, qparams: QParams, *, out: Tensor | None = None) -> Tensor:
    """x on the grid of qparams, in float32; in the memory of `out`, which x may be."""
    scale = float(qparams.scale)
    return torch.div(x, scale, out=out).round_().clamp_(*grid_steps(qparams)).mul_(scale)


def prepare_graph(captured: Captured, config: Callable[[Node], QConfig | None]) -> Prepared:
    """What is known of a graph that was captured and fused, ready to be calibrated.

    config  of a node: None keeps it float.
    """
    asked = {node: config(node) for node in captured.graph}
    kept = {node: ASKED for node, wanted in asked.items() if wanted is None}
    regions, reasons = find_regions(captured.graph, kept)
    configs = {node: wanted for node, wanted in asked.items() if wanted is not None}
    prepared = Prepared(captured, regions, reasons, Ranges(regions), configs)
    prepared.set_apart()
    return prepared
