"""Training on pairs of frames, or on clips of videos and of still images.

Whole sequences are held out. It knows neither flags nor how samples are drawn.
"""

import copy
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
import metrics
import preprocess
from checkpoint import save
from data.samples import Clips, Pairs, batches
from data.stills import Still
from davis import Sequence
from media import figures, files
from media.background import interruptible, progress
from network.losses import LOSSES
from tracker import Tracker
from videomatch import VideoMatch

log = logging.getLogger(__name__)

DECODER_RATE = 10  # times the learning rate of the encoder, which is trained already
KEY_RATE = 3  # likewise of what compares cells, which starts well
KEY_WEIGHT = 0.3  # of the loss of matching keys alone, beside that of the decoder
FEATURE_WEIGHT = 0.15  # of that of matching all features, as `--method matching` does
WARM_UP = 0.05  # share of the iterations in which the learning rate rises
GRADIENT = 5.0  # the largest norm of a gradient
START = 16  # images of which the first keys are made
FINETUNE_FRAMES = 2  # segmented after the reference frame, all made of that one


@dataclass
class Options:
    """What `train` needs to know beside model and data; the flags of `main.py`."""

    save: Path  # the best weights; beside it .jsonl, the log, and .png, the curves
    shape: tuple[int, int]  # (H, W) of the frames that the network sees
    iterations: int
    batch_size: int = 1
    losses: tuple[str, ...] = ("dice", "bce")  # keys of LOSSES, added up
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    augment: bool = True
    shuffle: bool = True
    report: int = 100  # iterations between validations; -1 validates at the end only
    patience: int = 10  # reports without a better IoU before training stops
    workers: int = 2
    seed: int = 0
    plot: bool = False
    overwrite: bool = False  # what an earlier run left at `save`
    resume: bool = False  # go on from the last report of an earlier run, if there was one


def train(model: VideoMatch, training: list[Sequence], held_out: list[Sequence],
          options: Options, stills: list[Still] | None = None) -> float:
    """Fit the model; keep the weights with the best IoU on the held-out sequences.

    Where none are held out, those of the last iteration.

    Ctrl+C ends training after the running iteration, as if it had been the last one. After every
    report all that it takes to go on is kept beside the weights (.state); nothing random is, as a
    clip depends on its index alone.

    Args:
        stills: still images to make clips of, beside sequences or instead of them.

    Returns:
        The best held-out IoU, in [0, 1]; NaN where no sequences are held out.

    Raises:
        ValueError: stills for another method than "memory"; `options.resume`, and the state is
            that of a run with other options; or there is an earlier run at `options.save` that is
            neither to be resumed nor overwritten; or
            the loss or the weights are no numbers any more.
    """
    torch.manual_seed(options.seed)
    stills = stills or []
    if stills and model.method != "memory":
        raise ValueError(f"--stills: clips are for --method memory, not for {model.method}")
    if model.refined and not model.facts:  # not loaded from anywhere
        start(model, training or stills, options.shape)
    optimizer, schedule = optimizer_of(model, options)
    report = Report(model, optimizer, schedule, training, held_out, options, stills)
    done = report.begin()
    total = options.iterations if report.stale < options.patience else done
    augment = preprocess.Augment(options.shape, options.augment)
    drawn = batches(Clips if model.method == "memory" else Pairs, training, stills, augment,
                    options, range(done, total))
    with interruptible() as interrupted:
        bar = progress(drawn, desc="training", disable=distributed.rank() > 0, initial=done,
                       total=total)
        for iteration, batch in enumerate(bar, start=done + 1):
            loss = step(model, optimizer, batch, options.losses)
            schedule.step()
            report.losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", iou=f"{report.best:.3f}")
            last = any(distributed.gather(interrupted())) or iteration == options.iterations
            if last or (options.report > 0 and iteration % options.report == 0):
                report(iteration)
            if last or report.stale >= options.patience:
                break
    if interrupted():
        log.info("interrupted after iteration %d, --resume goes on from there", iteration)
    elif report.stale >= options.patience:
        log.info("stopped early: no better IoU in %d reports", report.stale)
    if held_out:
        log.info("best held-out IoU %.4f", report.best)
    log.info("saved in %s", options.save)
    return report.best


def start(model: VideoMatch, sources: list, shape: tuple[int, int]) -> None:
    """Give a new reader keys that keep what features of some images differ in."""
    chosen = sources[::max(1, len(sources) // START)]
    with torch.no_grad():
        images = (preprocess.to_tensor(source.image(0), shape, model.device) for source in chosen)
        features = [model.encoder(image[None])[0].flatten(1).T for image in images]
    model.reader.start(torch.cat(features))


def optimizer_of(model: VideoMatch, options: Options):
    """AdamW, and the schedule of its learning rates: a short rise, then a cosine down to 0.

    Its first momentum goes the other way, from 0.95 to 0.85 and back (Smith and Topin:
    Super-convergence, 2017), as PyTorch has it.
    """
    parts = [(list(model.encoder.parameters()), 1)]
    if model.refined:
        keys = model.reader.comparing()
        others = [p for part in (model.reader, model.decoder) for p in part.parameters()
                  if all(p is not key for key in keys)]
        parts += [(keys, KEY_RATE), (others, DECODER_RATE)]
    groups = [{"params": [p for p in parameters if p.requires_grad],
               "lr": times * options.learning_rate} for parameters, times in parts]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    steps = options.iterations + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps,
        pct_start=max(WARM_UP, 1.5 / steps))  # PyTorch divides by zero where one step is all
    return optimizer, schedule


def step(model: VideoMatch, optimizer, batch, losses: tuple[str, ...],
         shared: bool = True) -> float:
    """One update on (B, T, 3, H, W) images and (B, T, H, W) masks; returns the loss before it.

    Args:
        shared: the processes of a job take the same step, each on its own batch.
    """
    model.train()
    clips = [loss_of(model, images.to(model.device), masks.to(model.device).long(), losses)
             for images, masks in zip(*batch)]
    loss = sum(clips) / len(clips)
    if not loss.isfinite():
        raise ValueError("the loss is no number any more: a lower --learning_rate (-l) helps; "
                         "the best weights so far are kept")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if shared:
        distributed.average_gradients(model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT)
    optimizer.step()
    return loss.item()


def loss_of(model: VideoMatch, images: torch.Tensor, masks: torch.Tensor,
            losses: tuple[str, ...]) -> torch.Tensor:
    """The loss of a clip, (T, 3, H, W) and (T, H, W) ids 0 to N.

    The first frame is the reference. Each of the others is segmented with what the model itself
    found in those before, all objects at once.
    """
    frames, memories = model.encode(images), [model.memory(list(range(1, int(masks[0].max()) + 1)))]
    model.refer(images[:1], masks[:1], memories, frames[:1])
    size, total = masks.shape[1:], 0
    for t in range(1, len(images)):
        frame = frames[t:t + 1]
        outputs = [(model.match(frame, memories) / model.temperature, FEATURE_WEIGHT)]
        if model.method == "memory":
            logits, scores = model.refine(frame, memories)
            outputs = [(logits, 1), (scores / model.temperature, KEY_WEIGHT), *outputs]
            model.remember(frame, memories, logits.softmax(1))
        else:
            outputs = [(outputs[0][0], 1)]
        for output, weight in outputs:
            found = model.enlarged(output, size)[0]
            total = total + weight * sum(LOSSES[name](found, masks[t]) for name in losses)
    return total / (len(images) - 1)


def finetune(model: VideoMatch, image: np.ndarray, mask: np.ndarray,
             options: Options) -> VideoMatch:
    """A copy of the model, fitted to the reference frame of a video by augmenting it.

    Args:
        image, mask: (H, W, 3) uint8 RGB and (H, W) uint8 object ids.
        options: `iterations`, `shape`, `losses`, `learning_rate`, `weight_decay` and `seed` count.
    """
    precision, model = model.precision, copy.deepcopy(model)
    model.precision = torch.float32
    augment = preprocess.Augment(options.shape)
    optimizer, schedule = optimizer_of(model, options)
    rng = np.random.default_rng(options.seed)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        for _ in range(options.iterations):
            wanted = (mask == rng.choice(np.unique(mask[mask > 0]))).astype(np.uint8)
            clip = [augment(image, wanted), *augment.clip([(image, wanted)] * FINETUNE_FRAMES)]
            batch = [torch.stack(parts)[None] for parts in zip(*clip)]
            step(model, optimizer, batch, options.losses, shared=False)
            schedule.step()
    model.precision = precision
    return model.eval()


@torch.no_grad()
def validate(model: VideoMatch, sequences: list[Sequence], shape: tuple[int, int]) -> list[float]:
    """J of every second frame, each segmented after those before, without outlier removal."""
    model.eval()
    scores = []
    for sequence in sequences:
        first, *others = sequence.labelled
        tracker, mask = Tracker(model, outlier_removal=False), sequence.mask(first)
        tracker.step(preprocess.to_tensor(sequence.image(first), shape), mask)
        for frame in others[1::2] or others:
            image = preprocess.to_tensor(sequence.image(frame), shape)
            result = tracker.step(image, shape=mask.shape).mask
            truth = sequence.mask(frame)
            scores.append(float(np.mean([metrics.jaccard(result == i, truth == i)
                                         for i in tracker.object_ids])))
    return scores


class Report:
    """Validate, log one JSON line, keep the best weights and the state, draw the curves.

    Of several processes each validates some sequences; the first one writes.
    """

    # what may differ between a run and its continuation
    FREE = ("save", "workers", "plot", "overwrite", "resume")

    def __init__(self, model: VideoMatch, optimizer, schedule, training: list[Sequence],
                 held_out: list[Sequence], options: Options, stills: list[Still]):
        self.model, self.held_out, self.options = model, held_out, options
        self.parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        self.run = {name: repr(value) for name, value in vars(options).items()
                    if name not in self.FREE}
        self.run |= {"processes": str(distributed.count()), "model": repr(model.configuration()),
                     "training sequences": " ".join(s.name for s in training),
                     "held-out sequences": " ".join(s.name for s in held_out),
                     "still images": " ".join(s.name for s in stills)}
        self.losses: list[float] = []  # since the last report
        self.history: list[dict] = []
        self.best, self.stale = -1.0, 0
        self.start = time.monotonic()
        self.state = options.save.with_suffix(".state")

    def begin(self) -> int:
        """The iteration to go on from; at 0 with a first report."""
        done = self.resume() if self.options.resume else None
        if done is None:
            if not self.options.overwrite:
                self.check_free()
            done = 0
            self(done)
        return done

    def resume(self) -> int | None:
        """Go back to the last report of an earlier run: its iteration; None if there is none."""
        if not self.state.is_file():
            log.info("--resume: no %s yet, so training starts anew", self.state)
            return None
        try:
            state = torch.load(self.state, map_location=self.model.device, weights_only=True)
            run = state["run"]
        except Exception as error:
            raise ValueError(f"{self.state}: not the state of a training run") from error
        for name, value in self.run.items():
            if run.get(name) != value:
                raise ValueError(f"--resume: {self.state} is of a run with another {name} "
                                 f"({run.get(name)}, now {value}): give it the same flags, or "
                                 "start anew without --resume")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.history, self.best, self.stale = state["history"], state["best"], state["stale"]
        self.start -= self.history[-1]["seconds"]
        log.info("going on after iteration %d", self.history[-1]["iteration"])
        return self.history[-1]["iteration"]

    def keep(self, iteration: int, **held_out) -> None:
        """Write the weights, which are the best so far."""
        self.model.save(self.options.save, iteration=iteration, **held_out)

    def scores(self, held_out: list[Sequence]) -> list[float]:
        """What decides which weights are best, by its mean."""
        return validate(self.model, held_out, self.options.shape)

    def check_free(self) -> None:
        """Refuse to write over what an earlier run left."""
        left = [path for path in (self.options.save, self.state) if path.is_file()]
        if left and distributed.rank() == 0:
            raise ValueError(f"{left[0]}: holds an earlier training: --resume goes on with it if "
                             "the flags are the same, --overwrite starts over, or name another "
                             "file with --model_save")

    def __call__(self, iteration: int) -> None:
        if not all(tensor.isfinite().all() for tensor in self.model.state_dict().values()):
            raise ValueError("the weights are no numbers any more: a lower --learning_rate (-l) "
                             "helps; the best weights so far are kept")
        scores = sum(distributed.gather(self.scores(distributed.share(self.held_out))), [])
        # exact, in whatever order they come
        iou = math.fsum(scores) / len(scores) if scores else math.nan
        losses = sum(distributed.gather(self.losses), [])
        loss = math.fsum(losses) / len(losses) if losses else None
        self.losses = []
        line = {"iteration": iteration, "loss": loss, "held_out_iou": iou if scores else None,
                "seconds": round(time.monotonic() - self.start, 1)}
        self.history.append(line)
        log.info("iteration %d: loss %s, held-out IoU %s", iteration,
                 *("-" if value is None else f"{value:.4f}"
                   for value in (loss, line["held_out_iou"])))
        better = iou > self.best or not scores
        self.best, self.stale = (iou, 0) if better else (self.best, self.stale + 1)
        if distributed.rank():
            return
        files.write(self.options.save.with_suffix(".jsonl"),
                    "".join(json.dumps(line) + "\n" for line in self.history))
        if better:
            self.keep(iteration, **({"held_out_iou": iou} if scores else {}),
                      held_out=[s.name for s in self.held_out])
        save(self.state, {name: part.state_dict() for name, part in self.parts.items()} | {
            "run": self.run, "history": self.history, "best": self.best, "stale": self.stale})
        if self.options.plot and len(self.history) > 1:
            try:
                figures.curves(self.options.save.with_suffix(".png"), self.history)
            except Exception as error:  # whatever a plot lacks, it is no reason to end a training
                log.warning("%s: no curves this time (%s)",
                            self.options.save.with_suffix(".png"), error)
