"""J and F of masks on disk: this toolkit's scorer against the package vos-benchmark.

    python -m benchmarks.scorer RESULTS -d DAVIS [--json FILE]

Both read the same files with the same number of processes, and must agree.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import evaluate
from benchmarks import common
from benchmarks.common import seconds
from davis import Davis, Sequence
from media import images


def measure_scorers(results: Path, sequences: list[Sequence], repeats: int) -> dict:
    """Time `evaluate.score_folder` and vos-benchmark on the same files.

    Returns:
        For each, frames per second: median, least and most; and the largest difference between
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
        # this also reads all files, so that later runs find them in the page cache
        scores = {which: run() for which, run in runs.items()}
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
    row["largest_difference"] = max(_differences(scores["toolkit"], scores["vos-benchmark"]))
    return row


def _copy(sequence: Sequence, results: Path, truth: Path, masks: Path) -> Sequence:
    """Rewrite a sequence's ground truth and predicted masks as plain id PNGs.

    This toolkit reads other encodings too, vos-benchmark does not.

    Args:
        truth, masks: folders to write to.

    Returns:
        The sequence with its ground truth in `truth`.
    """
    for folder in (truth, masks):
        (folder / sequence.name).mkdir(parents=True)
    for i in sequence.labelled:
        images.write_mask(truth / sequence.name / sequence.mask_name(i), sequence.mask(i))
    coding = sequence.result_encoding(results)
    for i in sequence.scored:
        name = sequence.mask_name(i)
        images.write_mask(masks / sequence.name / name,
                          coding.read(results / sequence.name / name))
    return replace(sequence, single_object=False, masks=tuple(
        mask and truth / sequence.name / sequence.mask_name(i)
        for i, mask in enumerate(sequence.masks)))


def _differences(table: evaluate.Table, others: dict) -> Iterator[float]:
    """Absolute differences of mean J and F, of every object; vos-benchmark's are in percent."""
    for name, (j, f) in others.items():
        for i in j:
            row = table[name if len(j) == 1 else f"{name}_{i}"]
            yield from (abs(row["J-Mean"] - j[i] / 100), abs(row["F-Mean"] - f[i] / 100))


def measure(args: argparse.Namespace) -> dict:
    sequences = [sequence for sequence in Davis(args.dataset, args.year, args.set)
                 if (args.results / sequence.name).is_dir()]
    if not sequences:
        raise FileNotFoundError(f"{args.results}: no masks of {args.set} sequences, expected "
                                "SEQUENCE/FRAME.png")
    row = measure_scorers(args.results, sequences, args.repeats)
    print(f"{len(sequences)} sequences, {row['frames']} frames, {row['processes']} processes, "
          f"median of {args.repeats} [range]")
    for which in ("toolkit", "vos-benchmark"):
        print("{:13} {frames_per_second:7.1f} [{least:.1f}, {most:.1f}] frames per second".format(
            which, **row[which]))
    print(f"{row['times_faster']:.2f} times faster, largest difference of a J or F "
          f"{row['largest_difference']:.1e}")
    return row


def main() -> int:
    parser = common.parser("Benchmark of J and F against vos-benchmark.")
    parser.add_argument("results", type=Path, metavar="RESULTS",
                        help="folder of masks, SEQUENCE/FRAME.png")
    common.add_dataset(parser)
    return common.run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
