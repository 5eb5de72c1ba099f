"""A keyed permutation of ``range(size)`` in constant memory."""

from hashlib import blake2b

_ROUNDS = 8


def permute(index: int, size: int, key: bytes) -> int:
    """The image of ``index`` under the permutation of ``range(size)`` that ``key`` (at most 64 bytes) chooses.

    A balanced Feistel network permutes the smallest even number of bits that holds ``size``; walking along its cycle
    until the value falls below ``size`` makes that a permutation of ``range(size)`` (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002). The network's domain is at most four times ``size``, so four steps are expected
    at worst.
    """
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for i_round in range(_ROUNDS):
            digest = blake2b(right.to_bytes(8, "little") + bytes([i_round]), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        value = left << half | right
        if value < size:
            return value
