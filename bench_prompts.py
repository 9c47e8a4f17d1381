"""Benchmark of masks from boxes and clicks, by a simulated person who sees each before the next.

    python bench_prompts.py -d DAVIS [-o CHECKPOINT] [--json FILE]

It shows the objects of the first frames of val sequences and prints the J of their masks: of the
true box, of one whose sides are moved by up to a tenth of its own, and of one and more clicks, the
first well inside, each next one in the middle of the largest error; and how long a prompt takes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import prompts
import train_prompts
from build import device_of
from davis import SETS, YEARS, Davis
from media.shown import Prompts
from videomatch import SHIPPED, VideoMatch

CLICKS = 8  # of a simulated person
SHOWN = (1, 3, 8)  # clicks after which J is printed


def bench(args: argparse.Namespace) -> dict:
    """J of boxes and of clicks, on first frames of val sequences: a person is simulated."""
    model = VideoMatch.load(args.model_load).to(device_of(args.cuda_device))
    rows = train_prompts.measured(model, Davis(args.dataset, args.year, args.set).sequences, CLICKS)
    head = ("true box", "moved box", *(f"{i} clicks" for i in SHOWN))
    figures = [[row["box"], row["jittered"], *(row["clicks"][i - 1] for i in SHOWN)]
               for row in rows]
    print(f"{'':24}" + "".join(f"{name:>10}" for name in head))
    for row, values in zip(rows, figures):
        print(f"{row['name']:24}" + "".join(f"{value:10.3f}" for value in values))
    means = np.mean(figures, 0)
    print(f"{'mean J':24}" + "".join(f"{value:10.3f}" for value in means))
    seconds = prompt_seconds(model, args.repeats)
    print(f"{seconds:.4f} s a prompt after the encoder, {torch.get_num_threads()} threads")
    return {"rows": rows, "mean": dict(zip(head, means.tolist())), "seconds": seconds}


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


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmark of masks from boxes and clicks.")
    add = parser.add_argument
    add("--dataset", "-d", metavar="PATH", type=Path, default=Path("./DAVIS"),
        help="the DAVIS folder (default: ./DAVIS)")
    add("--year", "-y", choices=YEARS, default="2016", help="default: 2016")
    add("--set", "-t", choices=SETS, default="val", help="default: val")
    add("--model_load", "-o", type=Path, default=SHIPPED["mobilenet"], metavar="PATH",
        help="checkpoint (default: the one in models/)")
    add("--repeats", type=int, default=3, help="of each time that is measured (default: 3)")
    add("--cuda_device", "-c", metavar="DEVICE", help="id of a CUDA device, or cpu, or mps")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    try:
        figures = bench(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
