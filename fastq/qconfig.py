"""How one layer is quantized: what a user may choose, checked when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from fastq.observer import ObserverSpec, make_observer
from fastq.qparams import WeightRange, check_weight_bits, check_weight_range, quantize_weight


@dataclass(frozen=True)
class QConfig:
    """How one layer is quantized.

    observer      how the range of its output is found, after the activation or the addition that
                  became part of it: a name ("minmax", "moving_average", "histogram",
                  "percentile", "entropy"), or a class or function without arguments that makes an
                  observer; see `fastq.make_observer`. The network's inputs take the one that is
                  given for all layers. Sums in int16 have room for twice the range that it finds;
                  "histogram" is "minmax" for them, which have steps for all of a range.
    weight_range  how its weights' range is found: "max" or "mse"; see `fastq.quantize_weight`.
    weight_bits   2 to 8 bits for the weights, stored as int8.

    Raises TypeError and ValueError for anything else.
    """

    observer: ObserverSpec = "histogram"
    weight_range: WeightRange = "max"
    weight_bits: int = 8

    def __post_init__(self) -> None:
        make_observer(self.observer)
        check_weight_range("QConfig: weight_range", self.weight_range)
        check_weight_bits("QConfig: weight_bits", self.weight_bits)

    def quantize_weight(self, weight: ArrayLike) -> tuple[Any, Any]:
        """`fastq.quantize_weight` with this range and so many bits."""
        return quantize_weight(weight, range=self.weight_range, bits=self.weight_bits)


DEFAULT = QConfig()
