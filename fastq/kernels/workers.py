"""Threads that help with a table of kernels: they wait close by, and take part when they come.

A worker is a Python thread in native code, without the GIL. It looks into its mailbox for a while,
then lets others have the core between two looks, then sleeps on a lock until it is woken: calls
that follow each other find it awake, and it is no burden where there is nothing to do.

    IDLE --- a job is put in ---> the job --- the worker comes ---> TAKEN --- all is done ---> IDLE
     | ^                             |
     | +--- it has not come: revoked +
     +--- nothing for long, or dismissed ---> ASLEEP --- woken ---> IDLE

A call takes workers that no other call has, wakes them, puts its job into their mailboxes and sets
to work itself. Nobody waits for a worker that has not come when all is done: one that has to be
woken while other Python threads keep the GIL is late. A call that finds no worker runs alone. A
forked child has workers of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import platform
import struct
import sys
import threading
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastq.kernels.native import Kernel, native
from fastq.kernels.scalar import pointer
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import call

KERNEL, ARGS, TASKS, THREADS, COLUMNS = range(5)  # of a table's row
LINE_BYTES = 64  # of the caches
WORD, ME, MAILBOX_FIELDS = 0, 1, 8  # of a mailbox, which has a cache line of its own
IDLE, TAKEN, ASLEEP = range(3)  # of WORD; all else is the address of a job
# A job: rows, how far they are, and the workers' mailboxes.
(J_ROWS, J_COUNT, J_PROGRESS, J_STRIDE, J_GIVE_WAY, J_WORKERS, J_MAILBOXES) = range(7)

LOOKS = 4_000  # into a mailbox before the worker gives way: a quarter of a millisecond
MORE_LOOKS = 1_500  # before it sleeps: about another millisecond
SPINS = 1_000  # looks at what others do, before the core is given to another thread
CLAIMS = 4  # that a thread makes of its part of a row: what one that is late leaves to the others


@intrinsic
def call_at(typingctx: Any, kernel: Any, args: Any, begin: Any, end: Any) -> Any:
    signature = types.void(types.int64, types.int64, types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        i64 = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), i64, i64])
        function = builder.inttoptr(values[0], kind.as_pointer())
        pointer = builder.inttoptr(values[1], ir.PointerType())
        builder.call(function, [pointer, values[2], values[3]])
        return context.get_dummy_value()

    return signature, codegen


def _place(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at an address, atomically; what was there before."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, values[0]), values[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _write(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes the int64 at an address, after all that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store_atomic(values[1], _place(builder, values[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _replace(typingctx: Any, address: Any, old: Any, new: Any) -> Any:
    """Writes `new` where `old` is; whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(builder, values[0])
        found = builder.cmpxchg(place, values[1], values[2], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _read(typingctx: Any, address: Any) -> Any:
    """The int64 at an address, and with it all that was written before it was."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load_atomic(_place(builder, values[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tells the core that this loop waits."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif machine in ("aarch64", "arm64"):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.IntType(32)(1)])  # yield
        return context.get_dummy_value()

    return types.void(), codegen


@njit
def take_part(rows, count, progress, stride, threads, me, give_way):  # type: ignore[no-untyped-def]
    """rows (count, COLUMNS) and progress (threads + 1, count), `stride` bytes a line, lie at these
    addresses: of each row the tasks of each thread's part that are claimed; last, that are done.

    What a core writes, it takes from the others' caches: so what a thread claims of its own part
    lies apart, others look there before they claim, and it says what is done once a part.
    """
    for row in range(count):
        fields = pointer(rows + 8 * COLUMNS * row, "s64")
        tasks = fields[TASKS]
        done = progress + 8 * row + stride * threads
        parts = min(threads, tasks, fields[THREADS])
        for i in range(parts):
            part = (me + i) % parts  # its own first: what it made before is in its cache
            first, last = tasks * part // parts, tasks * (part + 1) // parts
            share = last - first
            if parts > 1:
                share = (share + CLAIMS - 1) // CLAIMS
            claimed = progress + 8 * row + stride * part
            made = 0
            while first + _read(claimed) < last:
                begin = first + _fetch_add(claimed, share)
                if begin < last:
                    end = min(begin + share, last)
                    call_at(fields[KERNEL], fields[ARGS], begin, end)
                    made += end - begin
            if made > 0 and _fetch_add(done, made) + made == tasks:
                break
        spins = 0
        while _read(done) < tasks:
            spins += 1
            if spins > SPINS:
                call_at(give_way, 0, 0, 0)


@njit
def _rest(keeps, give_way):  # type: ignore[no-untyped-def]
    """Between two looks: the thread keeps the core, or another one may have it."""
    if keeps:
        _pause()
    else:
        call_at(give_way, 0, 0, 0)


@njit
def _run_job(job, me):  # type: ignore[no-untyped-def]
    fields = pointer(job, "s64")
    take_part(
        fields[J_ROWS], fields[J_COUNT], fields[J_PROGRESS], fields[J_STRIDE],
        fields[J_WORKERS] + 1, me, fields[J_GIVE_WAY],
    )  # fmt: skip


@njit
def share(job):  # type: ignore[no-untyped-def]
    """Puts a job into its mailboxes, takes part in it, and revokes it where nobody came."""
    fields = pointer(job, "s64")
    workers = fields[J_WORKERS]
    progress = pointer(fields[J_PROGRESS], "s64")
    for i in range(fields[J_STRIDE] // 8 * (workers + 2)):
        progress[i] = 0
    for i in range(workers):
        pointer(fields[J_MAILBOXES + i], "s64")[ME] = i + 1
        _replace(fields[J_MAILBOXES + i], IDLE, job)  # one that fell asleep just now stays so
    _run_job(job, 0)
    for i in range(workers):
        if not _replace(fields[J_MAILBOXES + i], job, IDLE):
            looks = 0
            while _read(fields[J_MAILBOXES + i]) == TAKEN:  # it is leaving
                looks += 1
                _rest(looks < SPINS, fields[J_GIVE_WAY])


@functools.cache
def worker_kernel() -> Kernel:
    """What a worker does, args[0] its mailbox, until it may sleep: there was nothing for long."""
    config = (sources_digest(),)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        config  # noqa: B018  the digest is part of the cache's key
        mailbox, give_way = args[0], args[1]
        looks = 0
        while looks < LOOKS + MORE_LOOKS or not _replace(mailbox, IDLE, ASLEEP):
            word = _read(mailbox)
            if word == ASLEEP:  # dismissed
                break
            if word > ASLEEP and _replace(mailbox, word, TAKEN):
                _run_job(word, pointer(mailbox, "s64")[ME])
                _write(mailbox, IDLE)
                looks = 0
            looks += 1
            _rest(looks < LOOKS, give_way)

    return kernel


@functools.cache
def give_way() -> int:
    """The address of what lets another thread have the core."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class Worker(threading.Thread):
    """A thread that waits for jobs in its mailbox; `wake` is free once for each time it sleeps."""

    def __init__(self, number: int) -> None:
        super().__init__(name=f"fastq-{number}", daemon=True)
        self.memory = np.zeros(2 * MAILBOX_FIELDS, np.int64)
        first = -self.memory.ctypes.data % (8 * MAILBOX_FIELDS) // 8
        self.mailbox = self.memory[first : first + MAILBOX_FIELDS]
        self.address = self.mailbox.ctypes.data
        self.wake = threading.Lock()
        self.wake.acquire()
        self.leaves = False

    def run(self) -> None:
        block = struct.pack("2q", self.address, give_way())
        while not self.leaves:
            worker_kernel().entry(block)
            self.wake.acquire()


class Team:
    """The workers of this process, and how many threads a call may use."""

    def __init__(self) -> None:
        self.threads = int(numba.config.NUMBA_NUM_THREADS)
        self.forget()

    def forget(self) -> None:
        """Begin anew: a forked child has no threads but its own."""
        self.workers: list[Worker] = []
        self.idle: list[Worker] = []
        self.hiring = threading.Lock()
        self.closed = False

    def take(self, count: int, taken: list[Worker]) -> None:
        """Adds up to so many workers, awake, to those that a call has. It gives them back."""
        if self.closed:
            return
        with contextlib.suppress(IndexError):
            while len(taken) < count:
                taken.append(self.idle.pop())
        if len(taken) < count and len(self.workers) < MOST_WORKERS:
            self.hire(count, taken)
        for worker in taken:
            if worker.mailbox[WORD] == ASLEEP:
                worker.mailbox[WORD] = IDLE
                worker.wake.release()

    def give_back(self, taken: list[Worker]) -> None:
        """A call needs them no more; the next one takes them in the same order."""
        self.idle += reversed(taken)

    def hire(self, count: int, taken: list[Worker]) -> None:
        """Adds new workers, up to a thread for each core; none where no thread can be had."""
        worker_kernel()  # compiled before anyone waits for it
        if not self.hiring.acquire(blocking=False):  # a signal's handler may be the second
            return
        try:
            while len(taken) < count and len(self.workers) < MOST_WORKERS:
                worker = Worker(len(self.workers) + 1)
                worker.start()
                self.workers.append(worker)
                taken.append(worker)
        except RuntimeError:  # no more threads
            pass
        finally:
            self.hiring.release()

    def dismiss(self) -> None:
        """Let all workers end before the interpreter does, and wait for them."""
        self.closed = True
        workers, self.workers, self.idle = self.workers, [], []
        for worker in workers:
            worker.leaves = True
            worker.mailbox[WORD] = ASLEEP  # at its next look, however long others keep the core
            with contextlib.suppress(RuntimeError):  # it was just woken
                worker.wake.release()
        for worker in workers:
            worker.join(1.0)


MOST_WORKERS = int(numba.config.NUMBA_NUM_THREADS) - 1
team = Team()
atexit.register(team.dismiss)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.forget)
