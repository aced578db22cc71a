"""`pytest benchmarks/bench_conv.py`: ResNet-50's convolutions."""

from benchmarks.conftest import TimeRow, rows
from benchmarks.peers import Peer
from benchmarks.shapes import NETWORKS, Shape


@rows(NETWORKS["resnet50"])
def test_conv(shape: Shape, peer: Peer, time_row: TimeRow) -> None:
    time_row(shape, peer)
