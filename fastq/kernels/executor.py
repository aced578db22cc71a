"""The executor: runs a table of kernels. The package's one parallel loop is here.

A row of the table is (address of a kernel, address of its argument block, number of tasks, most
threads that it pays to use). Rows run one after the other; the tasks of a row are shared among
the threads. All threads walk the whole table in one parallel region: each claims the tasks of its
part of a row, then what others have not claimed of theirs, then waits until all are done. Nobody
waits for a thread that has not come: it may be busy elsewhere, and finds the work done.

Before that, the patches are applied: each writes bases[BASE] + OFFSET to the address FIELD, which
puts the addresses of a call's arrays into the argument blocks.

On one thread the executor is a kernel itself. It is called through ctypes, with one packed string
of bytes as its block: a third of the time of a Numba call with arrays.

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
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastq.kernels.native import Kernel, native
from fastq.kernels.scalar import pointer
from fastq.kernels.signature import sources_digest

KERNEL, ARGS, TASKS, THREADS, COLUMNS = range(5)
FIELD, BASE, OFFSET, PATCH_COLUMNS = range(4)
# the block of the executor's own kernel
(E_ROWS, E_COUNT, E_PATCHES, E_PATCH_COUNT, E_BASES) = range(5)


class Table:
    """Rows (n, COLUMNS) and patches (p, PATCH_COLUMNS), int64, that are run with so many bases.

    nanoseconds is an estimate of what they take one thread; `shared` says whether there is a row
    that pays to be shared among threads.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        patches: NDArray[np.int64],
        bases: int,
        nanoseconds: float,
    ) -> None:
        self.rows, self.patches = np.ascontiguousarray(rows), np.ascontiguousarray(patches)
        self.bases, self.nanoseconds = bases, nanoseconds
        self.shared = bool((self.rows[:, THREADS] > 1).any())
        first = self.rows.ctypes.data, len(rows), self.patches.ctypes.data, len(patches)
        # the executor's block, of the bases; an error for another number of them
        self.pack = functools.partial(struct.Struct(f"{E_BASES + bases}q").pack, *first)

    def part(self, first: int, last: int) -> Table:
        """Some of the rows, with all patches."""
        return Table(self.rows[first:last], self.patches, self.bases, self.nanoseconds)


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


# Neither is compiled, or read from a cache, before its first call; the parallel one starts Numba's
# pool there.
@functools.cache
def serial_kernel() -> Kernel:
    """All rows, one after the other: one task, so that it needs no begin and end."""
    config = (sources_digest(),)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        config  # noqa: B018  the digest is part of the cache's key
        patches = pointer(args[E_PATCHES], "s64")
        for i in range(args[E_PATCH_COUNT]):
            patch = i * PATCH_COLUMNS
            base = args[E_BASES + patches[patch + BASE]]
            pointer(patches[patch + FIELD], "s64")[0] = base + patches[patch + OFFSET]
        rows = pointer(args[E_ROWS], "s64")
        for i in range(args[E_COUNT]):
            row = i * COLUMNS
            _call(rows[row + KERNEL], rows[row + ARGS], 0, rows[row + TASKS])

    return kernel


@functools.cache
def _serial() -> Any:
    """The serial kernel as Python calls it, with its block alone; it releases the GIL."""
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p)(serial_kernel().address)


@intrinsic
def _fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at an address, atomically; what was there before."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        at = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", at, values[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _read(typingctx: Any, address: Any) -> Any:
    """The int64 at an address, and with it all that was written before it was."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        at = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(at, "acquire", 8)

    return types.int64(types.int64), codegen


CLAIMS = 4  # that a thread makes of its part of a row: what one that is late leaves to the others
SPINS = 1000  # looks at what others do, before the core is given to another thread


@njit
def _take_part(rows, progress, threads, me, give_way):  # type: ignore[no-untyped-def]
    """progress (rows, threads + 1): the tasks of each thread's part that are claimed, and done."""
    for row in range(rows.shape[0]):
        kernel, args, tasks = rows[row, KERNEL], rows[row, ARGS], rows[row, TASKS]
        claimed = progress + 8 * row * (threads + 1)
        done = claimed + 8 * threads
        parts = min(threads, tasks, rows[row, THREADS])
        for i in range(parts):
            part = (me + i) % parts  # its own first: what it made in the row before is in its cache
            first, last = tasks * part // parts, tasks * (part + 1) // parts
            share = last - first
            if parts > 1:
                share = (share + CLAIMS - 1) // CLAIMS
            begin = first + _fetch_add(claimed + 8 * part, share)
            while begin < last:
                end = min(begin + share, last)
                _call(kernel, args, begin, end)
                _fetch_add(done, end - begin)
                begin = first + _fetch_add(claimed + 8 * part, share)
        spins = 0
        while _read(done) < tasks:
            spins += 1
            if spins > SPINS:
                _call(give_way, 0, 0, 0)


@functools.cache
def _parallel() -> Any:
    arrays = (types.int64[:, ::1], types.int64[:, ::1], types.int64[::1])

    @njit(types.void(*arrays, types.int64, types.int64), nogil=True, parallel=True, cache=True)
    def run(table, patches, bases, threads, give_way):  # type: ignore[no-untyped-def]
        for i in range(patches.shape[0]):
            base = bases[patches[i, BASE]]
            pointer(patches[i, FIELD], "s64")[0] = base + patches[i, OFFSET]
        if table.shape[0] == 0:
            return  # to start the pool; entering it may end the process, see _Pool.usable
        progress = np.zeros((table.shape[0], threads + 1), np.int64)
        for me in prange(threads):
            _take_part(table, progress.ctypes.data, threads, me, give_way)

    return run


@functools.cache
def _give_way() -> int:
    """The address of what lets another thread have the core."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


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
                rows, patches = (np.zeros((0, n), np.int64) for n in (COLUMNS, PATCH_COLUMNS))
                _parallel()(rows, patches, np.zeros(0, np.int64), 1, _give_way())
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

    def run(self, table: Table, bases: Sequence[int]) -> None:
        if self.usable():
            arrays = table.rows, table.patches, np.array(bases, np.int64)
            _parallel()(*arrays, self.threads, _give_way())
        else:
            _serial()(table.pack(*bases))


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
# Sharing one row in a call that runs in the pool costs about a half.
PARALLEL_ROW_NANOSECONDS = 2_000.0


class Run(NamedTuple):
    """What one `run` was given."""

    table: Table
    bases: tuple[int, ...]


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


def run(table: Table, *bases: int) -> None:
    """Runs a table, its patches applied with these bases."""
    if _recorded is not None:
        _recorded.append(Run(table, bases))
    if _pool.threads == 1 or not table.shared or table.nanoseconds < PARALLEL_NANOSECONDS:
        _serial()(table.pack(*bases))
    else:
        _pool.run(table, bases)
