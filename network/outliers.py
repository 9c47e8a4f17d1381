"""Outlier removal, and from probabilities to a mask (Hu, Huang, Schwing, 2018, section 3.3).

Arrays of numpy in, arrays out: it knows neither the network nor what it keeps of a video.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

# How far an object may be from a connected component that it is a part of, as a share of its own
# size (the root of its reference area). Something narrow in front of an object hides a strip of it,
# and what comes out on the other side may touch another object: the two parts of a body are then
# as far apart as what hides it is wide. A fixed 8 pixels gave such a part to the other object for
# good; a larger share protects less against look-alikes (docs/log/2026-11-28-identities.md).
REACH = 0.5
NEAR = 8  # pixels, the least reach: even a small object moves, and masks are not exact
TINY = np.float32(1e-12)  # a probability
# The same for a single object, whose components out of reach are background. More, because no other
# object could take a part for its own: at 0.25 what comes out behind a tree is lost (demo hiding
# 0.83, soccerball 0.899); without the rule twins are taken along (six single objects among
# look-alikes, mean J 0.496 without it and 0.621 with it).
REACH_ALONE = 1.0
VANISHED = 0.01  # an object at most this share of its reference area no longer guides anything


def extrude(mask: np.ndarray, distance: float) -> np.ndarray:
    """(H, W) bool -> (H, W) bool: the pixels within `distance` of the mask (a disk dilation).

    By the distance transform, whose cost doesn't grow with the distance.
    """
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2,
                                 cv2.DIST_MASK_PRECISE) <= distance


def remove_outliers(probabilities: np.ndarray, previous: np.ndarray, object_ids: Sequence[int],
                    shares: Mapping[int, float], distance: float) -> None:
    """Give an object's probability outside its extruded previous mask to the background, in place.

    An object that vanished may re-appear anywhere.

    Args:
        probabilities: (N+1, H, W), channel 0 the background.
        previous: (H, W) uint8 mask of the frame before.
        object_ids: the objects of channels 1 to N.
        shares: of each object the share of a reference frame that it covers, in [0, 1].
        distance: pixels.
    """
    for channel, object_id in enumerate(object_ids, start=1):
        before = previous == object_id
        if before.mean() <= VANISHED * shares[object_id]:
            continue
        outside = ~extrude(before, distance)
        probabilities[0][outside] += probabilities[channel][outside]
        probabilities[channel][outside] = 0


def keep_identities(probabilities: np.ndarray, previous: np.ndarray, object_ids: Sequence[int],
                    shares: Mapping[int, float], threshold: float = 0.5) -> None:
    """Restrict each connected component of the foreground to objects that were near, in place.

    A connected component consists of objects that were within reach of it in the frame before:
    a look-alike further away has no part of it. An object that vanished may re-appear as a part
    of any component, next to what hid it, too; a component that no object was near to may be any.

    Of a single object, components that it was not near to are taken for background, unless
    there are no others: a twin elsewhere is not taken along, but what was hidden is found again.

    Args:
        probabilities: (N+1, H, W), channel 0 the background, which stays as it is if N > 1.
        previous: (H, W) uint8 mask of the frame before.
        object_ids: the objects of channels 1 to N.
        shares: of each object the share of a reference frame that it covers, in [0, 1].
        threshold: see `decide`.
    """
    foreground = probabilities[0] < 1 - threshold
    count, parts = cv2.connectedComponents(foreground.astype(np.uint8))
    if len(object_ids) == 1:
        before = previous == object_ids[0]
        if count > 2 and before.any():
            reach = max(NEAR, REACH_ALONE * np.sqrt(shares[object_ids[0]] * before.size))
            near = np.zeros(count, bool)
            near[parts[extrude(before, reach)]] = True
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
        vanished[channel] = before.mean() <= VANISHED * share
        if not vanished[channel]:
            reach = max(NEAR, REACH * np.sqrt(share * previous.size))
            near[channel, parts[extrude(before, reach)]] = True
    allowed = near | vanished | ~near.any(0)
    allowed[:, 0] = True  # the background
    limited = (~allowed.all(0))[parts]  # pixels
    if not limited.any():
        return
    # never 0 where it is allowed, since it may be all that is left
    found = (probabilities[1:, limited] + TINY) * allowed[:, parts[limited]]
    probabilities[1:, limited] = found * ((1 - probabilities[0, limited]) / found.sum(0))


def decide(probabilities: np.ndarray, object_ids: Sequence[int],
           threshold: float = 0.5) -> np.ndarray:
    """(N+1, H, W) probabilities -> (H, W) uint8 mask of object ids.

    Args:
        threshold: a pixel belongs to an object where the probability of all objects together is
            above it, in [0, 1].
    """
    if not object_ids:
        return np.zeros(probabilities.shape[1:], np.uint8)
    # channel by channel: `argmax` along the first axis takes many times as long
    mask, best = np.full(probabilities.shape[1:], object_ids[0], np.uint8), probabilities[1]
    for object_id, channel in zip(object_ids[1:], probabilities[2:]):
        np.copyto(mask, object_id, where=channel > best)
        best = np.maximum(best, channel)
    return mask * (probabilities[0] < 1 - threshold)
