"""QMultiheadAttention: torch's arguments, masks and results, and its place in models."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import noise_ratio
from torch import Tensor, nn

import fastq
from fastq import QLinear, QMultiheadAttention

E, HEADS, B, L, S = 32, 4, 3, 7, 5

GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other widths": {"kdim": 24, "vdim": 40},
    "other keys alone": {"kdim": 24, "batch_first": True},
    "bias of keys": {"add_bias_kv": True, "batch_first": True},
    "a key of zeros": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 24, "vdim": 40, "bias": False},
}


def pair(given: dict[str, Any]) -> tuple[nn.MultiheadAttention, QMultiheadAttention]:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, HEADS, **given).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.normal_()  # torch's biases are 0
    return module, QMultiheadAttention.from_float(module)


def inputs(module: Any) -> list[Tensor]:
    sizes = (L, module.embed_dim), (S, module.kdim), (S, module.vdim)
    xs = [torch.randn(B, *size) for size in sizes]
    return xs if module.batch_first else [x.transpose(0, 1) for x in xs]


def masks() -> dict[str, dict[str, Any]]:
    padding = torch.arange(S) >= torch.tensor([[5], [3], [1]])
    attention = torch.rand(L, S) < 0.4
    attention[:, 0] = False
    added = torch.randn(L, S)
    each = added * torch.arange(1.0, 1 + B * HEADS)[:, None, None]
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "added padding": {"key_padding_mask": torch.zeros(B, S).masked_fill(padding, -9.0)},
        "attention": {"attn_mask": attention},
        "added": {"attn_mask": added},
        "of each head": {"attn_mask": each},
        "both": {"attn_mask": attention, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True},
    }


@pytest.mark.parametrize("mask", masks(), ids=str)
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
def test_it_returns_what_torchs_does(given: dict[str, Any], mask: str) -> None:
    module, layer = pair(given)
    torch.manual_seed(1)
    xs, kept = inputs(module), masks()[mask]
    if given.keys() & {"add_bias_kv", "add_zero_attn"}:
        kept.pop("is_causal", None)  # torch then masks the keys that it adds
    for need, average in itertools.product((True, False), (True, False)):
        how = {"need_weights": need, "average_attn_weights": average}
        with torch.no_grad():
            (y, weights), (made, found) = module(*xs, **kept, **how), layer(*xs, **kept, **how)
        assert made.shape == y.shape and noise_ratio(y, made) > 28
        assert (found is None) == (weights is None)
        if found is not None and weights is not None:
            assert found.shape == weights.shape
            assert float((found - weights).abs().max()) < 0.06


def test_projections_are_linear_layers() -> None:
    """The same bits as four QLinears around torch's attention."""
    for given in ({}, {"batch_first": True, "kdim": 24}):
        module, layer = pair(given)
        xs = inputs(module)
        found = layer(*xs, need_weights=False)[0]
        if not module.batch_first:
            xs, found = [x.transpose(0, 1) for x in xs], found.transpose(0, 1)
        q, k, v = (
            QLinear.from_float(layer.get_submodule(name).to_float())(x)  # type: ignore[operator]
            .unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name, x in zip(("q_proj", "k_proj", "v_proj"), xs, strict=True)
        )  # fmt: skip
        made = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        assert torch.equal(found, layer.out_proj(made))  # type: ignore[operator]


def test_unbatched_and_empty() -> None:
    module, layer = pair({"batch_first": True})
    xs = inputs(module)
    padding = torch.arange(S) > 2
    for mask in (None, padding):
        both = None if mask is None else mask.expand(B, S)
        y, _ = layer(*xs, key_padding_mask=both)
        one, own = layer(*(x[0] for x in xs), key_padding_mask=mask)
        assert one.shape == (L, E) and torch.allclose(one, y[0], atol=1e-5)
        assert own is not None and own.shape == (L, S)
    assert layer(*(x[:0] for x in xs))[0].shape == (0, L, E)


def test_back_to_float() -> None:
    for given in GIVEN.values():
        module, layer = pair(given)
        back, xs = layer.to_float(), inputs(module)
        assert noise_ratio(module(*xs)[0].detach(), back(*xs)[0].detach()) > 35
        again = QMultiheadAttention.from_float(back)
        assert all(torch.equal(a, b) for a, b in zip(
            layer.state_dict().values(), again.state_dict().values(), strict=True))  # fmt: skip
        assert layer.made_with(back) == layer.made_with(module)


def test_copies_and_files(tmp_path: Path) -> None:
    module, layer = pair(GIVEN["all"])
    xs = inputs(module)
    layer.get_submodule("q_proj").set_input_qparams(fastq.choose_qparams(-4.0, 4.0))  # type: ignore[operator]
    wanted = layer(*xs)[0]
    assert torch.equal(copy.deepcopy(layer)(*xs)[0], wanted)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(*xs)[0], wanted)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = QMultiheadAttention(E, HEADS, **GIVEN["all"])
    empty.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(empty(*xs)[0], wanted)
    fastq.save(layer, tmp_path / "layer")
    assert torch.equal(fastq.load(tmp_path / "layer", module)(*xs)[0], wanted)
    with pytest.raises(ValueError, match="num_heads"):
        fastq.load(tmp_path / "layer", nn.MultiheadAttention(E, 2, **GIVEN["all"]))
    assert repr(layer).startswith(
        "QMultiheadAttention(\n  embed_dim=32, num_heads=4, dropout=0.0, add_zero_attn=True, "
        "kdim=24, vdim=40, batch_first=False, bias=False, add_bias_kv=True\n  (q_proj): QLinear("
    )


@pytest.mark.parametrize("need_weights", [True, False])
def test_compile_and_export(need_weights: bool) -> None:
    _, layer = pair({"batch_first": True})
    x, padding = torch.randn(B, L, E), torch.arange(L) >= torch.tensor([[7], [5], [3]])
    given = {"key_padding_mask": padding, "need_weights": need_weights}
    wanted = layer(x, x, x, **given)[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, x, x, **given)[0], wanted)
    exported = torch.export.export(layer, (x, x, x), given).module()
    assert torch.equal(exported(x, x, x, **given)[0], wanted)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_what_is_refused() -> None:
    module, layer = pair({"batch_first": True})
    q, k, v = inputs(module)
    wrong: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((q, k[:2], v), {}, "one batch"),
        ((q, k, v[:, :3]), {}, "one length"),
        ((q[0], k, v), {}, "3 axes each"),
        ((q[..., :8], k, v), {}, "QLinear: x is"),
        ((q, k, v), {"attn_mask": torch.zeros(L, L)}, "attn_mask"),
        ((q, k, v), {"key_padding_mask": torch.zeros(B, L)}, "key_padding_mask"),
        (
            (q[0], k[0], v[0]),
            {"key_padding_mask": torch.zeros(L)},
            rf"mask \({L},\); wanted \({S},\)",
        ),
        ((q, k, v), {"is_causal": True}, "is_causal says"),
    ]
    for arguments, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            layer(*arguments, **given)
    for name in ("attn_mask", "key_padding_mask"):
        mask = torch.ones((L, S) if name == "attn_mask" else (B, S), dtype=torch.int64)
        with pytest.raises(TypeError, match="a mask is torch.int64; wanted bool"):  # noqa: RUF043
            layer(q, k, v, **{name: mask})
    with pytest.raises(TypeError):
        layer(*(x.to("meta") for x in (q, k, v)))
    biased = QMultiheadAttention.from_float(pair({"add_bias_kv": True})[0])
    assert biased.half().double().bias_k.dtype is torch.float32  # type: ignore[union-attr]
    unknown = pair({"add_bias_kv": True})[0]
    torch.nn.init.constant_(unknown.bias_k, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"QMultiheadAttention.from_float: bias_k has N"):
        QMultiheadAttention.from_float(unknown)
    with pytest.raises(RuntimeError, match="requires grad"):
        layer(q.requires_grad_(), k, v)
    with pytest.raises(TypeError, match="float64"):
        layer(q.detach().double(), k, v)
    for sizes in ((30, 4), (0, 1), (8, 0)):
        with pytest.raises(
            ValueError, match=r"^QMultiheadAttention: (embed_dim|num_heads)=.*wanted"
        ):
            QMultiheadAttention(*sizes)
    with pytest.raises(TypeError, match=r"wanted torch\.nn\.MultiheadAttention"):
        QMultiheadAttention.from_float(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wanted None or"):
        QMultiheadAttention(8, 2, device="cuda")
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with pytest.raises(ValueError, match="nested tensors are taken"):
        layer(nested, nested, nested)


class Pair(nn.Module):
    """torch's whole transformer: attention to itself and to another sequence, both masked."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(E, HEADS, 1, 2, 48, batch_first=True, norm_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        ahead = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = torch.zeros(source.shape[:2], dtype=torch.bool)
        padding[1:, -2:] = True
        y: Tensor = self.net(
            source, target, tgt_mask=ahead, tgt_is_causal=True, src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )  # fmt: skip
        return y


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_a_whole_transformer_as_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pair().eval()
    data = torch.randn(B, 9, E), torch.randn(B, L, E)

    def forward(network: nn.Module, batch: Any) -> Any:
        return network(*batch)

    with torch.no_grad():
        wanted = model(*data)
    for given in ({}, {"calibration_data": [data], "forward": forward}):
        got = fastq.quantize_layers(model, strict=True, progress=False, **given)  # type: ignore[arg-type]
        rows = fastq.summary(got).rows
        attention = [row for row in rows if row.kind == "MultiheadAttention"]
        assert len(attention) == 5 and {row.result for row in attention} == {"int8 dynamic"}
        assert len(rows) == 5 + 6
        assert noise_ratio(wanted, got(*data)) > 27
        fastq.save(got, tmp_path / "net")
        loaded = fastq.load(tmp_path / "net", Pair())
        assert torch.equal(loaded(*data), got(*data))
