"""Masks from boxes and clicks, by a simulated person who sees each before the next.

J of the objects of first frames: of the true box, of one whose sides are moved by up to a tenth of
its own, and of one and more clicks, the first well inside, each next one in the middle of the
largest error; and how long a prompt takes.
"""

import time

import numpy as np
import torch

import prompts
from davis import Sequence
from media.shown import Prompts
from training import prompts as train_prompts
from videomatch import VideoMatch

CLICKS = 8  # of a simulated person
SHOWN = (1, 3, 8)  # clicks after which J is printed


def measured(model: VideoMatch, sequences: list[Sequence], repeats: int) -> dict:
    """Print and return J of each object and their mean, and seconds a prompt."""
    rows = train_prompts.measured(model, sequences, CLICKS)
    head = ("true box", "moved box", *(f"{i} clicks" for i in SHOWN))
    figures = [[row["box"], row["jittered"], *(row["clicks"][i - 1] for i in SHOWN)]
               for row in rows]
    print(f"{'':24}" + "".join(f"{name:>10}" for name in head))
    for row, values in zip(rows, figures):
        print(f"{row['name']:24}" + "".join(f"{value:10.3f}" for value in values))
    means = np.mean(figures, 0)
    print(f"{'mean J':24}" + "".join(f"{value:10.3f}" for value in means))
    seconds = prompt_seconds(model, repeats)
    print(f"{seconds:.4f} s a prompt after the encoder, {torch.get_num_threads()} threads")
    return {"rows": rows, "mean": dict(zip(head, means.tolist())), "seconds": seconds}


@torch.no_grad()
def prompt_seconds(model: VideoMatch, repeats: int) -> float:
    """The least of what a box takes after the encoder, at the size that the network sees."""
    shape = prompts.seen_size((320, 480))
    image = torch.zeros(1, 3, *shape, device=model.device)
    seen = model.prompts.look(image, *model.encoder.pyramid(image))
    times = []
    for _ in range(10 * repeats):
        start = time.perf_counter()
        model.prompts(seen, Prompts([(100, 60, 200, 150)])).cpu()
        times.append(time.perf_counter() - start)
    return min(times)
