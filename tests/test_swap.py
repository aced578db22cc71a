import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastq
from fastq.nn import QConv2d, QLinear
from fastq.qconfig import QConfig
from fastq.qparams import MAX_K, choose_qparams
from fastq.quantization import quantize_model
from fastq.serialize import load, save
from fastq.summaries import QuantizationSummary, summary
from fastq.swap import fold_batch_norm, quantize_layers
from fastq.trace import trace


def results(model: nn.Module) -> dict[str, str]:
    return {row.name: row.result for row in summary(model).rows}


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in summary(model).rows}


def sqnr(wanted: Tensor, got: Tensor) -> float:
    """Signal to quantization noise in decibels."""
    noise = (wanted - got).double().square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise))


def randomize_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2)
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, std=0.3)


class Block(nn.Module):
    """Residual; a dense and a depthwise convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.bn2 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.dense(x)))
        return F.relu(x + self.bn2(self.depthwise(y)))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Block(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding_mode="reflect", padding=1)
        self.hidden = nn.Linear(12, 16)
        self.bn = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 10)
        randomize_batch_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.block(self.stem(x))).mean((2, 3))
        return self.head(F.relu(self.bn(self.hidden(x))))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x if shift is None else x + shift)


LAYERS = ("stem.0", "block.dense", "block.depthwise", "grouped", "hidden", "head")
BATCH_NORMS = ("stem.1", "block.bn1", "block.bn2", "bn")


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def test_a_residual_network_becomes_static_int8_and_keeps_its_answers() -> None:
    model, x = Cnn().eval(), images()
    got = quantize_layers(model, x, strict=True)
    assert type(got) is Cnn and not got.training
    assert results(got) == dict.fromkeys(LAYERS, "int8 static") | dict.fromkeys(
        BATCH_NORMS, "folded"
    )
    assert reasons(got)["block.bn2"] == "into 'block.depthwise'"
    assert isinstance(got.stem[0], QConv2d) and isinstance(got.head, QLinear)
    assert all(isinstance(got.get_submodule(name), nn.Identity) for name in BATCH_NORMS)
    assert not any(p.requires_grad for p in got.parameters())
    with torch.no_grad():
        wanted = model(x)
    assert sqnr(wanted, got(x)) > 30


def test_the_given_model_stays_as_it_is() -> None:
    model = Cnn().train()
    before = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    quantize_layers(model, images())
    assert model.training and type(model.head) is nn.Linear
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_inplace_changes_the_given_model() -> None:
    model = Mlp()
    assert quantize_layers(model, torch.randn(2, 4), inplace=True) is model
    assert isinstance(model.a, QLinear)


def test_input_ranges_are_those_of_the_data() -> None:
    model, batches = Mlp(), [torch.randn(5, 4) * 3, torch.randn(2, 4)]
    got = quantize_layers(model, batches)
    x = torch.cat(batches)
    assert got.a.input_qparams == choose_qparams(x.min(), x.max())
    with torch.no_grad():
        hidden = max(F.relu(model.a(batch)).max() for batch in batches)
    assert got.b.input_qparams == choose_qparams(0, hidden)


def test_without_data_every_layer_is_dynamic_and_batch_norm_is_folded_all_the_same() -> None:
    model, x = Cnn().eval(), images()
    got = quantize_layers(model)
    assert {results(got)[name] for name in LAYERS} == {"int8 dynamic"}
    assert {results(got)[name] for name in BATCH_NORMS[:3]} == {"folded"}
    # without data nothing says that its input has two axes
    assert results(got)["bn"] == "float"
    assert reasons(got)["head"] == "no calibration data"
    with torch.no_grad():
        assert sqnr(model(x), got(x)) > 30


def test_a_layer_that_the_data_never_reaches_is_dynamic() -> None:
    class Two(Mlp):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            return self.a(x) if len(x) < 8 else self.b(self.a(x))

    got = quantize_layers(Two(), torch.randn(2, 4))
    assert results(got) == {"a": "int8 static", "b": "int8 dynamic"}
    assert "never reached" in reasons(got)["b"]
    assert got(torch.randn(9, 4)).shape == (9, 3)


def test_a_layer_that_sees_no_finite_value_is_dynamic() -> None:
    got = quantize_layers(Mlp(), torch.full((2, 4), torch.nan))
    assert results(got)["a"] == "int8 dynamic" and "no finite value" in reasons(got)["a"]


# --- calibration data


def run_labelled(model: nn.Module, batch: Any) -> None:
    model(batch["pixels"])


X = torch.linspace(-1, 2, 24).reshape(6, 4)


@pytest.mark.parametrize(
    ("data", "forward"),
    [
        pytest.param(X, None, id="tensor"),
        pytest.param({"x": X}, None, id="dict"),
        pytest.param([X[:2], X[2:]], None, id="tensors"),
        pytest.param([(X[:3], torch.zeros(3)), (X[3:], torch.zeros(3))], None, id="pairs"),
        pytest.param([[{"x": X}, "label"]], None, id="list of dict"),
        pytest.param((X[i : i + 1] for i in range(6)), None, id="generator"),
        pytest.param(DataLoader(TensorDataset(X, X), batch_size=4), None, id="loader"),
        pytest.param([{"pixels": X}], run_labelled, id="forward"),
    ],
)
def test_every_kind_of_data_gives_the_same_ranges(data: Any, forward: Any) -> None:
    got = quantize_layers(Mlp(), data, forward=forward)
    assert got.a.input_qparams == choose_qparams(-1, 2)


def test_a_dict_passes_all_arguments() -> None:
    model, shift = Mlp(), torch.full((6, 6), 100.0)
    assert float(quantize_layers(model, {"x": X, "shift": shift}).b.input_qparams.scale) > 0.3
    assert float(quantize_layers(model, {"x": X}).b.input_qparams.scale) < 0.3


class Samples(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X.split(2))


@pytest.mark.parametrize("data", [Samples(), DataLoader(Samples(), batch_size=None)])
def test_an_iterable_dataset_gives_batches(data: Any) -> None:
    """Of a number that nobody knows: the loader's __len__ raises TypeError."""
    assert quantize_layers(Mlp(), data).a.input_qparams == choose_qparams(-1, 2)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        pytest.param([], ValueError, "no batches", id="empty"),
        pytest.param(iter(()), ValueError, "no batches", id="used up"),
        pytest.param(3, TypeError, "is a int, wanted a tensor", id="int"),
        pytest.param(X.numpy(), TypeError, "batch is a ndarray", id="numpy"),
        pytest.param(["x"], TypeError, "batch is a str", id="str"),
        pytest.param([()], TypeError, "batch is a tuple;", id="empty tuple"),
        pytest.param([(1, X)], TypeError, "is a tuple that starts with a int", id="label first"),
        pytest.param(
            (X, torch.arange(6)), TypeError, r"float32 and int64.*\[\(inputs, l", id="one pair"
        ),
        pytest.param(TensorDataset(X), TypeError, "single samples", id="dataset"),
    ],
)
def test_data_of_a_wrong_kind_is_refused(data: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_layers(Mlp(), data)


def test_an_error_of_the_model_says_which_batch_it_was() -> None:
    with pytest.raises(RuntimeError) as caught:
        quantize_layers(Mlp(), [torch.randn(2, 4), torch.randn(2, 5)])
    assert "calibration batch 1" in caught.value.__notes__[0]


def test_a_model_of_two_inputs_is_told_how_to_get_both() -> None:
    class Adds(Mlp):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, shift)

    data = [(X, torch.ones(6, 6))]
    with pytest.raises(TypeError) as caught:
        quantize_layers(Adds(), data)
    assert "forward=lambda model, batch: model(*batch)" in caught.value.__notes__[1]
    got = quantize_layers(Adds(), data, forward=lambda model, batch: model(*batch))
    assert set(results(got).values()) == {"int8 static"}


def test_hooks_are_gone_after_an_error() -> None:
    model = Mlp()
    with pytest.raises(RuntimeError):
        quantize_layers(model, torch.randn(2, 5), inplace=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_bar_is_silent_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_layers(Mlp(), X, progress=False)
    assert capsys.readouterr() == ("", "")


# --- which layers


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Bilinear(2, 2, 1)], ids=["no layer", "bilinear"])
def test_a_model_without_a_layer_to_quantize_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no layer of this"):
        quantize_layers(model)


@pytest.mark.parametrize("model", [3, Mlp, None])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="wanted a torch"):
        quantize_layers(model)


def test_a_model_that_is_one_layer() -> None:
    x = torch.randn(3, 4)
    got = quantize_layers(nn.Linear(4, 2), x)
    assert isinstance(got, QLinear) and results(got) == {"": "int8 static"}
    assert results(quantize_layers(nn.Linear(4, 2))) == {"": "int8 dynamic"}


@pytest.mark.parametrize(
    ("skip", "floats"),
    [
        ("head", {"head"}),
        ("block", {"block.dense", "block.depthwise", "block.bn1", "block.bn2"}),
        (["h*", "stem.0"], {"head", "hidden", "bn", "stem.0", "stem.1"}),
        (nn.Linear, {"head", "hidden", "bn"}),
        ([Block, nn.Linear], {"block.dense", "block.depthwise", "block.bn1", "block.bn2"}
         | {"head", "hidden", "bn"}),
        ("bn", {"bn"}),
    ],
    ids=["name", "block", "patterns", "type", "types", "batch norm"],
)  # fmt: skip
def test_skip_keeps_layers_float_and_strict_accepts_it(skip: Any, floats: set[str]) -> None:
    model = Cnn().eval()
    got = quantize_layers(model, images(4), skip=skip, strict=True)
    assert {name for name, result in results(got).items() if result == "float"} == floats
    for name in floats:
        assert type(got.get_submodule(name)) is type(model.get_submodule(name))


def test_dynamic_keeps_layers_dynamic() -> None:
    got = quantize_layers(Cnn(), images(4), dynamic=nn.Linear)
    kinds = {name: result for name, result in results(got).items() if result != "folded"}
    assert {n for n, r in kinds.items() if r == "int8 dynamic"} == {"hidden", "head"}


def test_a_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'haed', which matches nothing; the layers are 'stem.0'"):
        quantize_layers(Cnn(), skip="haed")
    with pytest.raises(TypeError, match="dynamic has 3"):
        quantize_layers(Cnn(), dynamic=[3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no layer of this Mlp"):
        quantize_layers(Mlp(), skip="*")


@pytest.mark.parametrize("function", [quantize_layers, fastq.quantize_model, fastq.sensitivity])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip": None}, r"skip: got None, wanted names, .*; or \(\) for none"),
        ({"skip": nn.Linear(4, 2)}, r"skip: got Linear\(in_features=4"),
        ({"config": "f"}, "config: got 'f', wanted a fastq.QConfig, or a dict from names"),
        ({"config": [("f", None)]}, r"config: got \[\('f', None\)\], wanted a fastq.QConfig"),
        ({"config": fastq.QConfig}, "config: got <class .*QConfig'>, wanted a fastq.QConfig"),
        ({"config": {5: None}}, "config: got 5, wanted names"),
    ],
    ids=["none", "module", "name", "pairs", "class", "number"],
)
def test_a_wrong_kind_of_choice_is_refused(function: Any, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        function(Mlp(), X, **given)


def test_strict_lists_what_stays_float() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.last = nn.Bilinear(3, 3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.both(x, x))  # type: ignore[no-any-return]

    model = Net()
    assert results(quantize_layers(model, torch.randn(2, 3)))["both"] == "float"
    with pytest.raises(ValueError, match=r"(?s)strict.*both .*Bilinear .*no int8 form"):
        quantize_layers(model, torch.randn(2, 3), strict=True)


def test_strict_leaves_an_inplace_model_unchanged() -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(Named(3, 3), nn.Bilinear(3, 3, 2), encoder.eval()).train()
    model[2].eval()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="strict"):
        quantize_layers(model, strict=True, inplace=True)
    assert dict(model.named_modules()) == before and model[2].activation_relu_or_gelu
    assert [m.training for m in model] == [True, True, False] and model.training


def test_an_inplace_model_that_cannot_run_in_int8_is_given_back_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Casts())
    model[2].a.weight.requires_grad = False
    before, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError):
        quantize_layers(model, X, inplace=True)
    assert dict(model.named_modules()) == before and all(m.training for m in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["2.a.weight"]


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, args, y: y * 2)
    return layer


def weight_normed(layer: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def overridden(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: x  # type: ignore[method-assign, assignment]
    return layer


def complex_(layer: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return layer.to(torch.complex64)


def with_nan(layer: nn.Linear) -> nn.Linear:
    nn.init.constant_(layer.weight, torch.nan)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked, "hooks"),
        (overridden, "hooks"),
        (nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
        (lambda layer: layer.double(), "float64"),
        (complex_, "complex64"),
        (with_nan, "NaN"),
        (lambda layer: layer.to("meta"), "meta"),
    ],
)
def test_a_layer_that_cannot_be_swapped_says_why(make: Callable, reason: str) -> None:
    model = nn.ModuleDict({"odd": make(nn.Linear(4, 4)), "plain": nn.Linear(4, 4)})
    got = quantize_layers(model)
    assert results(got) == {"odd": "float", "plain": "int8 dynamic"}
    assert reason in reasons(got)["odd"]


def test_a_layer_under_the_old_weight_norm_says_why() -> None:
    model = nn.Sequential(weight_normed(nn.Linear(4, 4)), nn.Linear(4, 4))
    for inplace in (False, True):
        got = quantize_layers(model, X, inplace=inplace)
        assert results(got) == {"0": "float", "1": "int8 static"} and "hooks" in reasons(got)["0"]


def test_a_lazy_layer_says_that_it_has_no_shape_yet() -> None:
    got = quantize_layers(nn.ModuleList([nn.LazyLinear(3), nn.Linear(3, 3)]))
    assert "not initialised" in reasons(got)["0"]


def test_more_products_than_int32_can_sum_stay_float() -> None:
    model = nn.ModuleList([nn.Linear(MAX_K + 1, 1), nn.Linear(MAX_K, 1)])
    got = quantize_layers(model)
    assert results(got) == {"0": "float", "1": "int8 dynamic"}
    assert str(MAX_K) in reasons(got)["0"]


def test_a_module_with_two_names_is_swapped_once_for_both() -> None:
    class Shared(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)] * 3)
            self.again = self.a

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.again(x)

    model = Shared()
    x = torch.randn(5, 4)
    got = quantize_layers(model, x)
    assert isinstance(got.a, QLinear) and got.again is got.a
    assert got.blocks[0] is got.blocks[1] is got.blocks[2]
    with torch.no_grad():
        inputs = [x, model.blocks[0](x), model.blocks[0](model.blocks[0](x))]
    every = torch.cat(inputs)
    assert got.blocks[0].input_qparams == choose_qparams(every.min(), every.max())


def test_layers_that_share_a_parameter_are_both_swapped() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    got = quantize_layers(model, torch.randn(3, 4))
    assert torch.equal(got[0].weight, got[1].weight)


def test_tied_weights_leave_the_embedding_float() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    got = quantize_layers(model, torch.arange(7))
    assert results(got) == {"1": "int8 static"} and got[0].weight.dtype == torch.float32


class ReadsWeight(Mlp):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.linear(F.linear(x, self.a.weight), self.b.weight, self.b.bias) + self.b(self.a(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ReadsWeight()
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


@pytest.mark.parametrize("data", [torch.randn(2, 4), None], ids=["export", "fx"])
def test_a_weight_that_another_module_computes_with_stays_float(data: Tensor | None) -> None:
    model = Attention()
    got = quantize_layers(model, data)
    assert (results(got)["inner.a"], results(got)["inner.b"]) == ("float", "float")
    assert results(got)["out"].startswith("int8")
    assert "computes with its weight itself" in reasons(got)["inner.a"]
    if data is not None:
        assert "'inner'" in reasons(got)["inner.a"]


class Casts(Mlp):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        layers = dict(self.named_modules())  # its source does not tell whose dtype it asks for
        return self.a(x.to(layers["a"].weight.dtype))


def test_a_model_that_cannot_run_in_int8_fails_at_once_and_says_what_to_do() -> None:
    with pytest.raises(TypeError) as caught:
        quantize_layers(Casts(), X)
    assert "skip=" in caught.value.__notes__[0]
    assert str(caught.value).startswith("QLinear 'a': x is int8")
    assert "skip= of quantize_layers" in str(caught.value)
    with pytest.raises(ValueError, match="no layer"):
        quantize_layers(Casts(), X, skip=["a", "b"])


def test_an_error_names_the_layer() -> None:
    int8 = quantize_layers(nn.Sequential(nn.Linear(4, 2), nn.Conv2d(3, 2, 3)))
    for layer, x in ((int8[0], torch.rand(2, 3)), (int8[1], torch.rand(2, 4, 8, 8))):
        name = "QLinear '0'" if layer is int8[0] else "QConv2d '1'"
        with pytest.raises(ValueError, match=f"^{name}: x is float32"):
            layer(x)
    with pytest.raises(ValueError, match=r"^QLinear: x is float32"):
        QLinear(4, 2)(torch.rand(2, 3))


@pytest.mark.parametrize("data", [None, X], ids=["dynamic", "static"])
def test_what_was_asked_for_is_told_from_what_cannot_be(data: Tensor | None) -> None:
    with pytest.raises(ValueError, match="can become int8: skip= and config= keep"):
        quantize_layers(Mlp(), data, skip="*")
    with pytest.raises(ValueError, match="can become int8: skip= and config= keep") as caught:
        fastq.quantize_model(Mlp(), data, config={"*": None}, progress=False)
    if data is not None:
        assert "stays float as asked" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="can become int8: int8 already"):
        quantize_layers(quantize_layers(Mlp(), data), data)


def test_a_network_of_integers_is_refused() -> None:
    int8 = fastq.quantize_model(nn.Sequential(nn.Linear(4, 4)), X, progress=False)
    with pytest.raises(TypeError, match="this QuantizedModel is int8 already"):
        quantize_layers(int8, X)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word on nested tensors
        model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(4, 5, 16)
    got = quantize_layers(model, x)
    with torch.no_grad():
        assert sqnr(model(x), got(x)) > 30
    attention = "layers.0.self_attn"
    assert results(got)["layers.1.linear1"] == results(got)["layers.0.linear2"] == "int8 static"
    assert results(got)[attention] == "int8 dynamic"
    assert "its last product itself" in reasons(got)[attention]
    quantize_layers(model, x, strict=True)
    kept = quantize_layers(model, x, strict=True, skip=nn.MultiheadAttention)
    assert results(kept)[attention] == "float"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
def test_padding_in_a_transformer_encoder_gives_what_it_gives_in_float(nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, mask = torch.randn(4, 5, 16), torch.arange(5) >= torch.tensor([[5], [4], [3], [2]])
    for data in (None, x, {"src": x, "src_key_padding_mask": mask}):
        for skip in ((), nn.MultiheadAttention):
            got = quantize_layers(model, data, skip=skip, strict=True)
            with torch.no_grad():
                wanted, padded = (m(x, src_key_padding_mask=mask) for m in (model, got))
            assert sqnr(wanted, padded) > 30
            assert bool((padded[mask] == 0).all()) is nested


def test_a_layer_that_is_int8_already_stays() -> None:
    model = nn.Sequential(QLinear.from_float(nn.Linear(4, 4)), nn.Linear(4, 4))
    before = model[0].state_dict()
    got = quantize_layers(model, X)
    assert results(got) == {"0": "int8 dynamic", "1": "int8 static"}
    assert reasons(got)["0"] == "int8 already"
    assert all(torch.equal(v, before[k]) for k, v in got[0].state_dict().items())
    with pytest.raises(ValueError, match="no layer"):
        quantize_layers(got, X)


# --- subclasses of torch's layers


class Same(nn.Conv2d):
    """Pads in its forward, as EfficientNets from TensorFlow do."""

    def __init__(self, *args: Any, pad: tuple[int, ...] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d(pad) if pad else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x)
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Named(nn.Linear):
    """Nothing but a name of its own."""


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class OtherWeight(nn.Linear):
    """Takes its weight from elsewhere, under a name that misleads."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.other = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, weight: Tensor) -> Tensor:
        return F.linear(weight, self.other, self.bias)


class Residual(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Dynamic(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 2 else x)


def test_subclasses_that_compute_the_same_are_rebuilt() -> None:
    model = nn.Sequential(
        Same(3, 4, 3, stride=2, pad=(0, 1, 0, 1), bias=False),
        nn.BatchNorm2d(4),
        Same(4, 4, 3, groups=4, pad=(2, 2, 1, 1)),
        Same(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Named(4, 3),
    ).eval()
    randomize_batch_norm(model)
    x = torch.randn(4, 3, 9, 8)
    got = quantize_layers(model, x, strict=True)
    assert [type(m) for m in got[0]] == [nn.ZeroPad2d, QConv2d]
    assert isinstance(got[2], QConv2d) and got[2].padding == (1, 2)
    assert isinstance(got[3], QConv2d) and isinstance(got[6], QLinear)
    assert summary(got).rebuilt == ("0", "2", "3", "6")
    assert reasons(got)["1"] == "into '0.1'"
    with torch.no_grad():
        assert sqnr(model(x), got(x)) > 30


@pytest.mark.parametrize(
    "layer",
    [Standardized(3, 3, 1), Residual(8, 8), Dynamic(3, 3, 1), OtherWeight(8, 8)],
    ids=lambda layer: type(layer).__name__,
)
def test_subclasses_that_compute_something_else_stay_float(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    got = quantize_layers(nn.Sequential(layer, nn.Linear(8, 2)), x)
    assert results(got)["0"] == "float" and "subclass" in reasons(got)["0"]
    assert type(got[0]) is type(layer)


def test_skip_knows_subclasses_by_their_class_and_dynamic_reaches_within() -> None:
    model = nn.Sequential(Same(3, 4, 3, pad=(0, 1, 0, 1)), Same(4, 4, 1), nn.Linear(8, 2))
    x = torch.randn(2, 3, 9, 9)
    assert type(quantize_layers(model, x, skip=Same)[0]) is Same
    got = quantize_layers(model, x, dynamic="0")
    assert results(got) == {"0.1": "int8 dynamic", "1": "int8 static", "2": "int8 static"}


# --- batch norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["conv", "grouped", "linear"])
def test_a_folded_batch_norm_computes_the_same(kind: str, affine: bool, bias: bool) -> None:
    if kind == "linear":
        layer, batch_norm = nn.Linear(6, 8, bias=bias), nn.BatchNorm1d(8, eps=0.1, affine=affine)
        x = torch.randn(5, 6)
    else:
        groups = 2 if kind == "grouped" else 1
        layer = nn.Conv2d(6, 8, 3, groups=groups, bias=bias)
        batch_norm, x = nn.BatchNorm2d(8, eps=0.1, affine=affine), torch.randn(2, 6, 7, 7)
    model = nn.Sequential(layer, batch_norm).eval()
    randomize_batch_norm(model)
    weight = layer.weight.detach().clone()
    shared = layer.weight
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        fold_batch_norm(layer, batch_norm)
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(shared, weight)  # another layer may hold it


class Follows(nn.Module):
    """A convolution and a batch norm, in an order that a test decides."""

    def __init__(self, order: Callable[["Follows", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.order = order
        randomize_batch_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.order(self, x)


UNFOLDABLE = {
    "before": lambda m, x: m.conv(m.bn(x)),
    "after relu": lambda m, x: m.bn(F.relu(m.conv(x))),
    "output used twice": lambda m, x: m.bn(y := m.conv(x)) + y,
    "two sources": lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)),
    "source called alone": lambda m, x: m.bn(m.conv(x)) + m.conv(x),
    "transposed": lambda m, x: m.bn(m.conv(x).mT),
    "never called": lambda m, x: m.conv(x),
}


@pytest.mark.parametrize("with_data", [True, False], ids=["export", "fx"])
@pytest.mark.parametrize("order", UNFOLDABLE)
def test_a_batch_norm_that_is_not_all_that_follows_stays(order: str, with_data: bool) -> None:
    model, x = Follows(UNFOLDABLE[order]).eval(), torch.randn(8, 4, 5, 5)
    got = quantize_layers(model, x if with_data else None)
    assert results(got)["bn"] == "float" and "not folded" in reasons(got)["bn"]
    with torch.no_grad():
        assert sqnr(model(x), got(x)) > 30


@pytest.mark.parametrize("with_data", [True, False], ids=["export", "fx"])
def test_modules_called_twice_fold_if_both_calls_agree(with_data: bool) -> None:
    model = Follows(lambda m, x: m.bn(m.conv(m.bn(m.conv(x))))).eval()
    x = torch.randn(8, 4, 5, 5)
    got = quantize_layers(model, x if with_data else None)
    assert results(got)["bn"] == "folded" and isinstance(got.bn, nn.Identity)
    with torch.no_grad():
        assert sqnr(model(x), got(x)) > 30


def test_a_batch_norm_over_another_axis_than_the_features_stays() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).eval()
    randomize_batch_norm(model)
    x = torch.randn(4, 5, 6)
    got = quantize_layers(model, x)
    assert results(got)["1"] == "float"
    assert results(quantize_layers(model, x[:, 0]))["1"] == "folded"
    assert results(quantize_layers(model, [x[:, 0], x]))["1"] == "float"


@pytest.mark.parametrize(
    ("batch_norm", "reason"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), "running statistics"),
        (hooked(nn.BatchNorm2d(4)), "hooks"),  # type: ignore[arg-type]
        (nn.BatchNorm3d(4), "not folded"),
    ],
    ids=["no statistics", "hook", "3d"],
)
def test_a_batch_norm_that_cannot_fold_says_why(batch_norm: nn.Module, reason: str) -> None:
    conv = nn.Conv2d(4, 4, 1)
    order: nn.Module = nn.Sequential(conv, batch_norm)
    if isinstance(batch_norm, nn.BatchNorm3d):
        order = nn.Sequential(conv, nn.Unflatten(1, (4, 1)), batch_norm)
    got = quantize_layers(order, torch.randn(3, 4, 5, 5))
    (row,) = [row for row in summary(got).rows if row.kind.startswith("BatchNorm")]
    assert row.result == "float" and reason in row.reason


@pytest.mark.parametrize("with_data", [True, False], ids=["export", "fx"])
@pytest.mark.parametrize(
    ("layer", "batch_norm"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)),
        (nn.Conv3d(4, 6, 1, padding="same", bias=False), nn.BatchNorm3d(6)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)),
        (nn.ConvTranspose3d(4, 6, 1), nn.BatchNorm3d(6)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_batch_norm_folds_into_any_convolution(
    layer: nn.Module, batch_norm: nn.Module, with_data: bool
) -> None:
    axes = layer.weight.dim() - 2  # type: ignore[operator, union-attr]
    model = nn.Sequential(layer, batch_norm)
    x = torch.randn(8, 4, *[5] * axes) + torch.arange(4.0).reshape(-1, *[1] * axes)
    for _ in range(20):
        model(x)  # in training mode: running statistics
    model.eval()
    got = quantize_layers(model, x if with_data else None)
    assert results(got)["0"] == ("int8 static" if with_data else "int8 dynamic")
    if with_data or axes > 1:
        assert reasons(got)["1"] == "into '0'" and type(got[1]) is nn.Identity  # type: ignore[index]
    else:
        wanted = "not folded: no calibration data shows the shape of the input of '0'"
        assert reasons(got)["1"] == wanted
    assert sqnr(model(x).detach(), got(x)) > 30


def test_a_batch_norm_after_a_layer_that_stays_float_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda *_: None)
    got = quantize_layers(model, torch.randn(3, 4, 1, 1))
    assert reasons(got)["1"] == "'0' before it stays float"


def test_a_batch_norm_after_a_linear_layer_wants_to_see_the_shape() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    wanted = "not folded: no calibration data shows the shape of the input of '0'"
    assert reasons(quantize_layers(model))["1"] == wanted
    got = quantize_layers(model, torch.randn(4, 5, 6))
    assert reasons(got)["1"] == "not folded: its channels are not the outputs of '0'"


def test_infinite_statistics_do_not_fold() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, eps=0))
    model[1].running_var.zero_()  # type: ignore[union-attr, operator]
    assert "none that are finite" in reasons(quantize_layers(model))["1"]


class DataDependent(Cnn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.sum() > 0 else x)


def test_what_cannot_be_exported_still_quantizes(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = DataDependent().eval(), images()
    got = quantize_layers(model, x)
    assert {results(got)[name] for name in LAYERS} == {"int8 static"}
    assert {results(got)[name] for name in BATCH_NORMS} == {"float"}
    reason = reasons(got)["bn"]
    assert "no graph" in reason and "torch.export: " in reason and "torch.fx: " in reason
    with torch.no_grad():
        assert sqnr(model(x), got(x)) > 30
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match="strict"):
        quantize_layers(model, x, strict=True)


def test_a_custom_forward_is_traced() -> None:
    got = quantize_layers(Cnn(), [{"pixels": images()}], forward=run_labelled, strict=True)
    assert results(got)["bn"] == "folded"


def test_fx_takes_over_where_export_fails() -> None:
    class Noted(Cnn):
        def forward(self, x: Tensor, note: Any = None) -> Tensor:
            return super().forward(x)

    found = trace(Noted().eval(), (images(2), object()))
    assert found.reason == "" and found.batch_norms["block.bn1"] == "block.dense"


def test_tracing_leaves_nothing_on_the_model() -> None:
    class Remembers(Mlp):
        seen: Any = None

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            self.seen = super().forward(x)
            return self.seen

    model = Remembers().eval()
    trace(model, (X,))
    trace(model)
    assert model.seen is None


# --- the result is a module like any other


def test_deepcopy_and_pickle_keep_answers_and_summary() -> None:
    x = images()
    got = quantize_layers(Cnn(), x)
    for other in (copy.deepcopy(got), pickle.loads(pickle.dumps(got))):
        assert torch.equal(other(x), got(x))
        assert summary(other) == summary(got)


def test_the_result_runs_in_grad_mode_beside_float_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    y = quantize_layers(model, X)(X)
    assert torch.is_grad_enabled() and not y.requires_grad


def test_state_dict_round_trip() -> None:
    x = images()
    got = quantize_layers(Cnn(), x)
    other = quantize_layers(Cnn(), x * 3)
    assert not torch.equal(other(x), got(x))
    other.load_state_dict(got.state_dict())
    assert torch.equal(other(x), got(x))


def test_the_summary_prints_a_table() -> None:
    text = str(summary(quantize_layers(Mlp(), X, skip="b")))
    assert text.splitlines() == [
        "layer  kind    result       why",
        "a      Linear  int8 static",
        "b      Linear  float        as asked",
        "1 int8 static, 1 float",
    ]


def test_a_float_model_has_no_summary() -> None:
    with pytest.raises(ValueError, match="this Mlp has none"):
        summary(Mlp())
    assert isinstance(summary(quantize_layers(Mlp())), QuantizationSummary)


def test_the_random_state_is_left_alone() -> None:
    model = nn.Sequential(Same(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    state = torch.get_rng_state()
    quantize_layers(model, torch.ones(2, 3, 1, 1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:quantize_model.*not one network")
def test_config_of_layers() -> None:
    """With data or without, and where a network that cannot be captured becomes layers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.c(self.b(self.a(x)))
            return y if x.sum() > 0 else -y

    x = torch.rand(32, 8)
    config = {"b": None, "c": QConfig(weight_bits=2, observer="percentile")}
    for made in (
        quantize_layers(Net(), config=config),
        quantize_layers(Net(), x, config=config, progress=False),
        quantize_model(Net(), config=config),
        quantize_model(Net(), x, config=config, progress=False),
    ):
        assert results(made)["b"] == "float" and reasons(made)["b"] == "as asked"
        assert int(made.a.weight.abs().max()) == 127 and int(made.c.weight.abs().max()) == 1
    assert not quantize_layers(Net(), config=config, strict=True).training
    for call in (quantize_layers, quantize_model):
        with pytest.raises(ValueError, match="config has 'nonsense', which matches nothing"):
            call(Net(), config={"nonsense": None})


def test_config_of_a_subclass_and_of_other_kinds() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    model = nn.Sequential(Padded(3, 4, 3), Padded(4, 4, 3), nn.Conv1d(4, 4, 1))
    four = QConfig(weight_bits=4, weight_range="mse")
    made = quantize_layers(model[:2], config={"0": None, "1": four})
    assert [row.result for row in summary(made).rows] == ["float", "int8 dynamic"]
    (layer,) = [m for m in made.modules() if isinstance(m, QConv2d)]
    assert int(layer.weight.abs().max()) == 7
    others = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "heads": nn.MultiheadAttention(8, 2)})
    others["words"], others["line"] = nn.Embedding(9, 64), nn.Conv1d(4, 4, 1)
    weights = quantize_layers(others, config=four).state_dict()
    ends = [int(w.abs().max()) for w in weights.values() if w.dtype is torch.int8]
    assert len(ends) == 8 and set(ends) == {7}


def test_the_note_of_layers_is_saved(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x

    with pytest.warns(UserWarning, match="Net: int8 layers, not one network: GuardOnData"):
        made = quantize_model(Net(), torch.rand(4, 8), progress=False)
    assert "GuardOnDataDependent" in summary(made).note
    save(made, tmp_path / "q")
    assert summary(load(tmp_path / "q", Net())) == summary(made)


def test_a_weight_that_others_read_stays_float_without_a_graph_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.words = nn.Embedding(64, 64), nn.Embedding(20, 64)
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 20)
            self.layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
            self.head.weight = self.words.weight  # each reads it alone: both are int8

        def forward(self, tokens: Tensor) -> Tensor:
            if tokens.max() < 0:  # torch.export cannot follow it
                return tokens
            x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
            x = self.layer(F.linear(self.b(x), self.a.weight))
            return self.head(x) + len(self.b.weight) + self.b.weight.dtype.itemsize

    model, tokens = Net().eval(), torch.randint(20, (8, 12))
    int8 = quantize_layers(model, tokens, progress=False)
    assert {name for name, result in results(int8).items() if result == "float"} == {"places", "a"}
    assert "computes with its weight itself" in reasons(int8)["places"]
    assert sqnr(model(tokens).detach(), int8(tokens)) > 25


def test_layers_that_config_does_not_name_are_as_without_it() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4096, 8)
    x[0, 0] = 20.0  # an outlier, which the observer of a QConfig would leave out
    plain = quantize_layers(model, x, progress=False)
    named = quantize_layers(model, x, config={"1": None}, progress=False)
    assert named[0].input_qparams == plain[0].input_qparams


class Marks(nn.Module):
    """Its forward leaves traces, in a buffer and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count, self.seen = nn.Linear(8, 8), 0, list[Tensor]()
        self.kept: dict[str, Any] = {"lock": threading.Lock(), "last": []}
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("ones", torch.ones(1).expand(8))  # cannot be written

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.seen.append(x)
        self.kept["last"].append(x)
        return self.layer(x) * self.calls * self.ones


def test_calibration_leaves_no_marks() -> None:
    model = Marks().eval()
    model.kept["lock"] = 0  # torch.export copies the model
    with pytest.warns(UserWarning, match="changes a parameter or buffer"):
        int8 = quantize_model(model, [torch.randn(4, 8)] * 3, progress=False)
    for one in (model, int8):
        assert (one.calls, one.count, one.seen, one.kept["last"]) == (0, 0, [], [])
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert sqnr(model(x), int8(x)) > 25 and int8.calls == 1


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_scripted_module_stays(inplace: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        script = torch.jit.script(Scripted())
    model = nn.Sequential(nn.Linear(8, 16), script, nn.Linear(16, 4)).eval()
    x = torch.randn(32, 8)
    with torch.no_grad():
        wanted = model(x)
    for data in (None, x):
        int8 = quantize_layers(model, data, progress=False)
        assert results(int8).keys() == {"0", "2"} and sqnr(wanted, int8(x)) > 25
    with pytest.raises(ValueError, match="no layer"):
        quantize_layers(model, skip=["0", "2"], inplace=inplace)
    assert torch.equal(model(x), wanted) and model[0].weight.requires_grad


def test_a_weight_that_is_computed_of_parameters() -> None:
    """As torch's old weight norm leaves it: with a history, which no copy can have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    wanted = model.eval()(x).detach()
    assert sqnr(wanted, quantize_model(model, x, progress=False)(x)) > 25
    assert results(quantize_layers(model))["2"] == "int8 dynamic"
    assert model[0].weight.requires_grad and torch.equal(model(x), wanted)


class Reads(nn.Module):
    """No graph can be had of it without an example: it branches on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 32), nn.Linear(32, 32)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.table.weight.t()

    def forward(self, i: Tensor) -> Tensor:
        if i.shape[0] > self.layer.weight.shape[0] and self.layer.bias is not None:
            i = i[:10]  # none of this reads the layer
        if not isinstance(self.layer.weight, Tensor) or self.layer.weight.data.dtype is torch.int:
            return i
        return self.logits(self.layer(self.table(i)))


def test_who_reads_a_weight_is_seen_in_the_source() -> None:
    model = Reads().eval()
    int8 = quantize_layers(model)
    assert results(int8) == {"table": "float", "layer": "int8 dynamic"}
    assert "computes with its weight itself" in reasons(int8)["table"]
    i = torch.randint(0, 50, (4, 6))
    with torch.no_grad():
        assert sqnr(model(i), int8(i)) > 25


class Converts(nn.Module):
    """To the dtype of a weight, in two ways."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.way, self.patches, self.head = way, nn.Linear(8, 32), nn.Linear(32, 4)

    def variable(self, x: Tensor) -> Tensor:
        wanted = self.patches.weight.dtype
        return x.to(dtype=wanted)

    def alike(self, x: Tensor) -> Tensor:
        return x.type_as(self.patches.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.patches((self.variable, self.alike)[self.way](x)))


class KnowsOfInt8(Converts):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.patches.weight.dtype and self.patches.weight.dtype != torch.int8:
            x = x.to(self.patches.weight.dtype)
        return self.head(self.patches(x))


@pytest.mark.parametrize("data", [None, torch.linspace(-3, 3, 512).reshape(8, 64).T])
def test_what_the_model_converts_to_the_dtype_of_stays_float(data: Tensor | None) -> None:
    """Patch embeddings of CLIP and SigLIP. T5 looks whether it is int8."""
    x = torch.randn(5, 8)
    for model in (Converts(0), Converts(1), KnowsOfInt8(0)):
        int8 = quantize_layers(model.eval(), data, progress=False)
        float_ones = {name for name, result in results(int8).items() if result == "float"}
        assert float_ones == (set() if isinstance(model, KnowsOfInt8) else {"patches"})
        if float_ones:
            assert "the model converts to the dtype of its weight" in reasons(int8)["patches"]
        with torch.no_grad():
            assert sqnr(model(x), int8(x)) > 25


def test_what_cannot_be_copied_is_left_as_it_is() -> None:
    model = Marks().eval()
    lock, kept = model.kept["lock"], model.kept
    int8 = quantize_layers(model, torch.randn(4, 8), inplace=True, progress=False)
    assert int8.kept is kept and kept == {"lock": lock, "last": []} and int8.calls == 0


class Experts(nn.Module):
    """Bare parameters that are multiplied by, spelled in many ways, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, 32, 32) / 6) for _ in range(2))
        self.mix = nn.ParameterList(nn.Parameter(torch.randn(32, 32) / 6) for _ in range(4))
        self.place = nn.Parameter(torch.randn(60, 32))
        self.table = nn.Parameter(torch.randn(40, 32))
        self.scale = nn.Parameter(torch.rand(1, 1, 2048))
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place[: x.shape[1]] + self.table[torch.arange(x.shape[1]) % 40]
        x = self.linear(x) + self.linear(self.place[: x.shape[1]])
        for i in range(2):
            down = self.down[i].to(x.dtype)
            x = x + F.linear(F.linear(x, self.up[i]).relu(), weight=down)
        for weight in self.mix:
            x = x @ weight.T
        return x * self.scale[..., :32]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(100, 32))

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...k,nk->...n", x, weight)


class Few(Head):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 100))


@pytest.mark.parametrize("data", [None, torch.randn(2, 5, 32)], ids=["dynamic", "static"])
def test_parameters_that_no_layer_has_are_listed(data: Tensor | None) -> None:
    model = nn.Sequential(nn.Linear(32, 32), Experts(), Head(), Few()).eval()
    rows = fastq.summary(fastq.quantize_layers(model, data, progress=False)).rows
    assert [row.name for row in rows if row.result != "float"] == ["0", "1.linear"]
    why = "its parameters are in no layer: "
    wanted = [
        ("1", "Experts", f"{why}down, up"),
        ("1.mix", "ParameterList", f"{why}0, 1, 2, ..."),
        ("2", "Head", f"{why}weight"),  # what a function gets is seen as it runs
    ]
    found = [(row.name, row.kind, row.reason) for row in rows if row.result == "float"]
    assert found == wanted[: 2 if data is None else 3]
    with pytest.raises(ValueError, match=r"strict=True(.|\n)*Experts +float"):
        fastq.quantize_layers(model, data, strict=True, skip="2", progress=False)
    skipped = fastq.quantize_layers(
        model, data, strict=True, skip=["1.mix", Experts, Head], progress=False
    )
    assert all(row.result == "float" for row in fastq.summary(skipped).rows[1:])


def test_a_model_without_a_graph_lists_them_too() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x) if float(x.sum()) < 1e9 else x

    model, x = Branches().eval(), torch.randn(2, 5, 32)
    with pytest.warns(UserWarning, match="int8 layers, not one network"):
        int8 = fastq.quantize_model(model, x, progress=False)
    assert [row.name for row in fastq.summary(int8).rows if row.result == "float"] == [
        "experts", "experts.mix",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="strict=True"):
        fastq.quantize_model(model, x, strict=True, progress=False)


def test_a_method_without_arguments_has_no_self() -> None:
    class Halved(nn.Linear):
        @staticmethod
        def half() -> float:
            return 0.5

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.half()

    model = nn.Sequential(nn.Linear(8, 8), Halved(8, 8))
    assert results(quantize_layers(model)) == {"0": "int8 dynamic", "1": "float"}


@pytest.mark.parametrize("data", [None, torch.randn(2, 40, 64)], ids=["dynamic", "static"])
def test_parameters_of_torchs_own_layers_are_not_listed(data: Tensor | None) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(1, 40, 64))
            self.norm = nn.LayerNorm((40, 64))
            self.encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
            self.lstm = nn.LSTM(64, 64, batch_first=True)
            self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
            self.other.weight = self.one.weight
            self.short = nn.Embedding(100, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.encoder(self.norm(x + self.places))
            return self.other(self.one(self.lstm(x)[0])) @ self.short.weight[:64]

    int8 = fastq.quantize_layers(Tied().eval(), data, progress=False)
    assert {row.result for row in fastq.summary(int8).rows} <= {"int8 static", "int8 dynamic"}


def test_a_list_of_tokens_of_two_dtypes_is_a_list_of_batches() -> None:
    model = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 4)).eval()
    ids = torch.arange(10).reshape(2, 5)
    wanted = quantize_model(model, [ids, ids.flip(0)], progress=False)
    found = quantize_model(model, [ids.int(), ids.flip(0)], progress=False)
    assert torch.equal(found(ids), wanted(ids)) and torch.equal(found(ids.int()), wanted(ids))
    with pytest.raises(TypeError, match=r"tuple of tensors of int32 and int64.*\[\(inputs, l"):
        quantize_model(model, (ids.int(), ids), progress=False)
