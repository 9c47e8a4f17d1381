"""Track one clip with one runtime and print the figures as JSON; see `benchmarks.runtimes`.

    python -m benchmarks.one_runtime RUNTIME CLIP MASK WEIGHTS THREADS WARM_UP START

Imports are inside functions so that the onnxruntime process never loads PyTorch.
"""

import json
import re
import statistics
import sys
import time
from pathlib import Path


def _peak_memory() -> int | None:
    """Peak memory of this process in bytes; None where the system does not report it."""
    try:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB",
                                    Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        return None


def _steps(runtime: str, weights: Path, threads: int):
    """A function that tracks the next frame, and the precision it computes in.

    The function takes an (H, W, 3) uint8 RGB image and its reference mask, or None.
    """
    from tracking.tracker import Tracker
    if runtime == "onnxruntime":
        import lite
        network = lite.load(weights, threads)
        tracker = Tracker(network)
        return (lambda image, mask: tracker.step(network.normalized(image), mask),
                "float32")
    import torch

    import preprocess
    from videomatch import VideoMatch
    torch.set_num_threads(threads)
    model = VideoMatch.load(weights).for_inference("fp32" if "fp32" in runtime else None)
    tracker = Tracker(model)
    return (lambda image, mask: tracker.step(preprocess.to_tensor(image), mask),
            str(model.precision).removeprefix("torch."))


def main(runtime: str, clip: str, mask: str, weights: str, threads: str, warm_up: str,
         start: str) -> None:
    """Track the clip; arguments are those of the command line, `start` in seconds since 1970."""
    from masks.read import read_mask
    from media.video import open_clip
    step, precision = _steps(runtime, Path(weights), int(threads))
    times, first = [], 0.0
    for number, image in enumerate(open_clip(clip).frames()):
        before = time.perf_counter()
        step(image, None if number else read_mask(mask))
        times.append(time.perf_counter() - before)
        if number == 1:
            first = time.time() - float(start)
    print(json.dumps({"seconds": statistics.median(times[int(warm_up) + 1:]), "first": first,
                      "peak_bytes": _peak_memory(), "precision": precision}))


if __name__ == "__main__":
    main(*sys.argv[1:])
