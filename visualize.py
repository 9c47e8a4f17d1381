"""What a person looks at: overlays, figures, videos, curves."""

import os
import sys
from pathlib import Path

import cv2
import numpy as np

from files import whole

Panel = tuple[str, np.ndarray]  # a title and an (H, W, 3) or (H, W) picture


def _davis_palette() -> np.ndarray:
    """(256, 3) uint8: the colour map of PASCAL VOC, which DAVIS uses for object ids.

    Bits 0, 1, 2 of the id, then 3, 4, 5 and so on, become bits 7, 6, ... of red, green, blue.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for shift in range(8):
        for channel in range(3):
            bit = (ids >> (3 * shift + channel)) & 1
            palette[:, channel] |= (bit << (7 - shift)).astype(np.uint8)
    return palette


PALETTE = _davis_palette()


def overlay(image: np.ndarray, mask: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Colour each object and draw its outline.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 0 background, else the object's id.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    blended = image * (1 - opacity) + PALETTE[mask] * opacity
    result = np.where(mask[..., None] > 0, blended, image).astype(np.uint8, order="C")
    for object_id in np.unique(mask[mask > 0]):
        contours, _ = cv2.findContours((mask == object_id).astype(np.uint8), cv2.RETR_CCOMP,
                                       cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(result, contours, -1, (255, 255, 255), 1)
    return result


def transparent(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB and (H, W) mask -> (H, W, 4) RGBA, opaque on the objects only."""
    return np.dstack([image, np.where(mask > 0, 255, 0).astype(np.uint8)])


def replace_background(image: np.ndarray, mask: np.ndarray, background: str) -> np.ndarray:
    """Objects on a colour, or in front of the frame's blurred background.

    Args:
        image, mask: (H, W, 3) uint8 RGB and (H, W) uint8.
        background: "blur" or "#rrggbb".
    """
    if background == "blur":
        size = max(image.shape) // 16 | 1
        behind = cv2.GaussianBlur(image, (size, size), 0)
    else:
        behind = np.full_like(image, [int(background[i:i + 2], 16) for i in (1, 3, 5)])
    return np.where(mask[..., None] > 0, image, behind)


class VideoWriter:
    """Write RGB frames to an mp4; opened at the first frame, which gives the size.

    Use as a context manager. A video codec wants even sides: odd frames lose a row or column.

    Raises:
        OSError: OpenCV can't write there, or the disk is full.
    """

    def __init__(self, path: str | Path, fps: float = 24):
        self.path, self.fps, self._file = Path(path), fps, whole(path)
        self._writer: cv2.VideoWriter | None = None

    def write(self, image: np.ndarray) -> None:
        """Append an (H, W, 3) uint8 RGB frame."""
        height, width = (side - side % 2 for side in image.shape[:2])
        if self._writer is None:
            self._beside = str(self._file.__enter__())
            self._writer = cv2.VideoWriter(self._beside, cv2.VideoWriter.fourcc(*"mp4v"),
                                           self.fps, (width, height))
            if not self._writer.isOpened():
                raise OSError(f"{self.path}: OpenCV can't write a video there")
        self._writer.write(np.ascontiguousarray(image[:height, :width, ::-1]))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._writer is None:
            return
        self._writer.release()
        # OpenCV doesn't tell when it could not write
        if exception[0] or cv2.VideoCapture(self._beside).isOpened():
            self._file.__exit__(*exception)
        else:
            error = OSError(f"{self.path}: OpenCV could not write it all, is the disk full?")
            self._file.__exit__(OSError, error, None)
            raise error


def grid(panels: list[Panel], columns: int):
    """A matplotlib figure of titled pictures; 2-D ones are probabilities in [0, 1]."""
    plt = _pyplot()
    rows = -(-len(panels) // columns)
    height, width = panels[0][1].shape[:2]
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(5 * columns, 5 * rows * height / width + 0.35 * rows))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, panels):
        axis.set_title(title)
        shown = axis.imshow(picture, vmin=0, vmax=1)
        if picture.ndim == 2:
            figure.colorbar(shown, ax=axis, fraction=0.03)
    return figure


def curves(path: str | Path, history: list[dict]) -> None:
    """Write the training loss and the held-out IoU over iterations to a PNG.

    Args:
        history: reports with `iteration`, `loss` (None before the first) and `held_out_iou`
            (None where no sequences are held out).
    """
    plt = _pyplot()
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    iterations = [report["iteration"] for report in history]
    losses, ious = ([np.nan if report[name] is None else report[name] for report in history]
                    for name in ("loss", "held_out_iou"))
    top.plot(iterations, losses, marker=".")
    top.set_ylabel("training loss")
    bottom.plot(iterations, ious, marker=".", color="tab:green")
    bottom.set_ylabel("IoU on held-out sequences")
    bottom.set_xlabel("iteration")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    with whole(path) as beside:
        figure.savefig(beside, dpi=100)
    plt.close(figure)


def show_or_save(figure, path: Path | None, default: Path) -> None:
    """Open a window, or write the figure to `path`; without a display, to `default`."""
    plt = _pyplot()
    if path is None and not has_display():
        print("no display, so the figure is saved instead")
        path = default
    if path is None:
        plt.show()
    else:
        with whole(path) as beside:
            figure.savefig(beside, dpi=100)
        print(f"saved {path}")
    plt.close(figure)


def canvas(title: str):
    """An empty figure and its axis, for a window to draw in."""
    figure, axis = _pyplot().subplots(layout="constrained", figsize=(12, 7))
    axis.axis("off")
    axis.set_title(title)
    return figure, axis


def wait(figure) -> None:
    """Show a figure's window until it is closed."""
    _pyplot().show()
    close(figure)


def close(figure) -> None:
    _pyplot().close(figure)


def has_display() -> bool:
    """Whether a window can be opened."""
    if os.environ.get("MPLBACKEND", "").lower() == "agg":
        return False
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _pyplot():
    # matplotlib takes a second to import, and evaluation may never need it
    import matplotlib
    if not has_display():
        matplotlib.use("agg")
    import matplotlib.pyplot as plt
    return plt
