"""`pytest benchmarks/bench_gemm.py`: the two GEMMs of issue 2."""

from benchmarks.conftest import TimeRow, rows
from benchmarks.peers import Peer
from benchmarks.shapes import ISSUE2_GEMM, Shape


@rows(ISSUE2_GEMM)
def test_gemm(shape: Shape, peer: Peer, time_row: TimeRow) -> None:
    time_row(shape, peer)
