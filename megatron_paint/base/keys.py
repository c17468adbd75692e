"""Keyed randomness: the same key gives the same draws on every machine, whatever was drawn before."""

import hashlib

import numpy as np


def derive_key(*parts: str | int) -> int:
    """A stable 63-bit key of a sequence of names and numbers, such as (run seed, step, problem id, sample index).

    Every part enters with its type and length, so that ("a", "b"), ("ab",) and ("1",), (1,) give different keys.
    Raises TypeError for other types (a bool too: True and 1 would be one key).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (str, int)):
            raise TypeError(f"a key is made of str and int, not {type(part).__name__}: {part!r}")
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else str(part).encode()
        digest.update((b"s" if isinstance(part, str) else b"i") + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def uniforms(key: int, count: int) -> np.ndarray:
    """`count` draws from U[0, 1), float64 with 53 random bits each.

    Made from Philox's raw stream, which numpy keeps stable between versions; its Generator methods are not.
    """
    return (_raw(key, count) >> np.uint64(11)) * 2.0**-53


def permutation(key: int, count: int) -> np.ndarray:
    """A random order of 0 .. count - 1, int64."""
    return np.argsort(_raw(key, count), kind="stable")


def derangement(key: int, count: int) -> np.ndarray:
    """A random permutation of 0 .. count - 1 in which no item keeps its place, int64.

    Uniform over the cyclic ones (ours): item i gets its successor in a random circle. Raises ValueError for count 1.
    """
    if count == 1:
        raise ValueError("one item cannot change places with another")
    circle = permutation(key, count)
    partner = np.empty(count, dtype=np.int64)
    partner[circle] = np.roll(circle, -1)
    return partner


def _raw(key: int, count: int) -> np.ndarray:
    return np.random.Philox(key=key).random_raw(count)
