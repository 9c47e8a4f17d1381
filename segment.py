"""Segment a clip of one's own, from one mask or several, and draw the result."""

import itertools
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import evaluate
import preprocess
from media import drawing, images, writer
from media.background import Background, ahead
from media.masks import read_mask
from media.video import Clip
from videomatch import VideoMatch


@dataclass
class Options(evaluate.Options):
    """What `segment` needs to know beside model, clip and masks; `results` must be given."""

    cutout: str | None = None  # "transparent", "blur" or "#rrggbb"


@torch.no_grad()
def segment(model: VideoMatch, clip: Clip, masks: dict[int, np.ndarray], options: Options) -> int:
    """Write the mask of every frame, then draw them.

    From the first frame with a mask the clip is segmented forwards to its end, then backwards to
    its start. An object is looked for from the first frame on whose mask holds it.

    Args:
        masks: (H, W) uint8 object ids of frames, at least one.

    Returns:
        How many frames there are.

    Raises:
        ValueError: a mask is of another size than the frame, or of a frame that isn't there.
    """
    model.eval()
    _check_frames(masks, clip.count or max(masks) + 1)
    first = min(masks)
    reference = next(iter(clip.frames(first)), None)
    if reference is None:
        raise ValueError(f"--mask: the clip ends before frame {first}, counted from 0")
    if options.adapt:
        model = options.adapt(model, reference, masks[first])
    folder = options.results / "masks"
    folder.mkdir(parents=True, exist_ok=True)
    count = first

    def write(frame: int, mask: np.ndarray) -> None:
        images.write_mask(folder / f"{clip.name(frame)}.png", mask)

    with Background(write) as writer, ThreadPoolExecutor(1) as pool:
        bar = tqdm(_read(pool, clip.frames(first)), desc="frames", disable=None, unit="frame")
        for frame, image in enumerate(bar, start=first):
            writer(frame, _step(model, frame, image, masks, options))
            count = frame + 1
        _check_frames(masks, count)
        if first:
            _step(model, first, reference, masks, options, restart=True)
            bar = tqdm(_read(pool, clip.backwards(first)), total=first, desc="frames before",
                       disable=None, unit="frame")
            for frame, image in zip(range(first - 1, -1, -1), bar):
                writer(frame, _step(model, frame, image, {}, options))
    render(clip, options)
    return count


def _check_frames(masks: dict[int, np.ndarray], count: int) -> None:
    missing = [frame for frame in masks if frame >= count]
    if missing:
        raise ValueError(f"--mask: there is no frame {missing[0]}, the clip has {count} frames, "
                         "counted from 0")


def _read(pool: Executor, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames, decoded ahead; the pool has one thread, so they stay in order."""
    end = object()
    for frame in ahead(pool, lambda _: next(frames, end), itertools.count()):
        if frame is end:
            return
        yield frame


def _step(model: VideoMatch, frame: int, image: np.ndarray, masks: dict[int, np.ndarray],
          options: Options, restart: bool = False) -> np.ndarray:
    """(H, W) uint8 mask of a frame: the given one, or what the model finds."""
    tensor = preprocess.to_tensor(image, options.input_shape, model.device)
    if frame not in masks:
        return evaluate.segment(model, tensor, image.shape[:2], options)
    mask = masks[frame]
    images.check_same_shape(f"frame {frame}", image.shape, f"--mask for frame {frame}",
                                mask.shape)
    if frame == min(masks) or restart:
        model.set_reference(tensor, mask)
    else:
        model.add_reference(tensor, mask)
    return mask


def render(clip: Clip, options: Options) -> None:
    """Draw the masks in the results folder: the overlay, and the cut-out if there is to be one."""
    with ExitStack() as files:
        def video(name: str) -> writer.VideoWriter:
            return files.enter_context(writer.VideoWriter(options.results / name, clip.fps))

        overlay = video("overlay.mp4")
        if options.cutout == "transparent":
            (options.results / "cutout").mkdir(exist_ok=True)
        elif options.cutout:
            cutout = video("cutout.mp4")
        for frame, image in enumerate(tqdm(clip.frames(), desc="drawing", disable=None)):
            name = f"{clip.name(frame)}.png"
            mask = read_mask(options.results / "masks" / name)
            overlay.write(drawing.overlay(image, mask))
            if options.cutout == "transparent":
                images.write_image(options.results / "cutout" / name,
                                       drawing.transparent(image, mask))
            elif options.cutout:
                cutout.write(drawing.replace_background(image, mask, options.cutout))
