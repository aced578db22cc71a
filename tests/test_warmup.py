"""The table of kernels to compile ahead of time: it has all that a layer can ask for."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastq
from fastq import commands
from fastq.kernels import executor, warmup
from fastq.kernels import isa as isa_room
from fastq.kernels.assembly import name
from fastq.kernels.call import Calls
from fastq.kernels.native import Kernel
from fastq.ops import elementwise, ranges
from fastq.qparams import Dequant, QParams, Requant
from fastq.weights import Conv2dWeight, LinearWeight

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not an installed package

from benchmarks import shapes

SCALE = np.array(0.1, np.float32)


def listed(tier: str, network: str | None = None) -> set[str]:
    return {name(factory.__name__, args) for factory, args in warmup.kernels(tier, network)}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """From here on nothing is compiled or run: the names of the kernels that calls ask for."""
    names: set[str] = set()

    def asked(factory: Any) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            names.add(name(factory.__name__, arguments))
            return SimpleNamespace(address=-1, entry=None)

        return kernel

    for factory in {row.factory for row in warmup.FAMILIES}:
        monkeypatch.setattr(sys.modules[factory.__module__], factory.__name__, asked(factory))

    monkeypatch.setattr(ranges, "_range_calls", Calls())  # no later test may find these there
    monkeypatch.setattr(elementwise, "_walks", {})

    def run(table: executor.Table, bases: tuple[int, ...]) -> None:
        kernels = table.rows[:, executor.KERNEL]
        assert (kernels == -1).all(), "a kernel whose factory has no row"

    monkeypatch.setattr(executor, "run", run)
    return names


def call_linear(m: int, n: int, k: int) -> None:
    weight = LinearWeight(np.ones((n, k), np.int8))
    x = np.zeros((m, k), np.uint8)
    for epilogue in (None, Requant(SCALE), Dequant(SCALE)):
        fastq.linear(x, weight, epilogue)
    for qparams in (None, QParams(SCALE)):
        fastq.linear_float(x.astype(np.float32), weight, Dequant(SCALE), x_qparams=qparams)


def call_conv(h: int, w: int, weight: Conv2dWeight) -> None:
    x = np.zeros((1, h, w, weight.c), np.uint8)
    for epilogue in (None, Requant(SCALE), Dequant(SCALE)):
        fastq.conv2d(x, weight, epilogue)
    for qparams in (None, QParams(SCALE)):
        fastq.conv2d_float(x.astype(np.float32), weight, Dequant(SCALE), x_qparams=qparams)


def test_every_factory_has_a_row() -> None:
    names = [path.stem for path in Path(warmup.__file__).parent.glob("*.py")]
    rooms = [vars(import_module(f"fastq.kernels.{name}")) for name in names if name[0] != "_"]
    factories = {
        value
        for room in rooms
        for key, value in room.items()
        if key.endswith("_kernel") and key[0] != "_"
    }
    assert factories <= {row.factory for row in warmup.FAMILIES}


def test_a_factory_takes_its_row(isa: str) -> None:
    for factory, arguments in warmup.kernels(isa):
        inspect.signature(factory).bind(*arguments)
        assert factory.cache_info().maxsize is None  # made once; `warmup` counts them by it


def test_all_that_layers_use_is_listed(isa: str, used: set[str]) -> None:
    for m in (1, 2, 50):
        call_linear(m, 40, 30)
        call_linear(m, 3, 128)
    for c, n, kernel, stride, groups in [
        (32, 40, 1, 1, 1), (16, 16, 3, 2, 1), (3, 8, 3, 1, 1), (32, 32, 3, 1, 4),
        (64, 64, 3, 1, 64), (33, 33, 3, 2, 33), (16, 32, 3, 1, 16), (64, 4, 3, 1, 1),
    ]:  # fmt: skip
        data = np.ones((n, c // groups, kernel, kernel), np.int8)
        call_conv(9, 11, Conv2dWeight(data, stride, kernel // 2, groups=groups))
    for n, size in ((16, 8), (24, 7), (16, 14), (6, 9)):  # float images, channel by channel
        layer = fastq.QConv2d(32, n, 1)
        with torch.no_grad():
            layer(torch.zeros(2, 32, size, size))
    assert used and used <= listed(isa)


def test_all_that_arrays_use_is_listed(used: set[str]) -> None:
    x, rows = np.zeros((3, 4), np.float32), np.ones(3, np.float32)
    for dtype in (np.uint8, np.int8, np.int32):
        for scale, axis in ((1.0, None), (rows, 0), (np.ones(4, np.float32), 1)):
            q = fastq.quantize(x, scale=scale, axis=axis, dtype=dtype)
            fastq.dequantize(q, scale, axis=axis)
            fastq.requantize(x.astype(np.int32), scale, axis=axis, dtype=dtype)
        fastq.quantize(x, 2.0, dtype=dtype)
    fastq.dynamic_qparams(x)
    assert len(used) == 33 and used <= listed(isa_room.current())


@pytest.mark.parametrize(
    "network, layers",
    [
        ("resnet50", shapes.NETWORKS["resnet50"]),
        ("mobilenet", shapes.NETWORKS["mobilenet_v2"]),
        ("bert", [row for row in shapes.TRANSFORMERS["bert_base"] if row.count == 12]),
    ],
)
def test_a_network_has_its_kernels(network: str, layers: list[Any], used: set[str]) -> None:
    for row in layers:
        if isinstance(row, shapes.Gemm):
            call_linear(row.m, row.n, row.k)
        else:
            data = np.ones((row.n, row.c // row.groups, row.kh, row.kw), np.int8)
            weight = Conv2dWeight(data, row.stride, row.padding, row.dilation, row.groups)
            call_conv(row.h, row.w, weight)
    assert used and used <= listed(isa_room.current(), network)
    assert listed(isa_room.current(), network) < listed(isa_room.current())


def test_what_was_compiled_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time in a process nothing is compiled; in the next one the disk cache has it."""
    families = [row for row in warmup.FAMILIES if "range" in row.factory.__name__]
    monkeypatch.setattr(warmup, "FAMILIES", families)
    fastq.warmup()
    seen: list[Any] = []
    again = fastq.warmup(progress=lambda kernels: seen.extend(kernels) or kernels)
    assert (again.kernels, again.compiled, len(seen)) == (2, 0, 2)
    assert "all were in the cache" in str(again)
    for row in families:
        row.factory.cache_clear()
    assert fastq.warmup().compiled == 0


def test_a_kernel_that_the_cache_lacks_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "kernels", lambda tier, network: [(factory, ())])

    @functools.cache
    def factory() -> Kernel:
        return Kernel(print, 0, compiled=True)

    assert str(fastq.warmup()).endswith("1 compiled, 0 read from the cache")


def test_what_cannot_be_warmed_up() -> None:
    with pytest.raises(ValueError, match="wanted one of bert, resnet50, mobilenet, lstm"):
        fastq.warmup("alexnet")
    with pytest.raises(ValueError, match="wanted one of amx_int8"):
        fastq.warmup(isa="mmx")


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    families = [row for row in warmup.FAMILIES if "range" in row.factory.__name__]
    monkeypatch.setattr(warmup, "FAMILIES", families)
    result = CliRunner().invoke(commands.cli, ["warmup", "--isa", "generic"])
    assert result.exit_code == 0, result.output
    assert "2 kernels for generic" in result.output and "2/2" in result.output
    result = CliRunner().invoke(commands.cli, ["warmup", "--network", "alexnet"])
    assert result.exit_code == 2 and "wanted one of bert" in result.output


class Encoder(nn.Module):
    """Attention with a mask of keys, norms before or after it; ids in, as a transformer's."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.words = nn.Embedding(50, 32)
        self.places = nn.Parameter(torch.randn(10, 32))
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids) + self.places)
        return self.head(self.layers(x, src_key_padding_mask=hidden))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_a_whole_encoder_has_its_kernels(
    isa: str, norm_first: bool, request: pytest.FixtureRequest
) -> None:
    """Programs ask for more than layers do: sums in int16, softmax, ways in and out."""
    ids, hidden = torch.randint(0, 50, (4, 10)), torch.zeros(4, 10, dtype=torch.bool)
    hidden[1:, 7:] = True
    model = Encoder(norm_first).eval()
    int8 = fastq.quantize_model(model, [{"ids": ids, "hidden": hidden}], progress=False)
    assert "int16" in int8.programs[0].dtypes.values()
    used = request.getfixturevalue("used")
    int8(ids[:2], hidden[:2])
    assert len(used) >= 15
    assert used <= listed(isa, "bert")
