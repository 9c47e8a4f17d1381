"""Segment a clip without PyTorch, with a checkpoint that `main.py -m export` exported.

    python lite.py CLIP.mp4 FIRST.png -j OUT
    python lite.py CLIP.mp4 --box X Y W H -j OUT

Needs only requirements-lite.txt. Masks are those of `main.py -m segment --precision fp32`,
propagated forward from the first frame.
"""

import argparse
import hashlib
import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lite_runtime.model import LiteVideoMatch
from masks.read import read_masks
from media import drawing, files, images
from media.background import progress
from media.files import check_no_overlap, lock_folder
from media.video import open_clip
from media.writer import VideoWriter
from system import errors, version
from tracking.prompting import group_by_object, predict_masks
from tracking.tracker import Tracker

PROGRAM = "lite.py"  # in manifest.json, to distinguish a run of this script from one of main.py
DESCRIPTION = "videomatch.json"
FORMAT = 6  # of an export; increased when graphs change such that another lite.py must run them
DEFAULT = Path("models/lite")


def package(name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is missing: pip install {name}") from error


def load(folder: Path, threads: int = 0) -> LiteVideoMatch:
    """Load the network of an export.

    Args:
        threads: number of threads of onnxruntime; 0 uses all cores.

    Raises:
        OSError: the folder or one of its files does not exist.
        ValueError: not an export, one of another version, or one with a damaged file; or
            onnxruntime is not installed.
    """
    onnxruntime = package("onnxruntime")
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected an export (python main.py "
                                f"-m export --export_dir {folder})")
    sessions: dict[str, Any] = {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']}, expected {FORMAT}: export again")
        graphs = dict(description["graphs"])
        model = LiteVideoMatch(lambda name, **inputs: _run(sessions[name], inputs),
                               **description["network"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an export that this version reads ({error})") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Each graph has its own threads, and only one graph runs at a time: waiting threads that spin
    # would take the cores from it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, digest in graphs.items():
        path = folder / f"{name}.onnx"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but {DESCRIPTION} lists it")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{path}: damaged, or of another export than {DESCRIPTION}")
        sessions[name] = onnxruntime.InferenceSession(content, options,
                                                      providers=["CPUExecutionProvider"])
    return model


def _run(session, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph on those of the inputs that it uses; returns its outputs by name."""
    # the tracer drops inputs that have no effect, and onnxruntime rejects unknown ones
    outputs = session.run(None, {x.name: inputs[x.name] for x in session.get_inputs()})
    return dict(zip((x.name for x in session.get_outputs()), outputs))


def track(clip, first: np.ndarray, model: LiteVideoMatch,
          size: int = 480) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each frame of a clip, (H, W, 3) uint8 RGB, with its (H, W) uint8 mask.

    Args:
        first: (H, W) uint8 object ids in the first frame.
        size: short side of the frames that the network sees, see `images.working_shape`; 0 keeps
            the original size.

    Raises:
        ValueError: the mask differs in size from the frames, or contains no object.
    """
    tracker = Tracker(model)
    first = clip.fit(first)
    for i, image in enumerate(clip.frames()):
        if i == 0:
            images.check_same_shape("frame 0", image.shape, "the mask", first.shape)
        small = images.scaled(image, size)
        step = tracker.step(model.normalized(small), None if i else first)
        yield image, step.mask_at(image.shape[:2], tracker.threshold)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Segment objects in a clip, given their mask or boxes in its first frame, with "
                    "an exported checkpoint and without PyTorch.")
    add = parser.add_argument
    add("clip", type=Path, help="a video, an animation or a folder of frames")
    add("mask", type=Path, nargs="?", help="mask of the first frame; each value is one object")
    add("--box", type=int, nargs=4, metavar=("X", "Y", "W", "H"), action="append", default=[],
        help="instead of a mask, a box around the object; repeat for each object")
    add("--point", type=int, nargs="+", metavar="X Y", action="append", default=[],
        help="instead of a mask, positive points, on the object; repeat for each object")
    add("--negative_point", "--not_point", type=int, nargs="+", metavar="X Y", action="append",
        default=[], help="negative points, which are not on the object; repeat for each object")
    add("--results_dir", "-j", type=Path, metavar="DIR", required=True,
        help="output folder for masks/ and overlay.mp4; replaces those of an earlier run")
    add("--model_load", "-o", type=Path, metavar="DIR", default=DEFAULT,
        help="folder of the export (default: models/lite)")
    add("--size", type=int, default=480, metavar="PIXELS",
        help="short side at which the network sees frames (small frames are enlarged by at most a "
             "factor of 2); 0: the frame's own size (default: 480)")
    add("--threads", type=int, default=0, metavar="N",
        help="threads of onnxruntime; 0 uses all cores (default)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        segment(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        print(f"lite.py: error: {message}", file=sys.stderr)
        return 2
    return 0


def explained(error: Exception) -> str | None:
    """One-line message for user errors; None for internal errors."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # onnxruntime's
        return "out of memory: use a smaller --size"
    return errors.explained(error)


def segment(args: argparse.Namespace) -> None:
    """Check the flags, segment the clip, and write masks and an overlay video."""
    if args.size and args.size < 16:
        raise ValueError(f"--size: expected 0 or at least 16, got {args.size}")
    if args.threads < 0:
        raise ValueError(f"--threads: expected at least 0, got {args.threads}")
    if (args.mask is None) == (not args.box and not args.point):
        raise ValueError("expected a mask of the first frame, or else --box or --point")
    for values in (*args.point, *args.negative_point):
        if len(values) % 2:
            raise ValueError("--point, --negative_point: expected pairs of numbers, X Y, got "
                             f"{values}")
    mask_files = [args.mask] if args.mask else []
    clip = open_clip(args.clip, mask_files)
    check_no_overlap([args.results_dir / name for name in ("masks", "overlay.mp4")],
                     [args.clip, *mask_files])
    model = load(args.model_load, args.threads)
    if args.mask:
        first = read_masks({0: [args.mask]}, frame_names={0: clip.frame_name(0)})[0]
    else:
        first = predict_masks(model, next(clip.frames()), group_by_object(
            args.box, args.point, args.negative_point))
    with lock_folder(args.results_dir):
        replaces = made_here(args.results_dir)
        if not args.mask:
            path = args.results_dir / f"mask_{clip.frame_name(0)}.png"
            images.write_mask(path, first)
            print(f"predicted mask of the first frame: {path}")
        count = 0
        with VideoWriter(args.results_dir / "overlay.mp4", clip.fps, clip.path) as overlay:
            frames = track(clip, first, model, args.size)
            for image, mask in progress(frames, desc="frames", total=clip.count or None):
                if count == 0:  # not earlier: an invalid mask must not delete results
                    begin(args.results_dir, clip.path, replaces)
                path = args.results_dir / "masks" / f"{clip.frame_name(count)}.png"
                if not replaces:
                    check_new(path)
                images.write_mask(path, mask)
                overlay.write(drawing.overlay(image, mask), clip.time(count))
                count += 1
    print(f"{count} frames: masks, overlay.mp4 in {args.results_dir}")


def made_here(results: Path) -> bool:
    """Whether a results folder contains results of an earlier run of this script.

    Raises:
        ValueError: it contains results of `main.py`, whose run metadata would become wrong.
    """
    path = results / "manifest.json"
    if not path.is_file():
        return False
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        made = None
    if not isinstance(made, dict) or made.get("program") != PROGRAM:
        raise ValueError(f"{path}: these are not results of {PROGRAM}, expected another folder "
                         "(--results_dir)")
    return True


def check_new(path: Path) -> None:
    """Raise a ValueError rather than overwrite a file that another program wrote."""
    if path.exists():
        raise ValueError(f"{path}: {PROGRAM} did not write this file, expected another folder "
                         "(--results_dir)")


def begin(results: Path, clip: Path, replaces: bool) -> None:
    """Delete results of an earlier run, whose clip may have more frames; write run metadata."""
    if replaces:
        for old in (*(results / "masks").glob("*.png"), results / "overlay.mp4"):
            old.unlink(missing_ok=True)
    else:
        check_new(results / "overlay.mp4")
    files.write(results / "manifest.json", json.dumps({
        "program": PROGRAM, "data": str(clip.resolve()),
        "versions": f"videomatch {version.__version__}"}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
