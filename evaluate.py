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
from media.files import hold, keep_apart, whole
from outputs import report, writers
from outputs.run_folder import RunFolder, fingerprint
from system import distributed, errors
from tracking import confidence, pipeline
from tracking.confidence import ConfidenceSink
from videomatch import VideoMatch

log = logging.getLogger(__name__)

NAMED = 5  # sequences that a warning names; a wrong id usually runs through a whole set

Scores = dict[str, metrics.SequenceScore]  # by the sequence's name
Table = dict[str, dict[str, float]]  # one row of measures for each sequence or object


@dataclass
class Options(pipeline.Options):
    """What `evaluate` needs to know beside model and data; the flags of `main.py`."""

    results: Path | None = None  # folder for masks, videos and tables; None keeps nothing
    set_name: str = "val"  # which the tables are named after
    videos: bool = False
    facts: dict[str, str] = field(default_factory=dict)  # what makes the results: flags, weights
    overwrite: bool = False  # segment again what `results` holds already


@torch.no_grad()
def evaluate(model: VideoMatch, sequences: list[Sequence], options: Options) -> Table:
    """Segment every sequence from its first mask; write and print the table.

    Sequences that an earlier call with the same facts finished in `options.results` are not
    segmented again, and one that it left unfinished is gone on with.

    Returns:
        A row of `metrics.MEASURES` for each sequence (for each object where there are many).

    Raises:
        ValueError: what is in `options.results` was made with other facts, or another run is
            writing there.
    """
    model.eval()
    if options.results:
        keep_apart([options.results / s.name for s in sequences],
                   {path.parent for s in sequences
                    for path in (s.images[0], s.masks[s.labelled[0]])})
    with ExitStack() as held:
        with distributed.first_alone():  # which locks the folder, and may overwrite
            if options.results and distributed.rank() == 0:
                held.enter_context(hold(options.results))
            manifest = RunFolder(options.results, options.facts,
                                options.overwrite and distributed.rank() == 0)
        todo = [s for s in sequences if not _finished(manifest, s, options.videos)]
        todo = distributed.gather(todo)[0]  # before any process finishes one
        if len(todo) < len(sequences):
            log.info("%d sequences were finished before", len(sequences) - len(todo))
        _segment(model, todo, manifest, options)
        manifest.share()
        return _conclude(sequences, manifest, options)


def _conclude(sequences: list[Sequence], manifest: RunFolder, options: Options) -> Table:
    """Write and print the table of sequences that are all segmented, and the report."""
    scored = [sequence for sequence in sequences if sequence.scored]
    scores = {sequence.name: _score(manifest, sequence.name) for sequence in scored}
    found = table(scores)
    if distributed.rank():
        return found
    if len(scored) < len(sequences):
        log.info("segmented and not scored, since nothing but given masks is known: %s",
                 ", ".join(s.name for s in sequences if s not in scored))
    seconds = sum(manifest.entries[sequence.name]["seconds"] for sequence in sequences)
    frames = sum(len(s) - 1 for s in sequences)
    speed = f"{frames} frames in {seconds:.1f} s: {frames / seconds:.2f} frames per second"
    if distributed.count() > 1:
        speed += f" in each of {distributed.count()} processes"
    try:
        if options.results and scored:  # files first: who reads what is printed may have gone
            path = _write_tables(scored, scores, manifest, options, speed)
    finally:  # a full disk costs no table on screen
        if scored:
            show(found)
    print(f"{speed} (reading, segmenting, writing, scoring)")
    if options.results:
        print(f"masks and tables: {options.results}, to look at: {path}" if scored
              else f"masks: {options.results}")
    return found


def _write_tables(scored: list[Sequence], scores: Scores, manifest: RunFolder, options: Options,
                  speed: str) -> Path:
    """Write the set's tables, with what earlier calls scored of it, and a report: its path.

    A report of some sequences doesn't replace one of more.
    """
    earlier = {name: _score(manifest, name) for name, entry in sorted(manifest.entries.items())
               if name not in scores and entry["j"]
               and entry.get("set", options.set_name) == options.set_name}
    write(table(scores | earlier), options.results, options.set_name)
    run = report.Run(options.results.name, options.results, scores, {
        s.name: confidence.read(_confidence_of(options.results, s), s) for s in scored})
    name = "report_selected.html" if earlier else "report.html"
    return report.write(options.results / name, scored, [run], manifest.made_by | {"speed": speed})


def _segment(model: VideoMatch, todo: list[Sequence], manifest: RunFolder,
             options: Options) -> None:
    """Segment this process's share of the sequences."""
    scores: Scores = {name: _score(manifest, name)
                      for name, entry in manifest.entries.items() if entry["j"]}
    todo = distributed.share(sorted(todo, key=len, reverse=True) if distributed.count() > 1
                             else todo)
    folders = [options.results / s.name for s in todo] if options.results else []
    with progress(total=sum(len(s) - 1 for s in todo), unit="frame",
                  disable=distributed.rank() > 0) as bar:
        def seen(frame: pipeline.Frame) -> None:
            manifest.begin(folders)  # not before: nothing is left where a first frame is refused
            bar.update(frame.index > 0)

        for sequence in todo:
            bar.set_description(sequence.name)
            # of the files as they are before the work: what changes under it is noticed next time
            start, data = time.monotonic(), _data(sequence)
            score = segment_sequence(model, sequence, options, seen)
            manifest.finish(sequence.name, {"seconds": time.monotonic() - start, "j": score.j,
                                            "f": score.f, "data": data,
                                            "set": options.set_name})
            if not sequence.scored:
                continue
            scores[sequence.name] = score
            bar.set_postfix_str(f"J&F so far {_mean(table(scores))['J&F-Mean']:.3f}")


def _confidence_of(results: Path, sequence: Sequence) -> Path:
    return results / f"{sequence.name}.confidence.csv"


def _data(sequence: Sequence) -> str:
    return fingerprint((*sequence.images, *filter(None, sequence.masks)))


def _finished(manifest: RunFolder, sequence: Sequence, video: bool) -> bool:
    """Whether it is scored, its files are what they were, and so is what was made of them."""
    return (manifest.entries.get(sequence.name, {}).get("data") == _data(sequence)
            and all((manifest.folder / sequence.name / sequence.mask_name(i)).is_file()
                    for i in sequence.output_frames)
            and (not video or (manifest.folder / f"{sequence.name}.mp4").is_file()))


def _score(manifest: RunFolder, name: str) -> metrics.SequenceScore:
    entry, score = manifest.entries[name], metrics.SequenceScore([])
    score.j, score.f = ({int(i): values for i, values in entry[key].items()} for key in "jf")
    return score


def segment_sequence(model: VideoMatch, sequence: Sequence, options: Options,
                     on_frame: Callable[[pipeline.Frame], object] = lambda _: None
                     ) -> metrics.SequenceScore:
    """Segment a sequence; masks are written and scored in the background.

    What runs there calls nothing of torch: its parallel loops in several threads at once would
    hold each other up on a CPU, and the network with them.

    Args:
        on_frame: called with each frame.
    """
    scores = Score(sequence)
    outputs: list[pipeline.Sink] = [scores]
    checkpoint = None
    if options.results:
        checkpoint = pipeline.TrackerCheckpoint(options.results / sequence.name, sequence)
        checkpoint = checkpoint.load(model)
        film = options.results / f"{sequence.name}.mp4"
        outputs += [writers.MaskSink(options.results / sequence.name, sequence),
                    ConfidenceSink(_confidence_of(options.results, sequence), sequence,
                               checkpoint.index is not None)]
        if options.videos:
            outputs.append(writers.VideoSink(film, sequence, lambda frame:
                                      drawing.overlay(frame.image, frame.mask)))
        elif options.overwrite:
            film.unlink(missing_ok=True)  # of other masks
    frames = pipeline.track(model, sequence, sequence.reference_masks(), options, checkpoint)
    pipeline.drain(frames, outputs, checkpoint, on_frame)
    if options.results:  # all of them only serve a run that goes on
        for i in set(range(len(sequence))) - set(sequence.output_frames):
            (options.results / sequence.name / sequence.mask_name(i)).unlink(missing_ok=True)
    return scores.found


class Score(pipeline.Sink):
    """J and F of frames with truth but the first and the last, as the DAVIS protocol has it."""

    def __init__(self, sequence: Sequence):
        self.sequence, self.frames = sequence, set(sequence.scored)
        self.found = metrics.SequenceScore(sequence.scored_objects())

    def write(self, frame: pipeline.Frame) -> None:
        if frame.index in self.frames:
            truth = self.sequence.truth(frame.index)
            object_ids = self.sequence.scored_objects(frame.index)
            self.found.add(metrics.score_frame(frame.mask, truth, object_ids), object_ids)


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
    ids: dict[str, tuple[set[int], set[int]]] = {}
    frames = [(coding, results / sequence.name / sequence.mask_name(frame), sequence.coding,
               sequence.masks[frame], sequence.scored_objects(frame))
              for sequence in sequences for coding in [sequence.coding_in(results)]
              for frame in sequence.scored]
    with _workers(workers or _cores()) as pool:
        scores = pool.map(_score_file, frames, chunksize=8)
        for sequence in progress(sequences, desc="sequences"):
            score = metrics.SequenceScore(sequence.scored_objects())
            predicted, true = set[int](), {*sequence.first_frames}
            for frame in sequence.scored:
                measures, *held = next(scores)
                score.add(measures, sequence.scored_objects(frame))
                predicted |= held[0]
                true |= held[1]
            found[sequence.name], ids[sequence.name] = score, (predicted, true)
    _warn_of_ids(results, ids)
    return found


def _score_file(job: tuple[MaskEncoding, Path, MaskEncoding, Path, list[int]]
                ) -> tuple[list[tuple[float, float]], set[int], set[int]]:
    """J and F of each object, the ids that the prediction holds, and those of the truth."""
    coding, path, true_coding, true_path, object_ids = job
    prediction, truth = coding.read(path), true_coding.read(true_path, keep_void=True)
    images.check_same_shape(true_path, truth.shape, path, prediction.shape)
    found, true = ({*np.flatnonzero(np.bincount(mask.ravel())).tolist()} - {0, VOID}
                   for mask in (prediction, truth))
    return metrics.score_frame(prediction, truth, object_ids), found, true


def _warn_of_ids(results: Path, ids: dict[str, tuple[set[int], set[int]]]) -> None:
    """Warn once of ids that no ground truth holds, and once of sequences without any object.

    Args:
        ids: for each sequence the ids in its predictions, and those in its ground truth.
    """
    def listed(parts: list[str]) -> str:
        return "; ".join(parts[:NAMED]) + (f"; and {len(parts) - NAMED} more" if parts[NAMED:]
                                           else "")

    def numbers(some: set[int]) -> str:
        return ", ".join(map(str, sorted(some)))

    unknown = [f"sequence {name} has {numbers(found - true)}, its ground truth {numbers(true)}"
               for name, (found, true) in ids.items() if found - true]
    if unknown:
        log.warning("%s: object ids that the ground truth lacks are not scored: %s", results,
                    listed(unknown))
    empty = [name for name, (found, true) in ids.items() if true and not found]
    if empty:
        log.warning("%s: all masks are empty, none holds an object: %s", results, listed(empty))


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


def show(table: Table) -> None:
    """Print the table."""
    width = max(len(name) for name in ("sequence", *table))
    print(f"{'sequence':{width}}  " + "  ".join(f"{m:>8}" for m in metrics.MEASURES))
    for name, row in (*table.items(), ("all", _mean(table))):
        print(f"{name:{width}}  " + "  ".join(f"{row[m]:8.3f}" for m in metrics.MEASURES))


def write(table: Table, results: Path, set_name: str) -> None:
    """Write the table as CSV, with the names of the official evaluation code."""
    _write_csv(results / f"global_results-{set_name}.csv", {"": _mean(table)}, key=None)
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
                        help="the data set's folder (default: ./DAVIS)")
    parser.add_argument("--year", "-y", choices=YEARS, help="default: 2016")
    parser.add_argument("--set", "-t", metavar="NAME", default="val",
                        help=f"{', '.join(SETS)}, or another list or folder (default: val)")
    parser.add_argument("--sequences", "-q", metavar="NAME", nargs="+", help="only these")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what was guessed
    with errors.one_line(parser):
        compare(args.results, Davis(args.dataset, args.year, args.set, args.sequences).sequences,
                args.set, selected=bool(args.sequences))
    return 0


def compare(folders: list[Path], sequences: list[Sequence], set_name: str,
            selected: bool = False) -> None:
    """Score one folder or two: tables, and a report in the last one.

    Where nothing can be written, as in a read-only folder, they are only printed.

    Args:
        selected: `sequences` are some of the set only, so the set's tables and its report stay.

    Raises:
        FileNotFoundError: a folder or a mask is missing.
        ValueError: nothing to score, another run is writing there, or masks of another size.
    """
    if len(folders) > 2:
        raise ValueError(f"expected one or two folders of results, got {len(folders)}")
    sequences = [sequence for sequence in sequences if sequence.scored]
    if not sequences:
        raise ValueError("nothing to score: no sequence has masks beside the given ones")
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, expected masks in "
                                    "SEQUENCE/FRAME.png")
    path, unwritten = None, []
    with ExitStack() as held:
        for folder in {folder.resolve(): folder for folder in folders}.values():
            try:
                held.enter_context(hold(folder))
            except OSError as error:
                unwritten.append(error)
        runs = [report.Run(name, folder, score_folder(folder, sequences))
                for name, folder in zip(labels(folders), folders)]
        # files first: who reads what is printed may have gone
        for run in () if selected else runs:
            try:
                write(table(run.scores), run.results, set_name)
            except OSError as error:
                unwritten.append(error)
        name = "report" if len(runs) == 1 else f"against_{folders[0].resolve().name}"
        try:
            path = report.write(folders[-1] / f"{name}{'_selected' if selected else ''}.html",
                                sequences, runs,
                                {"scored": ", ".join(map(str, folders)), "set": set_name})
        except OSError as error:
            unwritten.append(error)
    for run in runs:
        if len(runs) > 1:
            print(run.results)
        show(table(run.scores))
    if selected:
        log.info("the tables of the whole set stay as they are, since --sequences chose some")
    if unwritten:
        log.warning("not all tables and reports could be written: %s",
                    errors.explained(unwritten[0]))
    if path:
        print(f"to look at: {path}")


def labels(folders: list[Path]) -> list[str]:
    """A name for each folder: the shortest ends of their paths that differ."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len({*names}) == len(names):
            return names
    return [f"{folder.resolve().name} ({i})" for i, folder in enumerate(folders, 1)]


if __name__ == "__main__":
    sys.exit(main())
