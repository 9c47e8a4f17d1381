"""Prompts for one object in one frame: boxes, points and the current mask."""

from dataclasses import dataclass, field, replace

import numpy as np


@dataclass
class Prompts:
    """Prompts for one object in one frame, in pixels of the frame.

    Args:
        boxes: around the object or its parts; x, y of the upper left corner, width, height.
        points: x, y of positive points, on the object.
        negative_points: x, y of negative points, not on the object.
        mask: (H, W) bool, the current mask; None if there is none yet.
    """

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    negative_points: list[tuple[float, float]] = field(default_factory=list)
    mask: np.ndarray | None = None

    def extended(self, box: tuple[float, float, float, float] | None,
                 point: tuple[float, float] | None, positive: bool) -> "Prompts":
        """Return the prompts with one more positive or negative point, or with a new box alone."""
        if box:
            return Prompts([box])
        if positive:
            return replace(self, points=[*self.points, point])
        return replace(self, negative_points=[*self.negative_points, point])

    def cropped(self, crop: tuple[slice, slice], shape: tuple[int, int]) -> "Prompts":
        """Return the prompts in the coordinates of a cropped and resized frame.

        Args:
            crop: its rows and columns.
            shape: (H, W) that the crop is resized to.
        """
        rows, columns = crop
        tall = shape[0] / (rows.stop - rows.start)
        wide = shape[1] / (columns.stop - columns.start)

        def move(points):  # by half a pixel, as points name pixels, whose centres are scaled
            return [((x + 0.5 - columns.start) * wide - 0.5, (y + 0.5 - rows.start) * tall - 0.5)
                    for x, y in points]

        boxes = [((x - columns.start) * wide, (y - rows.start) * tall, w * wide, h * tall)
                 for x, y, w, h in self.boxes]
        mask = None if self.mask is None else self.mask[crop]
        return Prompts(boxes, move(self.points), move(self.negative_points), mask)
