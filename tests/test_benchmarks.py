"""The benchmarks' own arithmetic, and the commands that start them. No time is asserted."""

import csv
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import fastq
from fastq import commands
from fastq.kernels import isa as isa_room
from fastq.kernels import peak
from fastq.kernels.tiles import (
    Work,
    choose_nr,
    choose_product_tile,
    choose_tile,
    only,
    product_tiles,
    tiles_of,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not an installed package

from benchmarks import measure, tiles


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits from a moment's measurement; what the command sets is put back."""
    monkeypatch.setattr(peak, "_best_gops", {})
    monkeypatch.setattr(peak, "SECONDS", 1e-5)
    monkeypatch.setattr(peak, "REPEATS", 4)
    monkeypatch.setattr(peak, "read_bandwidth", lambda size, threads: 10.0)
    for name in "OMP_NUM_THREADS", "MKL_NUM_THREADS":
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "path", [*sys.path])


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(commands.cli, ["bench", *arguments])


def row(suite: str, shape: str, peer: str, ratio: float) -> measure.Row:
    return measure.Row(suite, shape, 1, peer, "exact", 1, 1000, 100, median=1.0, ratio=ratio)


def test_a_suite_in_one_line() -> None:
    rows = [row("a", f"a/{i}", "fastq", 2.0**i) for i in (3, -1, 1)]
    rows += [row("a", "a/3", "fastq int32", 0.001), row("a", "a/3", "torch onednn", 1.0)]
    rows += [row("b", "a/3", "fastq", 0.25), row("b", "b/0", "fastq", float("nan"))]
    a, b = measure.summaries(rows)
    assert (a.suite, a.mean, a.slower, a.shapes) == ("a", pytest.approx(2.0), 1, 3)
    assert [worst.ratio for worst in a.worst] == [0.5, 2.0, 8.0]
    assert (b.suite, b.mean, b.slower, b.shapes) == ("b", 0.25, 1, 1)
    assert str(a).startswith("a: 2.00x the best peer of each shape, geometric mean; 1 of 3")


def test_a_slow_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, {"slow": 0, "fast": 0}

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        calls[name] += 1

    monkeypatch.setattr("time.perf_counter", lambda: now)
    runs = {"slow": lambda: call("slow", 0.02), "fast": lambda: call("fast", 1e-6)}
    samples = measure.interleave(runs, 1e-3)
    assert calls["slow"] == len(samples["slow"]) == 1
    assert len(samples["fast"]) == pytest.approx(1000, abs=measure.ROUNDS)
    assert calls["fast"] == pytest.approx(1200, abs=3 * measure.ROUNDS)


@pytest.mark.usefixtures("quick")
def test_the_command_for_kernels(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    result = invoke(
        "--kernels", "--suite", "gemm", "--suite", "depthwise", "--filter", "1x1x1$|7x7x576",
        "--peer", "^fastq", "--seconds", "0.001", "--csv", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["suite"] for row in rows} == {"gemm", "depthwise"}
    for wanted in rows:
        assert wanted["check"] == "exact" and wanted["isa"] == isa_room.current()
        assert float(wanted["median"]) >= float(wanted["best"]) > 0
        assert "numba" in wanted["versions"] and wanted["cpu"]


@pytest.mark.usefixtures("quick")
def test_the_command_for_tiles(tmp_path: Path) -> None:
    path = tmp_path / "tiles.csv"
    result = invoke("--tiles", "--filter", "1x1x1$", "--seconds", "0.001", "--csv", str(path))
    assert result.exit_code == 0, result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    current = isa_room.current()
    assert [row["tile"] for row in rows] == [str(tile) for tile in product_tiles(current)]
    (chosen,) = (row["tile"] for row in rows if row["chosen"] == "True")
    assert chosen == str(choose_tile(current, choose_nr(current, 1), 1, 1))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", ["--kernels", "--models", "--tiles"])
def test_a_wrong_option_is_refused_before_the_measuring(what: str, tmp_path: Path) -> None:
    path = tmp_path / "none" / "rows.csv"
    for given, wanted in {
        ("--filter", "("): "'(' is no regular expression: missing )",
        ("--csv", str(path)): f"there is no folder {path.parent}",
        ("--csv", str(tmp_path)): "is a directory",
    }.items():
        result = invoke(what, *given)
        assert result.exit_code == 2 and given[0] in result.output
        assert wanted in " ".join(result.output.split())


def test_a_loss_is_over_the_best_tile() -> None:
    tall, wide = tiles_of("avx2")[:2]
    found = tiles.Choice("shape", {tall: 3.0, wide: 2.0}, tall)
    assert found.best == wide and found.loss == 1.5


def test_a_tile_is_offered_alone() -> None:
    before = tiles_of("avx2"), tiles_of("avx2", "depthwise"), tiles_of("generic")
    for tile in before[0]:
        with only(tile):
            assert tiles_of("avx2") == (tile,)
            assert choose_tile("avx2", choose_nr("avx2", 100), 100, 8) == tile
            assert (tiles_of("avx2", "depthwise"), tiles_of("generic")) == before[1:]
    assert tiles_of("avx2") == before[0]
    for tile in product_tiles("amx_int8"):  # of vectors or matrices, whatever the shape
        with only(tile):
            assert choose_nr("amx_int8", 100, 1) == tile.nr
            assert choose_product_tile("amx_int8", tile.nr, Work(3, 1, 1, 64)) == tile
            assert tiles_of("amx_int8")  # for what is no layer


@pytest.mark.parametrize("isa", [row.name for row in isa_room.ISAS])
def test_the_choice_of_a_tile_is_sensible(isa: str) -> None:
    """Many rows take a tall tile; one row never takes a tile that computes the most for it."""
    for nr in {tile.nr for tile in tiles_of(isa)}:
        tall = max((t for t in tiles_of(isa) if t.nr == nr), key=lambda t: t.mr)
        low = min((t for t in tiles_of(isa) if t.nr == nr), key=lambda t: t.mr)
        assert choose_tile(isa, nr, 100 * tall.mr, 1000) == tall
        assert choose_tile(isa, nr, 1, 1000) == low


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = invoke("--suite", "gemm")
    assert result.exit_code == 2 and "fastq bench --kernels" in result.output
    result = invoke("--kernels", "--models")
    assert result.exit_code == 2 and "got --kernels and --models; wanted one" in result.output
    for given in ("--help",), ("-h",), ("--suite", "gemm", "-h"):
        result = invoke(*given)
        assert result.exit_code == 0 and "--accuracy" in result.output
    assert "--filter" in invoke("--kernels", "--help").output
    monkeypatch.setattr(fastq, "__file__", str(tmp_path / "site-packages/fastq/__init__.py"))
    result = invoke("--kernels")
    assert result.exit_code == 1 and "in a clone of its repository" in result.output
