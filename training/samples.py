"""Training samples: pairs and clips of frames. A sample depends on the seed and its index alone."""

import itertools
import logging
import signal
from collections.abc import Callable, Iterable, Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from davis import Sequence
from media.drawing import areas
from preprocess import Augment, to_tensor
from system import distributed
from training import lighting, lookalikes, synthetic_motion, warps
from training.static_images import StaticImage
from training.warps import Layer

log = logging.getLogger(__name__)

Source = Sequence | StaticImage

CLIP = 4  # frames of a clip without static images; a step's time and memory grow with it
# Curriculum with static images: (end as a share of the steps, share of clips made from static
# images, frames per clip). Static images come first, since they have many more kinds of objects;
# long clips come last, since they let errors accumulate as in real videos, and are slow.
PHASES = ((0.3, 0.5, 6), (1.0, 0.35, 8))

# Smallest object to train on, in pixels of the training frame. Smaller ones leave no trace in the
# features, one location of which stands for 8x8 pixels or more; no object in DAVIS is that small.
MIN_PIXELS = 16
TOO_SMALL = ("Larger training frames (--input_image_shape, -p), or frames cropped to the objects' "
             "surroundings, make objects larger")


def large_enough(sequences: list[Sequence], pixels: float, shape: tuple[int, int] | None = None,
                 masks: int = 2) -> list[Sequence]:
    """Return the sequences with a large enough object; one warning names the others.

    Reads the masks of a sequence only until enough of them show such an object.

    Args:
        pixels: smallest area of an object.
        shape: (H, W) of the frame that this area refers to; defaults to that of the mask.
        masks: number of masks that have to show the same object at that size.
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


class Pairs(Dataset):
    """Random pairs of frames of one sequence, with the binary masks of one of its objects.

    Items are (2, 3, H, W) images and (2, H, W) masks; the reference frame comes first. An index is
    a (frame, seed) pair from `PairSampler`: the frame is the test frame, counted through all
    sequences; the seed determines the reference frame, the object and the augmentation, so that a
    sample is the same whichever worker makes it.

    Args:
        sequences: sequences or static images.
        augment: applied to each frame independently.
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for reference, mask, object_id in self._references(sequence, rng):
                pair = [self.augment(image, (ids == object_id).astype(np.uint8))
                        for image, ids in ((sequence.image(reference), mask),
                                           (sequence.image(test), sequence.mask(test)))]
                if pair[0][1].any():  # resizing may remove a tiny object
                    return tuple(torch.stack(tensors) for tensors in zip(*pair))
        raise ValueError(f"{sequence.masks[test].parent}: no object in any mask that is large "
                         f"enough to train on. {TOO_SMALL}")

    def _reference(self, sequence: Source, rng,
                   object_id: int | None = None) -> tuple[int, np.ndarray, int]:
        """Return the first of `_references`; raises a ValueError if there is none."""
        for reference in self._references(sequence, rng, object_id):
            return reference
        raise ValueError(f"{sequence.masks[sequence.labelled[0]].parent}: no object in any mask")

    @staticmethod
    def _references(sequence: Source, rng, object_id: int | None = None
                    ) -> Iterator[tuple[int, np.ndarray, int]]:
        """Yield frames that show an object in random order, with their mask and one of its objects.

        Args:
            object_id: the object that the frame has to show; defaults to any.
        """
        for frame in rng.permutation(sequence.labelled).tolist():
            mask = sequence.mask(frame)
            ids = np.unique(mask[mask > 0] if object_id is None else mask[mask == object_id])
            if len(ids):
                yield frame, mask, int(rng.choice(ids))


class Clips(Pairs):
    """Training clips for the memory method: a reference frame and frames to segment after it.

    Frames of a sequence follow each other as in the video. The reference frame is the one just
    before the others, or, after a jump, any of the sequence, augmented independently. A static
    image becomes a clip by synthetic motion of its background and objects. Objects of other
    sources and duplicates of the clip's own are pasted into some clips.

    Items are (T, 3, H, W) images and (T, H, W) uint8 masks; the reference frame is the first. The
    ids are 1 to N <= `objects` in random order, and all appear in the reference frame's mask.
    Objects that do not are background, and so are some that do, as distractors.

    Args:
        sequences: to take clips from.
        augment: applied to clips of sequences; its `shape` is the frames' (H, W).
        frames: T, at least 2.
        gap: most frames of the video from one frame of the clip to the next.
        paste: share of the clips with pasted objects.
        objects: most objects that are tracked in a clip.
        static_images: to make clips from, in addition to the sequences.
    """

    # Probabilities. Those of hard cases trade names among look-alikes, which they improve, for
    # time spent on ordinary clips.
    JUMPS = 0.35  # the reference frame is from another time: appearance without position
    DUPLICATES = 0.6  # a pasted object is a duplicate, which differs only in position
    CROSSES = 0.6  # a duplicate meets its original
    BEHIND = 0.5  # ... and in a video is occluded by it
    SWARM = 0.2  # a clip without a jump has a swarm of small look-alikes
    LINES = 0.2  # a pasted object, or one of a static image, has thin lines on it
    MORE = 0.5  # for each of four more pasted objects
    PARTS = 0.25  # an object of a static image has a part that is an object of its own
    DISTRACTORS = 0.2  # an object other than the first is not tracked, but background
    ALONE = 0.25  # only one object is tracked: all look-alikes are distractors
    NEW_BACKGROUND = 0.3  # a static image's objects move in front of another background
    TOGETHER = 0.6  # objects of a static image that touch each other move as one

    MEMBERS = (3, 6)  # least and most members of a swarm
    # Smallest target as a share of the reference frame, usually more than `MIN_PIXELS`. Smaller
    # objects become targets only where a source has no larger one.
    MIN_SHARE = 0.0005
    TRIES = 10  # draws of a clip until its reference frame shows an object
    SOURCES = 20  # sources tried for one clip before training gives up with an error

    def __init__(self, sequences: list[Sequence], augment: Augment, frames: int = 4, gap: int = 5,
                 paste: float = 0.75, objects: int = 6,
                 static_images: list[StaticImage] | None = None):
        if frames < 2:
            raise ValueError(f"a clip has at least two frames, got {frames}")
        super().__init__([*sequences, *(static_images or [])], augment)
        self.sequences, self.static_images = list(sequences), list(static_images or [])
        self.parts = [len(self.frames) - len(self.static_images), len(self.static_images)]
        self.length, self.gap, self.paste, self.objects = frames, gap, paste, objects

    def __getitem__(self, index: tuple[int, int]):
        frame, seed = index
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(self.SOURCES):
                source, start = self.frames[frame]
                clip = self._clip(source, start, rng)
                if clip is not None:
                    return clip
                frame = int(rng.integers(len(self.frames)))  # this one yields no clip
        raise ValueError(f"{source.masks[start]}: no object that is large enough to train on, nor "
                         f"in others that were tried. {TOO_SMALL}")

    def _clip(self, source: Source, start: int, rng) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a clip of a source, or None if its objects stay too small.

        Where no object covers `MIN_SHARE` of the frame, one of `MIN_PIXELS` pixels will do.
        """
        for small in (False, True):
            for _ in range(self.TRIES):
                images, masks, hidden = (self._static_clip(source, rng) if len(source) == 1 else
                                         self._video_clip(source, start, rng))
                masks = self._select_targets(masks, hidden, rng, small)
                if masks.any():
                    return images, masks
        return None

    def _select_targets(self, masks: torch.Tensor, hidden: list[int], rng,
                        small: bool) -> torch.Tensor:
        """Choose the objects to track and number them 1 to N; the others become background.

        All targets are visible in the reference frame, and one of them in another frame too;
        without such an object the result is empty.

        Args:
            masks: (T, H, W) with any ids.
            hidden: ids that are too occluded in the reference frame to be targets.
            small: accept objects of `MIN_PIXELS` pixels.
        """
        least = self.MIN_SHARE * masks[0].numel()
        least = min(least, MIN_PIXELS - 1) if small else least
        seen = np.array([areas(mask) for mask in masks.numpy()]) > least
        seen[0, hidden] = False
        visible = rng.permutation(1 + np.flatnonzero(seen[0, 1:]))
        again = [i for i in visible if seen[1:, i].any()]
        left_out = 1.0 if rng.random() < self.ALONE else self.DISTRACTORS
        others = [i for i in visible if i not in again[:1] and rng.random() >= left_out]
        chosen = (again[:1] and again[:1] + others)[:self.objects]
        new = np.zeros(256, np.uint8)
        new[chosen] = 1 + rng.permutation(len(chosen))
        return torch.from_numpy(new[masks.numpy()])

    def _video_clip(self, sequence: Source, start: int, rng) -> tuple:
        """Return images, masks with all ids, and ids hidden in the first frame, of a sequence."""
        reference, _, _ = self._reference(sequence, rng)
        step = self._step(rng)
        chosen = self._frame_indices(sequence, start, step)
        # an empty first mask cannot be a reference, so another frame takes its place
        jump = bool(rng.random() < self.JUMPS or not sequence.mask(chosen[0]).any())
        if jump:
            chosen[0] = reference
        frames = [(sequence.image(i), sequence.mask(i)) for i in chosen]
        masks = [mask for _, mask in frames]
        layers = self._pasted_layers(sequence, masks, None, masks[0].shape, step, jump, rng,
                                     lambda i: lookalikes.object_path(masks, i), frames)
        before = masks[0].copy()
        for t, frame in enumerate(frames):
            for layer in layers:
                layer.paste(t, *frame)
        first = [self.augment(*frames[0])] if jump else []
        clip = self.augment.clip(frames[1:] if jump else frames)
        return *(torch.stack(parts) for parts in zip(*first, *clip)), \
            synthetic_motion.hidden_ids(layers, before, masks[0])

    def _static_clip(self, source: Source, rng) -> tuple:
        """Return images, masks with all ids, and ids hidden in the first frame, of an image."""
        image, ids = source.image(0), source.mask(0)
        shape, jump = self.augment.shape, bool(rng.random() < self.JUMPS)
        whole = warps.cut_out(image, ids)
        swap = rng.random() < self.NEW_BACKGROUND
        if swap:
            other = self._other_source(source, rng)
            back = other.image(int(rng.integers(len(other))))
            focus = rng.uniform(0.2, 0.8, 2) * back.shape[1::-1]
        else:
            back = warps.inpaint(image, ids)
            focus = whole.center if whole else rng.uniform(0.2, 0.8, 2) * back.shape[1::-1]
        poses = synthetic_motion.camera_poses(rng, self.length, jump, back.shape[:2], shape, focus)
        layers, parts = [], self._moving_parts(ids, rng)
        for part in parts:
            cutouts = self._maybe_lined([warps.cut_out(image, part)] * self.length, rng)
            if swap:
                layers.append(synthetic_motion.pasted_layer(rng, cutouts, poses, shape, jump))
            else:
                layers.append(synthetic_motion.object_layer(rng, cutouts, poses, shape, jump))
        own = list(layers)
        layers += self._pasted_layers(
            source, [ids, *parts], poses, shape, self._step(rng), jump, rng,
            lambda i: next((synthetic_motion.layer_path(layer) for layer in own
                            if (layer.cutouts[0].ids == i).any()), None))
        layers = [layers[i] for i in rng.permutation(len(layers))]
        bends = warps.random_path(rng, self.length, 0.004 * max(back.shape), jump,
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
            images = lighting.vary_lighting(rng, images, jump)
        return (torch.stack([to_tensor(x) for x in images]), torch.from_numpy(np.array(masks)),
                synthetic_motion.hidden_ids(layers, np.zeros(shape, np.uint8), masks[0]))

    def _moving_parts(self, ids: np.ndarray, rng) -> list[np.ndarray]:
        """Split a static image's (H, W) ids into masks of what moves as one.

        Touching objects may move together, and an object may get a part with an id of its own.
        """
        together = rng.random() < self.TOGETHER
        groups = (synthetic_motion.touching_groups(ids) if together
                  else [[i] for i in np.unique(ids[ids > 0])])
        parts = [np.where(np.isin(ids, group), ids, 0).astype(np.uint8) for group in groups]
        return [synthetic_motion.split_part(rng, part, new)
                if new and rng.random() < self.PARTS else part
                for part, new in itertools.zip_longest(parts, unused_ids([ids])[:len(parts)])]

    def _step(self, rng) -> int:
        """Return a random distance between a clip's frames in the video; may be negative."""
        return int(rng.integers(1, self.gap + 1)) * int(rng.choice((-1, 1)))

    def _frame_indices(self, sequence: Source, start: int, step: int) -> list[int]:
        """Return the labelled frames of a clip, reflected at both ends of the sequence."""
        last, start = len(sequence.labelled) - 1, sequence.labelled.index(start)
        chosen = [last - abs(last - abs(start + step * i)) for i in range(self.length)]
        return [sequence.labelled[min(max(i, 0), last)] for i in chosen]

    def _other_source(self, source: Source, rng) -> Source:
        """Return another static image or sequence, either kind equally often; else `source`."""
        kinds: list = [kind for kind in (self.sequences, self.static_images)
                       if any(other is not source for other in kind)]
        if not kinds:
            return source
        kind = kinds[rng.integers(len(kinds))]
        while True:
            other = kind[rng.integers(len(kind))]
            if other is not source:
                return other

    def _pasted_layers(self, own: Source, masks: list[np.ndarray], poses: np.ndarray | None,
                       shape: tuple[int, int], step: int, jump: bool, rng,
                       path: Callable[[int], np.ndarray | None],
                       frames: list | None = None) -> list[Layer]:
        """Return layers of objects to paste over a clip, which may become targets.

        They come from other sources, or are duplicates of the clip's own objects. They move as
        they do in their source, plus a path of their own. After a jump there are no duplicates,
        because nothing would tell them from the original.

        Args:
            own: the clip's source.
            masks: (H, W) each, of the clip; pasted objects get ids that these do not contain.
            poses, shape: see `synthetic_motion.pasted_layer`.
            step: frames of a video from one frame of the clip to the next.
            jump: the first frame is from another time.
            path: maps an id of the clip to the (T, 2) path of its centre, or None if unknown.
            frames: images and masks of a video, whose objects may occlude what is pasted.
        """
        count = 1 + int((rng.random(4) < self.MORE).sum()) if rng.random() < self.paste else 0
        layers, labels = [], unused_ids(masks)
        if count and not jump and rng.random() < self.SWARM:
            layers, labels = self._swarm(own, labels, step, shape, rng), labels[self.MEMBERS[1]:]
            count = min(count, 1)
        for label in labels[:count]:
            other = self._other_source(own, rng)
            duplicate = other is own or not jump and rng.random() < self.DUPLICATES
            source = own if duplicate else other
            empty = len(source) == 1 and not source.mask(0).any()
            if empty or duplicate and jump:
                continue
            cutouts, object_id = self._cutouts(source, step, jump, label, rng)
            cutouts = self._maybe_lined(cutouts, rng)
            original = path(object_id) if duplicate and rng.random() < self.CROSSES else None
            if original is None:
                layer = synthetic_motion.pasted_layer(rng, cutouts, poses, shape, jump, duplicate)
            else:
                scale = np.exp(rng.normal(0, 0.15))
                if poses is not None:
                    scale *= np.sqrt(np.abs(np.linalg.det(poses[0, :, :2])))
                layer = lookalikes.crossing_layer(rng, cutouts, original, scale, shape)
            layers.append(lookalikes.maybe_vanish(rng, layer))
            if original is not None and frames and rng.random() < self.BEHIND:
                layers.append(lookalikes.stationary_layer([warps.cut_out(
                    image.copy(), np.where(mask == object_id, mask, 0)) for image, mask in frames]))
        return layers

    def _swarm(self, own: Source, labels: list[int], step: int, shape: tuple[int, int],
               rng) -> list[Layer]:
        """Return layers of small copies of one object at different times."""
        source = own if rng.random() < 0.5 else self._other_source(own, rng)
        if len(source) == 1 and not source.mask(0).any():
            return []
        _, _, object_id = self._reference(source, rng)
        count = int(rng.integers(self.MEMBERS[0], self.MEMBERS[1] + 1))
        members = [self._cutouts(source, step, False, label, rng, object_id)[0]
                   for label in labels[:count]]
        return [lookalikes.maybe_vanish(rng, layer)
                for layer in lookalikes.swarm_layers(rng, members, shape)]

    def _maybe_lined(self, cutouts: list, rng) -> list:
        """Draw lines on the object with chance `LINES`."""
        return lookalikes.add_lines(rng, cutouts) if rng.random() < self.LINES else cutouts

    def _cutouts(self, source: Source, step: int, jump: bool, label: int, rng,
                 object_id: int | None = None) -> tuple[list, int]:
        """Return an object's cut-outs in consecutive frames, with a new id, and its own id.

        Args:
            source: sequence or static image that shows the object.
            step, jump: as in the clip that it is pasted into.
            label: the new id.
            object_id: the object; defaults to a random one.
        """
        start, _, object_id = self._reference(source, rng, object_id)
        chosen = self._frame_indices(source, start, step)
        if jump and len(source) > 1:
            chosen[0], _, _ = self._reference(source, rng, object_id)
        cutouts = {i: warps.cut_out(source.image(i), np.where(source.mask(i) == object_id, label, 0)
                                    .astype(np.uint8)) for i in set(chosen)}
        return [cutouts[i] for i in chosen], object_id


def unused_ids(masks: list[np.ndarray]) -> list[int]:
    """Return the ids from 1 to 255 that none of the (H, W) masks contains."""
    return (1 + np.flatnonzero(sum(areas(mask) for mask in masks)[1:] == 0)).tolist()


class PairSampler(Sampler):
    """Draws indices for `Pairs` and `Clips`: every frame once before any is drawn again.

    Args:
        frames: number of frames; or a list of numbers, of parts that lie one after the other.
        count: number of samples to draw.
        shuffle: False keeps the order of the frames.
        seed: determines the order and the samples.
        skip: leave out this many of the first samples, which an interrupted run has used.
        rank, ranks: draw every `ranks`-th sample, starting with number `rank`.
        shares: share of the samples to draw from each part; None draws every frame equally often.

    Raises:
        ValueError: `shares` does not have a number >= 0 for each part, or a part without frames
            has a share.
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
            raise ValueError("no frame to draw samples from, expected at least one")
        self.parts = parts if shares else [sum(parts)]
        self.shares = np.array(shares or [1.0]) / sum(shares or [1.0])
        self.count, self.shuffle, self.seed = count, shuffle, seed
        self.taken = range(skip + rank, count, ranks)

    def __len__(self) -> int:
        return len(self.taken)

    def __iter__(self):
        return itertools.islice(self._all(), self.taken.start, None, self.taken.step)

    def _all(self) -> Iterator[tuple[int, int]]:
        """Yield the (frame, seed) pairs of all ranks, skipped ones included."""
        rng = np.random.default_rng(self.seed)
        starts = np.cumsum([0, *self.parts])
        orders = [self._order(rng, frames) for frames in self.parts]
        for _ in range(self.count):
            part = int(rng.choice(len(orders), p=self.shares)) if len(orders) > 1 else 0
            yield int(starts[part] + next(orders[part])), int(rng.integers(2**31))

    def _order(self, rng, frames: int) -> Iterator[int]:
        """Yield the frames of one part endlessly, each once before any is repeated."""
        while True:
            yield from rng.permutation(frames) if self.shuffle else range(frames)


def batches(kind: type[Pairs], sequences: list[Sequence], static_images: list, augment: Augment,
            options, steps: range) -> Iterator:
    """Yield this process's batches for the given steps of a training.

    Args:
        kind: `Pairs`, or `Clips`, for which static images go through `PHASES`.
        options: `training.options.Options`.
        steps: of all `options.iterations`; a resumed run starts later.
    """
    each, start = options.batch_size * distributed.count(), 0
    for until, share, frames in PHASES if static_images else [(1.0, 0.0, CLIP)]:
        end = round(until * options.iterations)
        drawn, start = range(max(start, steps.start), min(end, steps.stop)), end
        if not drawn:
            continue
        more = {"frames": frames, "static_images": static_images} if kind is Clips else {}
        samples, parts = kind(sequences, augment, **more), {}
        if sequences and static_images:
            parts = {"frames": samples.parts, "shares": [1 - share, share]}
        sampler = PairSampler(**{"frames": len(samples), **parts}, count=drawn.stop * each,
                              shuffle=options.shuffle, seed=options.seed, skip=drawn.start * each,
                              rank=distributed.rank(), ranks=distributed.count())
        yield from DataLoader(samples, options.batch_size, sampler=sampler,
                              num_workers=options.workers, worker_init_fn=prepare_worker)


def prepare_worker(_: int) -> None:
    """Prepare a process that makes samples.

    Ctrl+C is for the training process, which finishes its step; a worker that died of it would end
    the training. OpenCV would start a thread per core in every worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
