"""int16, which sums are: the same bits as the definition, everywhere, and what it wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import noise_ratio
from numpy.testing import assert_array_equal
from rows import guarded, u8
from torch import nn

import fastq
from fastq import ops, reference
from fastq.kernels import isa as isa_room
from fastq.network import prepare_model
from fastq.ops.checks import as_values
from fastq.program import Program
from fastq.qparams import MAX_WIDE_FEATURES, Requant
from fastq.regions import Ranges
from fastq.steps import Step
from fastq.weights import Conv2dWeight, LinearWeight

DTYPES = [np.uint8, np.int16]
MIXED = [(a, b, c) for a in DTYPES for b in DTYPES for c in DTYPES if np.int16 in (a, b, c)]
SHAPES = [(1,), (3, 7), (2, 5, 33), (4, 129), (2, 3, 4, 64), (5, 1)]


def values(rng: Any, dtype: Any, *shape: int) -> np.ndarray:
    """All of a dtype's range, its ends more often than by chance."""
    if dtype == np.uint8:
        return u8(rng, *shape)
    ends = rng.choice(np.int16([-32768, -1, 0, 32767]), shape)
    return np.where(rng.random(shape) < 0.2, ends, rng.integers(-32768, 32768, shape)).astype(dtype)


def requant(rng: Any, n: int, k: int, dtype: Any, added: Any) -> Requant:
    """One whose result fills its range, and is clamped at both ends."""
    steps = 1 if dtype == np.uint8 else 200
    multiplier = rng.uniform(0.5, 2, n).astype(np.float32) * np.float32(steps / (70 * k**0.5))
    factors = rng.uniform(-1, 1, n) * steps / (1 if added == np.uint8 else 200)
    return Requant(
        multiplier, 0 if dtype == np.int16 else 100, rng.integers(-900, 900, n).astype(np.int32),
        add_multiplier=None if added is None else factors,
        add_zero_point=77 if added == np.uint8 else 0, dtype=dtype,
    )  # fmt: skip


PRODUCTS = [(1, 1, 1), (5, 64, 64), (17, 33, 70), (40, 48, 130), (64, 130, 256), (3, 100, 9)]


@pytest.mark.parametrize("dtype, added", [(np.int16, None), (np.int16, np.uint8),
                                          (np.int16, np.int16), (np.uint8, np.int16)])  # fmt: skip
@pytest.mark.parametrize("m, n, k", PRODUCTS)
def test_linear(isa: str, rng: Any, m: int, n: int, k: int, dtype: Any, added: Any) -> None:
    x, weight = u8(rng, m, k), LinearWeight(rng.integers(-128, 128, (n, k)).astype(np.int8))
    epilogue = requant(rng, n, k, dtype, added)
    add = None if added is None else values(rng, added, m, n)
    want = reference.linear(x, weight, epilogue, x_zero_point=12, add=add)
    out = guarded(np.zeros((m, n), dtype))
    given = None if add is None else guarded(add)
    got = ops.linear(guarded(x), weight, epilogue, x_zero_point=12, add=given, out=out)
    assert got is out
    assert_array_equal(out, want, strict=True)


@pytest.mark.parametrize("dtype, added", [(np.int16, None), (np.int16, np.int16),
                                          (np.uint8, np.int16)])  # fmt: skip
@pytest.mark.parametrize("n, c, groups, size", [(8, 3, 1, 3), (16, 16, 16, 3), (24, 32, 2, 1),
                                                (32, 32, 1, 3)])  # fmt: skip
def test_conv2d(
    isa: str, rng: Any, n: int, c: int, groups: int, size: int, dtype: Any, added: Any
) -> None:
    x = u8(rng, 2, 9, 9, c)
    data = rng.integers(-128, 128, (n, c // groups, size, size)).astype(np.int8)
    weight = Conv2dWeight(data, padding=size // 2, groups=groups)
    epilogue = requant(rng, n, data[0].size, dtype, added)
    add = None if added is None else values(rng, added, 2, 9, 9, n)
    want = reference.conv2d(x, weight, epilogue, x_zero_point=12, add=add)
    got = ops.conv2d(x, weight, epilogue, x_zero_point=12, add=add)
    assert_array_equal(got, want, strict=True)


@pytest.mark.parametrize("a, b, dtype", MIXED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add(threads: int, rng: Any, shape: tuple[int, ...], a: Any, b: Any, dtype: Any) -> None:
    x, y = values(rng, a, *shape), values(rng, b, *shape)
    named: dict[str, Any] = {"a_zero_point": 3, "b_zero_point": 5, "dtype": dtype}
    for left, right in ((x, y), (x, y[..., :1]), (x[:1], y)):
        for multipliers in ((0.6, -0.5), (1e9, 3.0), (2.0**-20, 0.0)):
            want = reference.add(left, right, *multipliers, **named)
            out = guarded(np.zeros_like(want))
            got = ops.add(guarded(left), guarded(right), *multipliers, **named, out=out)
            assert_array_equal(got, want, strict=True)
    clamp = {"qmin": 3, "qmax": 200}
    want = reference.add(x, y, 0.6, 0.5, **named, **clamp)
    assert_array_equal(ops.add(x, y, 0.6, 0.5, **named, **clamp), want, strict=True)
    assert want.min() >= 3 and want.max() <= 200


@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 3, 17), (3, 768), (2, MAX_WIDE_FEATURES)],
                         ids=str)  # fmt: skip
def test_layer_norm(threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    alternating = np.where(np.arange(shape[-1]) % 2, 32767, -32768)
    for x in (
        values(rng, np.int16, *shape),
        np.full(shape, -32768, np.int16),
        np.broadcast_to(alternating, shape).astype(np.int16),
        rng.integers(-3, 4, shape).astype(np.int16),
    ):
        for multiplier, epsilon in ((1.0, 1e-3), (rng.uniform(-60, 60, shape[-1]), 40.0)):
            arguments = multiplier, 3.0, epsilon
            want = reference.layer_norm(x, *arguments, zero_point=100, qmax=250)
            out = guarded(np.zeros_like(want))
            ops.layer_norm(guarded(x), *arguments, zero_point=100, qmax=250, out=out)
            assert_array_equal(out, want)


def test_arrays_that_are_not_aligned(rng: Any) -> None:
    held = values(rng, np.int16, 4 * 33).view(np.uint8)
    x = np.concatenate([held[:1], held])[1:].view(np.int16).reshape(4, 33)
    assert not x.flags.aligned and as_values("x", x).flags.aligned
    assert_array_equal(ops.add(x, x, 0.5, 0.25), reference.add(x, x, 0.5, 0.25))
    want = reference.layer_norm(x, 20.0, 3.0, 1e-3, zero_point=100)
    assert_array_equal(ops.layer_norm(x, 20.0, 3.0, 1e-3, zero_point=100), want)


def test_layer_norm_is_near_torchs(rng: Any) -> None:
    """Of features that differ by orders of magnitude: with uint8 most of them would be 0."""
    real = (rng.normal(size=(9, 64)) * np.where(np.arange(64) == 5, 300, 1)).astype(np.float32)
    want = nn.functional.layer_norm(torch.from_numpy(real), (64,)).numpy()
    errors = []
    for dtype, step in ((np.int16, 1000 / 32767), (np.uint8, 2000 / 255)):
        zero = 0 if dtype == np.int16 else 128
        q = ops.quantize(real, scale=step, zero_point=zero, dtype=dtype)
        out = ops.layer_norm(q, 127 / 8, 0.0, 1e-5 / step**2, zero_point=128)
        errors.append(np.abs((out - 128.0) * 8 / 127 - want).mean())
    assert errors[0] < 8 / 127 / 3  # a third of a step: rounding alone is a quarter
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_floats_to_int16_and_back(rng: Any, axis: int | None) -> None:
    """Lengths around every vector; quotients near every half."""
    for n in (1, 7, 8, 31, 33, 64, 65, 129, 70_000):
        x = ((rng.integers(-33_000, 33_000, (2, n)) + 0.5) * np.float32(0.1)).astype(np.float32)
        x[0, 0], x[1, -1] = np.nan, np.inf
        count = 1 if axis is None else x.shape[axis]
        scale = rng.uniform(0.05, 0.2, count).astype(np.float32) if axis is not None else 0.1
        zero = rng.integers(-32768, 32768, count) if axis is not None else -31000
        for named in ({"scale": scale, "zero_point": zero, "axis": axis}, {"quantize_factor": 9.7}):
            want = reference.quantize(x, **named, dtype=np.int16)
            out = guarded(np.zeros_like(want))
            ops.quantize(guarded(x), **named, dtype=np.int16, out=out)
            assert_array_equal(out, want)
        got = ops.dequantize(out, scale, zero, axis=axis)
        assert_array_equal(got, reference.dequantize(out, scale, zero, axis=axis))
        acc = rng.integers(-(2**31), 2**31, x.shape).astype(np.int32)
        named = {"multiplier": 1e-4 if axis is None else scale * 1e-3, "axis": axis}
        want = reference.requantize(acc, **named, dtype=np.int16, qmin=-30_000)
        assert_array_equal(ops.requantize(acc, **named, dtype=np.int16, qmin=-30_000), want)


REFUSED: dict[str, tuple[Any, str]] = {
    "a zero point": (lambda: Requant(np.float32(1), 3, dtype=np.int16), "zero_point=3 of int16"),
    "a clamp": (lambda: Requant(np.float32(1), qmax=40_000, dtype=np.int16), "qmax <= 32767"),
    "a dtype with fields": (  # equal to int16, and another key
        lambda: Requant(
            np.float32(1), dtype=np.dtype((np.int16, {"low": (np.uint8, 0), "high": (np.uint8, 1)}))
        ),
        "wanted uint8 or int16",
    ),
    "another dtype": (lambda: Requant(np.float32(1), dtype=np.int32), "wanted uint8 or int16"),
    "an addition of another": (
        lambda: ops.linear(
            np.zeros((1, 1), np.uint8), LinearWeight(np.ones((1, 1), np.int8)),
            Requant(np.float32(1), add_multiplier=1.0), add=np.zeros((1, 1), np.int32),
        ),
        r"add is \(1, 1\) int32; wanted \(1, 1\), uint8 or int16",
    ),
    "a sum's zero point": (
        lambda: ops.add(np.zeros(1, np.uint8), np.zeros(1, np.uint8), 1.0, 1.0, zero_point=1,
                        dtype=np.int16),
        "zero_point=1 of int16; wanted 0",
    ),
    "many features": (
        lambda: ops.layer_norm(np.zeros((1, MAX_WIDE_FEATURES + 1), np.int16), 1.0, 0.0, 1.0),
        "exact up to 16384",
    ),
    "affine": (lambda: fastq.choose_qparams(0.0, 1.0, np.int16), "affine int16 is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_int16_cannot_be_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------- networks


def encoder(norm_first: bool, outlier: float) -> nn.Module:
    """A transformer; one of its features is `outlier` times the others in its sums, and small
    after its norms, as in trained ones."""
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, batch_first=True, norm_first=norm_first, activation="gelu"
    )
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False).eval()
    with torch.no_grad():
        for part in model.layers:
            part.linear2.bias[3] += outlier
        for part in model.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight[3] = 0.1
    return model


def noise(model: nn.Module, int8: nn.Module, x: torch.Tensor) -> float:
    """The signal over the noise in decibels, of all features but the outlier."""
    with torch.no_grad():
        real = torch.cat([model(x)[..., :3], model(x)[..., 4:]], -1)
        error = real - torch.cat([int8(x)[..., :3], int8(x)[..., 4:]], -1)
    return float(10 * torch.log10(real.square().sum() / error.square().sum()))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_sums_are_int16(norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With outliers, uint8 loses what int16 keeps; the results are those of the definition."""
    model, x = encoder(norm_first, 100.0), torch.randn(8, 10, 32)
    int8 = fastq.quantize_model(model, x, progress=False)
    program = int8.program
    norms = [step for step in program.steps if step.op == "layer_norm"]
    wide = [step.name for step in norms if program.dtypes[step.inputs[0]] == "int16"]
    assert len(norms) == 5 and len(wide) == (5 if norm_first else 4)  # the last one takes a norm
    assert_array_equal(int8(x), program.reference(x.numpy())[0])
    monkeypatch.setattr(Ranges, "_wide", lambda self, regions: set())
    narrow = fastq.quantize_model(model, x, progress=False)
    assert "int16" not in narrow.program.dtypes.values()
    assert noise(model, int8, x) > noise(model, narrow, x) + 10
    assert noise(model, int8, x) > 25


def test_all_tiers_give_the_same_bits(isa: str) -> None:
    model, x = encoder(True, 30.0), torch.randn(4, 7, 32)
    with isa_room.using("generic"):
        int8 = fastq.quantize_model(model, x, progress=False)
        want = int8(x)
    assert_array_equal(int8(x), want)


def test_what_calibration_did_not_see_is_not_clipped() -> None:
    """Sums have room for twice the range that was seen."""
    model, x = encoder(True, 0.0), torch.randn(8, 10, 32)
    int8 = fastq.quantize_model(model, x, progress=False)
    sums = [s for s in int8.program.steps if int8.program.dtypes[s.name] == "int16"]
    seen = int8.program.values(x.numpy())
    for step in sums:
        assert 8_000 < np.abs(seen[step.name].astype(int)).max() < 16_600


def test_saved_trained_and_converted(tmp_path: Path) -> None:
    model, x = encoder(False, 20.0), torch.randn(16, 10, 32)
    int8 = fastq.quantize_model(model, x, progress=False)
    fastq.save(int8, tmp_path / "model.safetensors")
    loaded = fastq.load(tmp_path / "model.safetensors")
    assert_array_equal(loaded(x), int8(x))
    (alone,) = fastq.load_program(tmp_path / "model.safetensors")(x.numpy())
    assert_array_equal(alone, int8(x))
    for learned in (False, True):
        trained = fastq.prepare_qat(loaded, learned=learned)
        assert_array_equal(trained.eval()(x).detach(), int8(x))
        ranges = {name: r.qparams() for name, r in trained.fastq.items() if name.endswith("s16")}
        assert len(ranges) == 4
        assert not any(name.endswith("s16.scale") for name, _ in trained.named_parameters())
        optimizer = torch.optim.Adam(trained.train().parameters(), 1e-4)
        for _ in range(3):
            loss = (trained(x) - model(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved = {name: trained.fastq[name].qparams() for name in ranges}
        assert all(moved[name].scale != ranges[name].scale for name in ranges)
        assert all(0.9 < moved[name].scale / ranges[name].scale < 1.1 for name in ranges)
        assert_array_equal(fastq.convert(trained)(x), trained.eval()(x).detach())


class Mixed(nn.Module):
    """A sum that a layer norm takes, and somebody who cannot read int16."""

    def __init__(self, also: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.also = also

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.first(x)
        return self.norm(y) + self.also(y)


@pytest.mark.parametrize(
    "also, wide",
    [
        (nn.Identity(), True), (nn.Linear(8, 8), False),
        (nn.Sequential(nn.Sigmoid(), nn.Linear(8, 8)), False),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 8))), True),
    ],
    ids=["add", "linear", "table", "reshape"],
)  # fmt: skip
def test_who_reads_a_sum(also: nn.Module, wide: bool) -> None:
    prepared, _ = prepare_model(Mixed(also), [torch.randn(4, 8)])
    sums = [n for n in prepared.integer_nodes() if n.op in ("add", "linear") and len(n.inputs) == 2]
    assert bool(prepared.ranges.wide & {prepared.ranges.find(n) for n in sums[:1]}) == wide
    x = torch.randn(64, 8)
    model = Mixed(also).eval()
    assert noise(model, fastq.quantize_model(model, x, progress=False), x) > 25


def test_a_sum_of_sums_and_reshapes_between() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(12, 12) for _ in range(3))
            self.norm = nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> Any:
            y = x + self.a(x)
            z = y + self.b(x)
            parts = z.reshape(-1, 2, 6).transpose(1, 2).transpose(1, 2)
            return self.norm(parts[:, 1:]), z

    x = torch.randn(32, 12)
    int8 = fastq.quantize_model(Net().eval(), x, progress=False)
    program = int8.program
    assert sum(dtype == "int16" for dtype in program.dtypes.values()) >= 4
    wanted = {y.ndim: y for y in program.reference(x[:5].numpy())}  # in any order
    for got in int8(x[:5]):
        assert_array_equal(got, wanted[got.ndim])


class Merging(nn.Module):
    """Neighbours of a sum side by side, and its edge padded, before a norm: as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            self.second.bias[3] = 100.0
            self.norm.weight[3] = self.norm.weight[11] = 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = nn.functional.pad(y + self.second(y), (0, 0, 1, 0))
        return self.norm(torch.cat([y[:, ::2], y[:, 1::2]], -1))


class Outside(nn.Module):
    """A sum in each of two programs, with a norm between them that is asked to stay float."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x) + x)
        return self.second(y) + y


@pytest.mark.parametrize("model, skip, count", [
    (Merging(), (), 5),
    (Outside(nn.LayerNorm(8)), nn.LayerNorm, 2), (Outside(nn.LayerNorm((7, 8))), (), 3),
    (Outside(nn.Tanh()), (), 1),
], ids=["concat and pad", "float norm",
        "norm of two axes", "outputs"])  # fmt: skip
def test_which_values_are_int16(
    threads: int, model: nn.Module, skip: Any, count: int, tmp_path: Path
) -> None:
    model, x = model.eval(), torch.randn(16, 7, 8)
    int8 = fastq.quantize_model(model, x, skip=skip, progress=False)
    dtypes = [dtype for program in int8.programs for dtype in program.dtypes.values()]
    assert dtypes.count("int16") == count
    assert len(int8.programs) == (2 if skip else 1)
    for given in (x, x[:3]):
        want = int8(given)
        if not skip:
            assert_array_equal(want, int8.program.reference(given.numpy())[0])
    with torch.no_grad():
        error = int8(x) - model(x)
    assert error.square().sum() < model(x).square().sum() * 10**-3
    fastq.save(int8, tmp_path / "model.safetensors")
    loaded = fastq.load(tmp_path / "model.safetensors")
    assert_array_equal(loaded(x), int8(x))
    trained = fastq.prepare_qat(loaded).eval()
    with torch.no_grad():
        assert_array_equal(trained(x), int8(x))
    of_floats = fastq.prepare_qat(model, x, skip=skip).state_dict()
    assert all(of_floats[name].shape == t.shape for name, t in trained.named_parameters())


def test_a_file_says_which_values_are_int16() -> None:
    """One that was written where another choice was made is read as it was written."""
    model, x = Outside(nn.LayerNorm(8)).eval(), torch.randn(16, 7, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranges, "_wide", lambda self, regions: set())
        narrow = fastq.quantize_model(model, x, progress=False)
    with torch.no_grad():
        trained = fastq.prepare_qat(narrow).eval()
        assert_array_equal(trained(x), narrow(x))
    assert "int16" not in fastq.convert(trained).program.dtypes.values()
    recipe = narrow.layout.recipe["values"]
    recipe[next(iter(recipe))][1:] = [3, "int16"]
    with pytest.raises(ValueError, match="zero_point=3 of int16; wanted 0"):
        fastq.prepare_qat(narrow)


def test_a_token_that_is_far_smaller_than_those_beside_it() -> None:
    """Vision transformers: the token of the class starts as next to nothing."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
            self.token = nn.Parameter(0.02 * torch.randn(1, 1, 16))
            self.places = nn.Parameter(0.02 * torch.randn(1, 17, 16))
            self.norm = nn.LayerNorm(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.patch(x).flatten(2).transpose(1, 2)
            y = torch.cat((self.token.expand(len(y), -1, -1), y), 1) + self.places
            return self.head(self.norm(y))

    torch.manual_seed(0)
    model, x = Patches().eval(), 3 * torch.randn(16, 3, 16, 16)
    int8 = fastq.quantize_model(model, x, progress=False)
    with torch.no_grad():
        assert noise_ratio(model(x)[:, 0], int8(x)[:, 0]) > 30
    dtypes = [int8.program.dtypes[s.name] for s in int8.program.steps if s.op == "concat"]
    assert dtypes == ["int16"]


def test_the_observer_that_was_asked_for() -> None:
    """int16 has the range that a user's observer finds, and twice that."""

    class Fixed(fastq.MinMaxObserver):
        def qparams(self) -> Any:
            return fastq.choose_qparams(-40.0, 50.0)

    model, x = Outside(nn.LayerNorm(8)).eval(), torch.randn(16, 7, 8)
    config = fastq.QConfig(observer=Fixed)
    int8 = fastq.quantize_model(model, x, config=config, progress=False)
    ends = [s for s in int8.program.steps if s.op == "dequantize"]
    assert [int8.program.dtypes[s.inputs[0]] for s in ends] == ["int16"]
    assert ends[0].arguments["scale"] == pytest.approx(2 * 50 / 32767, rel=1e-2)


def test_dtypes_are_not_mixed_in_a_concatenation() -> None:
    model, x = Merging().eval(), torch.randn(4, 7, 8)
    program = fastq.quantize_model(model, x, progress=False).program
    steps = list(program.steps)
    at = next(i for i, step in enumerate(steps) if step.op == "concat")
    first = next(step.name for step in steps if program.dtypes[step.name] == "uint8")
    mixed = Step("concat", steps[at].name, (first, steps[at].inputs[1]), steps[at].arguments)
    with pytest.raises(ValueError, match=r"concatenates.*wanted one dtype"):
        Program(program.inputs, (*steps[:at], mixed, *steps[at + 1 :]), program.outputs,
                program.extents)  # fmt: skip


@pytest.mark.parametrize("axes", [slice(None), slice(1, None), slice(1, 2)], ids=str)
def test_a_norm_of_as_many_features_as_the_example_has(axes: slice) -> None:
    """It stays float: its shape follows the input's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x) + x
            y = y.transpose(1, 2) if axes.stop else y
            return nn.functional.layer_norm(y, x.shape[axes])

    model = Net().eval()
    int8 = fastq.quantize_model(model, torch.randn(16, 7, 8), progress=False)
    for shape in ((16, 7, 8), (3, 7, 8), (5, 9, 8)):
        assert noise(model, int8, torch.randn(shape)) > 25
