"""One class per kind of dot product: the only file with names of LLVM intrinsics.

A dot product takes KR = 4 K-steps at once: four activations of one row, broadcast, times the
panel's `cols` columns x 4 bytes, added into an int32 accumulator. All of it is exact.

    panel row (one K-step of 4)    | c0: k0 k1 k2 k3 | c1: k0 k1 k2 k3 | c2 ...   int8
    activations                    | a0 a1 a2 a3     | a0 a1 a2 a3     | ...      uint8 or int16

The functions emit LLVM IR through an llvmlite builder and know nothing of Numba.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir

from fastq.kernels.isa import ymm_encoding

binding.initialize_native_asmparser()  # without it, LLVM ends the process at inline assembly

KR = 4
CACHE_LINE = 64

i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
f32 = ir.FloatType()
ptr = ir.PointerType()
void = ir.VoidType()


def vec(element: Any, count: int) -> Any:
    return ir.VectorType(element, count)


def const(kind: Any, value: Any) -> Any:
    """A constant; for a vector type every element is `value`."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * kind.count)
    return ir.Constant(kind, value)


def address(b: Any, base: Any, offset: Any) -> Any:
    """base + offset bytes; offset is an int or an i64 value."""
    offset = i64(offset) if isinstance(offset, int) else offset
    return b.gep(base, [offset], source_etype=i8)


def load(b: Any, kind: Any, base: Any, offset: Any = 0, align: int = 1) -> Any:
    value = b.load(address(b, base, offset), typ=kind)
    value.align = align
    return value


Field = Callable[..., Any]  # (index, type) -> a field of an argument block, i64 unless told


def fields_of(b: Any, block: Any) -> Field:
    """The fields of the argument block at an address."""

    def field(index: int, kind: Any = i64) -> Any:
        return load(b, kind, block, 8 * index)

    return field


def store(b: Any, value: Any, base: Any, offset: Any = 0, align: int = 1) -> Any:
    """The instruction, which may be given more."""
    stored = b.store(value, address(b, base, offset))
    stored.align = align
    return stored


def stream(b: Any, stored: Any) -> None:
    """Makes a store, aligned to a vector, a streaming one: no memory is read into the cache first,
    and it is in no order with other stores before a fence."""
    stored.set_metadata("nontemporal", b.module.add_metadata([i32(1)]))


AHEAD = 4096  # bytes: so far before a stream of loads what comes is asked for, its page maybe too


def prefetch(b: Any, base: Any, offset: Any, size: int, write: bool = False) -> None:
    """Asks for the cache lines of `size` bytes that will soon be loaded, or stored; any address is
    fine."""
    here = address(b, base, offset)
    for line in range(0, size, CACHE_LINE):
        place = address(b, here, line)
        call(b, "llvm.prefetch.p0", void, [place, i32(int(write)), i32(3), i32(1)])  # keep, data


def splat(b: Any, scalar: Any, count: int) -> Any:
    """A vector with `count` copies of a scalar."""
    kind = vec(scalar.type, count)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, i32(0))
    return shuffle(b, one, one, [0] * count)


def shuffle(b: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(vec(i32, len(lanes)), list(lanes)))


def _valid(b: Any, count: int, valid: Any) -> Any:
    """The mask of the first `valid` (i64) of `count` elements, all of them if there are fewer."""
    valid = least(b, valid, i64(count))
    valid = b.select(b.icmp_signed("<", valid, i64(0)), i64(0), valid)
    index = ir.Constant(vec(i8, count), list(range(count)))
    return b.icmp_unsigned("<", index, splat(b, b.trunc(valid, i8), count))


def _masked(b: Any, what: str, result: Any, kind: Any, operands: list[Any]) -> Any:
    """A call of llvm.masked.`what` on vectors of `kind`."""
    element = "f" if kind.element is f32 else "i"
    name = f"llvm.masked.{what}.v{kind.count}{element}{_bits(kind.element)}.p0"
    return call(b, name, result, operands)


def store_valid(b: Any, value: Any, base: Any, valid: Any) -> None:
    """Stores the first `valid` (i64) elements of a vector, all of them if there are fewer."""
    kind = value.type
    _masked(b, "store", void, kind, [value, base, i32(1), _valid(b, kind.count, valid)])


def load_valid(b: Any, kind: Any, base: Any, valid: Any) -> Any:
    """A vector of the first `valid` (i64) elements at `base`, and of zeros."""
    mask = _valid(b, kind.count, valid)
    return _masked(b, "load", kind, kind, [base, i32(1), mask, const(kind, 0)])


def _bits(element: Any) -> int:
    return 32 if element is f32 else int(element.width)


def copy_bytes(b: Any, target: Any, source: Any, size: Any) -> None:
    call(b, "llvm.memcpy.p0.p0.i64", void, [target, source, size, i1(0)])


def call(b: Any, name: str, result: Any, args: Sequence[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, args)


def branch_back(b: Any, condition: Any, loop: Any, done: Any) -> None:
    """The backward branch of a hand-made loop, which LLVM shall leave as it is.

    Unrolled, a tile's K loop runs out of registers: its accumulators already fill them.
    """
    module = b.module
    disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    node = ir.MDValue(module, [], name=str(len(module.metadata)))  # registers itself
    node.operands = (node, disable)  # a loop's node names itself first
    b.cbranch(condition, loop, done).set_metadata("llvm.loop", node)


def least(b: Any, x: Any, y: Any) -> Any:
    """The smaller of two signed integers, or of each two of vectors."""
    return b.select(b.icmp_signed("<", x, y), x, y)


def rint(b: Any, x: Any) -> Any:
    """A float32 vector to int32, ties to even; values must fit."""
    n = x.type.count
    return call(b, f"llvm.lrint.v{n}i32.v{n}f32", vec(i32, n), [x])


def clamp(b: Any, x: Any, lo: Any, hi: Any) -> Any:
    """max(min(x, hi), lo) of float vectors; a NaN stays."""
    x = b.select(b.fcmp_ordered(">", x, hi), hi, x)
    return b.select(b.fcmp_ordered("<", x, lo), lo, x)


def between(b: Any, x: Any, lo: Any, hi: Any, signed: bool = True) -> Any:
    """min(max(x, lo), hi) of integer vectors."""
    for name, end in (("max", lo), ("min", hi)):
        name = f"llvm.{'s' if signed else 'u'}{name}.v{x.type.count}i{_bits(x.type.element)}"
        x = call(b, name, x.type, [x, end])
    return x


def add_saturated(b: Any, x: Any, y: Any) -> Any:
    """x + y of signed integer vectors; what is beyond their type stays at its end."""
    name = f"llvm.sadd.sat.v{x.type.count}i{_bits(x.type.element)}"
    return call(b, name, x.type, [x, y])


def any_lane(b: Any, mask: Any) -> Any:
    """Whether one of the bits of a vector is set."""
    bits = ir.IntType(mask.type.count)
    return b.icmp_unsigned("!=", b.bitcast(mask, bits), bits(0))


class Dot:
    """What the kinds of dot products share: vectors of int32 accumulators, and packing them.

    One accumulator lane is one column.

    a_bytes       of an activation as the dot product takes it.
    side_by_side  products of a column that one dot product sums: that many of the 4 weights of a
                  K-step lie side by side in a panel.
    taps_at_once  the same for the taps of a depthwise convolution; as many accumulators are packed
                  into one vector of outputs.
    offset        what a dot product takes off each activation: the epilogue knows it.
    native        whether the CPU's own intrinsics may be named; else everything is portable IR.
    of_pairs      the dot product of int16 pairs whose accumulators lie as these.
    fast_pairs    whether it sums at least half as many products as this one.
    """

    a_bytes: int
    side_by_side: int
    taps_at_once: int
    operand: Any  # the type of a vector of activations, or weights
    depth = KR  # of the widest K-step
    registers = 16  # vectors that a loop may hold
    offset = 0
    of_pairs: Madd
    fast_pairs = True

    def __init__(self, bits: int, native: bool) -> None:
        self.bits, self.native = bits, native
        self.lanes = self.cols = bits // 32
        self.acc = vec(i32, self.lanes)

    @property
    def masks(self) -> bool:
        """Whether stores of a part of a vector are one instruction."""
        return self.native and self.bits == 512

    def load_a(self, b: Any, base: Any, offset: Any) -> Any:
        """`side_by_side` activations of one row, for every column."""
        return b.bitcast(splat(b, load(b, i32, base, offset), self.lanes), self.operand)

    def load_own(self, b: Any, base: Any, offset: Any, nr: int, group: int) -> list[Any]:
        """`load_a` where each `group` columns of a panel read as many activations of their own: for
        every vector of the panel. NR activations are read."""
        read = load(b, vec(i32, nr * self.a_bytes // KR), base, offset)
        words = self.own_words(nr, group)
        return [b.bitcast(shuffle(b, read, read, lanes), self.operand) for lanes in words]

    def own_words(self, nr: int, group: int) -> list[list[int]]:
        """Which 4 bytes of what `load_own` reads are for each lane, [vector][lane]."""
        words = np.array(self.columns(nr)) // group * (group * self.a_bytes // KR)
        return words.reshape(-1, self.lanes).tolist()  # type: ignore[no-any-return]

    def together(self, nr: int) -> int:
        """How many accumulators of a panel are packed into one vector."""
        vectors = nr // self.lanes
        return next(n for n in (self.taps_at_once, 2, 1) if vectors % n == 0)

    def columns(self, nr: int) -> list[int]:
        """The column of a panel that each accumulator lane is for: the order that `pack` undoes.

        x86 packs within 128-bit lanes: of accumulators packed together each holds 4 columns, then
        the next one 4.
        """
        together = self.together(nr)
        packed = together * self.lanes
        order = np.arange(nr).reshape(nr // packed, self.lanes // 4, together, 4)
        return [int(column) for column in order.swapaxes(1, 2).reshape(-1)]

    def interleaved_channels(self) -> list[list[int]]:
        """The channel in each accumulator lane after `interleave`, [vector][lane]."""
        order = self.columns(self.taps_at_once * self.lanes)
        return np.reshape(order, (-1, self.lanes)).tolist()  # type: ignore[no-any-return]

    def pack(self, b: Any, low: Any, high: Any) -> Any:
        """Two vectors as one of half the width, saturated, 128-bit lane by lane.

        int32 becomes int16, int16 becomes uint8.
        """
        wide = low.type.element.width
        half = vec(ir.IntType(wide // 2), 2 * low.type.count)
        if self.native and self.bits >= 256:
            tier = "avx2" if self.bits == 256 else "avx512"
            name = {32: "packssdw", 16: "packuswb"}[wide] + (".512" if self.bits == 512 else "")
            return call(b, f"llvm.x86.{tier}.{name}", half, [low, high])
        least, most = (-(2**15), 2**15 - 1) if wide == 32 else (0, 255)
        parts = []
        for part in (low, high):
            clamped = between(b, part, const(part.type, least), const(part.type, most))
            parts.append(b.trunc(clamped, vec(half.element, part.type.count)))
        n, per_lane = low.type.count, 128 // wide
        lanes = [
            first + side + i
            for first in range(0, n, per_lane)
            for side in (0, n)
            for i in range(per_lane)
        ]
        return shuffle(b, parts[0], parts[1], lanes)


class Quads(Dot):
    """uint8 x int8 products, four at a time into int32: in portable IR."""

    a_bytes = 1
    side_by_side = KR
    taps_at_once = 4

    def __init__(self, bits: int, native: bool) -> None:
        super().__init__(bits, native)
        self.operand = vec(i8, self.lanes * KR)
        self.of_pairs = Madd(bits, native=False)

    def load_b(self, b: Any, base: Any, offset: Any) -> Any:
        """`side_by_side` weights of each of `cols` columns."""
        return load(b, self.operand, base, offset)

    def dot(self, b: Any, acc: Any, a: Any, w: Any) -> Any:
        wide = vec(i32, self.lanes * KR)
        return _add_quads(b, acc, b.mul(b.zext(a, wide), b.sext(w, wide)))

    def load_channels(self, b: Any, base: Any) -> Any:
        """One tap of as many channels as `interleave` takes."""
        return load(b, self.operand, base)

    def interleave(self, b: Any, taps: list[Any]) -> list[Any]:
        """Four taps of 4 * lanes channels -> 4 vectors with the four taps of a channel together.

        In-lane unpacks, so the channels are in the order `interleaved_channels`.
        """
        x, y = unpack(b, taps[0], taps[1]), unpack(b, taps[2], taps[3])
        half = vec(i16, self.operand.count // 2)
        pairs = [
            unpack(b, b.bitcast(p, half), b.bitcast(q, half)) for p, q in zip(x, y, strict=True)
        ]
        return [b.bitcast(v, self.operand) for pair in pairs for v in pair]


def _add_quads(b: Any, acc: Any, products: Any) -> Any:
    """acc + the sums of each four products."""
    for k in range(KR):
        lanes = range(k, products.type.count, KR)
        acc = b.add(acc, shuffle(b, products, products, lanes))
    return acc


class Vnni(Quads):
    """x86 `vpdpbusd`, which does not saturate."""

    def __init__(self, bits: int, native: bool) -> None:
        super().__init__(bits, native)
        self.registers = 32 if bits == 512 else 16
        self.name = f"llvm.x86.avx512.vpdpbusd.{bits}"
        self.of_pairs = MaddAdd(bits, native)

    def dot(self, b: Any, acc: Any, a: Any, w: Any) -> Any:
        kind = vnni_operand(self.lanes)
        if not self.native or kind is None:
            return super().dot(b, acc, a, w)
        return call(b, self.name, self.acc, [acc, b.bitcast(a, kind), b.bitcast(w, kind)])


class Usdot(Quads):
    """ARM `usdot`, of FEAT_I8MM. NEON's products of int16 are a sixth of it."""

    registers = 32
    fast_pairs = False

    def load_a(self, b: Any, base: Any, offset: Any) -> Any:
        """The activations in one lane, which the product repeats. A load that repeats them takes an
        instruction of the unit that multiplies; LLVM would choose it if it knew where the lane is
        from, so that is hidden from it."""
        word = b.insert_element(const(self.acc, 0), load(b, i32, base, offset), i32(0))
        if self.native:
            hidden = ir.InlineAsm(ir.FunctionType(self.acc, [self.acc]), "", "=w,0")
            word = b.call(hidden, [word])
        return b.bitcast(shuffle(b, word, word, [0] * self.lanes), self.operand)

    def dot(self, b: Any, acc: Any, a: Any, w: Any) -> Any:
        if not self.native:
            return super().dot(b, acc, a, w)
        return call(b, "llvm.aarch64.neon.usdot.v4i32.v16i8", self.acc, [acc, a, w])


class Sdot(Quads):
    """ARM `sdot`, of FEAT_DotProd: int8 x int8, so activations are taken as uint8 - 128."""

    registers = 32
    fast_pairs = False
    offset = 128

    def dot(self, b: Any, acc: Any, a: Any, w: Any) -> Any:
        a = b.xor(a, const(a.type, -128))  # LLVM keeps one of those that are alike
        if self.native:
            return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", self.acc, [acc, w, a])
        wide = vec(i32, self.lanes * KR)
        return _add_quads(b, acc, b.mul(b.sext(a, wide), b.sext(w, wide)))


class Amx(Vnni):
    """Vnni, and products of whole matrices: x86 `tdpbusd`, as exact as `vpdpbusd`.

    Eight tile registers hold up to 16 rows of 64 bytes each; a configuration of 64 bytes says how
    many of both they have. A product adds rows of activations times a K-step of 64 weights for each
    of 16 columns to rows of 16 accumulators. Registers are named by their number.
    """

    depth = 64

    def configure(self, b: Any, config: Any) -> None:
        call(b, "llvm.x86.ldtilecfg", void, [config])

    def release(self, b: Any) -> None:
        call(b, "llvm.x86.tilerelease", void, [])

    def tile_zero(self, b: Any, tile: int) -> None:
        call(b, "llvm.x86.tilezero", void, [i8(tile)])

    def tile_load(self, b: Any, tile: int, base: Any, stride: Any) -> None:
        call(b, "llvm.x86.tileloadd64", void, [i8(tile), base, stride])

    def tile_store(self, b: Any, tile: int, base: Any, stride: Any) -> None:
        call(b, "llvm.x86.tilestored64", void, [i8(tile), base, stride])

    def tile_dot(self, b: Any, acc: int, a: int, w: int) -> None:
        call(b, "llvm.x86.tdpbusd", void, [i8(acc), i8(a), i8(w)])


class Madd(Dot):
    """int16 x int16 products, added in pairs into int32: x86 `vpmaddwd`, exact for all operands.

    The activations arrive as int16; weights are widened as they are loaded. A K-step takes two dot
    products into the same lane, of k0 k1 and of k2 k3. (vpmaddubsw would take bytes, but saturates:
    splitting the weights for which it could takes 1.4 times the steps in trained networks, more
    than it saves.)
    """

    a_bytes = 2
    side_by_side = 2
    taps_at_once = 2

    def __init__(self, bits: int, native: bool) -> None:
        super().__init__(bits, native)
        self.operand = vec(i16, self.lanes * 2)
        self.of_pairs = self

    def load_b(self, b: Any, base: Any, offset: Any) -> Any:
        return b.sext(load(b, vec(i8, self.lanes * 2), base, offset), self.operand)

    def dot(self, b: Any, acc: Any, a: Any, w: Any) -> Any:
        if self.native:
            return b.add(acc, call(b, "llvm.x86.avx2.pmadd.wd", self.acc, [a, w]))
        wide = vec(i32, self.lanes * 2)
        products = b.mul(b.sext(a, wide), b.sext(w, wide))
        even, odd = range(0, wide.count, 2), range(1, wide.count, 2)
        pairs = b.add(shuffle(b, products, products, even), shuffle(b, products, products, odd))
        return b.add(acc, pairs)

    def load_channels(self, b: Any, base: Any) -> Any:
        return load(b, self.operand, base)

    def interleave(self, b: Any, taps: list[Any]) -> list[Any]:
        return unpack(b, taps[0], taps[1])


class MaddAdd(Madd):
    """Madd in one instruction where there is VNNI: x86 `vpdpwssd`, which does not saturate.

    Written as assembly: of the intrinsic LLVM makes vpmaddwd and vpaddd again on Intel's CPUs.
    """

    def dot(self, b: Any, acc: Any, a: Any, w: Any) -> Any:
        if not self.native:
            return super().dot(b, acc, a, w)
        encoding, register = ("", "v") if self.bits == 512 else (ymm_encoding(), "x")
        kind = ir.FunctionType(self.acc, [self.acc, self.operand, self.operand])
        asm = ir.InlineAsm(
            kind, f"{encoding}vpdpwssd $3, $2, $0", f"={register},0,{register},{register}"
        )
        return b.call(asm, [acc, a, w])


def unpack_lanes(count: int, per_lane: int) -> tuple[list[int], list[int]]:
    """Shuffle indices of x86's in-lane unpack (low, high) of two vectors of `count` elements."""
    low, high = [], []
    for lane in range(0, count, per_lane):
        for i in range(lane, lane + per_lane // 2):
            low += [i, i + count]
            high += [i + per_lane // 2, i + per_lane // 2 + count]
    return low, high


def unpack(b: Any, x: Any, y: Any) -> list[Any]:
    """Elements of x and y alternating, within each 128-bit lane: [low halves, high halves]."""
    per_lane = 128 // x.type.element.width
    return [shuffle(b, x, y, lanes) for lanes in unpack_lanes(x.type.count, per_lane)]


def lane_sums(b: Any, vectors: list[Any]) -> Any:
    """A vector of int32 of whose lanes each is the sum of a vector's: as many as it has lanes.

    Two at a time become one, by unpacks within 128 bits and by shuffles of 128 bits.
    """
    kind = vectors[0].type
    for width in (32, 64):
        wide = vec(ir.IntType(width), kind.count * 32 // width)
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        halves = [unpack(b, *(b.bitcast(v, wide) for v in pair)) for pair in pairs]
        vectors = [b.add(*(b.bitcast(half, kind) for half in pair)) for pair in halves]
    by_group = np.arange(2 * kind.count).reshape(-1, 4)
    while len(vectors) > 1:
        vectors = [
            b.add(*(shuffle(b, x, y, by_group[i::2].reshape(-1).tolist()) for i in (0, 1)))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


@functools.cache
def vnni_operand(lanes: int) -> Any:
    """The type of vpdpbusd's byte operands in this LLVM: <n x i8> since LLVM 22, <n x i32> before.

    Found by asking LLVM's verifier; LLVMs that take both get the older one upgraded.
    """
    bits = lanes * 32
    for operand in (f"<{lanes * 4} x i8>", f"<{lanes} x i32>"):
        acc = f"<{lanes} x i32>"
        name = f"@llvm.x86.avx512.vpdpbusd.{bits}"
        text = f"""
            declare {acc} {name}({acc}, {operand}, {operand})
            define {acc} @probe({acc} %c, {operand} %a, {operand} %b) {{
              %r = call {acc} {name}({acc} %c, {operand} %a, {operand} %b)
              ret {acc} %r
            }}"""
        try:
            binding.parse_assembly(text).verify()
        except RuntimeError:
            continue
        return vec(i8, lanes * 4) if "i8" in operand else vec(i32, lanes)
    return None


@functools.cache
def emitter(isa: str) -> Quads | Madd:
    """The emitter of a tier by its name in `isa.ISAS`."""
    name, _, emulated = isa.partition("-")
    match name:
        case "amx_int8":
            return Amx(512, not emulated)
        case "avx512_vnni":
            return Vnni(512, not emulated)
        case "avx_vnni":
            return Vnni(256, not emulated)
        case "avx2":
            return Madd(256, True)
        case "neon_i8mm":
            return Usdot(128, not emulated)
        case "neon_dotprod":
            return Sdot(128, not emulated)
        case "generic":
            return Madd(128, False)
    raise ValueError(f"no tier {isa!r}")


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of float32 or vectors of them, rounded once; the target has an instruction."""
    name = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
    return call(b, f"llvm.fma.{name}", x.type, [x, y, z])
