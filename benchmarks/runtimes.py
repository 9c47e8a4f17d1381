"""PyTorch and onnxruntime on one clip: seconds a frame, until the first mask, and memory.

Each is measured in a process of its own, which imports nothing of the other; started by
`bench.py --runtimes`. It knows neither what a network is made of nor other benchmarks.
"""

import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cv2

from data import demo
from media import images

RUNTIMES = ("pytorch", "pytorch fp32", "onnxruntime")
WARM = 20  # frames before those that are measured, until the memory is full


def measured(runtime: str, clip: Path, mask: Path, weights: Path, threads: int,
             warm: int = WARM) -> dict:
    """A clip followed in another process.

    Args:
        runtime: one of `RUNTIMES`; "pytorch" computes as precisely as the command line does.
        clip: a folder of frames, `mask` that of the first.
        weights: a checkpoint, or for onnxruntime an export.

    Returns:
        "seconds" a frame behind the first `warm`, without reading it, the median; "first", seconds
        from the start of the process to the first mask that it found; "peak_bytes" of the process,
        None where the system can't tell; "precision".

    Raises:
        OSError: the process failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, runtime, str(clip.resolve()), str(mask.resolve()),
         str(weights.resolve()), str(threads), str(warm), str(time.time())], env=environment,
        cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{runtime}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; seconds a frame (median, range over the "
          "repeats), seconds to the first mask, peak memory of the process")
    print(f"{'rows':>5} {'threads':>7} {'runtime':13} {'a frame':>8} {'range':>16} {'first':>6} "
          f"{'MB':>6}  precision")
    for row in rows:
        peak = row["peak_bytes"]
        print(f"{row['rows']:5} {row['threads']:7} {row['runtime']:13} {row['seconds']:8.3f} "
              f"[{row['least']:.3f}, {row['most']:.3f}] {row['first']:6.2f} "
              f"{'?' if peak is None else round(peak / 2**20):>6}  {row['precision']}")


def drawn(folder: Path, rows: list[int], frames: int) -> dict[int, tuple[Path, Path]]:
    """Clips of the demo data: by rows, a folder of frames and the mask of the first."""
    pictures, clips = list(itertools.islice(demo.draw(demo.SCENES["val"]["stroll"]), frames)), {}
    for height in rows:
        shape = height, round(height * demo.SHAPE[1] / demo.SHAPE[0])
        clips[height] = folder / f"{height}", folder / f"{height}.png"
        images.write_mask(clips[height][1], images.resize_mask(pictures[0][1], shape))
        for i, (image, _) in enumerate(pictures):
            images.write_image(clips[height][0] / f"{i:05d}.png", cv2.resize(image, shape[::-1]))
    return clips


def in_turn(clips: dict[int, tuple[Path, Path]], checkpoint: Path, export: Path, threads,
            repeats: int) -> list[dict]:
    """Every runtime in turn, as often as `repeats` says, so that what else runs hits them alike.

    Args:
        clips: by rows, a folder of frames and the mask of the first.
    """
    rows = []
    for height, (clip, mask) in clips.items():
        for count in threads:
            found = {runtime: [] for runtime in RUNTIMES}
            for _ in range(repeats):
                for runtime, runs in found.items():
                    weights = export if runtime == "onnxruntime" else checkpoint
                    runs.append(measured(runtime, clip, mask, weights, count))
            for runtime, runs in found.items():
                times = [run["seconds"] for run in runs]
                rows.append({"rows": height, "threads": count, "runtime": runtime,
                             "seconds": statistics.median(times), "least": min(times),
                             "most": max(times), "precision": runs[0]["precision"],
                             "first": statistics.median(run["first"] for run in runs),
                             "peak_bytes": max((run["peak_bytes"] or 0) for run in runs) or None})
    return rows


def _peak() -> int | None:
    try:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB",
                                    Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        return None


def _steps(runtime: str, weights: Path, threads: int):
    """What follows a frame, (H, W, 3) uint8 RGB with its mask or None; and the precision."""
    from tracker import Tracker
    if runtime == "onnxruntime":
        import lite
        network = lite.load(weights, threads)
        tracker = Tracker(network)
        return (lambda image, mask: tracker.step(network.normalized(image), mask),
                "float32")
    import torch

    import preprocess
    from network import precision
    from videomatch import VideoMatch
    torch.set_num_threads(threads)
    model = VideoMatch.load(weights).eval()
    model.encoder.fold_batchnorm()
    model.precision = precision.of("fp32" if "fp32" in runtime else None, model.device,
                                   model.method)
    tracker = Tracker(model)
    return (lambda image, mask: tracker.step(preprocess.to_tensor(image), mask),
            str(model.precision).removeprefix("torch."))


def main(runtime: str, clip: str, mask: str, weights: str, threads: str, warm: str,
         start: str) -> None:
    from media.masks import read_mask
    from media.video import open_clip
    step, precision = _steps(runtime, Path(weights), int(threads))
    times, first = [], 0.0
    for number, image in enumerate(open_clip(clip).frames()):
        before = time.perf_counter()
        step(image, None if number else read_mask(mask))
        times.append(time.perf_counter() - before)
        if number == 1:
            first = time.time() - float(start)
    print(json.dumps({"seconds": statistics.median(times[int(warm) + 1:]), "first": first,
                      "peak_bytes": _peak(), "precision": precision}))


if __name__ == "__main__":
    main(*sys.argv[1:])
