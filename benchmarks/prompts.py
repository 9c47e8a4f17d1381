"""Masks from boxes and points given by a simulated user, and seconds per prompt.

    python -m benchmarks.prompts -d DAVIS [-o CHECKPOINT] [--json FILE]

Prints J of each object in the first frames of a data set: for its true bounding box, for a box
whose sides are moved by up to a tenth of its size, and for one or more clicks. The first click is
well inside the object, each further one at the centre of the largest error.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from cli.setup import select_device
from davis import Davis, Sequence
from media.prompts import Prompts
from tracking import prompting
from training import prompt_training as train_prompts
from videomatch import SHIPPED, VideoMatch

CLICKS = 8  # per object; users rarely give more before they draw the mask by hand
REPORTED = (1, 3, 8)  # numbers of clicks after which J is printed


def measure_prompts(model: VideoMatch, sequences: list[Sequence], repeats: int) -> dict:
    """Print and return J of each object, the mean J, and seconds per prompt."""
    rows = train_prompts.evaluate_prompts(model, sequences, CLICKS)
    head = ("true box", "moved box", *(f"{i} clicks" for i in REPORTED))
    figures = [[row["box"], row["jittered"], *(row["clicks"][i - 1] for i in REPORTED)]
               for row in rows]
    print(f"{'':24}" + "".join(f"{name:>10}" for name in head))
    for row, values in zip(rows, figures):
        print(f"{row['name']:24}" + "".join(f"{value:10.3f}" for value in values))
    means = np.mean(figures, 0)
    print(f"{'mean J':24}" + "".join(f"{value:10.3f}" for value in means))
    seconds = prompt_seconds(model, repeats)
    print(f"{seconds:.4f} s per prompt after the encoder, {torch.get_num_threads()} threads")
    return {"rows": rows, "mean": dict(zip(head, means.tolist())), "seconds": seconds}


@torch.no_grad()
def prompt_seconds(model: VideoMatch, repeats: int) -> float:
    """Fastest time of a box prompt, without the encoder, at the network's input size."""
    shape = prompting.crop_size((320, 480))
    image = torch.zeros(1, 3, *shape, device=model.device)
    seen = model.prompts.look(image, *model.encoder.pyramid(image))
    times = []
    for _ in range(10 * repeats):
        start = time.perf_counter()
        model.prompts(seen, Prompts([(100, 60, 200, 150)])).cpu()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(args: argparse.Namespace) -> dict:
    model = VideoMatch.load(args.model_load).eval().to(select_device(args.cuda_device))
    return measure_prompts(model, Davis(args.dataset, args.year, args.set).sequences,
                           args.repeats)


def main() -> int:
    parser = common.parser("Benchmark of masks from boxes and points.")
    common.add_device(parser)
    common.add_dataset(parser)
    parser.add_argument("--model_load", "-o", type=Path, default=SHIPPED["mobilenet"],
                        metavar="PATH", help="checkpoint (default: the one in models/)")
    return common.run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
