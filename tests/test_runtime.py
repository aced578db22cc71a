"""Saved networks where torch is not."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from networks import CASES, quantized_case
from torch import nn
from torch.utils import _pytree as pytree

import fastq


@pytest.mark.parametrize("name", ["residual", "u-net", "attention", "linear"])
def test_it_gives_the_same_bits(name, tmp_path):
    fastq.save(quantized_case(name), tmp_path / "q")
    run = fastq.load_program(tmp_path / "q")
    (x,) = CASES[name].arguments(3)
    (found,) = run(x.numpy())
    assert np.array_equal(found, quantized_case(name)(x).numpy())


@pytest.mark.parametrize("name", CASES)
def test_all_that_it_has_is_what_torch_computes(name, tmp_path):
    """Networks with float operators too: masks and what is computed of sizes give the same bits."""
    q = quantized_case(name)
    fastq.save(q, tmp_path / "q")
    run = fastq.load_program(tmp_path / "q")
    assert len(run.programs) == CASES[name].programs
    for size in CASES[name].extents:
        given = CASES[name].arguments(3, size)
        found = run(*(x.numpy() for x in given))
        wanted = pytree.tree_leaves(q(*given))
        for x, y in zip(wanted, found, strict=True):
            assert x.dtype == torch.from_numpy(np.array(y)).dtype
            if CASES[name].programs == 1:
                assert np.array_equal(x.numpy(), y)
            else:
                torch.testing.assert_close(torch.from_numpy(np.array(y)), x, rtol=0.02, atol=0.02)


class Digits(nn.Module):
    """As tutorials have it: log_softmax at the end."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(1, 6, 3)
        self.classes = nn.Linear(6 * 36, 10)

    def forward(self, x):
        x = torch.flatten(torch.relu(self.features(x)), 1)
        return torch.log_softmax(self.classes(x), dim=1), x.shape[0], "digits"


def test_float_operators_at_the_end(tmp_path):
    q = fastq.quantize_model(Digits().eval(), [torch.randn(8, 1, 8, 8)], progress=False)
    fastq.save(q, tmp_path / "q")
    run, x = fastq.load_program(tmp_path / "q"), torch.randn(5, 1, 8, 8)
    (wanted, *_), (found, *rest) = q(x), run(x.numpy())
    assert rest == [5, "digits"] and run.program.inputs == run.inputs == ("x",)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32
    copied = pickle.loads(pickle.dumps(run))
    assert np.array_equal(copied(x.numpy())[0], found)


def test_inputs_that_it_does_not_take(tmp_path):
    q = fastq.quantize_model(Digits().eval(), [torch.randn(8, 1, 8, 8)], progress=False)
    fastq.save(q, tmp_path / "q")
    run, x = fastq.load_program(tmp_path / "q"), np.zeros((2, 1, 8, 8), np.float32)
    with pytest.raises(TypeError, match="got 2 inputs; wanted x"):
        run(x, x)
    with pytest.raises(TypeError, match="x is a list; wanted an array"):
        run([x])
    with pytest.raises(ValueError, match=r"x has shape \(2, 8\); wanted \(any, 1, 8, 8\)"):
        run(x[:, 0, 0])
    with pytest.raises(TypeError, match="float64; wanted a float32"):
        run(x.astype(np.float64))


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
    for again in (run(y=given["y"].numpy(), x=given["x"].numpy()),
                  run(given["x"].numpy(), y=given["y"].numpy())):  # fmt: skip
        assert all(map(np.array_equal, again, found))
    with pytest.raises(TypeError, match="got 1 inputs, z=; wanted x, y"):
        run(given["x"].numpy(), z=given["y"].numpy())
    with pytest.raises(TypeError, match="got 2 inputs, x=; wanted x, y"):
        run(*(x.numpy() for x in given.values()), x=given["x"].numpy())


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


def test_what_needs_torch_is_refused(tmp_path):
    class Inverse(nn.Sequential):
        def forward(self, x):
            return self[1](torch.erfinv(self[0](x).tanh() / 2))

    q = fastq.quantize_model(
        Inverse(nn.Linear(4, 5), nn.Linear(5, 3)).eval(), [torch.randn(8, 4)], progress=False
    )
    fastq.save(q, tmp_path / "q")
    with pytest.raises(ValueError, match=r"takes aten\.erfinv.*fastq\.load runs it with torch"):
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
