"""Progress bars."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def bar(
    items: Any, title: str, progress: bool, total: int | None = None, *, unit: str = "it"
) -> Any:
    """A progress bar, if wanted and standard error is a terminal; around items, or of `total` steps
    where these are None."""
    return tqdm(items, title, total, unit=unit, disable=None if progress else True)
