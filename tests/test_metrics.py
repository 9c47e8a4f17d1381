"""J and F against values by hand, naive implementations, and vos-benchmark."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vos_benchmark.evaluator import Evaluator

import davis
import metrics

EMPTY, FULL = np.zeros((9, 12), bool), np.ones((9, 12), bool)
SQUARE = EMPTY.copy()
SQUARE[2:6, 3:8] = True


def reference_means(pairs) -> dict[int, tuple[float, float]]:
    """Each object's mean J and F by vos-benchmark, of (prediction, truth) masks of object ids."""
    evaluator = Evaluator()
    for prediction, truth in pairs:
        evaluator.feed_frame(prediction, truth)
    ious, boundary_fs = evaluator.conclude()
    return {i: (ious[i] / 100, boundary_fs[i] / 100) for i in ious}


def blobs(rng, shape: tuple[int, int], share: float, similarity: float):
    """Two random (H, W) bool masks of smooth outlines: thresholded noise.

    Args:
        shape: (H, W).
        share: fraction of the pixels that each mask covers.
        similarity: of the two masks, from 0, independent, to 1, equal.
    """
    common, *independent = (cv2.GaussianBlur(rng.normal(size=shape), (0, 0), max(shape) / 15)
                            for _ in range(3))
    fields = (similarity * common + (1 - similarity) * field for field in independent)
    return tuple(field >= np.quantile(field, 1 - share) for field in fields)


@pytest.mark.parametrize("prediction, truth, expected", [
    ([1, 1, 0, 0], [1, 1, 0, 0], 1),
    ([1, 1, 0, 0], [0, 1, 1, 0], 1 / 3),
    ([1, 1, 1, 1], [1, 0, 0, 0], 1 / 4),
    ([1, 1, 0, 0], [0, 0, 1, 1], 0),
    ([0, 0, 0, 0], [0, 0, 1, 0], 0),
    ([0, 1, 0, 0], [0, 0, 0, 0], 0),
    ([0, 0, 0, 0], [0, 0, 0, 0], 1),
])
def test_jaccard_by_hand(prediction, truth, expected):
    prediction, truth = (np.array(m, bool).reshape(2, 2) for m in (prediction, truth))
    assert metrics.jaccard(prediction, truth) == expected


def naive_boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour, in a loop."""
    height, width = mask.shape
    result = np.zeros(mask.shape, np.uint8)
    for y in range(height):
        for x in range(width):
            neighbours = []
            if x < width - 1:
                neighbours.append(mask[y, x + 1])
            if y < height - 1:
                neighbours.append(mask[y + 1, x])
            if x < width - 1 and y < height - 1:
                neighbours.append(mask[y + 1, x + 1])
            result[y, x] = any(mask[y, x] != other for other in neighbours)
    return result


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (9, 12), (15, 11)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_boundary_agrees_with_a_loop(shape, share):
    rng = np.random.default_rng(5)
    for _ in range(10):
        mask = rng.random(shape) < share
        np.testing.assert_array_equal(metrics.boundary(mask), naive_boundary(mask))


@pytest.mark.parametrize("shape", [(37, 53), (64, 64), (131, 214), (1, 40), (241, 427)])
@pytest.mark.parametrize("share", [0.002, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("similarity", [0.0, 0.5, 0.9])
def test_j_and_f_agree_with_vos_benchmark(shape, share, similarity):
    rng = np.random.default_rng(7)
    for _ in range(2 if shape[0] > 200 else 6):
        prediction, truth = blobs(rng, shape, share, similarity)
        (expected,) = reference_means([(prediction.astype(np.uint8), truth.astype(np.uint8))]
                                      ).values()
        measured = metrics.jaccard(prediction, truth), metrics.boundary_f(prediction, truth)
        assert measured == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("distance", range(5))
def test_boundaries_match_within_the_tolerance_only(distance):
    truth, prediction = np.zeros((2, 150, 200), bool)  # tolerance: 0.008 * 250 = 2 pixels
    truth[:, :100] = True
    prediction[:, :100 + distance] = True
    assert metrics.boundary_f(prediction, truth) == (1.0 if distance <= 2 else 0.0)


@pytest.mark.parametrize("prediction, truth, expected", [
    (EMPTY, SQUARE, 0), (SQUARE, EMPTY, 0), (EMPTY, EMPTY, 1), (SQUARE, SQUARE, 1),
    (FULL, SQUARE, 0), (SQUARE, FULL, 0), (FULL, FULL, 1)])
def test_f_of_masks_with_and_without_boundary(prediction, truth, expected):
    assert metrics.boundary_f(prediction, truth) == expected


SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)
MASK_PAIRS = SHAPES.flatmap(lambda s: st.tuples(hnp.arrays(bool, s), hnp.arrays(bool, s)))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(MASK_PAIRS)
def test_j_and_f_are_symmetric_bounded_and_1_for_equal_masks(pair):
    a, b = pair
    for measure in (metrics.jaccard, metrics.boundary_f):
        assert measure(a, b) == pytest.approx(measure(b, a), abs=1e-12)
        assert 0 <= measure(a, b) <= 1 + 1e-12
        assert measure(a, a) == 1
    assert (metrics.jaccard(a, b) == 1) == np.array_equal(a, b)


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 8, 19])
@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (23, 31), (40, 16)])
def test_dilation_agrees_with_a_loop_over_disks(radius, shape):
    rng = np.random.default_rng(3)
    y, x = np.indices(shape)
    stride = shape[1] + radius
    for share in (0.0, 0.005, 0.05):
        mask = (rng.random(shape) < share).astype(np.uint8)
        mask[0, -1] = mask[-1, 0] = share > 0  # corners must not wrap around
        expected = np.zeros(shape, bool)
        for i, j in np.argwhere(mask):
            expected |= (y - i) ** 2 + (x - j) ** 2 <= radius * radius
        bits = metrics._dilate(metrics._to_bits(mask, stride), radius, stride)
        inside = metrics._to_bits(np.ones(shape, np.uint8), stride)
        assert bits & inside == metrics._to_bits(expected.astype(np.uint8), stride)


@pytest.mark.parametrize("rows", [slice(0, 12), slice(-9, None), slice(20, 40)])
@pytest.mark.parametrize("columns", [slice(0, 9), slice(-13, None), slice(None)])
def test_score_of_a_frame_equals_that_of_whole_masks(rows, columns):
    """Objects at each border: `score_frame` computes their score in a window around them."""
    prediction, truth = np.zeros((2, 60, 90), np.uint8)
    truth[rows, columns] = 7
    rng = np.random.default_rng(1)
    prediction[rows, columns] = 7 * rng.integers(0, 2, truth[rows, columns].shape)
    (measured,) = metrics.score_frame(prediction, truth, [7])
    assert measured == (metrics.jaccard(prediction == 7, truth == 7),
                        metrics.boundary_f(prediction == 7, truth == 7))
    (expected,) = reference_means([(prediction, truth)]).values()
    assert measured == pytest.approx(expected, abs=1e-12)


def official_j_and_f(prediction, truth, void) -> tuple[float, float]:
    """J and F by the official formulas with void pixels: F by distances between boundary pixels."""
    prediction, truth = prediction & ~void, truth & ~void
    union = (prediction | truth).sum()
    j = (prediction & truth).sum() / union if union else 1.0
    edges = [naive_boundary(mask).astype(bool) for mask in (prediction, truth)]
    radius = np.ceil(0.008 * np.hypot(*truth.shape))
    points = [np.argwhere(edge) for edge in edges]
    if not len(points[0]) or not len(points[1]):
        return j, float(len(points[0]) == len(points[1]))
    matches = np.linalg.norm(points[0][:, None] - points[1][None], axis=2) <= radius
    precision, recall = matches.any(1).mean(), matches.any(0).mean()
    return j, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_void_pixels_do_not_count(seed):
    rng = np.random.default_rng(seed)
    prediction, truth = (3 * mask.astype(np.uint8) for mask in blobs(rng, (44, 61), 0.3, 0.6))
    prediction[blobs(rng, (44, 61), 0.1, 0.5)[0]] = 1
    void = blobs(rng, (44, 61), 0.2, 0.5)[0]
    without_void = metrics.score_frame(prediction, truth, [1, 3])
    truth[void] = 255
    measured = metrics.score_frame(prediction, truth, [1, 3])
    assert measured != without_void  # otherwise the test could not fail
    for object_id, measures in zip((1, 3), measured):
        assert measures == pytest.approx(official_j_and_f(
            prediction == object_id, truth == object_id, void), abs=1e-12)


def test_a_prediction_within_void_counts_as_empty():
    prediction, truth = np.zeros((2, 20, 30), np.uint8)
    prediction[4:9, 5:12] = 1
    truth[3:10, 4:13] = 255
    assert metrics.score_frame(prediction, truth, [1]) == [(1.0, 1.0)]


@pytest.mark.parametrize("values, first, last", [
    ([0.9, 0.7, 0.5, 0.1], [0.9, 0.7], [0.5, 0.1]),
    ([1.0, 0.8, 0.6, 0.4, 0.3], [1.0, 0.8], [0.4, 0.3]),
    # 7 frames: the first quarter ends at frame 2.5, the last begins at 5.5, both rounded up
    ([0.9, 0.8, 0.1, 0.5, 0.7, 0.2, 0.3], [0.9, 0.8, 0.1], [0.2, 0.3]),
    ([0.9, 0.8, 0.7, 0.1, 0.2, 0.3, 0.4, 0.6, 0.5, 0.1], [0.9, 0.8, 0.7], [0.6, 0.5, 0.1]),
    ([0.1, 0.2, 0.6, 0.9], [0.1, 0.2], [0.6, 0.9]),
    ([0.7], [0.7], [0.7]),
])
def test_statistics_by_hand(values, first, last):
    mean, recall, decay = metrics.statistics(values)
    assert mean == pytest.approx(sum(values) / len(values))
    assert recall == pytest.approx(sum(value > 0.5 for value in values) / len(values))
    assert decay == pytest.approx(sum(first) / len(first) - sum(last) / len(last))


def test_recall_is_strictly_above_one_half():
    assert metrics.statistics([0.5, 0.5, 0.5, 0.5 + 1e-9])[1] == 0.25


@pytest.mark.parametrize("n", [255, 257, 600, 1025])  # an 8-bit index would wrap
def test_decay_of_a_long_sequence(n):
    values = np.random.default_rng(n).random(n).tolist()
    bounds = [round(1 + (n - 1) * quarter / 4 + 1e-10) - 1 for quarter in range(5)]
    first, last = values[bounds[0]:bounds[1] + 1], values[bounds[3]:bounds[4] + 1]
    expected = sum(first) / len(first) - sum(last) / len(last)
    assert metrics.statistics(values)[2] == pytest.approx(expected, abs=1e-12)


def two_object_frames(count: int):
    """Yield (prediction, truth) id masks: objects 1 and 3 move, and the prediction lags behind.

    It also has some pixels of an object 2, which the ground truth lacks.
    """
    for step in range(count):
        masks = []
        for shift in (step, 2 * step):
            mask = np.zeros((60, 90), np.uint8)
            mask[5:30, 4 + shift:34 + shift] = 1
            mask[25:50, 40:60 + shift] = 3
            masks.append(mask)
        masks[0][55:, :5] = 2
        yield tuple(masks)


def test_sequence_score_of_two_objects_agrees_with_vos_benchmark():
    frames = list(two_object_frames(6))
    score = metrics.SequenceScore([1, 3])
    for prediction, truth in frames:
        score.add(metrics.score_frame(prediction, truth, list(score.j)))
    table, expected = score.conclude(), reference_means(frames)
    assert list(table) == [1, 3] and expected[1] != expected[3]
    for object_id, row in table.items():
        assert list(row) == list(metrics.MEASURES)
        j, f = expected[object_id]
        assert (row["J-Mean"], row["F-Mean"]) == pytest.approx((j, f), abs=1e-9)
        assert row["J&F-Mean"] == pytest.approx((j + f) / 2, abs=1e-9)


def test_sequence_score_by_hand():
    """A vertical strip whose J and F over four frames are 1, 1/2, 0, 0."""
    truth = np.zeros((20, 40), np.uint8)
    truth[:, 10:20] = 4
    score = metrics.SequenceScore([4])
    for start, stop in ((10, 20), (10, 15), (30, 40), (30, 40)):
        prediction = np.zeros_like(truth)
        prediction[:, start:stop] = 4
        score.add(metrics.score_frame(prediction, truth, list(score.j)))
    row = score.conclude()[4]
    # F in the second frame: of two edges each, one matches, so precision and recall are 1/2
    expected = {"J-Mean": 1.5 / 4, "J-Recall": 1 / 4, "J-Decay": 0.75,
                "F-Mean": 1.5 / 4, "F-Recall": 1 / 4, "F-Decay": 0.75, "J&F-Mean": 1.5 / 4}
    assert row == pytest.approx(expected, abs=1e-12)


def test_average_is_the_mean_of_each_measure():
    rows = [dict.fromkeys(metrics.MEASURES, value) | {"J-Decay": -value}
            for value in (0.2, 0.4, 0.9)]
    assert metrics.average(rows) == pytest.approx(
        dict.fromkeys(metrics.MEASURES, 0.5) | {"J-Decay": -0.5})


@pytest.mark.parametrize("shift", [(0, 3), (4, -11)])
def test_real_masks_agree_with_vos_benchmark(davis_dir, shift):
    """bmx-bumps, where some masks are empty; the prediction is the ground truth, shifted."""
    (sequence,) = davis.Davis(davis_dir, names=["bmx-bumps"])
    truths = [sequence.mask(frame) for frame in (0, 10, 30, 59, 60, 80)]
    assert [truth.any() for truth in truths] == [True] * 4 + [False, True]
    pairs = [(np.roll(truth, shift, (0, 1)), truth) for truth in truths]
    score = metrics.SequenceScore([1])
    for pair in pairs:
        score.add(metrics.score_frame(*pair, list(score.j)))
    row = score.conclude()[1]
    assert (row["J-Mean"], row["F-Mean"]) == pytest.approx(reference_means(pairs)[1], abs=1e-9)
    assert row["J-Mean"] < 0.9
