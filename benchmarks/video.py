"""Seconds per frame, from the image file to the mask, broken down by part.

    python -m benchmarks.video [--rows H ...] [--json FILE]

The shipped weights track one object and five objects through a clip of the demo data.
"""

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import torch

import preprocess
from benchmarks import common
from benchmarks.common import WARM_UP, peak_memory, seconds, strips
from cli.setup import select_device
from datasets import demo
from media import images
from tracking.tracker import Tracker
from videomatch import SHIPPED, VideoMatch


class PartTimer:
    """Adds up the seconds spent in parts of the pipeline, by wrapping their functions.

    Attributes:
        taken: seconds of each part; the caller clears it for each frame.
    """

    def __init__(self, device: torch.device):
        self.device, self.taken = device, {}

    def wrap(self, part: str, owner, name: str) -> None:
        """Replace the method `owner.name` by one that adds its time to a part."""
        run = getattr(owner, name)

        def timed(*arguments, **keywords):
            result = []
            taken = seconds(lambda: result.append(run(*arguments, **keywords)), self.device)
            self.taken[part] = self.taken.get(part, 0.0) + taken
            return result[0]

        setattr(owner, name, timed)


def measure_clip(model: VideoMatch, rows: int, objects: int, frames: int) -> dict:
    """Median seconds per frame of each part, and the peak memory.

    The clip is one of the demo data, resized to `rows`; its object is divided into `objects`
    vertical strips.
    """
    model, device = copy.deepcopy(model), model.device
    shape = rows, round(rows * demo.SHAPE[1] / demo.SHAPE[0])
    pictures = list(itertools.islice(demo.draw(demo.SCENES["val"]["stroll"]), frames + WARM_UP + 1))
    mask = strips(images.resize_mask(pictures[0][1], shape), objects)
    timer, lines = PartTimer(device), []
    for part, owner, name in (("encoder", model, "encode"), ("matching", model.reader, "read"),
                              ("decoder", model.decoder, "forward"),
                              ("memory", model.reader, "remember")):
        timer.wrap(part, owner, name)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i:05d}.jpg") for i in range(len(pictures))]
        for path, (image, _) in zip(paths, pictures):
            images.write_image(path, cv2.resize(image, shape[::-1]))

        def track():
            tracker = Tracker(model)
            for i, path in enumerate(paths):
                timer.taken, start = {}, time.perf_counter()
                image = preprocess.to_tensor(images.read_image(path), device=device)
                read = time.perf_counter() - start
                tracker.step(image, mask if i == 0 else None)
                whole = time.perf_counter() - start
                rest = whole - read - sum(timer.taken.values())
                lines.append({"reading": read, **timer.taken, "deciding": rest, "frame": whole})

        peak = peak_memory(track, device)
    medians = {part: statistics.median(line[part] for line in lines[WARM_UP + 1:])
               for part in lines[-1]}
    return {"rows": rows, "objects": objects, **medians, "peak_bytes": peak,
            "times_the_encoder": medians["frame"] / medians["encoder"]}


def measure(args: argparse.Namespace) -> dict:
    device = select_device(args.cuda_device)
    model = VideoMatch.load(SHIPPED["mobilenet"]).to(device).for_inference()
    names = ("reading", "encoder", "matching", "decoder", "memory", "deciding", "frame")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
          f"{model.precision}; seconds per frame, median of {args.frames}")
    print(f"{'rows':>5} {'objects':>8} " + " ".join(f"{name:>9}" for name in names)
          + f" {'peak MB':>8} {'encoders':>8}")
    results = []
    for rows in args.rows:
        for objects in (1, 5):
            row = measure_clip(model, rows, objects, args.frames)
            peak = row["peak_bytes"]
            print(f"{rows:5} {objects:8} " + " ".join(f"{row[name]:9.4f}" for name in names)
                  + f" {'?' if peak is None else round(peak / 2**20):>8}"
                  + f" {row['times_the_encoder']:8.2f}", flush=True)
            results.append(row)
    return {"torch": torch.__version__, "device": str(device), "precision": str(model.precision),
            "threads": torch.get_num_threads(), "rows": results}


def main() -> int:
    parser = common.parser("Benchmark of the whole pipeline on a clip.")
    common.add_device(parser)
    common.add_clip(parser, (360, 480, 720))
    return common.run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
