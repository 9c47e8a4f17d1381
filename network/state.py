"""What the network keeps of a video, as lists, dicts and tensors: a file of it can run no code.

It doesn't know what is in a memory, and writes no file.
"""

from collections import deque

import torch

from network.bank import Bank, Entry
from network.matching import Grid
from network.memory import Memory
from network.sets import Sets

KINDS = {kind.__name__: kind for kind in (Memory, Sets, Bank, Entry, Grid)}

GATHERED = "reference"  # of `Sets`, made of its other fields: larger than they are together


def plain(value):
    """Objects of `KINDS` and deques, in lists, tuples and each other, as dicts that name them."""
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, deque):
        return {"kind": "deque", "items": plain(list(value)), "maxlen": value.maxlen}
    if isinstance(value, torch.Tensor) and value.layout == torch.sparse_csr:
        # PyTorch checks one that it reads for sorted and distinct columns, which nobody needs
        return {"kind": "rows", "items": [value.crow_indices(), value.col_indices(),
                                          value.values()], "shape": list(value.shape)}
    if type(value).__name__ in KINDS:
        return {"kind": type(value).__name__,
                "fields": [(k, plain(v)) for k, v in vars(value).items() if k != GATHERED]}
    return value


def restored(value):
    """The inverse of `plain`.

    Raises:
        KeyError: of a kind that isn't known.
    """
    if isinstance(value, list | tuple):
        return type(value)(restored(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value["kind"] == "deque":
        return deque(restored(value["items"]), value["maxlen"])
    if value["kind"] == "rows":
        return torch.sparse_csr_tensor(*value["items"], value["shape"], check_invariants=False)
    kind = KINDS[value["kind"]]
    found = kind.__new__(kind)
    vars(found).update((name, restored(field)) for name, field in value["fields"])
    if kind is Sets:
        found.gather()
    return found
