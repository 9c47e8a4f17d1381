"""PyTorch against onnxruntime on one clip: seconds per frame, time to the first mask, memory.

    python -m benchmarks.runtimes [--rows H ...] [--threads N ...] [--json FILE]

Each runtime runs in its own process (`benchmarks.one_runtime`), which does not import the other.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import torch

from benchmarks import common
from benchmarks.common import WARM_UP
from datasets import demo
from lite_runtime import export
from media import images
from videomatch import SHIPPED, VideoMatch

RUNTIMES = ("pytorch", "pytorch fp32", "onnxruntime")


def measure_runtime(runtime: str, clip: Path, mask: Path, weights: Path, threads: int,
                    warm_up: int = WARM_UP) -> dict:
    """Track a clip in a new process and measure it.

    Args:
        runtime: one of `RUNTIMES`; "pytorch" uses the precision that the command line would.
        clip: a folder of frames.
        mask: the reference mask, of the first frame.
        weights: a checkpoint, or for onnxruntime an export.
        warm_up: number of frames before the measured ones.

    Returns:
        "seconds": median per frame, without reading the image. "first": seconds from the start of
        the process to the first predicted mask. "peak_bytes": of the process, None where the
        system does not report it. "precision".

    Raises:
        OSError: the process failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_runtime", runtime, str(clip.resolve()),
         str(mask.resolve()), str(weights.resolve()), str(threads), str(warm_up),
         str(time.time())],
        env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if process.returncode:
        raise OSError(f"{runtime}: {(process.stderr.strip() or 'failed').splitlines()[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def print_table(rows: list[dict]) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; seconds per frame (median, range over the "
          "repeats), seconds to the first mask, peak memory of the process")
    print(f"{'rows':>5} {'threads':>7} {'runtime':13} {'frame':>8} {'range':>16} {'first':>6} "
          f"{'MB':>6}  precision")
    for row in rows:
        peak = row["peak_bytes"]
        print(f"{row['rows']:5} {row['threads']:7} {row['runtime']:13} {row['seconds']:8.3f} "
              f"[{row['least']:.3f}, {row['most']:.3f}] {row['first']:6.2f} "
              f"{'?' if peak is None else round(peak / 2**20):>6}  {row['precision']}")


def draw_clips(folder: Path, rows: list[int], frames: int) -> dict[int, tuple[Path, Path]]:
    """Draw a clip of the demo data at several heights.

    Returns:
        For each of `rows` a folder of frames and the mask file of the first frame.
    """
    pictures, clips = list(itertools.islice(demo.draw(demo.SCENES["val"]["stroll"]), frames)), {}
    for height in rows:
        shape = height, round(height * demo.SHAPE[1] / demo.SHAPE[0])
        clips[height] = folder / f"{height}", folder / f"{height}.png"
        images.write_mask(clips[height][1], images.resize_mask(pictures[0][1], shape))
        for i, (image, _) in enumerate(pictures):
            images.write_image(clips[height][0] / f"{i:05d}.png", cv2.resize(image, shape[::-1]))
    return clips


def measure_in_turn(clips: dict[int, tuple[Path, Path]], checkpoint: Path, export: Path, threads,
                    repeats: int) -> list[dict]:
    """Measure the runtimes in turn, `repeats` times, so that other load affects all of them.

    Args:
        clips: from `draw_clips`.
        threads: numbers of threads.
    """
    rows = []
    for height, (clip, mask) in clips.items():
        for count in threads:
            all_runs = {runtime: [] for runtime in RUNTIMES}
            for _ in range(repeats):
                for runtime, runs in all_runs.items():
                    weights = export if runtime == "onnxruntime" else checkpoint
                    runs.append(measure_runtime(runtime, clip, mask, weights, count))
            for runtime, runs in all_runs.items():
                times = [run["seconds"] for run in runs]
                rows.append({"rows": height, "threads": count, "runtime": runtime,
                             "seconds": statistics.median(times), "least": min(times),
                             "most": max(times), "precision": runs[0]["precision"],
                             "first": statistics.median(run["first"] for run in runs),
                             "peak_bytes": max((run["peak_bytes"] or 0) for run in runs) or None})
    return rows


def measure_all(args: argparse.Namespace) -> dict:
    model = VideoMatch.load(SHIPPED["mobilenet"]).for_inference("fp32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export.export(model, folder / "export")
        clips = draw_clips(folder, args.rows, args.frames + WARM_UP + 1)
        rows = measure_in_turn(clips, SHIPPED["mobilenet"], folder / "export", args.threads,
                               args.repeats)
    print_table(rows)
    return {"torch": torch.__version__, "machine": platform.machine(), "rows": rows}


def main() -> int:
    parser = common.parser("Benchmark of PyTorch against onnxruntime.")
    common.add_clip(parser, (360, 480))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), metavar="N",
                        help="numbers of threads of each runtime (default: 1 2)")
    return common.run(parser, measure_all)


if __name__ == "__main__":
    sys.exit(main())
