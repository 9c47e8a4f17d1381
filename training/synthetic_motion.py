"""Synthetic motion: a camera that pans over a static image, and moving objects.

Draws random paths and turns cut-outs into layers (`warps.Layer`). `samples` decides which images
and objects go into a clip.
"""

import cv2
import numpy as np

from media.drawing import areas
from training import warps
from training.warps import Cutout, Layer, affine_poses, linear_maps, random_path

LEAVES = 0.12  # chance that an object leaves the frame once and returns
MOTION_BLUR = 0.3  # chance that an object has motion blur
SIZE = (0.05, 0.5)  # range of a pasted object's size: square root of its share of the frame
MAX_SCALE = 1.6  # largest magnification of pasted objects: beyond it they look blurred
TOUCHING = 9  # pixels; objects closer than about this move as one, such as a rider and a horse
PART = (0.1, 0.5)  # range of the share of an object that becomes an object of its own
# Smallest visible share of an object in the reference frame for it to be a target: less does not
# say what the object is.
MIN_VISIBLE = 0.15
# Zoom of the camera, relative to the one at which the image just covers the frame. Below 1 the
# image is mirrored at its border, and below 0.6 too much of the frame would be a mirror image.
# Above 1.8, images of about 400 pixels look blurred.
CAMERA_ZOOM = (0.6, 1.8)
# What the camera is to show lies at most this share of the view away from its centre, so that it
# is visible, but not always in the middle.
OFF_CENTRE = 0.4
# Standard deviations of the camera's zoom (logarithm), aspect (logarithm) and shift (share of the
# frame's width) from frame to frame: half of an object's at most, since cameras follow objects.
CAMERA_GROWTH, CAMERA_STRETCH, CAMERA_SHIFT = 0.02, 0.005, 0.015
# Largest bend (share of an object's size), growth and stretch (logarithms) during a clip, so that
# in a long one an object neither folds over nor shrinks to a line.
MAX_BEND, MAX_GROWTH, MAX_STRETCH = 0.06, 0.4, 0.15


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
    image, frame = np.array(size[::-1]), np.array(shape[::-1])  # x and y
    cover, contain = (frame / image).max(), (frame / image).min()
    poses = []
    for shot in _shots(frames, jump):
        count = len(shot)
        low, high = CAMERA_ZOOM
        zoom = np.exp(rng.uniform(*np.log((max(contain, low * cover), high * cover))))
        mirror = rng.choice((-1, 1))
        crop = frame / zoom
        center = focus + rng.uniform(-OFF_CENTRE, OFF_CENTRE, 2) * crop
        inside = np.clip(center, crop / 2, np.maximum(image - crop / 2, crop / 2))
        center = np.where(crop < image, inside, image / 2 + rng.uniform(-0.1, 0.1, 2) * crop)
        zoom = zoom * np.exp(random_path(rng, count, CAMERA_GROWTH))
        # a quarter of an object's rotation: a camera that rolls more looks unnatural
        linear = linear_maps(random_path(rng, count, warps.TURN / 4), zoom,
                             random_path(rng, count, CAMERA_STRETCH))
        linear[..., 0] *= mirror
        position = frame / 2 + random_path(rng, count, CAMERA_SHIFT * frame[0], size=(2,))
        poses.append(affine_poses(linear, center, position))
    return np.concatenate(poses)


def _shots(frames: int, jump: bool) -> list[range]:
    """Return the continuous shots of a clip: all frames or, with a jump, the first and the rest."""
    return [range(1), range(1, frames)] if jump else [range(frames)]


def touching_groups(ids: np.ndarray) -> list[list[int]]:
    """Group the object ids of an (H, W) mask: those of objects that touch are in one group."""
    near = cv2.dilate((ids > 0).astype(np.uint8), np.ones((TOUCHING, TOUCHING), np.uint8))
    regions = cv2.connectedComponents(near)[1]
    groups: list[set[int]] = []  # object ids, and the regions they lie in as negative numbers
    for i in np.unique(ids[ids > 0]).tolist():
        members = {i} | {-int(region) for region in np.unique(regions[ids == i])}
        separate = [group for group in groups if not group & members]
        groups = [*separate, members.union(*(group for group in groups if group & members))]
    return [sorted(i for i in group if i > 0) for group in groups]


def split_part(rng, ids: np.ndarray, new: int) -> np.ndarray:
    """Return an (H, W) mask in which a part of a random object has the id `new`.

    The part lies in a disc around a random point of the object, and moves with it, like a bag that
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
    """Return a layer of a static image's own objects, which move in front of its background.

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
    center = next(c for c in layer.cutouts if c).center
    return layer.poses[:, :, :2] @ center + layer.poses[:, :, 2]


def pasted_layer(rng, cutouts: list[Cutout | None], poses: np.ndarray | None,
                 shape: tuple[int, int], jump: bool, duplicate: bool = False) -> Layer:
    """Return a layer of an object from another image or video, at a random position.

    Args:
        cutouts: T, one for each frame.
        poses: (T, 2, 3) of the background, with which the object moves; None: a video, whose
            camera motion is unknown.
        shape: (H, W) of the frames.
        jump: the first frame is an independent view.
        duplicate: the object is a copy of one in the clip, and keeps about its size.
    """
    frames, (height, width) = len(cutouts), shape
    first = cutouts[0] or next(c for c in cutouts if c)
    side = np.sqrt(np.count_nonzero(first.ids)) / np.sqrt(height * width)
    longest = max(first.ids.shape) / width
    if duplicate:
        # differs little from its original, or the size alone would tell them apart
        scale = np.exp(rng.normal(0, 0.15))
        if poses is not None:
            scale *= np.sqrt(np.abs(np.linalg.det(poses[0, :, :2])))
    else:
        # an object longer than 1.2 times the frame's width would leave nothing else in view
        scale = min(np.exp(rng.uniform(*np.log(SIZE))) / side, MAX_SCALE, 1.2 / longest)
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
    # a duplicate stays in the frame, as only its position distinguishes it from the original
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
        natural: frame in which the object is exactly where the base motion puts it, for a static
            image its original place; None: in no frame.
        leaves: chance that the object leaves the frame and returns.
    """
    frames, (height, width) = len(cutouts), shape
    speed_factor = min(np.exp(rng.normal(-0.3, 0.6)), 2)  # most objects are slow, few at the limit
    paths = [random_path(rng, frames, speed_factor * step, jump, size) for step, size in
             ((warps.TURN, ()), (warps.GROWTH, ()), (warps.STRETCH, ()),
              (warps.SHIFT * width, (2,)))]
    bends = random_path(rng, frames, warps.BEND, jump, (warps.MESH, warps.MESH, 2))
    if natural is not None:
        paths = [path - path[natural] for path in paths]
    turn, growth, stretch, shift = paths
    first = next(c for c in cutouts if c)
    bends = (bends.clip(-MAX_BEND, MAX_BEND) * np.sqrt(first.ids.size)).astype(np.float32)
    linear = linear_maps(turn, np.exp(growth.clip(-MAX_GROWTH, MAX_GROWTH)),
                         stretch.clip(-MAX_STRETCH, MAX_STRETCH)) @ linear
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
    """Reflect (T, 2) positions at the borders of a frame whose (W, H) is `size`."""
    return size - np.abs(size - position % (2 * size))


def anchors(cutouts: list[Cutout | None], jump: bool) -> np.ndarray:
    """Return (T, 2) points by which cut-outs are placed: the first one's centre in all frames.

    After a jump it is the second one's. With one anchor for a whole shot, an object from a video
    keeps its motion in that video.
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
        # 0.6: in the frames next to the one outside, four tenths of the way: partly in view
        shift[t, 0] = distance * max(0, 1 - 0.6 * abs(t - away))
    return shift


def _hide_cut_side(cutout: Cutout, pose: np.ndarray, bend: np.ndarray,
                   shape: tuple[int, int]) -> np.ndarray:
    """Return the (2,) shift in x and y that moves an object's truncated side out of the frame.

    Where the border of its image truncates an object, the straight edge would give the object away.
    One that is truncated at two opposite sides stays where it is.
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
    """Return the ids of which less than `MIN_VISIBLE` is visible in the first frame.

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
    visible = areas(after)
    return [i for i in range(1, 256) if visible[i] < MIN_VISIBLE * whole[i]]
