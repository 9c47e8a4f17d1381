"""Sinks that write a clip's results: mask files, the overlay video and cut-outs."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from media import drawing, images
from media.clip import Clip
from media.writer import VideoWriter
from tracking.pipeline import Frame, Sink

# JPEG quality of frames buffered on disk before they are encoded: the video codec's
# own loss hides that of JPEG. Lossless PNG would take more time and disk space.
BUFFER_QUALITY = 97


class MaskSink(Sink):
    """Writes a palette PNG per frame, named after the clip's frame."""

    def __init__(self, folder: Path, clip: Clip):
        self.folder, self.clip = folder, clip
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame) -> None:
        if frame.step is not None:  # else the mask was read from this very file
            images.write_mask(self.folder / f"{self.clip.frame_name(frame.index)}.png", frame.mask)


class ImageSink(Sink):
    """Writes an image file per frame.

    Args:
        draw: makes the (H, W, 3) RGB or (H, W, 4) RGBA uint8 image of a frame.
        redraw: replace images of frames that were not segmented in this run, too.
    """

    def __init__(self, folder: Path, clip: Clip, draw: Callable[[Frame], np.ndarray],
                 redraw: bool = False):
        self.folder, self.clip, self.draw, self.redraw = folder, clip, draw, redraw
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame) -> None:
        path = self.folder / f"{self.clip.frame_name(frame.index)}.png"
        # An interrupted run drew this image from probabilities, which are not saved. Drawn again
        # from the mask it would lose its soft edges.
        if frame.step is not None or self.redraw or not path.is_file():
            images.write_image(path, self.draw(frame))


class VideoSink(Sink):
    """Writes a video of the frames.

    Frames before the first user mask arrive last to first, but a video is encoded first to last.
    Their drawings are buffered in a temporary file until the forward direction starts.

    Args:
        path: the suffix selects the format, see `VideoWriter`.
        draw: makes the (H, W, 3) RGB or (H, W, 4) RGBA uint8 image of a frame.
    """

    def __init__(self, path: Path, clip: Clip, draw: Callable[[Frame], np.ndarray]):
        self.clip, self.draw, self.video = clip, draw, VideoWriter(path, clip.fps, clip.path)
        self.buffered: list[tuple[int, int, int]] = []  # frame index, position in file, bytes
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def write(self, frame: Frame) -> None:
        picture = self.draw(frame)
        if frame.forward:
            self._encode_buffered()
            self.video.write(picture, self.clip.time(frame.index))
            return
        # JPEG has no alpha channel. Its colours are encoded as BGR; PNG treats all channels alike,
        # so RGBA needs no conversion as long as it is decoded the same way.
        _, data = (cv2.imencode(".png", picture) if picture.shape[2] == 4 else
                   cv2.imencode(".jpg", picture[..., ::-1],
                                [cv2.IMWRITE_JPEG_QUALITY, BUFFER_QUALITY]))
        self.buffered.append((frame.index, self.file.tell(), len(data)))
        self.file.write(data.tobytes())

    def _encode_buffered(self) -> None:
        """Encode the buffered frames, first to last: the reverse of how they were added."""
        while self.buffered:
            index, position, length = self.buffered.pop()
            self.file.seek(position)
            data = np.frombuffer(self.file.read(length), np.uint8)
            picture = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
            self.video.write(picture if picture.shape[2] == 4 else picture[..., ::-1],
                             self.clip.time(index))

    def __exit__(self, *exception):
        self.file.close()
        self.video.__exit__(*exception)


def cutout_name(how: str, file_format: str = "png") -> str:
    """Name of the folder or file of a cut-out.

    Args:
        how: "transparent", "blur" or "#rrggbb".
        file_format: of a transparent one: "png" for a folder of images, "mov" or "webm".
    """
    if how != "transparent":
        return "cutout.mp4"
    return "cutout" if file_format == "png" else f"cutout.{file_format}"


def delete_outputs(folder: Path, inputs: set[Path]) -> None:
    """Delete the outputs of an earlier run; a shorter clip would not overwrite all of them.

    Args:
        inputs: resolved paths of files that stay, such as a corrected mask in masks/.
    """
    for old in (*folder.glob("masks/*.png"), *folder.glob("cutout/*.png"),
                *folder.glob("labels/*.txt"), folder / "overlay.mp4", *folder.glob("cutout.*"),
                folder / "confidence.csv", folder / "annotations.json", folder / "tracks.csv",
                folder / "data.yaml"):
        if old.is_file() and old.resolve() not in inputs:
            old.unlink()
    for name in ("cutout", "labels"):
        with suppress(OSError):  # missing, or it holds files of the user
            (folder / name).rmdir()


def cutout_image(frame: Frame) -> np.ndarray:
    """(H, W, 4) uint8 RGBA: the objects, with soft edges.

    Edges follow the probabilities if the frame was segmented in this run, else the mask is
    blurred. Pixels outside the mask stay transparent: on the outer half of an edge, background
    colours dominate and would show as a fringe.
    """
    if frame.step is None or frame.mask_override is not None:
        alpha = drawing.soft(frame.mask)
    else:
        height, width = frame.image.shape[:2]
        background = cv2.resize(frame.step.probabilities[0].cpu().numpy(), (width, height),
                                interpolation=cv2.INTER_LINEAR)
        alpha = drawing.soft(frame.mask, 1 - background, frame.tracker.threshold)
    return drawing.transparent(frame.image, np.where(frame.mask > 0, alpha, 0).astype(np.uint8))


def clip_sinks(folder: Path, clip: Clip, cutout: str | None = None, file_format: str = "png",
               redraw: bool = False) -> list[Sink]:
    """The sinks of `-m segment`: masks/, overlay.mp4 and the cut-out.

    Args:
        folder: the results folder.
        cutout, file_format: as for `cutout_name`; None for no cut-out.
        redraw: as for `ImageSink`.
    """
    sinks: list[Sink] = [MaskSink(folder / "masks", clip),
                         VideoSink(folder / "overlay.mp4", clip, lambda frame:
                                   drawing.overlay(frame.image, frame.mask))]
    if not cutout:
        return sinks
    path = folder / cutout_name(cutout, file_format)
    if cutout == "transparent":
        sinks.append(VideoSink(path, clip, cutout_image) if path.suffix else
                     ImageSink(path, clip, cutout_image, redraw))
    else:
        sinks.append(VideoSink(path, clip, lambda frame: drawing.replace_background(
            frame.image, frame.mask, cutout)))
    return sinks
