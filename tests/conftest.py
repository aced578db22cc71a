"""Fixtures: each instruction set, loud skips for those that the CPU lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch

from fastq import ops
from fastq.kernels import executor
from fastq.kernels import isa as isa_room


def host_isas() -> list[object]:
    """All tiers as parameters; one that cannot run here is skipped with its reason."""
    rows = []
    for row in isa_room.ISAS:
        lacking = isa_room.missing(row)
        reason = f"this CPU lacks {', '.join(lacking)}"
        marks = [pytest.mark.skip(reason=reason)] if lacking else []
        rows.append(pytest.param(row.name, id=row.name, marks=marks))
    return rows


@pytest.fixture(params=host_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set of this machine, and for the emulated ones."""
    with isa_room.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws from torch is the same in every run, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name: a test's data do not depend on the order of the tests."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture(params=["u8", "u8x2"])
def kind(request: pytest.FixtureRequest) -> str:
    """How activations are held in memory."""
    return str(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Runs the test on one thread and on two, each row in parallel where it can be."""
    monkeypatch.setattr(executor, "PARALLEL_NANOSECONDS", 0.0)
    monkeypatch.setattr(executor, "PARALLEL_ROW_NANOSECONDS", 0.0)
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this CPU lacks a second core")
    before = ops.get_num_threads()
    ops.set_num_threads(request.param)
    yield request.param
    ops.set_num_threads(before)


def pytest_report_header() -> str:
    forced = os.environ.get("FASTQ_ISA", "not set")
    return f"fastq: FASTQ_ISA {forced}, runnable: {', '.join(isa_room.runnable())}"
