"""Saved networks where torch is not."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from networks import CASES, quantized_case
from torch import nn

import fastq


@pytest.mark.parametrize("name", ["residual", "u-net", "attention", "linear"])
def test_it_gives_the_same_bits(name, tmp_path):
    fastq.save(quantized_case(name), tmp_path / "q")
    run = fastq.load_program(tmp_path / "q")
    (x,) = CASES[name].arguments(3)
    (found,) = run(x.numpy())
    assert np.array_equal(found, quantized_case(name)(x).numpy())


def test_it_needs_no_torch(tmp_path):
    (x,) = CASES["residual"].arguments(2)
    fastq.save(quantized_case("residual"), tmp_path / "q")
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, fastq\n"
        f"run = fastq.load_program({str(tmp_path / 'q')!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, run(np.load({str(tmp_path / 'x.npy')!r}))[0])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), quantized_case("residual")(x).numpy())


def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x, y):
            return {"sum": self.a(x) + self.b(y), "x": self.a(x)}

    q = fastq.quantize_model(
        Two().eval(), [{"x": torch.randn(8, 4), "y": torch.randn(8, 5)}], progress=False
    )
    fastq.save(q, tmp_path / "q")
    run = fastq.load_program(tmp_path / "q")
    given = {"x": torch.randn(2, 4), "y": torch.randn(2, 5)}
    assert run.program.inputs == ("x", "y")
    found = run(given["x"].numpy(), given["y"].numpy())
    wanted = q(**given)
    assert [np.array_equal(y, wanted[k].numpy()) for k, y in zip(wanted, found, strict=True)] == [
        True
    ] * 2


def test_inputs_and_outputs_in_an_order_of_their_own(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x, y, double=False):
            middle = torch.relu(self.a(y) - self.a(x))
            return self.b(middle), middle

    given = {"x": torch.randn(8, 4), "y": torch.randn(8, 4), "double": False}
    q = fastq.quantize_model(Net().eval(), given, progress=False)
    fastq.save(q, tmp_path / "q")
    run = fastq.load_program(tmp_path / "q")
    found = run(given["x"].numpy(), given["y"].numpy())
    for wanted, array in zip(q(**given), found, strict=True):
        assert np.array_equal(array, wanted.numpy())


def test_what_is_no_program_is_refused(tmp_path):
    fastq.save(quantized_case("float between"), tmp_path / "q")
    with pytest.raises(ValueError, match=r"float operators: .*cumsum.* has no integer"):
        fastq.load_program(tmp_path / "q")
    fastq.save(fastq.quantize_layers(nn.Sequential(nn.Linear(3, 2))), tmp_path / "q")
    with pytest.raises(ValueError, match="int8 layers in a float model"):
        fastq.load_program(tmp_path / "q")
    data = bytearray((tmp_path / "q").read_bytes())
    data[-1] ^= 1
    (tmp_path / "q").write_bytes(data)
    with pytest.raises(ValueError, match="altered"):
        fastq.load_program(tmp_path / "q")
    (tmp_path / "q").write_bytes(b"no file")
    with pytest.raises(ValueError, match="no safetensors file"):
        fastq.load_program(tmp_path / "q")
    with pytest.raises(FileNotFoundError):
        fastq.load_program(tmp_path / "none")
