"""QEmbedding and QEmbeddingBag: torch's arguments and results, and their place in models that are
quantized as layers or as one network."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import noise_ratio
from torch import Tensor, nn

import fastq
from fastq import QEmbedding, QEmbeddingBag
from fastq.nn.embedding import LEAST_ROW, look_up

TOKENS = torch.tensor([[0, 3, 7], [49, 3, 0]])


def pair(**given: Any) -> tuple[nn.Embedding, QEmbedding]:
    torch.manual_seed(0)
    module = nn.Embedding(50, 40, **given).eval()
    return module, QEmbedding.from_float(module)


GIVEN: list[dict[str, Any]] = [
    {},
    {"padding_idx": 3},
    {"padding_idx": -1},
    {"max_norm": 2.0},
    {"max_norm": 1.0, "norm_type": 1.0},
    {"sparse": True, "scale_grad_by_freq": True},
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_it_returns_what_torchs_does(given: dict[str, Any]) -> None:
    module, layer = pair(**given)
    before = module.weight.clone()
    for tokens in (TOKENS, TOKENS.int(), TOKENS[0, 0], TOKENS[:0], TOKENS.T):
        with torch.no_grad():
            wanted = module(tokens)
        found = layer(tokens)
        assert found.shape == wanted.shape and found.dtype is torch.float32
        assert not found.numel() or noise_ratio(wanted, found) > 40
        scale = layer.weight_scale[tokens.long()][..., None]
        assert torch.equal(found, layer.weight[tokens.long()] * scale)
    assert layer.padding_idx == module.padding_idx
    if "padding_idx" in given:
        assert not layer(torch.tensor(layer.padding_idx)).any()
    if "max_norm" not in given:
        assert torch.equal(before, module.weight)


def test_copies_and_files(tmp_path: Path) -> None:
    module, layer = pair(padding_idx=3)
    wanted = layer(TOKENS)
    assert torch.equal(copy.deepcopy(layer)(TOKENS), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(TOKENS), wanted)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert sum(t.nbytes for t in layer.state_dict().values()) == 50 * (40 + 4)
    file.seek(0)
    empty = QEmbedding(50, 40, 3)
    empty.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(empty(TOKENS), wanted)
    assert torch.equal(layer.to_float()(TOKENS), wanted)
    fastq.save(layer, tmp_path / "layer.safetensors")
    assert torch.equal(fastq.load(tmp_path / "layer.safetensors", module)(TOKENS), wanted)
    with pytest.raises(ValueError, match="padding_idx"):
        fastq.load(tmp_path / "layer.safetensors", nn.Embedding(50, 40))
    assert repr(layer) == "QEmbedding(50, 40, padding_idx=3, weight=int8 per row)"


def test_compile_and_export() -> None:
    _, layer = pair()
    wanted = layer(TOKENS)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(TOKENS), wanted)
    assert torch.equal(torch.export.export(layer, (TOKENS,)).module()(TOKENS), wanted)


def test_what_is_refused() -> None:
    _, layer = pair()
    with pytest.raises(TypeError, match="wanted int64 or int32 tokens"):
        layer(TOKENS.float())
    with pytest.raises(ValueError, match="wanted the CPU"):
        layer(TOKENS.to("meta"))
    for wrong in (50, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([wrong]))
    with pytest.raises(TypeError, match="tokens, not quantized"):
        layer.set_input_qparams(fastq.choose_qparams(0.0, 1.0))
    layer.set_input_qparams(None)
    with pytest.raises(TypeError, match=r"wanted torch\.nn\.Embedding"):
        QEmbedding.from_float(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        QEmbedding.from_float(nn.Embedding.from_pretrained(torch.full((2, 3), torch.nan)))
    for given in ({"device": "cuda"}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match="wanted None or"):
            QEmbedding(2, 3, **given)
    with pytest.raises(AssertionError, match=r"[Pp]adding_idx"):
        QEmbedding(2, 3, 5)
    with pytest.raises(RuntimeError, match="int8"):
        layer.load_state_dict({"weight": torch.zeros(50, 40), "weight_scale": torch.ones(50)})


BAGS: list[dict[str, Any]] = [
    {},
    {"mode": "sum"},
    {"mode": "max"},
    {"mode": "sum", "padding_idx": 3},
    {"mode": "mean", "padding_idx": -1},
    {"mode": "max", "padding_idx": 3},
    {"mode": "sum", "include_last_offset": True},
    {"mode": "mean", "include_last_offset": True, "padding_idx": 3},
]


@pytest.mark.parametrize("given", BAGS, ids=str)
def test_a_bag_returns_what_torchs_does(given: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.EmbeddingBag(50, 40, **given).eval()
    layer = QEmbeddingBag.from_float(module)
    back = layer.to_float()
    assert layer.made_with(back) == layer.made_with(module)
    tokens, offsets = torch.randint(0, 50, (20,)), torch.tensor([0, 4, 4, 9])
    tokens[::4] = 3
    if given.get("include_last_offset"):
        offsets = torch.cat([offsets, torch.tensor([20])])
    calls: list[tuple[Any, ...]] = [
        (tokens, offsets), (tokens.int(), offsets.int()), (tokens[:0], torch.tensor([0, 0])),
    ]  # fmt: skip
    if given.get("mode") == "sum":
        calls.append((tokens, offsets, torch.rand(20)))
    if not given.get("include_last_offset"):
        calls.append((tokens.reshape(4, 5),))
    for call in calls:
        with torch.no_grad():
            wanted, found = module(*call), layer(*call)
            assert torch.equal(found, back(*call))
        assert not wanted.any() or noise_ratio(wanted, found) > 38
    fastq.save(layer, tmp_path / "bag")
    assert torch.equal(fastq.load(tmp_path / "bag", module)(*calls[0]), layer(*calls[0]))
    other = nn.EmbeddingBag(50, 40, mode="sum" if module.mode != "sum" else "max")
    with pytest.raises(ValueError, match="mode"):
        fastq.load(tmp_path / "bag", other)


def test_bags_that_are_refused() -> None:
    layer = QEmbeddingBag.from_float(nn.EmbeddingBag(50, 40, max_norm=1.0))
    assert float((layer.weight * layer.weight_scale[:, None]).norm(dim=1).max()) < 1.01
    with pytest.raises(TypeError, match=r"QEmbeddingBag: input is .*; wanted int64"):
        layer(torch.zeros(2, 3))
    with pytest.raises(IndexError):
        layer(torch.tensor([[50]]))
    with pytest.raises(TypeError, match=r"wanted torch\.nn\.EmbeddingBag"):
        QEmbeddingBag.from_float(nn.Embedding(2, 3))
    with pytest.raises(TypeError, match="tokens, not quantized"):
        layer.set_input_qparams(fastq.choose_qparams(0.0, 1.0))
    assert repr(layer) == "QEmbeddingBag(50, 40, mode=mean, weight=int8 per row)"


def test_bags_in_a_model() -> None:
    class Clicks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.short = nn.EmbeddingBag(60, 40), nn.EmbeddingBag(60, LEAST_ROW - 1)
            self.last = nn.Linear(40 + LEAST_ROW - 1, 2)

        def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
            bags = self.bag(tokens, offsets), self.short(tokens, offsets)
            return self.last(torch.cat(bags, -1))  # type: ignore[no-any-return]

    model, data = Clicks().eval(), (torch.randint(0, 60, (20,)), torch.tensor([0, 3, 11]))
    got = fastq.quantize_layers(model, strict=True)
    assert rows_of(got) == {"bag": "int8 weight", "last": "int8 dynamic"}
    assert isinstance(got.bag, QEmbeddingBag) and type(got.short) is nn.EmbeddingBag
    assert noise_ratio(model(*data).detach(), got(*data)) > 28


class Words(nn.Module):
    """Two tables, one of them with rows too short to be int8."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(60, 40), nn.Embedding(4, LEAST_ROW - 1)
        self.first, self.last = nn.Linear(40 + LEAST_ROW - 1, 24), nn.Linear(24, 60)
        self.last.weight = nn.Parameter(torch.randn(60, 24) / 5)

    def forward(self, words: Tensor) -> Tensor:
        x = torch.cat([self.words(words), self.kinds(words % 4)], -1)
        y: Tensor = self.last(self.first(x).relu())
        return y


def rows_of(model: nn.Module) -> dict[str, str]:
    return {row.name: row.result for row in fastq.summary(model).rows}


def test_a_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Words().eval(), [torch.randint(0, 60, (4, 7)) for _ in range(4)]
    int8 = fastq.quantize_model(model, data, strict=True, progress=False)
    assert rows_of(int8) == {"words": "int8 weight", "first": "int8 static", "last": "int8 static"}
    assert "1 int8 layer(s) of their own" in repr(int8)
    fastq.save(int8, tmp_path / "words.safetensors")
    loaded = fastq.load(tmp_path / "words.safetensors")
    with torch.no_grad():
        for tokens in (data[0], data[1][:1, :2], torch.randint(0, 60, (9, 12))):
            assert noise_ratio(model(tokens), int8(tokens)) > 28
            assert torch.equal(loaded(tokens), int8(tokens))
        with pytest.raises(IndexError):
            int8(data[0] + 60)
        kept = fastq.quantize_model(model, data, skip="words", progress=False)
        assert rows_of(kept)["words"] == "float"
        report = fastq.report(model, int8, data[:1], passes=1, path=None, progress=False)
    (step,) = (step for step in report.steps if step.op == "fastq.embedding.default")
    assert not step.why and step.snr is not None and step.snr > 40
    assert "words" not in rows_of(fastq.convert(fastq.prepare_qat(model, data)))


def test_rows_that_are_too_short_are_the_reason() -> None:
    with pytest.raises(ValueError, match=r"embedding \(of rows of at least 32 values\)"):
        fastq.quantize_layers(nn.Embedding(10, LEAST_ROW - 1))


def test_layers() -> None:
    torch.manual_seed(0)
    model, tokens = Words().eval(), torch.randint(0, 60, (4, 7))
    int8 = fastq.quantize_layers(model, strict=True)
    assert isinstance(int8.words, QEmbedding) and type(int8.kinds) is nn.Embedding
    assert rows_of(int8)["words"] == "int8 weight"
    assert noise_ratio(model(tokens), int8(tokens)) > 28
    static = fastq.quantize_layers(model, tokens, strict=True)
    assert rows_of(static)["words"] == "int8 weight"


def test_a_table_that_is_read_otherwise_stays_float() -> None:
    class Tied(Words):
        def forward(self, words: Tensor) -> Tensor:
            return self.words(words) @ self.words.weight.T

    model, tokens = Tied().eval(), torch.randint(0, 60, (4, 7))
    int8 = fastq.quantize_layers(model)
    (row,) = (row for row in fastq.summary(int8).rows if row.name == "words")
    assert row.result == "float" and "computes with its weight itself" in row.reason
    assert torch.equal(int8(tokens), model(tokens))


def test_strict_is_not_for_tables_that_are_read_otherwise() -> None:
    class Positions(Words):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(20, 24)
            self.others = nn.Embedding(20, 40)

        def forward(self, words: Tensor) -> Tensor:
            x = torch.cat([self.words(words) + self.others.weight[: words.shape[1]],
                           self.kinds(words % 4)], -1)  # fmt: skip
            y: Tensor = self.last(self.first(x).relu())
            return y

    model, tokens = Positions().eval(), torch.randint(0, 60, (4, 7))
    for function in (fastq.quantize_model, fastq.quantize_layers):
        int8 = function(model, tokens, strict=True, progress=False)  # type: ignore[operator]
        assert rows_of(int8)["words"] == "int8 weight"
        assert rows_of(int8).get("others", "float") == "float"
        assert noise_ratio(model(tokens), int8(tokens)) > 28


def test_look_up_is_one_function() -> None:
    weight, scale = torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([0.1])
    assert torch.equal(look_up(torch.tensor([0]), weight, scale), weight * scale)
