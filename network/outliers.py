"""Outlier removal and the final mask of a frame (Hu, Huang, Schwing, 2018, section 3.3).

NumPy and OpenCV only: `lite.py` uses the same functions without PyTorch.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

# Reach: how far an object's previous mask may be from a connected component that contains the
# object, in units of the object's size (the square root of its reference area). A narrow occluder
# splits an object, and the part that emerges on its other side may touch another object: the two
# parts are then as far apart as the occluder is wide. With a fixed reach of 8 pixels such a part
# went to the other object for good; a larger reach protects less against look-alikes
# (docs/log/2026-11-28-identities.md).
REACH = 0.5
# Pixels of the network's input: even a small object moves between frames, and masks are not exact.
MIN_REACH = 8
# The reach of a single object, whose components out of reach become background. Larger, because no
# other object competes for a component: at 0.25 an object that emerges from behind a tree is lost
# (demo hiding 0.83, soccerball 0.899); without the rule look-alikes are included (six single
# objects among look-alikes, mean J 0.496 without it and 0.621 with it).
REACH_ALONE = 1.0
# An object whose previous mask covers at most this fraction of its reference area counts as
# vanished: it may re-appear anywhere. At 0 a few stray pixels would pin the search to their place;
# a larger value lifts the limits of objects that are merely far away.
VANISHED = 0.01
TINY = np.float32(1e-12)  # a probability that is negligible but not 0


def _window(mask: np.ndarray, distance: float) -> tuple[slice, slice]:
    """Return the window of an (H, W) bool mask that its extrusion can reach; empty if it is."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    if not width:
        return slice(0), slice(0)
    margin = int(distance) + 1
    return (slice(max(0, top - margin), top + height + margin),
            slice(max(0, left - margin), left + width + margin))


def extruded(mask: np.ndarray, distance: float) -> np.ndarray:
    """Extrude an (H, W) bool mask, which isn't empty, by `distance` pixels.

    The same as dilation by a disk, but computed by a distance transform, whose cost doesn't grow
    with the distance. It takes most of the time of deciding a frame, so it is limited to the mask's
    `_window`: outside of it every pixel is further away.
    """
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2,
                                 cv2.DIST_MASK_PRECISE) <= distance


def _components_near(mask: np.ndarray, distance: float, parts: np.ndarray,
                     count: int) -> np.ndarray:
    """Return which of `count` connected components come within `distance` of a mask, (count,) bool.

    Args:
        parts: (H, W) the component of each pixel, 0 for none.
    """
    window = _window(mask, distance)
    mask, parts = mask[window], parts[window]
    near, around = np.zeros((2, count), bool)
    near[parts[mask]] = True
    around[parts.ravel()] = True
    if (around & ~near)[1:].any():  # else the distances tell nothing new
        near[parts[extruded(mask, distance)]] = True
    return near


def remove_outliers(probabilities: np.ndarray, previous: np.ndarray, object_ids: Sequence[int],
                    shares: Mapping[int, float], distance: float) -> None:
    """Turn an object's probability outside its extruded previous mask into background, in place.

    The paper's outlier removal. An object that vanished may re-appear anywhere.

    Args:
        probabilities: (N+1, H, W), channel 0 the background.
        previous: (H, W) uint8 mask of the previous frame.
        object_ids: the objects of channels 1 to N.
        shares: reference area of each object as a fraction of the frame, in [0, 1].
        distance: of the extrusion, in pixels of the probabilities.
    """
    for channel, object_id in enumerate(object_ids, start=1):
        before = previous == object_id
        if _share(before) <= VANISHED * shares[object_id]:
            continue
        removed = probabilities[channel].copy()
        window = _window(before, distance)
        removed[window][extruded(before[window], distance)] = 0
        probabilities[0] += removed
        probabilities[channel] -= removed


def keep_identities(probabilities: np.ndarray, previous: np.ndarray, object_ids: Sequence[int],
                    shares: Mapping[int, float], threshold: float = 0.5,
                    pixel: float = 1) -> None:
    """Restrict each connected component of the foreground to objects within reach, in place.

    With several objects, a component can only contain those whose previous masks were within
    reach of it, so a look-alike further away can't claim it. An object that vanished may re-appear
    in any component, and a component that no object was near may belong to any.

    With a single object, components out of its reach become background, which excludes
    look-alikes, unless all are, or the object had vanished: then it may re-appear anywhere.

    Args:
        probabilities: (N+1, H, W), channel 0 the background, which is unchanged if N > 1.
        previous: (H, W) uint8 mask of the previous frame.
        object_ids: the objects of channels 1 to N.
        shares: reference area of each object as a fraction of the frame, in [0, 1].
        threshold: of the foreground, see `decide`.
        pixel: size of a pixel of the network's input, in which `MIN_REACH` is, in pixels of the
            probabilities.
    """
    foreground = probabilities[0] < 1 - threshold
    count, parts = cv2.connectedComponents(foreground.astype(np.uint8))
    if len(object_ids) == 1:
        before = previous == object_ids[0]
        if count > 2 and _share(before) > VANISHED * shares[object_ids[0]]:
            size = np.sqrt(shares[object_ids[0]] * before.size)
            reach = max(MIN_REACH * pixel, REACH_ALONE * size)
            near = _components_near(before, reach, parts, count)
            if near[1:].any():
                near[0] = True
                far = ~near[parts]
                probabilities[0, far] += probabilities[1, far]
                probabilities[1, far] = 0
        return
    near = np.zeros((len(object_ids), count), bool)
    vanished = np.zeros((len(object_ids), 1), bool)
    for channel, object_id in enumerate(object_ids):
        before, share = previous == object_id, shares[object_id]
        vanished[channel] = _share(before) <= VANISHED * share
        if not vanished[channel]:
            reach = max(MIN_REACH * pixel, REACH * np.sqrt(share * previous.size))
            near[channel] = _components_near(before, reach, parts, count)
    allowed = near | vanished | ~near.any(0)
    allowed[:, 0] = True  # the background
    limited = (~allowed.all(0))[parts]  # pixels
    if not limited.any():
        return
    # TINY, as all allowed objects may have probability 0: the foreground is then shared equally
    kept = (probabilities[1:, limited] + TINY) * allowed[:, parts[limited]]
    probabilities[1:, limited] = kept * ((1 - probabilities[0, limited]) / kept.sum(0))


def _share(mask: np.ndarray) -> float:
    """Return the fraction of the pixels of a bool mask that are True, in [0, 1]."""
    return np.count_nonzero(mask) / mask.size


def decide(probabilities: np.ndarray, object_ids: Sequence[int],
           threshold: float = 0.5) -> np.ndarray:
    """Turn probabilities (N+1, H, W) into a mask, (H, W) uint8 object ids.

    Foreground first: whether a pixel belongs to any object depends on their sum, so that two
    objects that compete for a pixel don't lose it to the background.

    Args:
        probabilities: (N+1, H, W), channel 0 the background.
        object_ids: the objects of channels 1 to N.
        threshold: a pixel is foreground where the objects' summed probability exceeds this value
            in [0, 1]. Lower values grow all masks.
    """
    if not object_ids:
        return np.zeros(probabilities.shape[1:], np.uint8)
    foreground = (probabilities[0] < 1 - threshold).view(np.uint8)
    left, top, width, height = cv2.boundingRect(foreground)
    window = slice(top, top + height), slice(left, left + width)
    # channel by channel: `argmax` along the first axis takes many times as long
    best, *others = (channel[window] for channel in probabilities[1:])
    mask = np.full(best.shape, object_ids[0], np.uint8)
    for object_id, channel in zip(object_ids[1:], others):
        np.copyto(mask, object_id, where=channel > best)
        best = np.maximum(best, channel)
    foreground[window] *= mask
    return foreground
