"""The executor: runs a table of kernels; with workers.py the place of the one parallel loop.

A row of the table is (address of a kernel, address of its argument block, number of tasks, most
threads that it pays to use). Rows run one after the other; the tasks of a row are shared among
the threads. All threads walk the whole table: each claims the tasks of its part of a row, then what
others have not claimed of theirs, then waits until all are done. Nobody waits for a thread that has
not come: it may be busy elsewhere, and finds the work done.

Before that, the patches are applied: each writes bases[BASE] + OFFSET to the address FIELD, which
puts the addresses of a call's arrays into the argument blocks.

The executor is a kernel itself. It is called through ctypes, with one packed string of bytes as its
block: a third of the time of a Numba call with arrays.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numba
import numpy as np
from numba import njit
from numpy.typing import NDArray

from fastq.kernels.native import Kernel, native
from fastq.kernels.pack import aligned_empty
from fastq.kernels.scalar import pointer
from fastq.kernels.signature import sources_digest
from fastq.kernels.workers import (
    ARGS,
    COLUMNS,
    J_COUNT,
    J_GIVE_WAY,
    J_MAILBOXES,
    J_PROGRESS,
    J_ROWS,
    J_STRIDE,
    J_WORKERS,
    KERNEL,
    LINE_BYTES,
    MOST_WORKERS,
    TASKS,
    THREADS,
    Worker,
    call_at,
    give_way,
    share,
    team,
)

__all__ = ["ARGS", "COLUMNS", "KERNEL", "TASKS", "THREADS", "Run", "Table", "get_num_threads",
           "recording", "run", "set_num_threads"]  # fmt: skip

FIELD, BASE, OFFSET, PATCH_COLUMNS = range(4)
# the block of the executor's own kernels
(E_ROWS, E_COUNT, E_PATCHES, E_PATCH_COUNT, E_JOB, E_BASES) = range(6)


# Below this one thread is faster: to share a call takes 2 microseconds, and what one core made is
# not in the other's cache.
PARALLEL_NANOSECONDS = 15_000.0
# To share one row in a call that is shared costs about a half.
PARALLEL_ROW_NANOSECONDS = 2_000.0


class Table:
    """Rows (n, COLUMNS) and patches (p, PATCH_COLUMNS), int64, that are run with so many bases.

    nanoseconds is an estimate of what they take one thread; `most` says how many threads pay in one
    of the rows, `shared` whether these are several, `pays` whether it takes long enough for them.
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
        self.most = int(self.rows[:, [TASKS, THREADS]].min(1).max(initial=1))
        self.shared = self.most > 1
        self.pays = self.shared and nanoseconds >= PARALLEL_NANOSECONDS
        stride = -(-8 * len(rows) // LINE_BYTES) * LINE_BYTES if self.shared else 0
        self.progress = aligned_empty((MOST_WORKERS + 2, stride), np.uint8, LINE_BYTES)
        self.job = np.zeros(J_MAILBOXES + MOST_WORKERS, np.int64)
        self.job[[J_ROWS, J_COUNT, J_PROGRESS, J_STRIDE, J_GIVE_WAY]] = (
            self.rows.ctypes.data, len(rows), self.progress.ctypes.data, stride, give_way(),
        )  # fmt: skip
        first = (
            self.rows.ctypes.data, len(rows), self.patches.ctypes.data, len(patches),
            self.job.ctypes.data,
        )  # fmt: skip
        self.serial = serial_kernel().entry
        # the executor's block, of the bases; an error for another number of them
        self.pack = functools.partial(struct.Struct(f"{E_BASES + bases}q").pack, *first)

    def part(self, first: int, last: int) -> Table:
        """Some of the rows, with all patches."""
        return Table(self.rows[first:last], self.patches, self.bases, self.nanoseconds)


@njit
def _apply_patches(args):  # type: ignore[no-untyped-def]
    patches = pointer(args[E_PATCHES], "s64")
    for i in range(args[E_PATCH_COUNT]):
        patch = i * PATCH_COLUMNS
        base = args[E_BASES + patches[patch + BASE]]
        pointer(patches[patch + FIELD], "s64")[0] = base + patches[patch + OFFSET]


# Neither is compiled, or read from a cache, before its first call.
@functools.cache
def serial_kernel() -> Kernel:
    """All rows, one after the other: one task, so that it needs no begin and end."""
    config = (sources_digest(),)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        config  # noqa: B018  the digest is part of the cache's key
        _apply_patches(args)
        rows = pointer(args[E_ROWS], "s64")
        for i in range(args[E_COUNT]):
            row = i * COLUMNS
            call_at(rows[row + KERNEL], rows[row + ARGS], 0, rows[row + TASKS])

    return kernel


@functools.cache
def shared_kernel() -> Kernel:
    """All rows, their tasks shared with the workers of the job."""
    config = (sources_digest(),)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        config  # noqa: B018
        _apply_patches(args)
        share(args[E_JOB])

    return kernel


def set_num_threads(threads: int) -> None:
    """Sets how many threads a call may use, from 1 to Numba's maximum (NUMBA_NUM_THREADS).

    Raises ValueError beyond these. The result of a call does not depend on it.
    """
    most = numba.config.NUMBA_NUM_THREADS
    if not isinstance(threads, int | np.integer) or not 1 <= threads <= most:
        raise ValueError(f"set_num_threads: got {threads!r}, wanted an int from 1 to {most}")
    team.threads = int(threads)


def get_num_threads() -> int:
    """How many threads a call may use: Numba's default until `set_num_threads` is called."""
    return team.threads


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


def run(table: Table, bases: tuple[int, ...]) -> None:
    """Runs a table, its patches applied with these bases."""
    if _recorded is not None:
        _recorded.append(Run(table, bases))
    if not table.pays or team.threads == 1:
        table.serial(table.pack(*bases))
        return
    workers: list[Worker] = []
    try:
        team.take(min(team.threads, table.most) - 1, workers)
        job = table.job
        job[J_WORKERS] = len(workers)
        for i, worker in enumerate(workers):
            job[J_MAILBOXES + i] = worker.address
        shared_kernel().entry(table.pack(*bases))
    finally:
        team.give_back(workers)
