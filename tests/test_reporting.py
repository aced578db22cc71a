"""The report of a quantized network: its numbers, its page, its command."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastq
from fastq import commands, demo, fidelity, page
from fastq.kernels import executor
from fastq.profiling import memory

VOID = {"meta", "wbr", "rect", "path"}


class Tiny(nn.Module):
    """A residual network with a layer of an awkward name, and an operator without integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.add_module("<b>|x", nn.Conv2d(8, 8, 3, padding=1))
        self.last = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + getattr(self, "<b>|x")(x)
        x = torch.erfinv((x / 8).clamp(-0.9, 0.9))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(3)
    network = Tiny().eval()
    images = torch.randn(40, 3, 8, 8)
    return network, fastq.quantize_model(network, images[:16], progress=False), images[16:]


LABELS = torch.arange(24) % 4


@pytest.fixture(scope="module")
def result(networks, tmp_path_factory):
    network, int8, images = networks
    path = tmp_path_factory.mktemp("report") / "tiny.html"
    found = fastq.report(
        network, int8, images.split(7), labels=LABELS, evaluate=lambda m: m(images).sum().item(),
        path=path, batch_sizes=(1, 3), passes=1, progress=False,
    )  # fmt: skip
    return found, path


def decibels(real, made):
    real, made = real.double(), made.double()
    return 10 * math.log10(real.square().sum() / (made - real).square().sum())


def test_numbers_are_those_of_the_networks(networks, result):
    network, int8, images = networks
    found, _ = result
    with torch.no_grad():
        a, b = network(images), int8(images)
    assert found.samples == 24
    assert found.snr == pytest.approx([decibels(a, b)], abs=1e-3)
    assert found.agreement == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    assert found.scores["top-1 accuracy"] == pytest.approx(
        [float((y.argmax(1) == LABELS).double().mean()) for y in (a, b)]
    )
    assert found.scores["score"] == pytest.approx((a.sum().item(), b.sum().item()), rel=1e-5)
    assert set(found.latency) == {1, 3}
    ours = memory(int8, images[:3])
    assert found.memory["parameters"][1] == ours.weights
    assert found.memory["values at once, batch 3"][1] == ours.arena + ours.floats
    assert found.summary is fastq.summary(int8)


def test_float_memory_is_what_waits_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2)).eval()
    int8 = fastq.quantize_model(model, torch.randn(8, 4), progress=False)
    x = torch.randn(6, 4)
    found = fastq.report(model, int8, x, path=None, batch_sizes=(5,), passes=1, progress=False)
    assert found.memory["parameters"][0] == 4 * (4 * 100 + 100 + 100 * 2 + 2)
    assert found.memory["values at once, batch 5"][0] == 4 * 5 * (4 + 100)


def test_steps_are_compared_with_the_float_network(networks, result):
    network, _, images = networks
    found, _ = result
    steps = {step.layer: step for step in found.steps if step.op == "conv2d"}
    assert set(steps) == {"stem", "<b>|x", "last"}
    with torch.no_grad():
        stem = torch.relu(network.norm(network.stem(images)))
    grid = steps["stem"].values
    step, zero_point = np.float64(grid.scale[0]), grid.zero_point
    assert grid.grid == (-zero_point * step, (255 - zero_point) * step)
    assert grid.seen == (0, pytest.approx(stem.max().item(), rel=1e-6))
    assert sum(grid.counts) == stem.numel()
    q = np.rint(stem.double().numpy() / step) + zero_point
    assert grid.clipped == pytest.approx(((q < 0) | (q > 255)).mean(), abs=2 / q.size)
    rounded = torch.from_numpy((q.clip(0, 255) - zero_point) * step)
    assert 20 < steps["stem"].snr < decibels(stem, rounded) + 0.5
    assert not any(step.rescaled for step in found.steps)
    (erfinv,) = [step for step in found.steps if "erfinv" in step.op]
    assert "no integer form" in erfinv.why and erfinv.snr > 15 and erfinv.weights is None


def test_weights_are_in_steps_of_their_scale(networks, result):
    network, _, _ = networks
    (head,) = [step for step in result[0].steps if step.layer == "head"]
    data, scale = fastq.quantize_weight(network.head.weight.detach().numpy())
    assert head.weights.scale == (scale.min(), scale.max())
    assert (head.weights.zero_point, head.weights.clipped) == (0, 0)
    assert head.weights.grid == (-127, 127)
    assert list(head.weights.counts) == pytest.approx(
        np.histogram(
            network.head.weight.detach().numpy() / scale[:, None], fidelity.BINS, (-127, 127)
        )[0]
    )
    assert np.abs(head.weights.seen).max() == pytest.approx(np.abs(data).max(), rel=1e-5)


def test_clipped_weights_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    x = torch.randn(32, 64)
    config = fastq.QConfig(weight_range="mse", weight_bits=3)
    int8 = fastq.quantize_model(model, x, config=config, progress=False)
    found = fastq.report(model, int8, x, path=None, batch_sizes=(1,), passes=1, progress=False)
    (weights,) = [step.weights for step in found.steps if step.weights]
    assert weights.grid == (-3, 3)
    w = model[0].weight.detach().numpy()
    _, scale = fastq.quantize_weight(w, range="mse", bits=3)
    assert weights.clipped == (np.abs(np.rint(w / scale[:, None])) > 3).mean() > 0


def test_channels_that_a_remedy_scaled_are_compared_scaled():
    torch.manual_seed(0)
    real = torch.randn(8, 3, 5, 5)
    factor = torch.tensor([1.0, 0.1, 4.0]).reshape(1, 3, 1, 1)
    noisy = real * factor + 1e-3 * torch.randn_like(real)
    found = fidelity._channel_factor(real, noisy)
    assert found.squeeze() == pytest.approx(factor.squeeze(), rel=1e-2)
    assert fidelity._channel_factor(real, real + 0.2 * torch.randn_like(real)) is None


def test_a_network_with_equalized_channels():
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    spread = torch.logspace(-2, 2, 8)
    with torch.no_grad():
        first.weight *= spread[:, None, None, None]
        first.bias *= spread
        last.weight /= spread[:, None, None]
    model = nn.Sequential(first, nn.ReLU(), last, nn.Flatten(), nn.Linear(128, 4)).eval()
    x = torch.randn(32, 3, 8, 8)
    int8 = fastq.quantize_model(model, x, remedies="cross_layer_equalization", progress=False)
    found = fastq.report(model, int8, x, path=None, batch_sizes=(1,), passes=1, progress=False)
    steps = {step.layer: step for step in found.steps if step.op in ("conv2d", "linear")}
    assert [steps[name].rescaled for name in "024"] == [True, False, False]
    assert min(step.snr for step in steps.values()) > 25


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps tables, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.tables = [], set(), [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID or (tag == "rect" and self.open[-1] == "svg"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def markdown_tables(text):
    tables, inside = [], False
    for line in text.splitlines():
        row = line.startswith("| ")
        if row and not inside:
            tables.append([])
        inside = row
        if row and not re.fullmatch(r"[|: -]+", line):
            cells = re.split(r"(?<!\\) ?\| ?", line)[1:-1]
            tables[-1].append([re.sub(r"\\(.)", r"\1", cell) for cell in cells])
    return tables


def test_page_is_complete_and_well_formed(result):
    found, path = result
    text = path.read_text(encoding="utf-8")
    assert text == found.html()
    parsed = Page(text)
    assert not re.search(r"https?://|//\w|url\(|@import", text)
    assert not parsed.tags & {"script", "link", "img", "iframe", "b", "x"}
    assert not {name for name, _ in parsed.attributes} & {"src", "href", "onload", "onclick"}
    assert "&lt;b&gt;|x" in text
    assert ("lang", "en") in parsed.attributes
    assert len(parsed.tables) == text.count("<caption>") == 4 + text.count("<details>")
    assert text.count("<svg") == text.count('role="img" aria-label=') > 4


def test_markdown_has_the_same_tables(result):
    found, path = result
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == found.markdown() == str(found)
    tables = [
        [[" ".join(cell.split()) for cell in row] for row in table]
        for table in Page(found.html()).tables
    ]
    assert tables == markdown_tables(text)
    steps = next(table for table in tables if table[0][0] == "layer")
    assert len(steps) == 1 + len(found.steps)
    assert ["<b>|x", "conv2d", "int8"] in [row[:3] for row in steps]


def test_text_stays_text():
    hostile = ("<script>a</script>", 'x" onload="y', "a|b", "`c`", "[d](e)", "two\nlines")
    table = page.Table("<i>", "l" * 6, hostile, (hostile,))
    parsed = Page(table.html())
    assert parsed.tags == {"div", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert parsed.tables[0][1] == list(hostile)
    assert len(table.markdown().splitlines()) == 5
    assert "<script>" not in table.markdown().replace("\\<", "")
    assert markdown_tables(table.markdown())[0][1][2] == "a|b"


def test_charts_show_what_they_are_given():
    assert page.sparkline([0, 0.01, 0.5, 1]) == " ▁▅█"
    bars = page.Bars("noise", "dB", ("a", "b", "c", "d"), (10.0, None, math.inf, 40.0))
    assert bars.heights() == [0.25, 0, 1, 1]
    assert page.Bars("exact", "dB", ("a", "b"), (math.inf, -3.0)).heights() == [1, 0]
    assert "`▃ ██`" in bars.markdown() and "40.0 dB" in bars.markdown()
    assert page.Bars("none", "us", (), ()).html().startswith("<figure>")
    chart = page.Histogram("values", (0, 1, 3), -1.0, 2.0, (0.0, 1.0))
    assert chart.heights() == pytest.approx([0, 0.5, 1])
    assert '<rect class="grid" x="1.00" y="0" width="1.00"' in chart.html()


def test_a_program_takes_what_a_float_operator_expanded(tmp_path):
    """Its array may not be written to, of which torch would warn."""

    class Expanded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.start = nn.Linear(4, 4), nn.Parameter(torch.randn(1, 1, 4))

        def forward(self, x):
            return self.linear(torch.cat([self.start.expand(len(x), -1, -1), x], 1))

    model, x = Expanded().eval(), torch.randn(8, 5, 4)
    int8 = fastq.quantize_model(model, x, progress=False)
    found = fastq.report(
        model, int8, x, path=tmp_path / "r.html", batch_sizes=(1,), passes=1, progress=False
    )
    assert found.steps


def test_threads_are_what_they_were(networks, monkeypatch):
    network, int8, images = networks
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        most = executor.get_num_threads()
        found = fastq.report(
            network, int8, images, path=None, batch_sizes=(1,), passes=1, progress=False
        )
        assert found.machine["threads"] == "1"
        assert (torch.get_num_threads(), executor.get_num_threads()) == (1, most)
    finally:
        torch.set_num_threads(before)


def test_forward_dicts_and_training_mode(networks):
    network, int8, images = networks
    network.train()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    found = fastq.report(
        network, int8, [{"image": images[:5]}], forward=lambda m, batch: m(batch["image"]),
        path=None, batch_sizes=(2,), passes=1, progress=False,
    )  # fmt: skip
    assert network.training and found.samples == 5 and found.scores == {}
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    network.eval()


def test_each_batch_may_give_its_arguments_in_another_order():
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x, y):
            return self.a(x) - 3 * self.b(y)

    torch.manual_seed(0)
    model, x, y = Difference().eval(), torch.randn(32, 8), torch.randn(32, 8)
    int8 = fastq.quantize_model(model, {"x": x, "y": y}, progress=False)
    options = {"path": None, "batch_sizes": (1,), "passes": 1, "progress": False}
    one = fastq.report(model, int8, [{"x": x, "y": y}] * 2, **options)
    other = fastq.report(model, int8, [{"x": x, "y": y}, {"y": y, "x": x}], **options)
    assert [step.snr for step in other.steps] == [step.snr for step in one.steps]


def test_a_loaded_network_has_the_same_report(networks, tmp_path):
    network, int8, images = networks
    fastq.save(int8, tmp_path / "tiny.safetensors")
    loaded = fastq.load(tmp_path / "tiny.safetensors")
    options = {"path": None, "batch_sizes": (1,), "passes": 1, "progress": False}
    a, b = (fastq.report(network, m, images, **options) for m in (int8, loaded))
    assert [(s.name, s.snr, s.weights, s.values) for s in a.steps] == [
        (s.name, s.snr, s.weights, s.values) for s in b.steps
    ]
    assert (a.memory, a.summary.rows) == (b.memory, b.summary.rows)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [0] * 3}, ValueError, r"labels \(3,\), predictions \(24,\)"),
        ({"labels": torch.zeros(24)}, TypeError, "labels are torch.float32; wanted the int class"),
        ({"labels": [0] * 23 + [4]}, ValueError, "labels from 0 to 4; wanted 0 to 3"),
        ({"labels": [0] * 23 + [-1]}, ValueError, "labels from -1 to 0; wanted 0 to 3"),
        ({"evaluate": 5}, TypeError, "evaluate: got 5, wanted a function"),
        ({"evaluate": lambda m: None}, TypeError, "evaluate gave None; wanted one number"),
        ({"batch_sizes": ()}, ValueError, "batch_sizes"),
        ({"batch_sizes": 4}, TypeError, "batch_sizes=4, wanted one or more"),
        ({"batch_sizes": (1.5,)}, TypeError, "a size of batch_sizes=1.5, wanted an int of"),
        ({"passes": 0}, ValueError, "passes=0"),
        ({"quantized": nn.Linear(1, 1)}, TypeError, "wanted a fastq.QuantizedModel"),
        ({"float_model": 3}, TypeError, "float_model is a int"),
        ({"path": "x.md"}, ValueError, "wanted a .html"),
        ({"path": "no/x.html"}, FileNotFoundError, "there is no folder no"),
    ],
)
def test_wrong_arguments(networks, change, error, message):
    network, int8, images = networks
    given = {"float_model": network, "quantized": int8, "data": images, "path": None,
             "batch_sizes": (1,), "passes": 1, "progress": False, **change}  # fmt: skip
    with pytest.raises(error, match=message):
        fastq.report(**given)


def test_another_float_model_is_refused(networks):
    _, int8, images = networks
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(288, 4)).eval()
    with pytest.raises(ValueError, match="wanted the one that it was made from"):
        fastq.report(other, int8, images, path=None, progress=False)


def test_command_writes_both_files(networks, monkeypatch, tmp_path):
    network, _, images = networks
    task = demo.Task("Tiny <net>", network, images[:8], images[8:], LABELS[8:])
    monkeypatch.setitem(demo.TASKS, "lenet", lambda: task)
    path: Path = tmp_path / "out.html"
    run = CliRunner().invoke(commands.cli, ["report", "--output", str(path)])
    assert run.exit_code == 0, run.output
    assert str(path) in run.output and str(path.with_suffix(".md")) in run.output
    assert "<title>Tiny &lt;net&gt;: int8 beside float32</title>" in path.read_text(
        encoding="utf-8"
    )
    missing = CliRunner().invoke(commands.cli, ["report", "--output", str(tmp_path / "no" / "x")])
    assert missing.exit_code == 2 and "there is no folder" in missing.output
    other = CliRunner().invoke(commands.cli, ["report", "--output", str(tmp_path / "out.md")])
    assert other.exit_code == 2 and "wanted a .html" in other.output


def test_values_of_a_grid_are_in_its_steps() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 3, 8, 8) * torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    quantized = fastq.quantize_model(net, x, remedies=("input_equalization",), progress=False)
    result = fastq.report(net, quantized, x, path=None, passes=1, progress=False)
    (step,) = [step for step in result.steps if step.op == "grid"]
    assert step.values is not None and step.snr is not None and step.snr > 40
    assert step.values.grid == (0, 255)
    assert step.values.seen == pytest.approx((0, 255), abs=1)
    assert step.values.scale == pytest.approx((1 / 255, 4 / 255), rel=0.01)
    assert "1e\u201106" in page.Table("", "lr", ("", ""), (("scale", "1e-06"),)).html()
