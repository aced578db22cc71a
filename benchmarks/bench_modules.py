"""`pytest benchmarks/bench_modules.py`: linear layers, float32 in and out."""

from benchmarks.conftest import TimeRow, rows
from benchmarks.peers import Peer
from benchmarks.shapes import MODULES, Shape


@rows(MODULES)
def test_modules(shape: Shape, peer: Peer, time_row: TimeRow) -> None:
    time_row(shape, peer)
