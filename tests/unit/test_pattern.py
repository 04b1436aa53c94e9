"""Patterns expand to one letter a half-block, and a wrong one names its character."""

import pytest

from boreal_megatron.config.pattern import expand
from boreal_megatron.errors import BorealError


def test_boreal_10b():
    main, mtp = expand("*-G-G-G- *-GEG-GE 8x(*-GEG-G-) / *-")
    assert len(main) == 80 and mtp == "*-"
    assert [main.count(letter) for letter in "*G-E"] == [10, 30, 30, 10]
    assert {i // 2 for i, letter in enumerate(main) if letter == "E"} == {5, 7, 9, 13, 17, 21, 25, 29, 33, 37}
    assert [i // 2 for i, letter in enumerate(main) if letter == "*"] == list(range(0, 40, 4))


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*-", ("*-", None)),
        (" * - G E ", ("*-GE", None)),
        ("2x(*-)", ("*-*-", None)),
        ("2 x ( *- 2x(G-) )/*E", ("*-G-G-*-G-G-", "*E")),
        ("*-12x(G-)", ("*-" + 12 * "G-", None)),
    ],
)
def test_expands(pattern, expected):
    assert expand(pattern) == expected
    main, mtp = expected
    assert expand(main if mtp is None else f"{main}/{mtp}") == expected  # what is written out stays as it is


@pytest.mark.parametrize(
    "pattern, character, word",
    [
        ("*-M-", 3, "`M`"),
        ("*-3(G-)", 3, "`3`"),
        ("*-(G-)", 3, "`(`"),
        ("*-2x(G-", 3, "never closes"),
        ("*-G-)", 5, "closes nothing"),
        ("*-0x(G-)", 3, "repeat of 0"),
        ("*--", 3, "mixer"),
        ("*G", 2, "FFN"),
        ("*-G", 3, "ends with the mixer"),
        ("*-/*-/*-", 6, "second `/`"),
        ("*-2x(G-/*-)", 8, "inside a repeat"),
        ("*-/*-*-", 6, "MTP head goes on"),
        ("*-/-*", 4, "the MTP head"),
    ],
)
def test_wrong_pattern_names_its_character(pattern, character, word):
    with pytest.raises(BorealError) as error:
        expand(pattern)
    assert f"character {character}:" in str(error.value) and word in str(error.value)


@pytest.mark.parametrize("pattern", ["", "  ", "/*-", "*-/"])
def test_empty_part(pattern):
    with pytest.raises(BorealError, match="is empty"):
        expand(pattern)
