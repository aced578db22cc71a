"""How long calls take: medians, in microseconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np


def check_count(what: str, value: Any) -> None:
    """TypeError or ValueError unless it is an int of at least 1."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < 1:
        raise (ValueError if whole else TypeError)(
            f"{what}={value!r:.80}, wanted an int of at least 1"
        )


def median(run: Callable[[], Any], seconds: float) -> float:
    """Microseconds of a call, which is made again and again for so many seconds."""
    samples: list[float] = []
    end = perf_counter() + seconds
    while not samples or perf_counter() < end:
        start = perf_counter()
        run()
        samples.append(perf_counter() - start)
    return 1e6 * statistics.median(samples)


def medians(
    runs: Sequence[Callable[[], Any]], passes: int, seconds: float = math.inf, least: int = 1
) -> list[float]:
    """Microseconds of each, warm, all run in order `passes` times; or fewer, `least` or more, that
    took so many seconds."""
    for run in runs:
        run()
    samples: list[list[float]] = [[] for _ in runs]
    end = perf_counter() + seconds
    for done in range(1, passes + 1):
        for times, run in zip(samples, runs, strict=True):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        if done >= least and perf_counter() > end:
            break
    return [1e6 * statistics.median(times) for times in samples]
