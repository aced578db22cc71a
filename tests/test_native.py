"""Kernels on disk: what their name depends on, and files that are damaged, missing or shared."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite
import numpy as np
import pytest
from numba.core.registry import cpu_target

from fastq.kernels import native


def adding(number: int, names: tuple[str, ...] = ()) -> Any:
    """A kernel's function, not compiled: adds a number to its tasks' fields."""
    config = (number, names)

    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        for i in range(begin, end):
            args[i] += config[0]

    return kernel


def run(kernel: native.Kernel) -> list[int]:
    """What it makes of tasks 1 and 2 of four zeros."""
    fields = np.zeros(4, np.int64)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    kind(kernel.address)(fields.ctypes.data, 1, 3)
    found: list[int] = fields.tolist()
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(native, "folder", lambda: tmp_path)
    return tmp_path


def test_a_kernel_is_compiled_once(folder: Path) -> None:
    first, second = native.native(adding(3)), native.native(adding(3))
    assert (first.compiled, second.compiled) == (True, False)
    assert run(first) == run(second) == [0, 3, 3, 0]
    assert [path.name for path in folder.iterdir()] == [f"{native.symbol(adding(3))}.o"]


def test_the_name_tells_what_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [native.symbol(f) for f in (adding(3), adding(4), adding(3, ("a",)), run)]
    codegen = cpu_target.target_context.codegen()
    for place, attribute, value in (
        (native, "sources_digest", lambda: "edited"),
        (llvmlite, "__version__", "0"),
        (native.numba, "__version__", "0"),
        (native.numba.config, "OPT", 1),
        (type(codegen), "magic_tuple", lambda self: ("another", "CPU")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, attribute, value)
            names.append(native.symbol(adding(3)))
    assert len(set(names)) == len(names)
    assert native.symbol(adding(3)) == names[0]


DAMAGE = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "no object code": lambda data: native.hashlib.sha256(b"nonsense").digest() + b"nonsense",
    "only a digest": lambda data: native.hashlib.sha256(b"").digest(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_file_is_compiled_anew(folder: Path, damage: Any) -> None:
    native.native(adding(5))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = native.native(adding(5))
    assert again.compiled and run(again) == [0, 5, 5, 0]
    assert not native.native(adding(5)).compiled
    assert list(folder.iterdir()) == [path]


def test_a_file_of_another_kernel_is_not_taken(folder: Path) -> None:
    native.native(adding(6))
    (path,) = folder.iterdir()
    path.rename(folder / f"{native.symbol(adding(7))}.o")
    taken = native.native(adding(7))
    assert taken.compiled and run(taken) == [0, 7, 7, 0]


def test_without_a_place_to_write_it_runs_all_the_same(folder: Path) -> None:
    folder.rmdir()
    for _ in range(2):
        kernel = native.native(adding(8))
        assert kernel.compiled and run(kernel) == [0, 8, 8, 0]


def test_code_that_calls_python_is_refused(folder: Path) -> None:
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        np.empty(args[0])[1] = 3.0  # allocates

    with pytest.raises(RuntimeError, match="NRT"):
        native.native(kernel)
    assert not list(folder.iterdir())


CALL = """
import numpy as np, fastq
rng = np.random.default_rng(0)
weight = fastq.LinearWeight(rng.integers(-128, 128, (40, 30)).astype(np.int8))
x = rng.normal(size=(3, 30)).astype(np.float32)
got = fastq.linear_float(x, weight, fastq.Dequant(0.01))
assert (got == fastq.reference.linear_float(x, weight, fastq.Dequant(0.01))).all()
"""

WATCHED = """
import numba.core.compiler as compiler, numba.core.cpu as cpu
def started(*args, **named):
    raise AssertionError("Numba's compiler was started")
compiler.compile_extra = cpu.CPUContext.load_additional_registries = started
"""


def test_a_first_call_does_not_start_the_compiler() -> None:
    """What the cache has is linked without it."""
    for code in (CALL, WATCHED + CALL):
        subprocess.run([sys.executable, "-c", code], check=True)


def test_processes_may_write_at_once(tmp_path: Path) -> None:
    """Four that compile the same kernels into an empty cache."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", CALL], env=environment) for _ in range(4)]
    assert [process.wait(120) for process in running] == [0] * 4
    subprocess.run([sys.executable, "-c", WATCHED + CALL], env=environment, check=True)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".o"}


def test_no_kernel_goes_another_way() -> None:
    rooms = Path(native.__file__).parent.glob("*.py")
    assert [room.name for room in rooms if "cfunc(" in room.read_text()] == []
