"""Samples to train on: pairs and clips of frames, drawn from sequences by an index alone."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from davis import Sequence
from media.drawing import areas
from preprocess import Augment, to_tensor
from system import distributed
from training import lookalikes, synthetic_motion, warps
from training.static_images import StaticImage
from training.warps import Layer

log = logging.getLogger(__name__)

Source = Sequence | StaticImage

CLIP = 4  # frames of a clip where there are no still images
# Where there are: first these, then videos too, then longer clips. Each until what share of the
# steps, with what share of clips made of stills, of how many frames.
PHASES = ((0.3, 0.5, 6), (1.0, 0.35, 8))


# Pixels of the training frame that an object fills at least. Fewer leave no trace in the features,
# one location of which stands for 8x8 pixels or more; in DAVIS no object is that small.
MIN_PIXELS = 16


def large_enough(sequences: list[Sequence], pixels: float, shape: tuple[int, int] | None = None,
                 masks: int = 2) -> list[Sequence]:
    """The sequences that can be trained on; one warning names those whose objects are too small.

    Reads masks until enough are found, so usually the first ones of each sequence only.

    Args:
        pixels: the least area of an object.
        shape: (H, W) of the frame that this area refers to; None: that of the mask.
        masks: the number of masks that have to show the same object at that size.
    """
    def fits(sequence: Sequence) -> bool:
        seen = np.zeros(256, int)
        for frame in sequence.labelled:
            mask = sequence.mask(frame)
            scale = 1 if shape is None else shape[0] * shape[1] / mask.size
            seen += areas(mask) * scale >= pixels
            if (seen[1:] >= masks).any():
                return True
        return False

    fit = [sequence for sequence in sequences if fits(sequence)]
    small = [sequence.name for sequence in sequences if sequence not in fit]
    if small:
        log.warning("not trained on, since all of its objects are too small: %s. %s",
                    ", ".join(small), TOO_SMALL)
    return fit


TOO_SMALL = ("Larger training frames (--input_image_shape, -p), or frames that were cut to the "
             "objects' surroundings, make objects larger")


class Pairs(Dataset):
    """Random pairs of frames of one sequence, with the binary masks of one of its objects.

    An index is a (frame, seed) pair from `PairSampler`: the frame is the test frame, counted
    through all sequences; the seed chooses the reference frame, the object and the
    augmentation, so a pair is the same whichever worker makes it.

    Items are (2, 3, H, W) images and (2, H, W) masks, those of the reference frame first.
    """

    def __init__(self, sequences: Iterable[Source], augment: Augment):
        self.frames: list[tuple[Source, int]] = [(sequence, i) for sequence in sequences
                                                 for i in sequence.labelled]
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

    def _reference(self, sequence: Source, rng,
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

    A sequence's frames follow each other as in the video; the reference frame is that before the
    others, or any of the sequence, augmented by itself. A still image (a sequence of one frame)
    becomes a clip by motion: background and objects go their own ways. Into some clips objects of
    others are pasted, which move on their own, and doubles of the clip's own.

    Items are (T, 3, H, W) images and (T, H, W) uint8 masks; the reference frame is the first. The
    ids are 1 to N, N <= `objects`, in any order, each in the reference frame's mask; what can't be
    known from that is background, and so are some objects that are to be told from the others.

    Args:
        stills: images to make clips of, beside the sequences.
        frames: T, at least 2.
        gap: at most so many frames from one to the next.
        paste: share of the clips with objects of others.
        objects: at most so many are followed.
    """

    FAR = 0.35  # of the clips have a reference frame from another time
    DOUBLES = 0.6  # of the pasted objects
    CROSSES = 0.6  # of the doubles meet their original
    BEHIND = 0.5  # and of these, in a video, are behind it
    SWARM = 0.2  # of the clips with a near reference frame hold a swarm of small look-alikes
    LINES = 0.2  # of the pasted objects, and of the stills' own, have lines on them
    MORE = 0.5  # chance of each of four more of them
    PARTS = 0.25  # of what moves as one in stills has a part that is an object of its own
    MEMBERS = (3, 6)  # of a swarm
    OTHERS = 0.2  # of the objects beside the first are not followed
    ALONE = 0.25  # of the clips follow one object only, whatever looks like it
    SWAPS = 0.3  # of the stills' objects are seen before another background
    TOGETHER = 0.6  # of the stills' objects that touch each other move as one
    LEAST = 0.0005  # share of the reference frame that an object fills at least; see `FEWEST`
    TRIES = 10  # at a clip whose reference frame holds an object
    SOURCES = 20  # tried for one clip before training gives up

    def __init__(self, sequences: list[Sequence], augment: Augment, frames: int = 4, gap: int = 5,
                 paste: float = 0.75, objects: int = 6, stills: list[StaticImage] | None = None):
        if frames < 2:
            raise ValueError(f"a clip has at least two frames, got {frames}")
        super().__init__([*sequences, *(stills or [])], augment)
        self.sequences, self.stills = list(sequences), list(stills or [])
        self.parts = [len(self.frames) - len(self.stills), len(self.stills)]
        self.length, self.gap, self.paste, self.objects = frames, gap, paste, objects

    def __getitem__(self, index: tuple[int, int]):
        frame, seed = index
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(self.SOURCES):
                source, start = self.frames[frame]
                found = self._clip(source, start, rng)
                if found is not None:
                    return found
                frame = int(rng.integers(len(self.frames)))  # of this one none can be made
        raise ValueError(f"{source.masks[start]}: no object that is large enough to train on, nor "
                         f"in others that were tried. {TOO_SMALL}")

    def _clip(self, source: Source, start: int, rng) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A clip of a sequence or still image, or None if its objects stay too small.

        Where no object fills `LEAST` of the frame, one of `FEWEST` pixels will do.
        """
        for small in (False, True):
            for _ in range(self.TRIES):
                images, masks, hidden = (self._still(source, rng) if len(source) == 1 else
                                         self._video(source, start, rng))
                masks = self._followed(masks, hidden, rng, small)
                if masks.any():
                    return images, masks
        return None

    def _followed(self, masks: torch.Tensor, hidden: list[int], rng, small: bool) -> torch.Tensor:
        """(T, H, W) ids, whatever they are -> 1 to N, of some objects of the reference frame.

        None of them is `hidden`, and one is to be seen in another frame too, else there are none.
        All fill more than `LEAST` of a frame, or if `small`, `FEWEST` pixels.
        """
        least = self.LEAST * masks[0].numel()
        least = min(least, MIN_PIXELS - 1) if small else least
        seen = np.array([areas(mask) for mask in masks.numpy()]) > least
        seen[0, hidden] = False
        known = rng.permutation(1 + np.flatnonzero(seen[0, 1:]))
        again = [i for i in known if seen[1:, i].any()]
        left_out = 1.0 if rng.random() < self.ALONE else self.OTHERS
        others = [i for i in known if i not in again[:1] and rng.random() >= left_out]
        chosen = (again[:1] and again[:1] + others)[:self.objects]
        new = np.zeros(256, np.uint8)
        new[chosen] = 1 + rng.permutation(len(chosen))
        return torch.from_numpy(new[masks.numpy()])

    def _video(self, sequence: Source, start: int, rng) -> tuple:
        """A clip of a sequence: images, masks with all ids, ids that are hidden in the first."""
        reference, _, _ = self._reference(sequence, rng)
        step = self._step(rng)
        chosen = self._walk(sequence, start, step)
        far = bool(rng.random() < self.FAR or not sequence.mask(chosen[0]).any())
        if far:
            chosen[0] = reference
        frames = [(sequence.image(i), sequence.mask(i)) for i in chosen]
        masks = [mask for _, mask in frames]
        layers = self._pasted(sequence, masks, None, masks[0].shape, step, far, rng,
                              lambda i: lookalikes.object_path(masks, i), frames)
        before = masks[0].copy()
        for t, frame in enumerate(frames):
            for layer in layers:
                layer.paste(t, *frame)
        first = [self.augment(*frames[0])] if far else []
        clip = self.augment.clip(frames[1:] if far else frames)
        return *(torch.stack(parts) for parts in zip(*first, *clip)), \
            synthetic_motion.hidden_ids(layers, before, masks[0])

    def _still(self, still: Source, rng) -> tuple:
        """A clip of a still image: images, masks with all ids, ids hidden in the first."""
        image, ids = still.image(0), still.mask(0)
        shape, far = self.augment.shape, bool(rng.random() < self.FAR)
        whole = warps.cut_out(image, ids)
        swap = rng.random() < self.SWAPS
        if swap:
            other = self._other(still, rng)
            back = other.image(int(rng.integers(len(other))))
            focus = rng.uniform(0.2, 0.8, 2) * back.shape[1::-1]
        else:
            back = warps.inpaint(image, ids)
            focus = whole.center if whole else rng.uniform(0.2, 0.8, 2) * back.shape[1::-1]
        poses = synthetic_motion.camera_poses(rng, self.length, far, back.shape[:2], shape, focus)
        layers, parts = [], self._parts(ids, rng)
        for part in parts:
            cutouts = self._lined([warps.cut_out(image, part)] * self.length, rng)
            if swap:
                layers.append(synthetic_motion.pasted_layer(rng, cutouts, poses, shape, far))
            else:
                layers.append(synthetic_motion.object_layer(rng, cutouts, poses, shape, far))
        own = list(layers)
        layers += self._pasted(still, [ids, *parts], poses, shape, self._step(rng), far, rng,
                               lambda i: next((synthetic_motion.layer_path(layer) for layer in own
                                               if (layer.cutouts[0].ids == i).any()), None))
        layers = [layers[i] for i in rng.permutation(len(layers))]
        bends = warps.random_path(rng, self.length, 0.004 * max(back.shape), far,
                              (warps.MESH, warps.MESH, 2)).astype(np.float32)
        images, masks = [], []
        for t in range(self.length):
            frame = warps.warp_background(back, poses[t], bends[t], shape)
            mask = np.zeros(shape, np.uint8)
            for layer in layers:
                layer.paste(t, frame, mask)
            images.append(frame)
            masks.append(mask)
        if self.augment.random:
            images = synthetic_motion.vary_lighting(rng, images, far)
        return (torch.stack([to_tensor(x) for x in images]), torch.from_numpy(np.array(masks)),
                synthetic_motion.hidden_ids(layers, np.zeros(shape, np.uint8), masks[0]))

    def _parts(self, ids: np.ndarray, rng) -> list[np.ndarray]:
        """(H, W) ids of a still -> the same of what moves as one each, maybe cut in two."""
        together = rng.random() < self.TOGETHER
        groups = (synthetic_motion.touching_groups(ids) if together
                  else [[i] for i in np.unique(ids[ids > 0])])
        parts = [np.where(np.isin(ids, group), ids, 0).astype(np.uint8) for group in groups]
        return [synthetic_motion.split_part(rng, part, new)
                if new and rng.random() < self.PARTS else part
                for part, new in itertools.zip_longest(parts, unused_ids([ids])[:len(parts)])]

    def _step(self, rng) -> int:
        return int(rng.integers(1, self.gap + 1)) * int(rng.choice((-1, 1)))

    def _walk(self, sequence: Source, start: int, step: int) -> list[int]:
        """Frames of a clip, mirrored at both ends of the sequence."""
        last, start = len(sequence.labelled) - 1, sequence.labelled.index(start)
        chosen = [last - abs(last - abs(start + step * i)) for i in range(self.length)]
        return [sequence.labelled[min(max(i, 0), last)] for i in chosen]

    def _other(self, own: Source, rng) -> Source:
        """Another still or sequence, of both kinds alike; `own` where there is none."""
        kinds: list = [kind for kind in (self.sequences, self.stills)
                       if any(source is not own for source in kind)]
        if not kinds:
            return own
        kind = kinds[rng.integers(len(kinds))]
        while True:
            other = kind[rng.integers(len(kind))]
            if other is not own:
                return other

    def _pasted(self, own: Source, masks: list[np.ndarray], poses: np.ndarray | None,
                shape: tuple[int, int], step: int, far: bool, rng,
                path: Callable[[int], np.ndarray | None],
                frames: list | None = None) -> list[Layer]:
        """Layers of other objects in front of a clip, which may be among those to find.

        They are of other sequences or stills, or, where their place tells them from the first,
        doubles of one of the clip's own. They move as they did there, and on ways of their own.

        Args:
            masks: (H, W) each, of the clip: what is pasted gets ids that they don't hold.
            poses, shape: see `scenes.pasted`.
            path: (T, 2) where the middle of an object of the clip is, None if that is unknown.
            frames: images and masks of a video, which may be in front of what is pasted.
        """
        count = 1 + int((rng.random(4) < self.MORE).sum()) if rng.random() < self.paste else 0
        layers, labels = [], unused_ids(masks)
        if count and not far and rng.random() < self.SWARM:
            layers, labels = self._swarm(own, labels, step, shape, rng), labels[self.MEMBERS[1]:]
            count = min(count, 1)
        for label in labels[:count]:
            other = self._other(own, rng)
            double = other is own or not far and rng.random() < self.DOUBLES
            source = own if double else other
            empty = len(source) == 1 and not source.mask(0).any()
            if empty or double and far:
                continue
            cutouts, object_id = self._cutouts(source, step, far, label, rng)
            cutouts = self._lined(cutouts, rng)
            way = path(object_id) if double and rng.random() < self.CROSSES else None
            if way is None:
                layer = synthetic_motion.pasted_layer(rng, cutouts, poses, shape, far, double)
            else:
                scale = np.exp(rng.normal(0, 0.15))
                if poses is not None:
                    scale *= np.sqrt(np.abs(np.linalg.det(poses[0, :, :2])))
                layer = lookalikes.crossing_layer(rng, cutouts, way, scale, shape)
            layers.append(lookalikes.maybe_vanish(rng, layer))
            if way is not None and frames and rng.random() < self.BEHIND:
                layers.append(lookalikes.stationary_layer([warps.cut_out(
                    image.copy(), np.where(mask == object_id, mask, 0)) for image, mask in frames]))
        return layers

    def _swarm(self, own: Source, labels: list[int], step: int, shape: tuple[int, int],
               rng) -> list[Layer]:
        """Layers of several small copies of one object, of different times."""
        source = own if rng.random() < 0.5 else self._other(own, rng)
        if len(source) == 1 and not source.mask(0).any():
            return []
        _, _, object_id = self._reference(source, rng)
        count = int(rng.integers(self.MEMBERS[0], self.MEMBERS[1] + 1))
        members = [self._cutouts(source, step, False, label, rng, object_id)[0]
                   for label in labels[:count]]
        return [lookalikes.maybe_vanish(rng, layer)
                for layer in lookalikes.swarm_layers(rng, members, shape)]

    def _lined(self, cutouts: list, rng) -> list:
        return lookalikes.add_lines(rng, cutouts) if rng.random() < self.LINES else cutouts

    def _cutouts(self, source: Source, step: int, far: bool, label: int, rng,
                 object_id: int | None = None) -> tuple[list, int]:
        """An object of a sequence or still as it moves there, with a new id; and its own id."""
        start, _, object_id = self._reference(source, rng, object_id)
        chosen = self._walk(source, start, step)
        if far and len(source) > 1:
            chosen[0], _, _ = self._reference(source, rng, object_id)
        found = {i: warps.cut_out(source.image(i),
                                   np.where(source.mask(i) == object_id, label, 0).astype(np.uint8))
                 for i in set(chosen)}
        return [found[i] for i in chosen], object_id


def unused_ids(masks: list[np.ndarray]) -> list[int]:
    """Ids from 1 on that none of the (H, W) masks holds."""
    return (1 + np.flatnonzero(sum(areas(mask) for mask in masks)[1:] == 0)).tolist()


class PairSampler(Sampler):
    """Indices for `Pairs`: every frame once before any comes again.

    Args:
        frames: how many there are; or how many of each part, one after the other.
        count: how many pairs to draw.
        shuffle: False keeps the order of the sequences.
        seed: fixes order and pairs.
        skip: leave out so many of the first, which were drawn before.
        rank, ranks: take one of so many, from the one of this rank on.
        shares: how much of what is drawn is of each part; None draws each frame as often.

    Raises:
        ValueError: shares that aren't one of each part, or a share of a part without frames.
    """

    def __init__(self, frames: int | list[int], count: int, shuffle: bool = True, seed: int = 0,
                 skip: int = 0, rank: int = 0, ranks: int = 1,
                 shares: list[float] | None = None):
        parts = [frames] if isinstance(frames, int) else list(frames)
        if shares and (len(shares) != len(parts) or min(shares) < 0 or not any(shares)
                       or any(share and not part for share, part in zip(shares, parts))):
            raise ValueError(f"shares {shares} of parts of {parts} frames: expected a share of "
                             "each, at least 0, and 0 of nothing")
        if count and not any(parts):
            raise ValueError("no frame to draw pairs from, expected at least one")
        self.parts = parts if shares else [sum(parts)]
        self.shares = np.array(shares or [1.0]) / sum(shares or [1.0])
        self.count, self.shuffle, self.seed = count, shuffle, seed
        self.taken = range(skip + rank, count, ranks)

    def __len__(self) -> int:
        return len(self.taken)

    def __iter__(self):
        return itertools.islice(self._all(), self.taken.start, None, self.taken.step)

    def _all(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng(self.seed)
        starts = np.cumsum([0, *self.parts])
        passes = [self._passes(rng, frames) for frames in self.parts]
        for _ in range(self.count):
            part = int(rng.choice(len(passes), p=self.shares)) if len(passes) > 1 else 0
            yield int(starts[part] + next(passes[part])), int(rng.integers(2**31))

    def _passes(self, rng, frames: int) -> Iterator[int]:
        """Frames of one part without end, each once before any again."""
        while True:
            yield from rng.permutation(frames) if self.shuffle else range(frames)


def batches(kind: type[Pairs], sequences: list[Sequence], stills: list, augment: Augment, options,
            steps: range) -> Iterator:
    """The batches of these of the steps of a training, those of this process.

    Args:
        kind: `Pairs`, or `Clips`, for which stills go through `PHASES`.
        options: `training.options.Options`.
    """
    each, start = options.batch_size * distributed.count(), 0
    for until, share, frames in PHASES if stills else [(1.0, 0.0, CLIP)]:
        end = round(until * options.iterations)
        drawn, start = range(max(start, steps.start), min(end, steps.stop)), end
        if not drawn:
            continue
        more = {"frames": frames, "stills": stills} if kind is Clips else {}
        samples, parts = kind(sequences, augment, **more), {}
        if sequences and stills:
            parts = {"frames": samples.parts, "shares": [1 - share, share]}
        sampler = PairSampler(**{"frames": len(samples), **parts}, count=drawn.stop * each,
                              shuffle=options.shuffle, seed=options.seed, skip=drawn.start * each,
                              rank=distributed.rank(), ranks=distributed.count())
        yield from DataLoader(samples, options.batch_size, sampler=sampler,
                              num_workers=options.workers)
