"""The shapes of other people's networks, and awkward ones: one table for tests and benchmarks.

Networks are walked from compact definitions (torchvision's, at batch 1) and each distinct layer is
one row with its count. The numbers of the lists that are not networks are those of FBGEMM
`bench/PackedRequantizeAcc32Benchmark.cc`, `bench/DepthwiseBenchmark.cc` and
`bench/ConvUnifiedBenchmark.cc`, and of XNNPACK `bench/models/llm_gemm.txt`. Nothing is imported
here beyond the standard library, so that a test can read the table without a peer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

Pair = tuple[int, int]


@dataclass(frozen=True)
class Gemm:
    """u8 (M, K) times s8 (N, K), transposed. `count`: how often the network does it."""

    name: str
    m: int
    n: int
    k: int
    count: int = 1

    @property
    def macs(self) -> int:
        return self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """What must be read and written at least: u8 in, s8 weight, u8 out."""
        return self.m * self.k + self.n * self.k + self.m * self.n


@dataclass(frozen=True)
class Conv:
    """u8 (1, H, W, C) with s8 (N, C / groups, KH, KW). Padding is symmetric: (rows, columns)."""

    name: str
    h: int
    w: int
    c: int
    n: int
    kh: int
    kw: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    count: int = 1

    @property
    def output_size(self) -> Pair:
        return (
            (self.h + 2 * self.padding[0] - self.dilation[0] * (self.kh - 1) - 1) // self.stride[0]
            + 1,
            (self.w + 2 * self.padding[1] - self.dilation[1] * (self.kw - 1) - 1) // self.stride[1]
            + 1,
        )

    @property
    def k(self) -> int:
        return self.c // self.groups * self.kh * self.kw

    @property
    def macs(self) -> int:
        oh, ow = self.output_size
        return oh * ow * self.n * self.k

    @property
    def bytes(self) -> int:
        oh, ow = self.output_size
        return self.h * self.w * self.c + self.n * self.k + oh * ow * self.n

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c > 1


@dataclass(frozen=True)
class Elementwise:
    """`op` over `size` elements; bytes_in and bytes_out of one element."""

    name: str
    op: str
    size: int
    bytes_in: int
    bytes_out: int
    count: int = 1

    @property
    def macs(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return self.size * (self.bytes_in + self.bytes_out)


Shape = Gemm | Conv | Elementwise
Row = TypeVar("Row", Gemm, Conv)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def conv(
    network: str,
    h: int,
    w: int,
    c: int,
    n: int,
    kernel: int | Pair = 1,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Conv:
    """A row with its name made from its numbers. padding None keeps the size at stride 1."""
    (kh, kw), (sh, sw), (dh, dw) = _pair(kernel), _pair(stride), _pair(dilation)
    ph, pw = _pair(padding) if padding is not None else (dh * (kh - 1) // 2, dw * (kw - 1) // 2)
    name = f"{network}/{h}x{w}x{c}-{n}_{kh}x{kw}"
    if (sh, sw) != (1, 1):
        name += f"_s{sh}" if sh == sw else f"_s{sh}x{sw}"
    if (dh, dw) != (1, 1):
        name += f"_d{dh}"
    if groups > 1:
        name += f"_g{groups}"
    if (ph, pw) != (dh * (kh - 1) // 2, dw * (kw - 1) // 2):
        name += f"_p{ph}x{pw}"
    return Conv(name, h, w, c, n, kh, kw, (sh, sw), (ph, pw), (dh, dw), groups)


class _Walk:
    """An image on its way through a network: remembers its size and writes each layer down."""

    def __init__(self, network: str, size: int = 224) -> None:
        self.network = network
        self.h, self.w, self.c = size, size, 3
        self.rows: Counter[Conv] = Counter()

    def conv(
        self,
        n: int,
        kernel: int | Pair = 1,
        stride: int = 1,
        padding: int | Pair | None = None,
        groups: int = 1,
    ) -> None:
        row = conv(self.network, self.h, self.w, self.c, n, kernel, stride, padding, groups=groups)
        self.rows[row] += 1
        (self.h, self.w), self.c = row.output_size, n

    def depthwise(self, kernel: int, stride: int) -> None:
        self.conv(self.c, kernel, stride, groups=self.c)

    def pool(self, kernel: int, stride: int, padding: int = 0, ceil: bool = False) -> None:
        up = stride - 1 if ceil else 0
        self.h = (self.h + 2 * padding - kernel + up) // stride + 1
        self.w = (self.w + 2 * padding - kernel + up) // stride + 1

    def squeeze_excite(self, n: int) -> None:
        for row in conv(self.network, 1, 1, self.c, n), conv(self.network, 1, 1, n, self.c):
            self.rows[row] += 1

    def paths(self, *paths: list[Any], keep: int = 0) -> None:
        """Parallel paths whose outputs are concatenated, beside `keep` channels that pass.

        A path is a list of `conv` arguments; a list in it holds the paths of a fork.
        """
        start, channels = (self.h, self.w, self.c), keep
        for path in paths:
            self.h, self.w, self.c = start
            for step in path:
                if isinstance(step, list):
                    self.paths(*step)
                else:
                    self.conv(*step)
            channels += self.c
        self.c = channels

    def done(self) -> tuple[Conv, ...]:
        return tuple(replace(row, count=count) for row, count in self.rows.items())


def _resnet(network: str, depths: Iterable[int], bottleneck: bool) -> tuple[Conv, ...]:
    net = _Walk(network)
    net.conv(64, 7, 2)
    net.pool(3, 2, 1)
    for stage, depth in enumerate(depths):
        width = 64 << stage
        n = width * 4 if bottleneck else width
        for block in range(depth):
            stride = 2 if stage and not block else 1
            if bottleneck:  # v1.5: the 3x3 has the stride
                path = [(width,), (width, 3, stride), (n,)]
            else:
                path = [(width, 3, stride), (width, 3)]
            shortcut = [] if net.c == n and stride == 1 else [[(n, 1, stride)]]
            net.paths(*shortcut, path)
            net.c = n  # added, not concatenated
    return net.done()


def _mobilenet_v1() -> tuple[Conv, ...]:
    net = _Walk("mobilenet_v1")
    net.conv(32, 3, 2)
    for n, stride in (
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2),
        (1024, 1),
    ):  # fmt: skip
        net.depthwise(3, stride)
        net.conv(n)
    return net.done()


def _mobilenet_v2() -> tuple[Conv, ...]:
    net = _Walk("mobilenet_v2")
    net.conv(32, 3, 2)
    for expand, n, depth, first_stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(depth):
            if expand > 1:
                net.conv(net.c * expand)
            net.depthwise(3, 1 if block else first_stride)
            net.conv(n)
    net.conv(1280)
    return net.done()


# kernel, expanded channels, output channels, squeeze-excite channels or 0, stride
_V3_LARGE = (
    (3, 16, 16, 0, 1), (3, 64, 24, 0, 2), (3, 72, 24, 0, 1), (5, 72, 40, 24, 2),
    (5, 120, 40, 32, 1), (5, 120, 40, 32, 1), (3, 240, 80, 0, 2), (3, 200, 80, 0, 1),
    (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 120, 1), (3, 672, 112, 168, 1),
    (5, 672, 160, 168, 2), (5, 960, 160, 240, 1), (5, 960, 160, 240, 1),
)  # fmt: skip
_V3_SMALL = (
    (3, 16, 16, 8, 2), (3, 72, 24, 0, 2), (3, 88, 24, 0, 1), (5, 96, 40, 24, 2),
    (5, 240, 40, 64, 1), (5, 240, 40, 64, 1), (5, 120, 48, 32, 1), (5, 144, 48, 40, 1),
    (5, 288, 96, 72, 2), (5, 576, 96, 144, 1), (5, 576, 96, 144, 1),
)  # fmt: skip


def _mobilenet_v3(network: str, table: Iterable[tuple[int, ...]]) -> tuple[Conv, ...]:
    net = _Walk(network)
    net.conv(16, 3, 2)
    for kernel, expanded, n, squeezed, stride in table:
        if expanded != net.c:
            net.conv(expanded)
        net.depthwise(kernel, stride)
        if squeezed:
            net.squeeze_excite(squeezed)
        net.conv(n)
    net.conv(net.c * 6)
    return net.done()


def _shufflenet_v1_g3() -> tuple[Conv, ...]:
    net = _Walk("shufflenet_v1_g3")
    net.conv(24, 3, 2)
    net.pool(3, 2, 1)
    for n, depth in (240, 4), (480, 8), (960, 4):
        for block in range(depth):
            stride, keep = (1, 0) if block else (2, net.c)
            net.conv(n // 4, groups=1 if net.c == 24 else 3)
            net.depthwise(3, stride)
            net.conv(n - keep, groups=3)
            net.c = n
    return net.done()


def _shufflenet_v2() -> tuple[Conv, ...]:
    net = _Walk("shufflenet_v2_x1")
    net.conv(24, 3, 2)
    net.pool(3, 2, 1)
    for n, depth in (116, 4), (232, 8), (464, 4):
        c, half = net.c, n // 2
        net.paths(
            [(c, 3, 2, None, c), (half,)],
            [(half,), (half, 3, 2, None, half), (half,)],
        )
        for _ in range(depth - 1):
            net.c = half
            net.paths([(half,), (half, 3, 1, None, half), (half,)], keep=half)
    net.conv(1024)
    return net.done()


def _squeezenet(network: str, first: tuple[int, int], plan: Iterable[int]) -> tuple[Conv, ...]:
    """plan: the squeezed channels of each fire module, 0 for a pool."""
    net = _Walk(network)
    net.conv(*first, 2, 0)
    for squeezed in plan:
        if squeezed:
            net.conv(squeezed)
            net.paths([(4 * squeezed,)], [(4 * squeezed, 3)])
        else:
            net.pool(3, 2, ceil=True)
    net.conv(1000)
    return net.done()


def _inception_v3() -> tuple[Conv, ...]:
    net = _Walk("inception_v3", 299)
    net.conv(32, 3, 2, 0)
    net.conv(32, 3, 1, 0)
    net.conv(64, 3)
    net.pool(3, 2)
    net.conv(80)
    net.conv(192, 3, 1, 0)
    net.pool(3, 2)
    for pooled in 32, 64, 64:
        net.paths([(64,)], [(48,), (64, 5)], [(64,), (96, 3), (96, 3)], [(pooled,)])
    net.paths([(384, 3, 2, 0)], [(64,), (96, 3), (96, 3, 2, 0)], keep=net.c)
    row, column = (1, 7), (7, 1)
    for c in 128, 160, 160, 192:
        net.paths(
            [(192,)],
            [(c,), (c, row), (192, column)],
            [(c,), (c, column), (c, row), (c, column), (192, row)],
            [(192,)],
        )
    net.paths(
        [(192,), (320, 3, 2, 0)],
        [(192,), (192, row), (192, column), (192, 3, 2, 0)],
        keep=net.c,
    )
    fork = [[(384, (1, 3))], [(384, (3, 1))]]
    for _ in range(2):
        net.paths([(320,)], [(384,), fork], [(448,), (384, 3), fork], [(192,)])
    return net.done()


def _vgg16() -> tuple[Conv, ...]:
    net = _Walk("vgg16")
    for n, depth in (64, 2), (128, 2), (256, 3), (512, 3), (512, 3):
        for _ in range(depth):
            net.conv(n, 3)
        net.pool(2, 2)
    return net.done()


NETWORKS: dict[str, tuple[Conv, ...]] = {
    "resnet18": _resnet("resnet18", (2, 2, 2, 2), bottleneck=False),
    "resnet50": _resnet("resnet50", (3, 4, 6, 3), bottleneck=True),
    "mobilenet_v1": _mobilenet_v1(),
    "mobilenet_v2": _mobilenet_v2(),
    "mobilenet_v3_large": _mobilenet_v3("mobilenet_v3_large", _V3_LARGE),
    "mobilenet_v3_small": _mobilenet_v3("mobilenet_v3_small", _V3_SMALL),
    "shufflenet_v1_g3": _shufflenet_v1_g3(),
    "shufflenet_v2_x1": _shufflenet_v2(),
    "squeezenet1_0": _squeezenet(
        "squeezenet1_0", (96, 7), (0, 16, 16, 32, 0, 32, 48, 48, 64, 0, 64)
    ),
    "squeezenet1_1": _squeezenet(
        "squeezenet1_1", (64, 3), (0, 16, 16, 0, 32, 32, 0, 48, 48, 64, 64)
    ),
    "inception_v3": _inception_v3(),
    "vgg16": _vgg16(),
}

AWKWARD_CONV = (
    conv("awkward", 56, 56, 64, 64, 3, dilation=2),
    conv("awkward", 28, 28, 128, 128, 3, dilation=2),
    conv("awkward", 28, 28, 128, 128, 3, dilation=2, groups=128),
    conv("awkward", 32, 100, 128, 256, 3, groups=128),  # depthwise, multiplier 2
    conv("awkward", 56, 56, 64, 128, 3, 2, groups=64),
    conv("awkward", 28, 28, 240, 240, 5, groups=240),
    conv("awkward", 47, 125, 272, 272, 3, groups=272),
    conv("awkward", 47, 125, 272, 272, 5, groups=272),
    conv("awkward", 14, 14, 384, 384, 7, groups=384),
    conv("awkward", 28, 28, 96, 96, (3, 7), groups=96),
    conv("awkward", 28, 28, 96, 96, (1, 5), groups=96),
    conv("awkward", 27, 29, 33, 33, 3, groups=33),
    conv("awkward", 56, 56, 128, 128, 3, groups=32),
    conv("awkward", 56, 56, 256, 256, 3, 2, groups=32),
    conv("awkward", 14, 14, 512, 512, 3, groups=32),
    conv("awkward", 7, 7, 1024, 1024, 3, groups=32),
    conv("awkward", 57, 57, 64, 64, 3, 2),
    conv("awkward", 75, 103, 32, 48, 3, 2),
    conv("awkward", 57, 57, 96, 96, 3, 2, groups=96),
    conv("awkward", 56, 56, 256, 512, 1, 2),
    conv("awkward", 57, 57, 64, 128, 1, 2),
    conv("awkward", 224, 224, 3, 64, 7, 2),
    conv("awkward", 224, 224, 3, 32, 3, 2),
    conv("awkward", 299, 299, 3, 32, 3, 2, 0),
    conv("awkward", 32, 32, 3, 6, 5, padding=0),
    conv("awkward", 14, 14, 6, 16, 5, padding=0),
    conv("awkward", 28, 28, 1, 32, 3),
    conv("awkward", 224, 224, 3, 96, 4, 4, 0),  # ConvNeXt's patches, and a vision transformer's
    conv("awkward", 224, 224, 3, 768, 16, 16, 0),
    conv("awkward", 29, 31, 48, 48, 2, 2, 0),
    conv("awkward", 20, 20, 37, 41, 3),
    conv("awkward", 17, 17, 128, 128, (1, 7)),
    conv("awkward", 128, 128, 64, 1, 1),  # heads of few outputs: masks, images, boxes
    conv("awkward", 128, 128, 64, 3, 3),
    conv("awkward", 64, 64, 256, 8, 3),
)


def gemm(network: str, m: int, n: int, k: int, count: int = 1) -> Gemm:
    return Gemm(f"{network}/{m}x{n}x{k}", m, n, k, count)


def _encoder(network: str, tokens: int, width: int, heads: int, layers: int) -> tuple[Gemm, ...]:
    """BERT's encoder: four projections, two attention products per head, a feed-forward of 4x."""
    head = width // heads
    return (
        gemm(network, tokens, width, width, 4 * layers),
        gemm(network, tokens, 4 * width, width, layers),
        gemm(network, tokens, width, 4 * width, layers),
        gemm(network, tokens, tokens, head, heads * layers),
        gemm(network, tokens, head, tokens, heads * layers),
    )


TRANSFORMERS: dict[str, tuple[Gemm, ...]] = {
    "bert_base": _encoder("bert_base", 128, 768, 12, 12),
    "albert_base": _encoder("albert_base", 384, 768, 12, 12),
    "mobilebert": (  # 24 layers, 4 heads of 32, four feed-forwards each
        gemm("mobilebert", 384, 128, 512, 7 * 24),
        gemm("mobilebert", 384, 128, 128, 3 * 24),
        gemm("mobilebert", 384, 512, 128, 5 * 24),
        gemm("mobilebert", 384, 384, 32, 4 * 24),
        gemm("mobilebert", 384, 32, 384, 4 * 24),
    ),
    "llm": tuple(
        gemm("llm", *mnk)
        for mnk in (
            (128, 16, 1024), (128, 128, 1024), (128, 4096, 1024), (128, 11008, 4096),
            (128, 32000, 4096), (1, 4096, 4096), (1, 11008, 4096), (1, 4096, 11008),
            (16, 4096, 4096),
        )
    ),
}  # fmt: skip

WHOLE: dict[str, tuple[Gemm | Conv, ...]] = {**NETWORKS, **TRANSFORMERS}

FBGEMM = tuple(
    gemm("fbgemm", *mnk)
    for mnk in (
        (156800, 4, 36), (156800, 8, 36), (156800, 16, 36), (1, 128, 512), (1, 1024, 256),
        (1, 2048, 512), (1, 4096, 1024), (6, 256, 1024), (6, 256, 2048), (6, 512, 512),
        (6, 1024, 256), (6, 2048, 256), (6, 2048, 512), (6, 4096, 256), (6, 4096, 1024),
        (6, 4096, 2048), (10, 2048, 256), (10, 4096, 1024), (20, 2048, 256), (20, 4096, 1024),
        (102, 1024, 512), (102, 2323, 256), (102, 512, 256), (1, 800, 3200), (1, 800, 8000),
        (16, 256, 1500), (16, 256, 1567), (1, 128, 2876), (16, 128, 1567), (1, 128, 2722),
        (16, 256, 512),
    )
)  # fmt: skip

# the last layers of the networks above: of ResNet-18 and -50, MobileNetV1 and V2, VGG-16
CLASSIFIERS = tuple(
    gemm("classifier", 1, n, k)
    for n, k in ((1000, 512), (1000, 2048), (1000, 1024), (1000, 1280), (4096, 25088), (1000, 4096))
)

AWKWARD_GEMM = (
    gemm("awkward", 1, 768, 768),
    gemm("awkward", 1, 10, 84),
    *(gemm("awkward", m, 768, 768) for m in range(2, 18)),
    *(gemm("awkward", 256, 256, k) for k in range(1, 9)),
    gemm("awkward", 256, 1, 256),
    gemm("awkward", 4096, 2, 128),
    gemm("awkward", 127, 129, 131),
    gemm("awkward", 255, 257, 513),
    gemm("awkward", 97, 65, 67),
    gemm("awkward", 33, 63, 1023),
    gemm("awkward", 2323, 256, 256),
    gemm("awkward", 1, 1, 1),
)

GOAL_GEMM = (
    gemm("goal", 480, 768, 512),
    gemm("goal", 128, 3072, 768),
)


def _distinct(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The first row of each shape, whatever its name and count."""
    first: dict[Row, Row] = {}
    for row in rows:
        first.setdefault(replace(row, name="", count=1), row)
    return tuple(first.values())


GEMM: tuple[Gemm, ...] = _distinct(
    [
        *GOAL_GEMM,
        *(row for rows in TRANSFORMERS.values() for row in rows),
        *CLASSIFIERS,
        *FBGEMM,
        *AWKWARD_GEMM,
    ]
)
_CONV: tuple[Conv, ...] = _distinct(
    [*(row for rows in NETWORKS.values() for row in rows), *AWKWARD_CONV]
)
CONV = tuple(row for row in _CONV if not row.depthwise)
DEPTHWISE = tuple(row for row in _CONV if row.depthwise)

# 64 Ki elements stay within the cache of any core, 32 Mi are beyond any cache
ELEMENTWISE = tuple(
    Elementwise(f"{op}/{size >> 10}Ki", op, size, bytes_in, bytes_out)
    for op, bytes_in, bytes_out in (("quantize", 4, 1), ("dequantize", 1, 4), ("requantize", 4, 1))
    for size in (1 << 16, 1 << 25)
)

MODULES = (
    gemm("module", 1, 768, 768),
    gemm("module", 128, 768, 768),
    gemm("module", 128, 3072, 768),
)
