"""DAVIS data sets: layouts on disk, sequences, and random pairs of frames for training.

Run by itself it downloads them:
    python davis.py --download DIR [--year 2017]
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import download
from media import images
from media.video import FOLDER_FPS, Clip

HOME = "https://davischallenge.org"
YEARS = ("2016", "2017", "all")
SETS = ("train", "val", "trainval")


@dataclass(frozen=True)
class Sequence(Clip):
    """A clip whose truth is known: its frames in order, with a mask for each.

    Args:
        name: such as "bear".
        images, masks: files, of the same number.
        single_object: every non-zero value of a mask is object 1 (DAVIS-2016).
    """

    name: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    single_object: bool = True

    fps = FOLDER_FPS

    def __len__(self) -> int:
        return len(self.images)

    @property
    def count(self) -> int:
        return len(self.images)

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        return map(self.image, range(start, len(self)))

    def backwards(self, start: int) -> Iterator[np.ndarray]:
        return map(self.image, reversed(range(start)))

    def frame_name(self, frame: int) -> str:
        return self.images[frame].stem

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return images.read_image(self.images[index])

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8, 0 background, else the object's id."""
        return images.read_mask(self.masks[index], self.single_object)

    def check(self) -> None:
        """Look at every file's header.

        Raises:
            FileNotFoundError: a frame without its mask.
            ValueError: fewer than three frames, frames of different sizes, or a mask of another
                size than its frame.
        """
        if len(self) < 3:
            raise ValueError(f"{self.images[0].parent}: {len(self)} frames, expected at least 3, "
                             "since the first and the last are not scored")
        first = images.image_shape(self.images[0], "a frame")
        for image, mask in zip(self.images, self.masks):
            shape = images.image_shape(image, "a frame")
            mask_shape = images.image_shape(mask, f"the mask of {image}")
            images.check_same_shape(self.images[0], first, image, shape, "a frame")
            images.check_same_shape(image, shape, mask, mask_shape)


class Davis:
    """The sequences of a DAVIS folder, in the order of its lists.

    Both archives are read: 2016 lists files (`ImageSets/480p/train.txt`), 2017 lists names
    (`ImageSets/2016/train.txt`, `ImageSets/2017/train.txt`).

    Args:
        root: the folder with `JPEGImages`, `Annotations` and `ImageSets`.
        year: "2016", one object in a sequence; "2017", many; "all", both lists joined, many.
        set: "train", "val" or "trainval".
        names: these sequences only.

    Raises:
        FileNotFoundError: no DAVIS there, no such list, or a frame without its mask.
        ValueError: an unknown sequence, or a mask of another size than its frame.
    """

    def __init__(self, root: str | Path, year: str = "2016", set: str = "train",
                 names: list[str] | None = None):
        self.root = Path(root)
        if not (self.root / "JPEGImages").is_dir():
            raise FileNotFoundError(
                f"{self.root}: no DAVIS data set there, expected a folder with JPEGImages, "
                f"Annotations and ImageSets. Get it by python davis.py --download "
                f"DIR or at {HOME} and name it with --dataset, or "
                "try --demo, which needs none")
        lists = [self._list(y, s) for y in (("2016", "2017") if year == "all" else (year,))
                 for s in (("train", "val") if set == "trainval" else (set,))]
        listed = list(dict.fromkeys(name for names_ in lists for name in names_))
        for name in names or ():
            if name not in listed:
                raise ValueError(f"unknown sequence {name!r} (--sequences): not in the lists of "
                                 f"{self.root} for year {year}, set {set}")
        self.sequences = [self._sequence(name, year == "2016") for name in listed
                          if not names or name in names]
        for sequence in self.sequences:
            sequence.check()

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self):
        return iter(self.sequences)

    def _list(self, year: str, set: str) -> list[str]:
        """Names of the sequences in an image set, from whichever list the archive has."""
        candidates = [self.root / "ImageSets" / year / f"{set}.txt"]
        if year == "2016":
            candidates.append(self.root / "ImageSets" / "480p" / f"{set}.txt")
        for path in candidates:
            if path.is_file():
                return self._names(path)
        raise FileNotFoundError(f"{candidates[0]}: no such list, expected the names of the {set} "
                                f"sequences of DAVIS-{year}")

    @staticmethod
    def _names(path: Path) -> list[str]:
        """A line is a name, or /JPEGImages/480p/NAME/00000.jpg and its mask."""
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a list of sequences, expected text") from error
        names = [Path(line).parts[3] if line.startswith("/JPEGImages/") and line.count("/") > 3
                 else line for line in lines if line]
        for name in names:
            if name != Path(name).name or name == "..":
                raise ValueError(f"{path}: expected names of sequences, found {name!r}")
        if not names:
            raise ValueError(f"{path}: an empty list, expected names of sequences")
        return list(dict.fromkeys(names))

    def _sequence(self, name: str, single_object: bool) -> Sequence:
        folder = self.root / "JPEGImages" / "480p" / name
        images = tuple(sorted(folder.glob("*.jpg")))
        if not images:
            raise FileNotFoundError(f"{folder}: no frames (*.jpg) of sequence {name} there")
        annotations = self.root / "Annotations" / "480p" / name
        masks = tuple(annotations / f"{image.stem}.png" for image in images)
        for path in sorted({*annotations.glob("*.png")} - {*masks}):
            raise FileNotFoundError(f"{folder / path.stem}.jpg: no such frame, expected one for "
                                    f"the mask {path}")
        return Sequence(name, images, masks, single_object)


def split(sequences: list[Sequence], share: float, seed: int) -> tuple[list, list]:
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
        print(f"davis.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.download}: ready, python main.py -m eval -d {args.download}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
