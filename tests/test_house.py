"""The house rules: which room imports which, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastq

ROOT = Path(fastq.__file__).parent
ROOMS = sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.rglob("*.py"))

# A room may import the rooms before it, and no other; those up to "runtime" need no torch.
ORDER = [
    "qparams",
    "sizes",
    "weights",
    "arguments",
    "reference",
    "kernels",
    "ops",
    "observer",
    "qconfig",
    "steps",
    "program",
    "encode",
    "layout",
    "operators",
    "phases",
    "packed",
    "placement",
    "plan",
    "runtime",
    "source",
    "trace",
    "batches",
    "processes",
    "progress",
    "graph",
    "custom",
    "nn",
    "masks",
    "read",
    "examples",
    "extents",
    "followed",
    "paddings",
    "generalize",
    "capture",
    "fuse",
    "regions",
    "lower",
    "modules",
    "summaries",
    "outlook",
    "rebuild",
    "restoring",
    "swap",
    "prepare",
    "recipe",
    "remedies",
    "alone",
    "network",
    "parameters",
    "straight_through",
    "qat",
    "layerwise",
    "ladder",
    "quantization",
    "timing",
    "explanation",
    "profiling",
    "serialize",
    "page",
    "fidelity",
    "reporting",
    "demo",
    "cli",
    "commands",
    "__main__",
]
NUMBA = {"kernels"}
TORCH = set(ORDER[ORDER.index("source") :]) - {"cli"}


def room_of(path: str) -> str:
    return path.split("/")[0]


def imports(path: str) -> set[str]:
    """Modules named by import statements anywhere in the file, but for type checking."""
    found: set[str] = set()
    tree = ast.parse((ROOT / f"{path}.py").read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", ROOMS)
def test_imports_go_one_way(path: str) -> None:
    room = room_of(path)
    named = imports(path)
    tops = {name.split(".")[0] for name in named}
    if room not in NUMBA:
        assert not tops & {"numba", "llvmlite"}
    if room not in TORCH:
        assert "torch" not in tops
    if room in ORDER and room != "cli":  # the door: it opens what comes after it
        ours = {name.split(".")[1] for name in named if name.startswith("fastq.")}
        assert ours <= {*ORDER[: ORDER.index(room)], room}


def test_every_room_has_its_rule() -> None:
    rooms = {room_of(path) for path in ROOMS}
    assert rooms == {*ORDER, "__init__"}


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_arrays_need_no_torch_and_nothing_is_compiled_at_import() -> None:
    out = python(
        "import sys; import numba.core.compiler as c\n"
        "compiled = []; original = c.compile_extra\n"
        "c.compile_extra = lambda *a, **k: compiled.append(a) or original(*a, **k)\n"
        "import fastq, fastq.kernels.executor\n"
        "print('torch' in sys.modules, len(compiled))\n"
        "import numpy as np\n"
        "w = fastq.LinearWeight(np.ones((2, 3), np.int8))\n"
        "print(fastq.linear(np.ones((1, 3), np.uint8), w).tolist(), 'torch' in sys.modules)\n"
    )
    assert out.split("\n")[:2] == ["False 0", "[[3, 3]] False"]


def test_public_names_exist() -> None:
    for name in fastq.__all__:
        assert getattr(fastq, name).__doc__, name
    assert len(set(fastq.__all__)) == len(fastq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastq.nonsense  # noqa: B018
