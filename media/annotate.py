"""A first mask where there is none: from a box, or drawn in a window."""

import cv2
import numpy as np

from media import drawing, figures

ITERATIONS = 5  # of GrabCut
BRUSH = 0.02  # radius, as a share of the frame's height


def mask_from_box(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The object in a box, by OpenCV's GrabCut: what differs in colour from all around the box.

    Args:
        image: (H, W, 3) uint8 RGB.
        box: x, y of its upper left corner, width, height, in pixels; some of the frame must be
            left around it.

    Returns:
        (H, W) uint8, 1 on the object.

    Raises:
        ValueError: the box isn't in the frame, or GrabCut found nothing in it.
    """
    height, width = image.shape[:2]
    x, y, w, h = box
    if not (0 <= x < x + w <= width and 0 <= y < y + h <= height and w * h < width * height):
        raise ValueError(f"--box {x} {y} {w} {h}: expected a part of the frame of {width}x{height} "
                         "pixels, as x y width height")
    labels = np.zeros((height, width), np.uint8)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(image[..., ::-1].copy(), labels, box, *models, ITERATIONS, cv2.GC_INIT_WITH_RECT)
    mask = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8)
    if not mask.any():
        raise ValueError(f"--box {x} {y} {w} {h}: nothing in it differs from what is around it; "
                         "paint the mask with --annotate, or bring one with --mask")
    return mask


class Annotator:
    """A window in which a box is drawn and the mask is mended.

    Drag with the left button: a box, whose object is looked for. With shift and the left button
    paint, with the right button wipe. Enter, or closing the window, ends.

    Raises:
        ValueError: there is no display.
    """

    def __init__(self, image: np.ndarray):
        if not figures.has_display():
            raise ValueError("--annotate: there is no display for a window, give --box x y w h or "
                             "--mask FILE instead")
        self.image, self.mask = image, np.zeros(image.shape[:2], np.uint8)
        self.start: tuple[int, int] | None = None
        self.figure, self.axis = figures.canvas("drag a box · shift paints · right button wipes "
                                                  "· Enter ends")
        self.shown = self.axis.imshow(image)
        for event, handler in (("button_press_event", self._press), ("key_press_event", self._key),
                               ("motion_notify_event", self._move),
                               ("button_release_event", self._release)):
            self.figure.canvas.mpl_connect(event, handler)

    def run(self) -> np.ndarray:
        """Show the window until it is closed: (H, W) uint8, 1 on the object."""
        figures.wait(self.figure)
        if not self.mask.any():
            raise ValueError("--annotate: the window was closed without a mask")
        return self.mask

    def _press(self, event) -> None:
        if event.inaxes is self.axis:
            self.start = self._pixel(event)
            self._paint(event)

    def _move(self, event) -> None:
        if self.start is not None and event.inaxes is self.axis:
            self._paint(event)

    def _release(self, event) -> None:
        if self.start is None:
            return
        if self._brush(event) is None and event.inaxes is self.axis:
            (x, y), (u, v) = self.start, self._pixel(event)
            if abs(u - x) > 2 and abs(v - y) > 2:
                try:
                    self.mask = mask_from_box(self.image, (min(x, u), min(y, v), abs(u - x),
                                                           abs(v - y)))
                except ValueError as error:
                    self.axis.set_title(str(error), fontsize=8)
                self._show()
        self.start = None

    def _key(self, event) -> None:
        if event.key == "enter":
            figures.close(self.figure)

    @staticmethod
    def _pixel(event) -> tuple[int, int]:
        return round(event.xdata), round(event.ydata)

    @staticmethod
    def _brush(event) -> int | None:
        """What the button paints: 1 the object, 0 the background, None draws a box."""
        if event.button == 3:
            return 0
        return 1 if event.key == "shift" else None

    def _paint(self, event) -> None:
        value = self._brush(event)
        if value is not None:
            radius = max(1, round(BRUSH * len(self.mask)))
            cv2.circle(self.mask, self._pixel(event), radius, value, cv2.FILLED)
            self._show()

    def _show(self) -> None:
        self.shown.set_data(drawing.overlay(self.image, self.mask))
        self.figure.canvas.draw_idle()
