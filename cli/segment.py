"""`-m segment`: segment your own clip from user masks or prompts, or open the annotation page."""

import argparse
import logging
import zlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from cli import live, setup
from cli.options import changed
from masks.read import read_masks, warn_about
from media import images
from media.background import progress
from media.clip import Clip
from media.files import check_no_overlap, lock_folder
from media.live import is_live
from media.video import open_clip
from outputs import annotations, report, writers
from outputs.annotations import FORMATS
from outputs.run_folder import RunFolder, default_folder, fingerprint
from tracking import pipeline, prompting
from tracking.confidence import ConfidenceSink, frames_to_review
from tracking.presence import Presence, parse_mark
from videomatch import VideoMatch
from webapp import session

log = logging.getLogger("videomatch")

PRINTED = 3  # stretches to review that fit into one line; report.html lists more of them
CLIP = "clip"  # name of the one video in the run folder: clip.finished.json


def run(args: argparse.Namespace) -> None:
    if is_live(args.video):
        return live.run(args)
    clip = open_clip(args.video, [name for _, name in map(parse_mask_argument, args.mask)])
    data = clip_fingerprint(clip)
    results = args.results_dir or default_folder(args.video.resolve().stem, data)
    check_no_overlap([results / name for name in ("masks", "overlay.mp4", "cutout", "cutout.mp4",
                                                  "cutout.mov", "cutout.webm")], [args.video])
    if args.page is not None or not (args.mask or args.box or args.point):
        return show_page(args, clip, results, data)
    with lock_folder(results):
        segment_clip(args, clip, results, data)


def segment_clip(args: argparse.Namespace, clip: Clip, results: Path, data: str) -> None:
    """Segment a clip and write what the flags ask for into `results`, which this run has locked.

    A finished clip is not segmented again: outputs it lacks are drawn from its mask files. An
    interrupted one resumes at its last saved tracker state.
    """
    model = setup.load_for_inference(args)
    names: dict[int, str] = {}
    masks = load_user_masks(args, clip, results, model, names)
    start, stop = index_range(args, clip)
    options = pipeline.Options(**setup.pipeline_options(args), start=start, stop=stop,
                               presence=user_presence(args, clip, masks))
    first = masks[min(masks)]
    warn_about(first, pipeline.location_size(model, first.shape, options))
    # Other user masks start over without --overwrite, because that is how a mask is corrected: the
    # last line of a run suggests it. Any other difference may be a mistake.
    folder = RunFolder(results, setup.run_metadata(args, model, {
        "data": data, "masks": describe_user_input(masks, options.presence, clip)}),
        args.overwrite, starts_over=["masks"])
    if folder.replaces:
        writers.delete_outputs(results, {Path(name).resolve() for text in args.mask
                                         for name in (text, text.partition(":")[2])})
    checkpoint = pipeline.TrackerCheckpoint(results / "masks", clip)
    entry, outputs = folder.finished.get(CLIP), requested_outputs(args)
    if entry and not all(checkpoint.mask_path(start + i).is_file()
                         for i in range(entry["frames"])):
        entry = None  # a mask was deleted: segment again
    if entry and has_outputs(entry, outputs, results):
        print(f"{entry['frames']} frames were already finished, in {results} (--overwrite "
              "starts over)")
        return
    if entry and args.cutout == "transparent":
        log.info("the cut-out's edges come from the mask files; --overwrite segments again, for "
                 "edges from the probabilities")
    checkpoint = checkpoint.mark_all_done() if entry else checkpoint.load(model)
    frames = pipeline.track(model, clip, masks, options, checkpoint)
    total = len(range(clip.count)[start:stop]) or None
    confidence = ConfidenceSink(results / "confidence.csv", clip, checkpoint.index is not None)
    count = pipeline.drain(progress(frames, desc="frames", total=total, unit="frame"), [
        *writers.clip_sinks(results, clip, args.cutout, args.cutout_format), confidence,
        *annotations.clip_sinks(results, clip, args.export, names)], checkpoint,
        lambda _: folder.start([results / "masks", results / "cutout"]))
    predicted = [one for one in confidence.measures if one.frame not in masks]
    report.write_clip(results / "report.html", args.video.resolve().name, clip, predicted,
                      folder.metadata)
    folder.finish(CLIP, {"frames": count,
                         "drawn": (entry["drawn"] if entry else {}) | outputs})
    written = "masks, overlay.mp4" + (" and cut-out" if args.cutout else "")
    print(f"{count} frames: {written} in {results}; open report.html there")
    if review := frames_to_review(predicted):
        print("review first: " + ", ".join(stretch.text(clip) for stretch in review[:PRINTED])
              + "; if a mask there is wrong, correct it and run again with --mask "
              f"{clip.number(min(masks))}:FIRST.png "
              f"{clip.number(review[0].first)}:CORRECTED.png")


def requested_outputs(args: argparse.Namespace) -> dict[str, str | None]:
    """The files and folders the flags ask for next to masks, each with its setting, if any.

    Only the cut-out has one: cutout.mp4 may be of a blurred or of a green background.
    """
    outputs: dict[str, str | None] = dict.fromkeys(
        ["overlay.mp4", *(FORMATS[name] for name in args.export)])
    if args.cutout:
        outputs[writers.cutout_name(args.cutout, args.cutout_format)] = args.cutout
    return outputs


def has_outputs(entry: dict, outputs: dict[str, str | None], results: Path) -> bool:
    """Whether a finished clip's outputs exist and were made with these settings."""
    return all(entry["drawn"].get(name, "") == setting and (results / name).exists()
               for name, setting in outputs.items())


def clip_fingerprint(clip: Clip) -> str:
    """A clip's path, with a fingerprint of the files it is read from.

    Other files in its folder don't count: notes, .DS_Store, masks.
    """
    return f"{clip.path.resolve()} ({fingerprint(sorted(clip.files))})"


def show_page(args: argparse.Namespace, clip: Clip, results: Path, data: str) -> None:
    """Open the annotation page on a clip, with the masks and marks of the command line."""
    session.check_page(args.page)
    model = setup.load_for_inference(args)
    names: dict[int, str] = {}
    # The page locks its own folder. Only a mask made from a prompt is written into `results` now.
    with lock_folder(results) if args.box or args.point else nullcontext():
        masks = load_user_masks(args, clip, results, model, names)
    session.open_page(session.Session(
        model, clip, results, pipeline.Options(**setup.pipeline_options(args)),
        partial(prompting.predict_mask, model), setup.run_metadata(args, model, {"data": data}),
        session.command_line(changed(args, "command")), args.export),
        masks, user_presence(args, clip, masks), args.page,
        args.page_host or ["127.0.0.1"], names)


def load_user_masks(args: argparse.Namespace, clip: Clip, results: Path, model: VideoMatch,
                    names: dict[int, str]) -> dict[int, np.ndarray]:
    """The masks of --mask, or the one predicted from --box and --point.

    Args:
        results: where a mask predicted from prompts is written.
        names: labels of objects by their ids; those in annotation files are added.

    Returns:
        (H, W) uint8 object ids, by frame index; empty if the command line has neither.

    Raises:
        OSError, ValueError: as `read_masks`; also for a frame that does not exist or a mask of
            another size than the clip's frames.
    """
    number = clip.number(0) if args.mask_frame is None else args.mask_frame
    if args.box or args.point:
        return prompted_mask(args, clip, results, model, number)
    return read_mask_files(args, clip, number, names)


def prompted_mask(args: argparse.Namespace, clip: Clip, results: Path, model: VideoMatch,
                  number: int) -> dict[int, np.ndarray]:
    """Predict the mask of one frame from --box, --point and --negative_point, and write it."""
    frame = clip.index(number)
    image = next(clip.frames(frame), None)
    if image is None:
        raise ValueError(f"--mask_frame {number}: the clip ends before it")
    mask = prompting.predict_masks(model, image, prompting.group_by_object(
        args.box, args.point, args.negative_point))
    path = results / f"mask_{number:05d}.png"
    images.write_mask(path, mask)
    print(f"mask from the prompts: {path} (to use it again: --mask {number}:{path})")
    return {frame: mask}


def read_mask_files(args: argparse.Namespace, clip: Clip, default: int,
                    names: dict[int, str]) -> dict[int, np.ndarray]:
    """Read the files of --mask [N:]FILE; arguments and errors are those of `load_user_masks`.

    Args:
        default: frame number of files without N.
    """
    paths: dict[int, list[Path]] = {}
    for number, name in map(parse_mask_argument, args.mask):
        if is_mark(name):
            continue
        number = default if number is None else number
        clip.index(number)  # fails for a frame that does not exist, before any file is read
        paths.setdefault(number, []).append(Path(name))
    if args.mask and not paths:
        raise ValueError("--mask: expected a mask file in addition to absent and gone objects: "
                         "FIRST.png")
    read = read_masks(paths, names=names, frame_names={
        number: clip.frame_name(clip.index(number)) for number in paths})
    masks = {number: clip.fit(mask) for number, mask in read.items()}
    for number, mask in masks.items():
        # A page of a TIFF stack has a frame number of its own, so its file is that of the first.
        file = paths.get(number, paths[min(paths)])[0]
        images.check_same_shape(args.video, clip.shape, f"--mask {file}", mask.shape)
    return {clip.index(number): mask for number, mask in masks.items()}


def parse_mask_argument(text: str) -> tuple[int | None, str]:
    """A value of --mask, [N:]FILE -> the frame number, None if there is none, and the file.

    A file may be called 12:30.png, after a time of day. It is meant if it exists and 30.png
    doesn't.
    """
    number, colon, name = text.partition(":")
    if not colon or not number.isdecimal() or Path(text).is_file() and not Path(name).is_file():
        return None, text
    return int(number), name


def is_mark(name: str) -> bool:
    """Whether a value of --mask is absent=ID or gone=ID, rather than a file of that name."""
    return parse_mark(name) is not None and not Path(name).is_file()


def user_presence(args: argparse.Namespace, clip: Clip,
                  masks: dict[int, np.ndarray]) -> Presence:
    """The objects that --mask N:absent=ID and N:gone=ID mark.

    Raises:
        ValueError: the frame number is missing, no earlier mask contains the object, or the mask
            of the same frame does.
    """
    presence = Presence(in_user_mask={frame: set(np.unique(mask[mask > 0]).tolist())
                                      for frame, mask in masks.items()})
    for number, name in map(parse_mask_argument, args.mask):
        if not is_mark(name):
            continue
        if number is None:
            raise ValueError(f"--mask {name}: expected a frame number, N:{name}")
        word, object_ids = parse_mark(name)
        frame = clip.index(number)
        earlier = set().union(*(ids for other, ids in presence.in_user_mask.items()
                                if other < frame))
        for object_id in sorted(object_ids):
            if object_id not in earlier:
                raise ValueError(f"--mask {number}:{name}: expected an object in a mask of an "
                                 f"earlier frame, none contains {object_id}")
            if object_id in presence.in_user_mask.get(frame, ()):
                raise ValueError(f"--mask {number}:{name}: the mask of the same frame contains "
                                 f"object {object_id}")
        getattr(presence, word).setdefault(frame, set()).update(object_ids)
    return presence


def describe_user_input(masks: dict[int, np.ndarray], presence: Presence, clip: Clip) -> str:
    """User masks, as checksums, and marked objects, as run metadata record them."""
    parts = [f"frame {clip.number(frame)}: CRC {zlib.crc32(mask.tobytes()):08x}"
             for frame, mask in sorted(masks.items())]
    parts += [f"frame {clip.number(frame)}: {word} {','.join(map(str, sorted(ids)))}"
              for word in ("absent", "gone")
              for frame, ids in sorted(getattr(presence, word).items())]
    return ", ".join(parts)


def index_range(args: argparse.Namespace, clip: Clip) -> tuple[int, int | None]:
    """--frames A:B as indices (start, stop), stop excluded; None is the end of the clip.

    A and B need not be numbers of existing frames: in a folder with gaps, 0:50 is what lies
    between them.

    Raises:
        ValueError: the clip has no frame in between.
    """
    first, behind = args.frames
    start = 0 if first is None else clip.first_from(first)
    stop = None if behind is None else clip.first_from(behind)
    if clip.numbers and not clip.numbers[start:stop]:
        wanted = f"{'' if first is None else first}:{'' if behind is None else behind}"
        raise ValueError(f"--frames {wanted}: {args.video} has no frame in this range, its frames "
                         f"are numbered {clip.numbers[0]} to {clip.numbers[-1]}")
    return start, stop
