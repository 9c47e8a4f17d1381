"""The DAVIS measures: region similarity J, contour accuracy F, their mean, recall and decay.

Perazzi et al.: A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation,
CVPR 2016; averaged over objects as in DAVIS-2017.
"""

from functools import lru_cache

import cv2
import numpy as np

BOUND = 0.008  # tolerance of F, as a share of the image diagonal
RECALL_THRESHOLD = 0.5
MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


def jaccard(prediction: np.ndarray, truth: np.ndarray) -> float:
    """J, the intersection over union of two (H, W) bool masks, in [0, 1]; 1 if both are empty."""
    union = np.count_nonzero(prediction | truth)
    return float(np.count_nonzero(prediction & truth) / union) if union else 1.0


def boundary_f(prediction: np.ndarray, truth: np.ndarray) -> float:
    """F, the F-measure of the boundaries of two (H, W) bool masks, in [0, 1].

    A boundary pixel counts as found if the other boundary has a pixel within
    ceil(0.008 * image diagonal). 1 if both masks are without boundary, 0 if only one is.
    """
    radius = int(np.ceil(BOUND * np.linalg.norm(truth.shape)))
    prediction, truth = boundary(prediction), boundary(truth)
    count, true_count = cv2.countNonZero(prediction), cv2.countNonZero(truth)
    if count == 0 or true_count == 0:
        return float(count == true_count)
    left, top, width, height = cv2.boundingRect(prediction | truth)
    window = slice(top, top + height), slice(left, left + width)
    prediction, truth = prediction[window], truth[window]
    disk = _disk(radius)
    precision = cv2.countNonZero(prediction & cv2.dilate(truth, disk)) / count
    recall = cv2.countNonZero(truth & cv2.dilate(prediction, disk)) / true_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W) uint8: 1 where a pixel differs from its east, south or south-east."""
    mask = mask.astype(np.uint8)
    padded = cv2.copyMakeBorder(mask, 0, 1, 0, 1, cv2.BORDER_REPLICATE)
    return ((mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:]))


@lru_cache
def _disk(radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius:radius + 1, -radius:radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


class SequenceScore:
    """J and F of one sequence, fed frame by frame.

    The official protocol leaves out the first frame, whose mask was given, and the last; the
    caller does.

    Args:
        object_ids: the objects to score, those of the reference mask.
    """

    def __init__(self, object_ids: list[int]):
        self.j: dict[int, list[float]] = {i: [] for i in object_ids}
        self.f: dict[int, list[float]] = {i: [] for i in object_ids}

    def feed(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Score one frame: two (H, W) uint8 masks of object ids."""
        for object_id in self.j:
            pair = prediction == object_id, truth == object_id
            self.j[object_id].append(jaccard(*pair))
            self.f[object_id].append(boundary_f(*pair))

    def conclude(self) -> dict[int, dict[str, float]]:
        """For each object its `MEASURES`, in [0, 1]; decays in [-1, 1]."""
        return {i: _row(self.j[i], self.f[i]) for i in self.j}


def _row(j: list[float], f: list[float]) -> dict[str, float]:
    (j_mean, *j_rest), (f_mean, *f_rest) = statistics(j), statistics(f)
    return dict(zip(MEASURES, ((j_mean + f_mean) / 2, j_mean, *j_rest, f_mean, *f_rest)))


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of several rows of measures: the figures of a whole set, object by object."""
    return {measure: float(np.mean([row[measure] for row in rows])) for measure in MEASURES}


def statistics(values: list[float]) -> tuple[float, float, float]:
    """Mean, recall and decay of a measure over the frames of a sequence.

    Recall is the share of frames strictly above 0.5. Decay is the mean of the first quarter
    minus the mean of the last, quarters as in the official code, which share their end frames.
    """
    values = np.asarray(values, dtype=np.float64)
    ids = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(np.int64) - 1
    first, last = values[ids[0]:ids[1] + 1], values[ids[3]:ids[4] + 1]
    return (float(values.mean()), float((values > RECALL_THRESHOLD).mean()),
            float(first.mean() - last.mean()))
