"""Samples to train on: pairs and clips of frames, drawn from sequences by an index alone."""

import itertools
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from davis import Sequence
from preprocess import Augment


class Pairs(Dataset):
    """Random pairs of frames of one sequence, with the binary masks of one of its objects.

    An index is a (frame, seed) pair from `PairSampler`: the frame is the test frame, counted
    through all sequences; the seed chooses the reference frame, the object and the
    augmentation, so a pair is the same whichever worker makes it.

    Items are (2, 3, H, W) images and (2, H, W) masks, those of the reference frame first.
    """

    def __init__(self, sequences: list[Sequence], augment: Augment):
        self.frames = [(sequence, i) for sequence in sequences for i in sequence.labelled]
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
        for frame in rng.permutation(sequence.labelled).tolist():
            mask = sequence.mask(frame)
            ids = np.unique(mask[mask > 0] if wanted is None else mask[mask == wanted])
            if len(ids):
                return frame, mask, int(rng.choice(ids))
        raise ValueError(f"{sequence.masks[sequence.labelled[0]].parent}: no object in any mask")


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

    def __init__(self, sequences: list[Sequence], augment: Augment, frames: int = 4,
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
        last, start = len(sequence.labelled) - 1, sequence.labelled.index(start)
        chosen = [last - abs(last - abs(start + step * i)) for i in range(self.length)]
        return [sequence.labelled[min(max(i, 0), last)] for i in chosen]

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
