"""DAVIS data sets: layouts on disk, sequences, and random pairs of frames for training.

Run by itself it downloads them:
    python davis.py --download DIR [--year 2017]
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

import download
import preprocess

HOME = "https://davischallenge.org"
YEARS = ("2016", "2017", "all")
SETS = ("train", "val", "trainval")


@dataclass(frozen=True)
class Sequence:
    """One video: its frames in order, with a mask for each.

    Args:
        name: such as "bear".
        images, masks: files, of the same number.
        single_object: every non-zero value of a mask is object 1 (DAVIS-2016).
    """

    name: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    single_object: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return preprocess.read_image(self.images[index])

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8, 0 background, else the object's id."""
        return preprocess.read_mask(self.masks[index], self.single_object)

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
        first = preprocess.image_shape(self.images[0], "a frame")
        for image, mask in zip(self.images, self.masks):
            shape = preprocess.image_shape(image, "a frame")
            mask_shape = preprocess.image_shape(mask, f"the mask of {image}")
            preprocess.check_same_shape(self.images[0], first, image, shape, "a frame")
            preprocess.check_same_shape(image, shape, mask, mask_shape)


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


class Pairs(Dataset):
    """Random pairs of frames of one sequence, with the binary masks of one of its objects.

    An index is a (frame, seed) pair from `PairSampler`: the frame is the test frame, counted
    through all sequences; the seed chooses the reference frame, the object and the
    augmentation, so a pair is the same whichever worker makes it.

    Items are (2, 3, H, W) images and (2, H, W) masks, those of the reference frame first.
    """

    def __init__(self, sequences: list[Sequence], augment: preprocess.Augment):
        self.frames = [(sequence, i) for sequence in sequences for i in range(len(sequence))]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: tuple[int, int]):
        frame, seed = index
        sequence, test = self.frames[frame]
        rng = np.random.default_rng(seed)
        reference, mask, object_id = self._reference(sequence, rng)
        pair = [(sequence.image(reference), mask), (sequence.image(test), sequence.mask(test))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pair = [self.augment(image, (mask == object_id).astype(np.uint8))
                    for image, mask in pair]
        return tuple(torch.stack(tensors) for tensors in zip(*pair))

    def _reference(self, sequence: Sequence, rng,
                   wanted: int | None = None) -> tuple[int, np.ndarray, int]:
        """A random frame with an object (`wanted`, or any), its mask, and one of its objects."""
        for frame in rng.permutation(len(sequence)).tolist():
            mask = sequence.mask(frame)
            ids = np.unique(mask[mask > 0] if wanted is None else mask[mask == wanted])
            if len(ids):
                return frame, mask, int(rng.choice(ids))
        raise ValueError(f"{sequence.masks[0].parent}: no object in any mask")


class Clips(Pairs):
    """Clips for the use with recent frames: a reference frame and the frames to segment after it.

    The reference frame is that before the others, or any of the sequence, augmented by itself.
    Into some clips another sequence's object is pasted, which moves on its own: to be found, or
    to be told from the object.

    Items are (T, 3, H, W) images and (T, H, W) masks; the reference frame is the first.

    Args:
        frames: T.
        gap: at most so many frames from one to the next.
        paste: share of the clips with another object.
    """

    DOUBLES = 0.3  # of the pasted objects

    def __init__(self, sequences: list[Sequence], augment: preprocess.Augment, frames: int = 4,
                 gap: int = 5, paste: float = 0.6):
        super().__init__(sequences, augment)
        self.sequences = sequences
        self.length, self.gap, self.paste = frames, gap, paste

    def __getitem__(self, index: tuple[int, int]):
        frame, seed = index
        sequence, start = self.frames[frame]
        rng = np.random.default_rng(seed)
        reference, mask, object_id = self._reference(sequence, rng)
        step = int(rng.integers(1, self.gap + 1)) * int(rng.choice((-1, 1)))
        chosen = self._walk(sequence, start, step)
        far = rng.random() < 0.5 or not (sequence.mask(chosen[0]) == object_id).any()
        if far:
            chosen[0] = reference
        frames = self._frames(sequence, chosen, object_id)
        if rng.random() < self.paste:
            frames = self._pasted(frames, sequence, step, far, rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = [self.augment(*frames[0])] if far else []
            clip = self.augment.clip(frames[1:] if far else frames)
        return tuple(torch.stack(parts) for parts in zip(*first, *clip))

    def _walk(self, sequence: Sequence, start: int, step: int) -> list[int]:
        """Frames of a clip, mirrored at both ends of the sequence."""
        last = len(sequence) - 1
        chosen = [last - abs(last - abs(start + step * i)) for i in range(self.length)]
        return [min(max(i, 0), last) for i in chosen]

    @staticmethod
    def _frames(sequence: Sequence, chosen: list[int], object_id: int) -> list:
        """Images of the chosen frames, each with the binary mask of one object."""
        return [(sequence.image(i), (sequence.mask(i) == object_id).astype(np.uint8))
                for i in chosen]

    def _pasted(self, frames: list, own: Sequence, step: int, far: bool, rng) -> list:
        """The frames with another object in front, which may be the one to find.

        It is of another sequence, or, where its place tells it from the first, the double of one
        of this sequence. It moves as it did there, and on a way of its own besides.
        """
        others = [s for s in self.sequences if s != own]
        if far and not others:
            return frames
        double = not far and (not others or rng.random() < self.DOUBLES)
        other = own if double else others[rng.integers(len(others))]
        start, _, object_id = self._reference(other, rng)
        chosen = self._walk(other, start, step)
        if far:
            chosen[0], _, _ = self._reference(other, rng, object_id)
        height, width = frames[0][1].shape
        scale = rng.uniform(0.4, 1.1)
        place = rng.uniform(0.1, 0.9, 2) * (width, height)
        motion, turn, grow = rng.normal(0, 12, 2), rng.normal(0, 4), rng.normal(1, 0.06)
        wanted = rng.random() < 0.5
        result = []
        pasted = self._frames(other, chosen, object_id)
        for i, ((frame, truth), (image, mask)) in enumerate(zip(frames, pasted)):
            if mask.any() and (i == 0 or far and i == 1):
                y, x = np.nonzero(mask)
                center = np.array([(x.min() + x.max()) / 2, (y.min() + y.max()) / 2])
            if far and i == 1:
                place = rng.uniform(0.1, 0.9, 2) * (width, height)
            matrix = cv2.getRotationMatrix2D(center.tolist(), turn * i, scale * grow ** i)
            matrix[:, 2] += place + motion * i - center
            moved, front = (cv2.warpAffine(x, matrix, (width, height), flags=cv2.INTER_LINEAR)
                            for x in (image, mask * 255))
            alpha = (cv2.GaussianBlur(front, (3, 3), 0) / 255)[..., None]
            frame = (frame * (1 - alpha) + moved * alpha).astype(np.uint8)
            front = (front > 127).astype(np.uint8)
            result.append((frame, front if wanted else truth * (1 - front)))
        hidden = not result[0][1].any()  # then nobody could know what to look for
        return frames if hidden else result


class PairSampler(Sampler):
    """Indices for `Pairs`: every frame once before any comes again.

    Args:
        frames: how many there are.
        count: how many pairs to draw.
        shuffle: False keeps the order of the sequences.
        seed: fixes order and pairs.
        skip: leave out so many of the first, which were drawn before.
        rank, ranks: take one of so many, from the one of this rank on.
    """

    def __init__(self, frames: int, count: int, shuffle: bool = True, seed: int = 0,
                 skip: int = 0, rank: int = 0, ranks: int = 1):
        self.frames, self.count, self.shuffle, self.seed = frames, count, shuffle, seed
        self.taken = range(skip + rank, count, ranks)

    def __len__(self) -> int:
        return len(self.taken)

    def __iter__(self):
        return itertools.islice(self._all(), self.taken.start, None, self.taken.step)

    def _all(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng(self.seed)
        for start in range(0, self.count, self.frames):
            order = rng.permutation(self.frames) if self.shuffle else np.arange(self.frames)
            for frame in order[:self.count - start]:
                yield int(frame), int(rng.integers(2**31))


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
