"""The DAVIS measures: region similarity J, contour accuracy F, their mean, recall and decay.

Perazzi et al.: A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation,
CVPR 2016; averaged over objects as in DAVIS-2017.
"""

import cv2
import numpy as np

from masks.encoding import VOID
from masks.validation import binary_mask, check_same_size, id_mask

BOUND = 0.008  # tolerance of F, as a share of the image diagonal
RECALL_THRESHOLD = 0.5
MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


def jaccard(prediction: np.ndarray, truth: np.ndarray) -> float:
    """J, the intersection over union of two (H, W) masks of 0 and 1; 1 if both are empty.

    Raises:
        ValueError: masks of other values, types or dimensions, or of two sizes.
    """
    return _jaccard(*_pair(prediction, truth))


def _jaccard(prediction: np.ndarray, truth: np.ndarray) -> float:
    union = np.count_nonzero(prediction | truth)
    return float(np.count_nonzero(prediction & truth) / union) if union else 1.0


def boundary_f(prediction: np.ndarray, truth: np.ndarray, radius: int | None = None) -> float:
    """F, the F-measure of the boundaries of two (H, W) masks of 0 and 1, in [0, 1].

    A boundary pixel counts as found if the other boundary has a pixel within `radius` pixels;
    None takes `tolerance` of the masks. 1 if both masks are without boundary, 0 if only one is.

    Raises:
        ValueError: as `jaccard`.
    """
    prediction, truth = _pair(prediction, truth)
    return _boundary_f(prediction, truth, tolerance(truth.shape) if radius is None else radius)


def _pair(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two masks of one object, checked, as uint8 of 0 and 1."""
    prediction, truth = binary_mask(prediction, "prediction"), binary_mask(truth, "truth")
    check_same_size(prediction, "prediction", truth, "truth")
    return prediction, truth


def _boundary_f(prediction: np.ndarray, truth: np.ndarray, radius: int) -> float:
    stride = truth.shape[1] + radius
    found, true = (_bits(boundary(mask), stride) for mask in (prediction, truth))
    count, true_count = found.bit_count(), true.bit_count()
    if count == 0 or true_count == 0:
        return float(count == true_count)
    precision = (found & _dilate(true, radius, stride)).bit_count() / count
    recall = (true & _dilate(found, radius, stride)).bit_count() / true_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def tolerance(shape: tuple[int, int]) -> int:
    """Pixels by which a boundary may be off in a mask of (H, W)."""
    return int(np.ceil(BOUND * np.linalg.norm(shape)))


def boundary(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool, or of 0 and 1 -> (H, W) uint8: 1 where a pixel differs from its east, south
    or south-east.
    """
    mask = mask.astype(np.uint8)
    padded = cv2.copyMakeBorder(mask, 0, 1, 0, 1, cv2.BORDER_REPLICATE)
    return ((mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:]))


def _bits(mask: np.ndarray, stride: int) -> int:
    """(H, W) uint8 of 0 and 1 -> a whole number with a bit for each pixel, `stride` bits a row."""
    padded = cv2.copyMakeBorder(mask, 0, 0, 0, stride - mask.shape[1], cv2.BORDER_CONSTANT, value=0)
    return int.from_bytes(np.packbits(padded).tobytes(), "big")


def _dilate(bits: int, radius: int, stride: int) -> int:
    """Dilate what `_bits` made with a disk; exact on the pixels of the mask.

    The disk is a stack of rows, from the shortest to the longest. Shifts of a whole number move
    every pixel at once; the `radius` zeros after each row keep rows apart.
    """
    result = width = 0
    for height in range(radius, -1, -1):
        while (width + 1) ** 2 + height ** 2 <= radius ** 2:
            bits |= bits << 1 | bits >> 1
            width += 1
        result |= bits << height * stride | bits >> height * stride
    return result


def score_frame(prediction: np.ndarray, truth: np.ndarray,
                object_ids: list[int]) -> list[tuple[float, float]]:
    """J and F of each object in one frame.

    Args:
        prediction, truth: (H, W) uint8 masks of object ids. Where the truth is `VOID`, not
            labelled, neither mask counts, for J as for the boundaries of F, as in the official
            code.
        object_ids: the objects to score.

    Raises:
        ValueError: masks of other values, types or dimensions, or of two sizes.
    """
    prediction, truth = id_mask(prediction, "prediction", void=True), id_mask(truth, "truth", True)
    check_same_size(prediction, "prediction", truth, "truth")
    prediction = np.where(truth == VOID, 0, prediction)
    return [_score_object(*((mask == i).view(np.uint8) for mask in (prediction, truth)))
            for i in object_ids]


def _score_object(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """J and F of two (H, W) uint8 masks of 0 and 1, seen through a window around both.

    The window keeps a pixel of background on each side, where the frame has one: boundaries
    there are what they are in the whole frame.
    """
    left, top, width, height = cv2.boundingRect(prediction | truth)
    window = (slice(max(top - 1, 0), top + height + 1), slice(max(left - 1, 0), left + width + 1))
    pair = prediction[window], truth[window]
    return _jaccard(*pair), _boundary_f(*pair, tolerance(truth.shape))


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
        """Score one frame: two (H, W) uint8 masks of object ids, see `score_frame`."""
        self.add(score_frame(prediction, truth, list(self.j)))

    def add(self, frame: list[tuple[float, float]], object_ids: list[int] | None = None) -> None:
        """Take what `score_frame` returned for one frame, of all objects or of some."""
        for object_id, (j, f) in zip(object_ids or self.j, frame):
            self.j[object_id].append(j)
            self.f[object_id].append(f)

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

    Raises:
        ValueError: there are no frames.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or not len(v):
        raise ValueError(f"values: expected one for each frame, got shape {v.shape}")
    ids = np.round(np.linspace(1, len(v), 5) + 1e-10).astype(np.int64) - 1
    first, last = v[ids[0]:ids[1] + 1], v[ids[3]:ids[4] + 1]
    return (float(v.mean()), float((v > RECALL_THRESHOLD).mean()),
            float(first.mean() - last.mean()))
