"""Lines, images, volumes, transposed or not: their definition, torch's arguments, copies and files.

tests/test_nn.py has what QConv2d shares with QLinear.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import noise_ratio
from torch import Tensor, nn
from torch.nn import functional as F

import fastq
from fastq import QParams, reference
from fastq.nn.conv import CONVOLUTIONS, QConv1d, QConv2d, QConv3d, QConvTranspose2d
from fastq.qparams import Dequant, quantize_weight
from fastq.weights import outputs_first

C, STATIC = 4, QParams(0.035, 131)
MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


def definition(module: Any, x: Tensor, qparams: QParams | None, more: Any = None) -> Tensor:
    """What a float convolution and x (B, C, *sizes) shall give: exact sums of integers, in float64,
    then the epilogue."""
    array = x.contiguous().numpy()
    if qparams is None:
        scale, zero_point = reference.dynamic_qparams(array, per_row=False)
    else:
        scale, zero_point = qparams.scale, qparams.zero_point
    q = reference.quantize(array, scale=scale, zero_point=zero_point)
    steps = torch.from_numpy(q.astype(np.float64) - float(zero_point))
    weight, groups = module.weight.detach(), module.groups
    first = outputs_first(weight, groups) if module.transposed else weight
    data, scales = quantize_weight(first.numpy())
    integers = torch.from_numpy(data.astype(np.float64))
    axes = weight.dim() - 2
    if module.transposed:
        function = getattr(F, f"conv_transpose{axes}d")
        acc = function(
            steps, outputs_first(integers, groups), None, module.stride, module.padding,
            module.output_padding if more is None else more, groups, module.dilation,
        )  # fmt: skip
    else:
        padding = module.padding
        if module.padding_mode != "zeros":
            steps = F.pad(
                steps, module._reversed_padding_repeated_twice, MODES[module.padding_mode]
            )
            padding = 0
        function = getattr(F, f"conv{axes}d")
        acc = function(steps, integers, None, module.stride, padding, module.dilation, groups)
    bias = None if module.bias is None else module.bias.detach().numpy()
    epilogue = Dequant(scales, x_scale=scale, bias=bias)
    last = acc.movedim(1, -1).numpy().astype(np.int64)
    return torch.from_numpy(reference._finish(last, epilogue)).movedim(-1, 1)


PLAIN: dict[str, dict[str, Any]] = {
    "1": {"kernel_size": 1},
    "3": {"kernel_size": 3, "padding": 1},
    "bias off": {"kernel_size": 2, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 2},
    "dilation": {"kernel_size": 3, "dilation": 2, "stride": 3, "padding": 1},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": C, "padding": "same"},
    "same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "stride": 1},
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "1": {"kernel_size": 1},
    "1 strided": {"kernel_size": 1, "stride": 3},
    "2 by 2": {"kernel_size": 2, "stride": 2},
    "stride 1": {"kernel_size": 3, "padding": 1},
    "padding beyond the kernel": {"kernel_size": 2, "padding": 3},
    "4 by 2": {"kernel_size": 4, "stride": 2, "padding": 1},
    "3 by 2": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "much output_padding": {"kernel_size": 2, "stride": 4, "output_padding": 3},
    "dilation": {"kernel_size": 3, "stride": 2, "dilation": 3, "padding": 2},
    "output_padding of a dilation": {"kernel_size": 2, "dilation": 3, "output_padding": 2},
    "groups": {"kernel_size": 3, "stride": 2, "groups": 2, "bias": False},
    "depthwise": {"kernel_size": 4, "stride": 2, "groups": C},
}
CASES = [
    pytest.param(kind, given, id=f"{kind.__name__} {name}")
    for kind in CONVOLUTIONS
    for name, given in (TRANSPOSED if "Transpose" in kind.__name__ else PLAIN).items()
]


def pair(kind: Any, given: dict[str, Any], qparams: QParams | None = None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = kind.FLOAT(C, 8 if given.get("groups") == C else 6, **given).eval()
    return module, kind.from_float(module, input_qparams=qparams)


def batch(kind: Any, size: int = 7) -> Tensor:
    return torch.randn(2, C, *range(size, size + kind.AXES))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("qparams", [None, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(("kind", "given"), CASES)
def test_it_is_its_definition(kind: Any, given: dict[str, Any], qparams: QParams | None) -> None:
    module, layer = pair(kind, given, qparams)
    x = batch(kind)
    y, exact = layer(x), module(x).detach()
    assert torch.equal(y, definition(module, x, qparams))
    assert y.shape == exact.shape and y.is_contiguous() and y.dtype is torch.float32
    assert noise_ratio(exact, y) > 27
    assert torch.equal(layer(x[0]), layer(x[:1])[0])  # unbatched
    assert layer(x[:0]).shape == (0, *exact.shape[1:])
    apart = torch.randn(2, *x.shape[2:], 2 * C)[..., ::2].movedim(-1, 1)
    assert torch.equal(layer(apart), layer(apart.contiguous()))
    back = layer.to_float()
    assert type(back) is type(module) and kind.made_with(back) == kind.made_with(module)
    assert noise_ratio(exact, back(x).detach()) > 35


@pytest.mark.parametrize("given", [{}, {"stride": (2, 1, 1), "padding": (2, 0, 0), "groups": 2}])
def test_frames_alone(given: dict[str, Any]) -> None:
    """Convolutions along the first axis of a volume, as those between two frames."""
    x = torch.randn(2, C, 6, 5, 4)
    for kind in CONVOLUTIONS[2], CONVOLUTIONS[5]:
        module, layer = pair(kind, {"kernel_size": (3, 1, 1), **given})
        assert torch.equal(layer(x), definition(module, x, None))
        assert layer(x).is_contiguous()


def test_mixed_sizes() -> None:
    """Each axis has its own kernel, stride, padding, dilation and output_padding."""
    torch.manual_seed(1)
    x = torch.randn(2, C, 5, 8, 6)
    module = nn.Conv3d(C, 6, (1, 3, 2), (2, 1, 3), (0, 2, 1), (1, 2, 1), 2)
    read = x.clone()
    read[:, :, 1::2] = 0  # frames between two steps are in no range
    assert torch.equal(QConv3d.from_float(module)(x), definition(module, read, None))
    transposed = nn.ConvTranspose3d(C, 6, (1, 3, 2), (3, 1, 2), (0, 2, 1), (2, 0, 1), 2)
    layer = fastq.QConvTranspose3d.from_float(transposed)
    assert torch.equal(layer(x), definition(transposed, x, None))


@pytest.mark.parametrize("kind", [QConv2d, QConvTranspose2d])
def test_images_keep_their_order(kind: Any) -> None:
    for given in ({"kernel_size": 3}, {"kernel_size": 2, "stride": 2}):
        module, layer = pair(kind, given)
        n, c, h, w = batch(kind).shape
        last = torch.randn(n, h, w, 2 * c).permute(0, 3, 1, 2)
        images = [
            torch.randn(n, c, h, w), last[:, :c].contiguous(memory_format=torch.channels_last),
            last[:, c:], last[:, ::2], last[:, :c].flip(2), torch.randn(n, h + 2, w, c).permute(
                0, 3, 1, 2)[:, :, 1:-1],  # those with gaps
            torch.randn(h, w, n, c).permute(2, 3, 0, 1), torch.randn(n, c, 1, 1).expand(n, c, h, w),
            torch.randn(n, c, w, h).mT, torch.randn(n, c, 1, 1),
        ]  # fmt: skip
        for x in images:
            if min(x.shape[2:]) >= 3 or kind is QConvTranspose2d:
                assert layer(x).stride() == module(x).stride()
                assert torch.equal(layer(x), definition(module, x, None))
    module = kind.FLOAT(1, 8, 3, padding=1)
    layer = kind.from_float(module)
    for shape in ((2, 1, 8, 9), (2, 1, 5, 1), (3, 1, 1, 1)):
        for order in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(memory_format=order)  # both at once
            assert layer(x).stride() == module(x).stride()
            assert torch.equal(layer(x), definition(module, x, None))


def test_lines_of_features() -> None:
    """(B, L, C) seen as (B, C, L), as sequences are: read in place, the result as torch's."""
    module, layer = pair(QConv1d, {"kernel_size": 3})
    x = torch.randn(2, 9, C).transpose(1, 2)
    assert layer(x).stride() == module(x).stride()
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_a_network_may_view_the_result() -> None:
    """x.view(B, -1) after convolutions, which only contiguous memory allows."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 6, 5), nn.Linear(6 * 14 * 14, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv(x)), 2)
            return self.last(x.view(-1, 6 * 14 * 14))  # type: ignore[no-any-return]

    model, x = Net().eval(), torch.randn(4, 3, 32, 32)
    for data in (None, x):
        got = fastq.quantize_layers(model, data, strict=True)
        assert noise_ratio(model(x).detach(), got(x)) > 27


@pytest.mark.parametrize("kind", CONVOLUTIONS[3:])
def test_output_size(kind: Any) -> None:
    module, layer = pair(kind, {"kernel_size": 3, "stride": 3, "padding": 1})
    x = batch(kind)
    for extra in range(3):
        wanted = [(n - 1) * 3 + 1 + extra for n in x.shape[2:]]
        exact = module(x, wanted).detach()
        assert exact.shape[2:] == tuple(wanted)
        y = layer(x, wanted)
        assert torch.equal(y, definition(module, x, None, (extra,) * kind.AXES))
        assert torch.equal(layer(x, [2, 6, *wanted]), y)
        assert torch.equal(layer(x[0], wanted), layer(x[:1], wanted)[0])
        assert torch.equal(layer(x[0], [6, *wanted]), layer(x[0], wanted))
    for wrong in ([n * 3 + 5 for n in x.shape[2:]], [1] * kind.AXES, [], [9] * (kind.AXES + 1)):
        with pytest.raises(ValueError, match="output_size"):
            layer(x, wrong)


def test_copies_and_files(tmp_path: Path) -> None:
    for kind in CONVOLUTIONS:
        given = {"kernel_size": 3, "stride": 2, "groups": 2}
        module, layer = pair(kind, given, STATIC)
        x = batch(kind)
        wanted = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), wanted)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        empty = kind(C, 6, **given)
        empty.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(empty(x), wanted) and empty.input_qparams == STATIC
        assert layer.weight.shape == module.weight.shape and layer.weight_scale.shape == (6,)
        fastq.save(layer, tmp_path / "layer")
        assert torch.equal(fastq.load(tmp_path / "layer", kind.FLOAT(C, 6, **given))(x), wanted)
        with pytest.raises(ValueError, match="stride"):
            fastq.load(tmp_path / "layer", kind.FLOAT(C, 6, 3, groups=2))
    assert repr(layer) == (
        "QConvTranspose3d(4, 6, kernel_size=(3, 3, 3), stride=(2, 2, 2), groups=2, "
        "weight=int8 per channel, input=uint8 scale=0.035 zero_point=131)"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_compile_export_and_trace(kind: Any) -> None:
    _, layer = pair(kind, {"kernel_size": 3, "stride": 2, "padding": 1})
    x = batch(kind)
    wanted = layer(x)
    for backend in ("eager", "aot_eager"):
        assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), wanted)
    sizes = {"x": {0: torch.export.Dim("b", min=2, max=64)}}
    exported = torch.export.export(layer, (x,), dynamic_shapes=sizes).module()
    assert torch.equal(exported(x), wanted)
    more = torch.cat([x, x + 1, x])
    assert torch.equal(exported(more), layer(more))
    assert torch.equal(torch.jit.trace(layer, x)(x), wanted)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_operator_satisfies_torch(kind: Any) -> None:
    for given in ({"kernel_size": 3, "stride": 2}, {"kernel_size": 2, "groups": 2}):
        _, layer = pair(kind, given)
        tensors = [layer._buffers[name] for name in ("weight", "weight_scale", "bias")]
        arguments = *tensors, None, None, *layer._geometry.flat(), (0,) * kind.AXES
        operator = torch.ops.fastq.convolution.default
        for x in (batch(kind), batch(kind).movedim(1, -1).contiguous().movedim(-1, 1)):
            torch.library.opcheck(operator, (x, *arguments))


def test_the_operator_checks_what_it_is_given() -> None:
    """A file or an exported program may hold anything."""
    _, layer = pair(QConvTranspose2d, {"kernel_size": 3, "stride": 2})
    weight, scale, bias = layer.weight, layer.weight_scale, layer.bias
    x, run = batch(QConvTranspose2d), torch.ops.fastq.convolution
    rest = [2, 2], [0, 0, 0, 0], [1, 1], True, 1, [0, 0]
    assert torch.equal(run(x, weight, scale, bias, None, None, *rest), layer(x))
    wrong: list[tuple[Any, ...]] = [
        (x[:, :3], weight, scale, bias, None, None, *rest),
        (x[0], weight, scale, bias, None, None, *rest),
        (x.double(), weight, scale, bias, None, None, *rest),
        (x, weight.float(), scale, bias, None, None, *rest),
        (x, weight[0, 0], scale, bias, None, None, *rest),
        (x, weight, scale[:3], bias, None, None, *rest),
        (x, weight, scale, bias[:3], None, None, *rest),
        (x, weight, scale, bias, None, None, [2], *rest[1:]),
        (x, weight, scale, bias, None, None, [0, 1], *rest[1:]),
        (x, weight, scale, bias, None, None, [2, 2], [0, 0], *rest[2:]),
        (x, weight, scale, bias, None, None, [2, 2], [-1, 0, 0, 0], *rest[2:]),
        (x, weight, scale, bias, None, None, *rest[:2], [0, 1], *rest[3:]),
        (x, weight, scale, bias, None, None, *rest[:4], 0, [0, 0]),
        (x, weight, scale, bias, None, None, *rest[:4], 3, [0, 0]),
        (x, weight, scale, bias, None, None, *rest[:5], [2, 0]),
        (x, weight, scale, bias, None, None, *rest[:5], [-1, 0]),
        (x, weight, scale, bias, None, None, *rest[:5], [0]),
        (x, weight, scale, bias, None, None, [2, 2], [99, 99, 0, 0], *rest[2:]),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, TypeError), match="wanted"):
            run(*arguments)


def test_what_is_refused() -> None:
    for kind in CONVOLUTIONS:
        name = kind.__name__
        for given in ({"groups": 3}, {"padding_mode": "odd"}, {"stride": 0}, {"padding": -1},
                      {"dilation": 0}, {"stride": (1, 1, 1, 1)}):  # fmt: skip
            with pytest.raises(ValueError, match=f"{name}.*wanted"):
                kind(C, 6, 3, **given)
        with pytest.raises(ValueError, match=r"kernel_size.*wanted"):
            kind(C, 6, 0)
        with pytest.raises(TypeError, match=f"wanted torch.nn.{kind.FLOAT.__name__}"):
            kind.from_float(nn.Linear(2, 2))
        layer = kind(C, 6, 3)
        for bad in (torch.zeros(2, C + 1, *[5] * kind.AXES), torch.zeros(5), torch.zeros([1] * 7)):
            with pytest.raises(ValueError, match=f"{name}: x is float32"):
                layer(bad)
        with pytest.raises(RuntimeError, match="requires grad"):
            layer(batch(kind).requires_grad_())
        for axis in range(kind.AXES):  # nothing but padding
            padded = kind(C, 6, 3, padding=1)
            size = [5] * kind.AXES
            assert padded(torch.zeros(0, C, *size)).shape[:2] == (0, 6)
            size[axis] = 0
            with pytest.raises(ValueError, match=r"wanted 1 or more|frames, padding included"):
                padded(torch.zeros(2, C, *size))
    for kind in CONVOLUTIONS[:3]:
        with pytest.raises(ValueError, match=r"smaller than the|frames, padding included"):
            kind(C, 6, 3)(torch.zeros(2, C, *[2] * kind.AXES))
    for kind in CONVOLUTIONS[3:]:
        with pytest.raises(ValueError, match="output_padding"):
            kind(C, 6, 3, stride=2, output_padding=2)
        with pytest.raises(ValueError, match="padding_mode"):
            kind(C, 6, 3, padding_mode="reflect")
        with pytest.raises(ValueError, match="wanted 1 or more"):
            kind(C, 6, 1, padding=4)(torch.zeros(2, C, *[3] * kind.AXES))


def test_a_line_of_layers(tmp_path: Path) -> None:
    """A network of all of them: as layers, calibrated or not, saved, loaded."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, stride=2),
        nn.ConvTranspose1d(8, 4, 4, 2, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Unflatten(2, (4, -1)),
        nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.ReLU(), nn.Unflatten(1, (3, 2)),
        nn.Conv3d(3, 4, (2, 3, 3), padding=1), nn.BatchNorm3d(4), nn.ConvTranspose3d(4, 2, 2),
    )  # fmt: skip
    x = torch.randn(16, 3, 38)
    for _ in range(10):
        model(x)
    model.eval()
    wanted = model(x).detach()
    for data in (None, x):
        got = fastq.quantize_layers(model, data)
        kinds = [type(m).__name__ for m in got.modules() if isinstance(m, CONVOLUTIONS)]
        assert len(kinds) == 6
        assert noise_ratio(wanted, got(x)) > 24
        fastq.save(got, tmp_path / "net")
        assert torch.equal(fastq.load(tmp_path / "net", model)(x), got(x))
    rows = {row.name: row.result for row in fastq.summary(got).rows}
    assert set(rows.values()) == {"int8 static", "folded"}


@pytest.mark.parametrize(
    ("layer", "sums"),
    [
        (nn.ConvTranspose1d(65_794, 1, 2, 2), 65_794),
        (nn.ConvTranspose1d(2, 1, 3, dilation=20_000), 80_002),
        (nn.Conv1d(2, 1, 32_897), 65_794),
    ],
)
def test_too_many_products_stay_float(layer: Any, sums: int) -> None:
    model = nn.Sequential(layer, nn.Linear(1, 1))
    rows = {row.name: row for row in fastq.summary(fastq.quantize_layers(model)).rows}
    assert rows["0"].result == "float" and f"sums {sums} products" in rows["0"].reason
    inside = nn.ConvTranspose1d(65_793, 1, 2, 2)
    assert type(fastq.quantize_layers(inside)) is fastq.QConvTranspose1d


class Video(nn.Module):
    """Volumes, with batch norms that fold into them, then a head; a clip's tags in a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(3, 8, 3, 2, "valid", bias=False), nn.BatchNorm3d(8)
        self.second = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))
        self.up, self.after = nn.ConvTranspose3d(8, 6, 2, 2, groups=2), nn.BatchNorm3d(6)
        self.tags = nn.EmbeddingBag(30, 40, mode="sum")
        self.last, self.side = nn.Linear(6, 5), nn.Linear(40, 5)

    def forward(self, x: Tensor, tags: Tensor) -> Tensor:
        x = self.second(F.relu(self.norm(self.first(x))))
        x = F.relu(self.after(self.up(F.relu(x)))).mean((2, 3, 4))
        return self.last(x) + self.side(self.tags(tags))  # type: ignore[no-any-return]


def test_volumes_and_bags_in_a_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Video()
    bright = torch.tensor([0.1, 1.0, 3.0])[:, None, None, None, None]  # ranges of their own
    data = [(bright * torch.rand(3, 3, 7, 9, 11), torch.randint(0, 30, (3, 6))) for _ in range(4)]
    for batch in data:
        model(*batch)
    model.eval()

    def forward(network: nn.Module, batch: Any) -> Any:
        return network(*batch)

    got = fastq.quantize_model(model, data, forward=forward, strict=True, progress=False)
    rows = {row.name: (row.result, row.reason) for row in fastq.summary(got).rows}
    volumes = ("int8 static", "of volumes, which no program has")
    assert rows == {
        "first": volumes, "norm": ("folded", "into 'first'"), "second": volumes, "up": volumes,
        "after": ("folded", "into 'up'"), "tags": ("int8 weight", ""),
        "last": ("int8 static", ""), "side": ("int8 static", ""),
    }  # fmt: skip
    fastq.save(got, tmp_path / "video")
    loaded = fastq.load(tmp_path / "video")
    with torch.no_grad():
        for clip, tags in (data[0], (torch.rand(1, 3, 7, 9, 11), torch.randint(0, 30, (1, 6)))):
            assert noise_ratio(model(clip, tags), got(clip, tags)) > 27
            assert torch.equal(loaded(clip, tags), got(clip, tags))
        first = got(*data[0])
        assert torch.equal(
            first, torch.cat([got(c[None], t[None]) for c, t in zip(*data[0], strict=True)])
        )
    report = fastq.report(
        model, got, data[:1], forward=forward, passes=1, path=None, progress=False
    )
    steps = {step.layer: step for step in report.steps if step.op == "fastq.convolution.default"}
    assert steps.keys() == {"first", "second", "up"}
    assert all(step.snr is not None and step.snr > 25 for step in steps.values())
    kept = fastq.quantize_model(
        model, data, forward=forward, skip=["first", "tags"], progress=False
    )
    results = {row.name: row.result for row in fastq.summary(kept).rows}
    assert results["first"] == results["tags"] == "float" and results["up"] == "int8 static"
    training = fastq.prepare_qat(model, data, forward=forward, progress=False)
    training(*data[0]).sum().backward()
    converted = fastq.convert(training)
    assert noise_ratio(model(*data[0]).detach(), converted(*data[0])) > 27


class Causal(nn.Conv1d):
    """As sequence models have it: the past is padded in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2 * self.dilation[0], 0)))


class Odd(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0), value=1.0))


def test_subclasses_that_pad_are_rebuilt(tmp_path: Path) -> None:
    model = nn.Sequential(Causal(3, 4, 3, dilation=2), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval()
    x = torch.randn(4, 3, 20)
    got = fastq.quantize_layers(model, x, strict=True)
    assert fastq.summary(got).rebuilt == ("0",)
    assert [type(m) for m in got[0]] == [nn.ZeroPad1d, QConv1d]  # type: ignore[index]
    assert noise_ratio(model(x).detach(), got(x)) > 27
    fastq.save(got, tmp_path / "net")
    assert torch.equal(fastq.load(tmp_path / "net", model)(x), got(x))
    odd = nn.Sequential(Odd(3, 4, 3), nn.Conv1d(4, 2, 1))
    rows = {row.name: row for row in fastq.summary(fastq.quantize_layers(odd)).rows}
    assert rows["0"].result == "float" and "a subclass of nn.Conv1d" in rows["0"].reason
