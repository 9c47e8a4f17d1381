"""Evaluation: segment the sequences of a data set and score them with the official DAVIS measures.

As a script it scores a folder of masks from any program, or compares two folders:
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
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import metrics
from davis import SETS, YEARS, Davis, Sequence
from masks.encoding import VOID, MaskEncoding
from media import drawing, images
from media.background import progress
from media.files import atomic_path, check_no_overlap, lock_folder
from outputs import report, writers
from outputs.run_folder import RunFolder, fingerprint
from system import distributed, errors
from tracking import confidence, pipeline
from tracking.confidence import ConfidenceSink
from videomatch import VideoMatch

log = logging.getLogger(__name__)

MAX_LOGGED = 5  # sequences in a warning: a wrong id usually runs through the whole set
# Frames per job of the worker processes that score a folder. Each job costs a message between
# processes; with larger jobs, processes are idle at the end of a small set.
CHUNK = 8

Scores = dict[str, metrics.SequenceScore]  # by the sequence's name
Table = dict[str, dict[str, float]]  # one row of measures for each sequence or object


@dataclass
class Options(pipeline.Options):
    """Settings of `evaluate`; see the flags of `main.py -m eval`."""

    results: Path | None = None  # folder for masks, videos and tables; None writes no files
    set_name: str = "val"  # part of the tables' file names
    videos: bool = False  # also write a video of each sequence with its masks overlaid
    metadata: dict[str, str] = field(default_factory=dict)  # run metadata: flags, weights, ...
    overwrite: bool = False  # segment again even if `results` has finished sequences


@torch.no_grad()
def evaluate(model: VideoMatch, sequences: list[Sequence], options: Options) -> Table:
    """Segment sequences from their reference masks; write and print the table of scores.

    Sequences that an earlier call with the same metadata finished in `options.results` are not
    segmented again. An interrupted one resumes at its last saved tracker state.

    Returns:
        A row of `metrics.MEASURES` per sequence, or per object where a sequence has several.

    Raises:
        ValueError: `options.results` holds results of other metadata, or another run is writing
            there.
    """
    model.eval()
    if options.results:
        check_no_overlap([options.results / s.name for s in sequences],
                         {path.parent for s in sequences
                          for path in (s.images[0], s.masks[s.labelled[0]])})
    with ExitStack() as locks:
        # Rank 0 first: it locks the folder, and with `overwrite` deletes what the others would see.
        with distributed.first_alone():
            if options.results and distributed.rank() == 0:
                locks.enter_context(lock_folder(options.results))
            folder = RunFolder(options.results, options.metadata,
                               options.overwrite and distributed.rank() == 0)
            if options.results and distributed.rank() == 0:  # also those of the other processes
                folder.check(options.results / s.name for s in sequences)
        todo = [s for s in sequences if not _is_finished(folder, s, options.videos)]
        todo = distributed.gather(todo)[0]  # the same list everywhere, before any sequence finishes
        if len(todo) < len(sequences):
            log.info("%d sequences were already finished", len(sequences) - len(todo))
        _segment(model, todo, folder, options)
        folder.gather()
        return _conclude(sequences, folder, options)


def _conclude(sequences: list[Sequence], folder: RunFolder, options: Options) -> Table:
    """Write tables and report of segmented sequences, print the table and return it."""
    scored = [sequence for sequence in sequences if sequence.scored]
    scores = {sequence.name: _score(folder, sequence.name) for sequence in scored}
    rows = table(scores)
    if distributed.rank():
        return rows
    if len(scored) < len(sequences):
        log.info("segmented and not scored, as only their reference masks are public: %s",
                 ", ".join(s.name for s in sequences if s not in scored))
    seconds = sum(folder.finished[sequence.name]["seconds"] for sequence in sequences)
    frames = sum(len(s) - 1 for s in sequences)
    speed = f"{frames} frames in {seconds:.1f} s: {frames / seconds:.2f} frames per second"
    if distributed.count() > 1:
        speed += f" in each of {distributed.count()} processes"
    try:
        # Files first: printing fails if the reader of a pipe has closed it.
        if options.results and scored:
            path = _write_results(scored, scores, folder, options, speed)
    finally:  # print the table even if the disk is full
        if scored:
            print_table(rows)
    print(f"{speed} (reading, segmenting, writing, scoring)")
    if options.results:
        print(f"masks and tables: {options.results}, report: {path}" if scored
              else f"masks: {options.results}")
    return rows


def _write_results(scored: list[Sequence], scores: Scores, folder: RunFolder, options: Options,
                   speed: str) -> Path:
    """Write the set's tables and a report; returns the report's path.

    The tables include sequences of the set that earlier calls finished. The report shows this
    call's sequences; if there are others, it does not replace report.html.
    """
    earlier = {name: _score(folder, name) for name, entry in sorted(folder.finished.items())
               if name not in scores and entry["j"]
               and entry.get("set", options.set_name) == options.set_name}
    write_tables(table(scores | earlier), options.results, options.set_name)
    run = report.Run(options.results.name, options.results, scores, {
        s.name: confidence.read(_confidence_path(options.results, s), s) for s in scored})
    name = "report_selected.html" if earlier else "report.html"
    return report.write(options.results / name, scored, [run], folder.metadata | {"speed": speed})


def _segment(model: VideoMatch, todo: list[Sequence], folder: RunFolder,
             options: Options) -> None:
    """Segment this process's share of the sequences and record each as finished."""
    scores: Scores = {name: _score(folder, name)
                      for name, entry in folder.finished.items() if entry["j"]}
    # Longest first, so that the processes of a job finish at about the same time.
    todo = distributed.share(sorted(todo, key=len, reverse=True) if distributed.count() > 1
                             else todo)
    with progress(total=sum(len(s) - 1 for s in todo), unit="frame",
                  disable=distributed.rank() > 0) as bar:
        def on_frame(frame: pipeline.Frame) -> None:
            folder.start()  # only now: a rejected first frame leaves no manifest
            bar.update(frame.index > 0)

        for sequence in todo:
            bar.set_description(sequence.name)
            # Before the work: if an input changes meanwhile, the next run segments it again.
            start, data = time.monotonic(), _fingerprint(sequence)
            score = segment_sequence(model, sequence, options, on_frame)
            folder.finish(sequence.name, {"seconds": time.monotonic() - start, "j": score.j,
                                          "f": score.f, "data": data,
                                          "set": options.set_name})
            if not sequence.scored:
                continue
            scores[sequence.name] = score
            bar.set_postfix_str(f"J&F so far {_mean(table(scores))['J&F-Mean']:.3f}")


def _confidence_path(results: Path, sequence: Sequence) -> Path:
    return results / f"{sequence.name}.confidence.csv"


def _fingerprint(sequence: Sequence) -> str:
    return fingerprint((*sequence.images, *filter(None, sequence.masks)))


def _is_finished(folder: RunFolder, sequence: Sequence, video: bool) -> bool:
    """Whether a sequence is scored, its input files are unchanged and its outputs exist."""
    return (folder.finished.get(sequence.name, {}).get("data") == _fingerprint(sequence)
            and all((folder.path / sequence.name / sequence.mask_name(i)).is_file()
                    for i in sequence.output_frames)
            and (not video or (folder.path / f"{sequence.name}.mp4").is_file()))


def _score(folder: RunFolder, name: str) -> metrics.SequenceScore:
    """Return the scores recorded in a finished sequence's entry."""
    entry, score = folder.finished[name], metrics.SequenceScore([])
    score.j, score.f = ({int(i): values for i, values in entry[key].items()} for key in "jf")
    return score


def segment_sequence(model: VideoMatch, sequence: Sequence, options: Options,
                     on_frame: Callable[[pipeline.Frame], object] = lambda _: None
                     ) -> metrics.SequenceScore:
    """Segment a sequence; masks are written and scored in a background thread.

    That thread must not run torch operations: torch's thread pools would compete for the cores
    and slow the network down.

    Args:
        on_frame: called with each frame before it is written.
    """
    scoring = ScoreSink(sequence)
    sinks: list[pipeline.Sink] = [scoring]
    checkpoint = None
    if options.results:
        masks = options.results / sequence.name
        video = options.results / f"{sequence.name}.mp4"
        checkpoint = pipeline.TrackerCheckpoint(masks, sequence).load(model)
        sinks += [writers.MaskSink(masks, sequence),
                  ConfidenceSink(_confidence_path(options.results, sequence), sequence,
                                 checkpoint.index is not None)]
        if options.videos:
            sinks.append(writers.VideoSink(video, sequence, lambda frame:
                                           drawing.overlay(frame.image, frame.mask)))
        elif options.overwrite:
            video.unlink(missing_ok=True)  # it shows the masks that are replaced
    frames = pipeline.track(model, sequence, sequence.reference_masks(), options, checkpoint)
    pipeline.drain(frames, sinks, checkpoint, on_frame)
    if options.results:
        # A data set may ask for the masks of some frames only; the others were needed to resume.
        for i in set(range(len(sequence))) - set(sequence.output_frames):
            (options.results / sequence.name / sequence.mask_name(i)).unlink(missing_ok=True)
    return scoring.score


class ScoreSink(pipeline.Sink):
    """Scores predicted masks in all frames with ground truth except the first and the last.

    The official DAVIS code leaves these two out, and so does `Sequence.scored`.
    """

    def __init__(self, sequence: Sequence):
        self.sequence, self.frames = sequence, set(sequence.scored)
        self.score = metrics.SequenceScore(sequence.scored_objects())

    def write(self, frame: pipeline.Frame) -> None:
        if frame.index in self.frames:
            truth = self.sequence.truth(frame.index)
            object_ids = self.sequence.scored_objects(frame.index)
            self.score.add(metrics.score_frame(frame.mask, truth, object_ids), object_ids)


def score_folder(results: Path, sequences: list[Sequence], workers: int | None = None) -> Scores:
    """Score the masks in `results`/SEQUENCE/FRAME.png, from any program.

    Args:
        workers: number of processes (threads outside Linux) that read and score frames; defaults
            to one per core. It does not change the scores.

    Raises:
        FileNotFoundError: a mask is missing.
        ValueError: a mask is of another size than the frame.
    """
    scores: Scores = {}
    ids: dict[str, tuple[set[int], set[int]]] = {}
    frames = [(encoding, results / sequence.name / sequence.mask_name(frame),
               sequence.mask_encoding, sequence.masks[frame], sequence.scored_objects(frame))
              for sequence in sequences for encoding in [sequence.result_encoding(results)]
              for frame in sequence.scored]
    with _workers(workers or _cores()) as pool:
        scored_frames = pool.map(_score_file, frames, chunksize=CHUNK)
        for sequence in progress(sequences, desc="sequences"):
            score = metrics.SequenceScore(sequence.scored_objects())
            predicted_ids, true_ids = set[int](), {*sequence.first_frames}
            for frame in sequence.scored:
                measures, *ids_in_frame = next(scored_frames)
                score.add(measures, sequence.scored_objects(frame))
                predicted_ids |= ids_in_frame[0]
                true_ids |= ids_in_frame[1]
            scores[sequence.name], ids[sequence.name] = score, (predicted_ids, true_ids)
    _warn_about_ids(results, ids)
    return scores


def _score_file(job: tuple[MaskEncoding, Path, MaskEncoding, Path, list[int]]
                ) -> tuple[list[tuple[float, float]], set[int], set[int]]:
    """Score a frame.

    Args:
        job: encoding and path of the predicted mask, the same of the ground truth, object ids.

    Returns:
        J and F of each object, the ids in the predicted mask, and the ids in the ground truth.
    """
    encoding, path, true_encoding, true_path, object_ids = job
    prediction, truth = encoding.read(path), true_encoding.read(true_path, keep_void=True)
    images.check_same_shape(true_path, truth.shape, path, prediction.shape)
    predicted_ids, true_ids = ({*np.flatnonzero(np.bincount(mask.ravel())).tolist()} - {0, VOID}
                               for mask in (prediction, truth))
    return metrics.score_frame(prediction, truth, object_ids), predicted_ids, true_ids


def _warn_about_ids(results: Path, ids: dict[str, tuple[set[int], set[int]]]) -> None:
    """Warn about predicted ids that the ground truth lacks, and about sequences of empty masks.

    Args:
        ids: for each sequence the ids in its predictions, and those in its ground truth.
    """
    def joined(parts: list[str]) -> str:
        more = len(parts) - MAX_LOGGED
        return "; ".join(parts[:MAX_LOGGED]) + (f"; and {more} more" if more > 0 else "")

    def numbers(ids: set[int]) -> str:
        return ", ".join(map(str, sorted(ids)))

    unknown = [f"sequence {name} has {numbers(predicted - true)}, its ground truth {numbers(true)}"
               for name, (predicted, true) in ids.items() if predicted - true]
    if unknown:
        log.warning("%s: object ids that the ground truth lacks are not scored: %s", results,
                    joined(unknown))
    empty = [name for name, (predicted, true) in ids.items() if true and not predicted]
    if empty:
        log.warning("%s: all masks are empty, none contains an object: %s", results, joined(empty))


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _workers(count: int) -> Executor:
    """Return workers that score frames: forked processes on Linux, threads elsewhere.

    A forked process starts without importing torch again, which would take longer than scoring a
    short set. Forking is safe here because `_score_file` takes no lock of torch or OpenCV.
    """
    if sys.platform != "linux":
        return ThreadPoolExecutor(count)
    # Ctrl+C goes to the whole process group; only the parent handles it, and stops the workers.
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork"),
                               signal.signal, (signal.SIGINT, signal.SIG_IGN))


def table(scores: Scores) -> Table:
    """Return a row of measures per sequence, named NAME, or NAME_ID for each of several objects."""
    rows = {}
    for name, score in scores.items():
        measures = score.conclude()
        rows |= {name if len(measures) == 1 else f"{name}_{i}": row for i, row in measures.items()}
    return rows


def _mean(table: Table) -> dict[str, float]:
    """Return the mean of a table's rows."""
    return metrics.average(list(table.values()))


def print_table(table: Table) -> None:
    """Print a table of scores, with the mean of all rows at the end."""
    width = max(len(name) for name in ("sequence", *table))
    print(f"{'sequence':{width}}  " + "  ".join(f"{m:>8}" for m in metrics.MEASURES))
    for name, row in (*table.items(), ("all", _mean(table))):
        print(f"{name:{width}}  " + "  ".join(f"{row[m]:8.3f}" for m in metrics.MEASURES))


def write_tables(table: Table, results: Path, set_name: str) -> None:
    """Write a table as two CSV files, with names and columns of the official evaluation code."""
    _write_csv(results / f"global_results-{set_name}.csv", {"": _mean(table)}, key=None)
    _write_csv(results / f"per-sequence_results-{set_name}.csv", table, key="Sequence")


def _write_csv(path: Path, table: Table, key: str | None) -> None:
    with atomic_path(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(([key] if key else []) + list(metrics.MEASURES))
        for name, row in table.items():
            writer.writerow(([name] if key else []) + [f"{row[m]:.5f}" for m in metrics.MEASURES])


def main() -> int:
    parser = argparse.ArgumentParser(description="Score a folder of masks with the DAVIS "
                                                 "measures, or compare two folders.")
    parser.add_argument("results", type=Path, nargs="+", help="folder with SEQUENCE/FRAME.png")
    parser.add_argument("--dataset", "-d", metavar="PATH", type=Path, default=Path("./DAVIS"),
                        help="folder of the data set (default: ./DAVIS)")
    parser.add_argument("--year", "-y", choices=YEARS, help="2016: one object per sequence; "
                        "2017: several; all: both lists (default: 2016 where it exists, else 2017)")
    parser.add_argument("--set", "-t", metavar="NAME", default="val",
                        help=f"{', '.join(SETS)}, or another list or folder (default: val)")
    parser.add_argument("--sequences", "-q", metavar="NAME", nargs="+", help="only these sequences")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors.one_line(parser):
        compare(args.results, Davis(args.dataset, args.year, args.set, args.sequences).sequences,
                args.set, selected=bool(args.sequences))
    return 0


def compare(folders: list[Path], sequences: list[Sequence], set_name: str,
            selected: bool = False) -> None:
    """Score one or two folders: print tables, write them as CSV, and a report into the last folder.

    Where nothing can be written, as in a read-only folder, they are only printed.

    Args:
        selected: `sequences` are only some of the set; the CSV files and report of the whole set
            are not replaced.

    Raises:
        FileNotFoundError: a folder or a mask is missing.
        ValueError: there is nothing to score, another run is writing there, or a mask has another
            size than its frame.
    """
    if len(folders) > 2:
        raise ValueError(f"expected one or two folders of results, got {len(folders)}")
    sequences = [sequence for sequence in sequences if sequence.scored]
    if not sequences:
        raise ValueError("nothing to score: no sequence has masks other than its reference mask")
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, expected masks in "
                                    "SEQUENCE/FRAME.png")
    path, write_errors = None, []
    with ExitStack() as locks:
        for folder in {folder.resolve(): folder for folder in folders}.values():
            try:
                locks.enter_context(lock_folder(folder))
            except OSError as error:
                write_errors.append(error)
        runs = [report.Run(name, folder, score_folder(folder, sequences))
                for name, folder in zip(folder_labels(folders), folders)]
        # Files first: printing fails if the reader of a pipe has closed it.
        for run in () if selected else runs:
            try:
                write_tables(table(run.scores), run.results, set_name)
            except OSError as error:
                write_errors.append(error)
        name = "report" if len(runs) == 1 else f"against_{folders[0].resolve().name}"
        try:
            path = report.write(folders[-1] / f"{name}{'_selected' if selected else ''}.html",
                                sequences, runs,
                                {"scored": ", ".join(map(str, folders)), "set": set_name})
        except OSError as error:
            write_errors.append(error)
    for run in runs:
        if len(runs) > 1:
            print(run.results)
        print_table(table(run.scores))
    if selected:
        log.info("--sequences selected a part of the set: the tables of the whole set were not "
                 "replaced")
    if write_errors:
        log.warning("not all tables and reports could be written: %s",
                    errors.explained(write_errors[0]))
    if path:
        print(f"report: {path}")


def folder_labels(folders: list[Path]) -> list[str]:
    """Return a name for each folder: the shortest ends of their paths that differ."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len({*names}) == len(names):
            return names
    return [f"{folder.resolve().name} ({i})" for i, folder in enumerate(folders, 1)]


if __name__ == "__main__":
    sys.exit(main())
