"""The simulated person who shows an object: boxes and clicks."""

import math

import cv2
import numpy as np
import pytest
from conftest import draw_frame
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training import distractors, simulated_user

MASKS = arrays(bool, (7, 9))




# the simulated person

def brute_depth(mask: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest one outside, the frame's surroundings included."""
    height, width = mask.shape
    outside = [(y, x) for y in range(-1, height + 1) for x in range(-1, width + 1)
               if not (0 <= y < height and 0 <= x < width and mask[y, x])]
    return np.array([[min(math.dist((y, x), place) for place in outside) if mask[y, x] else 0
                      for x in range(width)] for y in range(height)])


def brute_parts(mask: np.ndarray) -> list[np.ndarray]:
    """Parts that hang together, by corners too."""
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
def test_depth_is_the_distance_to_the_nearest_pixel_outside(mask):
    np.testing.assert_allclose(simulated_user.distance_to_edge(mask), brute_depth(mask), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(MASKS, MASKS)
def test_the_next_click_is_the_middle_of_the_largest_error(found, truth):
    click = simulated_user.next_click(found, truth)
    parts = [(part, wanted) for wanted, wrong in ((True, truth & ~found), (False, found & ~truth))
             for part in brute_parts(wrong)]
    if not parts:
        assert click is None
        return
    (x, y), wanted = click
    area = max(part.sum() for part, _ in parts)
    holding = [part for part, kind in parts if kind == wanted and part[y, x]]
    assert len(holding) == 1 and holding[0].sum() == area
    depths = brute_depth(holding[0])
    assert depths[y, x] == pytest.approx(depths.max(), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(MASKS.filter(np.any), st.integers(0, 99))
def test_the_first_click_is_well_inside(mask, seed):
    x, y = simulated_user.first_click(mask, np.random.default_rng(seed))
    depths = brute_depth(mask)
    assert mask[y, x] and depths[y, x] >= 0.5 * depths.max() - 1e-4


@settings(max_examples=40, deadline=None)
@given(MASKS.filter(np.any), st.floats(0, 0.5), st.integers(0, 99))
def test_boxes_are_moved_by_no_more_than_a_share(mask, share, seed):
    x, y, w, h = simulated_user.bounding_box(mask)
    rows, columns = mask.nonzero()
    assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
    u, v, a, b = simulated_user.jitter_box((x, y, w, h), share, mask.shape,
                                         np.random.default_rng(seed))
    assert 0 <= u < u + a <= 9 and 0 <= v < v + b <= 7
    assert abs(u - x) <= share * w + 0.5 and abs(v - y) <= share * h + 0.5
    assert abs(u + a - x - w) <= share * w + 1 and abs(v + b - y - h) <= share * h + 1


def test_a_person_clicks_until_nothing_is_wrong():
    image, mask = draw_frame(0)
    truth, asked = mask > 0, []

    def prompt(image, shown_prompts):
        asked.append(shown_prompts)
        return truth if len(asked) == 3 else np.roll(truth, 3 - len(asked), axis=1)

    found = list(simulated_user.simulate_clicks(prompt, image, truth, 5, np.random.default_rng(0)))
    assert len(found) == 5 and len(asked) == 3 and (found[4] == truth).all()
    assert [len(p.points) + len(p.not_points) for p in asked] == [1, 2, 3]
    assert asked[0].mask is None and (asked[2].mask == found[1]).all()
    assert all(truth[y, x] for p in asked for x, y in p.points)
    assert not any(truth[y, x] for p in asked for x, y in p.not_points)


# training


@pytest.mark.parametrize("seed", range(6))
def test_a_crowd_hides_little_of_the_object_and_changes_nothing_of_the_rest_of_it(seed):
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
    assert not (left & ~mask).any() and left.sum() >= distractors.LEFT * mask.sum()
    # the blurred edge of what is in front may reach into it
    within = cv2.erode(left.astype(np.uint8), np.ones((7, 7))) > 0
    np.testing.assert_array_equal(crowded[within], image[within])
    assert (crowded != image).any()
    assert image[mask].min() == 200  # in place nothing changes
