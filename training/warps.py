"""Clips put together: cut-out objects and backgrounds that move, bend and change their light.

It knows arrays only: no file, no data set, no tensor.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

MESH = 4  # points along each side of the mesh by which things bend
TURN, GROWTH, STRETCH = math.radians(4), 0.05, 0.03  # standard deviations, a frame
SHIFT = 0.03  # of the frame's width, likewise
BEND = 0.008  # of the object's size
COARSE = 8  # pixels from one point to the next at which a bend is computed
SHARP = 0.7  # scale down to which neighbours are enough to interpolate between
JUMP = 4  # times as much between frames that are far apart


@dataclass(frozen=True)
class Cutout:
    """What one or several objects of an image show, and where.

    Args:
        image: (h, w, 3) uint8, the part of the image around it.
        ids: (h, w) uint8, 0 where it is not.
        corner: (x, y) of that part in the image.
        cut: whether the image's left, top, right and lower border cuts it.
    """

    image: np.ndarray
    ids: np.ndarray
    corner: tuple[int, int]
    cut: tuple[bool, ...]

    @property
    def box(self) -> np.ndarray:
        """(4, 2) corners in the image, x and y."""
        (height, width), (x, y) = self.ids.shape, self.corner
        return np.array([(x, y), (x + width, y), (x, y + height), (x + width, y + height)], float)

    @property
    def center(self) -> np.ndarray:
        return self.box.mean(0)


def cut_out(image: np.ndarray, ids: np.ndarray, margin: int = 3) -> Cutout | None:
    """All that has an id; None where nothing has."""
    columns, rows = np.flatnonzero(ids.any(0)), np.flatnonzero(ids.any(1))
    if not len(rows):
        return None
    height, width = ids.shape
    top, bottom = max(rows[0] - margin, 0), min(rows[-1] + 1 + margin, height)
    left, right = max(columns[0] - margin, 0), min(columns[-1] + 1 + margin, width)
    cut = (columns[0] <= 1, rows[0] <= 1, columns[-1] >= width - 2, rows[-1] >= height - 2)
    box = slice(top, bottom), slice(left, right)
    return Cutout(image[box], ids[box], (int(left), int(top)), tuple(map(bool, cut)))


def random_path(rng, frames: int, step: float, far: bool = False, size: tuple = ()) -> np.ndarray:
    """(frames, *size) values on a smooth way from 0, about `step` from one to the next.

    Args:
        far: a jump of `JUMP` steps lies between the first and the others.
    """
    speed = rng.normal(0, step, size) + rng.normal(0, 0.4 * step, (frames, *size)).cumsum(0)
    speed[0] = 0
    if far:
        speed[1] = rng.normal(0, JUMP * step, size)
    return speed.cumsum(0)


def linear_maps(angle: np.ndarray, scale: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """(T,) radians, factors, logarithms of the aspect's change -> (T, 2, 2) matrices."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    wide, high = np.exp(stretch), np.exp(-stretch)
    return np.moveaxis(np.array([[cos * wide, -sin * high], [sin * wide, cos * high]]), 2, 0)


def affine_poses(linear: np.ndarray, anchor: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(T, 2, 2) matrices that take `anchor` to `place`, both (T, 2) or (2,) -> (T, 2, 3)."""
    moved = np.einsum("tij,tj->ti", linear, np.broadcast_to(anchor, place.shape))
    return np.concatenate([linear, (place - moved)[..., None]], 2)


def antialiased(image: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """An image as far out of focus as it has to be to be shrunk by a (2, 3) pose without grain."""
    scale = np.sqrt(np.abs(np.linalg.det(pose[:, :2])))
    if scale > SHARP:
        return image
    return cv2.GaussianBlur(image, (0, 0), 0.5 * np.sqrt(scale ** -2 - 1))


@dataclass
class Layer:
    """What moves as one: its cut-out in each frame, where that lies, and how it is bent.

    Args:
        cutouts: T, None where there is nothing to see.
        poses: (T, 2, 3) from pixels of the cut-out's image to those of the frame.
        bends: (T, MESH, MESH, 2) float32, pixels of the image, a mesh over the cut-out.
        speed: (T, 2) pixels to the next frame, which blur it; None: it is sharp.
    """

    cutouts: list[Cutout | None]
    poses: np.ndarray
    bends: np.ndarray
    speed: np.ndarray | None = None

    def paste(self, t: int, frame: np.ndarray, mask: np.ndarray) -> None:
        """Put it in front of a frame (H, W, 3) and its mask (H, W), in place."""
        cutout, pose, bend = self.cutouts[t], self.poses[t], self.bends[t]
        if cutout is None:
            return
        reach = 3 + np.abs(bend).max() * np.linalg.norm(pose[:, :2], 2)
        ends = cutout.box @ pose[:, :2].T + pose[:, 2]
        low = np.maximum(np.floor(ends.min(0) - reach), 0).astype(int)
        high = np.minimum(np.ceil(ends.max(0) + reach), mask.shape[::-1]).astype(int)
        if (low >= high).any():
            return
        maps = warp_maps(pose, bend, cutout, low, high)
        part = cv2.remap(antialiased(cutout.image, pose), *maps, cv2.INTER_LINEAR,
                         borderMode=cv2.BORDER_REPLICATE)
        ids = cv2.remap(cutout.ids, *maps, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT)
        solid = np.where(cutout.ids > 0, np.float32(1), np.float32(0))
        alpha = cv2.remap(solid, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        alpha = cv2.blur(alpha, (3, 3))
        if self.speed is not None:
            kernel = _streak(self.speed[t], min(5, mask.shape[1] / 100))
            part, alpha = (cv2.filter2D(x, -1, kernel) for x in (part, alpha))
        box = slice(low[1], high[1]), slice(low[0], high[0])
        frame[box] = cv2.blendLinear(part, frame[box], alpha, 1 - alpha)
        inside = alpha > 0.5
        if ids[inside].min(initial=1) == 0:  # just outside of one of the objects
            ids = np.maximum(ids, cv2.dilate(ids, np.ones((5, 5), np.uint8)) * (ids == 0))
        np.copyto(mask[box], ids, where=inside)


def _streak(speed: np.ndarray, limit: float) -> np.ndarray:
    """A line along a third of the way to the next frame, as the kernel of a blur.

    Args:
        speed: (2,) x and y, pixels.
        limit: at most this far to both sides, pixels; up to 5 OpenCV multiplies only along the
            line, beyond it takes a Fourier transform.
    """
    way = speed / 6
    way = way * min(1, limit / max(np.linalg.norm(way), 1e-6))
    middle = math.ceil(limit)
    kernel = np.zeros((2 * middle + 1,) * 2, np.float32)
    cv2.line(kernel, *[tuple(int(round(middle + sign * v)) for v in way) for sign in (-1, 1)], 1)
    return kernel / kernel.sum()


def warp_maps(pose, bend, cutout, low, high) -> tuple[np.ndarray, np.ndarray]:
    """Where in a cut-out each pixel of the frame from `low` to `high` (x, y) comes from."""
    inverse = cv2.invertAffineTransform(pose)
    inverse[:, 2] += inverse[:, :2] @ low - cutout.corner
    width, height = (high - low).tolist()
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    (a, b, c), (d, e, f) = inverse.astype(np.float32)
    map_x, map_y = a * x + (b * y + c)[:, None], d * x + (e * y + f)[:, None]
    to_mesh = inverse * ((MESH - 1) / np.array(cutout.ids.shape[::-1]))[:, None]
    to_mesh[:, 2] += to_mesh[:, :2] @ np.full(2, COARSE / 2 - 0.5)
    to_mesh[:, :2] *= COARSE
    bent = cv2.warpAffine(bend, to_mesh, (width // COARSE + 1, height // COARSE + 1),
                          borderMode=cv2.BORDER_REPLICATE,
                          flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    for fine, channel in ((map_x, bent[..., 0]), (map_y, bent[..., 1])):
        fine += cv2.resize(channel, None, fx=COARSE, fy=COARSE)[:height, :width]
    return map_x, map_y


def warp_background(image: np.ndarray, pose: np.ndarray, bend: np.ndarray,
               shape: tuple[int, int]) -> np.ndarray:
    """(*shape, 3) uint8, an image seen from elsewhere; beyond its border it is mirrored."""
    whole = Cutout(image, image[..., 0], (0, 0), (True,) * 4)
    maps = warp_maps(pose, bend, whole, np.zeros(2, int), np.array(shape[::-1]))
    return cv2.remap(image, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def inpaint(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 with a hole (H, W) filled by what lies beside it in the same rows.

    It is the image mirrored or moved sideways, plus what it lacks to fit around the hole (after
    Perez et al.: Poisson image editing, SIGGRAPH 2003, with `spread` in place of the equation).
    """
    hole = cv2.dilate((hole > 0).astype(np.uint8), np.ones((7, 7), np.uint8))
    width = hole.shape[1]
    moves = [lambda x: x[:, ::-1], *(lambda x, by=by: np.roll(x, by, 1)
                                     for by in (width // 2, width // 3, -width // 3))]
    original, filled = image.astype(np.float32), image.astype(np.float32)
    usable = cv2.dilate(hole, np.ones((5, 5), np.uint8)) == 0
    usable[:, :4] = usable[:, -4:] = False  # there is a seam when it is moved
    left = hole > 0
    for _ in range(3):
        move = max(moves, key=lambda move: np.count_nonzero(move(usable) & left))
        known, moved = move(usable), move(original)
        part = left & known
        if part.any():
            lack = push_pull(original - moved, known & (hole == 0))
            np.copyto(filled, moved + lack, where=part[..., None])
            left &= ~known
    if left.any():
        np.copyto(filled, push_pull(filled, ~left), where=left[..., None])
    soft = cv2.blur(hole.astype(np.float32), (5, 5))
    return cv2.blendLinear(filled.clip(0, 255).astype(np.uint8), image, soft, 1 - soft)


def push_pull(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32, smooth, near the values where they are known (H, W), and between them.

    They flow through a pyramid (Gortler et al.: The lumigraph, SIGGRAPH 1996, "pull-push").
    """
    weight = known.astype(np.float32)[..., None]
    levels = [cv2.pyrDown(np.concatenate([values * weight, weight], 2))]
    while min(levels[-1].shape[:2]) > 2:
        levels.append(cv2.pyrDown(levels[-1]))
    result = levels[-1][..., :3] / np.maximum(levels[-1][..., 3:], 1e-3)
    for level in levels[-2::-1]:
        result = cv2.pyrUp(result, dstsize=level.shape[1::-1])
        result = level[..., :3] + (1 - level[..., 3:]) * result
    return cv2.pyrUp(result, dstsize=values.shape[1::-1])
