"""A float model in, an integer network out: what users call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from fastq.batches import Batches
from fastq.ladder import climb
from fastq.modules import Config, Selector, selectors_of
from fastq.network import calibrate, call_of, finish, prepare_model
from fastq.prepare import Prepared
from fastq.processes import Processes
from fastq.qat import check_float
from fastq.read import CannotCapture
from fastq.remedies import DEFAULT, Remedies, remedy_names
from fastq.summaries import ASKED, keep_summary, summary
from fastq.swap import swap_layers
from fastq.trace import Forward, duplicate


def quantize_model(
    model: nn.Module,
    calibration_data: Any = None,
    *,
    forward: Forward | None = None,
    config: Config | None = None,
    skip: Selector | Iterable[Selector] = (),
    remedies: Remedies = DEFAULT,
    evaluate: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    strict: bool = False,
    progress: bool = True,
    distributed: Any = False,
) -> nn.Module:
    """The model as integer programs: called like it, in eval mode, for inference.

    The network is captured with torch.export as it runs on the first batch; batch norm is folded,
    activations and residual additions become part of the products before them; the calibration
    data fix the ranges of the values between operations. What has an integer form is computed in
    integers, in one native call without Python between the layers; what has none stays a float
    operator between two programs, or becomes an int8 layer there, if it is an embedding, a 3-D
    convolution, or a recurrent layer whose states are given to it or asked for.
    `fastq.summary(result)` says for each layer what it became and why. A model that torch.export
    cannot follow, or whose graph has other values for the first batch, gets int8 layers in the
    place of its own, with a warning: `quantize_layers`, which is also what is used without
    calibration data.

    calibration_data  one batch (a tensor or a dict), or an iterable of batches, such as a
        DataLoader. A batch is a tensor: model(batch); a dict: model(**batch); or a tuple or list
        whose first element is one of these, and the input: most data sets give
        (images, labels). One batch is held at a time, and the remedies' sample.
    remedies  names of what shall win accuracy back. Unless told otherwise "input_equalization" (a
        grid for each channel of the input), "activation_equalization" (even features after norms),
        "balanced_rounding" (SQuant) and "bias_correction"; there are also
        "cross_layer_equalization", "gptq" (least squares), "adaround" (learned rounding) and
        "batch_norm" (new statistics), see README.md.
        They work on the first batches: 32 images for ResNet-50.
    evaluate, max_drop  a function that scores a model, more being better, and how much less than
        the float model's score may be had: more remedies are tried one after the other, then
        the layers that are most sensitive stay float. What each step gains is printed.
    forward   forward(model, batch) runs the model on a batch of any other kind.
    config    a `QConfig` for all layers, or a dict from name, pattern or class of modules to a
        QConfig, or to None: float. Of several that match, the last one holds.
    skip      layers to keep float: a name ('features.0'), a pattern ('*.attn.*'), a class, or
        several of these. What holds for a module holds for all within it.
    strict    raise ValueError if a layer stays float and neither skip nor config asks for it.
    progress  show a progress bar if standard error is a terminal.
    distributed  True, or a torch.distributed ProcessGroup: each of its processes makes this call
        with its part of the data, and all get the network that one would have made of all the data
        (of the observers `moving_average` alone depends on how it was divided). The first process
        applies the remedies, to its first batches, and calls `evaluate`.

    Raises TypeError for a model, data or batch of a wrong kind; ValueError for empty data, for
    a name that matches nothing, and if nothing can become int8. An error that the model
    raises passes through, with a note.
    """
    check_float("quantize_model", model)
    remedies = remedy_names(remedies)
    skip = selectors_of(skip, "skip")  # a search reads it again
    if (evaluate is None) != (max_drop is None):
        given = "max_drop=" if evaluate is None else "evaluate="
        raise TypeError(f"quantize_model: got {given} alone; wanted evaluate= with max_drop=")
    processes = Processes(distributed)
    if calibration_data is None:
        if evaluate is not None:
            raise TypeError("quantize_model: evaluate= wants calibration_data to quantize with")
        return _as_layers(
            model, None, forward=forward, config=config, skip=skip, strict=strict,
            progress=progress, processes=processes,
        )  # fmt: skip
    if evaluate is not None and max_drop is not None:

        def build(names: tuple[str, ...], floats: tuple[str, ...]) -> nn.Module:
            return quantize_model(
                model, calibration_data, forward=forward, config=config, skip=(*skip, *floats),
                remedies=names, strict=strict, progress=progress, distributed=distributed,
            )  # fmt: skip

        return climb(
            model,
            calibration_data,
            evaluate,
            max_drop,
            build,
            forward=forward,
            config=config,
            skip=skip,
            remedies=remedies,
            processes=processes,
        )
    batches = Batches(calibration_data)
    prepared, why = _prepared(model, batches, forward, config, skip)
    if prepared is None:
        return _layers_instead(
            model, batches, why, remedies, forward=forward, config=config, skip=skip,
            strict=strict, progress=progress, processes=processes,
        )  # fmt: skip
    calibrate(
        prepared, model, batches, forward, remedies=remedies, progress=progress,
        processes=processes,
    )  # fmt: skip
    return finish(prepared, model, strict=strict, processes=processes)


def _prepared(
    model: nn.Module,
    batches: Batches,
    forward: Forward | None,
    config: Config | None,
    skip: Iterable[Selector],
) -> tuple[Prepared | None, str]:
    """The network as it runs on the first batch; or None, and why it has no integer form."""
    try:
        # the first batch gets no name here: it is not to be held while the others are observed
        prepared, _ = prepare_model(
            model,
            *call_of(model, batches.first(), forward),
            config=config,
            skip=skip,
            alone=True,
        )
    except CannotCapture as error:
        return None, str(error)
    if prepared.regions:
        return prepared, ""
    but = ", but for what stays float as asked" if ASKED in prepared.reasons.values() else ""
    return None, f"no product has an integer form{but}"


def _as_layers(
    model: nn.Module,
    batches: Batches | None,
    *,
    forward: Forward | None,
    config: Config | None,
    skip: Iterable[Selector],
    strict: bool,
    progress: bool,
    processes: Processes,
) -> nn.Module:
    """A copy of the model with int8 layers."""
    try:
        result = duplicate(model)
    except Exception as error:
        error.add_note(
            "quantize_model copied the model; fastq.quantize_layers(model, ..., inplace=True) "
            "changes it without a copy"
        )
        raise
    return swap_layers(
        "quantize_model", result, batches, forward, config, skip, (), strict=strict,
        progress=progress, processes=processes,
    )  # fmt: skip


def _layers_instead(
    model: nn.Module, batches: Batches, why: str, remedies: tuple[str, ...], **given: Any
) -> nn.Module:
    """The model with int8 layers, and a warning that says why it is no integer network.

    given  the other arguments of `_as_layers`.
    """
    try:
        result = _as_layers(model, batches, **given)
    except ValueError as error:
        error.add_note(f"layers were tried, for there is no integer network: {why}")
        raise
    note = f"int8 layers, not one network: {why}"
    lost = "" if remedies == remedy_names(DEFAULT) else f"; remedies={remedies} want a network"
    warnings.warn(  # as from the caller of quantize_model
        f"quantize_model: {type(model).__name__}: {note}{lost}", stacklevel=3
    )
    keep_summary(result, replace(summary(result), note=note))
    return result
