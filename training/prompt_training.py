"""Training of the decoder that is shown objects, by a person who is simulated.

The encoder stays as it is, so a scene is encoded once and then shown and mended click by click:
each step takes one round of each of several scenes, and a scene that was mended for long enough
makes room for another. Reports and resuming are those of every training.
"""

import logging
from dataclasses import dataclass

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
from network.prompts import PromptDecoder, Seen
from system import distributed
from tracking import prompting as looking
from training import distractors, simulated_user
from training.options import MAX_GRADIENT_NORM, Options, one_cycle
from training.report import Report
from training.samples import large_enough
from training.static_images import StaticImage
from videomatch import VideoMatch

log = logging.getLogger(__name__)

STILLS = 0.6  # of the scenes, where there are sequences too
BOXES = 0.6  # of the scenes begin with a box, the others with a click
# of the scenes get more objects, half of them doubles: a box tells by itself which is meant
CROWDED = {"box": 0.1, "click": 0.6}
JITTER = 0.1  # of a box's sides
MARGINS = (0.2, 0.8)  # seen around what is shown, as `looking.MARGIN`
MASKED = 0.25  # of the clicked scenes begin with a mask that is wrong here and there
KEPT = 0.75  # of the rounds show the mask so far
ROUNDS = {"box": (1, 1, 2, 3), "click": range(1, 9)}
SMALLEST = 60  # pixels: what is smaller isn't shown
TRIES = 100  # random frames that are looked at for such an object before all others are
RATE = 10  # times the learning rate of an encoder, since it begins from nothing
CHECKED = 30  # held-out frames at most


class PromptSamples(Dataset):
    """An endless number of scenes: a part of a frame, what is shown of an object, and its mask.

    A scene depends on seed and index alone.

    Args:
        sequences, stills: at least one of either.
        augment: flips and changes of colour.
    """

    def __init__(self, sequences: list[Sequence], stills: list[StaticImage], augment: bool = True,
                 seed: int = 0):
        self.sequences, self.stills, self.augment, self.seed = sequences, stills, augment, seed
        self.colour = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)

    def __getitem__(self, index: int):
        """(3, H, W) normalised float32, (H, W) bool, prompts in its pixels, rounds: see `Scene`."""
        rng = np.random.default_rng((self.seed, index))
        image, truth = self._object(rng)
        begun = "box" if rng.random() < BOXES else "click"
        if self.augment and rng.random() < CROWDED[begun]:
            others = distractors.distractor_cutouts(image, truth, [self._object(rng)])
            image, truth = distractors.add_distractors(image, truth, others, rng)
        if self.augment and rng.random() < 0.5:
            image, truth = image[:, ::-1].copy(), truth[:, ::-1].copy()
        shown, part, rounds = initial_prompts(truth, rng, begun)
        patch, shown = looking.resize_crop(image, shown, part)
        truth, before = (None if mask is None else cv2.resize(
            mask.astype(np.uint8), patch.shape[1::-1],
            interpolation=cv2.INTER_NEAREST_EXACT) > 0 for mask in (truth[part], shown.mask))
        shown = Prompts(shown.boxes, shown.points, shown.not_points, before)
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(2**31)))
                patch = self.colour(torch.from_numpy(patch).permute(2, 0, 1)).permute(1, 2, 0)
            patch = np.ascontiguousarray(patch.numpy())
        return preprocess.to_tensor(patch), truth, shown, (rng.random(rounds) < KEPT).tolist()

    def _object(self, rng) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 and (H, W) bool of any object that is large enough to be shown."""
        for source, frame in self._frames(rng):
            mask = source.mask(frame)
            ids, counts = np.unique(mask, return_counts=True)
            ids = ids[(ids > 0) & (counts >= SMALLEST)]
            if len(ids):
                return source.image(frame), mask == rng.choice(ids)
        raise ValueError(f"--prompts: no mask holds an object of at least {SMALLEST} pixels, "
                         "expected larger objects, or images of a higher resolution")

    def _frames(self, rng):
        """Labelled frames to look for an object in: `TRIES` random ones, then each of all once."""
        for _ in range(TRIES):
            stills = not self.sequences or (self.stills and rng.random() < STILLS)
            sources = self.stills if stills else self.sequences
            source = sources[rng.integers(len(sources))]
            yield source, int(rng.choice(source.labelled))
        for source in (*self.sequences, *self.stills):
            yield from ((source, frame) for frame in source.labelled)


def initial_prompts(truth: np.ndarray, rng, begun: str) -> tuple[Prompts, tuple[slice, slice], int]:
    """What a person shows of an object at first, the part that is looked at, and for how long.

    Args:
        begun: with a "box" or a "click".
    """
    shape, margin = truth.shape, rng.uniform(*MARGINS)
    box = simulated_user.jitter_box(simulated_user.bounding_box(truth), JITTER, shape, rng)
    if rng.random() < 0.5:  # too large or too small on all sides
        box = scale_box(box, rng.uniform(-JITTER, JITTER), shape)
    part = looking.crop_around(Prompts([box]), shape, margin)
    rounds = int(rng.choice(ROUNDS[begun]))
    if begun == "box":
        return Prompts([box]), part, rounds
    if rng.random() < 0.5:
        part = slice(0, shape[0]), slice(0, shape[1])
    shown = Prompts(points=[simulated_user.first_click(truth, rng)])
    if rng.random() < MASKED:
        wrong = corrupt_mask(truth, box, rng)
        click = simulated_user.next_click(wrong, truth)
        if wrong.any() and click is not None:
            shown = Prompts(mask=wrong)
            (shown.points if click[1] else shown.not_points).append(click[0])
    return shown, part, rounds


def scale_box(box, share: float, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box that is larger by a share of each side, on all sides, or smaller."""
    x, y, w, h = box
    left, top = max(0, round(x - share * w)), max(0, round(y - share * h))
    right, bottom = (min(shape[1], round(x + w + share * w)),
                     min(shape[0], round(y + h + share * h)))
    return left, top, max(1, right - left), max(1, bottom - top)


def corrupt_mask(truth: np.ndarray, box: tuple[int, int, int, int], rng) -> np.ndarray:
    """A mask as a tracker might leave it: coarse, too wide or too narrow, a disc too much or too
    little."""
    _, _, w, h = box
    side = max(w, h)
    soft = cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 0.5 + 0.06 * side * rng.random())
    wrong = (soft > rng.uniform(0.25, 0.75)).astype(np.uint8)
    x, y = simulated_user.first_click(truth, rng)
    middle = x + round(side * rng.normal(0, 0.2)), y + round(side * rng.normal(0, 0.2))
    cv2.circle(wrong, middle, 1 + round(side * rng.uniform(0.05, 0.3)), int(rng.random() < 0.4),
               cv2.FILLED)
    return wrong > 0


@dataclass
class ActiveSample:
    """One that is being mended.

    Args:
        prompts: what is shown next.
        rounds: as many as are left, and whether the mask so far is shown after each.
    """

    seen: Seen
    truth: np.ndarray
    prompts: Prompts
    rounds: list[bool]


def train_prompts(model: VideoMatch, sequences: list[Sequence], stills: list[StaticImage],
                  held_out: list, options: Options) -> float:
    """Fit the part of a model that is shown objects, and nothing else of it.

    Args:
        held_out: sequences and stills whose masks decide which weights are kept.
        options: `shape`, `losses` and `shuffle` don't count.

    Returns:
        The best held-out J, the mean of boxes, of one and of three clicks.

    Raises:
        ValueError: `options.resume`, and the state is that of a run with other options.
    """
    torch.manual_seed(options.seed)
    sequences = large_enough(sequences, SMALLEST, masks=1)
    if not sequences and not stills:
        raise ValueError(f"nothing to train on: no object has at least {SMALLEST} pixels")
    decoder = add_prompt_decoder(model)
    optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=options.weight_decay)
    schedule = one_cycle(optimizer, RATE * options.learning_rate, options.iterations)
    report = PromptReport(model, optimizer, schedule, sequences, held_out, options, stills)
    done = report.start_or_resume()
    with report, interruptible() as interrupted:
        bar = progress(total=options.iterations, initial=done, desc="training",
                       disable=distributed.rank() > 0)
        while done < options.iterations and report.reports_since_best < options.patience:
            every = options.report if options.report > 0 else options.iterations
            last = min(options.iterations, (done // every + 1) * every)
            for loss in training_steps(model, optimizer, sequences, stills, options, done, last):
                schedule.step()
                report.losses.append(loss)
                done += 1
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", j=f"{report.best:.3f}")
                if any(distributed.gather(interrupted())):
                    break
            report(done)
            if done < last:
                log.info("interrupted after iteration %d, --resume goes on from there", done)
                break
    log.info("saved in %s", options.save)
    return report.best


def add_prompt_decoder(model: VideoMatch) -> PromptDecoder:
    """The part of a model that is shown objects; a new one, untrained, where there is none."""
    if model.prompts is None:
        model.prompts = PromptDecoder(tuple(model.encoder.spec.levels.values())).to(model.device)
    return model.prompts


def training_steps(model: VideoMatch, optimizer, sequences, stills, options: Options, first: int,
           last: int):
    """The losses of the steps from one report to the next, as they are made.

    Scenes begin anew after a report, so that a run that goes on from there goes the same way.
    """
    scenes = PromptSamples(sequences, stills, options.augment, options.seed)
    # no scene is taken twice: a step makes room for as many as it holds at most
    each = options.batch_size * distributed.count()
    indices = range(first * each + distributed.rank(), (last + 1) * each, distributed.count())
    loader = iter(DataLoader(scenes, None, sampler=indices, num_workers=options.workers,
                             collate_fn=_same))
    model.eval()
    running: list[ActiveSample] = []
    for _ in range(first, last):
        while len(running) < options.batch_size:
            running.append(start_sample(model, *next(loader)))
        yield training_step(model, optimizer, running)
        running = [scene for scene in running if scene.rounds]


def _same(item):
    return item


@torch.no_grad()
def start_sample(model: VideoMatch, image: torch.Tensor, truth: np.ndarray, prompts: Prompts,
          left: list[bool]) -> ActiveSample:
    image = image[None].to(model.device)
    seen = model.prompts.look(image, *model.encoder.pyramid(image))
    return ActiveSample(seen, truth, prompts, left)


def training_step(model: VideoMatch, optimizer, scenes: list[ActiveSample]) -> float:
    """One update by a round of each scene, which then has a click more; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for scene in scenes:
        logits = model.prompts(scene.seen, scene.prompts)
        loss = loss_of(logits, scene.truth) / len(scenes)
        loss.backward()
        total += loss.item()
        correct(scene, logits.detach())
    distributed.average_gradients(model.prompts.parameters())
    torch.nn.utils.clip_grad_norm_(model.prompts.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return total


def loss_of(logits: torch.Tensor, truth: np.ndarray) -> torch.Tensor:
    """Cross-entropy and dice of (h, w) logits, given the (H, W) bool mask."""
    target = torch.from_numpy(truth.astype(np.float32)).to(logits.device)[None, None]
    target = F.adaptive_avg_pool2d(target, logits.shape)[0, 0]
    found = logits.sigmoid()
    dice = 1 - (2 * (found * target).sum() + 1) / (found.sum() + target.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + dice


def correct(scene: ActiveSample, logits: torch.Tensor) -> None:
    """The person's next click; a scene without an error left is at its end."""
    found = F.interpolate(logits[None, None], size=scene.truth.shape, mode="bilinear",
                          align_corners=False)[0, 0].cpu().numpy() > 0
    found = looking.select_components(found, scene.prompts)
    keep, *left = scene.rounds
    more = simulated_user.add_click(scene.prompts, found, scene.truth, keep)
    scene.prompts, scene.rounds = (scene.prompts, []) if more is None else (more, left)


class PromptReport(Report):
    """As of every training, of the masks of boxes, of one and of three clicks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.run["trained"] = "prompts"

    def save_weights(self, iteration: int, **held_out) -> None:
        facts = {"iteration": iteration, **held_out}
        # what is known of the rest of the model holds as before
        self.model.save(self.options.save, **{**self.model.facts, "prompts": facts})

    def scores(self, held_out: list) -> list[float]:
        return [float(np.mean([row["box"], row["jittered"], *row["clicks"][0::2]]))
                for row in evaluate_prompts(self.model, held_out, count=3)]


def evaluate_prompts(model: VideoMatch, sources: list, count: int) -> list[dict]:
    """J of first frames of sequences and of stills; objects one by one.

    Returns:
        Of each object its name, and J: of the true "box", of one whose sides are moved by up to
        `JITTER` of its own ("jittered"), and a list, of one to `count` "clicks".
    """
    prompt, rows = looking.make_prompter(model.eval()), []
    for source in sources:
        first = source.labelled[0]
        image, mask = source.image(first), source.mask(first)
        for object_id in np.unique(mask[mask > 0]).tolist():
            truth = mask == object_id
            rng = np.random.default_rng(len(rows))
            box = simulated_user.bounding_box(truth)
            moved = simulated_user.jitter_box(box, JITTER, truth.shape, rng)
            rows.append({"name": f"{source.name}_{object_id}", **{
                name: metrics.jaccard(prompt(image, Prompts([shown])), truth)
                for name, shown in (("box", box), ("jittered", moved))}, "clicks": [
                metrics.jaccard(found, truth)
                for found in simulated_user.simulate_clicks(prompt, image, truth, count, rng)]})
    return rows


def split_static_images(stills: list[StaticImage], share: float, seed: int) -> tuple[list, list]:
    """Hold some out, at most as many as `CHECKED`: (training, held out)."""
    count = min(round(share * len(stills)), CHECKED)
    chosen = set(np.random.default_rng(seed).choice(len(stills), count, replace=False).tolist())
    return ([still for i, still in enumerate(stills) if i not in chosen],
            [still for i, still in enumerate(stills) if i in chosen])
