"""For `pytest benchmarks/bench_*.py`: pytest-benchmark on the goals' shapes, checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from benchmarks.measure import use_threads
from benchmarks.peers import Peer, check, peers_of, problem_of
from benchmarks.shapes import Shape

# a test of one row: `time_row(shape, peer)`
TimeRow = Callable[[Shape, Peer], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of every peer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("bench_"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # the peers' own warnings


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    count: int = request.config.getoption("--threads")
    with use_threads(count):
        yield count


@pytest.fixture
def time_row(benchmark: Any, threads: int) -> TimeRow:
    """Build, check against fastq.reference, time; a peer that is absent or refuses is skipped."""

    def run(shape: Shape, peer: Peer) -> None:
        problem = problem_of(shape)
        benchmark.group = shape.name
        try:
            built = peer.build(problem, threads)
        except Exception as error:
            if peer.name.startswith("fastq"):
                raise
            pytest.skip(f"{peer.name} on {shape.name}: {error}")
        benchmark.extra_info["check"] = check(peer, problem, built, threads)
        benchmark.extra_info["macs"] = shape.macs
        benchmark(built[0])

    return run


def rows(shapes: Sequence[Shape]) -> pytest.MarkDecorator:
    """Parametrize a test over every peer of every shape."""
    pairs = [(shape, peer) for shape in shapes for peer in peers_of(shape)]
    ids = [f"{shape.name}-{peer.name.replace(' ', '_')}" for shape, peer in pairs]
    return pytest.mark.parametrize(("shape", "peer"), pairs, ids=ids)
