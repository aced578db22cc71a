"""Calibration data: batches, and what a batch gives to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import length_hint
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset


class Batches:
    """Batches of one tensor, one dict, or any iterable, to be gone through once.

    The first may be looked at before. One batch is held, and no more. `name` is what errors call
    them.
    """

    def __init__(self, data: Any, name: str = "calibration_data") -> None:
        self.name = name
        if isinstance(data, Tensor | Mapping):
            data = [data]
        elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            raise TypeError(
                f"{name} is a {type(data).__name__}, which gives single samples; wanted "
                "batches: torch.utils.data.DataLoader(dataset, batch_size=32)"
            )
        elif not isinstance(data, Iterable):
            raise TypeError(
                f"{name} is a {type(data).__name__}, wanted a tensor, a dict, or an "
                "iterable of batches such as a DataLoader"
            )
        elif isinstance(data, tuple | list) and _is_pair(data):
            kinds = _dtypes(data)
            raise TypeError(
                f"{name} is a {type(data).__name__} of tensors of {' and '.join(kinds)}, each of "
                "which would be a batch; wanted [(inputs, labels)] for one batch of pairs"
            )
        # how many there are, where that is known: a DataLoader may have a __len__ that raises
        self.total = length_hint(data) or None
        self._rest = iter(data)
        self._head: list[Any] = []

    def first(self) -> Any:
        """The first batch, before any is gone through; ValueError if there is none."""
        if not self._head:
            for batch in self._rest:
                self._head.append(self._checked(batch))
                break
            else:
                raise ValueError(
                    f"{self.name} has no batches; an iterator that was read to its end has none "
                    "left"
                )
        return self._head[0]

    def __iter__(self) -> Iterator[Any]:
        self.first()
        yield self._head.pop()
        yield from map(self._checked, self._rest)

    def _checked(self, batch: Any) -> Any:
        """A batch; ValueError for one that has tensors, of nothing."""
        tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        if tensors and not any(tensor.numel() for tensor in tensors):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ValueError(
                f"a batch of {self.name} is empty: {shapes}; wanted at least one sample"
            )
        return batch


def _is_pair(values: tuple[Any, ...] | list[Any]) -> bool:
    """Whether these are inputs and labels, not batches, by their dtypes: but for tokens, which may
    be int32 in one batch of a list and int64 in another."""
    kinds = {*_dtypes(values)}
    return len(kinds) > 1 and not (isinstance(values, list) and kinds == {"int32", "int64"})


def _dtypes(values: Iterable[Any]) -> list[str]:
    """The dtypes of the tensors among these, each once."""
    found = {str(value.dtype): None for value in values if isinstance(value, Tensor)}
    return [name.removeprefix("torch.") for name in found]


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) that a batch gives to a model."""
    given = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping):
        return (), dict(given)
    where = "" if given is batch else f" that starts with a {type(given).__name__}"
    raise TypeError(
        f"a calibration batch is a {type(batch).__name__}{where}; wanted a tensor, a dict of "
        "arguments, or a tuple or list that starts with one of these; "
        "forward=lambda model, batch: ... takes any other kind"
    )


def add_hint(error: Exception, batch: Any, forward: Any) -> None:
    """Adds what may have been meant to an error that a model raised on a batch."""
    several = forward is None and isinstance(batch, tuple | list) and len(batch) > 1
    text = str(error)
    if several and "missing" in text and "positional argument" in text:
        error.add_note(
            "a batch (a, b) means (input, label), and only the input is passed; "
            "forward=lambda model, batch: model(*batch) passes all of it"
        )
