"""Calibration in several processes: each sees its part of the data, and all get one network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """The processes that calibrate one model together, or this one alone.

    distributed  True: all processes of torch.distributed. A ProcessGroup: those in it. False: this
                 process alone. Objects are exchanged, so the backend is one for the CPU: "gloo".

    What is exchanged waits for every process to come to the same place. Raises TypeError for
    anything else, RuntimeError where torch.distributed was not initialized, ValueError in a process
    that is not in the group.
    """

    def __init__(self, distributed: Any = False) -> None:
        self._group: Any = None
        self.rank, self.count = 0, 1
        if distributed is False or distributed is None:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "distributed: torch.distributed.init_process_group was not called in this process; "
                "wanted that first, or distributed=False"
            )
        if distributed is not True and not isinstance(distributed, dist.ProcessGroup):
            raise TypeError(
                f"distributed: got {type(distributed).__name__}, wanted a bool or a "
                "torch.distributed.ProcessGroup"
            )
        self._group = dist.group.WORLD if distributed is True else distributed
        self.rank, self.count = dist.get_rank(self._group), dist.get_world_size(self._group)
        if self.rank < 0:
            raise ValueError(
                "distributed: this process is not in the group; wanted a call in those that are"
            )

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value, self._group)
        return gathered

    def agree(self, compute: Callable[[], T]) -> T:
        """What the first process computes, in all of them."""
        if self.count == 1:
            return compute()
        told = [compute() if self.rank == 0 else None]
        dist.broadcast_object_list(told, dist.get_global_rank(self._group, 0), self._group)
        return told[0]  # type: ignore[return-value]

    def merge(self, observers: Mapping[str, Any]) -> dict[str, Any]:
        """By name, observers that saw what those of all processes did."""
        first, *others = map(dict, self.gather(dict(observers)))
        for part in others:
            for name, observer in part.items():
                if name in first:
                    first[name].merge(observer)
                else:
                    first[name] = observer
        return first


ALONE = Processes()
