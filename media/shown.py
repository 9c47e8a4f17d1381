"""What a person shows of one object in one frame. Who makes a mask of it is not known here."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Prompts:
    """What a person showed of one object in one frame, in pixels of the frame.

    Args:
        boxes: around it or its parts, each x, y of the upper left corner, width, height.
        points, not_points: x, y on the object, and not on it.
        mask: (H, W) bool, the mask so far.
    """

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    not_points: list[tuple[float, float]] = field(default_factory=list)
    mask: np.ndarray | None = None

    def seen(self, part: tuple[slice, slice], shape: tuple[int, int]) -> "Prompts":
        """The same in a part of the frame that is resized: rows and columns, and its new (H, W)."""
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
