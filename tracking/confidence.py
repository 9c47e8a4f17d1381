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
from media.files import whole
from tracker import Step
from tracking.pipeline import Frame, Sink

DOUBTFUL = (0.2, 0.8)  # a probability between these is neither in nor out
UNSURE = 0.6  # frames below this confidence are always to be reviewed
SURE = 0.95  # nobody need review a frame above it, even if all others are better still
SHARE = 0.1  # of the frames, those with the lowest confidence, that are reviewed if below SURE
REVIEWED = 6  # stretches of a kind at most: where to start, not a plan for the whole work
DIGITS = 6  # kept of every figure, in the file and before
NOT_VISIBLE = -1.0  # in place of a confidence, in arrays
GAP = 3  # frames from one with a low confidence to the next, in one stretch


@dataclass(frozen=True)
class Measures:
    """One object in one frame.

    Args:
        frame: index in the clip; `confidence.csv` has the frame's number instead.
        object_id: its value in masks.
        present: whether its mask holds a pixel. Where it doesn't, the measures of a mask are
            None: how sure the network is that the object can't be seen isn't known.
        probability: mean over its mask, in [0, 1].
        doubt: pixels in doubt around it, as a share of those of its mask, in [0, 1].
        area: share of the frame.
        change: its area over that in the frame before, the smaller over the larger, in [0, 1].
        confidence: probability, doubt and change combined, in [0, 1].
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
        """From the values of `astuple`, also as earlier versions kept them.

        Those had one more before the confidence, and zeros where the object isn't present.
        """
        frame, object_id, present, probability, doubt, area, change = row[:7]
        if not present:
            return cls(frame, object_id, False, None, None, area, None, None)
        return cls(frame, object_id, True, probability, doubt, area, change, row[-1])


def measure(frame: int, step: Step, before: dict[int, float]) -> list[Measures]:
    """The measures of each object in a frame.

    Args:
        before: the area of each object in the frame before, where it is known.
    """
    found, means = [], step.confidence()
    for object_id, probability in zip(step.object_ids, step.probabilities[1:].cpu().numpy()):
        inside = step.mask == object_id
        count, mean = np.count_nonzero(inside), means[object_id]
        if not count:
            found.append(Measures(frame, object_id, False, None, None, 0.0, None, None))
            continue
        doubtful = np.count_nonzero((probability > DOUBTFUL[0]) & (probability < DOUBTFUL[1]))
        doubt = min(1.0, doubtful / count)
        area = round(count / inside.size, DIGITS)
        small, large = sorted((area, before.get(object_id, area)))
        change = small / large if large else 1.0
        values = (mean, doubt, area, change, combined(mean, doubt, change))
        found.append(Measures(frame, object_id, True, *(round(v, DIGITS) for v in values)))
    return found


def combined(probability: float, doubt: float, change: float) -> float:
    """One number in [0, 1] from the measures of a frame and object."""
    return probability * (1 - doubt) * change ** 0.5


class Confidence(Sink):
    """Collects the measures of all frames that are segmented, and writes them.

    Args:
        path: of the CSV file.
        clip: gives the frames their numbers.
        resume: keep the measures that an interrupted run left there.
    """

    def __init__(self, path: Path, clip: Clip, resume: bool = False):
        self.path, self.clip = path, clip
        self.found = {(m.frame, m.object_id): m for m in (read(path, clip) if resume else ())}

    @property
    def measures(self) -> list[Measures]:
        """By frame, then by object."""
        return [self.found[key] for key in sorted(self.found)]

    def write(self, frame: Frame) -> None:
        if frame.step is None:
            return
        neighbour = frame.index + (-1 if frame.forward else 1)
        before = {i: self.found[neighbour, i].area for i in frame.step.object_ids
                  if (neighbour, i) in self.found}
        for one in measure(frame.index, frame.step, before):
            self.found[one.frame, one.object_id] = one

    def flush(self) -> None:
        if self.found:
            write(self.path, self.measures, self.clip)

    def __exit__(self, *exception):
        self.flush()


def write(path: Path, measures: list[Measures], clip: Clip) -> None:
    """Write a CSV file with a row for each frame and object; frames by their numbers in the clip.

    `present` is 0 or 1; where it is 0, all measures but the area are left empty.
    """
    with whole(path) as beside, beside.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([field.name for field in fields(Measures)])
        for one in measures:
            rows.writerow([clip.number(one.frame), one.object_id, int(one.present),
                           *astuple(one)[3:]])


def read(path: Path, clip: Clip) -> list[Measures]:
    """Read what `write` wrote; an empty list where there is no such file.

    Raises:
        ValueError: not such a file.
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
        """Such as "frames 7 to 9 of object 2 (43 % sure)"."""
        first, last = clip.number(self.first), clip.number(self.last)
        frames = f"frame {first}" if first == last else f"frames {first} to {last}"
        sure = ("not visible" if self.confidence is None
                else f"{round(100 * self.confidence)} % sure")
        return f"{frames} of object {self.object_id} ({sure})"


def frames_to_review(measures: list[Measures]) -> list[Stretch]:
    """The stretches to review first, see `stretches_to_review`.

    Args:
        measures: of predicted masks only; nobody need review a mask of their own.
    """
    count = 1 + max((one.frame for one in measures), default=0)
    sureness: dict[int, np.ndarray] = {}
    for one in measures:
        values = sureness.setdefault(one.object_id, np.full(count, np.nan))
        values[one.frame] = NOT_VISIBLE if one.confidence is None else one.confidence
    return stretches_to_review(sureness)


def stretches_to_review(sureness: dict[int, np.ndarray]) -> list[Stretch]:
    """The stretches to review first.

    At most `REVIEWED` with a low confidence, the lowest first: frames below `UNSURE`, and the least
    confident tenth of all frames where that is below `SURE`. Then as many in which an object isn't
    visible, the longest first: most often it has left the frame, sometimes it was lost.

    Args:
        sureness: of each object (frames,) the confidence, `NOT_VISIBLE`, or NaN where there is no
            predicted mask.
    """
    known = [values[values >= 0] for values in sureness.values()]
    seen = np.concatenate(known) if known else np.zeros(0)
    below = max(UNSURE, min(float(np.quantile(seen, SHARE)) if len(seen) else 0.0, SURE))
    unsure, hidden = [], []
    for object_id in sorted(sureness):
        values = sureness[object_id]
        frames = np.flatnonzero(values < below)
        visible = values[frames] >= 0
        gap = np.where(visible[1:], GAP, 1)  # whether an object can be seen is exact
        ends = (np.diff(frames) > gap) | (visible[1:] != visible[:-1])
        for part in np.split(frames, np.flatnonzero(ends) + 1):
            if len(part):
                lowest = float(values[part].min())
                one = Stretch(object_id, int(part[0]), int(part[-1]),
                              None if lowest < 0 else lowest)
                (hidden if one.confidence is None else unsure).append(one)
    unsure.sort(key=lambda one: one.confidence)
    hidden.sort(key=lambda one: one.first - one.last)
    return unsure[:REVIEWED] + hidden[:REVIEWED]
