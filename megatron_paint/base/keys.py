"""Keyed randomness: the same key gives the same draws on every machine. Earlier draws have no influence."""

import hashlib

import numpy as np


def derive_key(*parts: str | int) -> int:
    """Returns a stable 63-bit key of names and numbers, such as (run seed, step, problem id, sample index).

    The type and length of every part enter the key. So ("a", "b") and ("ab",) have different keys, and so have ("1",)
    and (1,). Raises TypeError for other types. This includes bool, because True and 1 would give the same key.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (str, int)):
            raise TypeError(f"a key is made of str and int, not {type(part).__name__}: {part!r}")
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else str(part).encode()
        digest.update((b"s" if isinstance(part, str) else b"i") + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def uniforms(key: int, count: int) -> np.ndarray:
    """Returns `count` draws from U[0, 1): float64, with 53 random bits each.

    They come from Philox's raw stream, which numpy keeps stable between versions. numpy's Generator methods may change.
    """
    return (_raw(key, count) >> np.uint64(11)) * 2.0**-53


def permutation(key: int, count: int) -> np.ndarray:
    """Returns the numbers 0 .. count - 1 in random order, int64."""
    return np.argsort(_raw(key, count), kind="stable")


def derangement(key: int, count: int) -> np.ndarray:
    """Returns a random permutation of 0 .. count - 1 in which every item moves, int64.

    It is uniform over the cyclic permutations (ours): item i gets its successor in a random circle. Raises ValueError
    for count 1.
    """
    if count == 1:
        raise ValueError("one item cannot change places with another")
    circle = permutation(key, count)
    partner = np.empty(count, dtype=np.int64)
    partner[circle] = np.roll(circle, -1)
    return partner


def _raw(key: int, count: int) -> np.ndarray:
    return np.random.Philox(key=key).random_raw(count)
