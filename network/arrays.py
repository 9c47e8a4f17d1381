"""Arrays of numpy and tensors of PyTorch alike, for rules that don't care which of them they hold.

PyTorch isn't imported here: whoever hands in a tensor has done so.
"""

import functools
import sys
from typing import Any

import numpy as np

Array = Any  # of either library


def library(x: Array) -> Any:
    """The module `numpy` or `torch`, whichever the array is of.

    What is called in it goes by one name and one order of arguments in both.
    """
    return sys.modules[type(x).__module__.partition(".")[0]]


def to_numpy(x: Array) -> np.ndarray:
    """The same values on the CPU; memory may be shared."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()


def like(x: np.ndarray, other: Array) -> Array:
    """The same values in the library of `other`, and on its device."""
    return x if isinstance(other, np.ndarray) else library(other).from_numpy(x).to(other.device)


@functools.lru_cache(16)
def bilinear(before: int, after: int) -> np.ndarray:
    """(after, before) float32: resizing along one side, without aliasing where it reduces."""
    step = before / after
    middles = (np.arange(after)[:, None] + 0.5) * step
    away = abs(np.arange(before) + 0.5 - middles) / max(1.0, step)
    weights = (1 - away).clip(min=0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
