"""QLinear and QConv2d: equal to reference.py, near the float layers, and torch modules in full."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fastq import QParams, choose_qparams, ops, quantize_layers, quantize_model, reference
from fastq.nn import (
    QGRU,
    QLSTM,
    QRNN,
    QConv2d,
    QEmbedding,
    QEmbeddingBag,
    QGRUCell,
    QLinear,
    QLSTMCell,
    QMultiheadAttention,
)
from fastq.nn.conv import CONVOLUTIONS
from fastq.qparams import Dequant, quantize_weight
from fastq.weights import Conv2dWeight, LinearWeight

STATIC = QParams(np.float32(0.03), np.int32(118))


def sqnr(y, exact):
    """Signal to quantization noise in dB."""
    return float(10 * torch.log10(exact.square().sum() / (y - exact).square().sum()))


def definition_linear(module, x, qparams=None):
    """What reference.py says about a float nn.Linear and x (*, K)."""
    data, scale = quantize_weight(module.weight.detach().numpy())
    bias = None if module.bias is None else module.bias.detach().numpy()
    rows = np.ascontiguousarray(x.detach().numpy()).reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    y = reference.linear_float(
        rows, LinearWeight(data), Dequant(scale, bias=bias), x_qparams=qparams
    )
    return y.reshape(*x.shape[:-1], module.out_features)


def definition_conv(module, x, qparams=None):
    """What reference.py says about a float nn.Conv2d and x (B, C, H, W)."""
    data, scale = quantize_weight(module.weight.detach().numpy())
    bias = None if module.bias is None else module.bias.detach().numpy()
    if module.padding == "same":
        total = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    elif module.padding == "valid":
        padding = ((0, 0), (0, 0))
    else:
        padding = tuple((p, p) for p in module.padding)
    image = np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1))
    if module.padding_mode != "zeros":
        mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[module.padding_mode]
        image = np.pad(image, ((0, 0), *padding, (0, 0)), mode=mode)
        padding = ((0, 0), (0, 0))
    weight = Conv2dWeight(data, module.stride, padding, module.dilation, module.groups)
    y = reference.conv2d_float(image, weight, Dequant(scale, bias=bias), x_qparams=qparams)
    return y.transpose(0, 3, 1, 2)


# --- QLinear


@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(
    "shape",
    [(8,), (1, 8), (5, 8), (33, 70), (2, 3, 17), (2, 1, 3, 64), (1, 1), (0, 8), (3, 0, 8), (4, 0)],
    ids=str,
)
def test_linear_is_its_definition(shape, bias, qparams):
    with pytest.warns(UserWarning) if shape[-1] == 0 else torch.no_grad():
        module = nn.Linear(shape[-1], 13, bias=bias)  # torch warns about 0 features
    x = torch.randn(shape)
    layer = QLinear.from_float(module, input_qparams=qparams)
    y = layer(x)
    assert y.dtype == torch.float32 and y.shape == (*shape[:-1], 13) and y.is_contiguous()
    np.testing.assert_array_equal(y.numpy(), definition_linear(module, x, qparams))


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(24.0).reshape(8, 3).T,
        torch.arange(8.0).expand(5, 8),
        torch.arange(5.0)[:, None].expand(5, 8),
        torch.arange(1.0).expand(8),
        torch.arange(80.0).reshape(5, 16)[::2, ::2],
        torch.arange(48.0).reshape(3, 8, 2).transpose(1, 2),
        torch.arange(16.0).reshape(2, 8).to(torch.complex64).conj().imag,
    ],
    ids=["transposed", "rows", "columns", "one", "steps", "middle", "negative bit"],
)
@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
def test_linear_takes_any_strides(x, qparams):
    module = nn.Linear(8, 5)
    y = QLinear.from_float(module, input_qparams=qparams)(x)
    expected = definition_linear(module, x.clone(memory_format=torch.contiguous_format), qparams)
    np.testing.assert_array_equal(y.numpy(), expected)


def test_linear_is_near_the_float_layer():
    module, x = nn.Linear(256, 64), torch.randn(40, 256)
    exact = module(x).detach()
    dynamic = QLinear.from_float(module)
    assert sqnr(dynamic(x), exact) > 35
    static = QLinear.from_float(module, input_qparams=choose_qparams(x.min(), x.max()))
    assert sqnr(static(x), exact) > 33


def test_linear_treats_rows_apart():
    layer = QLinear.from_float(nn.Linear(16, 4))
    x = torch.randn(3, 16)
    x[1] *= 1000
    for row, y in zip(x, layer(x), strict=True):
        assert torch.equal(layer(row), y)


def test_nan_counts_as_zero_and_infinity_saturates():
    layer = QLinear.from_float(nn.Linear(4, 3), input_qparams=STATIC)
    x = torch.tensor([[np.nan, 1.0, np.inf, -np.inf]])
    top, bottom = (255 - 118) * 0.03, -118 * 0.03
    assert torch.equal(layer(x), layer(torch.tensor([[0.0, 1.0, top, bottom]])))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_new_module_is_zero(kind):
    layer = QLinear(4, 3) if kind == "linear" else QConv2d(4, 3, 1)
    x = torch.randn(2, 4) if kind == "linear" else torch.randn(2, 4, 5, 5)
    y = layer(x)
    assert y.shape[1 if kind == "conv" else -1] == 3 and not y.any()
    assert layer.weight.dtype == torch.int8 and layer.weight_scale.eq(1).all()
    assert not list(layer.parameters())


# --- QConv2d

CONVS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3},
    "5x3": {"kernel_size": (5, 3), "padding": (2, 1)},
    "nobias": {"kernel_size": 3, "padding": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strides": {"kernel_size": 3, "stride": (3, 1), "padding": (0, 2)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "dilations": {"kernel_size": (2, 3), "dilation": (3, 1)},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1, "stride": 2},
    "multiplier": {"kernel_size": 3, "groups": 4, "out_channels": 8},
    "same": {"kernel_size": 3, "padding": "same"},
    "same even": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": (1, 0), "padding_mode": "circular"},
    "reflect same even": {"kernel_size": (4, 2), "padding": "same", "padding_mode": "reflect"},
    "circular valid": {"kernel_size": 3, "padding": "valid", "padding_mode": "circular"},
}


def conv(out_channels=6, **arguments):
    if arguments.get("groups") == 4:
        out_channels = 8
    return nn.Conv2d(4, out_channels, **arguments)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("arguments", CONVS.values(), ids=CONVS.keys())
def test_conv_is_its_definition(arguments, qparams):
    module, x = conv(**arguments), torch.randn(2, 4, 11, 9)
    layer = QConv2d.from_float(module, input_qparams=qparams)
    y, exact = layer(x), module(x).detach()
    np.testing.assert_array_equal(y.numpy(), definition_conv(module, x, qparams))
    for order in (torch.contiguous_format, torch.channels_last):  # as torch's does
        ordered = x.contiguous(memory_format=order)
        assert layer(ordered).stride() == module(ordered).stride()
        assert torch.equal(layer(ordered), y)
    assert sqnr(y, exact) > 28
    assert torch.equal(layer(x[0]), layer(x[:1])[0])  # unbatched
    np.testing.assert_array_equal(layer.to_float()(x).detach(), dequantized(module)(x).detach())


def test_one_channel_that_is_padded_by_nothing():
    """Its copy, in torch, is not channels_last."""
    module = nn.Conv2d(1, 3, 1, padding_mode="circular")
    x = torch.randn(2, 1, 5, 6).to(memory_format=torch.channels_last)
    assert QConv2d.from_float(module)(x).stride() == module(x).stride()


def dequantized(module):
    data, scale = quantize_weight(module.weight.detach().numpy())
    result = copy.deepcopy(module)
    scale = scale.reshape(-1, *[1] * (data.ndim - 1))
    result.weight = nn.Parameter(torch.from_numpy(data.astype(np.float32) * scale))
    return result


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_conv_takes_any_strides_and_an_empty_batch(mode):
    module = nn.Conv2d(3, 5, 3, padding=1, padding_mode=mode)
    layer = QConv2d.from_float(module)
    x = torch.randn(2, 3, 8, 6)
    views = [
        x.to(memory_format=torch.channels_last),
        torch.randn(3, 2, 6, 8).permute(1, 0, 3, 2),
        torch.randn(4, 3, 16, 6)[::2, :, ::2],
        torch.randn(1, 3, 1, 6).expand(2, 3, 8, 6),
        torch.randn(1, 1, 8, 6).expand(2, 3, 8, 6),
    ]
    for view in views:
        expected = definition_conv(module, view.clone(memory_format=torch.contiguous_format))
        np.testing.assert_array_equal(layer(view).numpy(), expected)
    assert layer(x[:0]).shape == (0, 5, 8, 6)


# --- arguments and inputs that are refused


@pytest.mark.parametrize(
    "dtype, hint",
    [
        (torch.float16, r"x\.float\(\) works"),
        (torch.bfloat16, r"x\.float\(\) works"),
        (torch.float64, r"x\.float\(\) works"),
        (torch.uint8, r"x\.float\(\) works"),
        (torch.int64, r"x\.float\(\) works"),
        (torch.int8, r"dtype of this layer's weight"),
    ],
)
@pytest.mark.parametrize("layer", [QLinear(4, 3), QConv2d(4, 3, 1)], ids=["linear", "conv"])
def test_other_dtypes_are_refused(layer, dtype, hint):
    with pytest.raises(TypeError, match=f"wanted float32; .*{hint}"):
        layer(torch.zeros(2, 4, 4, 4, dtype=dtype))


LAYERS = {
    "linear": QLinear(4, 3), "conv": QConv2d(4, 3, 1), "lstm": QLSTM(4, 3), "cell": QLSTMCell(4, 3),
    "embedding": QEmbedding(4, 3), "attention": QMultiheadAttention(4, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_no_tensor_is_refused(name):
    layer = LAYERS[name]
    count = 3 if name == "attention" else 1
    with pytest.raises(TypeError, match=f"{type(layer).__name__}: x is a NoneType; wanted a ten"):
        layer(*[None] * count)
    with pytest.raises(TypeError, match=r"a ndarray; wanted a tensor of .*torch\.from_numpy\(x\)"):
        layer(*[np.ones((2, 4, 4, 4), np.float32)] * count)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    "make",
    [
        lambda x: QLinear(4, 3),
        lambda x: QConv2d(4, 3, 1),
        lambda x: quantize_model(nn.Linear(4, 3), x, progress=False),
    ],
    ids=["linear", "conv", "network"],
)
def test_tensors_without_memory_are_refused(make):
    """Kernels take addresses, and 0 is the one of what torch.func.functionalize makes."""
    x = torch.ones(2, 4, 4, 4)
    layer = make(x)
    name = type(layer).__name__
    with pytest.raises(
        TypeError, match=rf"^{name}: .*is torch\.sparse_coo; wanted a dense tensor: "
    ):
        layer(x.to_sparse())
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: .*is on meta[;,] wanted the CPU"):
        layer(x.to("meta"))
    for call in (
        lambda: torch.func.vmap(layer)(torch.ones(3, *x.shape)),
        lambda: torch.func.jvp(layer, (x,), (x,)),
        lambda: torch.func.functionalize(layer)(x),
    ):
        with pytest.raises(
            TypeError, match=r": \w+ has no memory, as within torch\.func; wanted a call"
        ):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [QLinear(4, 3), QConv2d(4, 3, 1)], ids=["linear", "conv"])
def test_autocast_hands_over_half_precision(layer, dtype):
    x = torch.randn(2, 4, 4, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with pytest.raises(TypeError, match="float64"):
            layer(x.double())
    assert y.dtype == torch.float32 and torch.equal(y, layer(x.float()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
def test_linear_takes_nested_tensors(qparams):
    layer = QLinear.from_float(nn.Linear(4, 3), input_qparams=qparams)
    parts = [torch.randn(m, 4) for m in (5, 1, 0)]
    y = layer(torch.nested.nested_tensor(parts))
    assert y.is_nested
    for part, got in zip(parts, y.unbind(), strict=True):
        assert torch.equal(got, layer(part))


@pytest.mark.parametrize(
    "layer, shape, message",
    [
        (
            QLinear(4, 3),
            (2, 5),
            r"QLinear: x is float32 \(2, 5\), wanted float32 \(\*, 4\) .*\(3, 4\) int8",
        ),
        (QLinear(4, 3), (), r"QLinear: x is float32 \(\), wanted float32 \(\*, 4\)"),
        (
            QConv2d(4, 3, 1),
            (2, 3, 5, 5),
            r"\(2, 3, 5, 5\), wanted float32 \(B, 4, H, W\) or \(4, H, W\)",
        ),
        (QConv2d(4, 6, 1, groups=2), (2, 2, 5, 5), "in 2 groups"),
        (QConv2d(4, 3, 1), (4, 5), r"wanted float32 \(B, 4, H, W\)"),
        (QConv2d(4, 3, 1), (1, 2, 4, 5, 5), r"wanted float32 \(B, 4, H, W\)"),
        (QConv2d(4, 3, 5), (1, 4, 4, 9), "smaller than the kernel"),
    ],
)
def test_wrong_shapes_are_refused(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("layer", [QLinear(4, 3), QConv2d(4, 3, 1)], ids=["linear", "conv"])
def test_an_input_that_requires_grad(layer):
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\) or give it x\.detach\(\)"):
        layer(x)
    with torch.no_grad():
        y = layer(x)
    assert not y.requires_grad and torch.equal(y, layer(x.detach()))


class Rectified(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Centred(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: QLinear(4, 3, device="meta"), ValueError, "got device meta, wanted None or 'cpu'"),
        (lambda: QLinear(4, 3, dtype=torch.float16), ValueError, "got dtype torch.float16"),
        (lambda: QConv2d(4, 3, 1, device="cuda"), ValueError, "got device cuda"),
        (lambda: QConv2d(4, 3, 1, dtype=torch.float64), ValueError, "got dtype torch.float64"),
        (lambda: QConv2d(4, 3, 1, groups=2), ValueError, "groups=2; wanted groups that"),
        (lambda: QConv2d(4, 4, 1, groups=0), ValueError, "groups=0; wanted an int of"),
        (lambda: QConv2d(4, 3, 0), ValueError, "kernel_size: got 0"),
        (lambda: QConv2d(4, 3, 1, stride=0), ValueError, "stride: got 0"),
        (lambda: QConv2d(4, 3, 1, padding=-1), ValueError, "padding: got -1"),
        (lambda: QConv2d(4, 3, 1, padding="full"), ValueError, "QConv2d: padding: got 'full'"),
        (lambda: QConv2d(4, 3, 3, 2, "same"), ValueError, "QConv2d: padding='same' wants"),
        (lambda: QConv2d(4, 3, 1, padding_mode="edge"), ValueError, "padding_mode='edge', wanted"),
        *(
            (partial(kind, *sizes), error, f"^{kind.__name__}: {message}")
            for kind, sizes, error, message in (
                (QLinear, (65794, 1), ValueError, "K=65794 .* exact up to K=65793"),
                (QConv2d, (8000, 1, 3), ValueError, "K=72000 .* exact up to K=65793"),
                (QLSTM, (65794, 1), ValueError, "K=65794 .* exact up to K=65793"),
                (QMultiheadAttention, (65794, 1), ValueError, "K=65794 .* exact up to K=65793"),
                (QLinear, (-1, 3), ValueError, "in_features=-1; wanted an int of at least 0"),
                (QLinear, (1.5, 3), TypeError, "in_features=1.5; wanted an int of at least 0"),
                (QLinear, (3, "a"), TypeError, "out_features='a'; wanted an int"),
                (QConv2d, (-1, 3, 3), ValueError, "in_channels=-1; wanted an int of at least 0"),
                (QConv2d, (3, 1.5, 3), TypeError, "out_channels=1.5; wanted an int"),
                (QConv2d, (3, 3, 3, 1, 0, 1, 1.5), TypeError, "groups=1.5; wanted an int of at l"),
                (QEmbedding, (-1, 3), ValueError, "num_embeddings=-1; wanted an int of at least 0"),
                (QEmbeddingBag, (3, 1.5), TypeError, "embedding_dim=1.5; wanted an int of at l"),
                (QLSTM, (0, 3), ValueError, "input_size=0; wanted an int of at least 1"),
                (QGRU, (3, -1), ValueError, "hidden_size=-1; wanted an int of at least 1"),
                (QRNN, (3, 3, 1.5), TypeError, "num_layers=1.5; wanted an int of at least 1"),
                (QLSTMCell, (3, -1), ValueError, "hidden_size=-1; wanted an int of at least 0"),
                (QMultiheadAttention, (1.5, 3), TypeError, "embed_dim=1.5; wanted an int of at l"),
            )
        ),
        (
            lambda: QLinear.from_float(nn.Conv2d(3, 3, 1)),
            TypeError,
            "got Conv2d, wanted torch.nn.L",
        ),
        (lambda: QConv2d.from_float(nn.Linear(3, 3)), TypeError, "got Linear, wanted torch.nn.C"),
        (lambda: QLinear.from_float(Rectified(3, 3)), TypeError, "this Rectified has a forward of"),
        (lambda: QConv2d.from_float(Centred(3, 3, 1)), TypeError, "Centred has a _conv_forward of"),
        *(
            (partial(kind.from_float, made), ValueError, r"is on the meta device.*to_empty\(dev")
            for kind, made in (
                (QLinear, nn.Linear(3, 3, device="meta")),
                (QConv2d, nn.Conv2d(3, 3, 1, device="meta")),
                (QEmbedding, nn.Embedding(3, 3, device="meta")),
                (QLSTM, nn.LSTM(3, 3, device="meta")),
                (QMultiheadAttention, nn.MultiheadAttention(4, 2, device="meta")),
            )
        ),
        (lambda: QLinear.from_float(spoiled("weight")), ValueError, "QLinear.*: weight has NaN"),
        (lambda: QLinear.from_float(spoiled("bias")), ValueError, "QLinear.from_float: bias has N"),
        (
            lambda: QLinear.from_float(nn.LazyLinear(3)),
            ValueError,
            "QLinear.from_float: weight has no size yet; wanted a LazyLinear that ran",
        ),
    ],
)
def test_impossible_modules_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def spoiled(name):
    module = nn.Linear(4, 3)
    getattr(module, name).data.view(-1)[1] = float("nan")
    return module


@pytest.mark.parametrize(
    "qparams, error",
    [
        ((0.1, 3), TypeError),
        (QParams(np.float32(0.1), dtype=np.int8), ValueError),
        (QParams(np.ones(4, np.float32), axis=0), ValueError),
    ],
)
def test_input_qparams_are_uint8_per_tensor(qparams, error):
    layer = QLinear(4, 3)
    with pytest.raises(error, match="QLinear: input_qparams"):
        layer.set_input_qparams(qparams)
    assert layer.input_qparams is None


# --- the module: arguments, mode, repr


def test_arguments_are_those_of_torch():
    plain = QConv2d(4, 6, 3, 2, 1, 2, 2, False, "reflect", "cpu", torch.float32)
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        module = nn.Conv2d(4, 6, 3, 2, 1, 2, 2, False, "reflect")
        assert getattr(plain, name) == getattr(module, name)
    assert plain.bias is None
    layer = QLinear(4, 3, False, "cpu", torch.float32)
    assert (layer.in_features, layer.out_features, layer.bias) == (4, 3, None)


def test_from_float_takes_other_dtypes_and_the_mode():
    module = nn.Linear(8, 5).eval()
    exact = QLinear.from_float(module)
    assert not exact.training and not exact.to_float().training
    double = QLinear.from_float(copy.deepcopy(module).double())
    x = torch.randn(3, 8)
    assert torch.equal(double(x), exact(x))
    assert torch.equal(exact.train()(x), exact.eval()(x))
    parametrized = nn.utils.parametrizations.weight_norm(module)
    assert torch.equal(QLinear.from_float(parametrized).weight, exact.weight)


def test_to_float_is_the_inverse():
    layer = QLinear.from_float(nn.Linear(8, 5))
    before = torch.get_rng_state()
    module = layer.to_float()
    again = QLinear.from_float(module)
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)
    torch.testing.assert_close(again.weight_scale, layer.weight_scale)
    assert type(module) is nn.Linear and module.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_repr_shows_the_quantization():
    layer = QLinear(768, 768)
    dynamic = "in_features=768, out_features=768, bias=True, weight=int8 per channel, input="
    assert repr(layer) == f"QLinear({dynamic}dynamic per row)"
    layer.set_input_qparams(QParams(np.float32(0.0213), np.int32(118)))
    assert repr(layer) == f"QLinear({dynamic}uint8 scale=0.0213 zero_point=118)"
    assert repr(QConv2d(3, 6, 5)) == (
        "QConv2d(3, 6, kernel_size=(5, 5), stride=(1, 1), "
        "weight=int8 per channel, input=dynamic per tensor)"
    )
    full = QConv2d(4, 6, 3, 2, 1, 2, 2, False, "reflect")
    assert (
        "padding=(1, 1), dilation=(2, 2), groups=2, bias=False, padding_mode=reflect, weight=int8"
    ) in repr(full)
    assert "padding=same" in repr(QConv2d(4, 6, 3, padding="same"))


def test_input_qparams_switch_between_static_and_dynamic():
    module, x = nn.Linear(8, 5), torch.randn(3, 8)
    layer = QLinear.from_float(module, input_qparams=STATIC)
    assert layer.input_qparams == STATIC
    layer.set_input_qparams(None)
    assert layer.input_qparams is None
    np.testing.assert_array_equal(layer(x).numpy(), definition_linear(module, x))
    layer.set_input_qparams(STATIC)
    np.testing.assert_array_equal(layer(x).numpy(), definition_linear(module, x, STATIC))


# --- state

DYNAMIC_STATE = {"weight": torch.int8, "weight_scale": torch.float32, "bias": torch.float32}
STATIC_STATE = DYNAMIC_STATE | {"input_scale": torch.float32, "input_zero_point": torch.int32}


def layers(qparams=None):
    """A quantized layer of each kind, and an input."""
    linear = QLinear.from_float(nn.Linear(8, 5), input_qparams=qparams)
    conv2d = QConv2d.from_float(nn.Conv2d(8, 5, 3, padding=1), input_qparams=qparams)
    return [(linear, torch.randn(3, 8)), (conv2d, torch.randn(2, 8, 6, 6))]


def fresh(layer):
    if isinstance(layer, QLinear):
        return QLinear(8, 5)
    return QConv2d(8, 5, 3, padding=1)


@pytest.mark.parametrize("source", [None, STATIC], ids=["from dynamic", "from static"])
@pytest.mark.parametrize("target", [None, STATIC], ids=["to dynamic", "to static"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dict_round_trip(source, target, assign):
    for layer, x in layers(source):
        state = layer.state_dict()
        assert {k: v.dtype for k, v in state.items()} == (STATIC_STATE if source else DYNAMIC_STATE)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        other = fresh(layer)
        other.set_input_qparams(target)
        other(x)  # what it derived for this call must not survive the loading
        model = nn.Sequential(other)
        result = model.load_state_dict({f"0.{k}": v for k, v in loaded.items()}, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert other.input_qparams == source
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("weight", torch.zeros(5, 8), "weight: got torch.float32 from the checkpoint.*from_float"),
        ("weight", torch.zeros(5, 9, dtype=torch.int8), "size mismatch for weight"),
        ("weight", [1], "expected torch.Tensor"),
        ("weight_scale", torch.ones(5).double(), "weight_scale: got torch.float64"),
        ("weight_scale", torch.ones(4), "size mismatch for weight_scale"),
        ("weight_scale", torch.tensor([1, 1, 0, 1, 1.0]), "not finite or not greater than 0"),
        ("weight_scale", torch.tensor([1, 1, np.nan, 1, 1.0]), "not finite or not greater than 0"),
        ("bias", torch.full((5,), np.inf), "bias: has NaN or infinite values"),
        ("bias", torch.ones(5, device="meta"), "is on meta, wanted the CPU"),
        ("input_scale", torch.tensor(-1.0), "input_scale: has values"),
        ("input_scale", torch.ones(2), "size mismatch for input_scale"),
        ("input_scale", None, "come together"),
        ("input_zero_point", None, "come together"),
        ("input_zero_point", torch.tensor(256, dtype=torch.int32), "got 256, wanted 0 to 255"),
        ("input_zero_point", torch.tensor(-1, dtype=torch.int32), "got -1, wanted 0 to 255"),
        ("input_zero_point", torch.tensor(3), "got torch.int64 from the checkpoint"),
        ("other", torch.tensor(3), "Unexpected key"),
        ("weight_scale", None, "Missing key"),
        ("bias", None, "Missing key"),
    ],
)
@pytest.mark.parametrize("target", [None, STATIC], ids=["to dynamic", "to static"])
def test_wrong_state_is_refused(name, value, message, target):
    state = dict(QLinear.from_float(nn.Linear(8, 5), input_qparams=STATIC).state_dict())
    if value is None:
        del state[name]
    else:
        state[name] = value
    layer = QLinear(8, 5)
    layer.set_input_qparams(target)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


def test_state_without_bias():
    state = QLinear.from_float(nn.Linear(8, 5, bias=False)).state_dict()
    assert "bias" not in state
    QLinear(8, 5, bias=False).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        QLinear(8, 5).load_state_dict(state)


def test_loading_nothing_changes_nothing():
    for layer, x in layers(STATIC):
        before = layer(x)
        layer.load_state_dict({}, strict=False)
        assert layer.input_qparams == STATIC and torch.equal(layer(x), before)


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, through_pickle, through_torch])
@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
def test_copies(clone, qparams):
    for layer, x in layers(qparams):
        y = layer(x)
        size = len(pickle.dumps(layer))
        other = clone(layer)
        assert torch.equal(other(x), y) and other.input_qparams == qparams
        assert len(pickle.dumps(other)) == size  # nothing derived is saved
        if clone is not copy.copy:
            other.weight.zero_()
            assert not torch.equal(other(x), y)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias", "input_scale"])
@pytest.mark.parametrize("how", ["in place", "assign", "data", "inference"])
def test_a_changed_tensor_is_seen(name, how):
    for layer, x in layers(STATIC):
        before = layer(x)
        tensor = getattr(layer, name)
        changed = -tensor if tensor.dtype == torch.int8 else tensor * 2
        if how == "in place":
            tensor.copy_(changed)
        elif how == "assign":
            setattr(layer, name, changed)
        elif how == "data":
            tensor.data = changed
        else:
            with torch.inference_mode():
                setattr(layer, name, changed * 1)
        after = layer(x)
        assert not torch.equal(after, before)
        other = fresh(layer)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(after, other(x))


def test_a_bias_may_come_and_go():
    for layer, x in layers():
        y, bias = layer(x), layer.bias
        layer.bias = None
        bare = layer(x)
        assert not torch.equal(bare, y)
        layer.bias = bias
        assert torch.equal(layer(x), y)


def test_half_a_pair_of_input_parameters_is_refused():
    layer = QLinear(8, 5)
    layer.input_scale = torch.tensor(0.1)
    with pytest.raises(ValueError, match="set_input_qparams sets both"):
        layer(torch.zeros(1, 8))


@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half,
        nn.Module.double,
        nn.Module.bfloat16,
        nn.Module.cpu,
        nn.Module.share_memory,
        lambda m: m.to(torch.float16),
        lambda m: m.type(torch.float64),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.requires_grad_(False),
    ],
    ids=["half", "double", "bfloat16", "cpu", "share", "to", "type", "channels_last", "freeze"],
)
def test_conversions_leave_the_state_alone(convert):
    for layer, x in layers(STATIC):
        y = layer(x)
        convert(nn.Sequential(layer))
        assert {k: v.dtype for k, v in layer.state_dict().items()} == STATIC_STATE
        assert torch.equal(layer(x), y)


def test_another_device_is_refused():
    for layer, x in layers():
        y = layer(x)
        with pytest.raises(RuntimeError, match=r"cannot move to meta.*to_float"):
            nn.Sequential(layer).to("meta")
        assert torch.equal(layer(x), y)


def test_made_and_used_under_inference_mode():
    module, x = nn.Linear(8, 5), torch.randn(3, 8)
    with torch.inference_mode():
        layer = QLinear.from_float(module, input_qparams=STATIC)
        y = layer(x)
        layer.bias.add_(1)
        assert not torch.equal(layer(x), y)
        layer.bias.sub_(1)
        other = copy.deepcopy(layer)
        assert torch.equal(other(x), layer(x))
    np.testing.assert_array_equal(y.numpy(), definition_linear(module, x, STATIC))
    assert torch.equal(other(x), layer(x))


def test_default_device_and_dtype_do_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            layer = QLinear(8, 5)
            layer.set_input_qparams(STATIC)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {k: v.dtype for k, v in layer.state_dict().items()} == STATIC_STATE
    assert not layer(torch.randn(2, 8)).any()


@pytest.mark.parametrize(
    "make",
    [
        partial(QLinear, 8, 5), partial(QConv2d, 3, 4, 3), partial(QLSTM, 4, 4, proj_size=2),
        partial(QGRUCell, 4, 4), partial(QEmbedding, 10, 8, padding_idx=0),
        partial(QMultiheadAttention, 8, 2, add_bias_kv=True),
    ],
    ids=lambda make: make.func.__name__,
)  # fmt: skip
def test_float_twins_are_float32_whatever_the_defaults(make):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            layer = make()
            float_layer = layer.to_float()
    finally:
        torch.set_default_dtype(torch.float32)
    biases = [layer.bias_k, layer.bias_v] if isinstance(layer, QMultiheadAttention) else []
    for tensor in (*biases, *float_layer.parameters()):
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not tensor.any()


def test_functional_call_uses_the_tensors_it_is_given():
    for layer, x in layers():
        y, other = layer(x), fresh(layer)
        assert torch.equal(torch.func.functional_call(other, dict(layer.state_dict()), (x,)), y)
        assert not other(x).any()


def test_threads_share_a_layer():
    for layer, x in layers():
        y = layer(x)
        layer.bias.add_(0)  # derived anew, by whichever thread comes first
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(r, y) for r in pool.map(layer, [x] * 40))


# --- tracing: one custom operator each


@pytest.fixture
def handed_over(monkeypatch):
    """The ids of the objects that ops was called with, per call."""
    calls = []

    def spy(method):
        def call(self, *memory):
            calls.append((self.weight, self.epilogue, self.x_qparams))
            method(self, *memory)

        return call

    for name in ("linear", "conv2d"):
        monkeypatch.setattr(ops.Operands, name, spy(getattr(ops.Operands, name)))
    return calls


def one_set_of_objects(calls):
    return all(a is b for call in calls for a, b in zip(call, calls[0], strict=True))


@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
def test_every_call_hands_over_the_same_objects(handed_over, qparams):
    for layer, x in layers(qparams):
        tensors = [getattr(layer, name) for name in STATIC_STATE]
        for call in (layer, lambda x, layer=layer, t=tensors: operator(layer, x, t)):
            handed_over.clear()
            for _ in range(3):
                call(x)
            assert len(handed_over) == 3 and one_set_of_objects(handed_over)


def operator(layer, x, tensors):
    if isinstance(layer, QLinear):
        return torch.ops.fastq.linear(x, *tensors)
    geometry = [1, 1], [1, 1, 1, 1], [1, 1], False, 1, [0, 0]
    return torch.ops.fastq.convolution(x, *tensors, *geometry)


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias", "input_scale"])
def test_operators_see_a_changed_tensor(name):
    for layer, x in layers(STATIC):
        tensors = {name: getattr(layer, name) for name in STATIC_STATE}
        assert torch.equal(operator(layer, x, tensors.values()), layer(x))
        tensors[name].copy_(-tensors[name] if name == "weight" else tensors[name] * 2)
        assert torch.equal(operator(layer, x, tensors.values()), layer(x))
        changed = -tensors[name] if name == "weight" else tensors[name] * 2
        tensors[name] = changed
        setattr(layer, name, changed)
        assert torch.equal(operator(layer, x, tensors.values()), layer(x))


def test_operators_tell_geometries_of_one_weight_apart():
    layer = QConv2d.from_float(nn.Conv2d(8, 5, 3))
    x = torch.randn(2, 8, 6, 6)
    tensors = (layer.weight, layer.weight_scale, layer.bias, None, None)
    for _ in range(2):
        assert operator(layer, x, tensors).shape == (2, 5, 6, 6)
        geometry = [1, 1], [0, 0, 0, 0], [1, 1], False, 1, [0, 0]
        plain = torch.ops.fastq.convolution(x, *tensors, *geometry)
        assert torch.equal(plain, layer(x))


def test_operators_do_not_keep_a_weight_alive():
    layer = QLinear.from_float(nn.Linear(8, 5))
    torch.ops.fastq.linear(torch.zeros(1, 8), layer.weight, layer.weight_scale, None, None, None)
    weight = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert weight() is None


def test_operators_satisfy_torch():
    for qparams in (None, STATIC):
        for layer, x in layers(qparams):
            tensors = [getattr(layer, name) for name in STATIC_STATE]
            if isinstance(layer, QLinear):
                torch.library.opcheck(torch.ops.fastq.linear.default, (x, *tensors))
                torch.library.opcheck(torch.ops.fastq.linear.default, (x[0], *tensors))
            else:
                geometry = ([1, 2], [0, 1, 2, 3], [2, 1], False, 1, [0, 0])
                torch.library.opcheck(torch.ops.fastq.convolution.default, (x, *tensors, *geometry))


def network(qparams=None):
    return nn.Sequential(
        QConv2d.from_float(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
        nn.ReLU(),
        QConv2d.from_float(nn.Conv2d(8, 8, 3, stride=2, padding=1), input_qparams=qparams),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        QLinear.from_float(nn.Linear(32, 5), input_qparams=qparams),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
def test_compile(backend, qparams, handed_over):
    torch.compiler.reset()
    model, x = network(qparams), torch.randn(2, 3, 8, 8)
    y, y0 = model(x), model(x[:1])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    handed_over.clear()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(x), y)
            assert torch.equal(compiled(x[:1]), y0)
    assert len(handed_over) == 18 and one_set_of_objects(handed_over[2::3])  # the last layer's
    with torch.no_grad():
        assert torch.equal(compiled(x.clone().requires_grad_()), y)
    model[5].bias.add_(1)
    assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), y)


@pytest.mark.parametrize("make, shape", [
    (lambda: QLinear.from_float(nn.Linear(6, 4)), (3, 6)),
    (lambda: QConv2d.from_float(nn.Conv2d(3, 4, 3)), (2, 3, 6, 6)),
    (lambda: QLSTM.from_float(nn.LSTM(6, 4)), (3, 2, 6)),
    (lambda: quantize_layers(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))),
     (3, 6)),
])  # fmt: skip
def test_a_compiled_layer_goes_on_after_a_call_that_it_refused(make, shape):
    torch.compiler.reset()
    layer, x = make().eval(), torch.randn(shape)
    compiled = torch.compile(layer, backend="eager")
    for refused in (x.double(), x.clone().requires_grad_()):
        with pytest.raises((TypeError, RuntimeError), match=r"float32|inference"):
            compiled(refused)
        with torch.no_grad():
            wanted, got = layer(x), compiled(x)
        for a, b in zip(tree_leaves(wanted), tree_leaves(got), strict=True):
            assert torch.equal(a, b)
    torch.compiler.reset()


def test_compile_unbatched_and_leading_shapes():
    torch.compiler.reset()
    for layer, x in layers():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x[0]), layer(x[0]))
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
def test_export(strict, qparams):
    model, x = network(qparams), torch.randn(2, 3, 8, 8)
    y = model(x)
    batch, size = torch.export.Dim("batch"), torch.export.Dim("size", min=4, max=64)
    shapes = ({0: batch, 2: size, 3: size},)
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=shapes)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert (
        names.count("fastq.convolution.default") == 2 and names.count("fastq.linear.default") == 1
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(x), y)
    larger = torch.randn(3, 3, 12, 12)
    assert torch.equal(loaded(larger), model(larger))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_does_not_bake_the_result_in():
    for layer, x in layers(STATIC):
        traced = torch.jit.trace(layer, x)
        assert torch.equal(traced(-x), layer(-x))


def test_fake_tensors_go_through_the_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for layer, x in layers():
        y = layer(mode.from_tensor(x))
        assert y.shape == layer(x).shape and y.stride() == layer(x).stride()


# --- tensors of another shape


@pytest.mark.parametrize(
    "layer",
    [QLinear(4, 6), *(kind(4, 6, 3) for kind in CONVOLUTIONS)],
    ids=lambda layer: type(layer).__name__,
)
def test_an_assigned_tensor_of_another_shape_is_refused(layer):
    """Kernels take addresses: a weight with more outputs would write beyond the result."""
    x = torch.zeros(1, 4, *[5] * (layer.weight.dim() - 2))
    layer(x)
    with pytest.raises(TypeError, match="meta"):
        layer(x.to("meta"))
    for name in ("weight", "weight_scale", "bias"):
        given = getattr(layer, name)
        for axis in range(given.dim()):
            for size in (1, 1000):
                shape = [size if i == axis else n for i, n in enumerate(given.shape)]
                setattr(layer, name, torch.ones(shape, dtype=given.dtype))
                with pytest.raises(ValueError, match=f"{name} is .*, wanted"):
                    layer(x)
        setattr(layer, name, given)
    layer(x)
    if isinstance(layer, QLinear):  # an attribute alone changes nothing
        layer.in_features, layer.out_features = 9, 1
        with pytest.raises(ValueError, match="wanted 4, for weight"):
            layer(torch.zeros(1, 9))
