"""Synthetic motion: a camera over a static image, objects that move on their own, lighting.

Draws random paths and turns cut-outs into layers (`warps.Layer`). `samples` decides which images
and objects go into a clip.
"""

import cv2
import numpy as np

import preprocess
from media.drawing import areas
from training import warps
from training.warps import Cutout, Layer, affine_poses, linear_maps, random_path

LEAVES = 0.12  # chance that an object leaves the frame once and returns
MOTION_BLUR = 0.3  # chance that an object has motion blur
SIZE = (0.05, 0.5)  # of a pasted object: square root of its share of the frame's area
MAX_SCALE = 1.6  # magnification of pasted objects, which get blurred beyond it
TOUCHING = 9  # pixels; objects that are closer than about this move as one
PART = (0.1, 0.5)  # share of an object that becomes an object of its own
MIN_VISIBLE = 0.15  # visible share of an object in the reference frame; below, it is not a target


def camera_poses(rng, frames: int, jump: bool, size: tuple[int, int], shape: tuple[int, int],
                 focus: np.ndarray) -> np.ndarray:
    """Return (T, 2, 3) poses of an image in the frames of a clip: crops that drift and zoom.

    Args:
        frames: T.
        jump: the first frame is an independent view.
        size: (H, W) of the image.
        shape: (H, W) of the frames.
        focus: (x, y) in the image that is to be visible.
    """
    whole, frame = np.array(size[::-1]), np.array(shape[::-1])  # x and y
    cover, contain = (frame / whole).max(), (frame / whole).min()
    poses = []
    for shot in _shots(frames, jump):
        count = len(shot)
        # from 0.6 of covering the frame, where the image is mirrored beyond its border, to 1.8
        zoom = np.exp(rng.uniform(*np.log((max(contain, 0.6 * cover), 1.8 * cover))))
        mirror = rng.choice((-1, 1))
        crop = frame / zoom
        center = focus + rng.uniform(-0.4, 0.4, 2) * crop
        inside = np.clip(center, crop / 2, np.maximum(whole - crop / 2, crop / 2))
        center = np.where(crop < whole, inside, whole / 2 + rng.uniform(-0.1, 0.1, 2) * crop)
        zoom = zoom * np.exp(random_path(rng, count, 0.02))
        # a camera moves less than objects do: a quarter of their rotation, half of their shift
        linear = linear_maps(random_path(rng, count, warps.TURN / 4), zoom,
                             random_path(rng, count, 0.005))
        linear[..., 0] *= mirror
        position = frame / 2 + random_path(rng, count, 0.015 * frame[0], size=(2,))
        poses.append(affine_poses(linear, center, position))
    return np.concatenate(poses)


def _shots(frames: int, jump: bool) -> list[range]:
    """Return runs of consecutive frames: all, or with a jump the first and the rest."""
    return [range(1), range(1, frames)] if jump else [range(frames)]


def touching_groups(ids: np.ndarray) -> list[list[int]]:
    """Group the object ids of an (H, W) mask; objects that touch each other share a group."""
    near = cv2.dilate((ids > 0).astype(np.uint8), np.ones((TOUCHING, TOUCHING), np.uint8))
    regions = cv2.connectedComponents(near)[1]
    joined: list[set[int]] = []  # object ids, and the regions they lie in as negative numbers
    for i in np.unique(ids[ids > 0]).tolist():
        members = {i} | {-int(p) for p in np.unique(regions[ids == i])}
        apart = [other for other in joined if not other & members]
        joined = [*apart, members.union(*(other for other in joined if other & members))]
    return [sorted(i for i in group if i > 0) for group in joined]


def split_part(rng, ids: np.ndarray, new: int) -> np.ndarray:
    """Give a part of a random object in an (H, W) mask the id `new`.

    The part is a disc around a random point of the object, and moves with it, like a bag that
    someone carries.
    """
    rows, columns = np.nonzero(ids == rng.choice(np.unique(ids[ids > 0])))
    point = rng.integers(len(rows))
    distance = np.hypot(rows - rows[point], columns - columns[point])
    part = distance <= np.quantile(distance, rng.uniform(*PART))
    ids = ids.copy()
    ids[rows[part], columns[part]] = new
    return ids


def object_layer(rng, cutouts: list[Cutout | None], poses: np.ndarray, shape: tuple[int, int],
                 jump: bool) -> Layer:
    """Return a layer of a static image's own objects, moving in front of its background.

    Args:
        cutouts: T, from the static image.
        poses: (T, 2, 3) of the background.
        shape: (H, W) of the frames.
        jump: the first frame is an independent view.
    """
    linear = poses[:, :, :2]
    position = linear @ cutouts[0].center + poses[:, :, 2]
    natural = 0 if jump else int(rng.integers(len(poses)))
    return moving_layer(rng, cutouts, linear, position, shape, jump, natural)


def layer_path(layer: Layer) -> np.ndarray:
    """Return (T, 2), x and y of the centre of a layer's first cut-out in each frame."""
    middle = next(c for c in layer.cutouts if c).center
    return layer.poses[:, :, :2] @ middle + layer.poses[:, :, 2]


def pasted_layer(rng, cutouts: list[Cutout | None], poses: np.ndarray | None,
                 shape: tuple[int, int], jump: bool, duplicate: bool = False) -> Layer:
    """Return a layer of an object of another image or video, at a random place.

    Args:
        cutouts: T, one for each frame.
        poses: (T, 2, 3) of the background, with which the object moves; None: a video, whose
            camera motion is unknown.
        shape: (H, W) of the frames.
        jump: the first frame is an independent view.
        duplicate: the object is the clip's own, and keeps about its size there.
    """
    frames, (height, width) = len(cutouts), shape
    first = cutouts[0] or next(c for c in cutouts if c)
    root = np.sqrt(np.count_nonzero(first.ids)) / np.sqrt(height * width)
    longest = max(first.ids.shape) / width
    if duplicate:
        scale = np.exp(rng.normal(0, 0.15))
        if poses is not None:
            scale *= np.sqrt(np.abs(np.linalg.det(poses[0, :, :2])))
    else:
        scale = min(np.exp(rng.uniform(*np.log(SIZE))) / root, MAX_SCALE, 1.2 / longest)
    linears, positions = [], []
    for shot in _shots(frames, jump):
        position = rng.uniform(0.1, 0.9, 2) * (width, height)
        linear = linear_maps(rng.normal(0, warps.TURN, 1), np.array([scale]), np.zeros(1))
        linear[..., 0] *= rng.choice((-1, 1))
        background = np.eye(2, 3)[None] if poses is None else poses[shot]
        change = background[:, :, :2] @ np.linalg.inv(background[0, :, :2])
        position = change @ (position - background[0, :, 2]) + background[:, :, 2]
        linears.append(np.broadcast_to(change @ linear, (len(shot), 2, 2)))
        positions.append(np.broadcast_to(position, (len(shot), 2)))
    # a duplicate stays in sight: only its position tells it from the original
    return moving_layer(rng, cutouts, np.concatenate(linears), np.concatenate(positions), shape,
                        jump, leaves=0 if duplicate else LEAVES)


def moving_layer(rng, cutouts: list[Cutout | None], linear: np.ndarray, position: np.ndarray,
                 shape: tuple[int, int], jump: bool, natural: int | None = None,
                 leaves: float = LEAVES) -> Layer:
    """Return a layer of cut-outs on a smooth random path, relative to a base motion.

    Args:
        cutouts: T, None where the object is not visible.
        linear, position: (T, 2, 2) and (T, 2), the base motion: its linear part, and where the
            first cut-out's centre lies, x and y.
        shape: (H, W) of the frames.
        jump: the first frame is an independent view.
        natural: frame in which the object is exactly where the base motion has it.
        leaves: chance that the object leaves the frame and returns.
    """
    frames, (height, width) = len(cutouts), shape
    pace = min(np.exp(rng.normal(-0.3, 0.6)), 2)  # most objects are slow, a few twice as fast
    paths = [random_path(rng, frames, pace * step, jump, size) for step, size in
             ((warps.TURN, ()), (warps.GROWTH, ()), (warps.STRETCH, ()),
              (warps.SHIFT * width, (2,)))]
    bends = random_path(rng, frames, warps.BEND, jump, (warps.MESH, warps.MESH, 2))
    if natural is not None:
        paths = [path - path[natural] for path in paths]
    turn, growth, stretch, shift = paths
    first = next(c for c in cutouts if c)
    # limits, so that a long clip does not fold an object over or turn it into a line
    bends = (bends.clip(-0.06, 0.06) * np.sqrt(first.ids.size)).astype(np.float32)
    linear = linear_maps(turn, np.exp(growth.clip(-0.4, 0.4)), stretch.clip(-0.15, 0.15)) @ linear
    position = _reflected(position + shift, np.array([width, height]))
    if frames > 2 and rng.random() < leaves:
        position = position + _leave(rng, frames, position, first, linear, width)
    poses = affine_poses(linear, anchors(cutouts, jump), position)
    for t, cutout in enumerate(cutouts):
        if cutout:
            poses[t, :, 2] += _hide_cut_side(cutout, poses[t], bends[t], shape)
    speed = np.diff(position, axis=0, append=position[-1:])
    if frames > 1:
        speed[-1] = speed[-2]
    if jump:
        speed[0] = speed[1]  # not the jump itself
    return Layer(cutouts, poses, bends, speed if rng.random() < MOTION_BLUR else None)


def _reflected(position: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Reflect (T, 2) positions at the borders of a frame of (W, H) `size`."""
    return size - np.abs(size - position % (2 * size))


def anchors(cutouts: list[Cutout | None], jump: bool) -> np.ndarray:
    """Return (T, 2) centres of the first cut-out; after a jump those of the second one.

    One anchor for a whole shot keeps the motion that an object of a video has there.
    """
    centers = [c.center for c in cutouts if c]
    first = np.repeat(centers[0][None], len(cutouts), 0)
    if jump and cutouts[0] and len(centers) > 1:
        first[1:] = centers[1]
    return first


def _leave(rng, frames: int, position: np.ndarray, cutout: Cutout, linear: np.ndarray,
           width: int) -> np.ndarray:
    """Return (T, 2) shifts that move an object out of the frame and back, except in frame 0.

    Frame 0 is the reference frame, in which targets have to be visible.
    """
    away = int(rng.integers(1, frames))
    half = np.abs(cutout.ids.shape[1] * linear[away, 0, 0]) / 2 + 4
    x = position[away, 0]
    distance = -(x + half) if x < width / 2 else width - x + half
    shift = np.zeros((frames, 2))
    for t in range(1, frames):
        shift[t, 0] = distance * max(0, 1 - 0.6 * abs(t - away))
    return shift


def _hide_cut_side(cutout: Cutout, pose: np.ndarray, bend: np.ndarray,
                   shape: tuple[int, int]) -> np.ndarray:
    """Return the (2,) shift that moves an object's cut side out of the frame.

    Where the border of its image cuts an object off, the straight edge would give it away. An
    object that is cut at two opposite sides stays where it is.
    """
    # top left, top right, bottom left, bottom right
    corners = cutout.box @ pose[:, :2].T + pose[:, 2]
    slack = np.abs(bend).max() * np.linalg.norm(pose[:, :2], 2) * 0.5 + 2
    shift = np.zeros(2)
    for axis, (low, high) in enumerate((((0, 2), (1, 3)), ((0, 1), (2, 3)))):
        cuts = cutout.cut[axis], cutout.cut[axis + 2]
        if cuts[0] == cuts[1]:
            continue
        side = corners[list(low if cuts[0] else high), axis]
        other = corners[list(high if cuts[0] else low), axis]
        if side.mean() < other.mean():
            shift[axis] = min(0, -slack - side.max())
        else:
            shift[axis] = max(0, shape[1 - axis] + slack - side.min())
    return shift


def hidden_ids(layers: list[Layer], before: np.ndarray, after: np.ndarray) -> list[int]:
    """Return the ids that are mostly occluded or outside of the first frame.

    Less than `MIN_VISIBLE` of an object in the reference mask does not say what the object is.

    Args:
        layers: those that were pasted.
        before, after: (H, W) ids of the first frame without and with the layers.
    """
    whole = areas(before).astype(float)
    for layer in layers:
        cutout = layer.cutouts[0]
        if cutout:
            scale = np.abs(np.linalg.det(layer.poses[0, :, :2]))
            whole += scale * areas(np.ascontiguousarray(cutout.ids))
    left = areas(after)
    return [i for i in range(1, 256) if left[i] < MIN_VISIBLE * whole[i]]


def vary_lighting(rng, images: list[np.ndarray], jump: bool) -> list[np.ndarray]:
    """Change brightness, contrast, colour and sharpness of a clip, smoothly over time.

    Args:
        images: (H, W, 3) uint8 RGB each.
        jump: the first image changes independently of the others.
    """
    frames = len(images)
    values = random_path(rng, frames, 0.03, size=(4,)) + rng.uniform(-0.3, 0.3, 4)
    if jump:
        values[0] = rng.uniform(-0.3, 0.3, 4)
    # a few clips lose focus now and then
    blur = np.abs(random_path(rng, frames, 0.5)) if rng.random() < 0.15 else np.zeros(frames)
    result = []
    for image, (brightness, contrast, saturation, hue), sigma in zip(images, values, blur):
        image = preprocess.adjust_colour(image, 1 + brightness, 1 + contrast, 1 + saturation, hue)
        if sigma > 0.3:  # less is not visible
            image = cv2.GaussianBlur(image, (0, 0), min(sigma, 1.5))
        result.append(image)
    return result
