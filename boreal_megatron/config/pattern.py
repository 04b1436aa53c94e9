"""The network's pattern: from what people write to one letter a half-block.

`*` gated attention, `G` Gated DeltaNet, `-` dense SwiGLU, `E` MoE. Spaces are ignored, `8x(...)` repeats (repeats
nest), and what follows `/` is the MTP head's block. A card layer is a mixer half-block, then an FFN half-block.
"""

import re
from functools import cache

from boreal_megatron.errors import BorealError

MIXERS = "*G"
FFNS = "-E"
REPEAT = re.compile(r"(\d+)\s*x\s*\(")


@cache
def expand(pattern):
    """Writes a pattern out: no spaces, no repeats.

    Args:
        pattern: for example `*-G-G- 8x(*-GEG-) / *-`.

    Returns:
        (main, mtp): one letter a half-block; mtp is None where the pattern has no `/`.

    Raises:
        BorealError: names the character (counted from 1) at which the pattern goes wrong.
    """
    main, mtp = _letters(pattern)
    _check_pairs(pattern, main, "the main network")
    if mtp is None:
        return _join(main), None
    _check_pairs(pattern, mtp, "the MTP head")
    if len(mtp) != 2:
        raise _error(pattern, mtp[2][1], "the MTP head goes on", "one mixer and one FFN after `/`", "shorten it")
    return _join(main), _join(mtp)


def _letters(pattern):
    """Both parts as lists of (letter, position in the pattern); the second is None without `/`."""
    main = None
    open_groups = [(1, None, [])]  # innermost last: (repeats, where it opened, its letters so far)
    at = 0
    while at < len(pattern):
        character = pattern[at]
        repeat = REPEAT.match(pattern, at)
        if repeat:
            if int(repeat[1]) == 0:
                raise _error(pattern, at, "a repeat of 0", "1 or more", "remove the group or write its count")
            open_groups.append((int(repeat[1]), at, []))
            at = repeat.end()
            continue
        if character in MIXERS + FFNS:
            open_groups[-1][2].append((character, at))
        elif character == ")":
            if len(open_groups) == 1:
                raise _error(pattern, at, "`)` that closes nothing", "balanced parentheses", "remove it")
            count, _, letters = open_groups.pop()
            open_groups[-1][2].extend(letters * count)
        elif character == "/":
            if len(open_groups) > 1:
                raise _error(pattern, at, "`/` inside a repeat", "`/` after every repeat", "close the repeat first")
            if main is not None:
                raise _error(pattern, at, "a second `/`", "at most one MTP head", "keep one")
            main = open_groups[0][2]
            open_groups = [(1, None, [])]
        elif not character.isspace():
            expected = "one of `*` `G` `-` `E`, a repeat written 8x(...), or `/`"
            raise _error(pattern, at, f"`{character}`", expected, "correct it")
        at += 1
    if len(open_groups) > 1:
        raise _error(pattern, open_groups[-1][1], "a repeat that never closes", "balanced parentheses", "add `)`")
    letters = open_groups[0][2]
    return (letters, None) if main is None else (main, letters)


def _check_pairs(pattern, letters, what):
    if not letters:
        raise BorealError(f"pattern {pattern!r}: {what} is empty; expected a mixer and an FFN, such as `*-`")
    for index, (letter, at) in enumerate(letters):
        expected, kind = (MIXERS, "mixer") if index % 2 == 0 else (FFNS, "FFN")
        if letter not in expected:
            names = " or ".join(f"`{e}`" for e in expected)
            found = f"`{letter}` as half-block {index} of {what}"
            raise _error(pattern, at, found, f"a {kind}, {names}", "alternate mixer and FFN")
    if len(letters) % 2:
        found = f"{what} ends with the mixer `{letters[-1][0]}`"
        raise _error(pattern, letters[-1][1], found, "an FFN after it, `-` or `E`", "add one")


def _join(letters):
    return "".join(letter for letter, _ in letters)


def _error(pattern, at, found, expected, do):
    return BorealError(f"pattern {pattern!r}, character {at + 1}: found {found}; expected {expected}; {do}")
