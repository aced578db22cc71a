import numpy as np
import pytest

from fastq.observer import MinMaxObserver
from fastq.qparams import QParams, choose_qparams


def observed(*arrays: object) -> MinMaxObserver:
    observer = MinMaxObserver()
    for array in arrays:
        observer.update(array)
    return observer


def test_the_range_is_that_of_all_arrays_and_any_shape() -> None:
    observer = observed(np.float32(3), [[1.0, -2.0]], np.full((2, 3, 4), 7, np.float32), [])
    assert (observer.minimum, observer.maximum, observer.count) == (-2, 7, 27)
    assert observer.qparams() == choose_qparams(-2, 7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_count(bad: float) -> None:
    observer = observed([bad, 1.0, -4.0, bad], [bad])
    assert (observer.minimum, observer.maximum, observer.count) == (-4, 1, 2)


def test_beyond_float32_is_infinite() -> None:
    observer = observed(np.array([1e300, -1e300, 2.0]))
    assert (observer.minimum, observer.maximum, observer.count) == (2, 2, 1)


def test_the_largest_floats_have_finite_qparams() -> None:
    huge = np.finfo(np.float32).max
    assert np.isfinite(observed([-huge, huge]).qparams().scale)


def test_merging_equals_seeing_everything() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(5, 3)) * 10**k for k in range(4)]
    whole = observed(*parts)
    left, right = observed(*parts[:1]), observed(*parts[1:])
    left.merge(right)
    left.merge(MinMaxObserver())
    assert left.qparams() == whole.qparams()
    assert left.count == whole.count


def test_merging_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="got int, wanted a MinMaxObserver"):
        MinMaxObserver().merge(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("arrays", [[], [[]], [[np.nan, np.inf]]], ids=["no", "empty", "nan"])
def test_without_a_finite_value_there_are_no_qparams(arrays: list[object]) -> None:
    with pytest.raises(ValueError, match="no finite value"):
        observed(*arrays).qparams()


def test_zeros_alone_have_scale_one() -> None:
    assert observed(np.zeros(3)).qparams() == QParams(np.float32(1))
