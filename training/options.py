"""How to train: what can be chosen, and how the learning rate goes. It knows no flag."""

from dataclasses import dataclass
from pathlib import Path

import torch

GRADIENT = 5.0  # the largest norm of a gradient
WARM_UP = 0.05  # share of the iterations in which the learning rate rises


@dataclass
class Options:
    """What `train` needs to know beside model and data; the flags of `main.py`."""

    save: Path  # the best weights; beside it .jsonl, the log, and .png, the curves
    shape: tuple[int, int]  # (H, W) of the frames that the network sees
    iterations: int
    batch_size: int = 1
    losses: tuple[str, ...] = ("dice", "bce")  # keys of LOSSES, added up
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    augment: bool = True
    shuffle: bool = True
    report: int = 100  # iterations between validations; -1 validates at the end only
    patience: int = 10  # reports without a better IoU before training stops
    workers: int = 2
    seed: int = 0
    plot: bool = False
    overwrite: bool = False  # what an earlier run left at `save`
    resume: bool = False  # go on from the last report of an earlier run, if there was one


def one_cycle(optimizer: torch.optim.Optimizer, rates: float | list[float],
              iterations: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """The schedule of learning rates: a short rise to `rates`, then a cosine down to 0.

    The first momentum goes the other way, from 0.95 to 0.85 and back (Smith and Topin:
    Super-convergence, 2017), as PyTorch has it.
    """
    steps = iterations + 1
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps,
        pct_start=max(WARM_UP, 1.5 / steps))  # PyTorch divides by zero where one step is all
