"""Confidence of each predicted mask without ground truth, and the frames to review first.

Writes and reads `confidence.csv`. J and F, which need ground truth, are in `metrics.py`.
"""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

from media.clip import Clip
from media.files import atomic_path
from tracking.pipeline import Frame, Sink
from tracking.tracker import Step

# A pixel is in doubt if its probability lies between these. A wider range also counts the soft edge
# that every object has; a narrower one misses places where two objects compete.
DOUBT_RANGE = (0.2, 0.8)
# Which frames to review, by their confidence. In an easy clip the lowest tenth may be fine as well,
# in a hard one more than a tenth is wrong: hence both a share and absolute limits.
REVIEW_BELOW = 0.6  # always
REVIEW_SHARE = 0.1  # the lowest of all frames ...
NO_REVIEW_ABOVE = 0.95  # ... unless they are above this
MAX_STRETCHES = 6  # of each kind: a list that a user reads in one go, not every doubtful frame
MAX_GAP = 3  # frames from one to be reviewed to the next in one stretch; bridges flicker
DIGITS = 6  # decimal places of all measures, so that a table that was read equals the one written
NOT_VISIBLE = -1.0  # replaces the confidence in arrays where an object has no pixel


@dataclass(frozen=True)
class Measures:
    """One object in one frame.

    Args:
        frame: index in the clip; `confidence.csv` has the frame's number instead.
        object_id: its value in masks.
        present: whether its mask has any pixel. If not, the other measures but the area are None:
            the network doesn't tell how sure it is that an object is not visible.
        probability: mean over its mask, in [0, 1].
        doubt: number of pixels in `DOUBT_RANGE` over that of its mask, in [0, 1].
        area: share of the frame, in [0, 1].
        change: the smaller over the larger of its areas here and in the previous frame, in [0, 1].
        confidence: see `combined_confidence`.
    """

    frame: int
    object_id: int
    present: bool
    probability: float | None
    doubt: float | None
    area: float
    change: float | None
    confidence: float | None

    @classmethod
    def of_row(cls, row: Sequence) -> Self:
        """Create from the values of `astuple`.

        Earlier versions wrote one more column before the confidence, and zeros for an object that
        is not present; both are accepted.
        """
        frame, object_id, present, probability, doubt, area, change = row[:7]
        if not present:
            return cls(frame, object_id, False, None, None, area, None, None)
        return cls(frame, object_id, True, probability, doubt, area, change, row[-1])


def measure_objects(frame: int, step: Step, previous_areas: dict[int, float]) -> list[Measures]:
    """Measure each object of a frame.

    Args:
        previous_areas: by object id, areas in the previous frame; may lack objects.
    """
    measures, means = [], step.confidence()
    for object_id, probability in zip(step.object_ids, step.probabilities[1:].cpu().numpy()):
        inside = step.mask == object_id
        count, mean = np.count_nonzero(inside), means[object_id]
        if not count:
            measures.append(Measures(frame, object_id, False, None, None, 0.0, None, None))
            continue
        doubtful = np.count_nonzero((probability > DOUBT_RANGE[0]) & (probability < DOUBT_RANGE[1]))
        doubt = min(1.0, doubtful / count)
        area = round(count / inside.size, DIGITS)
        small, large = sorted((area, previous_areas.get(object_id, area)))
        change = small / large if large else 1.0
        values = (mean, doubt, area, change, combined_confidence(mean, doubt, change))
        measures.append(Measures(frame, object_id, True, *(round(v, DIGITS) for v in values)))
    return measures


def combined_confidence(probability: float, doubt: float, change: float) -> float:
    """Combine an object's measures into one number in [0, 1].

    The root softens `change`: areas also change because objects move.
    """
    return probability * (1 - doubt) * change ** 0.5


class ConfidenceSink(Sink):
    """Collects the measures of all segmented frames and writes them to a CSV file.

    Args:
        clip: gives the frames their numbers.
        resume: start with the measures that an interrupted run wrote to `path`.
    """

    def __init__(self, path: Path, clip: Clip, resume: bool = False):
        self.path, self.clip = path, clip
        self.by_key = {(m.frame, m.object_id): m for m in (read(path, clip) if resume else ())}

    @property
    def measures(self) -> list[Measures]:
        """Sorted by frame, then by object."""
        return [self.by_key[key] for key in sorted(self.by_key)]

    def write(self, frame: Frame) -> None:
        if frame.step is None:
            return
        neighbour = frame.index + (-1 if frame.forward else 1)
        areas = {i: self.by_key[neighbour, i].area for i in frame.step.object_ids
                 if (neighbour, i) in self.by_key}
        for one in measure_objects(frame.index, frame.step, areas):
            self.by_key[one.frame, one.object_id] = one

    def flush(self) -> None:
        if self.by_key:
            write(self.path, self.measures, self.clip)

    def __exit__(self, *exception):
        self.flush()


def write(path: Path, measures: list[Measures], clip: Clip) -> None:
    """Write a CSV file with a row for each frame and object.

    Frames are written as their numbers in the clip. `present` is 0 or 1; where it is 0, all
    measures but the area are empty.
    """
    with atomic_path(path) as partial, partial.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([field.name for field in fields(Measures)])
        for one in measures:
            rows.writerow([clip.number(one.frame), one.object_id, int(one.present),
                           *astuple(one)[3:]])


def read(path: Path, clip: Clip) -> list[Measures]:
    """Read a file written by `write`; return an empty list if it doesn't exist.

    Raises:
        ValueError: it is another kind of file.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            return [Measures.of_row([clip.index(int(row["frame"])), int(row["object_id"]),
                                     row["present"] == "1",
                                     *(float(row[field.name]) if row[field.name] else None
                                       for field in fields(Measures)[3:])])
                    for row in csv.DictReader(file)]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a table of confidences of this toolkit") from error


@dataclass(frozen=True)
class Stretch:
    """Consecutive frames of an object to review.

    Args:
        object_id: its value in masks.
        first, last: indices of frames in the clip.
        confidence: the lowest in the stretch; None where the object isn't visible.
    """

    object_id: int
    first: int
    last: int
    confidence: float | None

    def text(self, clip: Clip) -> str:
        """A description such as "frames 7 to 9 of object 2 (43 % sure)"."""
        first, last = clip.number(self.first), clip.number(self.last)
        frames = f"frame {first}" if first == last else f"frames {first} to {last}"
        sure = ("not visible" if self.confidence is None
                else f"{round(100 * self.confidence)} % sure")
        return f"{frames} of object {self.object_id} ({sure})"


def frames_to_review(measures: list[Measures]) -> list[Stretch]:
    """Select the stretches to review first, see `stretches_to_review`.

    Args:
        measures: of predicted masks only, because users needn't review their own masks.
    """
    count = 1 + max((one.frame for one in measures), default=0)
    confidences: dict[int, np.ndarray] = {}
    for one in measures:
        values = confidences.setdefault(one.object_id, np.full(count, np.nan))
        values[one.frame] = NOT_VISIBLE if one.confidence is None else one.confidence
    return stretches_to_review(confidences)


def stretches_to_review(confidences: dict[int, np.ndarray]) -> list[Stretch]:
    """Select the stretches to review first.

    First up to `MAX_STRETCHES` with a low confidence, the lowest first: frames below
    `REVIEW_BELOW`, and the lowest `REVIEW_SHARE` of all frames that are below `NO_REVIEW_ABOVE`.
    Then as many in which an object is not visible, the longest first: most often it has left the
    frame, sometimes the tracker has lost it.

    Args:
        confidences: by object id, (frames,) the confidence in each frame, `NOT_VISIBLE`, or NaN
            where no mask was predicted.
    """
    visible_parts = [values[values >= 0] for values in confidences.values()]
    visible_values = np.concatenate(visible_parts) if visible_parts else np.zeros(0)
    lowest_share = float(np.quantile(visible_values, REVIEW_SHARE)) if len(visible_values) else 0.0
    limit = max(REVIEW_BELOW, min(lowest_share, NO_REVIEW_ABOVE))
    unsure, not_visible = [], []
    for object_id in sorted(confidences):
        values = confidences[object_id]
        frames = np.flatnonzero(values < limit)
        visible = values[frames] >= 0
        gap = np.where(visible[1:], MAX_GAP, 1)  # no gap is bridged where an object isn't visible
        ends = (np.diff(frames) > gap) | (visible[1:] != visible[:-1])
        for part in np.split(frames, np.flatnonzero(ends) + 1):
            if len(part):
                lowest = float(values[part].min())
                one = Stretch(object_id, int(part[0]), int(part[-1]),
                              None if lowest < 0 else lowest)
                (not_visible if one.confidence is None else unsure).append(one)
    unsure.sort(key=lambda one: one.confidence)
    not_visible.sort(key=lambda one: one.first - one.last)
    return unsure[:MAX_STRETCHES] + not_visible[:MAX_STRETCHES]
