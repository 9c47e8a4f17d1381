"""Train VideoMatch on frame pairs, or on clips of videos and of static images.

Whole sequences are held out for validation. `training.samples` draws the training samples,
`training.report` validates, logs and saves.
"""

import logging

import numpy as np
import torch

import preprocess
from davis import Sequence
from media.background import interruptible, progress
from network.losses import LOSSES, grouping
from network.sets import Sets
from network.state import Features, State
from network.views import labels_of, shares_of
from system import distributed
from training.options import MAX_GRADIENT_NORM, Options, one_cycle
from training.report import Report
from training.samples import MIN_PIXELS, TOO_SMALL, Clips, Pairs, batches, large_enough
from training.static_images import StaticImage
from videomatch import VideoMatch

log = logging.getLogger(__name__)

# Learning rates relative to the encoder's, which starts from ImageNet weights and must not lose
# what it learned there. The rest starts from random weights and has to move faster.
DECODER_RATE = 10
KEY_RATE = 3  # key projections: they start from the features' principal axes, which work already

# Weights of the auxiliary losses; that of the decoded mask has weight 1. Each gives a direct
# gradient to a part that the decoder could otherwise compensate for. Raising one makes that part
# better on its own at the expense of the decoded mask.
KEY_WEIGHT = 0.3  # soft matching of keys alone
FEATURE_WEIGHT = 0.15  # soft matching of encoder features, which `--method matching` uses
GROUPING_WEIGHT = 0.25  # union of objects, and their identities given the foreground

# Gradients flow through the last frames of a clip only; the frames before them run forward only,
# at a third of the cost, to let errors accumulate as they do in long videos.
GRADIENT_FRAMES = 4
COARSE = 4  # auxiliary losses are computed at 1/4 of the frame size, since their output is coarse
KEY_IMAGES = 16  # images from which the initial key projection is computed; one forward pass each


def train(model: VideoMatch, training: list[Sequence], held_out: list[Sequence],
          options: Options, static_images: list[StaticImage] | None = None) -> float:
    """Train the model and save the weights with the best IoU on the held-out sequences.

    Without held-out sequences the weights of the last iteration are saved. Ctrl+C finishes the
    current iteration, reports and returns. Every report also saves the training state (`.state`
    next to the weights), from which `options.resume` continues. No random state is saved, because
    every clip depends on the seed and its index alone.

    Args:
        model: trained in place; needs `method` "memory" for static images.
        training: sequences to train on; sequences whose objects are too small are skipped.
        held_out: sequences to validate on; may be empty.
        static_images: images from which clips are made by synthetic motion, in addition to the
            sequences or instead of them.

    Returns:
        The best held-out IoU in [0, 1]; NaN without held-out sequences.

    Raises:
        ValueError: all objects are too small; static images or a prompt decoder with a method other
            than "memory"; the state to resume from belongs to a run with other options; an earlier
            run at `options.save` is to be neither resumed nor overwritten; or loss or weights
            became NaN or infinite.
    """
    torch.manual_seed(options.seed)
    static_images = static_images or []
    if static_images and model.method != "memory":
        raise ValueError(f"--stills: static images become clips, which --method {model.method} "
                         "does not train on, expected --method memory")
    training = usable_sequences(training, model, options)
    if not training and not static_images:
        raise ValueError(f"nothing to train on: all objects are too small. {TOO_SMALL}")
    prepare(model, training or static_images, options.shape)
    optimizer, schedule = make_optimizer(model, options)
    report = Report(model, optimizer, schedule, training, held_out, options, static_images)
    if model.prompts is not None:
        report.run["trained"] = "all but the encoder"
    augment = preprocess.Augment(options.shape, options.augment)
    with report, interruptible() as interrupted:
        done = report.start_or_resume()
        total = options.iterations if report.reports_since_best < options.patience else done
        drawn = batches(Clips if model.method == "memory" else Pairs, training, static_images,
                        augment, options, range(done, total))
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
                last = any(distributed.gather(interrupted())) or last  # reports take a while
            if last or report.reports_since_best >= options.patience:
                break
    if interrupted():
        log.info("interrupted after iteration %d; continue with --resume", iteration)
    elif report.reports_since_best >= options.patience:
        log.info("stopped early: no better held-out IoU in %d reports", report.reports_since_best)
    if held_out:
        log.info("best held-out IoU %.4f", report.best)
    log.info("saved in %s", options.save)
    return report.best


def usable_sequences(sequences: list[Sequence], model: VideoMatch,
                     options: Options) -> list[Sequence]:
    """Return the sequences with an object that yields samples; a warning names the others.

    The area counts in the closest crop that augmentation makes. The memory method needs an object
    in two frames, the other methods train on pairs that may consist of one frame twice.
    """
    closest = preprocess.Augment.SCALE[0] if options.augment else 1.0
    return large_enough(sequences, MIN_PIXELS * closest, options.shape,
                        masks=2 if model.method == "memory" else 1)


def prepare(model: VideoMatch, sources: list, shape: tuple[int, int]) -> None:
    """Freeze, add and initialise parts of the model before its training.

    Args:
        sources: sequences or static images, for `initialise_keys`.
        shape: (H, W) of the training frames.
    """
    if model.prompts is not None:
        freeze_encoder(model)
    if model.refined and not model.is_loaded:  # a checkpoint is trained as it is
        initialise_keys(model, sources, shape)


def freeze_encoder(model: VideoMatch) -> None:
    """Freeze the encoder of a model with a prompt decoder, which depends on its features.

    Raises:
        ValueError: the method trains nothing but the encoder.
    """
    if model.method != "memory":
        raise ValueError(f"--method {model.method} trains the encoder only, on which the prompt "
                         "decoder depends: expected a checkpoint without a prompt decoder")
    log.info("the encoder stays frozen, because the prompt decoder was trained on its features")
    model.encoder.requires_grad_(False)


def initialise_keys(model: VideoMatch, sources: list, shape: tuple[int, int]) -> None:
    """Initialise the key projections of a new model from the features of `KEY_IMAGES` images.

    Args:
        sources: sequences or static images, of which evenly spaced ones are used.
        shape: (H, W) of the training frames.
    """
    chosen = sources[::max(1, len(sources) // KEY_IMAGES)]
    with torch.no_grad():
        images = (preprocess.to_tensor(source.image(0), shape, model.device) for source in chosen)
        features = [model.encoder(image[None])[0].flatten(1).T for image in images]
    model.reader.initialise_keys(torch.cat(features))


def make_optimizer(model: VideoMatch, options: Options):
    """Return AdamW with a learning rate for each part, and its `one_cycle` schedule."""
    parts = [(list(model.encoder.parameters()), 1)]
    if model.refined:
        keys = model.reader.matching_parameters()
        apart = {id(p) for p in keys}
        others = [p for part in (model.reader, model.decoder) for p in part.parameters()
                  if id(p) not in apart]
        parts += [(keys, KEY_RATE), (others, DECODER_RATE)]
    rates = [times * options.learning_rate for _, times in parts]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.requires_grad], "lr": rate}
         for (parameters, _), rate in zip(parts, rates)], weight_decay=options.weight_decay)
    return optimizer, one_cycle(optimizer, rates, options.iterations)


def step(model: VideoMatch, optimizer, batch, losses: tuple[str, ...]) -> float:
    """Update the model once; returns the loss before the update.

    Args:
        batch: (B, T, 3, H, W) images and (B, T, H, W) masks.
        losses: keys of `LOSSES`, added up.

    Raises:
        ValueError: the loss is NaN or infinite.
    """
    model.train()
    # one clip at a time: clips differ in their number of objects
    clips = [loss_of(model, images.to(model.device), masks.to(model.device).long(), losses)
             for images, masks in zip(*batch)]
    loss = sum(clips) / len(clips)
    if not loss.isfinite():
        raise ValueError("the loss is not finite: try a lower --learning_rate (-l); the best "
                         "weights so far are saved")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    distributed.average_gradients(model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.item()


def loss_of(model: VideoMatch, images: torch.Tensor, masks: torch.Tensor,
            losses: tuple[str, ...]) -> torch.Tensor:
    """Return the loss of a clip: its first frame is the reference, the others are predicted.

    All objects are tracked at once, with the model's own predictions as memory. Only the last
    `GRADIENT_FRAMES` frames contribute; the frames before them let errors accumulate.

    Args:
        images: (T, 3, H, W) float32, ImageNet-normalised.
        masks: (T, H, W) int64, 0 background, 1..N objects of the first frame.
        losses: keys of `LOSSES`, added up.
    """
    features, object_ids = model.encode(images), range(1, int(masks[0].max()) + 1)
    first, mask = features.frame(0), masks[0].cpu().numpy().astype(np.uint8)
    memory = sets = None
    if model.method == "memory":
        grid = tuple(first.local_key.shape[1:3])
        pixels = shares_of(mask, tuple(model.side * side for side in grid), object_ids)
        memory = model.start(None, first, model.array(pixels[None]),
                             model.array(labels_of(mask, grid, object_ids)[None]))
    if first.matched.requires_grad:
        sets = model.add_to_sets(None, first.matched[0], mask, object_ids)
    counted = max(1, len(images) - GRADIENT_FRAMES) if model.method == "memory" else 1
    with torch.no_grad():
        for t in range(1, counted):
            logits, _ = model.step(memory, features.frame(t))
            memory = _remembered(model, memory, features.frame(t), logits)
    total = torch.zeros(())
    for t in range(counted, len(images)):
        loss, memory = _loss_of_frame(model, features.frame(t), masks[t], memory, sets, losses)
        total = total + loss
    return total / (len(images) - counted)


def _remembered(model: VideoMatch, memory: State, frame: Features,
                logits: torch.Tensor) -> State:
    """Add a frame to the long-term memory: the frames of a clip are already some frames apart."""
    return model.remember(memory, frame, logits.softmax(0), long=True)


def _loss_of_frame(model: VideoMatch, frame: Features, mask: torch.Tensor, memory: State | None,
                   sets: Sets | None, losses: tuple[str, ...]
                   ) -> tuple[torch.Tensor, State | None]:
    """Return the loss of one frame, and the state with the frame, as predicted, in memory."""
    small = mask[COARSE // 2::COARSE, COARSE // 2::COARSE]
    outputs = []
    if sets is not None:
        weight = FEATURE_WEIGHT if model.method == "memory" else 1
        matched = model.match(frame, sets) / model.temperature
        outputs.append((model.to_probabilities(matched, mask.shape), mask, weight))
    if memory is not None:
        logits, scores = model.step(memory, frame)
        keys = model.to_probabilities(scores / model.temperature, small.shape)
        outputs += [(model.to_probabilities(logits, mask.shape, decoded=True), mask, 1),
                    (keys, small, KEY_WEIGHT)]
        memory = _remembered(model, memory, frame, logits)
    total = torch.zeros(())
    for probabilities, truth, weight in outputs:
        total = total + weight * (sum(LOSSES[name](probabilities, truth) for name in losses)
                                  + GROUPING_WEIGHT * grouping(probabilities, truth))
    return total, memory
