"""`pytest benchmarks/bench_elementwise.py`: quantize and friends, within the caches and beyond."""

from benchmarks.conftest import TimeRow, rows
from benchmarks.peers import Peer
from benchmarks.shapes import ELEMENTWISE, Shape


@rows(ELEMENTWISE)
def test_elementwise(shape: Shape, peer: Peer, time_row: TimeRow) -> None:
    time_row(shape, peer)
