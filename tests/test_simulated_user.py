"""The simulated user, who prompts an object with boxes and clicks; distractors."""

import math

import cv2
import numpy as np
import pytest
from conftest import draw_frame
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training import distractors, simulated_user
from training.warps import Cutout

MASKS = arrays(bool, (7, 9))




# the simulated person

def brute_depth(mask: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest one outside the mask or the frame."""
    height, width = mask.shape
    outside = [(y, x) for y in range(-1, height + 1) for x in range(-1, width + 1)
               if not (0 <= y < height and 0 <= x < width and mask[y, x])]
    return np.array([[min(math.dist((y, x), place) for place in outside) if mask[y, x] else 0
                      for x in range(width)] for y in range(height)])


def brute_parts(mask: np.ndarray) -> list[np.ndarray]:
    """Connected components, by corners too."""
    left, parts = {(int(y), int(x)) for y, x in zip(*mask.nonzero())}, []
    while left:
        part, border = set(), {left.pop()}
        while border:
            part |= border
            border = {(y + i, x + j) for y, x in border for i in (-1, 0, 1)
                      for j in (-1, 0, 1)} & left
            left -= border
        parts.append(np.zeros_like(mask))
        parts[-1][tuple(zip(*part))] = True
    return parts


@settings(max_examples=40, deadline=None)
@given(MASKS)
def test_distances_are_to_the_nearest_pixel_outside(mask):
    np.testing.assert_allclose(simulated_user.distance_to_edge(mask), brute_depth(mask), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(MASKS, MASKS)
def test_the_next_click_is_the_centre_of_the_largest_error(predicted, truth):
    click = simulated_user.next_click(predicted, truth)
    parts = [(part, positive)
             for positive, wrong in ((True, truth & ~predicted), (False, predicted & ~truth))
             for part in brute_parts(wrong)]
    if not parts:
        assert click is None
        return
    (x, y), positive = click
    area = max(part.sum() for part, _ in parts)
    holding = [part for part, kind in parts if kind == positive and part[y, x]]
    assert len(holding) == 1 and holding[0].sum() == area
    depths = brute_depth(holding[0])
    assert depths[y, x] == pytest.approx(depths.max(), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(MASKS.filter(np.any), st.integers(0, 99))
def test_the_first_click_is_well_inside_the_object(mask, seed):
    x, y = simulated_user.first_click(mask, np.random.default_rng(seed))
    depths = brute_depth(mask)
    assert mask[y, x] and depths[y, x] >= 0.5 * depths.max() - 1e-4


@settings(max_examples=40, deadline=None)
@given(MASKS.filter(np.any), st.floats(0, 0.5), st.integers(0, 99))
def test_boxes_are_jittered_by_at_most_a_fraction_of_their_size(mask, share, seed):
    x, y, w, h = simulated_user.bounding_box(mask)
    rows, columns = mask.nonzero()
    assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
    u, v, a, b = simulated_user.jitter_box((x, y, w, h), share, mask.shape,
                                         np.random.default_rng(seed))
    assert 0 <= u < u + a <= 9 and 0 <= v < v + b <= 7
    assert abs(u - x) <= share * w + 0.5 and abs(v - y) <= share * h + 0.5
    assert abs(u + a - x - w) <= share * w + 1 and abs(v + b - y - h) <= share * h + 1


def test_a_perfect_mask_ends_the_clicks():
    image, mask = draw_frame(0)
    truth, asked = mask > 0, []

    def prompt(image, shown_prompts):
        asked.append(shown_prompts)
        return truth if len(asked) == 3 else np.roll(truth, 3 - len(asked), axis=1)

    predicted = list(simulated_user.simulate_clicks(prompt, image, truth, 5,
                                                    np.random.default_rng(0)))
    assert len(predicted) == 5 and len(asked) == 3 and (predicted[4] == truth).all()
    assert [len(p.points) + len(p.negative_points) for p in asked] == [1, 2, 3]
    assert asked[0].mask is None and (asked[2].mask == predicted[1]).all()
    assert all(truth[y, x] for p in asked for x, y in p.points)
    assert not any(truth[y, x] for p in asked for x, y in p.negative_points)


# training


@pytest.mark.parametrize("seed", range(6))
def test_distractors_hide_little_of_the_target_and_leave_the_rest_unchanged(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (60, 90, 3), dtype=np.uint8)
    mask = np.zeros((60, 90), bool)
    mask[20:45, 30:60] = True
    image[mask] = 200
    other = np.zeros((60, 90), bool)
    other[5:30, 5:20] = True
    others = distractors.distractor_cutouts(image, mask, [(np.full_like(image, 130), other)])
    assert [cutout.ids.sum() for cutout in others] == [mask.sum(), other.sum()]
    crowded, left = distractors.add_distractors(image, mask, others, rng)
    assert not (left & ~mask).any() and left.sum() >= distractors.MIN_VISIBLE * mask.sum()
    # the blurred edge of what is in front may reach into it
    within = cv2.erode(left.astype(np.uint8), np.ones((7, 7))) > 0
    np.testing.assert_array_equal(crowded[within], image[within])
    assert (crowded != image).any()
    assert image[mask].min() == 200  # in place nothing changes


@pytest.mark.parametrize("shape", [(40, 60), (3, 90), (90, 4), (1, 1)])
def test_pasting_a_tiny_object_changes_only_pixels_at_its_mask(shape):
    rng = np.random.default_rng(0)
    background = np.full((96, 128, 3), 60, np.uint8)
    cutout = Cutout(np.full((*shape, 3), 250, np.uint8), np.ones(shape, np.uint8), (0, 0),
                    (False,) * 4)
    for _ in range(10):
        image, mask = distractors.paste_tiny(background, cutout, rng)
        rows, columns = np.nonzero(mask)
        # at most 12 % of the shorter side, by the largest stretch
        assert 0 < max(np.ptp(rows), np.ptp(columns)) + 1 <= 0.12 * 96 * distractors.MAX_STRETCH + 1
        changed = (image != background).any(2)
        assert changed[mask].all()
        near = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0  # soft edges
        assert not (changed & ~near).any()
