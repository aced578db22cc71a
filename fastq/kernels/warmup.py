"""The kernels that a tier may use, in one table, to compile them before they are needed.

Of those that are made for one stride or one window the usual ones are here; others compile at
their first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

from fastq.kernels import (
    elementwise,
    executor,
    gemm,
    group_norm,
    histogram,
    layout,
    matmul,
    matrix,
    norms,
    pointwise,
    recurrent,
    stage,
    windows,
    winograd,
    workers,
)
from fastq.kernels import isa as isa_room
from fastq.kernels.call import ITEM_BYTES
from fastq.kernels.native import Kernel
from fastq.kernels.simd import emitter
from fastq.kernels.tiles import GROUPS, dot_tiles, group_tiles, tiles_of
from fastq.qparams import GATES

INTEGERS = ("u8", "s8", "s16", "s32")
LAYOUTS = ("tensor", "row", "column")


class Family(NamedTuple):
    """A factory of kernels, the layer that needs them, and their arguments on a tier."""

    layer: str
    factory: Callable[..., Any]
    arguments: Callable[[str], Iterable[tuple[Any, ...]]]


def _activations(tier: str) -> str:
    """What the tiles of a tier read, as a kind of staging."""
    return "u8x2" if emitter(tier).a_bytes == 2 else "u8"


def _epilogues(tier: str) -> tuple[str, ...]:
    """Epilogues of products: of a layer on its own, then the others that programs have."""
    between = _activations(tier)
    return tuple(dict.fromkeys(("u8", "f32", "s32", between, f"{between}+{between}", "u8+u8")))


def _sums(tier: str) -> tuple[str, ...]:
    """Epilogues of sums in int16, and of what such a sum is added to."""
    kind = _activations(tier)
    return "s16", f"s16+{kind}", "s16+s16", f"{kind}+s16"


def _lines(operations: Iterable[tuple[str, ...]]) -> Iterable[tuple[Any, ...]]:
    """Operations, each with the kinds of its operands, on lines that lie side by side as a
    program's do."""
    for name, *kinds in operations:
        yield name, tuple(kinds), tuple(ITEM_BYTES[kind] for kind in kinds), True


def _pointwise(tier: str) -> Iterable[tuple[Any, ...]]:
    kind = _activations(tier)
    yield from _lines(
        [
            ("add", kind, kind, kind),
            ("multiply", kind, kind, kind),
            ("affine", kind, kind, "f32", "f32"),
            ("table", kind, kind),
            ("copy", kind, kind),
            ("copy", kind, "u8"),
            ("fill", kind),
            ("quantize", kind, "f32"),
            ("dequantize", "f32", kind),
        ]
    )


def _wide_pointwise(tier: str) -> Iterable[tuple[Any, ...]]:
    """Sums in int16, their ways in and out."""
    kind = _activations(tier)
    yield from _lines(("add", "s16", *added) for added in product((kind, "s16"), repeat=2))
    yield from _lines([("quantize", "s16", "f32"), ("dequantize", "f32", "s16")])
    yield from _lines([("copy", "s16", "s16"), ("fill", "s16")])


def _held(tier: str) -> list[tuple[str]]:
    """The kinds that hold a program's values."""
    return [(_activations(tier),), ("s16",)]


def _norms(tier: str, centered: bool) -> Iterable[tuple[Any, ...]]:
    return ((*x, _activations(tier), bounded, centered)
            for x in _held(tier) for bounded in (False, True))  # fmt: skip


def _scaled_groups(tier: str) -> Iterable[tuple[Any, ...]]:
    kind = _activations(tier)
    return _lines(("affine", kind, *x, "f32", "f32") for x in _held(tier))


def _images(tier: str) -> Iterable[tuple[Any, ...]]:
    """Stagings of images: of layers, and of networks whose inputs have one or three channels."""
    kind = _activations(tier)
    yield from (("f32", kind, 0, 0), ("f32", kind, 4, 4), ("u8", kind, 0, 0))
    yield "f32", kind, stage.MANY, 0
    yield from (("f32", kind, planes, whole) for planes in (1, 3) for whole in (planes, 4))


def _copies(kind: str) -> Iterable[tuple[Any, ...]]:
    """Copies: line by line, element by element, in tiles of the widths of most channel counts."""
    ways = ("lines", ()), ("elements", ()), *(("tiles", layout.widths(n)) for n in (3, 8, 16, 24))
    return ((kind, kind, *way) for way in dict.fromkeys(ways))


def _planes(tier: str) -> Iterable[tuple[Any, ...]]:
    """What puts a layer's result channel by channel, by the widths that most images take."""
    ways = ("elements", ()), *(("tiles", layout.widths(n)) for n in (16, 14 * 14, 7 * 7))
    return (("f32", "f32", *way) for way in ways)


def _windows(tier: str) -> Iterable[tuple[Any, ...]]:
    """Max pooling of 2 x 2 and 3 x 3, and the mean of a whole image."""
    kind = _activations(tier)
    yield from (("max", kind, size, size, "") for size in (2, 3))
    yield "sum", kind, 0, 0, "window"


def _elementwise(tier: str) -> Iterable[tuple[Any, ...]]:
    """Arrays that the cache can hold."""
    yield from product(("divide", "multiply"), ("f32",), INTEGERS, ("cached",), LAYOUTS)
    yield from product(("multiply",), ("s32",), INTEGERS, ("cached",), LAYOUTS)
    yield from product(("dequantize",), INTEGERS, ("f32",), ("cached",), LAYOUTS)


FAMILIES = (
    Family("any", executor.serial_kernel, lambda tier: [()]),
    Family("any", executor.shared_kernel, lambda tier: [()]),
    Family("any", workers.worker_kernel, lambda tier: [()]),
    Family(
        "linear",
        gemm.gemm_kernel,
        lambda tier: product(tiles_of(tier), _epilogues(tier), ("affine",)),
    ),
    Family(
        "conv",
        gemm.gemm_kernel,
        lambda tier: product(tiles_of(tier), _epilogues(tier), ("affine", "table")),
    ),
    *(
        Family(
            layer,
            matrix.matrix_kernel,
            lambda tier: product(tiles_of(tier, "matrix"), _epilogues(tier)),
        )
        for layer in ("linear", "conv")
    ),
    Family(
        "conv",
        winograd.winograd_kernel,
        lambda tier: product(winograd.tiles(tier), _epilogues(tier)),
    ),
    Family(
        "depthwise",
        gemm.gemm_kernel,
        lambda tier: product(tiles_of(tier, "depthwise"), _epilogues(tier), ("affine", "table")),
    ),
    Family(
        "heads",  # of few outputs
        gemm.gemm_kernel,
        lambda tier: product(dot_tiles(tier), _epilogues(tier), ("table",)),
    ),
    Family(
        "groups",
        gemm.gemm_kernel,
        lambda tier: product(
            (tile for group in GROUPS for tile in group_tiles(tier, group)),
            _epilogues(tier),
            ("affine", "table"),
        ),
    ),
    Family(
        "linear",
        stage.stage_rows_kernel,
        lambda tier: product(("dynamic", "static", "u8"), (_activations(tier),)),
    ),
    Family("program", stage.stage_image_kernel, _images),
    Family("conv", stage.range_parts_kernel, lambda tier: [()]),
    Family("conv", stage.range_qparams_kernel, lambda tier: [()]),
    Family("program", pointwise.pointwise_kernel, _pointwise),
    Family("conv", layout.copy_kernel, _planes),
    Family("conv", windows.windows_kernel, _windows),
    Family("conv", layout.border_kernel, lambda tier: [(_activations(tier),)]),
    Family("program", layout.copy_kernel, lambda tier: _copies(_activations(tier))),
    Family("attention", layout.copy_kernel, lambda tier: _copies("s16")),
    Family("attention", pointwise.pointwise_kernel, _wide_pointwise),
    Family(
        "attention",
        norms.softmax_kernel,
        lambda tier: product((_activations(tier),), (False, True)),
    ),
    Family(
        "attention",
        norms.weights_kernel,
        lambda tier: product((_activations(tier),), (False, True)),
    ),
    Family("attention", norms.inverse_sums_kernel, lambda tier: [(_activations(tier),)]),
    Family(
        "attention",
        gemm.gemm_kernel,
        lambda tier: product(tiles_of(tier), (f"{_activations(tier)}+rows",), ("affine",)),
    ),
    Family(
        "attention",
        norms.layer_norm_kernel,
        lambda tier: _norms(tier, centered=True),
    ),
    Family(
        "attention",
        gemm.gemm_kernel,
        lambda tier: product(tiles_of(tier), _sums(tier), ("affine",)),
    ),
    Family(
        "attention",
        matrix.matrix_kernel,
        lambda tier: product(tiles_of(tier, "matrix"), _sums(tier)),
    ),
    Family(
        "attention",
        matmul.pack_kernel,
        lambda tier: [
            (_activations(tier), nr, transposed, tier)
            for nr in sorted({tile.nr for tile in tiles_of(tier)})
            for transposed in (False, True)
        ],
    ),
    Family("norms", norms.layer_norm_kernel, lambda tier: _norms(tier, centered=False)),
    Family("norms", group_norm.channel_sums_kernel, _held),
    Family("norms", group_norm.group_scales_kernel, lambda tier: [()]),
    Family("norms", group_norm.response_scales_kernel, lambda tier: [()]),
    Family("norms", pointwise.pointwise_kernel, _scaled_groups),
    Family(
        "recurrent",
        recurrent.cell_kernel,
        lambda tier: (
            (cell, *kinds)
            for cell in GATES
            for kinds in (("s16", _activations(tier), cell != "relu"), ("f32", "f32", True))
        ),
    ),
    Family(
        "recurrent", gemm.gemm_kernel, lambda tier: product(tiles_of(tier), ("s16",), ("affine",))
    ),
    Family(
        "recurrent",
        matrix.matrix_kernel,
        lambda tier: product(tiles_of(tier, "matrix"), ("s16",)),
    ),
    Family("array", elementwise.elementwise_kernel, _elementwise),
    Family(
        "array",
        histogram.histogram_kernel,
        lambda tier: [(packs, histogram.presses()) for packs in (False, True)],
    ),
)

# networks by their layers; others have the kernels of one of these
NETWORKS = {
    "bert": ("linear", "program", "attention", "heads"),
    "resnet50": ("linear", "program", "conv"),
    "mobilenet": ("linear", "program", "conv", "depthwise"),
    "lstm": ("linear", "program", "recurrent"),
}

Buildable = tuple[Callable[..., Any], tuple[Any, ...]]  # a factory and its arguments


def kernels(tier: str, network: str | None = None) -> list[Buildable]:
    """The kernels of a tier, each once: all of them, or those of one of NETWORKS."""
    if network is not None and network not in NETWORKS:
        raise ValueError(f"warmup: network={network!r}; wanted one of {', '.join(NETWORKS)}")
    return list(
        dict.fromkeys(
            (family.factory, arguments)
            for family in FAMILIES
            if network is None or family.layer in ("any", *NETWORKS[network])
            for arguments in family.arguments(tier)
        )
    )


class Warmup(NamedTuple):
    """What `warmup` did; a kernel that was not compiled came from the disk cache."""

    isa: str
    kernels: int
    compiled: int
    seconds: float

    def __str__(self) -> str:
        done = f"{self.compiled} compiled, {self.kernels - self.compiled} read from the cache"
        if not self.compiled:
            done = "all were in the cache"
        return f"{self.kernels} kernels for {self.isa} in {self.seconds:.1f} s: {done}"


def warmup(
    network: str | None = None,
    *,
    isa: str | None = None,
    progress: Callable[[Sequence[Buildable]], Iterable[Buildable]] = iter,
) -> Warmup:
    """Compiles kernels into the disk cache, so that no first call has to.

    network   a key of NETWORKS: the kernels that such networks use. None: all.
    isa       the instruction set, as FASTQ_ISA names it; None is the one in use.
    progress  wraps the list of kernels, as tqdm.tqdm does.

    Raises ValueError for an unknown network or instruction set, RuntimeError for an instruction
    set that this CPU lacks.
    """
    with isa_room.using(isa or isa_room.current()):
        tier = isa_room.current()
        start, todo = perf_counter(), kernels(tier, network)
        compiled = sum(_compiles(*kernel) for kernel in progress(todo))
    return Warmup(tier, len(todo), compiled, perf_counter() - start)


def _compiles(factory: Any, arguments: tuple[Any, ...]) -> bool:
    """Makes the kernel; whether neither this process nor the disk cache had it."""
    made = factory.cache_info().misses
    kernel: Kernel = factory(*arguments)
    return factory.cache_info().misses > made and kernel.compiled
