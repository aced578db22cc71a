"""Training with the values of the integer program: what is trained is what runs, bit for bit."""

from __future__ import annotations

import copy
import math
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import CASES, call, noise_ratio
from torch import Tensor, nn

import fastq


class Net(nn.Module):
    """A little of everything; returns logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.after = nn.BatchNorm2d(22)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(22, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(self.stem(x))
        y = F.silu(self.norm(self.depthwise(x)))
        y = F.relu(x + self.point(y))
        z = self.pool(self.up(y))
        features = F.relu(self.after(torch.cat([x, y, z], 1)))
        return self.head(F.adaptive_avg_pool2d(features, 1).flatten(1)), features


class Attention(nn.Module):
    """Products of two activations, softmax, layer norm, and a float operator between programs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 12)
        self.place = nn.Parameter(torch.randn(1, 6, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x + self.place).chunk(3, -1)
        y = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 3, -1) @ v)
        return self.out(self.norm(y).cumsum(1))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with running statistics of its own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        for _ in range(20):
            model(x)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return settled(Net(), images)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads would wait for each other."""
    most = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(most)


def train(model: nn.Module, x: Tensor, steps: int = 4, lr: float = 0.01) -> list[float]:
    """Losses of an ordinary loop that fits noise."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses, target = [], None
    for _ in range(steps):
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        target = torch.randn(y.shape) if target is None else target
        loss = F.mse_loss(y, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(one: object, two: object) -> None:
    for a, b in zip(one, two, strict=True) if isinstance(one, tuple) else [(one, two)]:
        np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_what_is_trained_is_what_runs(net: nn.Module, images: Tensor, learned: bool) -> None:
    model = fastq.prepare_qat(net, images, learned=learned)
    assert_same(
        model.eval()(images), fastq.quantize_model(net, images, remedies=(), progress=False)(images)
    )
    train(model.train(), images)
    given = torch.randn(5, 3, 12, 12)  # another batch size
    assert_same(model.eval()(given), fastq.convert(model)(given))
    with torch.no_grad():
        assert_same(model(given), fastq.convert(model)(given))
    model.train().freeze_batch_norm().freeze_ranges()
    train(model, images)
    assert_same(model(given), fastq.convert(model)(given))
    assert_same(fastq.convert(model)(given), fastq.convert(model)(given))


def test_the_float_outputs_of_a_value_are_on_its_grid(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images)
    train(model, images)
    _, features = model.eval()(images)
    (qparams,) = (
        step.arguments for step in fastq.convert(model).program.steps if step.op == "dequantize"
    )
    q = features.detach().double() / qparams["scale"] + qparams["zero_point"]
    assert (q - q.round()).abs().max() < 1e-4
    assert q.min() >= 0 and q.max() < 255.5 and len(q.round().unique()) > 50


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_attention_trains_around_a_float_operator(learned: bool) -> None:
    torch.manual_seed(0)
    float_model, x = Attention().eval(), torch.randn(7, 6, 12)
    model = fastq.prepare_qat(float_model, x, learned=learned)
    assert len(fastq.convert(model).programs) == 2
    losses = train(model, x, 6)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert_same(model.eval()(x), fastq.convert(model)(x))


@pytest.mark.parametrize("moving", [False, True], ids=["frozen", "moving"])
def test_gradients_reach_every_parameter(net: nn.Module, images: Tensor, moving: bool) -> None:
    model = fastq.prepare_qat(net, images, learned=True)
    if not moving:
        model.freeze_batch_norm()
    logits, features = model(images)
    (logits.square().mean() + features.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


FACTORS = (
    "rotary positions",
    "rms norms",
    "rms norms of images",
    "layer norms",
    "layer norms of images",
)


@pytest.mark.parametrize("name", FACTORS)
def test_factors_of_an_axis_are_trained(name: str) -> None:
    """They are those of an affine or of an RMS norm, and the network's own parameters."""
    given = CASES[name].arguments(4)
    model = fastq.prepare_qat(CASES[name].network(), [given], progress=False)
    model(*given).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("place", ["linear", "rows", "image", "image, no bias", "norm"])
@pytest.mark.parametrize("kind", ["factor", "shift", "both"])
def test_what_is_folded_into_a_layer_is_trained(place: str, kind: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = (6, 1, 1) if place.startswith("image") else (6,)
            self.factor, self.shift = (nn.Parameter(torch.rand(shape) + 0.5) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.factor if kind != "shift" else x
            return x + self.shift if kind != "factor" else x

    first: nn.Module = nn.Linear(8, 6)
    x = torch.randn(32, 5, 8) if place != "linear" else torch.randn(64, 8)
    last: nn.Module = nn.Linear(6, 4)
    if place.startswith("image"):
        first, last = nn.Conv2d(3, 6, 3, bias=place == "image"), nn.Conv2d(6, 4, 1)
        x = torch.randn(16, 3, 8, 8)
    if place == "norm":
        first = nn.Sequential(first, nn.LayerNorm(6))
    net = nn.Sequential(first, Scaled(), nn.ReLU(), last).eval()
    model = fastq.prepare_qat(net, x, progress=False)
    assert {"add", "mul", "affine"}.isdisjoint(s.op for s in fastq.convert(model).program.steps)
    losses = train(model, x, 6)
    assert losses[-1] < losses[0]
    unused = {"shift": "factor", "factor": "shift"}.get(kind, "?")
    for name, parameter in model.named_parameters():
        assert name.endswith(unused) or parameter.grad.any(), name
    assert_same(model.eval()(x), fastq.convert(model)(x))


def test_the_gradient_is_the_slope_over_many_steps_of_the_grid(
    net: nn.Module, images: Tensor
) -> None:
    model = fastq.prepare_qat(net, images).freeze_batch_norm().freeze_ranges()
    target = torch.randn(12, 5)

    def loss() -> Tensor:
        return (model(images)[0] * target).mean()

    loss().backward()
    for name, parameter in model.named_parameters():
        direction = parameter.grad / parameter.grad.norm()
        size = 0.05 * parameter.detach().norm()
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter += sign * size * direction
                ends.append(loss())
                parameter -= sign * size * direction
        slope = (ends[0] - ends[1]) / (2 * size)
        assert slope.item() == pytest.approx(parameter.grad.norm().item(), rel=0.2), name


def plain(layer: nn.Module, weight: Tensor | None = None) -> tuple[nn.Module, Tensor]:
    """A convolution, a batch norm whose running statistics are the batch's, and that batch."""
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    norm = nn.BatchNorm2d(4, momentum=1.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.5, 1.0, 0.7]) if weight is None else weight)
        norm.bias.copy_(torch.tensor([0.2, -0.1, 0.0, 0.4]))
        model = nn.Sequential(layer, norm, nn.Conv2d(4, 2, 1))
        model(x)
        norm.running_var *= (16 * 64 - 1) / (16 * 64)  # training divides by n, not n - 1
    return model, x


def test_moving_batch_norm_has_the_gradient_of_the_batch_statistics() -> None:
    torch.manual_seed(0)
    model, x = plain(nn.Conv2d(3, 4, 3))
    target = torch.randn(16, 2, 6, 6)
    gradients = []
    for trained in (model.train(), *(fastq.prepare_qat(model, x) for _ in range(2))):
        if len(gradients) == 2:
            trained.freeze_batch_norm()
        (trained(x) * target).mean().backward()
        gradients.append(trained.get_parameter("0.weight").grad.flatten())
    wanted, moving, frozen = gradients
    assert F.cosine_similarity(wanted, moving, 0) > 0.995
    assert moving.norm() == pytest.approx(wanted.norm().item(), rel=0.03)
    assert F.cosine_similarity(wanted, frozen, 0) < 0.99


def test_running_statistics_move_as_in_torch_and_then_stop() -> None:
    torch.manual_seed(0)
    model, x = plain(nn.Conv2d(3, 4, 3))
    model[1].momentum = 0.1
    trained = fastq.prepare_qat(model, 4 * x)
    for y in (2 * x, 3 * x):
        model.train()(y)
        trained(y)
    for key, tolerance in (("running_mean", 0.02), ("running_var", 0.05)):
        wanted = getattr(model[1], key)
        assert (
            trained.get_buffer(f"1.{key}") - wanted
        ).abs().max() < tolerance * wanted.abs().max()
    trained.freeze_batch_norm().freeze_ranges()
    kept = copy.deepcopy(trained.state_dict())
    trained(4 * x)
    trained.eval()(4 * x)
    assert all(torch.equal(kept[key], value) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("momentum", [0.3, None], ids=["moving", "cumulative"])
def test_batches_are_counted_as_in_torch(momentum: float | None) -> None:
    torch.manual_seed(0)
    model, x = plain(nn.Conv2d(3, 4, 3))
    model[1].momentum = momentum
    trained = fastq.prepare_qat(model, 4 * x, progress=False)
    before = int(model[1].num_batches_tracked)
    for scale in (2, 3, 4):
        model.train()(scale * x)
        trained(scale * x)
    assert int(model[1].num_batches_tracked) == before + 3
    assert int(trained.get_buffer("1.num_batches_tracked")) == before + 3
    wanted, got = model[1].running_var, trained.get_buffer("1.running_var")
    np.testing.assert_allclose(got, wanted, rtol=0.05)


def test_one_batch_norm_is_frozen_as_in_torch(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images, progress=False)
    model.stem.eval()
    kept = copy.deepcopy(model.state_dict())
    model(3 * images)
    moved = {
        name for name, value in model.state_dict().items()
        if "running" in name and not torch.equal(value, kept[name])
    }  # fmt: skip
    assert moved == {f"{norm}.running_{of}" for norm in ("norm", "after") for of in ("mean", "var")}
    model.train()(images)
    assert not torch.equal(model.get_buffer("stem.1.running_mean"), kept["stem.1.running_mean"])


class Deviation(nn.Module):
    """A layer norm spelled out, then causal attention: both make constants when they are read."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_torchs_default_dtype_changes_nothing(learned: bool) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 12), Deviation(), nn.Linear(12, 4)), torch.randn(3, 5, 8)
    wanted = fastq.prepare_qat(net, x, learned=learned)
    wanted(x)
    torch.set_default_dtype(torch.float64)
    try:
        model = fastq.prepare_qat(net, x, learned=learned)
        model(x).sum().backward()
        got = fastq.convert(model)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(got, fastq.convert(wanted)(x))


def test_ranges_follow_the_data_of_training() -> None:
    torch.manual_seed(0)
    model = fastq.prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)),
                              torch.rand(4, 3, 8, 8))  # fmt: skip
    before = model.state_dict()["fastq.input_u8.scale"].item()
    for _ in range(3):
        model(5 * torch.rand(4, 3, 8, 8))
    wanted = 1 + 4 * (1 - 0.99**3)  # the average moves by a hundredth of the way each time
    assert model.state_dict()["fastq.input_u8.scale"] == pytest.approx(wanted * before, rel=0.02)


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_a_bias_next_to_an_input_or_a_filter_of_nearly_zero_trains(learned: bool) -> None:
    torch.manual_seed(0)
    first = nn.Linear(8, 8)
    model = nn.Sequential(first, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    x = torch.randn(64, 8)
    with torch.no_grad():
        first.weight *= 1e-8
        first.bias *= 1e-8
    trained = fastq.prepare_qat(model, x, learned=learned)
    losses = train(trained, x, 10)
    with torch.no_grad():
        trained.get_parameter("3.weight")[0] *= 1e-12
    assert losses[-1] < losses[0]
    state = trained.state_dict()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    with torch.no_grad():
        assert noise_ratio(model(x), trained.eval()(x)) > 25
        assert_same(trained(x), fastq.convert(trained)(x))


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_a_batch_norm_of_weight_zero_trains(learned: bool) -> None:
    torch.manual_seed(0)
    model, x = plain(nn.Conv2d(3, 4, 3), torch.zeros(4))
    trained = fastq.prepare_qat(model, x, learned=learned)
    assert_same(trained.eval()(x), fastq.convert(trained)(x))
    losses = train(trained.train(), x, 30, 0.05)
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in trained.parameters())
    assert (trained.get_parameter("1.weight").abs() > 1e-3).all()
    weight = fastq.convert(trained).program.steps[1].arguments["weight"].data
    assert weight.any(axis=(1, 2, 3)).all()  # no channel rounds to zeros
    assert_same(trained.eval()(x), fastq.convert(trained)(x))


def test_learned_scales_have_the_gradient_of_the_paper() -> None:
    """Esser et al., equations 3 and 5: of the input's scale, and of a weight's per output."""
    torch.manual_seed(0)
    layer, x, target = nn.Linear(6, 3), torch.randn(10, 6), torch.randn(10, 3)
    model = fastq.prepare_qat(layer, x / 2, learned=True)  # half of the range: some are clipped
    (model(x) * target).sum().backward()
    state = model.state_dict()
    step, zero_point = (state[f"fastq.input_u8.{k}"].item() for k in ("scale", "zero_point"))
    v = x / step
    codes = v.round().clamp(-zero_point, 255 - zero_point)
    assert (codes != v.round()).any()
    slope = torch.where(codes == v.round(), v.round() - v, codes)
    steps = state["fastq.linear_s8.scale"][:, None]
    w = layer.weight.detach() / steps
    grid = w.round() * steps
    wanted = ((target @ grid) * slope).sum() / (6 * max(zero_point, 255 - zero_point)) ** 0.5
    got = model.get_parameter("fastq.input_u8.scale").grad
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    wanted = ((target.T @ (codes * step)) * (w.round() - w)).sum(1) / (6 * 127) ** 0.5
    got = model.get_parameter("fastq.linear_s8.scale").grad
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    wanted = (target @ grid) * (codes == v.round())


def test_clipped_values_have_no_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 6)
    model = fastq.prepare_qat(nn.Linear(6, 3), x).freeze_ranges()
    given = (3 * x).requires_grad_()
    model(given).sum().backward()
    outside = (given < x.min()) | (given > x.max())
    assert outside.any() and (given.grad[outside] == 0).all() and (given.grad[~outside] != 0).all()


def test_training_starts_from_a_file(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """Load quantized parameters, train, save, load."""
    quantized = fastq.quantize_model(net, images, progress=False)
    fastq.save(quantized, tmp_path / "before.safetensors")
    for learned in (False, True):
        loaded = fastq.load(tmp_path / "before.safetensors")
        model = fastq.prepare_qat(loaded, learned=learned)
        assert_same(model.eval()(images), quantized(images))
        assert "stem.0.weight" in dict(model.named_parameters())
        losses = train(model.train(), images, 12, 0.003 if learned else 0.05)
        assert losses[-1] < 0.97 * losses[0]
        after = fastq.convert(model)
        assert_same(loaded(images), quantized(images))
        fastq.save(after, tmp_path / "after.safetensors")
        again = fastq.load(tmp_path / "after.safetensors")
        assert_same(again(images), model.eval()(images))
        assert fastq.summary(again).rows == fastq.summary(quantized).rows
        assert_same(fastq.prepare_qat(again).eval()(images), again(images))


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_a_grid_of_the_inputs_leaves_weights_as_trainable_as_they_were(
    images: Tensor, learned: bool
) -> None:
    """Its steps run to 255; the weights that read it, and their gradients, are of a usual size."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    net(images)
    sizes = []
    for remedies in ((), ("input_equalization",)):
        quantized = fastq.quantize_model(net, images, remedies=remedies, progress=False)
        ops = [step.op for program in quantized.programs for step in program.steps]
        assert ("grid" in ops) == bool(remedies)
        model = fastq.prepare_qat(quantized, learned=learned)
        assert_same(model(images), quantized(images))
        model(images).square().mean().backward()
        named = dict(model.named_parameters())
        own = [named["0.weight"], *(p for name, p in named.items() if name.endswith("2d_s8.scale"))]
        sizes.append([float(p.grad.norm() / p.detach().norm()) for p in own])
    assert len(sizes[0]) == 1 + learned
    np.testing.assert_array_less(sizes[1], 30 * np.array(sizes[0]))


def test_a_learned_scale_below_zero_can_be_trained(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images, learned=True, progress=False)
    scales = [p for name, p in model.named_parameters() if name.endswith("_u8.scale")]
    for scale in scales:
        kept = scale.detach().clone()
        with torch.no_grad():
            scale.fill_(-1.0)
        logits = model(images)[0]
        assert logits.isfinite().all()
        assert_same(model.eval()(images), fastq.convert(model)(images))
        model.train()
        with torch.no_grad():
            scale.copy_(kept)


def test_averaged_weights_are_converted(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images, progress=False)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        train(model, images, 2)
        averaged.update_parameters(model)
    assert_same(fastq.convert(averaged)(images), averaged.eval()(images))


def test_attention_starts_from_a_quantized_network() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 6, 12)
    quantized = fastq.quantize_model(Attention().eval(), x, progress=False)
    model = fastq.prepare_qat(quantized)
    with torch.inference_mode():  # leaves nothing behind that cannot be trained with
        assert_same(model.eval()(x), quantized(x))
    losses = train(model, x, 6)
    assert losses[-1] < losses[0]
    assert_same(model.eval()(x), fastq.convert(model)(x))


def test_under_autocast_the_bits_are_the_same(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images, learned=True).freeze_batch_norm()
    wanted = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        given = model(images)
    assert_same(given, wanted)
    given[0].square().mean().backward()
    half = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted[0].square().mean().backward()
    for name, grad in half.items():
        full = model.get_parameter(name).grad
        assert (grad - full).norm() <= 0.1 * full.norm() + 1e-6, name
    assert any(not torch.equal(g, model.get_parameter(k).grad) for k, g in half.items())


def test_copies_and_states(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images, learned=True)
    assert set(net.state_dict()) < set(model.state_dict())
    before = model.eval()(images)
    twin = copy.deepcopy(model)
    train(twin.train(), images)
    assert_same(model(images), before)
    assert_same(twin.eval()(images), fastq.convert(twin)(images))
    model.load_state_dict(twin.state_dict())
    assert_same(model(images), twin(images))
    assert_same(fastq.convert(model)(images), twin(images))
    model.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter)


def test_what_is_frozen_is_in_a_checkpoint(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    frozen = fastq.prepare_qat(net, images, progress=False).freeze_batch_norm().freeze_ranges()
    moving = fastq.prepare_qat(net, images, progress=False)
    states = {}
    for name, model in (("frozen", frozen), ("moving", moving)):
        torch.save(model.state_dict(), tmp_path / name)
        states[name] = torch.load(tmp_path / name, weights_only=True)
    for name in ("frozen", "moving", "frozen"):  # into the same model
        moving.load_state_dict(states[name])
        moving.train()(3 * images)
        moved = {
            key.rpartition(".")[2]
            for key, value in moving.state_dict().items()
            if not torch.equal(value, states[name][key])
        }
        assert moved >= {"ends", "running_mean", "running_var"} if name == "moving" else not moved


def test_a_state_of_other_bits_is_refused(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    configs = {
        "3 bits": {"depthwise": fastq.QConfig(weight_bits=3)},
        "range 'mse'": {"depthwise": fastq.QConfig(weight_range="mse")},
    }
    model = fastq.prepare_qat(net, images, progress=False)
    before = copy.deepcopy(model.state_dict())
    for text, config in configs.items():
        other = fastq.prepare_qat(net, images, config=config, progress=False)
        train(other, images, 1)
        torch.save(other.state_dict(), tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
        with pytest.raises(RuntimeError, match=f"'depthwise' has .*{text}.*here 8 bits.*config="):
            model.load_state_dict(state)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        other.load_state_dict(state)
        copy.deepcopy(other).load_state_dict(state)
        with pytest.raises(RuntimeError, match=f"here .*{text}"):
            nn.Sequential(other).load_state_dict(nn.Sequential(model).state_dict())
    other = fastq.prepare_qat(net, images, skip="depthwise", progress=False)
    model.load_state_dict(other.state_dict(), strict=False)  # what both have is quantized alike
    learned = [fastq.prepare_qat(net, images, config=fastq.QConfig(weight_range=how), learned=True,
                                 progress=False) for how in ("max", "mse")]  # fmt: skip
    learned[0].load_state_dict(learned[1].state_dict())  # their scales are state


def test_a_model_is_pickled_whole(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images)
    train(model, images, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a class of torch's own
        same = pickle.loads(pickle.dumps(model.eval()))
    assert_same(same(images), model(images))
    assert_same(fastq.convert(same)(images), model(images))


def test_what_stays_float_trains_too(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images, skip="depthwise").freeze_batch_norm()
    assert len(fastq.convert(model).programs) == 2
    before = model.get_parameter("depthwise.weight").clone()
    train(model, images)
    assert not torch.equal(model.get_parameter("depthwise.weight"), before)
    assert_same(model.eval()(images), fastq.convert(model)(images))


def test_few_bits(net: nn.Module, images: Tensor) -> None:
    model = fastq.prepare_qat(net, images, config=fastq.QConfig(weight_bits=3), learned=True)
    train(model, images)
    network = fastq.convert(model)
    largest = [abs(s.arguments["weight"].data).max() for s in network.program.steps
               if "weight" in s.arguments]  # fmt: skip
    assert set(largest) <= {2, 3} and 3 in largest
    assert_same(model.eval()(images), network(images))
    again = fastq.prepare_qat(network)
    train(again, images)
    assert_same(again.eval()(images), fastq.convert(again)(images))


def test_a_weight_that_two_layers_share_stays_one() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 6), torch.randn(8, 6)
    model = fastq.prepare_qat(nn.Sequential(layer, nn.ReLU(), layer), x)
    assert len(list(model.parameters())) == 2
    train(model, x)
    assert_same(model.eval()(x), fastq.convert(model)(x))
    one, two = (s.arguments["weight"].data for s in fastq.convert(model).program.steps[1:])
    np.testing.assert_array_equal(one, two)


def test_refusals(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(TypeError, match="wants data"):
        fastq.prepare_qat(net)
    with pytest.raises(TypeError, match="quantized model, which has"):
        fastq.prepare_qat(fastq.quantize_model(net, images, progress=False), images)
    with pytest.raises(ValueError, match="nothing in this ReLU"):
        fastq.prepare_qat(nn.ReLU(), images)
    with pytest.raises(TypeError, match="quantize_model makes"):
        fastq.convert(net)
    model = fastq.prepare_qat(net, images)
    with pytest.raises(TypeError, match="already"):
        fastq.prepare_qat(model, images)
    with pytest.raises(TypeError, match="x is float64"):
        model(images.double())
    with pytest.raises(TypeError, match=r"wanted \(x\)"):
        model(images, images)
    with pytest.raises(ValueError, match="one value per channel"):
        one = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).eval()
        fastq.prepare_qat(one, images)(torch.rand(1, 3, 3, 3))


ASSIGNED = {
    "a half": lambda y, h: y[:, :4].copy_(h[:, 4:]),
    "inner pixels": lambda y, h: y[:, ::2, 1:-1, 2:].copy_(h[:, 1::2, 1:-1, 2:]),
    "one channel": lambda y, h: y[:, 3].copy_(h.mean(1)),
    "all": lambda y, h: y.copy_(2 * h),
    "the same for all": lambda y, h: y[:, :4].copy_(h[:, 4:5]),
    "bool": lambda y, h: y[:, :4].copy_(h[:, 4:] > 100),
}


@pytest.mark.parametrize("name", ASSIGNED)
def test_what_is_assigned_to_a_part_has_a_gradient(images: Tensor, name: str) -> None:
    class Assigned(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            y = h.clone()
            ASSIGNED[name](y, h)
            return y

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Assigned(), nn.Conv2d(8, 4, 1)).eval()
    model = fastq.prepare_qat(net, images)
    y, wanted = model(images), net(images)
    assert (y - wanted).norm() < 0.03 * wanted.norm()
    for given in (y, wanted):
        given.square().mean().backward()
    for name, p in net.named_parameters():
        got = model.get_parameter(name).grad
        assert F.cosine_similarity(p.grad.flatten(), got.flatten(), 0) > 0.99, name
    assert_same(model.eval()(images), fastq.convert(model)(images))


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_what_is_empty_moves_nothing(net: nn.Module, images: Tensor, learned: bool) -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.new_zeros(len(x), 0, 6), x], 1)

    x = torch.randn(4, 5, 8)
    joined = nn.Sequential(nn.Linear(8, 6), Joined(), nn.Linear(6, 2)).eval()
    for float_model, given in ((net, images), (joined, x)):
        model = fastq.prepare_qat(float_model, given, learned=learned)
        kept = copy.deepcopy(model.state_dict())
        y = model(given[:0])
        y = y[0] if isinstance(y, tuple) else y
        assert len(y) == 0
        y.sum().backward()
        assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
        train(model, given, 2)
        assert_same(model.eval()(given), fastq.convert(model)(given))


def test_torch_compile_leaves_it_as_it_is(net: nn.Module, images: Tensor) -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        graphs.append(graph)
        return graph.forward

    model = fastq.prepare_qat(net, images, progress=False)
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    assert train(compiled, images) == train(model, images)
    assert_same(fastq.convert(compiled)(images), model.eval()(images))
    assert_same(compiled.eval()(images[:3]), model(images[:3]))
    assert not graphs


CHANGES = {
    r"head.weight is \(7, 22\)": lambda net: setattr(net, "head", nn.Linear(22, 7)),
    r"head.weight is \(2, 22\)": lambda net: setattr(net, "head", nn.Linear(22, 2)),
    r"point.weight is \(8, 8, 3, 3\)": lambda net: setattr(net, "point", nn.Conv2d(8, 8, 3)),
    "head.bias is gone": lambda net: setattr(net.head, "bias", None),
    "head.weight is gone": lambda net: nn.utils.parametrizations.weight_norm(net.head),
    "norm.running_mean is gone": lambda net: setattr(net, "norm", nn.Identity()),
    "torch.float64; wanted .* torch.float32": nn.Module.double,
}


@pytest.mark.parametrize("message", CHANGES)
def test_layers_are_changed_in_the_float_model(
    net: nn.Module, images: Tensor, message: str
) -> None:
    model = fastq.prepare_qat(net, images, progress=False)
    CHANGES[message](model)
    for act in (lambda: model(images), lambda: fastq.convert(model)):
        with pytest.raises(ValueError, match=message + ".*before fastq.prepare_qat"):
            act()


def test_another_order_in_memory_is_the_same_network(net: nn.Module, images: Tensor) -> None:
    class Patches(nn.Module):
        """Has a filter as a matrix: a view of it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.unfold(x, 3).transpose(1, 2), self.conv.weight.flatten(1))

    for given in (net, Patches().eval()):
        model = fastq.prepare_qat(given, images, progress=False).eval()
        before = model(images)
        assert_same(model.to(memory_format=torch.channels_last)(images), before)
        train(model, images, 1)
        assert all(p.grad.any() for p in model.parameters() if p.dim() == 4)


def train_in_parallel(rank: int, meet: str) -> None:
    """One of two processes, each with half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model = nn.parallel.DistributedDataParallel(fastq.prepare_qat(net.eval(), x, learned=True))
    losses = train(model, x[rank::2], 3)
    assert losses[-1] < losses[0]
    trained = model.eval()(x)
    assert_same(trained, fastq.convert(model)(x))
    both = [torch.empty_like(trained) for _ in range(2)]
    torch.distributed.all_gather(both, trained.detach())
    assert_same(*both)
    torch.distributed.barrier()
    os._exit(0)  # all is checked; torch's threads may abort a process that ends by itself


def test_two_processes_train_one_network(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path / "meet"),), 2)


@pytest.mark.parametrize("fill", [-1e9, -torch.inf])
def test_masks_do_not_widen_the_ranges_of_training(fill: float) -> None:
    """Of scores whose mask is not along the last axis, so that no program knows it as one."""
    torch.manual_seed(0)
    model = call(
        lambda net, x, near: net.o(torch.einsum(
            "bij,bjd->bid",
            (net.s(x) + net.t(x).mT).masked_fill(~near, fill).transpose(1, 2).softmax(1).mT,
            net.v(x),
        )),
        s=lambda: nn.Linear(8, 1), t=lambda: nn.Linear(8, 1), v=lambda: nn.Linear(8, 16),
        o=lambda: nn.Linear(16, 4),
    )().eval()  # fmt: skip
    x, near = torch.randn(8, 12, 8), (torch.rand(8, 12, 12) > 0.6) | torch.eye(12, dtype=torch.bool)
    wanted = model(x, near).detach()
    training = fastq.prepare_qat(
        model, [(x, near)], forward=lambda net, batch: net(*batch), progress=False
    )
    for _ in range(50):
        assert training(x, near).isfinite().all()
    made = fastq.convert(training)
    assert torch.equal(training.eval()(x, near), made(x, near))
    assert noise_ratio(wanted, made(x, near)) > 25


def test_a_number_that_is_a_parameter_is_trained() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Threshold(), nn.Linear(16, 4))
    training = fastq.prepare_qat(model, torch.randn(64, 16), progress=False)
    training(torch.randn(64, 16)).square().sum().backward()
    assert dict(training.named_parameters())["1.least"].grad.abs() > 0


class Threshold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.least = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.least)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_a_model_of_half_precision_is_told_what_to_do(inputs: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).bfloat16(), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"parameters are bfloat16: model\.float\(\) makes them"):
        fastq.prepare_qat(model, x.to(inputs), progress=False)
    fastq.prepare_qat(model.float(), x, progress=False)


@pytest.mark.parametrize("learned", [False, True])
def test_nan_in_an_input_counts_as_0_and_in_no_range(learned: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model = fastq.prepare_qat(net, torch.randn(64, 6), learned=learned, progress=False)
    x = torch.randn(8, 6) * 3
    x[:, 2] = 0
    found = {}
    for value in (0.0, math.nan):
        one, given = copy.deepcopy(model), x.clone()
        given[5, 2] = value
        given.requires_grad_()
        y = one(given)
        y.square().sum().backward()
        assert given.grad is not None and (given.grad[5, 2] == 0) == (value != 0)
        found[value == 0] = [y, *(p.grad for p in one.parameters()), *one.buffers()]
    for zero, nan in zip(found[True], found[False], strict=True):
        assert_same(nan, zero)
