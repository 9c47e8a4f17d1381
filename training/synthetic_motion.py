"""What moves how in a clip: the camera over a still image, its objects, objects pasted in.

It draws ways and lays layers, of arrays alone; which images and objects those are is decided in
`samples`, how a layer is pasted in `motion`.
"""

import cv2
import numpy as np

import preprocess
from media.drawing import areas
from training import warps
from training.warps import Cutout, Layer, affine_poses, linear_maps, random_path

LEAVES = 0.12  # share of the objects that leave the frame once
STREAKS = 0.3  # and of those that their motion blurs
SIZE = (0.05, 0.5)  # of a pasted object: the root of its share of the frame
LARGEST = 1.6  # enlargement of what is pasted
TOUCH = 9  # pixels between objects that move as one
PART = (0.1, 0.5)  # of an object that is cut in two
SEEN = 0.15  # of an object, in the reference frame, if it is to be known


def camera_poses(rng, frames: int, far: bool, size: tuple[int, int], shape: tuple[int, int],
           focus: np.ndarray) -> np.ndarray:
    """(T, 2, 3) poses of an image of (H, W) `size` in frames of `shape`: crops that drift and zoom.

    Args:
        far: the first frame is seen from elsewhere.
        focus: (x, y) in the image, to be seen.
    """
    whole, frame = np.array(size[::-1]), np.array(shape[::-1])  # x and y
    cover, contain = (frame / whole).max(), (frame / whole).min()
    poses = []
    for shot in _shots(frames, far):
        count = len(shot)
        zoom = np.exp(rng.uniform(*np.log((max(contain, 0.6 * cover), 1.8 * cover))))
        mirror = rng.choice((-1, 1))
        crop = frame / zoom
        center = focus + rng.uniform(-0.4, 0.4, 2) * crop
        inside = np.clip(center, crop / 2, np.maximum(whole - crop / 2, crop / 2))
        center = np.where(crop < whole, inside, whole / 2 + rng.uniform(-0.1, 0.1, 2) * crop)
        zoom = zoom * np.exp(random_path(rng, count, 0.02))
        linear = linear_maps(random_path(rng, count, warps.TURN / 4), zoom,
                             random_path(rng, count, 0.005))
        linear[..., 0] *= mirror
        place = frame / 2 + random_path(rng, count, 0.015 * frame[0], size=(2,))
        poses.append(affine_poses(linear, center, place))
    return np.concatenate(poses)


def _shots(frames: int, far: bool) -> list[range]:
    """Frames that follow each other: all, or all but the first, which is far."""
    return [range(1), range(1, frames)] if far else [range(frames)]


def touching_groups(ids: np.ndarray) -> list[list[int]]:
    """The objects of a mask; those that touch each other together."""
    near = cv2.dilate((ids > 0).astype(np.uint8), np.ones((TOUCH, TOUCH), np.uint8))
    parts = cv2.connectedComponents(near)[1]
    joined: list[set[int]] = []
    for i in np.unique(ids[ids > 0]).tolist():
        place = {i} | {-int(p) for p in np.unique(parts[ids == i])}
        apart = [other for other in joined if not other & place]
        joined = [*apart, place.union(*(other for other in joined if other & place))]
    return [sorted(i for i in group if i > 0) for group in joined]


def split_part(rng, ids: np.ndarray, new: int) -> np.ndarray:
    """(H, W) ids -> the same, but that a part of one object, what is nearest to a point of it, is
    another: as a bag is that someone carries, it goes where the object goes."""
    rows, columns = np.nonzero(ids == rng.choice(np.unique(ids[ids > 0])))
    point = rng.integers(len(rows))
    far = np.hypot(rows - rows[point], columns - columns[point])
    part = far <= np.quantile(far, rng.uniform(*PART))
    ids = ids.copy()
    ids[rows[part], columns[part]] = new
    return ids


def object_layer(rng, cutouts: list[Cutout | None], poses: np.ndarray, shape: tuple[int, int],
        far: bool) -> Layer:
    """A layer of objects that a still image shows, moving on its own before the background.

    Args:
        cutouts: of the still image, one for each frame.
        poses: (T, 2, 3), those of the background.
    """
    linear = poses[:, :, :2]
    place = linear @ cutouts[0].center + poses[:, :, 2]
    natural = 0 if far else int(rng.integers(len(poses)))  # there it is where it was
    return moving_layer(rng, cutouts, linear, place, shape, far, natural)


def layer_path(layer: Layer) -> np.ndarray:
    """(T, 2) x and y of the middle of a layer's cut-outs in the frames."""
    middle = next(c for c in layer.cutouts if c).center
    return layer.poses[:, :, :2] @ middle + layer.poses[:, :, 2]


def pasted_layer(rng, cutouts: list[Cutout | None], poses: np.ndarray | None,
                 shape: tuple[int, int], far: bool, double: bool = False) -> Layer:
    """A layer of an object of another image or video, at any place.

    Args:
        cutouts: one for each frame.
        poses: (T, 2, 3), those of the background: it goes along with that; None: it lies still.
        double: it is of the clip's own image or video, and about as large as there.
    """
    frames, (height, width) = len(cutouts), shape
    first = cutouts[0] or next(c for c in cutouts if c)
    root = np.sqrt(np.count_nonzero(first.ids)) / np.sqrt(height * width)
    longest = max(first.ids.shape) / width
    if double:
        scale = np.exp(rng.normal(0, 0.15))
        if poses is not None:
            scale *= np.sqrt(np.abs(np.linalg.det(poses[0, :, :2])))
    else:
        scale = min(np.exp(rng.uniform(*np.log(SIZE))) / root, LARGEST, 1.2 / longest)
    linears, places = [], []
    for shot in _shots(frames, far):
        place = rng.uniform(0.1, 0.9, 2) * (width, height)
        linear = linear_maps(rng.normal(0, warps.TURN, 1), np.array([scale]), np.zeros(1))
        linear[..., 0] *= rng.choice((-1, 1))
        along = np.eye(2, 3)[None] if poses is None else poses[shot]
        change = along[:, :, :2] @ np.linalg.inv(along[0, :, :2])  # of the background
        place = change @ (place - along[0, :, 2]) + along[:, :, 2]
        linears.append(np.broadcast_to(change @ linear, (len(shot), 2, 2)))
        places.append(np.broadcast_to(place, (len(shot), 2)))
    return moving_layer(rng, cutouts, np.concatenate(linears), np.concatenate(places), shape, far,
                  leaves=0 if double else LEAVES)


def moving_layer(rng, cutouts: list[Cutout | None], linear: np.ndarray, place: np.ndarray,
           shape: tuple[int, int], far: bool, natural: int | None = None,
           leaves: float = LEAVES) -> Layer:
    """Cut-outs on a smooth way of their own, relative to one that is given.

    Args:
        linear, place: (T, 2, 2) and (T, 2) of that one; `place` is where the first cut-out's
            center lies.
        natural: in this frame they are just there.
    """
    frames, (height, width) = len(cutouts), shape
    haste = min(np.exp(rng.normal(-0.3, 0.6)), 2)
    ways = [random_path(rng, frames, haste * step, far, size) for step, size in
            ((warps.TURN, ()), (warps.GROWTH, ()), (warps.STRETCH, ()),
             (warps.SHIFT * width, (2,)))]
    bends = random_path(rng, frames, warps.BEND, far, (warps.MESH, warps.MESH, 2))
    if natural is not None:
        ways = [way - way[natural] for way in ways]
    turn, growth, stretch, shift = ways
    first = next(c for c in cutouts if c)
    bends = (bends.clip(-0.06, 0.06) * np.sqrt(first.ids.size)).astype(np.float32)
    linear = linear_maps(turn, np.exp(growth.clip(-0.4, 0.4)), stretch.clip(-0.15, 0.15)) @ linear
    place = _kept_in(place + shift, np.array([width, height]))
    if frames > 2 and rng.random() < leaves:
        place = place + _leave(rng, frames, place, first, linear, width)
    poses = affine_poses(linear, anchors(cutouts, far), place)
    for t, cutout in enumerate(cutouts):
        if cutout:
            poses[t, :, 2] += _beyond(cutout, poses[t], bends[t], shape)
    speed = np.diff(place, axis=0, append=place[-1:])
    if frames > 1:
        speed[-1] = speed[-2]
    if far:
        speed[0] = speed[1]
    return Layer(cutouts, poses, bends, speed if rng.random() < STREAKS else None)


def _kept_in(place: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(T, 2) places that turn back at the borders of (W, H)."""
    return size - np.abs(size - place % (2 * size))


def anchors(cutouts: list[Cutout | None], far: bool) -> np.ndarray:
    """(T, 2) centers, each that of the first cut-out, but for a first frame that is far."""
    centers = [c.center for c in cutouts if c]
    first = np.repeat(centers[0][None], len(cutouts), 0)
    if far and cutouts[0] and len(centers) > 1:
        first[1:] = centers[1]
    return first


def _leave(rng, frames: int, place, cutout: Cutout, linear, width: int) -> np.ndarray:
    """(T, 2) shifts out of the frame and back, never in the first frame."""
    away = int(rng.integers(1, frames))
    half = np.abs(cutout.ids.shape[1] * linear[away, 0, 0]) / 2 + 4
    x = place[away, 0]
    distance = -(x + half) if x < width / 2 else width - x + half
    shift = np.zeros((frames, 2))
    for t in range(1, frames):
        shift[t, 0] = distance * max(0, 1 - 0.6 * abs(t - away))
    return shift


def _beyond(cutout: Cutout, pose: np.ndarray, bend: np.ndarray,
            shape: tuple[int, int]) -> np.ndarray:
    """(2,) shift that keeps the sides where its image's border cuts a thing out of the frame."""
    ends = cutout.box @ pose[:, :2].T + pose[:, 2]  # left top, right top, left low, right low
    slack = np.abs(bend).max() * np.linalg.norm(pose[:, :2], 2) * 0.5 + 2
    shift = np.zeros(2)
    for axis, (low, high) in enumerate((((0, 2), (1, 3)), ((0, 1), (2, 3)))):
        cuts = cutout.cut[axis], cutout.cut[axis + 2]
        if cuts[0] == cuts[1]:
            continue
        side = ends[list(low if cuts[0] else high), axis]
        other = ends[list(high if cuts[0] else low), axis]
        if side.mean() < other.mean():
            shift[axis] = min(0, -slack - side.max())
        else:
            shift[axis] = max(0, shape[1 - axis] + slack - side.min())
    return shift


def hidden_ids(layers: list[Layer], before: np.ndarray, after: np.ndarray) -> list[int]:
    """Ids of which too little is left to be known by, behind others or beyond the frame.

    Args:
        before, after: (H, W) ids of the first frame, without and with the layers in front.
    """
    whole = areas(before).astype(float)
    for layer in layers:
        cutout = layer.cutouts[0]
        if cutout:
            scale = np.abs(np.linalg.det(layer.poses[0, :, :2]))
            whole += scale * areas(np.ascontiguousarray(cutout.ids))
    left = areas(after)
    return [i for i in range(1, 256) if left[i] < SEEN * whole[i]]


def vary_lighting(rng, images: list[np.ndarray], far: bool) -> list[np.ndarray]:
    """Images (H, W, 3) with another light, contrast, colour and sharpness, which change smoothly.

    Args:
        far: the first image's have nothing to do with the others'.
    """
    frames = len(images)
    values = random_path(rng, frames, 0.03, size=(4,)) + rng.uniform(-0.3, 0.3, 4)
    if far:
        values[0] = rng.uniform(-0.3, 0.3, 4)
    blur = np.abs(random_path(rng, frames, 0.5)) if rng.random() < 0.15 else np.zeros(frames)
    result = []
    for image, (light, contrast, saturation, hue), sigma in zip(images, values, blur):
        image = preprocess.adjust_colour(image, 1 + light, 1 + contrast, 1 + saturation, hue)
        if sigma > 0.3:
            image = cv2.GaussianBlur(image, (0, 0), min(sigma, 1.5))
        result.append(image)
    return result
