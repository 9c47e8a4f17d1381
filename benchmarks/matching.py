"""Soft matching against a dense similarity matrix, and against the hardware's limit.

    python -m benchmarks.matching [--json FILE]

For each encoder and upsample factor it prints seconds per frame (median and range), the peak
memory that matching allocates beyond model and features, the speed-up over the dense matrix, and
the slowdown against a lower bound: the product of the two feature maps before upsampling at the
measured rate of matrix products, or their traffic at the measured rate of copies, whichever is
slower. The weights are random; no time depends on them.
"""

import argparse
import platform
import statistics
import sys

import torch
import torch.nn.functional as F

import preprocess
from benchmarks import common
from benchmarks.common import peak_memory, seconds
from cli.setup import select_device
from datasets import demo
from network.encoder import BACKBONES, Encoder
from network.matching import Grid, Reference, soft_match
from network.views import labels_of

FACTORS = (1.0, 1.8, 4.0)
# Bytes. A larger dense matrix (there are two) is skipped: it would make a laptop swap.
DENSE_LIMIT = 6e9


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


def rates(device: torch.device) -> tuple[float, float]:
    """Measured multiply-adds (as two operations) and copied bytes per second."""
    a, b = (torch.randn(4096, 4096, device=device) for _ in range(2))
    product = min(seconds(lambda: a @ b, device) for _ in range(4))
    copy = min(seconds(lambda: a.copy_(b), device) for _ in range(4))
    return 2 * 4096**3 / product, 2 * a.nbytes / copy


def inputs(name: str, shape: tuple[int, int], device: torch.device):
    """Features of two frames of the demo data, the mask of the first, and the encoder's seconds.

    Args:
        name: the encoder's.
        shape: (H, W) of the frames.
    """
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
    locations = query[0].numel()
    moved = 4 * (2 * query.numel() + 2 * grid.shape[0] * grid.shape[1])
    floor = max(2 * locations * locations * len(query) / operations, moved / copied)
    row["times_the_floor"] = row["toolkit"]["seconds"] / floor
    if "dense" in runs:
        row["times_faster"] = row["dense"]["seconds"] / row["toolkit"]["seconds"]
        row["largest_difference"] = (runs["dense"]() - runs["toolkit"]()).abs().max().item()
    return row


def format_row(row: dict) -> str:
    """A line of the printed table."""
    def column(which: str) -> str:
        if which not in row:
            return f"{'too large':>32}"
        run = row[which]
        memory = "?" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:.0f}"
        return f"{run['seconds']:9.3f} [{run['least']:.3f}, {run['most']:.3f}] {memory:>6}"

    faster = f"{row['times_faster']:6.1f}" if "dense" in row else f"{'-':>6}"
    return (f"{row['encoder']:9} {row['upsample_factor']:4g} {row['encoder_seconds']:8.3f} "
            f"{column('dense'):>32} {column('toolkit'):>32} {faster} {row['times_the_floor']:6.1f}")


def measure_all(args: argparse.Namespace) -> dict:
    device = select_device(args.cuda_device)
    floor_rates = rates(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {device} ({where}), {torch.get_num_threads()} threads, "
          f"{floor_rates[0] / 1e9:.0f} GFLOP/s, copies at {floor_rates[1] / 1e9:.1f} GB/s")
    print(f"{'encoder':9} {'-uf':>4} {'features':>8} {'dense: s/frame, peak MB':>32} "
          f"{'toolkit: s/frame, peak MB':>32} {'faster':>6} {'floor':>6}")
    rows = []
    for name in args.encoder:
        frames = inputs(name, tuple(args.shape), device)
        for factor in args.upsample_factor:
            rows.append(measure(name, factor, frames, args.repeats, device, floor_rates))
            print(format_row(rows[-1]), flush=True)
    return {"torch": torch.__version__, "device": str(device),
            "threads": torch.get_num_threads(), "rows": rows}


def main() -> int:
    parser = common.parser("Benchmark of soft matching.")
    common.add_device(parser)
    add = parser.add_argument
    add("--encoder", "-en", choices=BACKBONES, nargs="+", default=list(BACKBONES),
        help="default: all")
    add("--upsample_factor", "-uf", type=float, nargs="+", default=FACTORS,
        help="default: 1 1.8 4")
    add("--shape", "-p", type=int, nargs=2, metavar=("H", "W"), default=(480, 854),
        help="frame size (default: 480 854)")
    return common.run(parser, measure_all)


if __name__ == "__main__":
    sys.exit(main())
