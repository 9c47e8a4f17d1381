"""Synthetic motion: how backgrounds and objects move, bend and occlude each other."""


import cv2
import numpy as np
import pytest

import preprocess
from training import lookalikes, synthetic_motion, warps
from training.warps import Cutout

SHAPE = (64, 112)
COLOURS = ((230, 40, 40), (40, 220, 40), (60, 60, 240))


def test_moving_a_cutout_by_whole_pixels_copies_it():
    rng = np.random.default_rng(0)
    image = np.full((40, 60, 3), 200, np.uint8)
    ids = np.zeros((40, 60), np.uint8)
    ids[10:20, 20:36], ids[20:30, 20:36] = 3, 7
    cutout = warps.cut_out(image, ids)
    assert cutout.corner == (17, 7) and cutout.cut == (False,) * 4
    frame = rng.integers(0, 99, (50, 70, 3), dtype=np.uint8)
    before, mask = frame.copy(), np.full((50, 70), 9, np.uint8)
    pose = np.array([[[1, 0, 12], [0, 1, -4.0]]])
    bends = np.zeros((1, warps.MESH, warps.MESH, 2), np.float32)
    warps.Layer([cutout], pose, bends).paste(0, frame, mask)
    expected = np.full((50, 70), 9, np.uint8)
    expected[6:16, 32:48], expected[16:26, 32:48] = 3, 7
    assert np.count_nonzero(mask != expected) <= 4  # corners
    assert (frame[8:24, 34:46] == 200).all()  # an edge is soft
    outside = np.ones((50, 70), bool)
    outside[4:28, 30:50] = False
    assert (frame[outside] == before[outside]).all()


def test_a_part_of_an_object_can_become_an_object():
    ids = np.zeros((40, 60), np.uint8)
    ids[5:35, 10:50], ids[:4] = 3, 7
    for seed in range(20):
        found = synthetic_motion.split_part(np.random.default_rng(seed), ids, 9)
        new = found == 9
        np.testing.assert_array_equal(np.where(new, ids, 0) > 0, new)  # of what was an object
        np.testing.assert_array_equal(found[~new], ids[~new])
        (one,) = np.unique(ids[new])
        assert 0.08 < np.count_nonzero(new) / np.count_nonzero(ids == one) < 0.55
        assert cv2.connectedComponents(new.astype(np.uint8))[0] == 2


def test_a_quarter_turn_is_exact():
    image = np.random.default_rng(1).integers(0, 255, (21, 21, 3), dtype=np.uint8)
    turn = warps.linear_maps(np.array([np.pi / 2]), np.ones(1), np.zeros(1))
    pose = warps.affine_poses(turn, np.full(2, 10.0), np.full((1, 2), 10.0))[0]
    bend = np.zeros((warps.MESH, warps.MESH, 2), np.float32)
    found = warps.warp_background(image, pose, bend, (21, 21))
    assert np.abs(found.astype(int) - np.rot90(image, -1)).max() <= 1


def test_shrinking_averages_pixels():
    noise = np.random.default_rng(2).integers(0, 255, (160, 160, 3), dtype=np.uint8)
    ids = np.ones((160, 160), np.uint8)
    frame, mask = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    pose, bend = np.array([[[0.2, 0, 4], [0, 0.2, 4]]]), np.zeros((1, warps.MESH, warps.MESH, 2))
    warps.Layer([warps.cut_out(noise, ids)], pose, bend.astype(np.float32)).paste(0, frame, mask)
    inside = frame[8:32, 8:32].astype(float)
    # the mean of 25 independent pixels has a fifth of their standard deviation, 74
    assert 4 < inside.std() < 22 and abs(inside.mean() - 127) < 5


def test_a_constant_bend_shifts_and_a_ramp_stretches():
    image = np.tile(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (80, 1, 3))
    bend = np.zeros((warps.MESH, warps.MESH, 2), np.float32)
    bend[..., 0] = 5
    found = warps.warp_background(image, np.eye(2, 3), bend, (80, 100))
    np.testing.assert_array_equal(found[:, :90], image[:, 5:95])
    bend[..., 0] = np.arange(warps.MESH) * 4
    found = warps.warp_background(image, np.eye(2, 3), bend, (80, 100)).astype(int)
    expected = 2 * (np.arange(100) + 12 * np.arange(100) / 100)
    assert np.abs(found[40, 15:80, 0] - expected[15:80]).max() <= 3


def test_a_hole_is_filled_to_match_its_surroundings():
    x, y = np.meshgrid(np.arange(160), np.arange(120))
    rows = 20 + 100 * (y > 60) + 0.3 * x  # a horizon, and light from one side
    image = np.repeat(rows[..., None], 3, 2).astype(np.uint8)
    hole = np.zeros((120, 160), np.uint8)
    cv2.circle(hole, (70, 55), 25, 1, -1)
    broken = np.where(hole[..., None] > 0, np.uint8(255), image)
    found = warps.inpaint(broken, hole).astype(int)
    error = np.abs(found - image).max(2)
    assert error[np.abs(y - 60) > 8].max() < 16 and error.mean() < 2
    far = cv2.dilate(hole, np.ones((15, 15), np.uint8)) == 0
    assert not error[far].any()


def test_an_image_without_background_is_filled_too():
    found = warps.inpaint(np.full((30, 40, 3), 9, np.uint8), np.ones((30, 40), np.uint8))
    assert found.shape == (30, 40, 3)


def test_colour_changes_match_values_by_hand():
    image = np.random.default_rng(2).integers(30, 120, (8, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(preprocess.adjust_colour(image, 1, 1, 1, 0), image)
    half = preprocess.adjust_colour(image, 0.5, 1, 1, 0)
    assert np.abs(half - image / 2).max() <= 1
    grey = preprocess.adjust_colour(image, 1, 1, 0, 0)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    assert np.abs(grey.astype(int) - expected).max() <= 1
    turned = preprocess.adjust_colour(image, 1, 1, 1, 2 * np.pi / 3)
    luma = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(int) for x in (image, turned)]
    assert np.abs(luma[0] - luma[1]).max() <= 2 and np.abs(turned.astype(int) - image).max() > 20


def test_touching_objects_form_a_group():
    ids = np.zeros((40, 90), np.uint8)
    ids[5:20, 5:20], ids[5:20, 22:30], ids[5:20, 60:70], ids[30:38, 25:28] = 4, 2, 7, 1
    ids[30:38, 66:70] = 7
    assert sorted(synthetic_motion.touching_groups(ids)) == [[1], [2, 4], [7]]
    ids[20:30, 26] = 1
    assert sorted(synthetic_motion.touching_groups(ids)) == [[1, 2, 4], [7]]
    assert synthetic_motion.touching_groups(np.zeros((9, 9), np.uint8)) == []


def test_random_paths_start_at_zero_and_are_smooth():
    ways = np.array([warps.random_path(np.random.default_rng(i), 6, 1.0) for i in range(300)])
    assert (ways[:, 0] == 0).all()
    steps = np.diff(ways, axis=1)
    assert 0.8 < steps[:, 0].std() < 1.5
    assert np.diff(steps, axis=1).std() < 0.6 * steps.std()  # of white noise: 1.4
    far = np.array([warps.random_path(np.random.default_rng(i), 6, 1.0, jump=True)
                    for i in range(300)])
    assert np.diff(far, axis=1)[:, 0].std() > 3


@pytest.mark.parametrize("far", [False, True])
def test_an_object_cut_by_the_border_stays_at_the_border(far):
    image = np.full((60, 80, 3), 200, np.uint8)
    ids = np.zeros((60, 80), np.uint8)
    ids[30:60, 30:50] = 1
    bottom = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        cutouts = [warps.cut_out(image, ids)] * 4
        layer = synthetic_motion.pasted_layer(rng, cutouts, None, (90, 160), far)
        for t in range(4):
            frame, mask = np.zeros((90, 160, 3), np.uint8), np.zeros((90, 160), np.uint8)
            layer.paste(t, frame, mask)
            columns = np.flatnonzero(mask.any(0))
            if len(columns):
                middle = columns[len(columns) // 2]
                bottom += 1
                assert mask[-1, middle]
    assert bottom > 100


def test_an_object_may_leave_but_not_the_reference_frame():
    image, ids = np.full((60, 80, 3), 200, np.uint8), np.zeros((60, 80), np.uint8)
    ids[20:40, 30:50] = 1
    gone = back = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        cutouts = [warps.cut_out(image, ids)] * 4
        place = np.full((4, 2), (80.0, 45.0))
        layer = synthetic_motion.moving_layer(rng, cutouts, np.tile(np.eye(2), (4, 1, 1)), place,
                                        (90, 160), jump=False, natural=0, leaves=1)
        areas = []
        for t in range(4):
            mask = np.zeros((90, 160), np.uint8)
            layer.paste(t, np.zeros((90, 160, 3), np.uint8), mask)
            areas.append(int(mask.sum()))
        assert abs(areas[0] - 400) < 8
        gone += 0 in areas
        back += 0 in areas[:3] and areas[3] > 0
    assert gone > 150 and back > 60


def test_objects_mostly_hidden_in_the_reference_frame_are_listed():
    image, ids = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80), np.uint8)
    ids[20:40, 30:50] = 4
    cutout = warps.cut_out(image, ids)
    bends = np.zeros((1, warps.MESH, warps.MESH, 2), np.float32)
    before = np.zeros((60, 80), np.uint8)
    before[20:40, 30:50], before[0:10, 0:10] = 2, 5
    for shift, expected in ((0, [2]), (10, []), (48, [4]), (60, [4])):
        after = before.copy()
        layer = warps.Layer([cutout], np.array([[[1, 0, shift], [0, 1.0, 0]]]), bends)
        layer.paste(0, image.copy(), after)
        assert synthetic_motion.hidden_ids([layer], before, after) == expected


def dot(value=1, side=9) -> Cutout:
    ids = np.zeros((side, side), np.uint8)
    ids[2:-2, 2:-2] = value
    return Cutout(np.full((side, side, 3), 200, np.uint8), ids, (0, 0), (False,) * 4)


def test_a_duplicate_crosses_its_original_once():
    for seed in range(20):
        path = np.array([[40.0 + 3 * t, 45] for t in range(6)])
        layer = lookalikes.crossing_layer(np.random.default_rng(seed), [dot()] * 6, path, 1.0,
                                          (90, 160))
        distance = np.linalg.norm(synthetic_motion.layer_path(layer) - path, axis=1)
        assert distance.min() < 15 and np.ptp(distance) > 3


def test_members_of_a_swarm_are_small_and_alike():
    members = [[dot(i, 60)] * 5 for i in range(1, 6)]
    layers = lookalikes.swarm_layers(np.random.default_rng(0), members, (240, 400))
    frame, mask = np.zeros((240, 400, 3), np.uint8), np.zeros((240, 400), np.uint8)
    for layer in layers:
        layer.paste(0, frame, mask)
    sizes = np.sqrt(np.bincount(mask.ravel(), minlength=6)[1:] / mask.size)
    assert (sizes[sizes > 0] < 0.13).all() and (sizes > 0.02).sum() >= 3


def test_a_vanishing_object_is_visible_before_and_at_the_end():
    found = set()
    for seed in range(200):
        layer = lookalikes.maybe_vanish(np.random.default_rng(seed),
                                        lookalikes.stationary_layer([dot()] * 7))
        there = [cutout is not None for cutout in layer.cutouts]
        assert there[:2] == [True, True] and there[-1]
        found.add(7 - sum(there))
    assert found == {0, 1, 2}


def test_lines_on_an_object_belong_to_it_and_move_with_it():
    cutouts = lookalikes.add_lines(np.random.default_rng(1), [dot(5), None, dot(5)])
    assert cutouts[1] is None
    for cutout in (cutouts[0], cutouts[2]):
        assert set(np.unique(cutout.ids)) == {0, 5} and (cutout.ids == 5).sum() > 25
        np.testing.assert_allclose(cutout.center, dot().center)
        # object and lines form one connected component
        assert cv2.connectedComponents((cutout.ids > 0).astype(np.uint8))[0] == 2
        part = cutout.ids[-cutout.corner[1]:][:9, -cutout.corner[0]:][:, :9]
        np.testing.assert_array_equal(part[2:-2, 2:-2], dot(5).ids[2:-2, 2:-2])


def test_a_stationary_layer_stays_in_place():
    frame, mask = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8)
    image = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    ids = np.zeros((30, 40), np.uint8)
    ids[10:22, 8:30] = 3
    lookalikes.stationary_layer([warps.cut_out(image, ids)]).paste(0, frame, mask)
    assert (mask != ids).sum() == 4  # corners are softened
    np.testing.assert_array_equal(frame[12:20, 10:28], image[12:20, 10:28])


def test_the_path_of_a_partly_visible_object_is_filled_in():
    masks = [np.zeros((9, 9), np.uint8) for _ in range(3)]
    masks[1][2:5, 3:6] = 4
    np.testing.assert_array_equal(lookalikes.object_path(masks, 4), [[4, 3]] * 3)
    assert lookalikes.object_path(masks, 5) is None
