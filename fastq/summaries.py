"""What became of each layer of a model, and where that is kept: on the quantized model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

Result = Literal["int8 static", "int8 dynamic", "int8 weight", "folded", "float"]
ASKED = "as asked"  # the reason of what stays float by skip= or config=


@dataclass(frozen=True)
class Row:
    """One layer of a summary.

    name    as in `named_modules()`, the first one of a module that has several.
    kind    its class in the model that was given.
    result  'int8 static', 'int8 dynamic', 'int8 weight' (an embedding, whose input are tokens),
            'folded' (batch norm, into other layers; what is computed of parameters alone, into a
            constant) or 'float'.
    reason  why it is float or dynamic, or where it was folded; may be empty for int8.
    """

    name: str
    kind: str
    result: Result
    reason: str = ""


@dataclass(frozen=True)
class QuantizationSummary:
    """What became of each layer that computes with weights. Printed, it is a table.

    note     what else there is to say of the whole model.
    rebuilt  the modules of a class derived from nn.Linear or a convolution, and the Conv1D of
             transformers, that were first rebuilt from torch's own layers: an nn.Conv2d that pads
             in its forward, for example.
    """

    rows: tuple[Row, ...]
    rebuilt: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        head = ("layer", "kind", "result", "why")
        lines = [(row.name or "(model)", row.kind, row.result, row.reason) for row in self.rows]
        table = text_table(head, lines, len(head))
        counts = Counter(row.result for row in self.rows)
        total = ", ".join(f"{n} {result}" for result, n in counts.items())
        return "\n".join([*table, total, *([self.note] if self.note else [])])


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a table, its columns aligned: the first `left` ones to the left, the others to
    the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    ]


def summary(model: nn.Module) -> QuantizationSummary:
    """What `quantize_model` did to this model, or to the one that `load` read from its file.

    Raises ValueError for a model that neither of them returned.
    """
    found = getattr(model, "_fastq_summary", None)
    if not isinstance(found, QuantizationSummary):
        raise ValueError(
            f"summary: this {type(model).__name__} has none; wanted what fastq.quantize_model "
            "or fastq.load returned"
        )
    return found


def keep_summary(model: nn.Module, report: QuantizationSummary) -> None:
    """`summary` finds it from now on."""
    model._fastq_summary = report  # type: ignore[assignment]
