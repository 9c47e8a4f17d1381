"""Layers that make identities hard: duplicates, swarms, disappearances, thin parts.

`samples` makes the cut-outs from images and videos, and mixes these layers into training clips.
"""

import math

import cv2
import numpy as np

from training import warps
from training.synthetic_motion import MAX_SCALE, moving_layer
from training.warps import Cutout, Layer, linear_maps

# Range of the speed of duplicates that pass their original, in widths of the frame per frame of the
# clip: from lingering in front of it to passing within a frame.
SPEED = (0.02, 0.15)
# Standard deviation of the distance at which it passes, in sizes of the duplicate: most overlap.
PASSING = 0.35
# Size of a swarm's members, as `synthetic_motion.SIZE`: fish, birds, people seen from afar.
SMALL = (0.03, 0.1)
# Standard deviation of a swarm's positions, as a share of the frame's width: from a crowd in which
# all touch to one spread over the frame.
SPREAD = (0.08, 0.3)
VANISHES = 0.12  # chance that a pasted object is not visible for a frame or two
LINE = (0.4, 1.6)  # length of a line on an object, relative to the object's longer side
LINE_WIDTH = (2, 5)  # pixels of a cut-out; thinner lines would not survive its soft edges
LONGEST_LINE = 250  # pixels; the cut-out grows by as much on all sides, which costs time


def crossing_layer(rng, cutouts: list[Cutout | None], path: np.ndarray, scale: float,
                   shape: tuple[int, int]) -> Layer:
    """Return a layer of a duplicate that meets its original, or passes close by, and moves on.

    Args:
        cutouts: T, of the duplicate.
        path: (T, 2), x and y of the original's centre in each frame.
        scale: magnification that makes the duplicate about as large as the original.
        shape: (H, W) of the frames.
    """
    frames, (_, width) = len(cutouts), shape
    first = next(c for c in cutouts if c)
    meeting = int(rng.integers(1, frames))
    angle, speed = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(*np.log(SPEED))) * width
    steps = np.arange(frames)[:, None] - meeting
    offset = rng.normal(0, PASSING, 2) * first.ids.shape[::-1] * scale
    direction = np.array([np.cos(angle), np.sin(angle)])
    position = path[meeting] + offset + steps * speed * direction
    linear = linear_maps(rng.normal(0, warps.TURN, 1), np.array([scale]), np.zeros(1))
    linear[..., 0] *= rng.choice((-1, 1))
    return moving_layer(rng, cutouts, np.broadcast_to(linear, (frames, 2, 2)), position, shape,
                        False, natural=meeting, leaves=0)


def swarm_layers(rng, members: list[list[Cutout | None]], shape: tuple[int, int]) -> list[Layer]:
    """Return layers of small look-alikes whose paths cross.

    Args:
        members: T cut-outs for each member, of one object at different times.
        shape: (H, W) of the frames.
    """
    height, width = shape
    size, spread = (np.exp(rng.uniform(*np.log(bounds))) for bounds in (SMALL, SPREAD))
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    layers = []
    for cutouts in members:
        frames = len(cutouts)
        first = next(c for c in cutouts if c)
        root = np.sqrt(np.count_nonzero(first.ids)) / np.sqrt(height * width)
        scale = min(size / root * np.exp(rng.normal(0, 0.1)), MAX_SCALE)
        start = middle + rng.normal(0, spread * width, 2)
        speed = rng.normal(0, size * width / 2, 2)  # about half of a member's size per frame
        linear = linear_maps(rng.uniform(0, 2 * np.pi, 1), np.array([scale]), np.zeros(1))
        position = start + np.arange(frames)[:, None] * speed
        layers.append(moving_layer(rng, cutouts, np.broadcast_to(linear, (frames, 2, 2)), position,
                                   shape, False, leaves=0))
    return layers


def stationary_layer(cutouts: list[Cutout | None]) -> Layer:
    """Return a layer of a video's own object where it is, to occlude what was pasted before."""
    frames = len(cutouts)
    return Layer(cutouts, np.repeat(np.eye(2, 3)[None], frames, 0),
                 np.zeros((frames, warps.MESH, warps.MESH, 2), np.float32))


def maybe_vanish(rng, layer: Layer) -> Layer:
    """Make a layer invisible for a frame or two with chance `VANISHES`; changes it in place.

    Frames 0 and 1 and the last one stay: the object is introduced, lost and found again.
    """
    frames = len(layer.cutouts)
    if frames > 4 and rng.random() < VANISHES:
        start, count = int(rng.integers(2, frames - 1)), int(rng.integers(1, 3))
        for t in range(start, min(start + count, frames - 1)):
            layer.cutouts[t] = None
    return layer


def add_lines(rng, cutouts: list[Cutout | None]) -> list[Cutout | None]:
    """Draw one to three swinging lines that belong to the object: a pole, a rope, a leash."""
    first = next(c for c in cutouts if c)
    longest = max(first.ids.shape)
    corner, colour = rng.uniform(0.1, 0.9, 2), rng.integers(0, 256, 3)
    lines = []
    for _ in range(int(rng.integers(1, 4))):
        length = np.exp(rng.uniform(*np.log(LINE))) * longest
        lines.append((rng.uniform(0, 2 * np.pi), min(length, LONGEST_LINE), rng.normal(0, 0.1),
                      int(rng.integers(LINE_WIDTH[0], LINE_WIDTH[1] + 1))))
    swing = warps.random_path(rng, len(cutouts), math.radians(4))
    return [cutout and _with_lines(cutout, corner, colour,
                                   [(angle + turn, *others) for angle, *others in lines])
            for cutout, turn in zip(cutouts, swing)]


def _with_lines(cutout: Cutout, corner: np.ndarray, colour: np.ndarray, lines: list) -> Cutout:
    """Return a larger cut-out with lines that start at the object's pixel nearest to `corner`.

    Args:
        corner: (x, y) as shares of the cut-out's size.
        colour: (3,) RGB.
        lines: (angle, length, bend, width) each; radians and pixels.
    """
    rows, columns = np.nonzero(cutout.ids)
    x, y = corner * cutout.ids.shape[::-1]
    nearest = np.hypot(columns - x, rows - y).argmin()
    margin = int(max(length for _, length, _, _ in lines)) + LINE_WIDTH[1] + 3
    image = cv2.copyMakeBorder(cutout.image, *[margin] * 4, cv2.BORDER_REPLICATE)
    ids = cv2.copyMakeBorder(cutout.ids, *[margin] * 4, cv2.BORDER_CONSTANT)
    start = np.array([columns[nearest], rows[nearest]]) + margin
    for angle, length, bend, width in lines:
        half = start + length / 2 * np.array([np.cos(angle), np.sin(angle)])
        end = half + length / 2 * np.array([np.cos(angle + bend), np.sin(angle + bend)])
        points = np.rint([start, half, end]).astype(np.int32)
        drawn = cv2.polylines(np.zeros_like(ids), [points], False, 1, width)
        free = (drawn > 0) & (ids == 0)  # behind the object
        image[free], ids[free] = colour, cutout.ids[rows[nearest], columns[nearest]]
    left, top = cutout.corner
    return Cutout(image, ids, (left - margin, top - margin), cutout.cut)


def object_path(masks: list[np.ndarray], object_id: int) -> np.ndarray | None:
    """Return (T, 2), x and y of an object's centre in each mask; None if no mask shows it.

    Where a mask does not show the object, the nearest frame that does counts.
    """
    centers: list[np.ndarray | None] = []
    for mask in masks:
        rows, columns = np.nonzero(mask == object_id)
        centers.append(np.array([columns.mean(), rows.mean()]) if len(rows) else None)
    visible = [t for t, center in enumerate(centers) if center is not None]
    return np.stack([centers[min(visible, key=lambda s: abs(s - t))]  # type: ignore[misc]
                     for t in range(len(centers))]) if visible else None
