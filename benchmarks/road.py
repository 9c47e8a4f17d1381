"""How long a frame takes on its whole road, from its file to its mask, part by part.

It knows what the parts of the network are called, and nothing of what else is measured.
"""

import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

import preprocess
from data import demo
from media import images
from tracker import Tracker
from videomatch import VideoMatch

WARM = 20  # frames of a clip before those that are measured, until its memory is full


def seconds(run: Callable, device: torch.device) -> float:
    """Of one call; on a GPU between two events."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


class Parts:
    """Seconds of the calls of some functions, which are wrapped for as long as this lives."""

    def __init__(self, device: torch.device):
        self.device, self.taken = device, {}

    def of(self, part: str, owner, name: str) -> None:
        """Count the seconds of `owner.name` for a part of the road."""
        run = getattr(owner, name)

        def timed(*arguments, **keywords):
            result = []
            taken = seconds(lambda: result.append(run(*arguments, **keywords)), self.device)
            self.taken[part] = self.taken.get(part, 0.0) + taken
            return result[0]

        setattr(owner, name, timed)


def road(model: VideoMatch, rows: int, objects: int, frames: int,
         peak_memory: Callable) -> dict:
    """Seconds a frame by part: the median over the frames, and the memory at its peak.

    The clip is one of the demo data, enlarged; its object is cut into upright strips.

    Args:
        peak_memory: of a function and a device, bytes that it takes.
    """
    model, device = copy.deepcopy(model), model.device
    shape = rows, round(rows * demo.SHAPE[1] / demo.SHAPE[0])
    drawn = list(itertools.islice(demo.draw(demo.SCENES["val"]["stroll"]), frames + WARM + 1))
    mask = _strips(images.resize_mask(drawn[0][1], shape), objects)
    parts, lines = Parts(device), []
    for part, owner, name in (("encoder", model, "encode"), ("matching", model.reader, "read"),
                              ("decoder", model.decoder, "forward"),
                              ("keeping", model.reader, "remember")):
        parts.of(part, owner, name)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i:05d}.jpg") for i in range(len(drawn))]
        for path, (image, _) in zip(paths, drawn):
            images.write_image(path, cv2.resize(image, shape[::-1]))

        def clip():
            tracker = Tracker(model)
            for i, path in enumerate(paths):
                parts.taken, start = {}, time.perf_counter()
                image = preprocess.to_tensor(images.read_image(path), device=device)
                read = time.perf_counter() - start
                tracker.step(image, mask if i == 0 else None)
                whole = time.perf_counter() - start
                rest = whole - read - sum(parts.taken.values())
                lines.append({"reading": read, **parts.taken, "deciding": rest, "frame": whole})

        peak = peak_memory(clip, device)
    found = {part: statistics.median(line[part] for line in lines[WARM + 1:])
             for part in lines[-1]}
    return {"rows": rows, "objects": objects, **found, "peak_bytes": peak,
            "times_the_encoder": found["frame"] / found["encoder"]}


def _strips(mask: np.ndarray, count: int) -> np.ndarray:
    """(H, W) with one object -> the same pixels, as many objects side by side."""
    columns = np.flatnonzero(mask.any(0))
    bounds = np.linspace(columns[0], columns[-1] + 1, count + 1)[1:-1]
    strips = 1 + np.digitize(np.arange(mask.shape[1]), bounds)
    return np.where(mask > 0, strips, 0).astype(np.uint8)
