"""A whole network, or most of it, in integers: programs, and float operators between them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastq.encode import decode_program
from fastq.graph import INT8_OPERATORS, OPERATIONS, Node, check_target, evaluate, shapes_of
from fastq.layout import Layout, Stage
from fastq.nn.layer import accept, array_of, stay
from fastq.plan import BoundProgram
from fastq.program import Program, check_extent, extent_text
from fastq.sizes import Shapes, has_size, sized

# what programs are made of
ARRAYS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32)
ONE_TENSOR = pytree.tree_structure(((0,), {}))  # model(x), the most common call


class QuantizedModel(nn.Module):
    """A network whose forward runs integer programs; it takes and returns what the float one did.

    `fastq.quantize_model` and `fastq.load` make it. For inference, on the CPU, float32 in and
    out; any batch size, and any image size unless the network fixes it. In what a program takes NaN
    counts as 0, infinities saturate. The state is plain tensors, "step.weight" and so on. Several
    threads may call it at the same time.
    """

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layout = layout
        for name, tensor in tensors.items():
            step, _, part = name.rpartition(".")
            try:
                if step not in self._modules:
                    self.add_module(step, nn.Module())
                self.get_submodule(step).register_buffer(part, tensor.detach())
            except KeyError as error:
                raise ValueError(f"a tensor is called {name!r:.80}: {error}") from error
        self._ready: list[BoundProgram] | None = None
        self._one: Tensor | None = None  # of its tensors, and where its memory was
        self._at = 0
        self._nodes: dict[str, Node] = {}  # of the float operators
        self._sized: set[str] = set()  # which of them have a Size
        self._read_specs()
        self._bound()
        self.eval()

    def _read_specs(self) -> None:
        self.in_spec, self.out_spec = map(_read_spec, self.layout.specs)
        sides = (self.in_spec, self.layout.inputs), (self.out_spec, self.layout.outputs)
        if any(spec.num_leaves != len(names) for spec, names in sides):
            raise ValueError(f"specs {self.layout.specs} for {sides[0][1]} and {sides[1][1]}")
        self._single = self.in_spec == ONE_TENSOR and self.out_spec.is_leaf()
        stages, inputs = self.layout.stages, self.layout.inputs
        # its only input, where it is one program from that to the one result
        alone = [(s.program, s.inputs, s.outputs) for s in stages] == [
            (0, inputs, self.layout.outputs)
        ]
        self._alone = f"{type(self).__name__}: {inputs[0]}" if self._single and alone else ""
        # programs check what they take
        floats = {
            name for stage in self.layout.stages if stage.program < 0 for name in stage.inputs
        }
        self._checked = [
            (i, name, extent)
            for i, (name, extent) in enumerate(
                zip(self.layout.inputs, self.layout.extents, strict=True)
            )
            if name in floats and extent is not None
        ]

    @property
    def programs(self) -> list[Program]:
        """The integer programs, in the order in which they run; printed, one is readable."""
        return [bound.program for bound in self._bound()]

    @property
    def has_layers_alone(self) -> bool:
        """Whether int8 layers compute between the programs; they have no gradient."""
        return any(stage.attrs.get("target") in INT8_OPERATORS for stage in self.layout.stages)

    @property
    def program(self) -> Program:
        """The one integer program of the network; ValueError if there are several."""
        programs = self.programs
        if len(programs) != 1:
            raise ValueError(f"this network has {len(programs)} programs: see .programs")
        return programs[0]

    def _bound(self) -> list[BoundProgram]:
        """The programs on this machine, made of the tensors of the state when first needed, and
        again when these were moved: share_memory, and sending the network to another process."""
        at = 0 if self._one is None else self._one.data_ptr()
        if self._ready is None or self._at != at:
            self._one = next((t for t in self.buffers() if t.numel()), None)
            self._at = 0 if self._one is None else self._one.data_ptr()
            arrays = {
                f"{step}.{part}": tensor.detach().numpy()
                for step, module in self._modules.items()
                for part, tensor in module._buffers.items()  # type: ignore[union-attr]
                if tensor is not None and tensor.dtype in ARRAYS
            }
            programs = [decode_program(given, arrays) for given in self.layout.programs]
            self._ready = [BoundProgram(program) for program in programs]
        return self._ready

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module does. It is the only way to change the tensors: the kernels have copies."""
        result = super().load_state_dict(*args, **kwargs)
        self._bound()  # an altered tensor is refused here, not at the next call
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["programs"] = self._digest()

    def _load_from_state_dict(self, *args: Any) -> None:
        """Refuses the state of other programs, also where this network is a part of a model."""
        _, prefix, metadata, *_ = args
        given = metadata.get("programs")
        if given is not None and given != self._digest():
            raise RuntimeError(
                f"{prefix or type(self).__name__}: the state is of a network that was quantized "
                "otherwise, and how activations are quantized is no part of it; fastq.save and "
                "fastq.load keep all"
            )
        super()._load_from_state_dict(*args)
        self._ready = None

    def _digest(self) -> str:
        """A digest of all that its programs are but their tensors."""
        text = json.dumps(self.layout.programs, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the float network returned for these arguments, in int8's precision."""
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            # Dynamo would look for torch in the kernels and in what plans them
            return torch.compiler.disable(self.forward)(*args, **kwargs)
        if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
            raise TypeError(
                f"{type(self).__name__} has no form in TorchScript, ONNX or torch.export: "
                "fastq.save writes it, fastq.load and fastq.load_program run it elsewhere; the "
                "layers of fastq.quantize_layers can be exported"
            )
        bound = self._bound()
        if self._alone and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            # shorter than `walk`: where kernels have filled the caches each object is a miss
            (y,) = bound[0](as_input(self._alone, args[0], bound[0].program.extents[0]))
            return torch.from_numpy(y)

        def compute(stage: Stage, inputs: list[Any], shapes: Shapes) -> list[Any]:
            if stage.program < 0:
                return [self.evaluate(stage, inputs, shapes)]
            program = bound[stage.program]
            return [torch.from_numpy(y) for y in program(*self.arrays(program, stage, inputs))]

        return self.walk(compute, args, kwargs)

    def walk(
        self,
        compute: Callable[[Stage, list[Any], Shapes], list[Any]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """The result for these arguments; compute(stage, inputs, shapes) gives a stage's values."""
        layout = self.layout
        leaves: Sequence[Any] = args
        plain = self._single and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if not plain:
            leaves = leaves_of(
                self, tuple(args), dict(kwargs), self.in_spec, layout.inputs, layout.names
            )
        values: dict[str, Any] = {}
        for i, (name, leaf) in enumerate(zip(layout.inputs, leaves, strict=True)):
            if name is not None:
                values[name] = leaf
            else:
                check_constant(self, i, leaf, layout.constants[str(i)])
        for i, name, extent in self._checked:
            what, leaf = f"{type(self).__name__}: {name}", leaves[i]
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{what} is a {type(leaf).__name__}; wanted a tensor")
            check_extent(what, leaf.shape, extent)
        shapes = shapes_of(leaves)
        for stage in layout.stages:
            results = compute(stage, [values[name] for name in stage.inputs], shapes)
            values.update(zip(stage.outputs, results, strict=True))
        outputs = [
            values[out] if isinstance(out, str) else sized(out[1], shapes) for out in layout.outputs
        ]
        return outputs[0] if self._single else pytree.tree_unflatten(outputs, self.out_spec)

    def arrays(self, bound: BoundProgram, stage: Stage, inputs: list[Any]) -> list[Any]:
        """The float32 tensors that a program takes, as arrays; TypeError, ValueError for others."""
        return [
            as_input(f"{type(self).__name__}: {name}", x, extent)
            for name, x, extent in zip(stage.inputs, inputs, bound.program.extents, strict=True)
        ]

    def evaluate(self, stage: Stage, inputs: list[Any], shapes: Shapes) -> Any:
        """The value of a float operator."""
        name = stage.outputs[0]
        node = self._nodes.get(name)
        if node is None:
            module = self._modules.get(name)
            tensors: Any = {} if module is None else module._buffers  # as they are at each call
            node = Node(name, stage.op, attrs=dict(stage.attrs), tensors=tensors)
            if has_size(node.attrs):
                self._sized.add(name)
            self._nodes[name] = node  # last: another thread may find it
        try:
            return evaluate(node, inputs, shapes if name in self._sized else ())
        except RuntimeError as error:
            error.add_note(
                f"in the float operator {name}; other sizes than the calibration data's can be "
                "given where the network's graph does not depend on them"
            )
            raise

    def __repr__(self) -> str:
        """The programs, and each float operator with its reason. Not the modules, which are
        there for the state only."""
        steps = sum(len(p.steps) for p in self.programs)
        between = [stage for stage in self.layout.stages if stage.program < 0]
        targets = [stage.attrs.get("target", stage.op) for stage in between]
        shown = [stage for stage, t in zip(between, targets, strict=True) if t != "getitem"]
        layers = sum(target in INT8_OPERATORS for target in targets)
        head = (
            f"{len(self.layout.programs)} integer program(s) of {steps} steps, "
            + (f"{layers} int8 layer(s) of their own, " if layers else "")
            + f"{len(shown) - layers} float operator(s)"
        )
        lines = [
            f"{stage.outputs[0]}{f' in {stage.layer!r}' if stage.layer else ''}: {stage.why}"
            for stage in shown
        ]
        return "\n  ".join([f"{type(self).__name__}(", head, *lines]) + "\n)"

    def __getstate__(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "_ready": None,
            "_one": None,
            "_nodes": {},
            "_sized": set(),
            "in_spec": None,
            "out_spec": None,
        }
        return {**self.__dict__, **made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._read_specs()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(stay(type(self).__name__, fn), recurse)  # type: ignore[no-untyped-call]
        return self


def leaves_of(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    spec: Any,
    inputs: Sequence[Any],
    names: Sequence[str],
) -> list[Any]:
    """The leaves of the arguments in the order of `spec`, which has one for each of `inputs`.

    names  of the parameters of the float network's forward. TypeError for other arguments.
    """
    leaves: list[Any]
    leaves, given_spec = pytree.tree_flatten((args, kwargs))
    if given_spec == spec:
        return leaves
    wanted_args, wanted_kwargs = pytree.tree_unflatten(list(inputs), spec)
    given, why = {**dict(zip(names, args, strict=False)), **kwargs}, ""
    ways: list[Any] = [(args, kwargs)]  # dicts in another order
    try:  # what was given by position, by name, or the other way round
        moved = tuple(given.pop(names[i]) for i in range(len(wanted_args)))
        named = {k: given.pop(k) for k in wanted_kwargs}
        if len(args) <= len(names) and all(v is None for v in given.values()):
            ways.append((moved, named))
    except (KeyError, IndexError):
        pass
    for way in ways:
        try:
            leaves = spec.flatten_up_to(way)
            return leaves
        except ValueError as error:
            why = f" ({error})"
    shown = [*map(str, names[: len(wanted_args)]), *(f"{k}=" for k in wanted_kwargs)]
    raise TypeError(
        f"{type(network).__name__}: got {len(args)} by position and {sorted(kwargs)} by name; "
        f"wanted ({', '.join(shown)}), as in the calibration data{why}"
    )


def as_input(name: str, x: Any, extent: Sequence[int | None]) -> Any:
    """The array that a program takes; TypeError or ValueError for what it does not."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; wanted a float32 tensor")
    fits = x.dim() == len(extent)
    # as in `accept`, for which the text is made
    if not fits or x.dtype is not torch.float32 or x.requires_grad:
        x = accept(name, x, extent_text(extent), fits)
    if not x.is_cpu:
        raise ValueError(f"{name} is on {x.device}, wanted the CPU")
    return array_of(name, x)


def check_constant(network: nn.Module, number: int, leaf: Any, wanted: Any) -> None:
    """ValueError unless an argument that is no tensor is the one that the network was made with."""
    # arrays and tensors are compared element by element; a tensor would count in `shapes_of`, too
    if isinstance(leaf, np.ndarray | Tensor) or leaf != wanted:
        raise ValueError(
            f"{type(network).__name__}: argument number {number} is {leaf!r:.80}; the network was "
            f"captured with {wanted!r}, which is part of it now"
        )


@functools.cache
def _name_return_types() -> None:
    """Gives what torch.topk, torch.sort and the like return the name that a spec asks for."""
    for kind in torch.return_types.all_return_types:
        name = f"torch.return_types.{kind.__name__}"
        pytree.SUPPORTED_SERIALIZED_TYPES[kind] = pytree._SerializeNodeDef(kind, name, None, None)
        pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[name] = kind


def spec_text(spec: Any) -> str:
    """A pytree spec as JSON; named tuples get the name that it asks for.

    TypeError for a class that has none.
    """
    _name_return_types()

    def register(value: Any) -> bool:
        kind = type(value)
        named = isinstance(value, tuple) and hasattr(kind, "_fields")
        if named and kind not in pytree.SUPPORTED_SERIALIZED_TYPES:
            name = f"{kind.__module__}.{kind.__qualname__}"
            pytree._register_namedtuple(kind, serialized_type_name=name)
        return False

    pytree.tree_leaves(pytree.tree_unflatten([0] * spec.num_leaves, spec), is_leaf=register)
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError as error:
        raise TypeError(
            "the model takes or returns a class that has no name in a file; "
            "torch.export.register_dataclass(Kind, serialized_type_name='module.Kind') gives one"
        ) from error


def _read_spec(text: str) -> Any:
    """The spec again; ValueError for what `spec_text` does not write.

    Torch imports the modules that name an enum's class or a defaultdict's factory: refused, but
    for builtins and collections, for a file may have named them.
    """

    def refuse_modules(given: dict[str, Any]) -> dict[str, Any]:
        module = given.get("default_factory_module", "builtins")
        if "__enum__" in given or module not in ("builtins", "collections"):
            raise ValueError(f"a spec with {given!r:.80}; wanted tuples, lists and dicts")
        context = given.get("context")
        if isinstance(context, str) and given.get("type") != "collections.namedtuple":
            json.loads(context, object_hook=refuse_modules)
        return given

    _name_return_types()
    try:
        json.loads(text, object_hook=refuse_modules)
        return pytree.treespec_loads(text)
    except Exception as error:  # torch raises whatever it meets
        raise ValueError(f"a spec is not in order: {type(error).__name__}: {error}") from error


# How torch's own kinds of values are written in a file; all others are encode.py's.
NAMED: dict[str, dict[str, Any]] = {
    "dtype": {str(v).removeprefix("torch."): v for v in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.complex32, torch.complex64,
        torch.complex128)},
    "layout": {"strided": torch.strided},
    "memory_format": {str(v).removeprefix("torch."): v for v in (
        torch.contiguous_format, torch.channels_last, torch.preserve_format)},
    "device": {"cpu": torch.device("cpu")},
}  # fmt: skip


def check_operator(stage: Stage) -> None:
    """ValueError unless a float stage names an operation, or an operator that only computes."""
    if stage.op == "aten":
        check_target(stage.attrs["target"])
    elif stage.op == "pointwise":
        for target, _, _ in stage.attrs["calls"]:
            check_target(target)
    elif stage.op not in OPERATIONS and stage.op != "constant":
        raise ValueError(f"{stage.op!r} is no operation")
