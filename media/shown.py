"""Prompts for one object in one frame: boxes, points and the mask so far."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Prompts:
    """Prompts for one object in one frame, in pixels of the frame.

    Args:
        boxes: around the object or its parts; x, y of the upper left corner, width, height.
        points: x, y of positive points, on the object.
        not_points: x, y of negative points, not on the object.
        mask: (H, W) bool, the current mask; None if there is none yet.
    """

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    not_points: list[tuple[float, float]] = field(default_factory=list)
    mask: np.ndarray | None = None

    def seen(self, part: tuple[slice, slice], shape: tuple[int, int]) -> "Prompts":
        """Return the prompts in the coordinates of a cropped and resized frame.

        Args:
            part: rows and columns of the crop.
            shape: (H, W) that the crop is resized to.
        """
        rows, columns = part
        tall = shape[0] / (rows.stop - rows.start)
        wide = shape[1] / (columns.stop - columns.start)

        def moved(points):
            return [((x + 0.5 - columns.start) * wide - 0.5, (y + 0.5 - rows.start) * tall - 0.5)
                    for x, y in points]

        boxes = [((x - columns.start) * wide, (y - rows.start) * tall, w * wide, h * tall)
                 for x, y, w, h in self.boxes]
        mask = None if self.mask is None else self.mask[part]
        return Prompts(boxes, moved(self.points), moved(self.not_points), mask)
