"""Benchmark of masks from boxes and points: J with a simulated user, and seconds per prompt.

    python -m benchmarks.prompts -d DAVIS [-o CHECKPOINT] [--json FILE]

Prints J of each object in the first frame of each sequence: for its true bounding box, for a box
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
from training import prompt_training
from videomatch import SHIPPED, VideoMatch

CLICKS = 8  # per object; with more, drawing the mask by hand would be less work
REPORTED = (1, 3, 8)  # numbers of clicks after which J is printed


def measure_prompts(model: VideoMatch, sequences: list[Sequence], repeats: int) -> dict:
    """Print and return J of each object, the mean J, and seconds per prompt."""
    rows = prompt_training.evaluate_prompts(model, sequences, CLICKS)
    columns = ("true box", "jittered box", *(f"{i} clicks" for i in REPORTED))
    table = [[row["box"], row["jittered"], *(row["clicks"][i - 1] for i in REPORTED)]
             for row in rows]
    print(f"{'object':24}" + "".join(f"{name:>13}" for name in columns))
    for row, values in zip(rows, table):
        print(f"{row['name']:24}" + "".join(f"{value:13.3f}" for value in values))
    means = np.mean(table, 0)
    print(f"{'mean J':24}" + "".join(f"{value:13.3f}" for value in means))
    seconds = prompt_seconds(model, repeats)
    print(f"{seconds:.4f} s per prompt after the encoder, {torch.get_num_threads()} threads")
    return {"rows": rows, "mean": dict(zip(columns, means.tolist())), "seconds": seconds}


@torch.no_grad()
def prompt_seconds(model: VideoMatch, repeats: int) -> float:
    """Shortest time of a box prompt in seconds, without the encoder, at the network's input size.

    The shortest, because other processes can only add to it. A prompt takes a fraction of a second,
    hence ten times `repeats` measurements.
    """
    # a crop of a common aspect ratio; what the image and box contain does not change the time
    shape = prompting.crop_size((320, 480))
    image = torch.zeros(1, 3, *shape, device=model.device)
    features = model.prompts.prepare(image, *model.encoder.pyramid(image))
    times = []
    for _ in range(10 * repeats):
        start = time.perf_counter()
        model.prompts(features, Prompts([(100, 60, 200, 150)])).cpu()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(args: argparse.Namespace) -> dict:
    """Run the benchmark as the command line asks."""
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
