"""A clip of one's own, from masks given to files: `-m segment`. It knows flags, no tensors."""

import argparse
import logging
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from cli import setup
from cli.options import changed
from masks.read import read_masks, warn_about
from media import images
from media.background import progress
from media.files import hold, keep_apart
from media.video import open_clip
from outputs import annotations, report, writers
from outputs.annotations import FORMATS
from outputs.run_folder import RunFolder, default_folder, differing_keys, fingerprint, read_metadata
from tracking import pipeline, prompting
from tracking.confidence import ConfidenceSink, frames_to_review
from tracking.presence import Presence, parse_mark
from videomatch import VideoMatch
from webapp import session

log = logging.getLogger("videomatch")

SHOWN = 3  # stretches to review, of those in the report
CLIP = "clip"  # what the manifest calls the one video of -m segment


def run(args: argparse.Namespace) -> None:
    clip = open_clip(args.video, [name for _, name in map(parse_mask_argument, args.mask)])
    source = args.video.resolve()
    data = clip_fingerprint(clip)
    results = args.results_dir or default_folder(source.stem, data)
    keep_apart([results / name for name in ("masks", "overlay.mp4", "cutout", "cutout.mp4",
                                         "cutout.mov", "cutout.webm")], [args.video])
    if args.page is not None or not (args.mask or args.box or args.point):
        return show_page(args, clip, results, data)
    with hold(results):
        segment_clip(args, clip, results, data)


def segment_clip(args: argparse.Namespace, clip, results: Path, data: str) -> None:
    """Write masks and what else the flags name into a results folder that this run holds."""
    model = setup.load_for_inference(args)
    names: dict[int, str] = {}
    masks = load_user_masks(args, clip, results, model, names)
    options, first = pipeline.Options(**setup.pipeline_options(args)), masks[min(masks)]
    options.start, options.stop = frame_range(args, clip)
    options.presence = user_presence(args, clip, masks)
    warn_about(first, pipeline.location_size(model, first.shape, options))
    facts = setup.run_metadata(args, model, {
        "data": data, "masks": ", ".join(
            f"frame {clip.number(frame)}: CRC {zlib.crc32(mask.tobytes()):08x}"
            for frame, mask in sorted(masks.items())) + presence_text(options.presence, clip)})
    made, again = read_metadata(results), args.overwrite
    if not again and made and differing_keys(made, facts) == ["masks"]:
        log.info("%s: was made from other masks, and is made anew from these", results)
        again = True
    manifest = RunFolder(results, facts, again)
    if again and made:
        writers.delete_outputs(results, {Path(name).resolve() for text in args.mask
                              for name in (text, text.partition(":")[2])})
    checkpoint = pipeline.TrackerCheckpoint(results / "masks", clip)
    before = manifest.entries.get(CLIP)
    if before and not all(checkpoint.mask_path(options.start + i).is_file()
                          for i in range(before["frames"])):
        before = None
    drawn = before["drawn"] if before else {}
    wanted = {"overlay.mp4": None, **{FORMATS[name]: None for name in args.export}}
    if args.cutout:
        wanted[writers.cutout_name(args.cutout, args.cutout_format)] = args.cutout
    there = all(drawn.get(name, "") == how and (results / name).exists()
                for name, how in wanted.items())
    if before and there:
        print(f"{before['frames']} frames were finished before, in {results} (--overwrite "
              "starts over)")
        return
    if before and args.cutout == "transparent":
        log.info("the cut-out's edges are drawn from the masks that are there; --overwrite "
                 "segments again, for edges from the probabilities")
    checkpoint = checkpoint.mark_all_done() if before else checkpoint.load(model)
    frames = pipeline.track(model, clip, masks, options, checkpoint)
    total = len(range(clip.count)[options.start:options.stop]) or None
    bar = progress(frames, desc="frames", total=total, unit="frame")
    sure = ConfidenceSink(results / "confidence.csv", clip, checkpoint.index is not None)
    count = pipeline.drain(bar, [
        *writers.clip_sinks(results, clip, args.cutout, args.cutout_format), sure,
        *annotations.clip_sinks(results, clip, args.export, names)], checkpoint,
        lambda _: manifest.begin([results / "masks", results / "cutout"]))
    predicted = [one for one in sure.measures if one.frame not in masks]
    report.write_clip(results / "report.html", args.video.resolve().name, clip, predicted,
                      manifest.made_by)
    manifest.finish(CLIP, {"frames": count, "drawn": drawn | wanted})
    outputs = "masks, overlay.mp4" + (" and cut-out" if args.cutout else "")
    print(f"{count} frames: {outputs} in {results}, to look at: report.html")
    if review := frames_to_review(predicted):
        print(f"to review first: {', '.join(stretch.text(clip) for stretch in review[:SHOWN])}; if "
              "a mask there is wrong, correct it and run again with --mask "
              f"{clip.number(min(masks))}:FIRST.png {clip.number(review[0].first)}:MENDED.png")


def clip_fingerprint(clip) -> str:
    """Where a clip lies, with a digest that changes when one of its own files does.

    Other files in its folder don't count: notes, what a file manager leaves there, masks.
    """
    return f"{clip.path.resolve()} ({fingerprint(sorted(clip.files))})"


def show_page(args: argparse.Namespace, clip, results: Path, data: str) -> None:
    session.check_page(args.page)
    model = setup.load_for_inference(args)
    names: dict[int, str] = {}
    with hold(results) if args.box or args.point else nullcontext():  # whose mask is written there
        masks = load_user_masks(args, clip, results, model, names)
    session.open_page(session.Session(
        model, clip, results, pipeline.Options(**setup.pipeline_options(args)),
        prompting.make_prompter(model), setup.run_metadata(args, model, {"data": data}),
        session.command_line(changed(args, "command")), args.export),
        masks, user_presence(args, clip, masks), args.page,
        args.page_host or ["127.0.0.1"], names)


def load_user_masks(args: argparse.Namespace, clip, results: Path,
                model: VideoMatch, names: dict[int, str] | None = None) -> dict[int, np.ndarray]:
    """The masks that --mask names, or the one that --box and --point make, kept as a file.

    Args:
        names: labels of objects by their ids; those that annotation files tell are added.
    """
    default = clip.number(0) if args.mask_frame is None else args.mask_frame
    if args.mask or not (args.box or args.point):
        paths: dict[int, list[Path]] = {}
        for number, name in map(parse_mask_argument, args.mask):
            if is_mark(name):
                continue
            number = default if number is None else number
            clip.index(number)  # that there is such a frame is checked before any file is read
            paths.setdefault(number, []).append(Path(name))
        if args.mask and not paths:
            raise ValueError("--mask: expected a mask beside what is absent or gone: FIRST.png")
        found = read_masks(paths, names=names, frame_names={
            number: clip.frame_name(clip.index(number)) for number in paths})
        masks = {number: clip.fit(mask) for number, mask in found.items()}
        for number, mask in masks.items():
            file = paths.get(number, paths[min(paths)])[0]  # a page of a stack has no file
            images.check_same_shape(args.video, clip.shape, f"--mask {file}", mask.shape)
        return {clip.index(number): mask for number, mask in masks.items()}
    frame = clip.index(default)
    image = next(clip.frames(frame), None)
    if image is None:
        raise ValueError(f"--mask_frame {default}: the clip ends before it")
    mask = prompting.predict_masks(model, image, prompting.group_by_object(
        args.box, args.point, args.not_point))
    path = results / f"mask_{default:05d}.png"
    results.mkdir(parents=True, exist_ok=True)
    images.write_mask(path, mask)
    print(f"the mask that this run starts from: {path} (again: --mask {default}:{path})")
    return {frame: mask}


def is_mark(name: str) -> bool:
    """Whether --mask says absent=ID or gone=ID there; a file of that name is a file."""
    return parse_mark(name) is not None and not Path(name).is_file()


def user_presence(args: argparse.Namespace, clip, masks: dict[int, np.ndarray]) -> Presence:
    """What --mask N:absent=ID and N:gone=ID say.

    Raises:
        ValueError: there is no frame number, or no earlier mask holds the object, or one of the
            same frame does.
    """
    found = Presence(in_user_mask={frame: set(np.unique(mask[mask > 0]).tolist())
                            for frame, mask in masks.items()})
    for number, name in map(parse_mask_argument, args.mask):
        if not is_mark(name):
            continue
        if number is None:
            raise ValueError(f"--mask {name}: expected a frame number, N:{name}")
        word, object_ids = parse_mark(name)
        frame = clip.index(number)
        known = set().union(*(ids for other, ids in found.in_user_mask.items() if other < frame))
        for object_id in sorted(object_ids):
            if object_id not in known:
                raise ValueError(f"--mask {number}:{name}: expected an object that a mask of an "
                                 f"earlier frame holds, none holds {object_id}")
            if object_id in found.in_user_mask.get(frame, ()):
                raise ValueError(f"--mask {number}:{name}: the mask of the same frame holds object "
                                 f"{object_id}")
        getattr(found, word).setdefault(frame, set()).update(object_ids)
    return found


def presence_text(presence: Presence, clip) -> str:
    """Ended objects as run metadata record them, ", frame 5: absent 2"; empty if there are none."""
    return "".join(f", frame {clip.number(frame)}: {word} {','.join(map(str, sorted(ids)))}"
                   for word in ("absent", "gone")
                   for frame, ids in sorted(getattr(presence, word).items()))


def frame_range(args: argparse.Namespace, clip) -> tuple[int, int | None]:
    """The part of the clip whose frame numbers are in --frames A:B, as indices (start, stop).

    Neither A nor B need be the number of a frame: in a folder with gaps, 0:50 is what lies between.

    Raises:
        ValueError: no frame of the clip has such a number.
    """
    first, behind = args.frames
    start = 0 if first is None else clip.first_from(first)
    stop = None if behind is None else clip.first_from(behind)
    if clip.numbers and not clip.numbers[start:stop]:
        raise ValueError(f"--frames: {args.video} has no frame from {first or 0} to before "
                         f"{behind}, its frames are numbered {clip.numbers[0]} to "
                         f"{clip.numbers[-1]}")
    return start, stop


def parse_mask_argument(text: str) -> tuple[int | None, str]:
    """What --mask takes, [N:]FILE: the frame's number, if there is one, and the file.

    A file may be called 12:30.png, as clocks name them; it is meant where there is no 30.png.
    """
    number, colon, name = text.partition(":")
    if not colon or not number.isdecimal() or Path(text).is_file() and not Path(name).is_file():
        return None, text
    return int(number), name
