"""Parts of a reference frame that are looked at from nearer, and which cells of them are kept.

Arrays of numpy or tensors: it knows neither the encoder nor what becomes of what is seen.
"""

from collections.abc import Sequence

from network.arrays import Array, library

CLOSER = (2.0, 4.0)  # how many times nearer the reference frame is looked at too
MARGIN = 2  # cells around an object that are looked at with it


def sets_of_labels(labels: Array, object_ids: Sequence[int]) -> Array:
    """(h, w) object ids of cells -> (h, w) the set of each, -1 for none."""
    sets = library(labels).full_like(labels, -1)
    for i, object_id in enumerate((0, *object_ids)):
        sets[labels == object_id] = i
    return sets


def near(cells: Array) -> Array:
    """(h, w) bool: those that are at most `MARGIN` cells from one of `cells`, along both sides."""
    found = cells
    for _ in range(2):  # rows, then columns
        before, found = found, found | False
        for away in range(1, MARGIN + 1):
            found[away:] |= before[:-away]
            found[:-away] |= before[away:]
        found = found.T
    return found


def thinned(chosen: Array, most: int) -> Array:
    """(h, w) bool: at most so many of them, evenly spread."""
    xp = library(chosen)
    places = xp.where(chosen.reshape(-1))[0]
    if len(places) > most:
        places = places[[i * (len(places) - 1) // max(1, most - 1) for i in range(most)]]
    kept = xp.zeros_like(chosen.reshape(-1))
    kept[places] = True
    return kept.reshape(chosen.shape)


def around(mask: Array, scale: float) -> tuple[slice, slice]:
    """Rows and columns of the part of a frame that shows an object `scale` times as near.

    Args:
        mask: (H, W) bool, somewhere true: the object, whose middle is that of the part, or as
            close to it as the frame's edges allow.
    """
    part = []
    for found, side in zip(library(mask).where(mask), mask.shape):
        length = max(1, round(side / scale))
        middle = (int(found.min()) + int(found.max()) + 1) / 2
        first = min(max(0, round(middle - length / 2)), side - length)
        part.append(slice(first, first + length))
    return part[0], part[1]
