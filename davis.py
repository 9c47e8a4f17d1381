"""Data sets with masks: DAVIS, and those in the layout of YouTube-VOS or of your own folders.

A `Sequence` is a clip with ground truth, `Davis` the sequences of a folder. As a script it
downloads DAVIS:
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
SETS = ("train", "val", "trainval")  # lists of DAVIS; a data set may have others, too


@dataclass(frozen=True)
class Sequence(Clip):
    """A clip with masks of all or some of its frames.

    Args:
        name: of the sequence, such as "bear".
        images: the frames' files, in order.
        masks: each frame's mask file; None for frames without a mask.
        single_object: every non-zero value of a mask is object 1 (DAVIS-2016).
        late_objects: objects may appear after the first mask (YouTube-VOS, MOSE, LVOS).
        requested: frames whose masks an evaluation server expects; empty for all.
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
        """Return a frame, (H, W, 3) uint8 RGB."""
        return images.read_image(self.images[index])

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of a labelled frame, (H, W) uint8: 0 background, else the object's id."""
        return self.mask_encoding.read(self.masks[index])

    def truth(self, index: int) -> np.ndarray:
        """Return the mask with `VOID` where pixels are not labelled, which are not scored."""
        return self.mask_encoding.read(self.masks[index], keep_void=True)

    def mask_name(self, index: int) -> str:
        """Return the file name of a frame's predicted mask: the frame's name with .png."""
        return f"{self.frame_name(index)}.png"

    @cached_property
    def labelled(self) -> tuple[int, ...]:
        """Indices of the frames with a mask."""
        return tuple(i for i, mask in enumerate(self.masks) if mask is not None)

    @property
    def output_frames(self) -> tuple[int, ...]:
        """Indices of the frames whose predicted masks are written."""
        return self.requested or tuple(range(len(self)))

    @cached_property
    def first_frames(self) -> dict[int, int]:
        """The first labelled frame that shows each object, by object id.

        Without `late_objects` only objects of the first mask count, as in DAVIS.
        """
        frames: dict[int, int] = {}
        for i in self.labelled if self.late_objects else self.labelled[:1]:
            for object_id in np.unique(self.mask(i)).tolist():
                if object_id:
                    frames.setdefault(object_id, i)
        return frames

    def reference_masks(self) -> dict[int, np.ndarray]:
        """Return the reference masks by frame: (H, W) uint8, with the objects that appear there.

        A tracker may use these masks and no others; objects that appeared before are left out.

        Raises:
            ValueError: no mask holds an object.
        """
        if not self.first_frames:
            raise ValueError(f"{self.masks[self.labelled[0]]}: the first mask holds no object, "
                             "expected at least one")
        masks = {}
        for frame in sorted({*self.first_frames.values()}):
            new = [i for i, first in self.first_frames.items() if first == frame]
            mask = self.mask(frame)
            masks[frame] = np.where(np.isin(mask, new), mask, 0)
        return masks

    @cached_property
    def scored(self) -> tuple[int, ...]:
        """Indices of the frames that are scored: labelled, except the first mask and last frame.

        DAVIS leaves these two out. No frame is scored if all masks are reference masks.
        """
        if not set(self.labelled) - set(self.first_frames.values()):
            return ()
        return tuple(i for i in self.labelled[1:] if i < len(self) - 1)

    def scored_objects(self, frame: int | None = None) -> list[int]:
        """Return the ids that are scored in a frame: objects with an earlier reference mask.

        Args:
            frame: index of a scored frame; None for the last one, in which all are scored.
        """
        frame = max(self.scored, default=0) if frame is None else frame
        return sorted(i for i, first in self.first_frames.items() if first < frame)

    @cached_property
    def mask_encoding(self) -> MaskEncoding:
        """How mask values map to objects, decided once for all masks of the sequence."""
        return MaskEncoding.detect([self.masks[i] for i in self.labelled], self.single_object)

    def result_encoding(self, results: Path) -> MaskEncoding:
        """Return how values of the predicted masks in `results`/NAME map to objects."""
        return MaskEncoding.detect(
            [results / self.name / self.mask_name(frame) for frame in self.scored],
            self.single_object)

    def reason_unusable(self) -> str | None:
        """Return why the sequence cannot be used, or None if it can."""
        if len(self) < 3:
            return (f"{self.images[0].parent}: {len(self)} frames, expected at least 3, since the "
                    "first and the last are not scored")
        if not self.labelled:
            return f"{self.images[0].parent}: no mask of any of its frames"
        if is_empty(self.masks[self.labelled[0]]):
            return (f"{self.masks[self.labelled[0]]}: the first mask holds no object, expected "
                    "at least one")
        return None

    def check(self) -> None:
        """Check every file's header, so that no broken file ends a long run.

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
    """The sequences of a data set, in the order of DAVIS's lists or of their names.

    - DAVIS, both archives: 2016 lists files (`ImageSets/480p/train.txt`), 2017 lists names
      (`ImageSets/2017/train.txt`).
    - YouTube-VOS, MOSE, LVOS: no `ImageSets`; all sequences of the folder, or of its subfolder
      named as the set (`train`, `valid`). `meta.json` lists the frames that a server expects.
    - Your own folder: `SEQUENCE/images` and `SEQUENCE/masks`, or laid out as either of the above.

    Without lists, masks hold ids, objects may appear later, and the year has no effect. Sequences
    that cannot be used are skipped with a warning.

    Args:
        root: folder of the data set.
        year: of DAVIS: "2016", one object per sequence; "2017", several; "all", both lists joined,
            several; None: 2016 where it has that list, else 2017.
        set: name of a list, such as "train", or of a subfolder; "trainval" joins two lists.
        names: sequences to take; defaults to all.

    Raises:
        FileNotFoundError: no data set or no such list there, or a listed sequence is missing.
        OSError: a file can't be read.
        ValueError: an unknown sequence, a mask that differs in size from its frame, a listed
            sequence whose first frame has no mask, or no usable sequence.
    """

    def __init__(self, root: str | Path, year: str | None = "2016", set: str = "train",
                 names: list[str] | None = None):
        self.root = layout.find_root(Path(root), set)
        folders = layout.sequence_folders(self.root)
        if not folders:
            raise FileNotFoundError(
                f"{root}: no data set there, expected a folder with JPEGImages, Annotations and "
                "ImageSets, or with SEQUENCE/images and SEQUENCE/masks. Download DAVIS with "
                f"python davis.py --download DIR or from {HOME} and name the folder with "
                "--dataset, or try --demo, which draws its own data")
        lists = (self.root / "ImageSets").is_dir()
        if lists and year is None:
            year = "2016" if layout.has_list(self.root, "2016", set) else "2017"
        listed = layout.listed_sequences(self.root, year, set) if lists else list(folders)
        for name in names or ():
            if name not in listed:
                where = f"the lists of {self.root} for year {year}, set {set}"
                raise ValueError(f"unknown sequence {name!r} (--sequences): not in "
                                 f"{where if lists else self.root}")
        requested = {} if lists else layout.requested_frames(self.root / "meta.json")
        chosen = [name for name in listed if not names or name in names]
        self.sequences = self._usable([
            self._sequence(name, folders, lists and year == "2016", not lists, requested.get(name))
            for name in chosen])

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self):
        return iter(self.sequences)

    @staticmethod
    def _sequence(name: str, folders: dict[str, tuple[Path, Path]], single_object: bool,
                  late_objects: bool, requested: frozenset[str] | None) -> Sequence:
        if name not in folders:
            example, _ = next(iter(folders.values()))
            raise FileNotFoundError(f"{example.parent / name}: no frames of sequence {name} there")
        frames, masks = layout.frames_and_masks(*folders[name])
        return Sequence(name, frames, masks, single_object, late_objects, tuple(
            i for i, file in enumerate(frames) if requested and file.stem in requested))

    def _usable(self, sequences: list[Sequence]) -> list[Sequence]:
        """Return the usable sequences, after checking their files; skip the others with a warning.

        Raises:
            ValueError: no sequence is usable, or a sequence of DAVIS's lists has masks but none of
                its first frame: scores from a later start would not compare with published ones.
        """
        for sequence in sequences:
            if sequence.labelled and sequence.labelled[0] and not sequence.late_objects:
                mask = sequence.masks[sequence.labelled[0]].with_name(sequence.mask_name(0))
                raise ValueError(f"{mask}: no such mask, expected one for the first frame of "
                                 f"sequence {sequence.name}")
        unusable = {sequence.name: sequence.reason_unusable() for sequence in sequences}
        reasons = [reason for reason in unusable.values() if reason]
        for reason in reasons:
            log.warning("skipped: %s", reason)
        usable = [sequence for sequence in sequences if not unusable[sequence.name]]
        if not usable:
            raise ValueError(f"{self.root}: no usable sequence: {reasons[0]}"
                             + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""))
        for sequence in usable:
            sequence.check()
        partly = [s.name for s in usable if 1 < len(s.labelled) < len(s)]
        if partly:
            log.info("some frames without a mask, which are neither trained on nor scored: %s",
                     ", ".join(partly[:5]) + (f" and {len(partly) - 5} more" if partly[5:] else ""))
        return usable


def for_training(sequences: list[Sequence]) -> list[Sequence]:
    """Return the sequences with at least two masks, as training needs; a warning names the others.

    How mask values map to objects is decided and logged here, once rather than in every worker.

    Raises:
        ValueError: no sequence has two masks.
    """
    fit = [sequence for sequence in sequences if len(sequence.labelled) > 1]
    for sequence in sequences:
        if sequence not in fit:
            log.warning("not trained on: %s has only one mask", sequence.name)
        else:
            _ = sequence.mask_encoding
    if sequences and not fit:
        raise ValueError("nothing to train on: each sequence has only one mask, expected masks of "
                         "at least two frames")
    return fit


def hold_out(sequences: list[Sequence], share: float, seed: int) -> tuple[list, list]:
    """Split the sequences at random into (training, held out).

    Whole sequences are held out, because frames of one sequence look alike: scores on frames of a
    training sequence would not show overfitting.

    Args:
        share: of the sequences to hold out, in [0, 1); rounded, at least one unless 0.
        seed: determines the choice.

    Raises:
        ValueError: `share` is not in [0, 1), or there are fewer than two sequences.
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
        description="Download DAVIS at 480p, frames and masks. Its licence is CC BY-NC: no "
                    "commercial use.")
    parser.add_argument("--download", metavar="DIR", type=Path, required=True,
                        help="folder for the data set; then use main.py -d DIR")
    parser.add_argument("--year", "-y", choices=download.ARCHIVES, default="2016",
                        help="2016: one object per sequence, 1.9 GB; 2017: several, 0.8 GB "
                             "(default: 2016)")
    args = parser.parse_args()
    with errors.one_line(parser):
        download.download(args.download, args.year)
    print(f"{args.download}: ready, python main.py -m eval -d {args.download}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
