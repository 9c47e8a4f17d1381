"""`-m segment` on a camera or stream: tracks objects until Ctrl+C, a time limit or its end."""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from cli import setup
from masks.read import read_masks
from media import figures, images
from media.background import progress
from media.files import lock_folder
from media.live import LiveClip
from outputs import writers
from outputs.run_folder import RunFolder
from tracking import live, pipeline, prompting
from videomatch import VideoMatch
from webapp import session
from webapp.live import LiveSession


def run(args: argparse.Namespace) -> None:
    prompted = bool(args.mask or args.box or args.point)
    if args.page is not None or not prompted:
        session.check_page(args.page)
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    results = args.results_dir or Path("results") / time.strftime("live-%Y%m%d-%H%M%S")
    model = setup.load_for_inference(args)
    with lock_folder(results), LiveClip(args.video, args.seconds) as clip:
        folder = RunFolder(results, setup.run_metadata(args, model, {
            "data": f"{clip.name} from {began}"}), args.overwrite)
        if folder.replaces:
            writers.delete_outputs(results, {Path(name).resolve() for name in args.mask})
        folder.start([results / "masks", results / "cutout"])
        options = pipeline.Options(**setup.pipeline_options(args))
        sinks = writers.clip_sinks(results, clip, args.cutout, args.cutout_format)
        if args.page is None and prompted:
            count = record(args, model, clip, options, sinks)
        else:
            count = show_page(args, LiveSession(model, clip, results, options,
                                                partial(prompting.predict_mask, model), sinks))
    print(f"{count} frames: masks, overlay.mp4" + (" and cut-out" if args.cutout else "")
          + f" in {results}; {clip.skipped} of {clip.count + clip.skipped} received frames skipped"
          if count else "no object was tracked, so nothing was written")


def record(args: argparse.Namespace, model: VideoMatch, clip: LiveClip, options: pipeline.Options,
           sinks: list[pipeline.Sink]) -> int:
    """Track the objects that the flags point out in the first frame; returns the frames written."""
    changes: SimpleQueue[live.Reference | live.Removal] = SimpleQueue()
    frames = live.track(model, clip, changes, options)
    first = next(frames, None)
    if first is None:  # --seconds is over
        return 0
    changes.put(live.Reference(first.index, first.image, first_mask(args, model, clip,
                                                                    first.image)))
    bar = progress(frames, desc="frames", unit="frame")
    return until_stopped(clip, lambda: pipeline.drain(
        bar, sinks, on_frame=lambda _: bar.set_postfix(skipped=clip.skipped, refresh=False)))


def first_mask(args: argparse.Namespace, model: VideoMatch, clip: LiveClip,
               image: np.ndarray) -> np.ndarray:
    """The (H, W) uint8 mask of the first frame, from --mask, or from --box and --point."""
    if not args.mask:
        return prompting.predict_masks(model, image, prompting.group_by_object(
            args.box, args.point, args.negative_point))
    mask = clip.fit(next(iter(read_masks({0: [Path(name) for name in args.mask]}).values())))
    images.check_same_shape(clip.name, clip.shape, f"--mask {args.mask[0]}", mask.shape)
    return mask


def show_page(args: argparse.Namespace, page: LiveSession) -> int:
    """Serve the page until Ctrl+C or the end of the clip; returns the number of frames written."""
    from webapp import server  # here, because only the page needs its packages

    def serve() -> None:
        server.serve(page, args.page or 0, figures.has_browser(),
                     args.page_host or ["127.0.0.1"])

    return until_stopped(page.clip, page.run, serve)


def until_stopped(clip: LiveClip, track: Callable[[], int],
                  meanwhile: Callable[[], object] | None = None) -> int:
    """Call `track` in a thread; Ctrl+C ends the clip, so that everything is written to its end.

    Args:
        meanwhile: called in this thread; when it returns, the clip ends too. None waits for
            `track`.
    """
    with ThreadPoolExecutor(1) as pool:
        tracking = pool.submit(track)
        with closing(clip), suppress(KeyboardInterrupt):
            if meanwhile is not None:
                meanwhile()
            while meanwhile is None and not tracking.done():
                wait([tracking], timeout=0.5)  # on Windows a longer wait would delay Ctrl+C
        return tracking.result()
