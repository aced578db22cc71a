"""What wins back accuracy that rounding costs. Each remedy changes a `Prepared`: the first kind the
float network, before its values are observed, to an equal one that is easier to quantize; the
second kind the integer weights, the biases and the grid of the inputs, afterwards.

    cross_layer_equalization   channels of products that are clamped, averaged or pooled at most
    activation_equalization    channels of norms, and of batch norms that stand alone
    input_equalization         channels of the network's inputs: each has a grid of its own
    balanced_rounding          rounds weights so that their errors cancel: kernels, outputs
    gptq                       rounds weights one after the other, by least squares
    adaround                   rounds each weight to the side that it learns
    batch_norm                 scales and biases that give the outputs' float mean and variance
    bias_correction            biases that give the outputs' float mean

`observe_and_apply` applies those that are named, in this order. Most of the second kind walk
through the network with the float values and the quantized ones side by side, so that each layer
sees what the layers before it, remedies included, will give it, and makes up for their errors too.

A batch is the flat arguments of the network, as `Graph.run` takes them. The remedies work on a
sample, the first batches: it is walked as a whole, and bounded in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fastq.prepare import Prepared
from fastq.processes import ALONE, Processes
from fastq.progress import bar
from fastq.remedies.biases import batch_norm, bias_correction
from fastq.remedies.equalization import (
    activation_equalization,
    cross_layer_equalization,
    input_equalization,
)
from fastq.remedies.rounding import adaround, balanced_rounding, gptq
from fastq.remedies.side_by_side import Batch, take_sample

Remedies = str | Iterable[str]

DEFAULT = ("activation_equalization", "input_equalization", "balanced_rounding", "bias_correction")

EQUALIZATIONS = ("input_equalization", "cross_layer_equalization", "activation_equalization")
ROUNDINGS = ("balanced_rounding", "gptq", "adaround")  # the last that is named decides


class Remedy(NamedTuple):
    """apply(prepared, sample, progress); `first`: before the values are observed."""

    apply: Callable[[Prepared, Sequence[Batch], bool], None]
    first: bool = False


def observe_and_apply(
    prepared: Prepared,
    batches: Iterable[Batch],
    remedies: Remedies = DEFAULT,
    *,
    total: int | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> None:
    """Observe the network's values on the batches, which are read once, and apply these remedies, a
    name or several. The progress bar counts to `total` batches.

    Of several processes each observes its own batches; the sample is the first one's, and what is
    done after the values were observed is done there alone.

    Raises TypeError and ValueError for names that are none, ValueError for a value that was never
    finite.
    """
    names = remedy_names(remedies)
    chosen = [REMEDIES[name] for name in names]
    rest = iter(batches)
    progress = progress and processes.rank == 0
    own = take_sample(prepared, rest) if chosen else []
    sample = processes.agree(lambda: own)
    for remedy in chosen:
        if remedy.first:
            remedy.apply(prepared, sample, progress)
    for arguments in bar(itertools.chain(own, rest), "calibrate", progress, total):
        prepared.observe(arguments)
    prepared.merge(processes)
    prepared.check_seen()
    prepared.settle()
    for remedy in chosen if processes.rank == 0 else ():
        if not remedy.first:
            remedy.apply(prepared, sample, progress)


def remedy_names(remedies: Remedies) -> tuple[str, ...]:
    """The names, in the order in which they are applied."""
    if not isinstance(remedies, Iterable):
        raise TypeError(f"remedies: got {remedies!r:.80}, wanted names, or () for none")
    given = (remedies,) if isinstance(remedies, str) else tuple(remedies)
    unknown = [name for name in given if name not in REMEDIES]
    if unknown:
        raise ValueError(f"remedies: {unknown[0]!r} is none; there are {', '.join(REMEDIES)}")
    return tuple(name for name in REMEDIES if name in given)


REMEDIES: dict[str, Remedy] = {
    "cross_layer_equalization": Remedy(cross_layer_equalization, first=True),
    "activation_equalization": Remedy(activation_equalization, first=True),
    "input_equalization": Remedy(input_equalization),
    "balanced_rounding": Remedy(balanced_rounding),
    "gptq": Remedy(gptq),
    "adaround": Remedy(adaround),
    "batch_norm": Remedy(batch_norm),
    "bias_correction": Remedy(bias_correction),
}
