"""Evaluation: segment whole sequences, save what was found, print the official DAVIS table.

Run by itself it scores a folder of masks, whatever made them, or compares two:
    python evaluate.py RESULTS [RESULTS] -d DAVIS -t val
"""

import argparse
import csv
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import distributed
import metrics
import preprocess
import report
from davis import SETS, YEARS, Davis, Sequence
from manifest import Manifest
from media import drawing, images, writer
from media.background import Background, ahead
from media.files import whole
from media.masks import Coding
from videomatch import VideoMatch

log = logging.getLogger(__name__)

Scores = dict[str, metrics.SequenceScore]  # by the sequence's name
Table = dict[str, dict[str, float]]  # one row of measures for each sequence or object

READERS = 2  # threads that read and score


@dataclass
class Options:
    """What `evaluate` needs to know beside model and data; the flags of `main.py`."""

    results: Path | None = None  # folder for masks, videos and tables; None keeps nothing
    set_name: str = "val"  # which the tables are named after
    videos: bool = False
    input_shape: tuple[int, int] | None = None  # (H, W) for the network; None: the frame's
    segmentation_shape: tuple[int, int] | None = None  # (H, W) where pixels are decided
    threshold: float = 0.5
    remove_outliers: bool = True
    facts: dict[str, str] = field(default_factory=dict)  # what makes the results: flags, weights
    overwrite: bool = False  # segment again what `results` holds already
    # fits a copy of the model to a sequence, given the reference frame and its mask
    adapt: Callable[[VideoMatch, np.ndarray, np.ndarray], VideoMatch] | None = None


@torch.no_grad()
def evaluate(model: VideoMatch, sequences: list[Sequence], options: Options) -> Table:
    """Segment every sequence from its first mask; write and print the table.

    Sequences that an earlier call with the same facts finished in `options.results` are not
    segmented again.

    Returns:
        A row of `metrics.MEASURES` for each sequence (for each object where there are many).

    Raises:
        ValueError: what is in `options.results` was made with other facts.
    """
    model.eval()
    with distributed.first_alone():  # which may overwrite
        manifest = Manifest(options.results, options.facts,
                            options.overwrite and distributed.rank() == 0)
    todo = [s for s in sequences if not manifest.finished(s, options.videos)]
    todo = distributed.gather(todo)[0]  # before any process finishes one
    if len(todo) < len(sequences):
        log.info("%d sequences were finished before", len(sequences) - len(todo))
    scores: Scores = {s.name: manifest.score(s) for s in sequences if s not in todo and s.scored}
    todo = distributed.share(sorted(todo, key=len, reverse=True) if distributed.count() > 1
                             else todo)
    with tqdm(total=sum(len(s) - 1 for s in todo), unit="frame",
              disable=True if distributed.rank() else None) as bar:
        for sequence in todo:
            bar.set_description(sequence.name)
            start = time.monotonic()
            score = segment_sequence(model, sequence, options, bar.update)
            manifest.finish(sequence, score, time.monotonic() - start)
            if sequence.scored:
                scores[sequence.name] = score
                bar.set_postfix_str(f"J&F so far {_mean(table(scores))['J&F-Mean']:.3f}")
    manifest.share()
    scores = {sequence.name: manifest.score(sequence) for sequence in sequences if sequence.scored}
    found = table(scores)
    if distributed.rank():
        return found
    seconds, frames = manifest.seconds(sequences), sum(len(s) - 1 for s in sequences)
    speed = f"{frames} frames in {seconds:.1f} s: {frames / seconds:.2f} frames per second"
    if distributed.count() > 1:
        speed += f" in each of {distributed.count()} processes"
    unscored = [sequence.name for sequence in sequences if not sequence.scored]
    if unscored:
        log.info("segmented and not scored, since there is no truth beyond given masks: %s",
                 ", ".join(unscored))
    if not found:
        print(f"{speed} (reading, segmenting, writing)")
        return found
    show(found, options.results, options.set_name)
    print(f"{speed} (reading, segmenting, writing, scoring)")
    if options.results:
        run = report.Run(options.results.name, options.results, scores)
        path = report.write(options.results / "report.html", sequences, [run],
                            options.facts | {"speed": speed})
        print(f"masks and tables: {options.results}, to look at: {path}")
    return found


def segment_sequence(model: VideoMatch, sequence: Sequence, options: Options,
                     progress: Callable[[], None] = lambda: None) -> metrics.SequenceScore:
    """Segment a sequence; threads read the next frames, write and score those before.

    They call nothing of torch: its parallel loops in several threads at once would hold each
    other up on a CPU, and the network with them.

    Args:
        progress: called after each frame.
    """
    first, scored = sequence.labelled[0], set(sequence.scored)
    reference = sequence.mask(first)
    scores = []
    with Writer(sequence, options) as writer, ThreadPoolExecutor(READERS) as pool:
        for frame, image in enumerate(ahead(pool, sequence.image, range(len(sequence)))):
            tensor = preprocess.to_tensor(image, options.input_shape, model.device)
            if frame < first:
                mask = np.zeros_like(reference)
            elif frame == first:
                if options.adapt:
                    model = options.adapt(model, image, reference)
                model.set_reference(tensor, reference)
                mask = reference
            else:
                mask = segment(model, tensor, image.shape[:2], options)
                progress()
            writer.write(frame, image, mask)
            if frame in scored:
                scores.append(pool.submit(_score_mask, mask, sequence, frame, model.object_ids))
    score = metrics.SequenceScore(model.object_ids)
    for future in scores:
        score.add(future.result())
    return score


def _score_mask(mask: np.ndarray, sequence: Sequence, frame: int,
                object_ids: list[int]) -> list[tuple[float, float]]:
    return metrics.score_frame(mask, sequence.mask(frame), object_ids)


def segment(model: VideoMatch, tensor: torch.Tensor, shape: tuple[int, int],
            options: Options) -> np.ndarray:
    """(3, H, W) frame for the network -> (H, W) uint8 mask of `shape`, the frame's own."""
    mask = model.segment(tensor, options.segmentation_shape or shape, options.threshold,
                         options.remove_outliers)
    return images.resize_mask(mask, shape)


class Writer:
    """Masks named as the frames are, and an overlay video, of one sequence, in the background."""

    def __init__(self, sequence: Sequence, options: Options):
        self.sequence, self.results = sequence, options.results
        self.video, self.write = None, Background(self._write)
        if self.results:
            self.folder = self.results / sequence.name
            self.folder.mkdir(parents=True, exist_ok=True)
            if options.videos:
                self.video = writer.VideoWriter(self.results / f"{sequence.name}.mp4")

    def _write(self, frame: int, image: np.ndarray, mask: np.ndarray) -> None:
        if self.results and frame in self.sequence.wanted:
            images.write_mask(self.folder / self.sequence.mask_name(frame), mask)
        if self.video:
            self.video.write(drawing.overlay(image, mask))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        try:
            self.write.__exit__(*exception)
        finally:
            if self.video:
                self.video.__exit__(*exception)


def score_folder(results: Path, sequences: list[Sequence], workers: int | None = None) -> Scores:
    """Score masks in `results`/SEQUENCE/FRAME.png, whatever made them.

    Args:
        workers: processes that read and score frames, which changes no figure; None: one for
            each core. Threads where the system can't fork.

    Raises:
        FileNotFoundError: a mask is missing.
        ValueError: a mask is of another size than the frame.
    """
    found: Scores = {}
    sequences = [sequence for sequence in sequences if sequence.scored]
    ids = [[int(i) for i in np.unique(sequence.mask(sequence.labelled[0])) if i] for sequence in sequences]
    frames = [(coding, results / sequence.name / sequence.mask_name(frame), sequence, frame,
               object_ids)
              for sequence, object_ids in zip(sequences, ids)
              for coding in [_coding(results, sequence)] for frame in sequence.scored]
    with _workers(workers or _cores()) as pool:
        scores = pool.map(_score_file, frames, chunksize=8)
        for sequence, object_ids in zip(tqdm(sequences, desc="sequences", disable=None), ids):
            score = metrics.SequenceScore(object_ids)
            for _ in sequence.scored:
                score.add(next(scores))
            found[sequence.name] = score
    return found


def _coding(results: Path, sequence: Sequence) -> Coding:
    """What the values of the masks found mean, once for all of them."""
    paths = [results / sequence.name / sequence.mask_name(frame) for frame in sequence.scored]
    return Coding.of(paths, sequence.single_object)


def _score_file(job: tuple[Coding, Path, Sequence, int, list[int]]) -> list[tuple[float, float]]:
    coding, path, sequence, frame, object_ids = job
    prediction, truth = coding.read(path), sequence.mask(frame)
    images.check_same_shape(sequence.masks[frame], truth.shape, path, prediction.shape)
    return metrics.score_frame(prediction, truth, object_ids)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _workers(count: int) -> Executor:
    """Forked processes: they import nothing, and what they run takes no lock of torch or OpenCV."""
    if sys.platform != "linux":
        return ThreadPoolExecutor(count)
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork"),
                               signal.signal, (signal.SIGINT, signal.SIG_IGN))


def table(scores: Scores) -> Table:
    """A row for each sequence, under its name, or NAME_ID for each of several objects."""
    rows = {}
    for name, score in scores.items():
        measures = score.conclude()
        rows |= {name if len(measures) == 1 else f"{name}_{i}": row for i, row in measures.items()}
    return rows


def _mean(table: Table) -> dict[str, float]:
    return metrics.average(list(table.values()))


def show(table: Table, results: Path | None, set_name: str) -> None:
    """Print the table; write it as CSV, with the names of the official evaluation code."""
    mean = _mean(table)
    width = max(len(name) for name in ("sequence", *table))
    print(f"{'sequence':{width}}  " + "  ".join(f"{m:>8}" for m in metrics.MEASURES))
    for name, row in (*table.items(), ("all", mean)):
        print(f"{name:{width}}  " + "  ".join(f"{row[m]:8.3f}" for m in metrics.MEASURES))
    if results:
        _write_csv(results / f"global_results-{set_name}.csv", {"": mean}, key=None)
        _write_csv(results / f"per-sequence_results-{set_name}.csv", table, key="Sequence")


def _write_csv(path: Path, table: Table, key: str | None) -> None:
    with whole(path) as beside, beside.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(([key] if key else []) + list(metrics.MEASURES))
        for name, row in table.items():
            writer.writerow(([name] if key else []) + [f"{row[m]:.5f}" for m in metrics.MEASURES])


def main() -> int:
    parser = argparse.ArgumentParser(description="Score a folder of masks by the DAVIS protocol, "
                                                 "or compare two.")
    parser.add_argument("results", type=Path, nargs="+", help="folder with SEQUENCE/FRAME.png")
    parser.add_argument("--dataset", "-d", metavar="PATH", type=Path, default=Path("./DAVIS"),
                        help="the DAVIS folder (default: ./DAVIS)")
    parser.add_argument("--year", "-y", choices=YEARS, default="2016", help="default: 2016")
    parser.add_argument("--set", "-t", metavar="NAME", default="val",
                        help=f"name of a list, such as {', '.join(SETS)} (default: val)")
    parser.add_argument("--sequences", "-q", metavar="NAME", nargs="+", help="only these")
    args = parser.parse_args()
    try:
        compare(args.results, Davis(args.dataset, args.year, args.set, args.sequences).sequences,
                args.set)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def compare(folders: list[Path], sequences: list[Sequence], set_name: str) -> None:
    """Score one folder or two: tables, and a report in the last one."""
    if len(folders) > 2:
        raise ValueError(f"expected one or two folders of results, got {len(folders)}")
    runs = []
    if not any(sequence.scored for sequence in sequences):
        raise ValueError("nothing to score: no sequence has masks beyond the given ones")
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, expected masks in "
                                    "SEQUENCE/FRAME.png")
        runs.append(report.Run(folder.name, folder, score_folder(folder, sequences)))
        if len(folders) > 1:
            print(folder)
        show(table(runs[-1].scores), folder, set_name)
    name = "report.html" if len(runs) == 1 else f"against_{folders[0].name}.html"
    path = report.write(folders[-1] / name, sequences, runs,
                        {"scored": ", ".join(map(str, folders)), "set": set_name})
    print(f"to look at: {path}")


if __name__ == "__main__":
    sys.exit(main())
