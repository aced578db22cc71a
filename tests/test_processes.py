"""Calibration in several processes equals that in one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastq
from fastq import QConfig
from fastq.observer import OBSERVERS, make_observer
from fastq.remedies import side_by_side

PROCESSES = 2
EXACT = sorted(name for name in OBSERVERS if name != "moving_average")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    ).eval()


class Uncapturable(nn.Module):
    """torch.export cannot follow it: int8 layers in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) < 1e9 else x


def batches(*shape: int) -> list[Tensor]:
    """The later, the wider: a part of them has another range than all."""
    torch.manual_seed(1)
    return [(i + 1) * torch.randn(8, *shape) for i in range(6)]


def quantized(kind: str, rank: int | None = None) -> nn.Module:
    """The network, calibrated on a process's part of the data, or by one process on all."""
    side_by_side.SAMPLE_BYTES = 1  # one batch, which the first process has
    parts = {None: slice(None), 0: slice(0, 4), 1: slice(4, 6)}
    named: dict[str, Any] = {"distributed": rank is not None, "progress": False}
    if kind == "uncapturable":
        torch.manual_seed(2)
        return fastq.quantize_model(Uncapturable(), batches(6)[parts[rank]], **named)
    data = batches(3, 6, 6)[parts[rank]]
    if kind == "max_drop":  # each process has another opinion, and the first one's counts
        scores = iter([1.0, 0.5, 0.7, 0.8, 0.9, 0.99] if not rank else [0.0] * 6)
        named |= {"evaluate": lambda model: next(scores), "max_drop": 0.05}
    elif kind == "training":
        return fastq.prepare_qat(network(), data, **named)
    else:
        named["config"] = QConfig(observer=kind)
    return fastq.quantize_model(network(), data, **named)


def calibrate(rank: int, folder: str, kinds: list[str]) -> None:
    """One process of several; it writes its networks."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", meet, rank=rank, world_size=PROCESSES)
    for kind in kinds:
        state = quantized(kind, rank).state_dict()
        (Path(folder) / f"{kind}{rank}").write_bytes(pickle.dumps(state))
    torch.distributed.barrier()
    os._exit(0)  # all is written; torch's threads may abort a process that ends by itself


@pytest.mark.filterwarnings("ignore:quantize_model.*not one network")
def test_all_processes_get_the_network_of_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        side_by_side, "SAMPLE_BYTES", side_by_side.SAMPLE_BYTES
    )  # put back at the end
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: float sums depend on it
    kinds = [*EXACT, "max_drop", "uncapturable", "training"]
    torch.multiprocessing.spawn(calibrate, (str(tmp_path), kinds), PROCESSES)  # type: ignore[no-untyped-call]
    for kind in kinds:
        want = quantized(kind).state_dict()
        for rank in range(PROCESSES):
            got = pickle.loads((tmp_path / f"{kind}{rank}").read_bytes())
            assert got.keys() == want.keys()
            for name, value in want.items():
                assert torch.equal(got[name], value), (kind, name)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_an_observer_is_pickled(rng: Any, name: str) -> None:
    first, second = (rng.normal(size=1000).astype(np.float32) for _ in range(2))
    kept, sent = make_observer(name), make_observer(name)
    kept.update(first)
    sent.update(first)
    data = pickle.dumps(sent)
    assert len(data) < 50_000
    sent = pickle.loads(data)
    for observer in (kept, sent):
        observer.update(second)
    assert sent.qparams() == kept.qparams() and sent.count == kept.count


def test_what_cannot_calibrate_together() -> None:
    with pytest.raises(RuntimeError, match="init_process_group was not called"):
        fastq.quantize_model(network(), batches(3, 6, 6), distributed=True)
