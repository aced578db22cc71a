"""A kernel's machine code: compiled once, kept on disk, linked by LLVM alone.

Numba's own cache starts its compiler to read a function, which takes half a second, and two
processes that write it at once may mix their files up. Kernels are plain: their code calls nothing
of Numba or Python. So an object file is all there is to keep, and LLVM's linker all that is needed
to load it: under a millisecond.

A file is one kernel, its name the digest of all that its code depends on; it starts with a digest
of the rest, so that one that is damaged or cut short is compiled anew. It is written beside its
place and renamed: no process sees half of it. The files lie where Numba's would (NUMBA_CACHE_DIR).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding, ir
from numba.core import compiler
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from fastq.kernels.signature import SIGNATURE, sources_digest

DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function that was compiled; compiled says whether now, or in an earlier process."""

    function: Callable[..., Any]
    address: int
    compiled: bool

    @functools.cached_property
    def entry(self) -> Any:
        """The kernel as Python calls it, without the GIL: of its block as bytes alone, for a kernel
        that reads no begin and end."""
        return ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self.address)


def native(function: Callable[..., Any]) -> Kernel:
    """Decorates function(args, begin, end), which may close over str, int and tuples of them.

    Raises RuntimeError if its code calls what is not part of the C library: what would allocate
    or raise, for example.
    """
    name = symbol(function)
    path = folder() / f"{name}.o"
    code = _read(path)
    if code is not None:
        with suppress(RuntimeError):  # no object file of this machine: compiled anew
            return Kernel(function, _link(name, code), compiled=False)
    library = compile_library(function)
    library.get_pointer_to_function(name)  # makes the object code
    code = library.serialize_using_object_code()[2][0]
    address = _link(name, code)
    with suppress(OSError):  # a full disk, or one for reading: compiled again next time
        _write(path, code)
    return Kernel(function, address, compiled=True)


def symbol(function: Callable[..., Any]) -> str:
    """The kernel's name in its object file: its factory, and a digest of all that it depends on."""
    closed = [cell.cell_contents for cell in function.__closure__ or ()]
    settings = numba.config.OPT, numba.config.LOOP_VECTORIZE, numba.config.SLP_VECTORIZE
    target = cpu_target.target_context.codegen().magic_tuple()  # triple, CPU and its features
    versions = numba.__version__, llvmlite.__version__, sys.version_info[:2]
    key = function.__module__, function.__qualname__, closed, sources_digest()
    digest = hashlib.sha256(repr((key, settings, target, versions)).encode()).hexdigest()
    return f"{function.__qualname__.partition('.')[0]}_{digest[:32]}"


@functools.cache
def folder() -> Path:
    """Where Numba would keep this file's functions."""
    return Path(FunctionCache(native).cache_path)


@global_compiler_lock  # type: ignore[untyped-decorator]
def compile_library(function: Callable[..., Any]) -> Any:
    """Numba's library of a kernel, with an entry of the kernels' ABI under its `symbol`.

    Numba's native functions return whether they raised. This entry forgets it, where Numba's own
    would call Python: kernels do not raise ("numpy" errors: no check for a division by zero).
    """
    flags = compiler.Flags()
    cpu_target.options.parse_as_flags(flags, {"nopython": True, "error_model": "numpy"})
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
    context = cpu_target.target_context
    made = compiler.compile_extra(
        cpu_target.typing_context, context, function, SIGNATURE.args, SIGNATURE.return_type,
        flags, {},
    )  # fmt: skip
    i32, i64, ptr = ir.IntType(32), ir.IntType(64), ir.PointerType()
    module = made.library.create_ir_module("entry")
    kinds = [ptr, i64, i64]
    inner = ir.FunctionType(i32, [ptr, ptr, *kinds])  # places of a result and of an exception
    native = ir.Function(module, inner, made.fndesc.llvm_func_name)
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), symbol(function))
    builder = ir.IRBuilder(entry.append_basic_block())
    places = [builder.alloca(i64), builder.alloca(i64)]
    for place in places:
        place.type = ptr  # llvmlite gives it a typed pointer, which LLVM no longer knows
    builder.call(native, [*places, *entry.args])
    builder.ret_void()
    made.library.add_ir_module(module)
    made.library.finalize()
    return made.library


@functools.cache
def _linker() -> Any:
    return binding.create_lljit_compiler(suppress_errors=True)  # they are raised


_linked: list[Any] = []  # code is never unloaded: a call in another thread may be in it
_names = itertools.count()


def _link(name: str, code: bytes) -> int:
    """The address of the function in the object code. RuntimeError if it is no such code."""
    linker = _linker()
    builder = binding.JITLibraryBuilder().add_object_img(code).add_current_process()
    linked = builder.export_symbol(name).link(linker, str(next(_names)))
    _linked.append((linker, linked))
    return linked[name]  # type: ignore[no-any-return]


def _read(path: Path) -> bytes | None:
    """The object code in a file, if it is there and whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code = data[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == data[:DIGEST_BYTES] else None


def _write(path: Path, code: bytes) -> None:
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        beside.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
