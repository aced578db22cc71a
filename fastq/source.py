"""What the Python source of modules says of their parameters, without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

# what may be asked of a parameter that is not its values
PROPERTIES = ("shape", "size", "device", "dim", "ndim", "numel", "requires_grad")


def reads_in_source(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """`Trace.readers` and `casters` by the source of the modules' forward, and of the methods that
    it calls: who writes self.layer.weight there, or self.layer.weight.dtype."""
    names = {module: name for name, module in model.named_modules()}
    readers: dict[str, str] = {}
    casters: dict[str, str] = {}
    for module, name in names.items():
        kind: Any = type(module)
        for path, what in _parameters_in_source(kind):
            try:
                owner = operator.attrgetter(path)(module)
            except AttributeError:
                continue
            if isinstance(owner, nn.Module) and owner in names:
                (casters if what == "dtype" else readers)[names[owner]] = name
    return readers, casters


@functools.cache
def _methods(kind: Any) -> tuple[tuple[ast.AST, str], ...]:
    """The source of a class's forward, and of the methods that it calls, each with its name for
    self; of torch's own classes none."""
    seen, waiting, found = set[str](), ["forward"], []
    while waiting:
        method = waiting.pop()
        if method in seen or kind.__module__.startswith("torch."):
            continue
        seen.add(method)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, method))))
        except (OSError, TypeError, SyntaxError, AttributeError):  # it has no source
            continue
        (function,) = tree.body
        if not isinstance(function, ast.FunctionDef) or not function.args.args:
            continue  # a static one
        own = function.args.args[0].arg
        found.append((tree, own))
        waiting += [
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == own
        ]
    return tuple(found)


@functools.cache
def _parameters_in_source(kind: Any) -> frozenset[tuple[str, str]]:
    """The layers whose weight or bias the forward of a class reads, as paths from self, and what is
    read of it: "values" or "dtype"."""
    paths = set[tuple[str, str]]()
    for tree, own in _methods(kind):
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node)
            if re.fullmatch(rf"{own}(\.\w+)+\.(weight|bias)", text):
                what = _read_of(node, parents)
                if what == "dtype" and "torch.int8" in ast.unparse(tree):
                    what = ""  # it knows of such weights
                if what:
                    paths.add((text.removeprefix(f"{own}.").rpartition(".")[0], what))
    return frozenset(paths)


def _read_of(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> str:
    """What is read of a parameter: "values", "dtype", or "" for what int8 does not change."""
    parent = parents[node]
    compared = ast.Compare | ast.Expr | ast.BoolOp | ast.If
    if isinstance(parent, ast.Attribute):
        if parent.attr in ("data", "detach"):
            return _read_of(parent, parents)
        if parent.attr == "dtype":
            return "" if isinstance(parents[parent], compared | ast.Attribute) else "dtype"
        return "" if parent.attr in PROPERTIES else "values"
    if isinstance(parent, ast.Call):  # x.to(weight), isinstance(weight, ...)
        called = ast.unparse(parent.func).rpartition(".")[2]
        if called in ("to", "type_as"):
            return "dtype"
        return "" if called in ("isinstance", "hasattr", "getattr", "len", "type") else "values"
    return "" if isinstance(parent, compared) else "values"


PARAMETERS = (nn.ParameterList, nn.ParameterDict)
# functions that sum the products of what they take
PRODUCTS = {"linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm",
            "addmv", "addbmm", "baddbmm", "einsum", "tensordot", "grouped_mm", "_grouped_mm",
            *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))}  # fmt: skip


def products_in_source(model: nn.Module) -> dict[str, set[str]]:
    """`Trace.products`."""
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter].append(name)
    found: dict[str, set[str]] = defaultdict(set)
    for module in model.modules():
        kind: Any = type(module)
        for path in _paths_of_products(kind):
            value: Any = module
            for part in path.split("."):  # what comes after a parameter is a view of it, or so
                if isinstance(value, nn.Module) and not isinstance(value, PARAMETERS):
                    value = getattr(value, part, None)
            for parameter in value.parameters() if isinstance(value, PARAMETERS) else [value]:
                for name in owners[parameter] if isinstance(parameter, nn.Parameter) else ():
                    owner, _, own = name.rpartition(".")
                    found[owner].add(own)
    return found


@functools.cache
def _paths_of_products(kind: Any) -> set[str]:
    """What the forward of a class multiplies by, as paths from self."""
    paths = set[str]()
    for tree, own in _methods(kind):
        visitor = _Products(own)
        visitor.visit(tree)
        paths |= visitor.paths
    return paths


class _Products(ast.NodeVisitor):
    """Collects the paths of what is multiplied by: "a" for self.a and self.a[i], "a.t" for
    self.a[i].t(), and for a name that was given to one of them."""

    def __init__(self, own: str) -> None:
        self.names = {own: ""}
        self.paths = set[str]()

    def path(self, node: ast.AST) -> str | None:
        """The path of an expression; None: it is another value, or a function of one."""
        match node:
            case ast.Name():
                return self.names.get(node.id)
            case ast.Attribute():
                path = self.path(node.value)
                return None if path is None else f"{path}.{node.attr}".removeprefix(".")
            case ast.Subscript():
                return self.path(node.value)
            case ast.Call(func=ast.Attribute()):
                return self.path(node.func)
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._name(target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self._name(node.target, node.iter)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self._take(node.left, node.right)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if ast.unparse(function).rpartition(".")[2] in PRODUCTS:
            if isinstance(function, ast.Attribute):
                self._take(function.value)
            if self.path(function) is None:  # else self.linear(x), a module
                self._take(*node.args, *(keyword.value for keyword in node.keywords))
        self.generic_visit(node)

    def _name(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Name):
            path = self.path(value)
            self.names.pop(target.id, None)
            if path is not None:
                self.names[target.id] = path

    def _take(self, *nodes: ast.AST) -> None:
        self.paths |= {path for node in nodes if (path := self.path(node))}
