"""Training options and the learning-rate schedule."""

from dataclasses import dataclass
from pathlib import Path

import torch

# Gradients of a larger norm are scaled down to this one, so that a single hard clip cannot undo
# many steps. Much lower values slow training down, since ordinary steps are scaled too.
MAX_GRADIENT_NORM = 5.0
# Share of the iterations in which the learning rate rises: AdamW's estimates are noisy at first,
# and a pretrained network must not be moved far by them.
WARM_UP = 0.05


@dataclass
class Options:
    """Training options; `main.py -m train` sets them from flags.

    The names of the fields are keys of the training state (`.state`): renaming one makes earlier
    runs impossible to resume.
    """

    save: Path  # file of the best weights; the log (.jsonl) and the curves (.png) lie next to it
    shape: tuple[int, int]  # (H, W) of the training frames
    iterations: int
    batch_size: int = 1  # clips or pairs per step and process
    losses: tuple[str, ...] = ("dice", "bce")  # keys of LOSSES, added up
    learning_rate: float = 1e-4  # of the encoder; other parts have multiples of it
    weight_decay: float = 0.0
    augment: bool = True
    shuffle: bool = True
    report: int = 100  # iterations between validations; -1: only at the end
    patience: int = 10  # stop after this many reports without a better held-out IoU
    workers: int = 2  # processes that load data; 0: load in this one
    seed: int = 0
    plot: bool = False  # draw the curves at every report
    overwrite: bool = False  # replace an earlier run at `save`
    resume: bool = False  # continue from the last report of an earlier run, if there is one


def one_cycle(optimizer: torch.optim.Optimizer, rates: float | list[float],
              iterations: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return a schedule with a short rise to `rates`, then a cosine decay to 0.

    AdamW's first momentum cycles inversely, from 0.95 to 0.85 and back, as is PyTorch's default
    (Smith and Topin: Super-convergence, 2017).

    Args:
        rates: peak learning rates, one for all parameter groups or one for each.
        iterations: number of optimiser steps.
    """
    steps = iterations + 1  # the last step still has a learning rate above 0
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps,
        # at least 1.5 steps, since PyTorch divides by zero where the rise is a single step
        pct_start=max(WARM_UP, 1.5 / steps))
