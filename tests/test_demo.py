"""The demo's pieces, the command line, and what the README promises."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastq
from fastq import cli, commands, demo
from fastq.demo import comparison, tasks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.+?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def lenet() -> demo.Task:
    return demo.lenet(epochs=8)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, lenet: demo.Task) -> None:
    """`fastq demo` with a network trained before and five timed calls."""
    monkeypatch.setitem(demo.TASKS, "lenet", lambda: lenet)
    monkeypatch.setattr(comparison, "SECONDS", 0.0)


def test_digits_are_split_without_overlap():
    images, labels, held_out, held_out_labels = tasks.digits()
    assert images.shape == (1198, 3, 32, 32) and held_out.shape == (599, 3, 32, 32)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 1)
    assert sorted(set(held_out_labels.tolist())) == list(range(10))
    whole = {image.numpy().tobytes() for image in images}
    assert not any(image.numpy().tobytes() in whole for image in held_out)


def test_net_is_the_lenet_of_the_docstring():
    shapes = [tuple(p.shape) for p in demo.Net().parameters() if p.ndim > 1]
    assert shapes == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    assert demo.Net()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_training_is_deterministic_and_learns(lenet):
    twice = [demo.lenet(epochs=1).network.state_dict() for _ in range(2)]
    for name, value in twice[0].items():
        assert torch.equal(value, twice[1][name]), name
    assert not lenet.network.training
    assert (comparison.predict(lenet.network, lenet.images) == lenet.labels).float().mean() > 0.9


def test_calibration_images_are_not_scored(lenet):
    scored = {image.numpy().tobytes() for image in lenet.images}
    assert len(lenet.calibration) == 256
    assert not any(image.numpy().tobytes() in scored for image in lenet.calibration)


@pytest.mark.usefixtures("brief")
def test_the_demo_trains_what_it_loaded(lenet, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    plain = demo.compare(lenet, before)
    trained = demo.compare(lenet, after, qat=True)
    assert trained.int8.accuracy >= plain.int8.accuracy - 0.01
    images, labels = lenet.training
    losses = [torch.nn.functional.cross_entropy(fastq.load(path)(images), labels)
              for path in (before, after)]  # fmt: skip
    assert losses[1] < losses[0]
    result = CliRunner().invoke(commands.cli, ["demo", "--qat", "--network", "efficientnet-lite0"])
    assert result.exit_code == 2 and "nothing here to train" in result.output


@pytest.mark.usefixtures("brief")
def test_comparison_of_lenet(lenet, tmp_path):
    path = tmp_path / "lenet.safetensors"
    threads = torch.get_num_threads(), fastq.get_num_threads()
    fastq.set_num_threads(1)
    result = demo.compare(lenet, path)
    assert (torch.get_num_threads(), fastq.get_num_threads()) == (threads[0], 1)
    fastq.set_num_threads(threads[1])
    assert result.threads == 1
    float32, int8 = result.float32, result.int8

    expected = comparison.predict(lenet.network, lenet.images)
    again = comparison.predict(fastq.load(path), lenet.images)
    assert float32.accuracy == pytest.approx(np.mean((expected == lenet.labels).numpy()))
    assert int8.accuracy == pytest.approx(np.mean((again == lenet.labels).numpy()))
    assert result.agreement == pytest.approx(np.mean((expected == again).numpy()))
    assert abs(int8.accuracy - float32.accuracy) <= 0.005
    assert result.agreement >= 0.99

    assert float32.memory == 4 * sum(p.numel() for p in lenet.network.parameters())
    assert int8.memory < float32.memory / 3
    assert float32.disk > float32.memory
    assert int8.disk == path.stat().st_size
    assert set(float32.latency) == set(int8.latency) == {1, 64}
    assert min(*float32.latency.values(), *int8.latency.values()) > 0


def test_efficientnet_lite0_is_trained_and_becomes_int8(tmp_path):
    task = demo.efficientnet_lite0()
    assert task.calibration.shape == (16, 3, 224, 224)
    assert task.images.shape == (24, 3, 224, 224)
    assert task.images.min() >= -1 and task.images.max() <= 1
    images, labels = task.images[::2], task.labels[::2]  # without the mirror images
    expected = comparison.predict(task.network, images)
    assert (expected == labels).sum() >= 10

    path = tmp_path / "lite0.safetensors"
    fastq.save(fastq.quantize_model(task.network, task.calibration, strict=True), path)
    int8 = fastq.load(path)
    assert sum(step.op in ("conv2d", "linear") for step in int8.program.steps) == 50
    assert (comparison.predict(int8, images) == expected).sum() >= 11


@pytest.mark.usefixtures("brief")
def test_command_saves_and_prints_one_table(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "int8.safetensors"
    result = CliRunner().invoke(commands.cli, ["demo", "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert path.exists() and str(path) in result.output
    for row in (
        "top-1 accuracy",
        "predictions equal to float32's",
        "latency, batch 1 ",
        "latency, batch 64",
        "parameters in memory",
        "parameters on disk",
    ):
        assert result.output.count(row) == 1, row


def test_command_without_output_names_its_file(brief, monkeypatch):
    result = CliRunner().invoke(commands.cli, ["demo"])
    assert result.exit_code == 0, result.output
    named = re.search(r"int8 parameters: (.+)", result.output)
    assert named and Path(named[1]).exists()


def test_command_refuses_a_missing_folder_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.TASKS, "lenet", lambda: pytest.fail("trained"))
    folder = tmp_path / "missing"
    result = CliRunner().invoke(commands.cli, ["demo", "--output", str(folder / "x")])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "there is no folder" in result.output and "missing" in result.output


def test_command_refuses_an_unknown_network():
    result = CliRunner().invoke(commands.cli, ["demo", "--network", "alexnet"])
    assert result.exit_code == 2
    assert "efficientnet-lite0" in result.output


@pytest.mark.parametrize("module", ["click", "rich", "sklearn"])
def test_missing_extra_is_one_message(module):
    code = f"import sys; sys.modules[{module!r}] = None; from fastq.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "demo"], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{module} is not installed" in done.stderr
    assert 'pip install "fastq-int8[demo]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_module_of_our_own_is_not_hidden():
    with pytest.raises(ModuleNotFoundError), cli.extra("demo"):
        raise ModuleNotFoundError(name="fastq.nothing")


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fastq", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "bench", "report", "warmup"))


def test_help_needs_no_torch():
    code = "import sys; from fastq.commands import cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_example_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example, *_ = EXAMPLES
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    assert "int8 static" in capsys.readouterr().out


class Net(nn.Module):
    """What the README's other examples are about."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.Sequential(nn.Linear(16, 16))})])
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x.flatten(1)))
        return self.head(torch.relu(self.blocks[0]["attn"](x)))


def test_readmes_other_examples_run_as_written(tmp_path, monkeypatch):
    """One after the other: each goes on with what those before it made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *_: None)
    x, y = torch.randn(64, 3, 2, 2), torch.randint(4, (64,))
    names = {
        "torch": torch, "fastq": fastq, "np": np, "Net": Net, "model": Net().eval(), "x": x[:1],
        "batches": [x], "train_loader": [(x, y)], "test_loader": [(x, y)], "labels": y,
        "images": x, "loss": nn.functional.cross_entropy, "linear": nn.Linear(8, 4),
        "accuracy": lambda m: 100 * float((m(x).argmax(1) == y).float().mean()),
        "w": np.ones((4, 12), np.int8),
    }  # fmt: skip
    for example in EXAMPLES[1:]:
        if "load_program" in example:
            names |= {"images": x.numpy(), "x": x[:, 0, 0].numpy().repeat(6, 1)}
        exec(compile(example, "README.md", "exec"), names)
    assert names["logits"].shape == (64, 4) and names["y"].shape == (64, 4)


@pytest.mark.parametrize("start", ['pip install -e ".[demo]" && ', 'pip install -e ".[test]" && '])
def test_ci_runs_the_readme_lines(start):
    lines = [line for line in README.splitlines() if start in line]
    assert len(lines) == 1 and lines[0].startswith(start)
    assert f"readme '{start}'" in (ROOT / ".ci" / "run").read_text()


def ci_skips(tmp_path: Path, message: str) -> subprocess.CompletedProcess[str]:
    report = tmp_path / "pytest.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b">'
        f'<skipped type="pytest.skip" message="{message}"/></testcase></testsuite></testsuites>'
    )
    command = [sys.executable, ROOT / ".ci" / "skips.py", report]
    return subprocess.run(command, capture_output=True, text=True)


def test_ci_allows_skips_for_instruction_sets_only(tmp_path):
    allowed = ci_skips(tmp_path, "this CPU lacks avx512_vnni")
    assert allowed.returncode == 0 and "avx512_vnni" in allowed.stdout
    refused = ci_skips(tmp_path, "could not import 'onnx'")
    assert refused.returncode == 1 and "could not import" in refused.stdout
