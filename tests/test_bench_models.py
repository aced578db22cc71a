"""The benchmark of whole networks, on tiny ones. No time is asserted."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastq
from fastq import commands
from fastq.kernels import isa, peak
from fastq.plan import BoundProgram

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not an installed package

from benchmarks import measure, model_peers, models, networks, readme_table
from benchmarks.accuracy import Result

TINY = networks.Network(lambda: networks.UNet(4, 1), 8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.NETWORKS, "tiny", TINY)
    monkeypatch.setattr(peak, "compute_peak", lambda threads: 100.0)
    monkeypatch.setattr(peak, "measure_again", lambda threads: None)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def subject(tmp_path: Path) -> model_peers.Subject:
    return model_peers.Subject("tiny", TINY, tmp_path, networks.images(TINY, 2, 0))


def test_networks_are_the_same_at_each_build() -> None:
    state = torch.random.get_rng_state()
    one, two = (networks.build(TINY).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_values_keep_the_range_of_a_trained_network() -> None:
    model, x = networks.build(TINY), networks.images(TINY, 16, 9)
    assert not model.training
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y}))
    model(x)
    assert len(seen) == 6
    for name, y in seen.items():
        assert 0.5 < y.std() < 2, name


def test_a_head_of_zeros_is_started_anew() -> None:
    def head() -> nn.Module:
        layer = nn.Linear(3, 2)
        nn.init.zeros_(layer.weight)
        return nn.Sequential(layer)

    assert networks.build(networks.Network(head)).state_dict()["0.weight"].all()


def test_multiply_adds_of_a_unet() -> None:
    pixels = 64
    convolutions = 9 * pixels * (3 * 4 + 4 * 4 + 8 * 4 + 4 * 4) + 9 * 16 * (4 * 8 + 8 * 8)
    others = 16 * 8 * 4 * 4 + pixels * 4 * 2  # transposed, and the last
    model = networks.build(TINY)
    assert networks.macs(model, networks.images(TINY, 1, 0)) == convolutions + others


def test_the_profile_counts_the_same_multiply_adds(subject: model_peers.Subject) -> None:
    """A transposed convolution's, without the zeros between its pixels, among them."""
    found = fastq.profile(subject.quantized, subject.images[:1], passes=1)
    assert sum(step.macs for step in found.steps) == subject.macs


def test_attention_is_counted() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    products = 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert networks.macs(attention, torch.randn(1, 5, 8)) == products


def test_decibels() -> None:
    want = np.array([3.0, 4.0])
    assert models.decibels(want, 1.1 * want) == pytest.approx(20)
    assert models.decibels(want, want) == np.inf
    with pytest.raises(AssertionError, match="answer"):
        models.decibels(want, want[:1])


def test_a_file_is_written_once(subject: model_peers.Subject) -> None:
    written = []

    def write(path: Path) -> None:
        written.append(path)
        path.write_text("model")

    assert subject.file("float32", write) == subject.file("float32", write)
    assert len(written) == 1 and Path(subject.file("float32", write)).read_text() == "model"


def test_wrong_answers_are_found(
    subject: model_peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = subject.quantized(subject.x).numpy()
    models.check(subject, got)
    with pytest.raises(AssertionError, match="image 1 alone"):
        models.check(subject, got + np.array([0, 1e-6]).reshape(2, 1, 1, 1))
    program = type(subject.quantized.program)
    reference = program.reference
    monkeypatch.setattr(program, "reference", lambda *x: [y + 1 for y in reference(*x)])
    with pytest.raises(AssertionError, match=r"differs from fastq\.reference"):
        models.check(subject, got)
    (row,) = models.measure(subject, 1, 1e-3, "fastq")
    assert row.failed and row.check.startswith("WRONG")


def test_a_wrong_answer_of_another_tier_is_found(
    subject: model_peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, run = subject.quantized(subject.x).numpy(), BoundProgram.__call__

    def altered(bound: Any, *inputs: Any) -> Any:
        return [y + (isa.current() == "generic") for y in run(bound, *inputs)]

    monkeypatch.setattr(BoundProgram, "__call__", altered)
    with pytest.raises(AssertionError, match=r"differs from fastq\.reference on generic"):
        models.check(subject, got)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    options = [
        "--in-process", "--filter", "tiny", "--threads", "1", "--batch", "1", "--batch", "2",
        "--peer", "^fastq$|torch float32", "--seconds", "0.001", "--csv", str(path),
        "--plot", str(tmp_path / "rows.png"),
    ]  # fmt: skip
    result = CliRunner().invoke(commands.cli, ["bench", "--models", *options])
    assert result.exit_code == 0, result.output
    with path.open() as file:
        records = list(csv.DictReader(file))
    assert [(r["batch"], r["peer"]) for r in records] == [
        ("1", "fastq"), ("1", "torch float32"), ("2", "fastq"), ("2", "torch float32"),
    ]  # fmt: skip
    rows = measure.read_csv(path, models.ModelRow)
    assert [row.macs for row in rows] == [rows[0].macs] * 2 + [2 * rows[0].macs] * 2
    for row in rows:
        assert row.median >= row.best > 0 and row.cpu and "numba" in row.versions
        assert row.share == pytest.approx(row.gops / 100, rel=1e-4)
    ours = [row for row in rows if row.ours]
    for row in ours:
        assert row.check == "exact" and row.snr > 20
        assert min(row.arena, row.panels, row.weights, row.planning, row.quantize) > 0
        assert row.over_int8 != row.over_int8 and row.over_float > 0
    assert ours[1].arena > ours[0].arena and ours[1].weights == ours[0].weights
    assert (tmp_path / "rows.png").stat().st_size > 1000
    text = readme_table.models_table(rows)
    assert text.count("| tiny |") == 2 and f"**{ours[0].median:.3g}**" in text


def test_the_command_says_what_there_is() -> None:
    runner = CliRunner()
    result = runner.invoke(commands.cli, ["bench", "--models", "--filter", "alexnet"])
    assert result.exit_code == 2 and "resnet18" in result.output
    result = runner.invoke(commands.cli, ["bench", "--models", "--peer", "nobody"])
    assert result.exit_code == 2 and "nobody" in result.output


def test_the_accuracy_table_says_what_each_method_keeps():
    rows = [
        Result("lenet", "fastq none", "top-1 %", 98.5, 98.4, 99.9, 31.25, 1.0),
        Result("lenet", readme_table.BY_DEFAULT, "top-1 %", 98.5, 98.4, 99.9, 33.0, 1.0),
        Result("words", "ONNX Runtime MinMax", "Spearman", 80.1, 81.2, float("nan"), 20.0, 1.0),
    ]
    *_, first, default, second = readme_table.accuracy_table(rows).splitlines()
    assert first == "| lenet | fastq none | top-1 % | 98.50 | 98.40 | 99.90 % | 31.2 dB |"
    assert default == "| lenet | **fastq** | top-1 % | 98.50 | 98.40 | 99.90 % | 33.0 dB |"
    assert second == "| words | ONNX Runtime MinMax | Spearman | 80.10 | 81.20 | - | 20.0 dB |"
