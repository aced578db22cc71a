"""What all kernels share: their one signature, and the digest that guards the disk cache."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from numba import types

# void(args, begin, end): tasks begin..end with the operands in the block of int64 fields at args
SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64)


@functools.cache
def sources_digest() -> str:
    """A digest of the sources of this folder: an edit in any of them makes new kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
