"""Cut-out objects and backgrounds: affine motion, bending, pasting and inpainting, on arrays.

A `Cutout` is a piece of an image with the objects on it; a `Layer` moves cut-outs through a clip.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

# Standard deviations of the motion from one frame to the next. Larger values train for faster
# motion, until the clips stop looking like videos.
TURN, GROWTH, STRETCH = math.radians(4), 0.05, 0.03  # rotation; logarithms of scale and aspect
SHIFT = 0.03  # share of the frame's width
BEND = 0.008  # share of the object's size
JUMP = 4  # times as large between the two sides of a jump, where much time lies between frames

MESH = 4  # control points along each side of the mesh that bends things: smooth, few parameters
COARSE = 8  # pixels; the bend is smooth, so it is computed at this spacing and interpolated
# Scale down to which bilinear interpolation is good enough. Below, pixels are skipped and the
# image gets grainy, so it is blurred first, which costs time.
SHARP = 0.7


@dataclass(frozen=True)
class Cutout:
    """A rectangular piece of an image with one or several objects.

    Args:
        image: (h, w, 3) uint8 RGB.
        ids: (h, w) uint8, 0 background, else the object's id.
        corner: (x, y) of the piece's top left pixel in the image.
        cut: whether the objects touch the image's left, top, right and bottom border, beyond
            which they continue unseen.
    """

    image: np.ndarray
    ids: np.ndarray
    corner: tuple[int, int]
    cut: tuple[bool, ...]

    @property
    def box(self) -> np.ndarray:
        """(4, 2) corners in the image, x and y: top left, top right, bottom left, bottom right."""
        (height, width), (x, y) = self.ids.shape, self.corner
        return np.array([(x, y), (x + width, y), (x, y + height), (x + width, y + height)], float)

    @property
    def center(self) -> np.ndarray:
        """(x, y) of the piece's centre in the image."""
        return self.box.mean(0)


def cut_out(image: np.ndarray, ids: np.ndarray, margin: int = 3) -> Cutout | None:
    """Cut out everything that has an id; None if nothing has.

    Args:
        image, ids: (H, W, 3) uint8 RGB and (H, W) uint8.
        margin: pixels around the objects, from which their soft edges are interpolated.
    """
    columns, rows = np.flatnonzero(ids.any(0)), np.flatnonzero(ids.any(1))
    if not len(rows):
        return None
    height, width = ids.shape
    top, bottom = max(rows[0] - margin, 0), min(rows[-1] + 1 + margin, height)
    left, right = max(columns[0] - margin, 0), min(columns[-1] + 1 + margin, width)
    # one pixel of tolerance: annotators often stop just before the border
    cut = (columns[0] <= 1, rows[0] <= 1, columns[-1] >= width - 2, rows[-1] >= height - 2)
    box = slice(top, bottom), slice(left, right)
    return Cutout(image[box], ids[box], (int(left), int(top)), tuple(map(bool, cut)))


def random_path(rng, frames: int, step: float, jump: bool = False, size: tuple = ()) -> np.ndarray:
    """Return (frames, *size) values that change smoothly from 0, by about `step` per frame.

    The speed is constant up to a random walk of 0.4 `step`, so that paths curve.

    Args:
        jump: the second value is about `JUMP` steps away from the first.
    """
    speed = rng.normal(0, step, size) + rng.normal(0, 0.4 * step, (frames, *size)).cumsum(0)
    speed[0] = 0
    if jump:
        speed[1] = rng.normal(0, JUMP * step, size)
    return speed.cumsum(0)


def linear_maps(angle: np.ndarray, scale: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """Return (T, 2, 2) matrices that rotate, scale and stretch.

    Args:
        angle: (T,) radians.
        scale: (T,) factors.
        stretch: (T,) logarithms of the factor on the width, and its inverse on the height.
    """
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    wide, high = np.exp(stretch), np.exp(-stretch)
    return np.moveaxis(np.array([[cos * wide, -sin * high], [sin * wide, cos * high]]), 2, 0)


def affine_poses(linear: np.ndarray, anchor: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return (T, 2, 3) affine maps with the given linear parts that map `anchor` to `position`.

    Args:
        linear: (T, 2, 2).
        anchor, position: (T, 2) or (2,), x and y.
    """
    moved = np.einsum("tij,tj->ti", linear, np.broadcast_to(anchor, position.shape))
    return np.concatenate([linear, (position - moved)[..., None]], 2)


def antialiased(image: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Blur an image as much as is needed to shrink it by a (2, 3) pose without aliasing."""
    scale = np.sqrt(np.abs(np.linalg.det(pose[:, :2])))
    if scale > SHARP:
        return image
    return cv2.GaussianBlur(image, (0, 0), 0.5 * np.sqrt(scale ** -2 - 1))


@dataclass
class Layer:
    """Cut-outs that move as one through a clip of T frames.

    Args:
        cutouts: T cut-outs; None where the object is not visible.
        poses: (T, 2, 3) affine maps from pixels of the cut-outs' image to pixels of the frame.
        bends: (T, MESH, MESH, 2) float32 displacements in pixels of the image, a mesh over the
            cut-out.
        speed: (T, 2) pixels to the next frame, for motion blur; None for none.
    """

    cutouts: list[Cutout | None]
    poses: np.ndarray
    bends: np.ndarray
    speed: np.ndarray | None = None

    def paste(self, t: int, frame: np.ndarray, mask: np.ndarray) -> None:
        """Paste frame t of the layer over an (H, W, 3) frame and its (H, W) mask, in place."""
        cutout, pose, bend = self.cutouts[t], self.poses[t], self.bends[t]
        if cutout is None:
            return
        # the region of the frame that the cut-out can reach, with its bend and soft edge
        reach = 3 + np.abs(bend).max() * np.linalg.norm(pose[:, :2], 2)
        corners = cutout.box @ pose[:, :2].T + pose[:, 2]
        low = np.maximum(np.floor(corners.min(0) - reach), 0).astype(int)
        high = np.minimum(np.ceil(corners.max(0) + reach), mask.shape[::-1]).astype(int)
        if (low >= high).any():
            return
        maps = warp_maps(pose, bend, cutout, low, high)
        image = cv2.remap(antialiased(cutout.image, pose), *maps, cv2.INTER_LINEAR,
                          borderMode=cv2.BORDER_REPLICATE)
        ids = cv2.remap(cutout.ids, *maps, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT)
        solid = np.where(cutout.ids > 0, np.float32(1), np.float32(0))
        alpha = cv2.remap(solid, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        # Soft edges, as cameras make them: a hard edge would give pasted objects away.
        alpha = cv2.blur(alpha, (3, 3))
        if self.speed is not None:
            kernel = _motion_blur(self.speed[t], min(5, mask.shape[1] / 100))
            image, alpha = (cv2.filter2D(x, -1, kernel) for x in (image, alpha))
        box = slice(low[1], high[1]), slice(low[0], high[0])
        frame[box] = cv2.blendLinear(image, frame[box], alpha, 1 - alpha)
        inside = alpha > 0.5
        if ids[inside].min(initial=1) == 0:
            # the soft edge reaches beyond the ids: such pixels take a neighbour's id
            ids = np.maximum(ids, cv2.dilate(ids, np.ones((5, 5), np.uint8)) * (ids == 0))
        np.copyto(mask[box], ids, where=inside)


def _motion_blur(speed: np.ndarray, limit: float) -> np.ndarray:
    """Return a blur kernel: a line along a third of the way to the next frame.

    A third is a shutter that is open for 120 of 360 degrees.

    Args:
        speed: (2,) x and y, pixels per frame.
        limit: longest reach to either side in pixels. Up to 5 OpenCV multiplies only along the
            line; beyond, it takes a slower Fourier transform.
    """
    half = speed / 6
    half = half * min(1, limit / max(np.linalg.norm(half), 1e-6))
    middle = math.ceil(limit)
    kernel = np.zeros((2 * middle + 1,) * 2, np.float32)
    cv2.line(kernel, *[tuple(int(round(middle + sign * v)) for v in half) for sign in (-1, 1)], 1)
    return kernel / kernel.sum()


def warp_maps(pose: np.ndarray, bend: np.ndarray, cutout: Cutout, low: np.ndarray,
              high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the maps for `cv2.remap`: where in a cut-out each pixel of a frame comes from.

    Args:
        pose: (2, 3), from the cut-out's image to the frame.
        bend: (MESH, MESH, 2) float32 displacements.
        low, high: (x, y) of the frame's region, `high` exclusive.

    Returns:
        x and y in the cut-out, both float32 of the region's (height, width).
    """
    inverse = cv2.invertAffineTransform(pose)
    inverse[:, 2] += inverse[:, :2] @ low - cutout.corner
    width, height = (high - low).tolist()
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    (a, b, c), (d, e, f) = inverse.astype(np.float32)
    map_x, map_y = a * x + (b * y + c)[:, None], d * x + (e * y + f)[:, None]
    # from the coarse grid's points, in the middle of COARSE x COARSE pixels, to the mesh
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
    """Return a (*shape, 3) uint8 view of an image; beyond its border it is mirrored.

    Args:
        image: (H, W, 3) uint8 RGB.
        pose: (2, 3), from the image to the view.
        bend: (MESH, MESH, 2) float32, see `Layer`.
        shape: (H, W) of the view.
    """
    whole = Cutout(image, image[..., 0], (0, 0), (True,) * 4)
    maps = warp_maps(pose, bend, whole, np.zeros(2, int), np.array(shape[::-1]))
    return cv2.remap(image, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def inpaint(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fill a hole in an (H, W, 3) uint8 image with texture from elsewhere in the same rows.

    The texture is the image mirrored or shifted sideways, plus a smooth correction that makes it
    fit at the hole's border (after Perez et al.: Poisson image editing, SIGGRAPH 2003, with
    `push_pull` in place of solving the equation, which is slower).

    Args:
        hole: (H, W), non-zero where the image is to be replaced.
    """
    # 3 pixels wider: part of the object's soft edge lies outside its mask
    hole = cv2.dilate((hole > 0).astype(np.uint8), np.ones((7, 7), np.uint8))
    width = hole.shape[1]
    moves = [lambda x: x[:, ::-1], *(lambda x, by=by: np.roll(x, by, 1)
                                     for by in (width // 2, width // 3, -width // 3))]
    original, filled = image.astype(np.float32), image.astype(np.float32)
    usable = cv2.dilate(hole, np.ones((5, 5), np.uint8)) == 0
    usable[:, :4] = usable[:, -4:] = False  # the seam of a shifted image
    left = hole > 0
    for _ in range(3):  # each round takes the move that covers most of what is left
        move = max(moves, key=lambda move: np.count_nonzero(move(usable) & left))
        available, moved = move(usable), move(original)
        part = left & available
        if part.any():
            difference = push_pull(original - moved, available & (hole == 0))
            np.copyto(filled, moved + difference, where=part[..., None])
            left &= ~available
    if left.any():  # no texture fits: a smooth fill
        np.copyto(filled, push_pull(filled, ~left), where=left[..., None])
    soft = cv2.blur(hole.astype(np.float32), (5, 5))
    return cv2.blendLinear(filled.clip(0, 255).astype(np.uint8), image, soft, 1 - soft)


def push_pull(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Interpolate (H, W, 3) float32 values smoothly where they are not `valid` (H, W) bool.

    Values flow down and up a pyramid (Gortler et al.: The lumigraph, SIGGRAPH 1996).
    """
    weight = valid.astype(np.float32)[..., None]
    levels = [cv2.pyrDown(np.concatenate([values * weight, weight], 2))]
    while min(levels[-1].shape[:2]) > 2:
        levels.append(cv2.pyrDown(levels[-1]))
    result = levels[-1][..., :3] / np.maximum(levels[-1][..., 3:], 1e-3)
    for level in levels[-2::-1]:
        result = cv2.pyrUp(result, dstsize=level.shape[1::-1])
        result = level[..., :3] + (1 - level[..., 3:]) * result
    return cv2.pyrUp(result, dstsize=values.shape[1::-1])
