"""The packed weights of a program's products: made once for a tier, and kept for all plans."""

from __future__ import annotations

from typing import Any

from fastq.kernels.convolution import pack_conv2d
from fastq.kernels.products import PackedLinear
from fastq.phases import Phase, phase_weight
from fastq.steps import Step

Axes = tuple[list[Phase], list[Phase]]  # the phases of height and of width


class PackedWeights:
    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def of(self, step: Step, tier: str) -> Any:
        """The packed weight of a product."""
        key = (tier, step.name)
        if key not in self._kept:
            a = step.arguments
            pack = pack_conv2d if step.op == "conv2d" else PackedLinear
            zero_point = a.get("x_zero_point", 0)  # packed with a Requant, which not all have
            self._kept[key] = pack(a["weight"], a["epilogue"], zero_point, tier)
        return self._kept[key]

    def of_phases(self, step: Step, tier: str, axes: Axes) -> list[Any]:
        """The packed weights of a transposed convolution, one for each of its phases."""
        a, found = step.arguments, []
        for down in axes[0]:
            for across in axes[1]:
                key = (tier, step.name, down.first, across.first)
                if key not in self._kept:
                    taps = phase_weight(a["weight"], down, across)
                    self._kept[key] = pack_conv2d(taps, a["epilogue"], a["x_zero_point"], tier)
                found.append(self._kept[key])
        return found
