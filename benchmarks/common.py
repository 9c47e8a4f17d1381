"""Shared by the benchmarks: timing, peak memory, command lines."""

import argparse
import ctypes
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

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


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--repeats", type=int, default=3,
                        help="number of measurements (default: 3)")
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


def add_clip(parser: argparse.ArgumentParser, rows: tuple[int, ...]) -> None:
    """The flags of benchmarks on clips; `rows` are the default frame heights."""
    parser.add_argument("--rows", type=int, nargs="+", metavar="H", default=rows,
                        help=f"frame heights (default: {' '.join(map(str, rows))})")
    parser.add_argument("--frames", type=int, default=12, metavar="N",
                        help="number of frames measured for each clip (default: 12)")
