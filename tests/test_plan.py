"""Networks on the kernels: the bits of the specification, on every tier, for every shape."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from networks import CASES, Case, by_reference, noise_ratio, quantized_case
from torch import Tensor
from torch.utils import _pytree as pytree

from fastq.kernels import call
from fastq.steps import OPERATIONS

BATCHES = (1, 3)


@cache
def expected(name: str, batch: int, size: int) -> list[Tensor]:
    case = CASES[name]
    return pytree.tree_leaves(by_reference(quantized_case(name))(*case.arguments(batch, size)))


def check(name: str, batch: int, size: int) -> None:
    """Equal to the reference, whatever the arena held before."""
    case = CASES[name]
    for value in (0xA5, 0x5A):
        held, _, _ = call._workspace.held
        if held is not None:
            held[:] = value
        _check(name, batch, size, case)


def _check(name: str, batch: int, size: int, case: Case) -> None:
    found = pytree.tree_leaves(quantized_case(name)(*case.arguments(batch, size)))
    for x, y in zip(expected(name, batch, size), found, strict=True):
        assert torch.equal(x, y), f"batch {batch}, size {size}: {(x != y).sum()} of {x.numel()}"


@pytest.mark.parametrize("name", CASES)
def test_every_tier_gives_the_bits_of_the_reference(name: str, isa: str):
    for size in CASES[name].extents:
        for batch in BATCHES:
            check(name, batch, size)


@pytest.mark.parametrize("name", CASES)
def test_threads_and_layouts_do_not_matter(name: str, threads: int):
    case = CASES[name]
    check(name, 3, case.extents[0])
    given = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in case.arguments(3)]
    found = pytree.tree_leaves(quantized_case(name)(*given))
    assert all(map(torch.equal, expected(name, 3, case.extents[0]), found))


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_float32_computes(name: str):
    case = CASES[name]
    network, quantized = case.network(), quantized_case(name)
    assert len(quantized.programs) == case.programs
    given = case.arguments(8)
    with torch.no_grad():
        wanted, found = (pytree.tree_leaves(net(*given)) for net in (network, quantized))
    for x, y in zip(wanted, found, strict=True):
        assert x.shape == y.shape
        assert noise_ratio(x, y) > case.decibels


@pytest.mark.parametrize("name", [name for name in CASES if "mask" in name or name == "causal"])
def test_a_mask_becomes_an_operand_of_softmax(name: str):
    (program,) = quantized_case(name).programs
    (softmax,) = (step for step in program.steps if step.op.startswith("softmax"))
    assert len(softmax.inputs) == 2


def test_the_cases_have_all_operations():
    used = {
        step.op
        for name in CASES
        for program in quantized_case(name).programs
        for step in program.steps
    }
    assert used == OPERATIONS.keys()
