"""COCO's run-length encoding of masks, plain and compressed, as pycocotools reads and writes it.

An implementation of our own, tested against pycocotools: that is compiled, which a few dozen lines
of the toolkit's core don't warrant.
"""

from collections.abc import Sequence

import numpy as np


def encode(mask: np.ndarray) -> list[int]:
    """Run lengths of an (H, W) bool mask, column by column; the first run is of zeros."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def decode(runs: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool mask of run lengths.

    Raises:
        ValueError: the runs don't add up to the size of the mask.
    """
    if min(runs, default=0) < 0 or sum(runs) != shape[0] * shape[1]:
        raise ValueError(f"runs of {sum(runs)} pixels, expected {shape[1]}x{shape[0]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape, order="F")


def compress(runs: Sequence[int]) -> str:
    """Run lengths as text.

    From the fourth run on the difference to the run before the last is written, which is small
    where neighbouring columns are alike. Five bits a character, the lowest first; bit 5 says that
    more follow, and the last character's bit 4 is the sign.
    """
    values = np.array(runs, np.int64)
    values[3:] -= np.array(runs[1:-2], np.int64)
    characters, used = [], []
    more = np.ones(len(values), bool)
    while more.any():
        used.append(more)
        bits, values = values & 31, values >> 5
        more = more & (values != np.where(bits & 16, -1, 0))
        characters.append(bits + 32 * more + 48)
    return np.stack(characters, 1)[np.stack(used, 1)].astype(np.uint8).tobytes().decode()


def decompress(text: str) -> list[int]:
    """Run lengths of `compress`'s text.

    Raises:
        ValueError: not such a text.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text.encode():
        if not 48 <= character < 112:
            raise ValueError(f"{chr(character)!r} in compressed run lengths")
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end early")
    return runs
