"""User-written pointwise functions: one operator in float, one table in integers."""

import numpy as np
import pytest
import torch
from networks import noise_ratio
from torch import Tensor, nn
from torch.nn import functional as F

import fastq


@fastq.pointwise
def snake(x: Tensor) -> Tensor:
    """x and a wave."""
    return x + torch.sin(3 * x) ** 2 / 3


@fastq.pointwise
def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(np.abs(x.numpy() - 0.3)))


class Net(nn.Module):
    def __init__(self, function, last=True) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1), function
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(F.relu(self.a(x)))
        return self.b(y) if self.last else y


def quantized(net: nn.Module, x: Tensor) -> nn.Module:
    return fastq.quantize_model(
        net.eval(), x, config=fastq.QConfig(observer="minmax"), progress=False
    )


@pytest.mark.parametrize("function", [snake, by_numpy])
def test_it_becomes_a_table(function):
    torch.manual_seed(0)
    x, net = torch.randn(4, 3, 8, 9), Net(function)
    q = quantized(net, x)
    assert [s.op for s in q.program.steps] == ["quantize", "conv2d", "table", "conv2d"]
    assert noise_ratio(net(x), q(x)) > 20
    assert np.array_equal(q(x).numpy(), q.program.reference(x.numpy())[0])


def test_it_is_fused_with_its_neighbours():
    net = Net(lambda x: F.silu(snake(x) * 2) + 1)
    assert [s.op for s in quantized(net, torch.randn(4, 3, 8, 9)).program.steps].count("table") == 1


def test_it_computes_what_it_did():
    assert snake.__name__ == "snake" and snake.__doc__ == "x and a wave."
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(snake(x), x + torch.sin(3 * x) ** 2 / 3)
    assert torch.autograd.gradcheck(snake, x)
    same = fastq.pointwise(lambda x: x)
    y = torch.ones(3)
    assert torch.equal(same(y), y) and same(y).data_ptr() != y.data_ptr()


def test_a_network_with_it_is_saved(tmp_path):
    x, net = torch.randn(4, 3, 8, 9), Net(snake, last=False)
    q = quantized(net, x)
    fastq.save(q, tmp_path / "q")
    assert torch.equal(fastq.load(tmp_path / "q")(x), q(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum(), r"gives torch.float32 \(\) for torch.float32 \(4, 3\)"),
        (lambda x: x.double(), "gives torch.float64"),
        (lambda x: x - x.mean(), "a function of each element alone"),
        (lambda x: x.softmax(-1), "a function of each element alone"),
        (lambda x: x.cumsum(0), "a function of each element alone"),
        (lambda x: x.flip(0), "a function of each element alone"),
        (lambda x: 3, "gives int"),
        (lambda x: x.sin_(), r"writes to its input, .*; wanted a new tensor"),
        (lambda x: x.relu_(), r"writes to its input, .*; wanted a new tensor"),
    ],
)
def test_what_is_not_pointwise_is_refused(function, message):
    for inference in (False, True):
        with torch.inference_mode(inference), pytest.raises(ValueError, match=message):
            fastq.pointwise(function)(torch.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize("given", [3, nn.ReLU, nn.ReLU()])
def test_only_functions_are_taken(given):
    with pytest.raises(TypeError, match="wanted a function"):
        fastq.pointwise(given)
