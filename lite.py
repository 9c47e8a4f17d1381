"""A clip's masks without PyTorch, by an export of a checkpoint (`main.py -m export`).

    python lite.py CLIP.mp4 FIRST.png -j OUT
    python lite.py CLIP.mp4 --box X Y W H -j OUT

It takes what requirements-lite.txt names. Masks are those of `main.py -m segment` at --precision
fp32, forwards from the first frame.
"""

import argparse
import hashlib
import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from masks.read import read_masks
from media import drawing, files, images
from media.background import progress
from media.files import check_no_overlap, lock_folder
from media.video import open_clip
from media.writer import VideoWriter
from network.lite import LiteVideoMatch
from network.outliers import decide
from system import errors, version
from tracking.prompting import group_by_object, predict_masks
from tracking.tracker import Tracker, resized

PROGRAM = "lite.py"  # in manifest.json, which main.py writes too
DESCRIPTION = "videomatch.json"
FORMAT = 3  # changes when another lite.py is needed
DEFAULT = Path("models/lite")


def package(name: str):
    """A package that not everybody needs.

    Raises:
        ValueError: it isn't there.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is missing: pip install {name}") from error


def load(folder: Path, threads: int = 0) -> LiteVideoMatch:
    """The network of an export.

    Args:
        threads: of onnxruntime; 0 takes all cores.

    Raises:
        OSError: no such folder, or a file of it is missing.
        ValueError: not an export, one of another version, or a file of it is damaged; or
            onnxruntime is missing.
    """
    onnxruntime = package("onnxruntime")
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected an export (python main.py "
                                f"-m export --export_dir {folder})")
    sessions: dict[str, Any] = {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            raise ValueError(f"of format {kept['format']}, expected {FORMAT}: export again")
        graphs = dict(kept["graphs"])
        model = LiteVideoMatch(lambda name, **inputs: _run(sessions[name], inputs),
                               **kept["network"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an export that can be used ({error})") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # each graph has threads of its own: those that wait must leave the cores to the others'
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, digest in graphs.items():
        path = folder / f"{name}.onnx"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but {DESCRIPTION} beside it names it")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{path}: damaged, or of another export than {DESCRIPTION} beside it")
        sessions[name] = onnxruntime.InferenceSession(content, options,
                                                      providers=["CPUExecutionProvider"])
    return model


def _run(session, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A graph's outputs by their names; it takes those of the inputs that it uses."""
    outputs = session.run(None, {x.name: inputs[x.name] for x in session.get_inputs()})
    return dict(zip((x.name for x in session.get_outputs()), outputs))


def masks(clip, first: np.ndarray, model: LiteVideoMatch, size: int = 480):
    """Each frame of a clip, (H, W, 3) uint8 RGB, with its (H, W) uint8 mask.

    Args:
        first: (H, W) uint8 object ids of the first frame.
        size: short side of frames for the network, see `images.working_shape`; 0: their own.

    Raises:
        ValueError: the mask is of another size than the frames, or holds no object.
    """
    tracker = Tracker(model)
    first = clip.fit(first)
    for i, image in enumerate(clip.frames()):
        if i == 0:
            images.check_same_shape("frame 0", image.shape, "the mask", first.shape)
        small = images.scaled(image, size)
        step = tracker.step(model.normalized(small), None if i else first)
        mask = step.mask
        if mask.shape != image.shape[:2]:
            mask = decide(resized(step.probabilities, image.shape[:2]), step.object_ids,
                          tracker.threshold)
        yield image, mask


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Cut objects out of a clip, given their mask in its first frame, or a box "
                    "around each, by an export of a checkpoint; PyTorch isn't needed.")
    add = parser.add_argument
    add("clip", type=Path, help="a video, an animation or a folder of frames")
    add("mask", type=Path, nargs="?", help="mask of the first frame; each value is an object")
    add("--box", type=int, nargs=4, metavar=("X", "Y", "W", "H"), action="append", default=[],
        help="no mask at hand: the object is in this box; once for each object")
    add("--point", type=int, nargs="+", metavar="X Y", action="append", default=[],
        help="no mask at hand: these pixels are on the object; once for each object")
    add("--not_point", type=int, nargs="+", metavar="X Y", action="append", default=[],
        help="these pixels are not on it; once for each object")
    add("--results_dir", "-j", type=Path, metavar="DIR", required=True,
        help="masks/ and overlay.mp4 go there, in place of those of an earlier run of this script")
    add("--model_load", "-o", type=Path, metavar="DIR", default=DEFAULT,
        help="the export (default: models/lite)")
    add("--size", type=int, default=480, metavar="PIXELS",
        help="short side of frames for the network, smaller ones enlarged up to twice; 0: the "
             "frame's own (default: 480)")
    add("--threads", type=int, default=0, metavar="N", help="of onnxruntime; 0: all cores")
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
    """One line for what a user can mend; None for an error of ours."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # as onnxruntime says
        return "out of memory, which a smaller --size needs less of"
    return errors.explained(error)


def segment(args: argparse.Namespace) -> None:
    if args.size and args.size < 16:
        raise ValueError(f"--size: expected 0 or at least 16, got {args.size}")
    if args.threads < 0:
        raise ValueError(f"--threads: expected at least 0, got {args.threads}")
    if (args.mask is None) == (not args.box and not args.point):
        raise ValueError("expected a mask of the first frame, or else --box or --point")
    for values in (*args.point, *args.not_point):
        if len(values) % 2:
            raise ValueError(f"--point, --not_point: expected pairs of numbers, X Y, got {values}")
    given = [args.mask] if args.mask else []
    clip = open_clip(args.clip, given)
    check_no_overlap([args.results_dir / name for name in ("masks", "overlay.mp4")],
                     [args.clip, *given])
    model = load(args.model_load, args.threads)
    if args.mask:
        first = read_masks({0: [args.mask]}, frame_names={0: clip.frame_name(0)})[0]
    else:
        first = predict_masks(model, next(clip.frames()), group_by_object(
            args.box, args.point, args.not_point))
    with lock_folder(args.results_dir):
        replaces = made_here(args.results_dir)
        if not args.mask:
            path = args.results_dir / f"mask_{clip.frame_name(0)}.png"
            images.write_mask(path, first)
            print(f"the mask that this run starts from: {path}")
        count = 0
        with VideoWriter(args.results_dir / "overlay.mp4", clip.fps, clip.path) as film:
            frames = masks(clip, first, model, args.size)
            for image, mask in progress(frames, desc="frames", total=clip.count or None):
                if count == 0:  # not before: a mask that is refused costs no earlier results
                    begin(args.results_dir, clip.path, replaces)
                images.write_mask(args.results_dir / "masks" / f"{clip.frame_name(count)}.png",
                                  mask)
                film.write(drawing.overlay(image, mask), clip.time(count))
                count += 1
    print(f"{count} frames: masks, overlay.mp4 in {args.results_dir}")


def made_here(results: Path) -> bool:
    """Whether an earlier run of this script made what lies in a results folder.

    Raises:
        ValueError: `main.py` made it, and goes by what it knows of its files.
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


def begin(results: Path, clip: Path, replaces: bool) -> None:
    """Write what makes the results; delete an earlier clip's, which might have more frames."""
    if replaces:
        for old in (*(results / "masks").glob("*.png"), results / "overlay.mp4"):
            old.unlink(missing_ok=True)
    files.write(results / "manifest.json", json.dumps({
        "program": PROGRAM, "data": str(clip.resolve()),
        "versions": f"videomatch {version.__version__}"}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
