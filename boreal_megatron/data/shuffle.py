"""The order of an epoch without an array of it: a keyed permutation that answers for any place by arithmetic.

A Feistel network permutes the numbers of ceil(log2(count)) bits; numbers that fall outside of the range go through it
again until they are inside (cycle walking), which leaves a permutation of range(count) and costs less than two passes
on average (more below 33). Round keys are SHA-256 of the caller's key, the rest is integer arithmetic modulo 2^64: the
same numbers on every machine and NumPy version. A resumed run depends on these very numbers.

Shapes: n numbers asked for. NumPy only.
"""

import hashlib

import numpy as np

ROUNDS = 8
FEWEST_BITS = 6  # halves of fewer than 3 bits mix badly
FACTORS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd


class Permutation:
    """A permutation of range(count) that depends on nothing but its arguments.

    Args:
        count: 1 to 2^62 numbers.
        key: text; another key is another permutation.
    """

    def __init__(self, count, key):
        assert 1 <= count <= 2**62, count
        bits = max(FEWEST_BITS, (count - 1).bit_length())
        self.count = count
        self._bits = bits - bits // 2, bits // 2  # of the high and the low half
        digests = (hashlib.sha256(f"{key}/{number}".encode()).digest() for number in range(ROUNDS))
        self._keys = [np.uint64(int.from_bytes(digest[:8], "little")) for digest in digests]

    def __call__(self, places):
        """Returns int64 [n]: what stands at these places."""
        return self._walk(places, range(ROUNDS))

    def inverse(self, numbers):
        """Returns int64 [n]: the places of these numbers."""
        return self._walk(numbers, range(ROUNDS)[::-1])

    def _walk(self, numbers, rounds):
        out = self._feistel(np.asarray(numbers, dtype=np.int64).astype(np.uint64), rounds)
        outside = np.flatnonzero(out >= self.count)
        while outside.size:
            out[outside] = self._feistel(out[outside], rounds)
            outside = outside[out[outside] >= self.count]
        return out.astype(np.int64)

    def _feistel(self, x, rounds):
        high_bits, low_bits = self._bits
        shift = np.uint64(low_bits)
        halves = [x >> shift, x & np.uint64((1 << low_bits) - 1)]
        for number in rounds:
            changed = number % 2
            mixed = halves[1 - changed] ^ self._keys[number]
            mixed *= FACTORS[0]
            mixed ^= mixed >> np.uint64(32)
            mixed *= FACTORS[1]
            mixed >>= np.uint64(64 - self._bits[changed])
            halves[changed] ^= mixed
        return halves[0] << shift | halves[1]
