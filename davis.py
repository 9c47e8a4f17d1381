"""Data sets: DAVIS and what is laid out like YouTube-VOS; a sequence is a clip with truth.

It knows no tensor and no network; where files lie is told by datasets/layout.py.

Run by itself it downloads DAVIS:
    python davis.py --download DIR [--year 2017]
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from datasets import download, layout
from masks.encoding import MaskEncoding
from masks.read import is_empty
from media import images
from media.clip import FOLDER_FPS, Clip, file_numbers
from system import errors

log = logging.getLogger(__name__)

HOME = "https://davischallenge.org"
YEARS = ("2016", "2017", "all")
SETS = ("train", "val", "trainval")  # of DAVIS; other lists may lie beside them


@dataclass(frozen=True)
class Sequence(Clip):
    """A clip with truth: its frames in order, with masks of all of them or of some.

    Args:
        name: such as "bear".
        images: files of the frames.
        masks: the file of each frame's mask, None where there is none.
        single_object: every non-zero value of a mask is object 1 (DAVIS-2016).
        later: objects may appear after the first mask (YouTube-VOS and its relatives).
        asked: frames whose masks a server wants; empty: all.
    """

    name: str
    images: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    single_object: bool = True
    late_objects: bool = False
    requested: tuple[int, ...] = ()

    fps = FOLDER_FPS

    def __len__(self) -> int:
        return len(self.images)

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def path(self) -> Path:
        return self.images[0].parent

    @property
    def shape(self) -> tuple[int, int]:
        return images.image_shape(self.images[0], "a frame")

    stored = shape

    def has(self, frame: int) -> bool:
        return frame < len(self)

    def _read(self, start: int) -> Iterator[np.ndarray]:
        return map(self.image, range(start, len(self)))

    def _restart(self, end: int) -> int:
        return end - 1

    @cached_property
    def numbers(self) -> list[int]:
        return file_numbers(self.images)

    def frame_name(self, frame: int) -> str:
        return self.images[frame].stem

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return images.read_image(self.images[index])

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8, 0 background, else the object's id. Of a labelled frame."""
        return self.coding.read(self.masks[index])

    def truth(self, index: int) -> np.ndarray:
        """As `mask`, with `VOID` where a pixel is not labelled and so not scored."""
        return self.coding.read(self.masks[index], keep_void=True)

    def mask_name(self, index: int) -> str:
        """What the file of a frame's mask is called in results: as the frame, .png."""
        return f"{self.frame_name(index)}.png"

    @cached_property
    def labelled(self) -> tuple[int, ...]:
        """Frames with a mask."""
        return tuple(i for i, mask in enumerate(self.masks) if mask is not None)

    @property
    def output_frames(self) -> tuple[int, ...]:
        """Frames whose masks are to be written."""
        return self.requested or tuple(range(len(self)))

    @cached_property
    def first_frames(self) -> dict[int, int]:
        """For each object to be segmented the frame whose mask shows it first."""
        found: dict[int, int] = {}
        for i in self.labelled if self.late_objects else self.labelled[:1]:
            for object_id in np.unique(self.mask(i)).tolist():
                if object_id:
                    found.setdefault(object_id, i)
        return found

    def reference_masks(self) -> dict[int, np.ndarray]:
        """The masks that may be known: (H, W) uint8 of frames where objects appear, only these.

        Raises:
            ValueError: no mask holds an object.
        """
        if not self.first_frames:
            raise ValueError(f"{self.masks[self.labelled[0]]}: the first mask holds no object, "
                             "expected one to look for")
        masks = {}
        for frame in sorted({*self.first_frames.values()}):
            new = [i for i, first in self.first_frames.items() if first == frame]
            mask = self.mask(frame)
            masks[frame] = np.where(np.isin(mask, new), mask, 0)
        return masks

    @cached_property
    def scored(self) -> tuple[int, ...]:
        """Frames with truth: labelled, after the first mask, and not the last of the video.

        None where all masks are given ones, of objects that appear there.
        """
        if not set(self.labelled) - set(self.first_frames.values()):
            return ()
        return tuple(i for i in self.labelled[1:] if i < len(self) - 1)

    def scored_objects(self, frame: int | None = None) -> list[int]:
        """The objects that are scored in a frame with truth: those given before; None: in any."""
        frame = max(self.scored, default=0) if frame is None else frame
        return sorted(i for i, first in self.first_frames.items() if first < frame)

    @cached_property
    def coding(self) -> MaskEncoding:
        """What the values of its masks mean."""
        return MaskEncoding.detect([self.masks[i] for i in self.labelled], self.single_object)

    def coding_in(self, results: Path) -> MaskEncoding:
        """What the values of predicted masks in `results`/NAME mean, decided once for all."""
        return MaskEncoding.detect(
            [results / self.name / self.mask_name(frame) for frame in self.scored],
            self.single_object)

    def reason_unusable(self) -> str | None:
        """Why nothing can be done with it, or None."""
        if len(self) < 3:
            return (f"{self.images[0].parent}: {len(self)} frames, expected at least 3, since the "
                    "first and the last are not scored")
        if not self.labelled:
            return f"{self.images[0].parent}: no mask of any of its frames"
        if is_empty(self.masks[self.labelled[0]]):
            return (f"{self.masks[self.labelled[0]]}: the first mask holds no object, expected "
                    "one to look for")
        return None

    def check(self) -> None:
        """Look at every file's header.

        Raises:
            OSError: a file can't be read.
            ValueError: frames of different sizes, or a mask of another size than its frame.
        """
        first = images.image_shape(self.images[0], "a frame")
        for image, mask in zip(self.images, self.masks):
            shape = images.image_shape(image, "a frame")
            images.check_same_shape(self.images[0], first, image, shape, "a frame")
            if mask is not None:
                mask_shape = images.image_shape(mask, f"the mask of {image}")
                images.check_same_shape(image, shape, mask, mask_shape)


class Davis:
    """The sequences of a data set: DAVIS in the order of its lists, or what is laid out alike.

    - DAVIS, both archives: 2016 lists files (`ImageSets/480p/train.txt`), 2017 lists names
      (`ImageSets/2017/train.txt`).
    - YouTube-VOS, MOSE, LVOS: no `ImageSets`; all sequences of the folder, or of its folder
      named as the set (`train`, `valid`). `meta.json` tells which frames are asked for.
    - A folder of one's own: `SEQUENCE/images` and `SEQUENCE/masks`, or as either of the above.

    Where there are no lists masks hold ids, objects may appear later, and the year says nothing.
    What can't be used is left out, and the log says why.

    Args:
        root: the folder.
        year: of DAVIS: "2016", one object in a sequence; "2017", many; "all", both lists joined,
            many; None: 2016 where it has that list, else 2017.
        set: the name of a list, such as "train"; "trainval" joins two.
        names: these sequences only.

    Raises:
        FileNotFoundError: no data set there, no such list, or a listed sequence isn't there.
        ValueError: an unknown sequence, a mask of another size than its frame, a listed sequence
            whose first frame has no mask, or nothing left.
    """

    def __init__(self, root: str | Path, year: str | None = "2016", set: str = "train",
                 names: list[str] | None = None):
        self.root = layout.find_root(Path(root), set)
        places = layout.sequence_folders(self.root)
        if not places:
            raise FileNotFoundError(
                f"{root}: no DAVIS data set there, expected a folder with JPEGImages, "
                f"Annotations and ImageSets, or one with SEQUENCE/images and SEQUENCE/masks. Get "
                f"it by python davis.py --download DIR or at {HOME} and name it with --dataset, "
                "or try --demo, which needs none")
        lists = (self.root / "ImageSets").is_dir()
        if lists and year is None:
            year = "2016" if layout.has_list(self.root, "2016", set) else "2017"
        listed = layout.listed_sequences(self.root, year, set) if lists else list(places)
        for name in names or ():
            if name not in listed:
                where = f"the lists of {self.root} for year {year}, set {set}"
                raise ValueError(f"unknown sequence {name!r} (--sequences): not in "
                                 f"{where if lists else self.root}")
        asked = {} if lists else layout.requested_frames(self.root / "meta.json")
        chosen = [name for name in listed if not names or name in names]
        self.sequences = self._fit([self._sequence(name, places, lists and year == "2016",
                                                   not lists, asked.get(name)) for name in chosen])

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self):
        return iter(self.sequences)

    @staticmethod
    def _sequence(name: str, places: dict, single_object: bool, later: bool,
                  asked: frozenset[str] | None) -> Sequence:
        if name not in places:
            example, _ = next(iter(places.values()))
            raise FileNotFoundError(f"{example.parent / name}: no frames of sequence {name} there")
        frames, masks = layout.frames_and_masks(*places[name])
        return Sequence(name, frames, masks, single_object, later,
                        tuple(i for i, file in enumerate(frames) if asked and file.stem in asked))

    def _fit(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those that can be used, each looked at; of the others the log says why not.

        Raises:
            ValueError: nothing is left, or a sequence of DAVIS' lists has masks, but none of its
                first frame: starting later would give figures that compare with no others.
        """
        for sequence in sequences:
            if sequence.labelled and sequence.labelled[0] and not sequence.late_objects:
                mask = sequence.masks[sequence.labelled[0]].with_name(sequence.mask_name(0))
                raise ValueError(f"{mask}: no such mask, expected that of the first frame of "
                                 f"sequence {sequence.name}")
        unfit = {sequence.name: sequence.reason_unusable() for sequence in sequences}
        reasons = [reason for reason in unfit.values() if reason]
        for reason in reasons:
            log.warning("left out: %s", reason)
        fit = [sequence for sequence in sequences if not unfit[sequence.name]]
        if not fit:
            raise ValueError(f"{self.root}: no sequence is left: {reasons[0]}"
                             + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""))
        for sequence in fit:
            sequence.check()
        partly = [s.name for s in fit if 1 < len(s.labelled) < len(s)]
        if partly:
            log.info("masks of some frames only, the others are neither trained nor scored on: %s",
                     ", ".join(partly[:5]) + (f" and {len(partly) - 5} more" if partly[5:] else ""))
        return fit


def for_training(sequences: list[Sequence]) -> list[Sequence]:
    """Those with masks of two frames at least; the log names the others.

    What their values mean is decided here, and said once rather than by each loader's worker.

    Raises:
        ValueError: there are none.
    """
    fit = [sequence for sequence in sequences if len(sequence.labelled) > 1]
    for sequence in sequences:
        if sequence not in fit:
            log.warning("not trained on: %s has one mask only", sequence.name)
        else:
            _ = sequence.coding
    if sequences and not fit:
        raise ValueError("nothing to train on: each sequence has one mask only, expected those of "
                         "two frames at least")
    return fit


def hold_out(sequences: list[Sequence], share: float, seed: int) -> tuple[list, list]:
    """Hold out whole sequences, at least one, or none where `share` is 0: (training, held out).

    Raises:
        ValueError: `share` isn't in [0, 1), or nothing would be left to train on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"--validation_size must be at least 0 and below 1, got {share}")
    if share == 0 and sequences:
        return list(sequences), []
    if len(sequences) < 2:
        raise ValueError("training needs at least two sequences: one to train on, one held out")
    count = min(max(1, round(share * len(sequences))), len(sequences) - 1)
    held_out = set(np.random.default_rng(seed).choice(len(sequences), count, replace=False))
    return ([s for i, s in enumerate(sequences) if i not in held_out],
            [s for i, s in enumerate(sequences) if i in held_out])


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Download DAVIS at 480p, frames and masks. It is under CC BY-NC: not for "
                    "commercial use.")
    parser.add_argument("--download", metavar="DIR", type=Path, required=True,
                        help="where the data set is to be; then: main.py -d DIR")
    parser.add_argument("--year", "-y", choices=download.ARCHIVES, default="2016",
                        help="2016: one object in a sequence, 1.9 GB; 2017: many, 0.8 GB "
                             "(default: 2016)")
    args = parser.parse_args()
    try:
        download.download(args.download, args.year)
    except (OSError, ValueError) as error:
        message = errors.explained(error)
        if message is None:
            raise
        print(f"davis.py: error: {message}", file=sys.stderr)
        return 2
    print(f"{args.download}: ready, python main.py -m eval -d {args.download}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
