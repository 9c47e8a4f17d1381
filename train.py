"""Training on pairs of frames, or on clips of videos and of still images.

Whole sequences are held out. It knows neither flags nor how samples are drawn.
"""

import logging

import torch

import distributed
import preprocess
from data.samples import FEWEST, TOO_SMALL, Clips, Pairs, batches, large_enough
from data.stills import Still
from davis import Sequence
from media.background import interruptible, progress
from network.losses import LOSSES
from training.options import GRADIENT, Options, one_cycle
from training.report import Report
from videomatch import VideoMatch

log = logging.getLogger(__name__)

DECODER_RATE = 10  # times the learning rate of the encoder, which is trained already
KEY_RATE = 3  # likewise of what compares cells, which starts well
KEY_WEIGHT = 0.3  # of the loss of matching keys alone, beside that of the decoder
FEATURE_WEIGHT = 0.15  # of that of matching all features, as `--method matching` does
START = 16  # images of which the first keys are made


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
        ValueError: all objects are too small; stills, or a model with a part for prompts, for
            another method than "memory"; `options.resume`, and the state is that of a run with
            other options; an earlier run at `options.save` that is neither to be resumed nor
            overwritten; or the loss or the weights are no numbers any more.
    """
    torch.manual_seed(options.seed)
    stills = stills or []
    if stills and model.method != "memory":
        raise ValueError(f"--stills: clips are for --method memory, not for {model.method}")
    training = usable(training, model, options)
    if not training and not stills:
        raise ValueError(f"nothing to train on: all objects are too small. {TOO_SMALL}")
    if model.prompts is not None:
        keep_encoder(model)
    if model.refined and not model.facts:  # not loaded from anywhere
        start(model, training or stills, options.shape)
    optimizer, schedule = optimizer_of(model, options)
    report = Report(model, optimizer, schedule, training, held_out, options, stills)
    if model.prompts is not None:
        report.run["trained"] = "all but the encoder"
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


def usable(sequences: list[Sequence], model: VideoMatch, options: Options) -> list[Sequence]:
    """Those with an object that is large enough in the closest crop; a warning names the others."""
    closest = preprocess.Augment.SCALE[0] if options.augment else 1.0
    return large_enough(sequences, FEWEST * closest, options.shape,
                        masks=2 if model.method == "memory" else 1)


def keep_encoder(model: VideoMatch) -> None:
    """Train nothing of the encoder, on which the part for boxes and clicks was trained."""
    if model.method != "memory":
        raise ValueError(f"--method {model.method}: trains the encoder alone, which boxes and "
                         "clicks need as it is: expected a checkpoint without their part")
    log.info("the encoder stays as it is, since the part for boxes and clicks was trained on it")
    model.encoder.requires_grad_(False)


def start(model: VideoMatch, sources: list, shape: tuple[int, int]) -> None:
    """Give a new reader keys that keep what features of some images differ in."""
    chosen = sources[::max(1, len(sources) // START)]
    with torch.no_grad():
        images = (preprocess.to_tensor(source.image(0), shape, model.device) for source in chosen)
        features = [model.encoder(image[None])[0].flatten(1).T for image in images]
    model.reader.start(torch.cat(features))


def optimizer_of(model: VideoMatch, options: Options):
    """AdamW, each part with a learning rate of its own, and their schedule, `one_cycle`."""
    parts = [(list(model.encoder.parameters()), 1)]
    if model.refined:
        keys = model.reader.comparing()
        others = [p for part in (model.reader, model.decoder) for p in part.parameters()
                  if all(p is not key for key in keys)]
        parts += [(keys, KEY_RATE), (others, DECODER_RATE)]
    rates = [times * options.learning_rate for _, times in parts]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.requires_grad], "lr": rate}
         for (parameters, _), rate in zip(parts, rates)], weight_decay=options.weight_decay)
    return optimizer, one_cycle(optimizer, rates, options.iterations)


def step(model: VideoMatch, optimizer, batch, losses: tuple[str, ...]) -> float:
    """One update on (B, T, 3, H, W) images and (B, T, H, W) masks; returns the loss before it.

    The processes of a job take the same step, each on its own batch.
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
        outputs = []
        if frame.features.requires_grad:
            weight = FEATURE_WEIGHT if model.method == "memory" else 1
            outputs.append((model.match(frame, memories) / model.temperature, weight))
        if model.method == "memory":
            logits, scores = model.refine(frame, memories)
            outputs += [(logits, 1), (scores / model.temperature, KEY_WEIGHT)]
            model.remember(frame, memories, logits.softmax(1))
        for output, weight in outputs:
            found = model.enlarged(output, size)[0]
            total = total + weight * sum(LOSSES[name](found, masks[t]) for name in losses)
    return total / (len(images) - 1)
