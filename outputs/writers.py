"""What becomes of the masks of a clip: files, drawings, videos. Frames are handed in as they come.

Nothing here knows how a mask was found.
"""

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


class MaskSink(Sink):
    """A palette PNG for each frame, named as the clip names it."""

    def __init__(self, folder: Path, clip: Clip):
        self.folder, self.clip = folder, clip
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame) -> None:
        if frame.step is not None:
            images.write_mask(self.folder / f"{self.clip.frame_name(frame.index)}.png", frame.mask)


class ImageSink(Sink):
    """An image file for each frame, of what `draw` makes of it."""

    def __init__(self, folder: Path, clip: Clip, draw: Callable[[Frame], np.ndarray],
                 again: bool = False):
        self.folder, self.clip, self.draw, self.again = folder, clip, draw, again
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame) -> None:
        path = self.folder / f"{self.clip.frame_name(frame.index)}.png"
        # an earlier run knew the probabilities of a frame that it met
        if frame.step is not None or self.again or not path.is_file():
            images.write_image(path, self.draw(frame))


class VideoSink(Sink):
    """A video of what `draw` makes of each frame, RGB or RGBA.

    Frames before the first mask come last to first, and a video is written first to last. So what
    was drawn of them waits in a file, as JPEG, which the video's own loss hides, or PNG.
    """

    QUALITY = 97

    def __init__(self, path: Path, clip: Clip, draw: Callable[[Frame], np.ndarray]):
        self.clip, self.draw, self.video = clip, draw, VideoWriter(path, clip.fps, clip.path)
        self.waiting: list[tuple[int, int, int]] = []  # frame, where in the file, how long
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def write(self, frame: Frame) -> None:
        picture = self.draw(frame)
        if frame.forward:
            self._flush()
            self.video.write(picture, self.clip.time(frame.index))
            return
        # channels keep their order, which neither of the two minds
        _, data = (cv2.imencode(".png", picture) if picture.shape[2] == 4 else
                   cv2.imencode(".jpg", picture[..., ::-1],
                                [cv2.IMWRITE_JPEG_QUALITY, self.QUALITY]))
        self.waiting.append((frame.index, self.file.tell(), len(data)))
        self.file.write(data.tobytes())

    def _flush(self) -> None:
        while self.waiting:
            index, place, length = self.waiting.pop()
            self.file.seek(place)
            data = np.frombuffer(self.file.read(length), np.uint8)
            picture = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
            self.video.write(picture if picture.shape[2] == 4 else picture[..., ::-1],
                             self.clip.time(index))

    def __exit__(self, *exception):
        self.file.close()
        self.video.__exit__(*exception)


def cutout_name(how: str, form: str = "png") -> str:
    """Of the folder or file that a cut-out goes to.

    Args:
        how: "transparent", "blur" or "#rrggbb".
        form: of a transparent one, "png" for a folder of pictures, "mov" or "webm".
    """
    if how != "transparent":
        return "cutout.mp4"
    return "cutout" if form == "png" else f"cutout.{form}"


def delete_outputs(folder: Path, inputs: set[Path]) -> None:
    """Take away what an earlier run left, which a shorter clip wouldn't replace.

    Args:
        inputs: files that stay, as they are read: resolved.
    """
    for old in (*folder.glob("masks/*.png"), *folder.glob("cutout/*.png"),
                *folder.glob("labels/*.txt"), folder / "overlay.mp4", *folder.glob("cutout.*"),
                folder / "confidence.csv", folder / "annotations.json", folder / "tracks.csv",
                folder / "data.yaml"):
        if old.is_file() and old.resolve() not in inputs:
            old.unlink()
    for name in ("cutout", "labels"):
        with suppress(OSError):
            (folder / name).rmdir()


def cutout_image(frame: Frame) -> np.ndarray:
    """(H, W, 4) RGBA: the objects, with soft edges, by their probabilities where these are known.

    Only what the mask holds can be seen: the outer half of an edge is more of the background.
    """
    if frame.step is None or frame.mask_override is not None:
        alpha = drawing.soft(frame.mask)
    else:
        height, width = frame.image.shape[:2]
        background = cv2.resize(frame.step.probabilities[0].cpu().numpy(), (width, height),
                                interpolation=cv2.INTER_LINEAR)
        alpha = drawing.soft(frame.mask, 1 - background, frame.tracker.threshold)
    return drawing.transparent(frame.image, np.where(frame.mask > 0, alpha, 0).astype(np.uint8))


def clip_sinks(folder: Path, clip: Clip, cutout: str | None = None, form: str = "png",
              again: bool = False) -> list[Sink]:
    """What `-m segment` writes into a results folder.

    Args:
        cutout, form: as for `cutout_name`; None: no cut-out.
        again: pictures that are there are drawn again.
    """
    found: list[Sink] = [MaskSink(folder / "masks", clip),
                         VideoSink(folder / "overlay.mp4", clip, lambda frame:
                              drawing.overlay(frame.image, frame.mask))]
    if not cutout:
        return found
    path = folder / cutout_name(cutout, form)
    if cutout == "transparent":
        found.append(VideoSink(path, clip, cutout_image) if path.suffix else
                     ImageSink(path, clip, cutout_image, again))
    else:
        found.append(VideoSink(path, clip, lambda frame: drawing.replace_background(
            frame.image, frame.mask, cutout)))
    return found
