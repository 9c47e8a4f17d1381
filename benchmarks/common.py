"""Shared by the benchmarks: timing, peak memory, command lines."""

import argparse
import ctypes
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from davis import SETS, YEARS

# Frames of a clip before the measured ones: by then the memory of past frames is full, so every
# later frame costs the same.
WARM_UP = 20


def seconds(run: Callable, device: torch.device) -> float:
    """Seconds that one call takes; on a GPU measured between two CUDA events."""
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


def peak_memory(run: Callable, device: torch.device) -> float | None:
    """Bytes that one call allocates at its peak; None where the system does not report it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Linux: return freed memory first, or the call could reuse it unseen
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    """A value of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


def parser(description: str, repeats: int = 3) -> argparse.ArgumentParser:
    """The flags of every benchmark; `repeats` is the default of --repeats."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--repeats", type=int, default=repeats,
                        help=f"number of measurements (default: {repeats})")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    return result


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cuda_device", "-c", metavar="DEVICE",
                        help="index of a CUDA device, or cpu, or mps")


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", "-d", metavar="PATH", type=Path, default=Path("./DAVIS"),
                        help="the DAVIS folder (default: ./DAVIS)")
    parser.add_argument("--year", "-y", choices=YEARS, default="2016", help="default: 2016")
    parser.add_argument("--set", "-t", choices=SETS, default="val", help="default: val")


@torch.no_grad()
def run(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict]) -> int:
    """Parse the command line, measure, and write the results to --json.

    A user error is printed as one line, with exit status 2.
    """
    args = parser.parse_args()
    try:
        results = measure(args)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


def add_rows(parser: argparse.ArgumentParser, rows: tuple[int, ...]) -> None:
    """The flag for frame heights; `rows` are the default ones."""
    parser.add_argument("--rows", type=int, nargs="+", metavar="H", default=rows,
                        help=f"frame heights (default: {' '.join(map(str, rows))})")


def add_clip(parser: argparse.ArgumentParser, rows: tuple[int, ...]) -> None:
    """The flags of benchmarks on clips; `rows` are the default frame heights."""
    add_rows(parser, rows)
    parser.add_argument("--frames", type=int, default=12, metavar="N",
                        help="number of frames measured for each clip (default: 12)")


def strips(mask: np.ndarray, count: int) -> np.ndarray:
    """Divide the object of an (H, W) mask into `count` vertical strips, each an object."""
    columns = np.flatnonzero(mask.any(0))
    bounds = np.linspace(columns[0], columns[-1] + 1, count + 1)[1:-1]
    ids = 1 + np.digitize(np.arange(mask.shape[1]), bounds)
    return np.where(mask > 0, ids, 0).astype(np.uint8)
