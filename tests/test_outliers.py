"""Outlier removal and identities against brute force and by hand; the final decision."""

import numpy as np
import pytest
from conftest import SHAPE, draw_frame

import preprocess
from datasets import demo
from metrics import jaccard
from network.outliers import (
    MIN_REACH,
    REACH,
    VANISHED,
    decide,
    extruded,
    keep_identities,
    remove_outliers,
)
from tracking.tracker import Tracker


@pytest.mark.parametrize("distance", [0, 1, 5, 12.5])
def test_extruding_is_a_disk_dilation(distance):
    rng = np.random.default_rng(0)
    mask = rng.random((37, 53)) > 0.995
    ys, xs = np.nonzero(mask)
    y, x = np.mgrid[:37, :53]
    nearest = np.sqrt((y[..., None] - ys) ** 2 + (x[..., None] - xs) ** 2).min(-1)
    np.testing.assert_array_equal(extruded(mask, distance), nearest <= distance)


def test_a_few_stray_pixels_do_not_lock_the_object_out():
    stray = np.zeros((60, 200), np.uint8)
    stray[50, 5] = 1
    probabilities = np.zeros((2, 60, 200), np.float32)
    probabilities[1, 20:36, 160:176] = 1
    remove_outliers(probabilities, stray, [1], {1: 16 * 16 / stray.size}, distance=5)
    assert probabilities[1, 20:36, 160:176].min() == 1


@pytest.mark.parametrize("pixels, locked", [(9, False), (11, True)])
def test_an_object_has_vanished_at_a_hundredth_of_its_reference_area(pixels, locked):
    assert VANISHED == 0.01
    previous = np.zeros((60, 200), np.uint8)
    previous[50, :pixels] = 1
    probabilities = np.zeros((2, 60, 200), np.float32)
    probabilities[1, 20:36, 160:176] = 1
    remove_outliers(probabilities, previous, [1], {1: 1000 / previous.size}, distance=5)
    assert probabilities[1].any() != locked


def test_removed_probability_goes_to_the_background():
    mask = draw_frame(0, (1, 2))[1]
    shares = {i: float((mask == i).mean()) for i in (2, 1)}  # in another order than the channels
    probabilities = np.random.default_rng(0).dirichlet((1, 1, 1), SHAPE).transpose(2, 0, 1)
    before = probabilities.copy()
    remove_outliers(probabilities, mask, [1, 2], shares, distance=3)
    np.testing.assert_allclose(probabilities.sum(0), 1)
    near = extruded(mask == 2, 3)
    np.testing.assert_array_equal(probabilities[2], np.where(near, before[2], 0))


def shares_of(mask, object_ids):
    return {i: float((mask == i).mean()) for i in object_ids}


def probabilities_of(mask, object_ids):
    """(N+1, H, W) probabilities: 0.9 for the channel of the mask."""
    shares = np.stack([mask == i for i in (0, *object_ids)]).astype(np.float32)
    return (0.9 * shares + 0.1 / len(shares)).astype(np.float32)


def follow(truths, object_ids=(1, 2), seen=lambda mask: mask):
    """The mask of each frame after the first, if the network sees `seen` of the true masks."""
    previous, shares = truths[0], shares_of(truths[0], object_ids)
    for truth in truths[1:]:
        probabilities = probabilities_of(seen(truth), object_ids)
        keep_identities(probabilities, previous, object_ids, shares)
        previous = decide(probabilities, object_ids)
        yield previous


def crossing(frames=40, post=0, step=6):
    """Masks of two 60-pixel discs that cross, 2 in front of 1, both behind a post."""
    y, x = np.mgrid[:120, :300]
    for i in range(frames):
        mask = np.zeros((120, 300), np.uint8)
        mask[(y - 55) ** 2 + (x - 40 - step * i) ** 2 <= 900] = 1
        mask[(y - 65) ** 2 + (x - 260 + step * i) ** 2 <= 900] = 2
        mask[:, 150 - post // 2:150 + post // 2] = 0
        yield mask


@pytest.mark.parametrize("post", [0, 14, 24, 70])
@pytest.mark.parametrize("step", [4, 6])
def test_objects_that_cross_behind_a_post_keep_their_identities(post, step):
    """A wide post hides them completely, a narrow one leaves parts on both sides."""
    truths = list(crossing(240 // step - 3, post, step))
    for found, truth in zip(follow(truths), truths[1:], strict=True):
        np.testing.assert_array_equal(found, truth)


def test_an_object_reappears_from_behind_another():
    y, x = np.mgrid[:120, :300]
    truths = []
    for i in range(40):
        mask = np.zeros((120, 300), np.uint8)
        mask[(y - 60) ** 2 + (x - 40 - 6 * i) ** 2 <= 100] = 1
        mask[20:100, 100:180] = 2
        truths.append(mask)
    assert any(not (mask == 1).any() for mask in truths)
    for found, truth in zip(follow(truths), truths[1:], strict=True):
        np.testing.assert_array_equal(found, truth)


def test_stray_pixels_of_a_hidden_object_do_not_join_its_occluder():
    """A hundredth of its area at the frame's edge is not its position."""
    previous = np.zeros((120, 300), np.uint8)
    previous[20:100, 100:180], previous[60, :3] = 2, 1
    truth = np.where(previous == 1, 0, previous)
    truth[50:70, 180:190] = 1
    probabilities = probabilities_of(truth, (1, 2))
    keep_identities(probabilities, previous, (1, 2), {1: 0.01, 2: 0.2})
    np.testing.assert_array_equal(decide(probabilities, (1, 2)), truth)


def test_look_alikes_that_stay_apart_never_swap():
    """The network swaps the objects, but the foreground is correct."""
    truths = [np.zeros((80, 300), np.uint8) for _ in range(30)]
    for i, mask in enumerate(truths):
        mask[20:40, 20 + 3 * i:60 + 3 * i], mask[20:40, 120 + 3 * i:160 + 3 * i] = 1, 2
    swapped = np.array([0, 2, 1], np.uint8)
    for found, truth in zip(follow(truths, seen=lambda mask: swapped[mask]), truths[1:]):
        np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize("distance, other", [(20, True), (21, False)])
def test_the_search_reaches_half_the_object_size(distance, other):
    assert REACH == 0.5
    previous = np.zeros((60, 200), np.uint8)
    previous[10:50, 10:50], previous[10:50, 49 + distance:89 + distance] = 1, 2
    body = previous == 2
    probabilities = probabilities_of(np.where(body, 1, 0), (1, 2))
    keep_identities(probabilities, previous, (1, 2), shares_of(previous, (1, 2)))
    assert (decide(probabilities, (1, 2))[body] == (1 if other else 2)).all()


@pytest.mark.slow
def test_the_demo_keeps_its_identities_backward(shipped):
    """A creature passes behind a tree and reappears touching the other one."""
    frames = list(demo.draw(demo.SCENES["val"]["meeting"]))[15:10:-1]
    tracker = Tracker(shipped)
    tracker.step(preprocess.to_tensor(frames[0][0]), frames[0][1])
    for image, truth in frames[1:]:
        found = tracker.step(preprocess.to_tensor(image)).mask
        for i in (1, 2):
            assert jaccard(found == i, truth == i) > 0.9


def test_a_component_keeps_the_identity_of_a_nearby_object():
    """Three squares: near the first object, near both, near none."""
    previous = np.zeros((60, 160), np.uint8)
    previous[20:30, 10:20], previous[20:30, 60:70], previous[20:30, 70:80] = 3, 3, 7
    probabilities = np.random.default_rng(0).dirichlet((1, 1, 1), (60, 160)).transpose(2, 0, 1)
    probabilities[:] *= 0.05 / probabilities.sum(0)
    probabilities[0] += 0.95
    squares = [(slice(24, 34), slice(12, 22)), (slice(24, 34), slice(62, 82)),
               (slice(24, 34), slice(78 + 2 * MIN_REACH, 88 + 2 * MIN_REACH))]
    for square in squares:
        probabilities[(slice(None), *square)] = np.array([0.1, 0.2, 0.7])[:, None, None]
    before = probabilities.copy()
    keep_identities(probabilities, previous, [3, 7], shares_of(previous, [3, 7]))
    first, *others = squares
    np.testing.assert_allclose(probabilities[(slice(None), *first)].transpose(1, 2, 0)
                               - [0.1, 0.9, 0], 0, atol=1e-6)
    for square in others:
        np.testing.assert_array_equal(*(x[(slice(None), *square)] for x in (probabilities, before)))
    np.testing.assert_allclose(probabilities.sum(0), 1)
    np.testing.assert_array_equal(probabilities[0], before[0])


def test_distant_look_alikes_are_dropped_and_hidden_objects_return():
    previous = np.zeros((60, 160), np.uint8)
    previous[20:30, 10:20] = 3
    probabilities = np.zeros((2, 60, 160), np.float32)
    probabilities[1, 22:32, 12:22] = probabilities[1, 30:40, 100:110] = 1
    probabilities[0] = 1 - probabilities[1]
    both = probabilities.copy()
    keep_identities(probabilities, previous, [3], shares_of(previous, [3]))
    assert (probabilities[1] > 0.5).sum() == 100 and probabilities[1, 25, 15] == 1
    np.testing.assert_allclose(probabilities.sum(0), 1)
    for before in (0 * previous, np.roll(previous, 60, 1)):  # nowhere, or near to nothing
        found = both.copy()
        keep_identities(found, before, [3], shares_of(before, [3]))
        np.testing.assert_array_equal(found, both)


@pytest.mark.parametrize("ids", [[3], [3, 7]])
def test_stray_pixels_do_not_hold_a_vanished_object(ids):
    stray = np.zeros((120, 300), np.uint8)
    stray[100, 10:13] = 3
    probabilities = np.zeros((1 + len(ids), 120, 300), np.float32)
    probabilities[1, 20:60, 200:240] = probabilities[1, 100, 10:13] = 1
    probabilities[0] = 1 - probabilities[1]
    keep_identities(probabilities, stray, ids, {3: 1600 / stray.size, 7: 0.01})
    assert (decide(probabilities, ids) == 3).sum() == 1603


@pytest.mark.parametrize("pixel, kept", [(1, False), (2, True)])
def test_the_least_reach_is_in_pixels_of_the_network(pixel, kept):
    previous = np.zeros((60, 160), np.uint8)
    previous[20:24, 10:14] = 1
    probabilities = np.zeros((2, 60, 160), np.float32)
    probabilities[1, 20:24, 12:16] = probabilities[1, 20:24, 24:28] = 1  # the latter 11 away
    probabilities[0] = 1 - probabilities[1]
    keep_identities(probabilities, previous, [1], {1: 16 / previous.size}, pixel=pixel)
    assert (probabilities[1, 20:24, 24:28] == 1).all() == kept


def test_a_component_without_a_plausible_object_stays_foreground():
    previous = np.zeros((20, 30), np.uint8)
    previous[5:9, 5:9], previous[5:9, 25:29] = 1, 2
    probabilities = np.zeros((3, 20, 30), np.float32)
    probabilities[0] = 1
    probabilities[:, 5:9, 6:10] = np.float32([0, 0, 1])[:, None, None]
    keep_identities(probabilities, previous, [1, 2], {1: 16 / 600, 2: 16 / 600})
    assert (decide(probabilities, [1, 2]) > 0).sum() == 16
    assert (decide(probabilities, [1, 2])[5:9, 6:10] == 1).all()


@pytest.mark.parametrize("threshold, expected", [(0.2, [9, 4, 9, 9]), (0.5, [0, 4, 0, 9]),
                                                 (0.65, [0, 4, 0, 0]), (0.9, [0, 0, 0, 0])])
def test_the_union_is_thresholded_and_the_likeliest_object_wins(threshold, expected):
    probabilities = np.array([[0.6, 0.1, 0.5, 0.4], [0.15, 0.8, 0.2, 0.29],
                              [0.25, 0.1, 0.3, 0.31]])[:, None]
    mask = decide(probabilities, [4, 9], threshold)
    assert mask.dtype == np.uint8 and mask.tolist() == [expected]
