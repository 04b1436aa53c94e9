"""The arithmetic permutation: a bijection for every count, the same numbers for ever, and no pattern to be seen."""

import numpy as np
import pytest

from boreal_megatron.data.shuffle import Permutation

COUNTS = [1, 2, 3, 5, 7, 31, 33, 63, 64, 65, 1000, *(2**k + d for k in (7, 10, 13, 16) for d in (-1, 0, 1)), 100_003]


@pytest.mark.parametrize("count", COUNTS)
def test_a_bijection_and_its_inverse(count):
    places = np.arange(count)
    numbers = Permutation(count, "7/web/0")(places)
    assert numbers.dtype == np.int64
    np.testing.assert_array_equal(np.sort(numbers), places)
    np.testing.assert_array_equal(Permutation(count, "7/web/0").inverse(numbers), places)
    some = np.random.default_rng(0).integers(0, count, 50)
    np.testing.assert_array_equal(Permutation(count, "7/web/0")(some), numbers[some])


def test_known_answers():
    # A resumed run depends on these very numbers: whoever changes them breaks every checkpoint.
    assert Permutation(8, "1234/web/0")(np.arange(8)).tolist() == [2, 3, 4, 0, 5, 1, 6, 7]
    assert Permutation(2**31 + 11, "1234/web/3")([0, 1, 2**31 + 10]).tolist() == [1807118374, 1714795672, 1401689151]
    assert Permutation(2**62, "x")([0, 2**62 - 1]).tolist() == [2845703212697587928, 3479713036172816483]


def test_keys_differ():
    keys = ["1/web/0", "1/web/1", "2/web/0", "1/code/0"]
    orders = [Permutation(1000, key)(np.arange(1000)) for key in keys]
    for i, one in enumerate(orders):
        for two in orders[:i]:
            assert (one == two).sum() < 10  # 1 by chance


def test_small_permutations_are_equally_likely():
    """All 24 orders of 4 over 960 keys: chi-square of 23 degrees of freedom, below its 99.9% quantile, 49.7."""
    found = {}
    for key in range(960):
        order = tuple(Permutation(4, f"{key}")(np.arange(4)).tolist())
        found[order] = found.get(order, 0) + 1
    assert len(found) == 24
    assert sum((n - 40) ** 2 / 40 for n in found.values()) < 49.7


@pytest.mark.parametrize("count", [65_536, 70_001])
def test_it_looks_random(count):
    """Mean displacement of a random permutation is count/3, with a standard deviation below count / 800 here; the
    numbers at neighbouring places fall into 16 x 16 cells evenly: chi-square of 240 to 255 degrees of freedom, below
    330.5, the 99.9% quantile of 255."""
    numbers = Permutation(count, "7/web/0")(np.arange(count))
    assert abs(np.abs(numbers - np.arange(count)).mean() / count - 1 / 3) < 4 / 800
    cells = numbers * 16 // count
    pairs = np.bincount(cells[:-1] * 16 + cells[1:], minlength=256)
    expected = (count - 1) / 256
    assert ((pairs - expected) ** 2 / expected).sum() < 330.5
    assert (np.abs(np.diff(numbers)) == 1).sum() < 12  # 2 by chance
