"""Accuracy within a budget: remedies first, then the most sensitive layers in float."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from fastq.layerwise import sensitivity
from fastq.processes import ALONE, Processes
from fastq.read import CannotCapture
from fastq.remedies import DEFAULT, EQUALIZATIONS, ROUNDINGS, Remedies, remedy_names

Build = Callable[[tuple[str, ...], tuple[str, ...]], nn.Module]

# What each rung adds to the best so far; what gains nothing is left out again.
RUNGS = (
    ("cross_layer_equalization",),
    ("gptq",),
    ("adaround",),
)


def _silent(line: str) -> None:
    """Prints nothing."""


@dataclass(frozen=True)
class Attempt:
    """One way to quantize: its remedies, the layers left float, and what it scored."""

    remedies: tuple[str, ...]
    skip: tuple[str, ...]
    score: float

    def __str__(self) -> str:
        floats = f", float: {', '.join(self.skip)}" if self.skip else ""
        return f"{' + '.join(self.remedies)}{floats}"


def score(evaluate: Any, network: nn.Module) -> float:
    """What a user's function says of a network; TypeError unless it says one number."""
    if not callable(evaluate):
        raise TypeError(f"evaluate: got {evaluate!r:.80}, wanted a function that scores a model")
    found = evaluate(network)
    number: Any = None if isinstance(found, str) else found  # a text is no score
    try:
        return float(number)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"evaluate gave {found!r:.80}; wanted one number") from error


def climb(
    model: nn.Module,
    data: Any,
    evaluate: Callable[[nn.Module], float],
    max_drop: float,
    build: Build,
    *,
    forward: Any = None,
    config: Any = None,
    skip: Any = (),
    remedies: Remedies = DEFAULT,
    echo: Callable[[str], None] = print,
    processes: Processes = ALONE,
) -> nn.Module:
    """The first quantized network whose score is at most max_drop below the float network's.

    First the remedies that are given, then more of them (RUNGS), and at last 1, 2, 4, ... of the
    layers that `sensitivity` finds to harm the output most, after the equalizations among these
    remedies, stay float. A line for each attempt says its score, in brackets how far that is from
    the float network's, and what it gained.

    data      calibration data that can be read again and again: a list of batches or a DataLoader.
    evaluate  gives a network's score, more being better; called on the float network too.
    max_drop  in the units of the score, at least 0.
    build     build(remedies, skip) quantizes the model with these remedies, these layers float.
    forward, config, skip  those of `fastq.quantize_model`, for `sensitivity`.
    echo      takes the lines.
    processes that build together: the first one's scores count, and its lines are seen.

    Where nothing is within the budget the best attempt is returned, with a UserWarning. An attempt
    that scores NaN is the worst.
    Raises ValueError for a negative max_drop, data that can be read once only, or a float network
    that scores NaN; TypeError for a score that is no number.
    """
    real = isinstance(max_drop, Real)
    if not real or not max_drop >= 0:
        raise (ValueError if real else TypeError)(
            f"max_drop={max_drop!r}; wanted at least 0, in the score's units"
        )
    if iter(data) is data:
        raise ValueError(
            f"calibration_data is a {type(data).__name__}, which can be read once only; a search "
            "wants a list of batches or a DataLoader"
        )
    if processes.rank:
        echo = _silent

    def score_of(network: nn.Module) -> float:
        return processes.agree(lambda: score(evaluate, network))

    goal = score_of(model)
    if math.isnan(goal):
        raise ValueError("evaluate gave nan for the float model; wanted a score to compare with")
    echo(f"float32: {goal:.4g}; wanted: at least {goal - max_drop:.4g}")
    search = _Search(build, score_of, goal, max_drop, echo, remedies)
    for rung in RUNGS:
        if not search.done:
            search.attempt(_with_rung(search.best.remedies, rung))
    if not search.done:
        kept = search.best.remedies
        names = processes.agree(
            lambda: _most_sensitive(model, data, kept, forward=forward, config=config, skip=skip)
        )
        count = 1
        while not search.done and count < len(names):
            search.attempt(kept, tuple(names[:count]))
            count *= 2
    if not search.done:
        best = search.best
        warnings.warn(
            f"quantize_model: nothing was within {max_drop:.4g} of float32's {goal:.4g}; the best, "
            f"{best}, scores {best.score:.4g}",
            stacklevel=3,  # the caller of quantize_model
        )
    return search.network


class _Search:
    """Attempts, from that with these remedies on; the best one is kept, with its network.

    build, score_of  make and score a network.    goal  what the float network scored.
    """

    def __init__(
        self,
        build: Build,
        score_of: Callable[[nn.Module], float],
        goal: float,
        max_drop: float,
        echo: Callable[[str], None],
        remedies: Remedies,
    ) -> None:
        self.build, self.score_of, self.echo = build, score_of, echo
        self.goal, self.max_drop = goal, max_drop
        self.best, self.network = self._scored(remedy_names(remedies), ())
        self._tell(self.best, "")

    @property
    def done(self) -> bool:
        """Whether the best attempt is within the budget."""
        return self.best.score >= self.goal - self.max_drop

    def attempt(self, remedies: Iterable[str], skip: tuple[str, ...] = ()) -> None:
        new, network = self._scored(remedy_names(remedies), skip)
        gain = new.score - self.best.score
        if gain > 0:
            self.best, self.network = new, network
        self._tell(new, f", gains {gain:.4g}" if gain > 0 else ", no gain: left out")

    def _scored(
        self, remedies: tuple[str, ...], skip: tuple[str, ...]
    ) -> tuple[Attempt, nn.Module]:
        network = self.build(remedies, skip)
        scored = self.score_of(network)
        return Attempt(remedies, skip, -math.inf if math.isnan(scored) else scored), network

    def _tell(self, new: Attempt, gained: str) -> None:
        enough = ": enough" if self.done else ""
        self.echo(f"{new}: {new.score:.4g} ({new.score - self.goal:+.4g}){gained}{enough}")


def _with_rung(remedies: tuple[str, ...], rung: tuple[str, ...]) -> set[str]:
    """These remedies and a rung's, which has one way of rounding in the place of another."""
    if set(rung) & set(ROUNDINGS):
        remedies = tuple(name for name in remedies if name not in ROUNDINGS)
    return {*remedies, *rung}


def _most_sensitive(
    model: nn.Module, data: Any, remedies: tuple[str, ...], **given: Any
) -> list[str]:
    """The layers, the one that harms the output most first, in the float network that these
    remedies equalize: it may have another worst layer than the model.

    given  forward, config and skip of `sensitivity`.
    """
    try:
        found = sensitivity(model, data, remedies=set(remedies) & set(EQUALIZATIONS), **given)
    except ValueError as error:
        if isinstance(error.__cause__, CannotCapture):  # its layers are int8 by themselves
            return []
        raise
    return list(dict.fromkeys(row.name for row in found.worst() if row.name))
