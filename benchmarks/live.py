"""Frames per second of a live clip, and the delay from receiving a frame to its mask.

    python -m benchmarks.live [--rows H ...] [--json FILE]

A clip of the demo data plays in real time on the loopback address, as a camera's encoder sends it.
The shipped weights track one object and three objects; --size is the height of the frames.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from queue import SimpleQueue

import cv2
import numpy as np
import torch

from benchmarks import common
from benchmarks.common import WARM_UP, strips
from benchmarks.stream import StreamServer, encode
from cli.setup import select_device
from datasets import demo
from media import images
from media.live import LiveClip
from tracking import live
from tracking.pipeline import Options
from videomatch import SHIPPED, VideoMatch

SCENE_FRAMES = 100  # of the demo clip, which plays forward and backward in turn


def measure_clip(model: VideoMatch, rows: int, objects: int, args: argparse.Namespace) -> dict:
    """Frame rates received and tracked, and delays in seconds; `args` as from the command line."""
    shape = rows, 2 * round(rows * demo.SHAPE[1] / demo.SHAPE[0] / 2)
    scene = [(cv2.resize(image, shape[::-1]), images.resize_mask(mask, shape))
             for image, mask in demo.draw(demo.SCENES["val"]["stroll"], frames=SCENE_FRAMES)]
    pictures = [image for image, _ in scene]
    with tempfile.TemporaryDirectory() as folder:
        video = encode(pictures + pictures[::-1], Path(folder, "stream.mp4"), args.fps)
        with StreamServer(video, loop=True) as server, LiveClip(server.url) as clip:
            return {"rows": rows, "objects": objects,
                    **_follow(model, clip, scene, objects, rows, args.seconds)}


def _follow(model: VideoMatch, clip: LiveClip, scene: list[tuple[np.ndarray, np.ndarray]],
            objects: int, size: int, seconds: float) -> dict:
    """Track a clip and measure it after the first `WARM_UP` frames."""
    changes: SimpleQueue[live.Reference | live.Removal] = SimpleQueue()
    frames = live.track(model, clip, changes, Options(size=size))
    first = next(frames)
    # encoding has changed it, so it is the most similar one
    _, mask = min(scene, key=lambda pair: np.abs(pair[0].astype(int) - first.image).mean())
    changes.put(live.Reference(first.index, first.image, strips(mask, objects)))
    delays, began, received = [], 0.0, 0
    for number, frame in enumerate(frames):
        assert frame.mask.shape == first.image.shape[:2]  # computed here, as a sink would do
        now = time.monotonic()
        if number == WARM_UP:
            began, received = now, clip.count + clip.skipped
        elif number > WARM_UP:
            delays.append(now - clip.arrived)
            if now - began >= seconds:
                break
    taken = now - began
    return {"received_per_second": (clip.count + clip.skipped - received) / taken,
            "tracked_per_second": len(delays) / taken, "delay": statistics.median(delays),
            "delay_95": float(np.percentile(delays, 95))}


def measure(args: argparse.Namespace) -> dict:
    device = select_device(args.cuda_device)
    model = VideoMatch.load(SHIPPED["mobilenet"]).to(device).for_inference()
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
          f"{model.precision}; a stream of {args.fps} frames per second, {args.seconds:g} s each")
    print(f"{'rows':>5} {'objects':>8} {'received/s':>11} {'tracked/s':>10} {'delay ms':>9} "
          f"{'95 % ms':>8}")
    results = []
    for _, rows, objects in itertools.product(range(args.repeats), args.rows, (1, 3)):
        row = measure_clip(model, rows, objects, args)
        print(f"{rows:5} {objects:8} {row['received_per_second']:11.1f} "
              f"{row['tracked_per_second']:10.1f} {1000 * row['delay']:9.0f} "
              f"{1000 * row['delay_95']:8.0f}", flush=True)
        results.append(row)
    return {"torch": torch.__version__, "device": str(device), "precision": str(model.precision),
            "threads": torch.get_num_threads(), "fps": args.fps, "rows": results}


def main() -> int:
    parser = common.parser("Benchmark of live video.", repeats=1)
    common.add_device(parser)
    common.add_rows(parser, (240, 360, 480))
    parser.add_argument("--fps", type=int, default=30, metavar="N",
                        help="frames per second of the stream (default: 30)")
    parser.add_argument("--seconds", type=float, default=20, metavar="S",
                        help="length of each measurement (default: 20)")
    return common.run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
