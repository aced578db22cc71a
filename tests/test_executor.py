"""Threads, forks, nested parallel regions: right answers, and no process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from numba import cfunc
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from fastq import ops, reference
from fastq.kernels import executor, workers
from fastq.kernels.call import Call, Slots
from fastq.kernels.scalar import pointer
from fastq.kernels.signature import SIGNATURE
from fastq.qparams import Dequant
from fastq.weights import Conv2dWeight, LinearWeight

# What each process below runs: a product large enough for the parallel path, checked.
WORK = """
import numpy as np, threading, os, sys
from fastq import ops, reference
from fastq.weights import LinearWeight
rng = np.random.default_rng(0)
x = rng.integers(0, 256, (200, 300), dtype=np.uint8)
weight = LinearWeight(rng.integers(-128, 128, (300, 300), dtype=np.int8))
want = reference.linear(x, weight)

def work(times=20):
    for _ in range(times):
        assert np.array_equal(ops.linear(x, weight), want)
"""

THREADS = """
errors = []
def guarded():
    try:
        work()
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=guarded) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not errors, errors
"""

FORK = """
work()
pid = os.fork()
if pid == 0:
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
work()
"""

FORK_FIRST = """
pids = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            work(5)
            os._exit(0)
        except BaseException:
            os._exit(1)
    pids.append(pid)
work()
assert not any(os.waitpid(pid, 0)[1] for pid in pids)
"""

FORK_WHILE_BUSY = """
work(1)  # compiled: a fork in the middle of that would inherit the compiler's lock
stop = threading.Event()
def busy():
    while not stop.is_set():
        work(1)
threads = [threading.Thread(target=busy) for _ in range(2)]
[t.start() for t in threads]
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        work(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
[t.join() for t in threads]
"""

SET_NUM_THREADS = """
from fastq.kernels.workers import team
most = ops.get_num_threads()
ops.set_num_threads(1)
work()
assert not team.workers  # one thread needs no other
errors, stop = [], threading.Event()
def guarded():
    try:
        while not stop.is_set():
            work(1)
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=guarded) for _ in range(4)]
[t.start() for t in threads]
for i in range(200):
    ops.set_num_threads(1 + i % most)
    work(1)
stop.set()
[t.join() for t in threads]
assert not errors, errors
assert ops.get_num_threads() == 1 + 199 % most
assert len(team.workers) == most - 1 and len(team.idle) == most - 1
"""

NESTED = """
import numba
@numba.njit(parallel=True)
def outer(n):
    for i in numba.prange(n):
        with numba.objmode():
            work(3)
outer(8)
"""

DATALOADER = """
import torch, fastq
class Squares(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        work(2)
        return i
work(1)
loader = torch.utils.data.DataLoader(Squares(), num_workers=2, multiprocessing_context="fork")
assert sorted(int(i) for i in loader) == list(range(8))
"""

WORKERS = """
import time
from fastq.kernels.workers import ASLEEP, WORD, team
ops.set_num_threads(2)
work(1)
(worker,) = team.workers
assert team.idle == [worker]
for _ in range(3):  # it falls asleep, and is woken
    deadline = time.monotonic() + 60
    while worker.mailbox[WORD] != ASLEEP:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    work(1)
taken = []
team.take(5, taken)  # another call has it: this one runs alone
assert taken == [worker] and not team.idle
work(1)
team.give_back(taken)
assert team.idle == [worker]
with team.hiring:  # a signal's handler calls in the middle of it
    team.idle.clear()
    team.workers.clear()
    work(1)
    assert not team.workers
team.workers.append(worker)
work(1)  # it is awake
team.dismiss()
worker.join(60)
assert not worker.is_alive()
work(1)  # at the end of the interpreter: alone
assert not team.workers
"""

CHILDREN = """
from fastq.kernels.workers import team
ops.set_num_threads(2)
work(1)
pid = os.fork()
if pid == 0:
    try:
        assert not team.workers
        work(5)
        os._exit(0 if len(team.workers) == len(team.idle) == 1 else 2)
    except BaseException:
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
"""


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORK + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this CPU lacks fork: it runs Windows")
@pytest.mark.parametrize(
    "case",
    [
        "THREADS", "SET_NUM_THREADS", "FORK", "FORK_FIRST", "FORK_WHILE_BUSY", "NESTED",
        "DATALOADER", "WORKERS", "CHILDREN",
    ],
)  # fmt: skip
def test_threads_and_forks(case: str) -> None:
    """Right answers, and the process ends by itself; with a second thread on a single core too."""
    run(globals()[case], NUMBA_NUM_THREADS=str(max(2, numba.config.NUMBA_NUM_THREADS)))


def test_threads_share_a_layer(rng: Any) -> None:
    """Four threads, three shapes each, one weight: calls and workspaces do not mix."""
    weight = LinearWeight(rng.integers(-128, 128, (40, 50)).astype(np.int8))
    conv = Conv2dWeight(rng.integers(-128, 128, (8, 5, 3, 3)).astype(np.int8), padding=1)
    last = Dequant(0.01)
    jobs = []
    for m in (1, 7, 64):
        x = rng.normal(size=(m, 50)).astype(np.float32)
        jobs.append((ops.linear_float, x, weight, reference.linear_float(x, weight, last)))
        image = rng.normal(size=(1, m, 9, 5)).astype(np.float32)
        jobs.append((ops.conv2d_float, image, conv, reference.conv2d_float(image, conv, last)))
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for i in range(60):
                function, x, w, want = jobs[(i + offset) % len(jobs)]
                assert_array_equal(function(x, w, last), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_share_more_shapes_than_are_kept(rng: Any) -> None:
    weight = LinearWeight(rng.integers(-128, 128, (8, 8)).astype(np.int8))
    xs = [rng.integers(0, 256, (m, 8)).astype(np.uint8) for m in range(1, 40)]
    wants = [reference.linear(x, weight) for x in xs]

    def work(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, len(xs), 200)
        return all(np.array_equal(ops.linear(xs[i], weight), wants[i]) for i in order)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(12)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tasks_are_shared_among_as_many_threads_as_set(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task once, in a few ranges of each thread's part, whatever the number of tasks."""
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this CPU lacks a third core")

    @cfunc(SIGNATURE)
    def write(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            args[2 * task] += 1
            args[2 * task + 1] = begin

    monkeypatch.setattr(workers.team, "threads", threads)
    for tasks in (1, 2, 5, 64):
        found = np.zeros((tasks, 2), np.int64)
        row = np.array([(write.address, found.ctypes.data, tasks, tasks)], np.int64)
        executor.run(executor.Table(row, np.zeros((0, 3), np.int64), 0, 1e9), ())
        assert (found[:, 0] == 1).all()
        parts = min(threads, tasks)
        begins = set()
        for part in range(parts):
            first, last = tasks * part // parts, tasks * (part + 1) // parts
            claims = workers.CLAIMS if parts > 1 else 1
            begins |= set(range(first, last, -(-(last - first) // claims)))
        assert set(found[:, 1].tolist()) == begins


def test_a_thread_that_comes_late_or_never_is_not_missed() -> None:
    """One walks the whole table alone; another that comes after it finds nothing to do."""

    @cfunc(SIGNATURE)
    def count(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            args[task] += 1

    sizes = (5, 0, 1, 100)
    found = [np.zeros(max(size, 1), np.int64) for size in sizes]
    rows = np.array(
        [(count.address, f.ctypes.data, n, n) for f, n in zip(found, sizes, strict=True)], np.int64
    )
    progress = np.zeros((3, 8), np.int64)
    for me in range(2):
        workers.take_part(
            rows.ctypes.data, len(rows), progress.ctypes.data, 64, 2, me, workers.give_way()
        )
        for f, n in zip(found, sizes, strict=True):
            assert f.tolist() == [1] * n if n else f.tolist() == [0]
    assert progress[2, : len(sizes)].tolist() == list(sizes)


def test_slots_of_all_rows_lie_at_one_place() -> None:
    """Else one core would write what another one has in its cache."""

    @cfunc(SIGNATURE)
    def tell(args, begin, end):  # type: ignore[no-untyped-def]
        found = pointer(args[0], "s64")
        found[0], found[1] = args[1], args[2]

    class Told(NamedTuple):
        address: int

    def row(size: int, tasks: int) -> NDArray[np.int64]:
        found = np.zeros(2, np.int64)
        call.row(Told(tell.address), 3, tasks, {}, {0: found, 1: Slots(size)})
        return found

    call = Call(0)
    call.scratch(100)
    first = row(500, 2)
    call.run()
    assert first[1] == 512
    assert call.scratch_bytes == 128 + 2 * 512
    with call.borrowed_scratch():
        call.scratch(1000)
        second, third = row(640, 1), row(64, 3)
    call.run()
    assert first.tolist() == second.tolist() == third.tolist()
    assert first[1] == 640
    assert call.scratch_bytes == 128 + 1024 + 3 * 640


def test_a_job_is_revoked_where_no_worker_came(monkeypatch: pytest.MonkeyPatch) -> None:
    @cfunc(SIGNATURE)
    def count(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            args[task] += 1

    absent, asleep = (workers.Worker(i) for i in (1, 2))  # never started
    monkeypatch.setattr(workers.team, "threads", 3)
    monkeypatch.setattr(workers, "MOST_WORKERS", 2)
    monkeypatch.setattr(executor, "MOST_WORKERS", 2)
    monkeypatch.setattr(workers.team, "workers", [absent, asleep])
    monkeypatch.setattr(workers.team, "take", lambda count, taken: taken.extend([absent, asleep]))
    monkeypatch.setattr(workers.team, "idle", [])
    asleep.mailbox[workers.WORD] = workers.ASLEEP  # just now
    found = np.zeros(50, np.int64)
    row = np.array([(count.address, found.ctypes.data, 50, 50)], np.int64)
    executor.run(executor.Table(row, np.zeros((0, 3), np.int64), 0, 1e9), ())
    assert (found == 1).all()
    assert absent.mailbox[workers.WORD] == workers.IDLE
    assert asleep.mailbox[workers.WORD] == workers.ASLEEP
    assert workers.team.idle == [asleep, absent]


def test_set_num_threads() -> None:
    most = ops.get_num_threads()
    try:
        ops.set_num_threads(1)
        assert ops.get_num_threads() == 1
    finally:
        ops.set_num_threads(most)
    for wrong in (0, -1, most + 1000, 1.5, "2"):
        with pytest.raises(ValueError, match="wanted an int from 1"):
            ops.set_num_threads(wrong)  # type: ignore[arg-type]
