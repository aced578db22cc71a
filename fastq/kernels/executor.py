"""The executor: runs a table of kernels. The package's one parallel loop is here.

A row of the table is (address of a kernel, address of its argument block, number of tasks, most
threads that it pays to use). Rows run one after the other; the tasks of a row are shared among
the threads in equal ranges.

Before that, the patches are applied: each writes bases[BASE] + OFFSET to the address FIELD, which
puts the addresses of a call's arrays into the argument blocks.

Threads come from Numba's pool. With TBB a call from several Python threads or inside another
parallel region is safe. Numba's "workqueue" ends a process with two parallel regions at once, the
user's own among them: there, a call runs on its own thread alone. So does every call in a forked
child, whose copy of the pool may hang (TBB) or end the process (OpenMP). Same bits in all cases.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Table = NDArray[np.int64]  # (rows, COLUMNS)
KERNEL, ARGS, TASKS, THREADS, COLUMNS = range(5)
FIELD, BASE, OFFSET = range(3)


@intrinsic
def _call(typingctx: Any, kernel: Any, args: Any, begin: Any, end: Any) -> Any:
    signature = types.void(types.int64, types.int64, types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        i64 = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), i64, i64])
        function = builder.inttoptr(values[0], kind.as_pointer())
        pointer = builder.inttoptr(values[1], ir.PointerType())
        builder.call(function, [pointer, values[2], values[3]])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _store(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], builder.inttoptr(values[0], ir.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@njit
def _fill(patches, bases):  # type: ignore[no-untyped-def]
    for i in range(patches.shape[0]):
        _store(patches[i, FIELD], bases[patches[i, BASE]] + patches[i, OFFSET])


# An njit with a signature compiles (or reads the cache) where it is defined: so not at import, and
# the parallel one, which starts Numba's pool, not before the first parallel call.
_TABLES = (types.int64[:, ::1], types.int64[:, ::1], types.int64[::1])


@functools.cache
def _serial() -> Any:
    @njit(types.void(*_TABLES), nogil=True, cache=True)
    def run(table, patches, bases):  # type: ignore[no-untyped-def]
        _fill(patches, bases)
        for row in range(table.shape[0]):
            _call(table[row, KERNEL], table[row, ARGS], 0, table[row, TASKS])

    return run


@functools.cache
def _parallel() -> Any:
    @njit(types.void(*_TABLES, types.int64), nogil=True, parallel=True, cache=True)
    def run(table, patches, bases, threads):  # type: ignore[no-untyped-def]
        _fill(patches, bases)
        for row in range(table.shape[0]):
            tasks = table[row, TASKS]
            parts = min(threads, tasks, table[row, THREADS])
            if parts <= 1:
                _call(table[row, KERNEL], table[row, ARGS], 0, tasks)
            else:
                for part in prange(parts):
                    begin = tasks * part // parts
                    end = tasks * (part + 1) // parts
                    _call(table[row, KERNEL], table[row, ARGS], begin, end)

    return run


def _load_tbb() -> None:
    """Makes the `tbb` package's library visible to Numba, which looks on the loader's path only."""
    names = {"linux": "libtbb.so.12", "darwin": "libtbb.12.dylib"}
    if sys.platform == "win32":
        path = Path(sys.prefix) / "Library" / "bin"
        if path.is_dir():
            os.add_dll_directory(str(path))
        return
    path = Path(sys.prefix) / "lib" / names.get(sys.platform, "")
    if path.is_file():
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


_load_tbb()


class _Pool:
    """State of the parallel path: how many threads, and which of Numba's pools runs them."""

    def __init__(self) -> None:
        self.threads = int(numba.config.NUMBA_NUM_THREADS)
        self.process = os.getpid()
        self.layer = ""
        self.starting = threading.Lock()

    def start(self) -> None:
        """Starts Numba's pool, once, and learns which one it is."""
        with self.starting:
            if not self.layer:
                _serial()  # what a forked child will need, without the compiler
                nothing = np.zeros((0, COLUMNS), np.int64)
                _parallel()(nothing, np.zeros((0, 3), np.int64), np.zeros(0, np.int64), 1)
                self.layer = numba.threading_layer()

    def usable(self) -> bool:
        """Whether the pool may be entered here and now."""
        if os.getpid() != self.process:  # a fork: its pool may have been busy at that moment
            return False
        if not self.layer:
            self.start()
        if self.layer == "omp":
            return multiprocessing.parent_process() is None
        return self.layer == "tbb"

    def run(self, table: Table, patches: Table, bases: NDArray[np.int64]) -> None:
        if self.usable():
            _parallel()(table, patches, bases, self.threads)
        else:
            _serial()(table, patches, bases)


_pool = _Pool()


def set_num_threads(threads: int) -> None:
    """Sets how many threads a call may use, from 1 to Numba's maximum (NUMBA_NUM_THREADS).

    Raises ValueError beyond these. The result of a call does not depend on it.
    """
    most = numba.config.NUMBA_NUM_THREADS
    if not isinstance(threads, int | np.integer) or not 1 <= threads <= most:
        raise ValueError(f"set_num_threads: got {threads!r}, wanted an int from 1 to {most}")
    _pool.threads = int(threads)


def get_num_threads() -> int:
    """How many threads a call may use: Numba's default until `set_num_threads` is called."""
    return _pool.threads


# Entering the pool and leaving it takes about 10 microseconds: below twice that, one thread is
# faster.
PARALLEL_NANOSECONDS = 20_000.0
# Sharing one row in a call that runs in the pool costs one or two.
PARALLEL_ROW_NANOSECONDS = 5_000.0


class Run(NamedTuple):
    """The arguments of one `run`."""

    table: Table
    patches: Table
    bases: NDArray[np.int64]
    nanoseconds: float


_recorded: list[Run] | None = None


@contextmanager
def recording() -> Iterator[list[Run]]:
    """Collects what runs inside the `with` block, in any thread.

    It can be run again while its operands are alive, the thread's workspace among them.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def run(table: Table, patches: Table, bases: NDArray[np.int64], nanoseconds: float) -> None:
    """Runs a table. `nanoseconds` is an estimate of what it takes one thread."""
    if _recorded is not None:
        # a copy: the next call of the same table writes its own addresses there
        _recorded.append(Run(table, patches, bases.copy(), nanoseconds))
    if nanoseconds < PARALLEL_NANOSECONDS or _pool.threads == 1:
        _serial()(table, patches, bases)
    else:
        _pool.run(table, patches, bases)
