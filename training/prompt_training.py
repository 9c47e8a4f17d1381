"""Train the prompt decoder with a simulated user.

The encoder is frozen, so a sample (an object in a crop of a frame) is encoded once and then
prompted and corrected click by click. A step takes one round of each of several active samples; a
finished sample makes room for another. Reports and resuming work as in every training.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import metrics
import preprocess
from davis import Sequence
from media.background import interruptible, progress
from media.prompts import Prompts
from network.prompt_decoder import PromptDecoder, PromptFeatures
from system import distributed
from tracking import prompting
from training import distractors, simulated_user
from training.options import MAX_GRADIENT_NORM, Options, one_cycle
from training.report import Report
from training.samples import large_enough, prepare_worker
from training.static_images import StaticImage
from training.warps import cut_out
from videomatch import VideoMatch

log = logging.getLogger(__name__)

# Shares of the samples
STATIC_IMAGES = 0.6  # from static images, where there are sequences too: they show more classes
BOXES = 0.6  # begin with a box, the others with a click
# Get distractors, half of them duplicates. Boxes seldom do: with many distractors J of boxes fell
# from 0.848 to 0.833, and rose to 0.840 with few, because a box tells by itself which object is
# meant (docs/log/2026-11-25-keys-and-values.md).
WITH_DISTRACTORS = {"box": 0.1, "click": 0.6}
TINY = 0.12  # are of a tiny object; more cost ordinary objects, of which there are then fewer
WITH_WRONG_MASK = 0.25  # of the clicked ones, begin with a mask as a tracker may leave it

JITTER = 0.1  # shift of a box's sides; more tolerates careless boxes, at the cost of exact ones
MARGINS = (0.2, 0.8)  # around the prompted region, on both sides of `prompting.CROP_MARGIN`
WITH_PREVIOUS = 0.75  # share of the rounds with the previous mask as input, the rest without
# Numbers of rounds to choose from. More rounds train on later corrections, fewer on first masks;
# a round does not run the encoder.
ROUNDS = {"box": (1, 1, 2, 3), "click": range(1, 9)}
SMALLEST = 60  # pixels of an object; smaller ones are hardly more than a click
TRIES = 100  # random frames to search for such an object before all frames are searched
RATE = 10  # times the encoder's learning rate, since the decoder starts from random weights
MAX_HELD_OUT = 30  # held-out static images at most: each is prompted five times per report


class PromptSamples(Dataset):
    """An endless number of samples: a crop of a frame, an object's mask, and its first prompts.

    A sample depends on the seed and its index alone. Items are (3, H, W) normalised float32, the
    (H, W) bool mask, the prompts in the crop's pixels, and a bool per round: whether the mask so
    far is an input of the next one.

    Args:
        sequences, static_images: at least one of either.
        augment: add distractors, flip, and change colours.
    """

    def __init__(self, sequences: list[Sequence], static_images: list[StaticImage],
                 augment: bool = True, seed: int = 0):
        self.sequences, self.static_images = sequences, static_images
        self.augment, self.seed = augment, seed
        self.colour = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)

    def __getitem__(self, index: int):
        rng = np.random.default_rng((self.seed, index))
        image, truth = self._object(rng)
        kind = "box" if rng.random() < BOXES else "click"
        if self.augment and rng.random() < TINY:
            cutout = cut_out(image, truth.astype(np.uint8))
            image, truth = distractors.paste_tiny(self._object(rng)[0], cutout, rng)
        if self.augment and rng.random() < WITH_DISTRACTORS[kind]:
            others = distractors.distractor_cutouts(image, truth, [self._object(rng)])
            image, truth = distractors.add_distractors(image, truth, others, rng)
        if self.augment and rng.random() < 0.5:
            image, truth = image[:, ::-1].copy(), truth[:, ::-1].copy()
        prompts, region, rounds = initial_prompts(truth, rng, kind)
        patch, prompts = prompting.resize_crop(image, prompts, region)
        truth, mask = (None if mask is None else cv2.resize(
            mask.astype(np.uint8), patch.shape[1::-1],
            interpolation=cv2.INTER_NEAREST_EXACT) > 0 for mask in (truth[region], prompts.mask))
        prompts = Prompts(prompts.boxes, prompts.points, prompts.negative_points, mask)
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(2**31)))
                patch = self.colour(torch.from_numpy(patch).permute(2, 0, 1)).permute(1, 2, 0)
            patch = np.ascontiguousarray(patch.numpy())
        with_previous = (rng.random(rounds) < WITH_PREVIOUS).tolist()
        return preprocess.to_tensor(patch), truth, prompts, with_previous

    def _object(self, rng) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, (H, W, 3) uint8, and the (H, W) bool mask of a random object in it.

        Raises:
            ValueError: no mask holds an object of `SMALLEST` pixels.
        """
        for source, frame in self._frames(rng):
            mask = source.mask(frame)
            ids, counts = np.unique(mask, return_counts=True)
            ids = ids[(ids > 0) & (counts >= SMALLEST)]
            if len(ids):
                return source.image(frame), mask == rng.choice(ids)
        raise ValueError(f"--prompts: no mask holds an object of at least {SMALLEST} pixels, "
                         "expected larger objects, or images of a higher resolution")

    def _frames(self, rng):
        """Yield labelled frames to search: `TRIES` random ones, then every frame once."""
        for _ in range(TRIES):
            static = not self.sequences or (self.static_images and rng.random() < STATIC_IMAGES)
            sources = self.static_images if static else self.sequences
            source = sources[rng.integers(len(sources))]
            yield source, int(rng.choice(source.labelled))
        for source in (*self.sequences, *self.static_images):
            yield from ((source, frame) for frame in source.labelled)


def initial_prompts(truth: np.ndarray, rng,
                    kind: str) -> tuple[Prompts, tuple[slice, slice], int]:
    """Simulate a user's first prompts of an object.

    Args:
        truth: (H, W) bool.
        kind: begin with a "box" or a "click".

    Returns:
        The prompts, the region of the frame to encode (rows, columns), and the number of rounds.
    """
    shape, margin = truth.shape, rng.uniform(*MARGINS)
    box = simulated_user.jitter_box(simulated_user.bounding_box(truth), JITTER, shape, rng)
    if rng.random() < 0.5:  # boxes that are too large or too small on all sides
        box = simulated_user.scale_box(box, rng.uniform(-JITTER, JITTER), shape)
    region = prompting.crop_around(Prompts([box]), shape, margin)
    rounds = int(rng.choice(ROUNDS[kind]))
    if kind == "box":
        return Prompts([box]), region, rounds
    if rng.random() < 0.5:  # a click does not say how large the object is: see the whole frame
        region = slice(0, shape[0]), slice(0, shape[1])
    prompts = Prompts(points=[simulated_user.first_click(truth, rng)])
    if rng.random() < WITH_WRONG_MASK:
        mask = corrupt_mask(truth, box, rng)
        click = simulated_user.next_click(mask, truth)
        if mask.any() and click is not None:
            point, positive = click
            prompts = Prompts(mask=mask)
            (prompts.points if positive else prompts.negative_points).append(point)
    return prompts, region, rounds


def corrupt_mask(truth: np.ndarray, box: tuple[int, int, int, int], rng) -> np.ndarray:
    """Return a mask as a tracker might leave it: coarse, too wide or too narrow, with one blob.

    The blob is a disc that is missing or added.

    Args:
        truth: (H, W) bool.
        box: x, y, width, height of the object, which scale the errors.
    """
    _, _, w, h = box
    side = max(w, h)
    soft = cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 0.5 + 0.06 * side * rng.random())
    mask = (soft > rng.uniform(0.25, 0.75)).astype(np.uint8)
    x, y = simulated_user.first_click(truth, rng)
    middle = x + round(side * rng.normal(0, 0.2)), y + round(side * rng.normal(0, 0.2))
    cv2.circle(mask, middle, 1 + round(side * rng.uniform(0.05, 0.3)), int(rng.random() < 0.4),
               cv2.FILLED)
    return mask > 0


@dataclass
class ActiveSample:
    """An encoded sample that is being corrected.

    Args:
        features: of the crop.
        truth: (H, W) bool mask of the object.
        prompts: input of the next round.
        rounds: one per round left: whether the mask so far is an input of the round after it.
    """

    features: PromptFeatures
    truth: np.ndarray
    prompts: Prompts
    rounds: list[bool]


def train_prompts(model: VideoMatch, sequences: list[Sequence], static_images: list[StaticImage],
                  held_out: list, options: Options) -> float:
    """Train the prompt decoder of a model, and nothing else of it; a model without one gets one.

    Args:
        model: its encoder is used as it is.
        sequences, static_images: to draw samples from.
        held_out: sequences and static images whose masks decide which weights are saved.
        options: `shape`, `losses` and `shuffle` have no effect.

    Returns:
        The best held-out J in [0, 1]: the mean over the true box, a jittered box, one click and
        three clicks.

    Raises:
        ValueError: no object is large enough, or the state to resume from belongs to a run with
            other options.
    """
    torch.manual_seed(options.seed)
    sequences = large_enough(sequences, SMALLEST, masks=1)
    if not sequences and not static_images:
        raise ValueError(f"nothing to train on: no object has at least {SMALLEST} pixels")
    decoder = add_prompt_decoder(model)
    optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=options.weight_decay)
    schedule = one_cycle(optimizer, RATE * options.learning_rate, options.iterations)
    report = PromptReport(model, optimizer, schedule, sequences, held_out, options, static_images)
    with report, interruptible() as interrupted:
        done = report.start_or_resume()
        bar = progress(total=options.iterations, initial=done, desc="training",
                       disable=distributed.rank() > 0)
        while (done < options.iterations and report.reports_since_best < options.patience
               and not any(distributed.gather(interrupted()))):
            every = options.report if options.report > 0 else options.iterations
            last = min(options.iterations, (done // every + 1) * every)
            for loss in training_steps(model, optimizer, sequences, static_images, options, done,
                                       last):
                schedule.step()
                report.losses.append(loss)
                done += 1
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", j=f"{report.best:.3f}")
                if any(distributed.gather(interrupted())):
                    break
            report(done)
    if interrupted():
        log.info("interrupted after iteration %d; continue with --resume", done)
    log.info("saved in %s", options.save)
    return report.best


def add_prompt_decoder(model: VideoMatch) -> PromptDecoder:
    """Return the model's prompt decoder; adds an untrained one if there is none."""
    if model.prompts is None:
        model.prompts = PromptDecoder(tuple(model.encoder.spec.levels.values())).to(model.device)
    return model.prompts


def training_steps(model: VideoMatch, optimizer, sequences: list[Sequence],
                   static_images: list[StaticImage], options: Options, first: int,
                   last: int) -> Iterator[float]:
    """Take the steps from one report to the next; yields the loss of each.

    All samples are new after a report, so that a run resumed there continues identically.

    Args:
        first, last: iterations of the whole training, `last` exclusive.
    """
    samples = PromptSamples(sequences, static_images, options.augment, options.seed)
    # A step finishes at most as many samples as it holds, so no sample is drawn twice.
    each = options.batch_size * distributed.count()
    indices = range(first * each + distributed.rank(), (last + 1) * each, distributed.count())
    loader = iter(DataLoader(samples, None, sampler=indices, num_workers=options.workers,
                             collate_fn=_unchanged, worker_init_fn=prepare_worker))
    model.eval()
    active: list[ActiveSample] = []
    for _ in range(first, last):
        while len(active) < options.batch_size:
            active.append(start_sample(model, *next(loader)))
        yield training_step(model, optimizer, active)
        active = [sample for sample in active if sample.rounds]


def _unchanged(item):
    """Keep samples as they are; a lambda could not be sent to worker processes."""
    return item


@torch.no_grad()
def start_sample(model: VideoMatch, image: torch.Tensor, truth: np.ndarray, prompts: Prompts,
                 rounds: list[bool]) -> ActiveSample:
    """Encode a sample. Arguments are those of an item of `PromptSamples`."""
    image = image[None].to(model.device)
    features = model.prompts.prepare(image, *model.encoder.pyramid(image))
    return ActiveSample(features, truth, prompts, rounds)


def training_step(model: VideoMatch, optimizer, samples: list[ActiveSample]) -> float:
    """Update the decoder once and add a click to each sample; returns the loss before the update.

    Each sample is one round: predict a mask, compute its loss, correct its largest error.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for sample in samples:
        logits = model.prompts(sample.features, sample.prompts)
        loss = loss_of(logits, sample.truth) / len(samples)
        loss.backward()  # one sample at a time, so that memory does not grow with the batch
        total += loss.item()
        correct(sample, logits.detach())
    distributed.average_gradients(model.prompts.parameters())
    torch.nn.utils.clip_grad_norm_(model.prompts.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return total


def loss_of(logits: torch.Tensor, truth: np.ndarray) -> torch.Tensor:
    """Return cross-entropy plus dice loss of (h, w) logits, given the (H, W) bool mask.

    The mask is averaged to the size of the logits: a location on an edge has a target in between.
    """
    target = torch.from_numpy(truth.astype(np.float32)).to(logits.device)[None, None]
    target = F.adaptive_avg_pool2d(target, logits.shape)[0, 0]
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * target).sum() + 1) / (probability.sum() + target.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + dice


def correct(sample: ActiveSample, logits: torch.Tensor) -> None:
    """Add the simulated user's next click to a sample, in place; a perfect mask finishes it."""
    predicted = F.interpolate(logits[None, None], size=sample.truth.shape, mode="bilinear",
                              align_corners=False)[0, 0].cpu().numpy() > 0
    predicted = prompting.select_components(predicted, sample.prompts)
    with_mask, *left = sample.rounds
    more = simulated_user.add_click(sample.prompts, predicted, sample.truth, with_mask)
    sample.prompts, sample.rounds = (sample.prompts, []) if more is None else (more, left)


class PromptReport(Report):
    """A `Report` that scores the masks of boxes, of one click and of three clicks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.run["trained"] = "prompts"

    def save_weights(self, iteration: int, **held_out) -> None:
        prompts = {"iteration": iteration, **held_out}
        # the rest of the model is unchanged, so its metadata stay valid
        self.model.save(self.options.save, **{**self.model.metadata, "prompts": prompts})

    def scores(self, held_out: list) -> list[float]:
        return [float(np.mean([row["box"], row["jittered"], *row["clicks"][0::2]]))
                for row in evaluate_prompts(self.model, held_out, count=3)]


def evaluate_prompts(model: VideoMatch, sources: list, count: int) -> list[dict]:
    """Measure J of prompted masks, object by object, in the first labelled frames.

    Args:
        sources: sequences and static images.
        count: number of clicks.

    Returns:
        For each object its "name", J of the true "box", J of a box whose sides are moved by up to
        `JITTER` of its size ("jittered"), and a list of J after 1 to `count` "clicks".
    """
    prompt, rows = partial(prompting.predict_mask, model.eval()), []
    for source in sources:
        first = source.labelled[0]
        image, mask = source.image(first), source.mask(first)
        for object_id in np.unique(mask[mask > 0]).tolist():
            truth = mask == object_id
            rng = np.random.default_rng(len(rows))  # the same prompts in every report
            box = simulated_user.bounding_box(truth)
            jittered = simulated_user.jitter_box(box, JITTER, truth.shape, rng)
            clicked = simulated_user.simulate_clicks(prompt, image, truth, count, rng)
            rows.append({
                "name": f"{source.name}_{object_id}",
                "box": metrics.jaccard(prompt(image, Prompts([box])), truth),
                "jittered": metrics.jaccard(prompt(image, Prompts([jittered])), truth),
                "clicks": [metrics.jaccard(predicted, truth) for predicted in clicked]})
    return rows


def split_static_images(static_images: list[StaticImage], share: float,
                        seed: int) -> tuple[list, list]:
    """Hold out a share of the images, at most `MAX_HELD_OUT`; returns (training, held out)."""
    count = min(round(share * len(static_images)), MAX_HELD_OUT, max(0, len(static_images) - 1))
    held_out = set(np.random.default_rng(seed).choice(len(static_images), count,
                                                      replace=False).tolist())
    return ([image for i, image in enumerate(static_images) if i not in held_out],
            [image for i, image in enumerate(static_images) if i in held_out])
