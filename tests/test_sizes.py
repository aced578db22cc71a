"""Sizes that follow a network's input: their arithmetic, and what a network's operations make."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Apply, Pyramid, call, conv
from torch import Tensor, nn
from torch.nn import functional as F

import fastq
from fastq.capture import capture
from fastq.extents import size_along
from fastq.sizes import Size, sized


def test_a_size_is_what_was_done_to_it_in_order() -> None:
    """plus, times and over, one after another, against integers; `over` has a form or says no."""
    draw, forms = random.Random(0), 0
    for _ in range(500):
        size: Size | None = Size(1, 1)
        numbers = list(range(100, 140))
        for _ in range(draw.randrange(1, 6)):
            n = draw.randrange(1, 5)
            match draw.randrange(3):
                case 0:
                    more = draw.randrange(-6, 7)
                    size, numbers = size.plus(more), [x + more for x in numbers]
                case 1:
                    size, numbers = size.times(n), [x * n for x in numbers]
                case _:
                    size, numbers = size.over(n), [x // n for x in numbers]
            if size is None:
                break
            forms += 1
            assert [size.of([(), (7, n)]) for n in range(100, 140)] == numbers
    assert forms > 1000


def test_what_is_sized() -> None:
    shapes = [(2, 9), (5, 6, 7, 8), ()]
    given = {"a": (Size(1, 3), 4), "b": [Size(0, 0, 2, 1)], "c": "x"}
    assert sized(given, shapes) == {"a": (8, 4), "b": [5], "c": "x"}
    for size in (Size(1, 4), Size(2, 0), Size(3, 0)):
        with pytest.raises(ValueError, match=r"follows axis \d of input \d"):
            size.of(shapes)


@pytest.mark.parametrize("given", [(-1, 0), (0, -1), (0, 1, 1.0), (0, True), (0, 1, 2**40),
                                   (0, 1, 1, 0, 0)])  # fmt: skip
def test_a_size_of_other_numbers_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="wanted integers"):
        Size(*given)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(4, 4, (3, 2), (2, 3), (1, 0), (2, 1)),
    "uneven": lambda: nn.Conv2d(4, 4, 4, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "up": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "dilated": lambda: nn.MaxPool2d(3, 1, dilation=2),
    "average": lambda: nn.AvgPool2d((2, 3)),
    "pad": lambda: nn.ZeroPad2d((1, 2, 0, 3)),
    "reflect": lambda: nn.ReflectionPad2d(1),
    "twice": lambda: nn.Upsample(scale_factor=2),
    "a half": lambda: nn.UpsamplingBilinear2d(scale_factor=0.5),
    "turned": lambda: Apply(lambda x: x.transpose(2, 3)),
    "every other": lambda: Apply(lambda x: x[:, :, ::2, 1:]),
    "functions": lambda: Apply(lambda x: F.gelu(x) * 3 + x.sigmoid()),
    "norm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.PReLU()),
    "parts": lambda: Apply(lambda x: torch.cat([x[:, :2], F.relu(x[:, 2:])], 1)),
    "features": lambda: Apply(lambda x: F.softmax(x.permute(0, 2, 3, 1), -1).permute(0, 3, 1, 2)),
}


def test_what_operations_make_of_the_sizes_of_an_image() -> None:
    """Any five of them, one after another: `size_along` of each value, against what torch makes of
    images of other sizes. Where it knows none, the image was enlarged before it was made smaller.
    """
    draw, known = random.Random(1), 0
    for _ in range(40):
        names = draw.choices(list(LAYERS), k=5)
        model = nn.Sequential(conv(3, 4, 1)(), *(LAYERS[name]() for name in names)).eval()
        with torch.no_grad():
            graph = capture(model, (torch.randn(2, 3, 64, 77),)).graph
        (end,) = graph.outputs
        found = size_along(graph.inputs, end, 2), size_along(graph.inputs, end, 3)
        enlarged = {"twice", "transposed"} & {*names}
        assert None not in found or enlarged, names
        if None in found:
            continue
        known += 1
        for shape in ((1, 3, 64, 77), (1, 3, 71, 64), (1, 3, 90, 101), (2, 3, 66, 83)):
            with torch.no_grad():
                wanted = model(torch.randn(shape)).shape[2:]
            assert sized(found, [shape]) == tuple(wanted), names
    assert known > 25


def test_what_does_not_follow_the_input() -> None:
    def along(function: Callable[[Tensor], Tensor], axis: int = 2) -> Size | None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), Apply(function))
        graph = capture(model, (torch.randn(2, 3, 16, 18),)).graph
        return size_along(graph.inputs, graph.outputs[0], axis)

    assert along(lambda x: F.adaptive_avg_pool2d(x, (5, None)), 2) is None
    assert along(lambda x: F.interpolate(x, size=(5, 7)), 3) is None
    assert along(lambda x: F.avg_pool2d(x, 1, 3, ceil_mode=True)) is None  # its last may be outside
    assert along(lambda x: x[:, :, -5:]) is None
    assert along(lambda x: x[:, :, :5]) is None
    assert along(lambda x: torch.cat([x, x], 2)) is None
    assert along(lambda x: x.cumsum(1)) is None
    assert along(lambda x: x, 1) is None
    assert along(F.relu) == Size(0, 2)


def test_a_pyramid_is_one_network_for_images_of_any_size() -> None:
    """Sizes that were rounded otherwise on the way, in whatever was calibrated."""
    torch.manual_seed(0)
    model = Pyramid().eval()
    int8 = fastq.quantize_model(model, [torch.randn(4, 3, 32, 40)], progress=False)
    assert int8.program.extents == ((None, 3, None, None),)
    for height in range(20, 45):
        x = torch.randn(2, 3, height, 71 - height)
        with torch.no_grad():
            wanted = model(x)
        for y, found in zip(wanted, int8(x), strict=True):
            assert y.shape == found.shape
            assert (y - found).norm() < 0.1 * y.norm()


def test_resized_to_an_input_that_no_program_takes() -> None:
    """Its size is asked for all the same; of one that is no float32, torch resizes."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a((x.float() / 3).cumsum(1))
        return net.b(F.interpolate(F.max_pool2d(y, 2), size=x.shape[2:]))

    model = call(forward, a=conv(3, 4, 3, padding=1), b=conv(4, 2, 1))().eval()
    for dtype, floats in ((torch.float32, 0), (torch.uint8, 1)):

        def image(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randint(0, 7, shape).to(dtype)

        int8 = fastq.quantize_model(model, [image(4, 3, 17, 20)], progress=False)
        assert repr(int8).count("has the size of an input") == floats
        x = image(1, 3, 24, 33)
        with torch.no_grad():
            wanted = model(x)
        assert (wanted - int8(x)).norm() < 0.05 * wanted.norm()


def of_all(model: nn.Module, *given: Tensor) -> Any:
    """Quantized with one batch of several inputs."""
    return fastq.quantize_model(
        model, [given], forward=lambda net, batch: net(*batch), progress=False
    )


def agrees(model: nn.Module, int8: nn.Module, *given: Tensor) -> None:
    with torch.no_grad():
        wanted = model(*given)
    found = int8(*given)
    assert wanted.shape == found.shape
    assert (wanted - found).norm() < 0.1 * wanted.norm()


class FlooredUNet(nn.Module):
    """Of 64 pixels, floor(n / 4) is 2 * floor(n / 8), and so it is of 129: resized to a skip, or to
    what is resized?"""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.up, self.leave = nn.ConvTranspose2d(6, 6, 2, 2), nn.Conv2d(6 + 6 * skip, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.max_pool2d(F.max_pool2d(F.relu(self.a(x)), 2), 2)
        y = F.interpolate(self.up(F.relu(self.b(F.max_pool2d(skip, 2)))), size=skip.shape[2:])
        if self.skip:
            return self.leave(torch.cat([skip, y], 1))
        return F.interpolate(self.leave(y), size=x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("calibrated", [(64, 64), (65, 67), (60, 72)])
def test_values_that_have_one_size_by_chance(skip: bool, calibrated: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = FlooredUNet(skip).eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, *calibrated), progress=False)
    for size in ((64, 64), (36, 36), (100, 45), (63, 71)):
        agrees(model, int8, torch.randn(2, 3, *size))


def test_the_size_of_the_input_that_is_meant() -> None:
    """Calibrated with equal ones, and with others; its number in a program may be another."""

    def forward(net: Any, unused: Tensor, low: Tensor, guide: Tensor) -> Tensor:
        y = F.interpolate(F.relu(net.a(low)), size=guide.shape[2:])
        return net.b(y) + guide.cumsum(1)

    model = call(forward, a=conv(3, 4, 3, padding=1), b=conv(4, 3, 1))().eval()
    for size in (32, 20):
        x = torch.randn(4, 3, 32, 32)
        int8 = of_all(model, x[:, 0, 0, 0], x, torch.randn(4, 3, size, size))
        agrees(model, int8, torch.randn(2), torch.randn(2, 3, 36, 36), torch.randn(2, 3, 72, 50))


class Decoder(nn.Module):
    """Of a U-Net, as most write it: what was halved with an odd size is padded again. Halved by
    windows it is too large, and loses what it has too much."""

    def __init__(self, halved: str) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.halve = nn.MaxPool2d(2) if halved == "floor" else nn.Conv2d(6, 6, 3, 2, 1)
        self.b, self.up = nn.Conv2d(6, 6, 3, padding=1), nn.ConvTranspose2d(6, 6, 2, 2)
        self.leave = nn.Conv2d(12, 3, 1)

    def level(self, x: Tensor, below: Callable[[Tensor], Tensor]) -> Tensor:
        y = self.up(F.relu(self.b(below(self.halve(x)))))
        h, w = x.shape[2] - y.shape[2], x.shape[3] - y.shape[3]
        y = F.pad(y, [w // 2, w - w // 2, h // 2, h - h // 2])
        return self.leave(torch.cat([x, y], 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.level(x, lambda y: self.a(self.level(y, lambda z: z)))


@pytest.mark.parametrize("halved", ["floor", "ceil"])
@pytest.mark.parametrize("calibrated", [(40, 48), (43, 38)])
def test_padded_to_the_size_of_a_value(halved: str, calibrated: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Decoder(halved).eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, *calibrated), progress=False)
    assert int8.program.extents == ((None, 3, None, None),)
    for size in ((40, 48), (41, 50), (43, 47), (64, 64), (90, 21)):
        agrees(model, int8, torch.randn(2, 3, *size))


def same_padding(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """As TensorFlow pads."""
    pads: list[int] = []
    for n in x.shape[:1:-1]:
        lack = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        pads += [lack // 2, lack - lack // 2]
    return F.pad(x, pads, value=value)


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        padded = same_padding(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(padded, self.weight, self.bias, self.stride)


def test_padded_as_strides_ask() -> None:
    torch.manual_seed(0)
    pool = Apply(lambda x: F.max_pool2d(same_padding(x, 3, 2, -torch.inf), 3, 2))
    layers = Same(3, 6, 3, 2), nn.ReLU(), Same(6, 6, 5), nn.ReLU(), Same(6, 8, 5, 2), pool
    model = nn.Sequential(*layers, nn.ReLU(), Same(8, 8, 3, 2)).eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, 32, 40), progress=False)
    for size in ((32, 40), (41, 50), (43, 47), (64, 64), (90, 21)):
        agrees(model, int8, torch.randn(2, 3, *size))


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("calibrated", [(32, 40), (43, 45)])
def test_padded_to_a_multiple(mode: str, calibrated: tuple[int, int]) -> None:
    """Of 8, before what halves three times; and cut to the image's size again."""
    torch.manual_seed(0)

    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.pad(F.relu(net.a(x)), (0, -x.shape[3] % 8, 0, -x.shape[2] % 8), mode)
        y = F.pixel_shuffle(net.b(F.pixel_unshuffle(y, 8)), 8)
        return net.a(y[:, :, : x.shape[2], : x.shape[3]]) + x

    model = call(forward, a=conv(3, 3, 3, padding=1), b=conv(192, 192, 1))().eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, *calibrated), progress=False)
    for size in ((32, 40), (41, 50), (43, 47), (64, 64), (90, 21)):
        agrees(model, int8, torch.randn(2, 3, *size))


def test_a_number_that_two_captures_share_by_chance() -> None:
    """Of 64 and of 129 pixels an even number is left, of others not: the graph holds for its
    example."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        return net.b(y) * (1 + y.shape[2] % 2 + y.shape[3] % 2)

    model = call(forward, a=conv(3, 4, 4, stride=4), b=conv(4, 3, 2, stride=2))().eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, 64, 64), progress=False)
    assert int8.program.extents == ((None, 3, 64, 64),)
    assert "first batch alone: with others the model computes something" in fastq.summary(int8).note
    with pytest.raises(ValueError, match=r"fastq\.summary says why"):
        int8(torch.randn(1, 3, 36, 36))
    agrees(model, int8, torch.randn(1, 3, 64, 64))


def test_what_is_cut_off_a_computed_size() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        return net.b(y[:, :, : y.shape[2] // 2 * 2, : y.shape[3] // 2 * 2])

    model = call(forward, a=conv(3, 4, 4, stride=4), b=conv(4, 3, 2, stride=2))().eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, 64, 64), progress=False)
    for size in ((64, 64), (36, 36), (100, 45), (63, 71)):
        agrees(model, int8, torch.randn(1, 3, *size))


def test_the_adjacency_of_a_graphs_nodes_is_as_long_as_they_are() -> None:
    def forward(net: Any, x: Tensor, near: Tensor) -> Tensor:
        return near @ net.b(F.relu(near @ net.a(x)))

    model = call(forward, a=lambda: nn.Linear(6, 16), b=lambda: nn.Linear(16, 4))().eval()
    int8 = of_all(model, torch.randn(40, 6), torch.rand(40, 40))
    assert int8.program.extents == ((None, 6), (None, None))
    for count in (40, 29):
        agrees(model, int8, torch.randn(count, 6), torch.rand(count, count))


class Tokens(nn.Module):
    """An image as tokens and back, as in SegFormer, PVT and the U-Nets of diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 4, 2, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.middle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        tokens = y.flatten(2).transpose(1, 2)
        tokens = tokens + F.relu(self.middle(tokens))
        return self.b(tokens.transpose(1, 2).reshape(y.shape))


class Steps(nn.Module):
    """Layers of all steps of all sequences as rows, as in OPT."""

    def __init__(self, lookup: bool) -> None:
        super().__init__()
        self.lookup = nn.Embedding(30, 8) if lookup else nn.Identity()
        self.a, self.middle, self.b = nn.Linear(8, 16), nn.GRU(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lookup(x)
        rows = F.relu(self.a(y.flatten(0, 1)))
        y, _ = self.middle(rows.view(*x.shape[:2], 16).transpose(0, 1))
        return self.b(y.transpose(0, 1).reshape(-1, 16)).view(*x.shape[:2], 3)


def test_axes_that_were_joined_are_parted_again_for_any_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases: list[tuple[nn.Module, Callable[..., Tensor]]] = [
        (Tokens(), lambda b, n, m: torch.randn(b, 3, n, m)),
        (Steps(False), lambda b, n, m: torch.randn(b, n, 8)),
        (Steps(True), lambda b, n, m: torch.randint(0, 30, (b, n))),
    ]
    for model, example in cases:
        int8 = fastq.quantize_model(model.eval(), example(8, 20, 24), progress=False)
        assert not fastq.summary(int8).note
        path = tmp_path / "model.safetensors"
        fastq.save(int8, path)
        loaded, run = fastq.load(path), fastq.load_program(path)
        for sizes in ((2, 20, 24), (1, 20, 24), (3, 33, 18), (2, 18, 50), (20, 20, 20)):
            x = example(*sizes)
            agrees(model, int8, x)
            assert torch.equal(loaded(x), int8(x))
            np.testing.assert_array_equal(run(x.numpy())[0], int8(x).numpy())


def test_sizes_that_are_the_same_for_all_that_the_network_takes() -> None:
    """Rounded up on one way and down on the other, and both are added: it takes multiples alone."""

    def forward(net: Any, x: Tensor) -> Tensor:
        up, down = net.a(x), F.avg_pool2d(net.b(x), 8)
        y = F.relu(up.flatten(2) + down.flatten(2))
        return net.c(y.view(down.shape))

    model = call(
        forward, a=conv(3, 4, 3, stride=8, padding=1), b=conv(3, 4, 1), c=conv(4, 3, 1)
    )().eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, 64, 64), progress=False)
    for size in ((64, 64), (32, 96), (40, 72)):
        agrees(model, int8, torch.randn(2, 3, *size))


def test_parts_of_an_axis_by_two_sizes_of_one_number() -> None:
    """Height and width of one example, of the other two: which one is meant is found."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x).flatten(2) * 2
        return net.b(F.relu(y).view(len(x), 4, x.shape[3], x.shape[2]))

    model = call(forward, a=conv(3, 4, 1), b=conv(4, 3, 3, padding=1))().eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, 16, 16), progress=False)
    for size in ((16, 16), (18, 24), (31, 9)):
        agrees(model, int8, torch.randn(2, 3, *size))


class Sound(nn.Module):
    """Samples in a row, a mask of frames and positions, as in wav2vec 2.0: with large strides."""

    def __init__(self) -> None:
        super().__init__()
        self.hear = nn.Sequential(nn.Conv1d(1, 8, 10, 5), nn.GELU(), nn.Conv1d(8, 8, 8, 8))
        self.encode = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.hear(x[:, None]).transpose(1, 2)
        place = torch.arange(y.shape[1], device=x.device)
        near = (place[:, None] - place).abs() < 4
        return self.encode(y, src_mask=torch.zeros(near.shape).masked_fill(~near, -1e9))


class Series(nn.Module):
    """A series by its mean, beside what is known of each of its days."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.leave = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        scale = x.abs().mean(1, keepdim=True)
        y, _ = self.read(torch.cat([(x / scale)[..., None], known], -1))
        return self.leave(y)[..., 0] * scale


def test_samples_in_a_row_are_a_sequence_where_the_network_takes_more_of_them() -> None:
    torch.manual_seed(0)
    sound = Sound().eval()
    int8 = fastq.quantize_model(sound, torch.randn(8, 1500), progress=False)
    for count in (1500, 2003, 700):
        agrees(sound, int8, torch.randn(2, count))
    series = Series().eval()
    int8 = of_all(series, torch.rand(16, 20) + 1, torch.randn(16, 20, 2))
    for count in (20, 31, 9):
        agrees(series, int8, torch.rand(3, count) + 1, torch.randn(3, count, 2))
    features = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    int8 = fastq.quantize_model(features, torch.randn(8, 20), progress=False)
    assert int8.program.extents == ((None, 20),) and not fastq.summary(int8).note


def test_tokens_beside_an_image_of_one_size() -> None:
    """As in Whisper and BLIP: their images are refused at any other."""

    class Captions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.lookup = nn.Conv2d(3, 16, 8, 8), nn.Embedding(30, 16)
            self.places = nn.Parameter(torch.randn(4, 16))
            self.decode = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)

        def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
            seen = self.patches(image).flatten(2).transpose(1, 2) + self.places
            return self.decode(self.lookup(tokens), seen)

    torch.manual_seed(0)
    model = Captions().eval()
    int8 = of_all(model, torch.randint(0, 30, (16, 12)), torch.randn(16, 3, 16, 16))
    for count in (12, 5, 20):
        agrees(model, int8, torch.randint(0, 30, (2, count)), torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"wanted \(any, 3, 16, 16\)"):
        int8(torch.randint(0, 30, (2, 12)), torch.randn(2, 3, 24, 24))


@pytest.mark.parametrize("pool", [F.max_pool1d, F.avg_pool1d])
def test_a_pooling_of_all_there_is(pool: Callable[[Tensor, int], Tensor]) -> None:
    """As in networks that read sentences; the window is as long as each of them."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.a(x.transpose(1, 2)))
        return net.b(pool(y, y.shape[2]).squeeze(2))

    model = call(forward, a=lambda: nn.Conv1d(8, 16, 3), b=lambda: nn.Linear(16, 4))().eval()
    int8 = fastq.quantize_model(model, torch.randn(16, 12, 8), progress=False)
    for count in (12, 5, 30):
        agrees(model, int8, torch.randn(2, count, 8))


@pytest.mark.parametrize("pool", [F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
def test_pooled_to_what_the_first_batch_has_by_chance(pool: Callable[..., Tensor]) -> None:
    """As in VGG and AlexNet for images of the usual size, and pyramids of pools."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(pool(F.relu(net.a(x)), (4, 6)).flatten(1))

    model = call(forward, a=conv(3, 4, 3, stride=4), b=lambda: nn.Linear(96, 4))().eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, 16, 25), progress=False)
    for size in ((16, 25), (25, 16), (40, 33)):
        agrees(model, int8, torch.randn(2, 3, *size))


def test_a_grid_of_as_many_cells_as_convolutions_leave() -> None:
    """As of a detector: where each cell lies is added to what is found in it."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.b(F.relu(net.a(x)))
        h, w = y.shape[2:]
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return (y.sigmoid() + torch.stack([columns, rows])) * 8

    model = call(forward, a=conv(3, 8, 3, stride=2), b=conv(8, 2, 3, stride=4))().eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, 32, 32), progress=False)
    for size in ((32, 32), (33, 64), (50, 41)):
        agrees(model, int8, torch.randn(2, 3, *size))


def test_a_height_that_is_fixed_is_said_to_be() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for row in F.relu(net.a(x)).unbind(2):
            total = total * 0.5 + row
        return net.b(total)

    model = call(forward, a=conv(3, 4, 1), b=lambda: nn.Conv1d(4, 3, 1))().eval()
    int8 = fastq.quantize_model(model, torch.randn(4, 3, 16, 16), progress=False)
    assert int8.program.extents == ((None, 3, 16, None),)
    assert "the height of the first batch alone: the graph depends" in fastq.summary(int8).note
    agrees(model, int8, torch.randn(2, 3, 16, 30))


class CachedLayer(nn.Module):
    """One layer of a decoder, (B, T) tokens, beside a cache of P keys and values.

    shape  "heads": the cache is (B, heads, P, features); "rows": (B, P, heads, features).
    """

    def __init__(self, shape: str = "heads") -> None:
        super().__init__()
        self.shape, (width, self.heads) = shape, (16, 2)
        self.words, self.places = nn.Embedding(20, width), nn.Embedding(99, width)
        nn.init.normal_(self.places.weight, std=0.1)  # calibration sees few of them
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor]) -> Any:
        (batch, count), turned = tokens.shape, self.shape == "rows"
        past = cache[0].shape[1 if turned else 2]
        x = self.words(tokens) + self.places(torch.arange(past, past + count))
        made = self.qkv(x).view(batch, count, 3, self.heads, -1)
        q, *kv = made.unbind(2) if turned else made.transpose(1, 3).unbind(2)
        kv = [torch.cat(pair, 1 if turned else 2) for pair in zip(cache, kv, strict=True)]
        q, k, v = (z.transpose(1, 2) if turned else z for z in (q, *kv))
        causal = torch.ones(count, past + count, dtype=torch.bool).tril(past)
        seen = causal & (mask if mask.dim() == 4 else mask[:, None, None, :]).bool()
        y = F.scaled_dot_product_attention(q, k, v, seen)
        return self.out(y.transpose(1, 2).reshape(batch, count, -1)) + x, kv

    def batch(self, count: int, past: int, rank: int = 2) -> dict[str, Any]:
        g = torch.Generator().manual_seed(past)
        sizes = (64, past, 2, 8) if self.shape == "rows" else (64, 2, past, 8)
        ones = (64, past + count) if rank == 2 else (64, 1, count, past + count)
        return {
            "tokens": torch.randint(20, (64, count), generator=g),
            "mask": torch.rand(ones, generator=g) > 0.1,
            "cache": (torch.randn(sizes, generator=g), torch.randn(sizes, generator=g)),
        }


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("shape", ["heads", "rows"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_cache_of_any_length_and_a_mask_of_both(
    count: int, shape: str, rank: int, tmp_path: Path
) -> None:
    """The mask has as many places as the cache and the new tokens together."""
    torch.manual_seed(0)
    model = CachedLayer(shape).eval()
    batches = [model.batch(count, past, rank) for past in (6, 9)]
    int8 = fastq.quantize_model(model, batches, progress=False)
    assert [row.reason for row in fastq.summary(int8).rows if row.result == "float"] == []
    fastq.save(int8, tmp_path / "q")
    run = fastq.load_program(tmp_path / "q")
    for new, past in ((count, 6), (count, 9), (count, 4), (3, 7), (8, 21)):
        given = model.batch(new, past, rank)
        wanted, found = model(**given), int8(**given)
        assert (found[0] - wanted[0]).norm() < 0.05 * wanted[0].norm()
        assert [x.shape for x in found[1]] == [x.shape for x in wanted[1]]
        arrays = [given["tokens"], given["mask"], *given["cache"]]
        torch.testing.assert_close(
            torch.from_numpy(run(*(x.numpy() for x in arrays))[0]), found[0], rtol=0.02, atol=0.02
        )


def test_batches_that_the_network_of_the_first_does_not_take() -> None:
    class Halved(CachedLayer):
        """A mask twice as long as what it hides is not known to be one."""

        def forward(self, tokens: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor]) -> Any:
            return super().forward(tokens, mask[:, : mask.shape[1] // 2], cache)

    model = Halved().eval()
    batches = [model.batch(5, past) for past in (6, 9)]
    batches = [{**one, "mask": one["mask"].repeat(1, 2)} for one in batches]
    with pytest.raises(
        ValueError, match=r"mask has shape \(64, 28\); wanted \(any, 22\).*batches of one size"
    ):
        fastq.quantize_model(model, batches, progress=False)
    assert fastq.quantize_model(model, batches[:1], progress=False).program
