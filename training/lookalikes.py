"""What makes identities hard: duplicates that cross, swarms, things that vanish or have thin parts.

Layers for `scenes`, of cut-outs that `samples` takes from images and videos.
"""

import math

import cv2
import numpy as np

from training import warps
from training.synthetic_motion import LARGEST, moving_layer
from training.warps import Cutout, Layer, linear_maps

SPEED = (0.02, 0.15)  # of the frame's width per frame, at which duplicates pass their original
SMALL = (0.03, 0.1)  # size of a member of a swarm, as `SIZE`
SPREAD = (0.08, 0.3)  # of the frame's width, standard deviation of the places of a swarm
VANISHES = 0.12  # share of the pasted objects that are not there for a frame or two
LINE = (0.4, 1.6)  # length of a line on an object, in units of the object's longer side
LINE_WIDTH = (2, 5)  # pixels of a cut-out; thinner ones would not survive the softening of borders


def crossing_layer(rng, cutouts: list[Cutout | None], path: np.ndarray, scale: float,
             shape: tuple[int, int]) -> Layer:
    """A layer of a duplicate that meets its original, or passes close by, and goes on.

    Args:
        path: (T, 2) middle of the original in each frame.
        scale: of the cut-outs, so that the duplicate is about as large as the original.
    """
    frames, (_, width) = len(cutouts), shape
    first = next(c for c in cutouts if c)
    meeting = int(rng.integers(1, frames))
    angle, speed = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(*np.log(SPEED))) * width
    steps = np.arange(frames)[:, None] - meeting
    away = rng.normal(0, 0.35, 2) * first.ids.shape[::-1] * scale
    place = path[meeting] + away + steps * speed * np.array([np.cos(angle), np.sin(angle)])
    linear = linear_maps(rng.normal(0, warps.TURN, 1), np.array([scale]), np.zeros(1))
    linear[..., 0] *= rng.choice((-1, 1))
    return moving_layer(rng, cutouts, np.broadcast_to(linear, (frames, 2, 2)), place, shape, False,
                  natural=meeting, leaves=0)


def swarm_layers(rng, members: list[list[Cutout | None]], shape: tuple[int, int]) -> list[Layer]:
    """Layers of small look-alikes, each on a way of its own, which cross.

    Args:
        members: T cut-outs each, of one object at different times.
    """
    height, width = shape
    size, spread = (np.exp(rng.uniform(*np.log(bounds))) for bounds in (SMALL, SPREAD))
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    layers = []
    for cutouts in members:
        frames = len(cutouts)
        first = next(c for c in cutouts if c)
        root = np.sqrt(np.count_nonzero(first.ids)) / np.sqrt(height * width)
        scale = min(size / root * np.exp(rng.normal(0, 0.1)), LARGEST)
        place = middle + rng.normal(0, spread * width, 2)
        speed = rng.normal(0, size * width / 2, 2)
        linear = linear_maps(rng.uniform(0, 2 * np.pi, 1), np.array([scale]), np.zeros(1))
        places = place + np.arange(frames)[:, None] * speed
        layers.append(moving_layer(rng, cutouts, np.broadcast_to(linear, (frames, 2, 2)), places,
                             shape, False, leaves=0))
    return layers


def stationary_layer(cutouts: list[Cutout | None]) -> Layer:
    """A layer of what is in a video, where it is: to be in front of what was pasted."""
    frames = len(cutouts)
    return Layer(cutouts, np.repeat(np.eye(2, 3)[None], frames, 0),
                 np.zeros((frames, warps.MESH, warps.MESH, 2), np.float32))


def maybe_vanish(rng, layer: Layer) -> Layer:
    """The same, but maybe for a frame or two it is not there; always in the first two frames."""
    frames = len(layer.cutouts)
    if frames > 4 and rng.random() < VANISHES:
        start, count = int(rng.integers(2, frames - 1)), int(rng.integers(1, 3))
        for t in range(start, min(start + count, frames - 1)):
            layer.cutouts[t] = None
    return layer


def add_lines(rng, cutouts: list[Cutout | None]) -> list[Cutout | None]:
    """Cut-outs with one to three lines that belong to the object: a pole, a rope, a leash."""
    first = next(c for c in cutouts if c)
    longest = max(first.ids.shape)
    corner, colour = rng.uniform(0.1, 0.9, 2), rng.integers(0, 256, 3)
    lines = []
    for _ in range(int(rng.integers(1, 4))):
        length = np.exp(rng.uniform(*np.log(LINE))) * longest
        lines.append((rng.uniform(0, 2 * np.pi), min(length, 250), rng.normal(0, 0.1),
                      int(rng.integers(LINE_WIDTH[0], LINE_WIDTH[1] + 1))))
    swing = warps.random_path(rng, len(cutouts), math.radians(4))
    return [cutout and _lined(cutout, corner, colour,
                              [(angle + turn, *others) for angle, *others in lines])
            for cutout, turn in zip(cutouts, swing)]


def _lined(cutout: Cutout, corner: np.ndarray, colour: np.ndarray, lines: list) -> Cutout:
    """A larger cut-out, with lines from the point of the object that is nearest to `corner`."""
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
        free = (drawn > 0) & (ids == 0)
        image[free], ids[free] = colour, cutout.ids[rows[nearest], columns[nearest]]
    place = (cutout.corner[0] - margin, cutout.corner[1] - margin)
    return Cutout(image, ids, place, cutout.cut)


def object_path(masks: list[np.ndarray], object_id: int) -> np.ndarray | None:
    """(T, 2) x and y of the middle of an object; where it is not there, of the frame next to it.

    None where it is in no frame.
    """
    found: list[np.ndarray | None] = []
    for mask in masks:
        rows, columns = np.nonzero(mask == object_id)
        found.append(np.array([columns.mean(), rows.mean()]) if len(rows) else None)
    there = [t for t, place in enumerate(found) if place is not None]
    return np.stack([found[min(there, key=lambda s: abs(s - t))]  # type: ignore[misc]
                     for t in range(len(found))]) if there else None
