"""A linear layer or a convolution as rows of the executor's table.

A layer is bound once to its weight, its epilogue and its kind of input: panels are packed, the
per-column operands padded. For each input shape it makes a `Call`: a table with its argument
blocks, filled but for the addresses of x, of the output and of the thread's workspace. A call
that runs belongs to its thread; idle ones wait in a list, so threads share a layer.

    float32 input   [range_parts, range_qparams]  stage  gemm      (the first two: dynamic conv)
    uint8 input     [stage]  gemm                                  (stage: where the tile needs it)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import executor, gemm, stage
from fastq.kernels.depthwise import pack_depthwise
from fastq.kernels.gemm import Tile
from fastq.kernels.pack import aligned_empty, pack_panels, pad_columns, step_starts
from fastq.kernels.simd import KR, emitter
from fastq.kernels.tiles import (
    BYTES_PER_NANOSECOND,
    choose_nr,
    choose_tile,
    nanoseconds,
    tiles_of,
)
from fastq.qparams import Dequant, Epilogue, QParams, Requant
from fastq.weights import Conv2dWeight, LinearWeight

A_BLOCK_BYTES = 128 * 1024  # of activations that a block of MC rows works on, to stay in L2
RANGE_BLOCK = 32 * 1024  # values per task when a range is searched
MAX_SHAPES = 16  # input shapes whose calls a layer keeps

Source = Literal["u8", "static", "dynamic"]
# Where an operand lies: a kept array, an argument of the call by name, an offset in the workspace.
Place = NDArray[Any] | str | int


def address_of(array: NDArray[Any]) -> int:
    """Address of an array's first element."""
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]


class _Workspace(threading.local):
    """Scratch memory of one thread, grown to what its largest call needs."""

    held: tuple[Any, int, int] = (None, 0, 0)  # buffer, address, size

    def reserve(self, size: int) -> tuple[Any, int, int]:
        """The memory, to be held while it is used: a signal handler may call fastq meanwhile."""
        held = self.held
        if size > held[2]:
            buffer = aligned_empty((size,), np.uint8)
            held = self.held = (buffer, address_of(buffer), size)
        return held


_workspace = _Workspace()


ARGUMENTS = ("x", "out", "scale", "zero_point")  # of a call, by name
SCRATCH = len(ARGUMENTS)  # the base that stands for the workspace


class Call:
    """A table for one input shape, and the patches for the addresses that it waits for."""

    def __init__(self) -> None:
        self.table = np.empty((0, 3), np.int64)
        self.patches = np.empty((0, 3), np.int64)
        self.bases = np.zeros(SCRATCH + 1, np.int64)
        self.nanoseconds = 0.0  # that it takes one thread, roughly
        self._kept: list[Any] = []  # what the table and the blocks point to
        self._scratch_bytes = 0

    def scratch(self, size: int) -> int:
        """The workspace offset of `size` fresh bytes, 64-byte aligned."""
        offset = self._scratch_bytes
        self._scratch_bytes += -(-size // 64) * 64
        return offset

    def row(
        self, kernel: Any, fields: int, tasks: int, values: dict[int, int], places: dict[int, Place]
    ) -> None:
        """Appends a kernel with its argument block."""
        block = np.zeros(fields, np.int64)
        patches = []
        for field, value in values.items():
            block[field] = value
        for field, place in places.items():
            at = address_of(block) + 8 * field
            if isinstance(place, int):
                patches.append((at, SCRATCH, place))
            elif isinstance(place, str):
                patches.append((at, ARGUMENTS.index(place), 0))
            else:
                block[field] = address_of(place)
                self._kept.append(place)
        self._kept += [kernel, block]
        row = [(kernel.address, address_of(block), tasks)]
        self.table = np.append(self.table, np.array(row, np.int64), axis=0)
        new = np.array(patches, np.int64).reshape(-1, 3)
        self.patches = np.append(self.patches, new, axis=0)

    def run(self, *addresses: int) -> None:
        """Runs it on arrays at these addresses, in the order of ARGUMENTS."""
        bases = self.bases
        for i, address in enumerate(addresses):
            bases[i] = address
        held = _workspace.reserve(self._scratch_bytes)
        bases[SCRATCH] = held[1]
        executor.run(self.table, self.patches, bases, self.nanoseconds)


class Calls:
    """Idle calls by key (what their tables were built for); several threads may share it."""

    def __init__(self) -> None:
        self._idle: dict[Any, list[Call]] = {}

    def run(self, make: Callable[..., Call], key: tuple[Any, ...], *addresses: int) -> None:
        """Runs an idle call of this key, or a new one from make(*key), on arrays there."""
        idle = self._idle.get(key)
        if idle is None:
            for oldest in list(self._idle)[: len(self._idle) + 1 - MAX_SHAPES]:
                self._idle.pop(oldest, None)
            idle = self._idle.setdefault(key, [])
        try:
            call = idle.pop()
        except IndexError:
            call = make(*key)
        call.run(*addresses)
        idle.append(call)


class _Layer:
    """The operands of an epilogue, and the calls by input shape."""

    def __init__(
        self,
        weight: NDArray[np.int8],
        epilogue: Epilogue,
        source: Source,
        x_qparams: QParams | None,
        x_zero_point: int,
    ) -> None:
        self.epilogue, self.source, self.x_qparams = epilogue, source, x_qparams
        self.x_zero_point = x_zero_point  # folded into the bias of a Requant
        self.kind = "f32" if isinstance(epilogue, Dequant) else "u8" if epilogue else "s32"
        filters = weight.reshape(len(weight), -1)
        self.col_sums = filters.sum(axis=1, dtype=np.int64)
        n = len(weight)
        if epilogue is not None:
            scale = epilogue.scale if isinstance(epilogue, Dequant) else epilogue.multiplier
            bias = epilogue.bias
            if scale.shape not in ((), (n,)) or (bias is not None and bias.shape != (n,)):
                raise ValueError(
                    f"epilogue: scale {scale.shape} and bias {None if bias is None else bias.shape}"
                    f" for {n} outputs; wanted ({n},) each, or a scalar scale, or no bias"
                )
        if isinstance(epilogue, Requant) and epilogue.bias is not None:
            self._check_bias(filters, epilogue.bias)
        self.calls = Calls()

    def _check_bias(self, filters: NDArray[np.int8], bias: NDArray[np.int32]) -> None:
        """ValueError if some input could take accumulator + bias out of int32."""
        positive = np.maximum(filters, 0).sum(axis=1, dtype=np.int64)
        negative = self.col_sums - positive
        zp, top = self.x_zero_point, 255 - self.x_zero_point
        highest = bias + positive * top - negative * zp
        lowest = bias + negative * top - positive * zp
        wrong = (highest >= 2**31) | (lowest < -(2**31))
        if wrong.any():
            n = int(np.argmax(wrong))
            raise ValueError(
                f"Requant: bias[{n}] = {bias[n]} can take the accumulator out of int32; "
                "a larger weight scale for this output makes its bias smaller"
            )

    def pad_operands(self, groups: int, nr: int) -> None:
        """The per-column operands, padded to whole panels."""
        n = len(self.col_sums)
        scale: Any = np.float32(1)
        bias: NDArray[Any] = np.zeros(n, np.int32)
        clamp, zero_point = (0.0, 0.0), 0
        match self.epilogue:
            case Requant(multiplier, zero_point, given, qmin, qmax):
                scale = multiplier
                folded = (0 if given is None else given) - self.x_zero_point * self.col_sums
                bias = folded.astype(np.int32)  # modulo 2**32: its sum with acc is in range
                clamp = (qmin - zero_point, qmax - zero_point)
            case Dequant(scale, _, given, fmin, fmax):
                # without a bias -0.0 is added: y + -0.0 is y, and -0.0 for y = -0.0
                bias = np.full(n, -0.0, np.float32) if given is None else given
                clamp = (fmin, fmax)
        full_scale = np.broadcast_to(scale, (n,)).astype(np.float32)
        self.operands: dict[int, Place] = {
            gemm.COL_SUMS: pad_columns(self.col_sums.astype(np.int32), groups, nr),
            gemm.SCALE: pad_columns(full_scale, groups, nr),
            gemm.BIAS: pad_columns(bias, groups, nr),
            gemm.CLAMP: np.array(clamp, np.float32),
            gemm.OUT_ZERO_POINT: np.array([zero_point], np.int32),
        }

    def x_operands(self, call: Call, rows: int, zero_point: Any) -> tuple[Place, Place]:
        """The places of the input's scale and zero point: one each, or one per row."""
        if self.source == "dynamic":
            return call.scratch(4 * rows), call.scratch(4 * rows)
        scale: Any = 1.0
        if self.x_qparams is not None:
            scale, zero_point = self.x_qparams.scale, self.x_qparams.zero_point
        elif isinstance(self.epilogue, Dequant):
            scale = self.epilogue.x_scale
        return (
            np.broadcast_to(np.asarray(scale, np.float32), (rows,)).copy(),
            np.broadcast_to(np.asarray(zero_point, np.int32), (rows,)).copy(),
        )


def _block_rows(tile: Tile, m: int, row_bytes: int, other_tasks: int, threads: int) -> int:
    """MC: rows that share a panel while it is in L1, and their activations in L2."""
    mc = max(A_BLOCK_BYTES // max(row_bytes, 1), 8 * tile.mr)
    if threads > 1:  # four tasks or more a thread, so that they end together
        wanted = -(-4 * threads // max(other_tasks, 1))
        mc = min(mc, max(-(-m // wanted), 2 * tile.mr))
    return max(-(-min(mc, m) // tile.mr) * tile.mr, 1)


class BoundLinear(_Layer):
    """(M, K) -> (M, N)."""

    def __init__(
        self,
        weight: LinearWeight,
        epilogue: Epilogue,
        source: Source,
        x_qparams: QParams | None,
        x_zero_point: int,
        isa: str,
    ) -> None:
        super().__init__(weight.data, epilogue, source, x_qparams, x_zero_point)
        self.n, self.k = weight.n, weight.k
        self.run_length = max(weight.k, KR)
        self.packed = _packed(weight, isa, lambda: [self._filters(weight)])
        self.pad_operands(1, self.packed.nr)

    def _filters(self, weight: LinearWeight) -> NDArray[np.int8]:
        data = np.zeros((self.n, 1, self.run_length), np.int8)
        data[:, 0, : self.k] = weight.data
        return data

    def __call__(
        self, m: int, row_stride: int, x: int, out: int, zero_point: NDArray[np.int32] | int = 0
    ) -> None:
        """x (M, K) with unit stride along K and out (M, N), contiguous, at these addresses.

        row_stride in bytes; zero_point, of a "u8" source, one or (M,).
        """
        threads = executor.get_num_threads()
        if isinstance(zero_point, int):
            self.calls.run(self._make, (m, row_stride, zero_point, threads), x, out)
        else:
            self._make(m, row_stride, zero_point, threads).run(x, out)

    def _make(self, m: int, row_stride: int, zero_point: Any, threads: int) -> Call:
        tile = choose_tile(self.packed.isa, self.packed.nr, m)
        call = Call()
        call.nanoseconds = nanoseconds(tile.isa, m * self.n * self.k)
        x_scales = getattr(self.epilogue, "x_scale", np.ones(()))
        per_row = self.source == "dynamic" or bool(np.ndim(zero_point) or np.ndim(x_scales))
        scale, zero = self.x_operands(call, m if per_row else 1, zero_point)
        place: Place = "x"
        a_row = row_stride
        if self.source != "u8" or tile.a_bytes != 1 or self.k < KR:
            a_row = self.run_length * tile.a_bytes
            place = call.scratch(m * a_row)
            call.row(
                stage.stage_rows_kernel(self.source, "s16" if tile.a_bytes == 2 else "u8"),
                stage.R_FIELDS,
                m,
                {
                    stage.R_ROW: row_stride,
                    stage.R_K: self.k,
                    stage.R_OUT_K: self.run_length,
                },
                {
                    stage.R_X: "x",
                    stage.R_OUT: place,
                    stage.R_SCALE: scale,
                    stage.R_ZERO_POINT: zero,
                },
            )
        panels = -(-len(self.packed.panels) // tile.panels)
        mc = _block_rows(tile, m, a_row, panels, threads)
        values, places = self.packed.operands(step_starts(self.run_length) * tile.a_bytes)
        call.row(
            gemm.gemm_kernel(tile, self.kind, "affine"),
            gemm.FIELDS,
            panels * -(-m // mc),
            {
                gemm.A_ROW: a_row,
                gemm.OUT_ROW: self.n * gemm.OUT_BYTES[self.kind],
                gemm.GROUPS: 1,
                gemm.M: m,
                gemm.MC: mc,
                gemm.N: self.n,
                gemm.ROW_STEP: int(per_row),
                **values,
            },
            {
                gemm.A: place,
                **places,
                gemm.OUT: "out",
                gemm.ROW_SCALE: scale,
                gemm.ROW_ZERO_POINT: zero,
                **self.operands,
            },
        )
        return call


class BoundConv2d(_Layer):
    """(B, H, W, C) -> (B, OH, OW, N)."""

    def __init__(
        self,
        weight: Conv2dWeight,
        epilogue: Epilogue,
        source: Source,
        x_qparams: QParams | None,
        x_zero_point: int,
        isa: str,
    ) -> None:
        super().__init__(weight.data, epilogue, source, x_qparams, x_zero_point)
        self.weight = weight
        n, c_group = weight.data.shape[:2]
        if weight.groups > 1 and c_group == 1 and n == weight.groups:
            self.groups, self.channels = 1, n
            self.packed = _packed_depthwise(weight, isa)
        else:
            self.groups = _merged_groups(weight, min(t.nr for t in tiles_of(isa)))
            row = weight.kernel_size[1] if self._taps_are_rows() else 1
            self.channels = weight.c if row * weight.c // self.groups >= KR else KR
            self.packed = _packed(weight, isa, self._filters)
        self.pad_operands(self.groups, self.packed.nr)

    def _taps_are_rows(self) -> bool:
        """Whether a kernel row is one run of KW * C contiguous activations."""
        return self.groups == 1 and self.weight.dilation[1] == 1

    def _filters(self) -> list[NDArray[np.int8]]:
        """(N / groups, taps, run) for each group."""
        data, groups = self.weight.data, self.groups
        n, c_group, kh, kw = data.shape
        merged = self.weight.groups // groups
        c = self.channels // groups
        # groups merged into one hold zeros where they do not meet
        dense = np.zeros((groups, merged, n // self.weight.groups, c, kh, kw), np.int8)
        split = data.reshape(groups, merged, n // self.weight.groups, c_group, kh, kw)
        for i in range(merged):
            dense[:, i, :, i * c_group : (i + 1) * c_group] = split[:, i]
        filters = dense.reshape(n, c, kh, kw).transpose(0, 2, 3, 1)
        shape = (n, kh, kw * c) if self._taps_are_rows() else (n, kh * kw, c)
        return np.split(np.ascontiguousarray(filters).reshape(shape), groups)

    def __call__(self, x: NDArray[Any], out: NDArray[Any], zero_point: int = 0) -> None:
        """x (B, H, W, C) with any strides; out (B, OH, OW, N) contiguous."""
        key = (x.shape, x.strides, zero_point, executor.get_num_threads())
        self.calls.run(self._make, key, address_of(x), address_of(out))

    def _make(
        self, shape: tuple[int, ...], strides: tuple[int, ...], zero_point: int, threads: int
    ) -> Call:
        weight = self.weight
        batch, h, w, c = shape
        (oh, ow), n = weight.output_size(h, w), weight.n
        (kh, kw), (sh, sw), (dh, dw) = weight.kernel_size, weight.stride, weight.dilation
        (top, bottom), (left, right) = weight.padding
        hp, wp, cp = h + top + bottom, w + left + right, self.channels
        m = oh * ow
        packed = self.packed
        depthwise = packed.kind == "depthwise"
        tile = choose_tile(packed.isa, packed.nr, m, packed.kind)
        call = Call()
        call.nanoseconds = nanoseconds(tile.isa, batch * m * weight.data.size)
        scale, zero = self.x_operands(call, 1, zero_point)
        if self.source == "dynamic":
            _range_rows(call, 1, batch * h * w * c, scale, zero)

        place: Place = "x"
        over_read = depthwise and cp % packed.nr > 0
        dense = strides == _dense_strides(shape)
        if (
            self.source != "u8" or tile.a_bytes != 1 or cp != c
            or over_read or not dense or (hp, wp) != (h, w)
        ):  # fmt: skip
            place = call.scratch(batch * hp * wp * cp * tile.a_bytes + packed.nr)
            target = "s16" if tile.a_bytes == 2 else "u8"
            call.row(
                stage.stage_image_kernel("u8" if self.source == "u8" else "f32", target),
                stage.I_FIELDS,
                batch * hp,
                {
                    stage.I_XB: strides[0],
                    stage.I_XH: strides[1],
                    stage.I_XW: strides[2],
                    stage.I_XC: strides[3],
                    stage.I_H: h,
                    stage.I_W: w,
                    stage.I_C: c,
                    stage.I_TOP: top,
                    stage.I_LEFT: left,
                    stage.I_HP: hp,
                    stage.I_WP: wp,
                    stage.I_CP: cp,
                },
                {
                    stage.I_X: "x",
                    stage.I_OUT: place,
                    stage.I_SCALE: scale,
                    stage.I_ZERO_POINT: zero,
                },
            )

        pixel = cp * tile.a_bytes
        images, image = batch, hp * wp * pixel
        lines, step = sh * wp * pixel, sw * pixel
        affine = oh == 1 or ow == 1 or lines == ow * step
        a_row = lines if ow == 1 else step
        if affine and image == m * a_row:  # pointwise: all images are one
            images, m = 1, batch * m
        taps = np.arange(kh) * (dh * wp * pixel)
        if depthwise or not self._taps_are_rows():
            taps = np.add.outer(taps, np.arange(kw) * (dw * pixel)).reshape(-1)
        if depthwise:  # missing taps of the last group have weight 0
            offsets = np.append(taps, taps[:1].repeat(-len(taps) % emitter(tile.isa).taps_at_once))
        else:
            run = kw * cp if self._taps_are_rows() else cp // self.groups
            offsets = np.add.outer(taps, step_starts(run) * tile.a_bytes).reshape(-1)
        values, weight_places = packed.operands(offsets)
        out_bytes = gemm.OUT_BYTES[self.kind]
        panels = -(-len(packed.panels) // self.groups // tile.panels)
        mc = _block_rows(tile, m, sh * step, images * self.groups * panels, threads)
        places: dict[int, Place] = {
            gemm.A: place,
            **weight_places,
            gemm.OUT: "out",
            gemm.ROW_SCALE: scale,
            gemm.ROW_ZERO_POINT: zero,
            **self.operands,
        }
        if not affine:
            places[gemm.ROW_TABLE] = np.add.outer(np.arange(oh) * lines, np.arange(ow) * step)
        call.row(
            gemm.gemm_kernel(tile, self.kind, "affine" if affine else "table"),
            gemm.FIELDS,
            images * -(-m // mc) * self.groups * panels,
            {
                gemm.A_ROW: a_row,
                gemm.A_IMAGE: image,
                gemm.A_GROUP: pixel // self.groups,
                gemm.OUT_ROW: n * out_bytes,
                gemm.OUT_IMAGE: m * n * out_bytes,
                gemm.OUT_GROUP: n // self.groups * out_bytes,
                gemm.GROUPS: self.groups,
                gemm.M: m,
                gemm.MC: mc,
                gemm.N: n // self.groups,
                **values,
            },
            places,
        )
        return call


def range_call(rows: int, columns: int) -> Call:
    """A call that finds scale and zero point, (rows,) each, of x (rows, columns) float32."""
    call = Call()
    call.nanoseconds = rows * columns * 4 / BYTES_PER_NANOSECOND
    _range_rows(call, rows, columns, "scale", "zero_point")
    return call


def _range_rows(call: Call, rows: int, columns: int, scale: Place, zero: Place) -> None:
    parts = -(-columns // RANGE_BLOCK)
    found = call.scratch(8 * rows * parts)
    values = {
        stage.P_COLUMNS: columns,
        stage.P_BLOCK: RANGE_BLOCK,
        stage.P_PARTS_A_ROW: parts,
    }
    places: dict[int, Place] = {stage.P_X: "x", stage.P_PARTS: found}
    call.row(stage.range_parts_kernel(), stage.P_FIELDS, rows * parts, values, places)
    places = {stage.P_PARTS: found, stage.P_SCALE: scale, stage.P_ZERO_POINT: zero}
    call.row(stage.range_qparams_kernel(), stage.P_FIELDS, rows, values, places)


@dataclass(frozen=True, eq=False)
class _Packed:
    """Packed weights, and the tiles that they are for."""

    isa: str
    kind: str
    nr: int
    panels: NDArray[Any]

    def operands(self, offsets: NDArray[np.int64]) -> tuple[dict[int, int], dict[int, Place]]:
        """Fields of a block, values and places, for steps at these byte offsets."""
        if offsets.max() >= 2**31:
            raise ValueError(
                f"conv2d: one kernel window spans {offsets.max()} bytes of the input; "
                "wanted under 2 GiB: split the image"
            )
        values = {gemm.B_PANEL: self.panels[:1].nbytes, gemm.STEPS: len(offsets)}
        return values, {gemm.B: self.panels, gemm.OFFSETS: offsets.astype(np.int32)}


def _packed(weight: Any, isa: str, filters: Callable[[], list[NDArray[np.int8]]]) -> _Packed:
    """The weight packed for a tier, at the first use; filters() is (N, taps, run) a group."""
    packed = weight.panels.get(("packed", isa))
    if packed is None:
        parts = filters()
        nr = choose_nr(isa, len(parts[0]))
        groups = [pack_panels(part, nr) for part in parts]
        panels = aligned_empty((len(groups) * len(groups[0]), *groups[0].shape[1:]), np.int8)
        np.concatenate(groups, out=panels)
        packed = weight.panels["packed", isa] = _Packed(isa, "gemm", nr, panels)
    return packed  # type: ignore[no-any-return]


def _packed_depthwise(weight: Conv2dWeight, isa: str) -> _Packed:
    packed = weight.panels.get(("packed", isa))
    if packed is None:
        (tile,) = tiles_of(isa, "depthwise")
        panels = pack_depthwise(weight.data.reshape(weight.n, -1), isa)
        packed = weight.panels["packed", isa] = _Packed(isa, "depthwise", tile.nr, panels)
    return packed  # type: ignore[no-any-return]


def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a C-contiguous uint8 array."""
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def _merged_groups(weight: Conv2dWeight, narrowest: int) -> int:
    """Into how many groups a grouped convolution is computed.

    Few channels a group would leave most of a panel empty, and a run of under 4 activations
    cannot be read: neighbouring groups are merged into one that holds zeros between them.
    """
    n, c_group = weight.data.shape[:2]
    for groups in range(weight.groups, 1, -1):
        merged, rest = divmod(weight.groups, groups)
        if not rest and c_group * merged >= KR and n // groups >= narrowest:
            return groups
    return 1
