"""`pytest benchmarks/bench_gemm.py`: the two GEMMs of the goals."""

from benchmarks.conftest import TimeRow, rows
from benchmarks.peers import Peer
from benchmarks.shapes import GOAL_GEMM, Shape


@rows(GOAL_GEMM)
def test_gemm(shape: Shape, peer: Peer, time_row: TimeRow) -> None:
    time_row(shape, peer)
