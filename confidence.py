"""How sure a mask is, frame by frame, where no truth is known; and where a look is worth it.

It sees what a tracker made of a frame, not how, and writes `confidence.csv`. J and F, which need
the truth, are in `metrics.py`.
"""

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from media.files import whole
from segment import Frame, Sink
from tracker import Step

DOUBTFUL = (0.2, 0.8)  # a probability between these is neither in nor out
UNSURE = 0.6  # a frame below this confidence is worth a look
DIGITS = 6  # kept of every figure, in the file and before
GAP = 3  # frames between two stretches that count as one


@dataclass(frozen=True)
class Measures:
    """Of one object in one frame.

    Args:
        frame, object_id: which.
        present: whether its mask holds a pixel.
        probability: the mean over its mask, in [0, 1]; 0 where it isn't present.
        doubt: pixels in doubt around it, as a share of those of its mask; 1 at most.
        area: share of the frame.
        similarity: of its cells to what is remembered of it, a cosine; 1 where the mask was given.
        change: its area over that in the frame before, the smaller over the larger, in [0, 1].
        confidence: all of these in one number, in [0, 1].
    """

    frame: int
    object_id: int
    present: bool
    probability: float
    doubt: float
    area: float
    change: float
    similarity: float
    confidence: float


def measure(frame: int, step: Step, before: dict[int, float]) -> list[Measures]:
    """Look at each object of a frame.

    Args:
        before: the area of each object in the frame before, where it is known.
    """
    found, means, alike = [], step.confidence(), step.similarity()
    for object_id, probability in zip(step.object_ids, step.probabilities[1:].cpu().numpy()):
        inside = step.mask == object_id
        count, mean = np.count_nonzero(inside), means[object_id]
        doubtful = np.count_nonzero((probability > DOUBTFUL[0]) & (probability < DOUBTFUL[1]))
        doubt = min(1.0, doubtful / count) if count else float(doubtful > 0)
        area = round(count / inside.size, DIGITS)
        small, large = sorted((area, before.get(object_id, area)))
        change = small / large if large else 1.0
        values = (mean, doubt, area, change, alike[object_id], combined(mean, doubt, change))
        found.append(Measures(frame, object_id, bool(count), *(round(v, DIGITS) for v in values)))
    return found


def combined(probability: float, doubt: float, change: float) -> float:
    """One number in [0, 1] from the measures of a frame and object."""
    return probability * (1 - doubt) * change ** 0.5


class Confidence(Sink):
    """Collects the measures of all frames that are segmented, and writes them.

    Args:
        path: of the CSV file; None: they are only kept.
        goes_on: with those that an earlier run left there.
    """

    def __init__(self, path: Path | None, goes_on: bool = False):
        self.path = path
        self.found = {(m.frame, m.object_id): m for m in (read(path) if goes_on else ())}

    @property
    def measures(self) -> list[Measures]:
        """By frame, then by object."""
        return [self.found[key] for key in sorted(self.found)]

    def write(self, frame: Frame) -> None:
        if frame.step is None:
            return
        neighbour = frame.index + (-1 if frame.forwards else 1)
        before = {i: self.found[neighbour, i].area for i in frame.step.object_ids
                  if (neighbour, i) in self.found}
        for one in measure(frame.index, frame.step, before):
            self.found[one.frame, one.object_id] = one

    def keep(self) -> None:
        if self.path and self.found:
            write(self.path, self.measures)

    def __exit__(self, *exception):
        self.keep()


def write(path: Path, measures: list[Measures]) -> None:
    """A CSV file with a row for each frame and object."""
    with whole(path) as beside, beside.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([field.name for field in fields(Measures)])
        for one in measures:
            rows.writerow([int(value) if isinstance(value, bool) else value
                           for value in astuple(one)])


def read(path: Path) -> list[Measures]:
    """What `write` wrote; nothing where there is no such file.

    Raises:
        ValueError: not such a file.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            return [Measures(int(row["frame"]), int(row["object_id"]), row["present"] == "1",
                             *(float(row[field.name]) for field in fields(Measures)[3:]))
                    for row in csv.DictReader(file)]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a table of confidences of this toolkit") from error


@dataclass(frozen=True)
class Stretch:
    """Frames `first` to `last` of an object, and the least confidence in them."""

    object_id: int
    first: int
    last: int
    confidence: float

    def __str__(self) -> str:
        frames = (f"frame {self.first}" if self.first == self.last
                  else f"frames {self.first} to {self.last}")
        return f"{frames} of object {self.object_id}"


def unsure(measures: list[Measures], below: float = UNSURE) -> list[Stretch]:
    """Where a look is worth it, the least sure stretch first."""
    found: list[Stretch] = []
    for one in sorted(measures, key=lambda m: (m.object_id, m.frame)):
        if one.confidence >= below:
            continue
        last = found[-1] if found else None
        if last and last.object_id == one.object_id and one.frame - last.last <= GAP:
            found[-1] = Stretch(one.object_id, last.first, one.frame,
                                min(last.confidence, one.confidence))
        else:
            found.append(Stretch(one.object_id, one.frame, one.frame, one.confidence))
    return sorted(found, key=lambda stretch: stretch.confidence)
