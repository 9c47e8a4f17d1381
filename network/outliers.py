"""Outlier removal, and from probabilities to a mask (Hu, Huang, Schwing, 2018, section 3.3).

Arrays of numpy in, arrays out: it knows neither the network nor what it keeps of a video.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

NEAR = 8  # pixels: an object that was no nearer to a connected component is no part of it
TINY = np.float32(1e-12)  # a probability
REACH = 0.25  # of a single object's size (the root of its area): likewise, where that is further
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
                    threshold: float = 0.5) -> None:
    """Restrict each connected component of the foreground to objects that were near, in place.

    A body is one thing: of several look-alikes it is one that was there in the frame before, at
    most `NEAR` pixels away. A component that no object was near to may be any of them.

    Of a single object, components that it was not near to are taken for background, unless
    there are no others: a twin elsewhere is not taken along, but what was hidden is found again.

    Args:
        probabilities: (N+1, H, W), channel 0 the background, which stays as it is if N > 1.
        previous: (H, W) uint8 mask of the frame before.
        object_ids: in the order of the channels.
        threshold: see `decide`.
    """
    foreground = probabilities[0] < 1 - threshold
    count, parts = cv2.connectedComponents(foreground.astype(np.uint8))
    if len(object_ids) == 1:
        before = previous == object_ids[0]
        if count > 2 and before.any():
            reach = max(NEAR, REACH * np.sqrt(np.count_nonzero(before)))
            near = np.zeros(count, bool)
            near[parts[extrude(before, reach)]] = True
            if near[1:].any():
                near[0] = True
                far = ~near[parts]
                probabilities[0, far] += probabilities[1, far]
                probabilities[1, far] = 0
        return
    allowed = np.zeros((len(object_ids), count), bool)
    for mine, object_id in zip(allowed, object_ids):
        mine[parts[extrude(previous == object_id, NEAR)]] = True
    allowed[:, ~allowed.any(0)] = True
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
