"""Benchmarks, each on equal inputs: by default of the matching against a dense matrix.

    python bench.py [--json FILE]
    python bench.py --video [--json FILE]
    python bench.py --runtimes [--json FILE]
    python bench.py --scorer RESULTS -d DAVIS [--json FILE]
    python bench.py --prompts -d DAVIS [-o CHECKPOINT] [--json FILE]

For each encoder and upsample factor it prints seconds a frame (median, and the range of the
repeats), the memory that matching takes at its peak beyond model and features, how many times
faster it is than the dense matrix, and how many times slower than the floor: the product of the
two small feature grids at the measured rate of matrix products, or its data at the measured rate
of copies, whichever takes longer.

With --video it measures the whole road of a frame instead, from its file to its mask, with the
shipped weights: seconds by part, of one object and of five, in frames of 360, 480 and 720 rows.

With --runtimes it measures PyTorch against onnxruntime on an export (`benchmarks.runtimes`).

With --scorer it measures J and F, of the masks in RESULTS, against the package
vos-benchmark with as many processes.

With --prompts it measures masks from boxes and clicks (`benchmarks.prompts`).
"""

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import evaluate
import export
import preprocess
from benchmarks import prompts, runtimes
from benchmarks.road import road, seconds
from build import device_of
from data import demo
from davis import SETS, YEARS, Davis, Sequence
from media import images
from media.masks import read_mask
from network import precision
from network.encoder import BACKBONES, Encoder
from network.matching import Grid, Reference, soft_match
from network.views import labels_of
from videomatch import SHIPPED, VideoMatch

FACTORS = (1.0, 1.8, 4.0)
DENSE_LIMIT = 6e9  # bytes; a larger dense matrix (there are two of them) is left out


def dense_match(query: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor, k: int,
                shape: tuple[int, int]) -> torch.Tensor:
    """Soft matching as the paper reads: every similarity, masked for each set, then the top K."""
    large = [F.interpolate(x[None], size=shape, mode="bilinear", align_corners=False)[0]
             for x in (query, reference)]
    query, reference = (F.normalize(x.flatten(1).T, dim=1) for x in large)
    similarity = query @ reference.T
    scores = []
    for i in (0, 1):
        members = labels.flatten() == i
        masked = similarity.masked_fill(~members, -1)
        scores.append(masked.topk(min(k, int(members.sum())), dim=1).values.mean(dim=1))
    return torch.stack(scores).view(2, *shape)


def peak_memory(run: Callable, device: torch.device) -> float | None:
    """Bytes that one call takes at its peak; None where the system can't tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # Linux: what was freed before isn't free now
        Path("/proc/self/clear_refs").write_text("5")  # nor does the peak so far count
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


def rates(device: torch.device) -> tuple[float, float]:
    """Measured multiply-adds (as two operations) and copied bytes per second."""
    a, b = (torch.randn(4096, 4096, device=device) for _ in range(2))
    product = min(seconds(lambda: a @ b, device) for _ in range(4))
    copy = min(seconds(lambda: a.copy_(b), device) for _ in range(4))
    return 2 * 4096**3 / product, 2 * a.nbytes / copy


def inputs(name: str, shape: tuple[int, int], device: torch.device):
    """Features of two frames of the demo data, the mask of the first, seconds of the encoder."""
    torch.manual_seed(0)
    encoder = Encoder(name).eval().to(device)
    frames = list(demo.draw(demo.SCENES["val"]["stroll"], frames=3))
    tensors = [preprocess.to_tensor(image, shape).to(device)[None] for image, _ in frames[:2]]
    mask = frames[0][1]
    with torch.no_grad():
        features = [encoder(tensor)[0] for tensor in tensors]
        encoding = statistics.median(seconds(lambda: encoder(tensors[0]), device)
                                     for _ in range(3))
    return features, mask, encoding


def measure(name: str, factor: float, frames, repeats: int, device, floor_rates) -> dict:
    """One row of the table; `frames` come from `inputs`."""
    (reference, query), mask, encoding = frames
    k = BACKBONES[name].top_k
    grid = Grid(reference, factor)
    labels = torch.from_numpy(labels_of(mask, grid.shape, [1]))[None].to(reference.device)
    gathered = Reference([grid], labels, sets=2)
    runs = {"toolkit": lambda: soft_match(Grid(query, factor), gathered, k)}
    if 2 * 4 * (grid.shape[0] * grid.shape[1]) ** 2 <= DENSE_LIMIT:
        runs["dense"] = lambda: dense_match(query, reference, labels, k, grid.shape)
    row = {"encoder": name, "upsample_factor": factor, "channels": len(query), "k": k,
           "cells": list(query.shape[1:]), "grid": list(grid.shape), "encoder_seconds": encoding}
    memory = {which: peak_memory(run, device) for which, run in runs.items()}
    times = {which: [] for which in runs}
    for _ in range(repeats):
        for which, run in runs.items():
            times[which].append(seconds(run, device))
    for which in runs:
        row[which] = {"seconds": statistics.median(times[which]), "least": min(times[which]),
                      "most": max(times[which]), "peak_bytes": memory[which]}
    operations, copied = floor_rates
    cells = query[0].numel()
    moved = 4 * (2 * query.numel() + 2 * grid.shape[0] * grid.shape[1])
    floor = max(2 * cells * cells * len(query) / operations, moved / copied)
    row["times_the_floor"] = row["toolkit"]["seconds"] / floor
    if "dense" in runs:
        row["times_faster"] = row["dense"]["seconds"] / row["toolkit"]["seconds"]
        row["largest_difference"] = (runs["dense"]() - runs["toolkit"]()).abs().max().item()
    return row


def line(row: dict) -> str:
    def cell(which: str) -> str:
        if which not in row:
            return f"{'too large':>32}"
        run = row[which]
        memory = "?" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:.0f}"
        return f"{run['seconds']:9.3f} [{run['least']:.3f}, {run['most']:.3f}] {memory:>6}"

    faster = f"{row['times_faster']:6.1f}" if "dense" in row else f"{'-':>6}"
    return (f"{row['encoder']:9} {row['upsample_factor']:4g} {row['encoder_seconds']:8.3f} "
            f"{cell('dense'):>32} {cell('toolkit'):>32} {faster} {row['times_the_floor']:6.1f}")


def scorers(results: Path, sequences: list[Sequence], repeats: int) -> dict:
    """Frames a second of `evaluate.score_folder` and of vos-benchmark, which read equal files.

    Returns:
        For each its median with the least and the most, and the largest difference between
        their J and F of an object, in [0, 1].
    """
    from vos_benchmark.benchmark import benchmark
    workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        truth, masks = Path(folder, "truth"), Path(folder, "masks")
        copies = [_copy(sequence, results, truth, masks) for sequence in sequences]
        runs = {"toolkit": lambda: evaluate.table(evaluate.score_folder(masks, copies, workers)),
                "vos-benchmark": lambda: benchmark([truth], [masks], num_processes=workers,
                                                   verbose=False)[3][0]}
        found = {which: run() for which, run in runs.items()}  # and the files are in memory now
        times = {which: [] for which in runs}
        for _ in range(repeats):
            for which, run in runs.items():
                times[which].append(seconds(run, torch.device("cpu")))
    frames = sum(len(sequence) - 2 for sequence in sequences)
    row: dict[str, Any] = {"frames": frames, "processes": workers}
    for which in runs:
        rate = [frames / taken for taken in times[which]]
        row[which] = {"frames_per_second": statistics.median(rate), "least": min(rate),
                      "most": max(rate)}
    row["times_faster"] = (row["toolkit"]["frames_per_second"]
                           / row["vos-benchmark"]["frames_per_second"])
    row["largest_difference"] = max(_differences(found["toolkit"], found["vos-benchmark"]))
    return row


def _copy(sequence: Sequence, results: Path, truth: Path, masks: Path) -> Sequence:
    """The sequence with its truth, and what was found, written as ids, which both sides read."""
    for folder in (truth, masks):
        (folder / sequence.name).mkdir(parents=True)
    for i in sequence.labelled:
        images.write_mask(truth / sequence.name / sequence.mask_name(i), sequence.mask(i))
    for i in sequence.scored:
        name = sequence.mask_name(i)
        found = read_mask(results / sequence.name / name, sequence.single_object)
        images.write_mask(masks / sequence.name / name, found)
    return replace(sequence, single_object=False, masks=tuple(
        mask and truth / sequence.name / sequence.mask_name(i)
        for i, mask in enumerate(sequence.masks)))


def _differences(table: evaluate.Table, others: dict) -> Iterator[float]:
    for name, (j, f) in others.items():
        for i in j:
            row = table[name if len(j) == 1 else f"{name}_{i}"]
            yield from (abs(row["J-Mean"] - j[i] / 100), abs(row["F-Mean"] - f[i] / 100))


def bench_scorers(args: argparse.Namespace) -> dict:
    sequences = [sequence for sequence in Davis(args.dataset, args.year, "val")
                 if (args.scorer / sequence.name).is_dir()]
    if not sequences:
        raise FileNotFoundError(f"{args.scorer}: no masks of val sequences, expected "
                                "SEQUENCE/FRAME.png")
    row = scorers(args.scorer, sequences, args.repeats)
    print(f"{len(sequences)} sequences, {row['frames']} frames, {row['processes']} processes, "
          f"median of {args.repeats} [range]")
    for which in ("toolkit", "vos-benchmark"):
        print("{:13} {frames_per_second:7.1f} [{least:.1f}, {most:.1f}] frames a second".format(
            which, **row[which]))
    print(f"{row['times_faster']:.2f} times faster, largest difference of a J or F "
          f"{row['largest_difference']:.1e}")
    return row


def bench_video(args: argparse.Namespace) -> dict:
    device = device_of(args.cuda_device)
    model = VideoMatch.load(SHIPPED["mobilenet"]).eval().to(device)
    model.encoder.fold_batchnorm()
    model.precision = precision.of(None, device, model.method)
    names = ("reading", "encoder", "matching", "decoder", "keeping", "deciding", "frame")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
          f"{model.precision}; seconds a frame, median of {args.frames}")
    print(f"{'rows':>5} {'objects':>8} " + " ".join(f"{name:>9}" for name in names)
          + f" {'peak MB':>8} {'encoders':>8}")
    found = []
    for rows in args.rows:
        for objects in (1, 5):
            row = road(model, rows, objects, args.frames, peak_memory)
            peak = row["peak_bytes"]
            print(f"{rows:5} {objects:8} " + " ".join(f"{row[name]:9.4f}" for name in names)
                  + f" {'?' if peak is None else round(peak / 2**20):>8}"
                  + f" {row['times_the_encoder']:8.2f}", flush=True)
            found.append(row)
    return {"torch": torch.__version__, "device": str(device), "precision": str(model.precision),
            "threads": torch.get_num_threads(), "rows": found}


def bench_runtimes(args: argparse.Namespace) -> dict:
    model = VideoMatch.load(SHIPPED["mobilenet"]).eval()
    model.encoder.fold_batchnorm()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export.export(model, folder / "export")
        clips = runtimes.drawn(folder, args.rows, args.frames + runtimes.WARM + 1)
        found = runtimes.in_turn(clips, SHIPPED["mobilenet"], folder / "export", args.threads,
                                 args.repeats)
    runtimes.table(found)
    return {"torch": torch.__version__, "machine": platform.machine(), "rows": found}


def bench_prompts(args: argparse.Namespace) -> dict:
    model = VideoMatch.load(args.model_load).eval().to(device_of(args.cuda_device))
    return prompts.measured(model, Davis(args.dataset, args.year, args.set).sequences,
                            args.repeats)


def bench_matching(args: argparse.Namespace) -> dict:
    device = device_of(args.cuda_device)
    floor_rates = rates(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {device} ({where}), {torch.get_num_threads()} threads, "
          f"{floor_rates[0] / 1e9:.0f} GFLOP/s, copies at {floor_rates[1] / 1e9:.1f} GB/s")
    print(f"{'encoder':9} {'-uf':>4} {'features':>8} {'dense: s a frame, peak MB':>32} "
          f"{'toolkit: s a frame, peak MB':>32} {'faster':>6} {'floor':>6}")
    rows = []
    for name in args.encoder:
        frames = inputs(name, tuple(args.shape), device)
        for factor in args.upsample_factor:
            rows.append(measure(name, factor, frames, args.repeats, device, floor_rates))
            print(line(rows[-1]), flush=True)
    return {"torch": torch.__version__, "device": str(device),
            "threads": torch.get_num_threads(), "rows": rows}


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmark of the matching, or of J and F.")
    add = parser.add_argument
    add("--encoder", "-en", choices=BACKBONES, nargs="+", default=list(BACKBONES),
        help="default: all; their weights are random, which no time here depends on")
    add("--upsample_factor", "-uf", type=float, nargs="+", default=FACTORS,
        help="default: 1 1.8 4")
    add("--shape", "-p", type=int, nargs=2, metavar=("H", "W"), default=(480, 854),
        help="size of the frames (default: 480 854)")
    add("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    add("--cuda_device", "-c", metavar="DEVICE", help="id of a CUDA device, or cpu, or mps")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--video", action="store_true", help="measure the whole road of a frame instead")
    add("--runtimes", action="store_true",
        help="measure PyTorch against onnxruntime, a whole clip each, instead")
    add("--threads", type=int, nargs="+", default=(1, 2), metavar="N",
        help="of either of them (default: 1 2)")
    add("--rows", type=int, nargs="+", metavar="H",
        help="of its frames (default: 360 480, for --video 720 too)")
    add("--frames", type=int, default=12, metavar="N",
        help="of a clip that are measured (default: 12)")
    add("--scorer", type=Path, metavar="RESULTS",
        help="measure the scoring of these masks (SEQUENCE/FRAME.png) instead of the matching")
    add("--prompts", action="store_true",
        help="measure masks from boxes and clicks on first frames instead")
    add("--dataset", "-d", metavar="PATH", type=Path, default=Path("./DAVIS"),
        help="the DAVIS folder, for --scorer and --prompts (default: ./DAVIS)")
    add("--year", "-y", choices=YEARS, default="2016", help="default: 2016")
    add("--set", "-t", choices=SETS, default="val", help="for --prompts (default: val)")
    add("--model_load", "-o", type=Path, default=SHIPPED["mobilenet"], metavar="PATH",
        help="checkpoint, for --prompts (default: the one in models/)")
    args = parser.parse_args()
    try:
        args.rows = args.rows or ((360, 480, 720) if args.video else (360, 480))
        figures = (bench_scorers(args) if args.scorer else
                   bench_prompts(args) if args.prompts else
                   bench_runtimes(args) if args.runtimes else
                   bench_video(args) if args.video else bench_matching(args))
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
