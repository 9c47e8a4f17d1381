"""Training reports: validate, log, save the best weights and the state to resume from."""

import json
import logging
import math
import time
from contextlib import ExitStack

import numpy as np
import torch

import metrics
import preprocess
from davis import Sequence
from masks.encoding import VOID
from media import figures, files
from network.checkpoint import save
from system import distributed, version
from tracking.tracker import Tracker
from training.options import Options
from training.static_images import StaticImage
from videomatch import VideoMatch

log = logging.getLogger(__name__)


@torch.no_grad()
def validate(model: VideoMatch, sequences: list[Sequence], shape: tuple[int, int]) -> list[float]:
    """Return J of every second labelled frame of the sequences, averaged over its objects.

    Frames are propagated in order at training size, each frame's mask at its full size. Outlier
    removal is off, because it hides mistakes of the network. Every second frame halves the time
    that validation takes.

    Args:
        shape: (H, W) of the frames that the network sees.
    """
    model.eval()
    scores = []
    for sequence in sequences:
        first, *others = sequence.labelled
        tracker, mask = Tracker(model, outlier_removal=False), sequence.mask(first)
        tracker.step(preprocess.to_tensor(sequence.image(first), shape), mask)
        for frame in others[1::2] or others:
            image = preprocess.to_tensor(sequence.image(frame), shape)
            truth = sequence.truth(frame)
            result = np.where(truth == VOID, 0, tracker.step(image, shape=mask.shape).mask)
            scores.append(float(np.mean([metrics.jaccard(result == i, truth == i)
                                         for i in tracker.object_ids])))
    return scores


class Report:
    """Validates, logs a JSON line, saves the best weights and the state, and draws the curves.

    In a distributed job every process validates its share of the sequences, and the first process
    writes the files. `start_or_resume` locks the files against other runs; leaving the context
    releases the lock.

    Args:
        optimizer, schedule: their state is saved with the model's.
        training, static_images: recorded, since a run resumes with the same data only.
        held_out: sequences to validate on; may be empty.
    """

    # options that may change when a run is resumed, because they do not affect the weights
    MAY_DIFFER = ("save", "workers", "plot", "overwrite", "resume")

    def __init__(self, model: VideoMatch, optimizer, schedule, training: list[Sequence],
                 held_out: list[Sequence], options: Options, static_images: list[StaticImage]):
        self.model, self.held_out, self.options = model, held_out, options
        self.parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        self.run = {name: repr(value) for name, value in vars(options).items()
                    if name not in self.MAY_DIFFER}
        self.run |= {"processes": str(distributed.count()), "model": repr(model.configuration()),
                     "training sequences": " ".join(s.name for s in training),
                     "held-out sequences": " ".join(s.name for s in held_out),
                     "still images": " ".join(s.name for s in static_images)}
        self.losses: list[float] = []  # one per iteration since the last report
        self.history: list[dict] = []  # the lines of the log
        self.best, self.reports_since_best = -1.0, 0  # below any IoU: the first report is saved
        self.start = time.monotonic()
        self.state = options.save.with_suffix(".state")
        self._lock = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lock.close()

    def start_or_resume(self) -> int:
        """Lock the files and return the iteration to continue from; a new run reports at 0.

        Raises:
            ValueError: another run writes to these files, or an earlier run left files that are to
                be neither resumed nor overwritten.
        """
        if distributed.rank() == 0:
            save = self.options.save
            self._lock.enter_context(files.lock_folder(save.parent, save.stem,
                                                "another file (--model_save)"))
        done = self.resume() if self.options.resume else None
        if done is None:
            if not self.options.overwrite:
                self.refuse_existing()
            done = 0
            self(done)
        return done

    def resume(self) -> int | None:
        """Restore the last report of an earlier run; returns its iteration, None without one.

        Raises:
            ValueError: the file is no training state, or belongs to a run with other options.
        """
        if not self.state.is_file():
            log.info("--resume: %s does not exist yet, starting a new training run", self.state)
            return None
        try:
            state = torch.load(self.state, map_location=self.model.device, weights_only=True)
            run = state["run"]
        except Exception as error:
            raise ValueError(f"{self.state}: not the state of a training run") from error
        for name, value in self.run.items():
            if run.get(name) != value:
                raise ValueError(f"--resume: {self.state} belongs to a run with another {name} "
                                 f"({run.get(name)}, now {value}): use the same flags, or start "
                                 "a new run without --resume")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"--resume: {self.state} is of another version, whose network "
                             "differs: start a new run without --resume") from error
        self.history, self.best = state["history"], state["best"]
        self.reports_since_best = state["stale"]
        self.start -= self.history[-1]["seconds"]
        log.info("resuming after iteration %d", self.history[-1]["iteration"])
        return self.history[-1]["iteration"]

    def save_weights(self, iteration: int, **held_out) -> None:
        """Save the current weights with the scores of this report."""
        # a tracker's training does not change the prompt decoder, whose metadata stay valid
        prompts = {name: x for name, x in self.model.metadata.items() if name == "prompts"}
        self.model.save(self.options.save, iteration=iteration, version=version.__version__,
                        **held_out, **prompts)

    def scores(self, held_out: list[Sequence]) -> list[float]:
        """Return the held-out scores; their mean decides which weights are best."""
        return validate(self.model, held_out, self.options.shape)

    def refuse_existing(self) -> None:
        """Raise a ValueError if an earlier run left weights or a state here."""
        left = [path for path in (self.options.save, self.state) if path.is_file()]
        if left and distributed.rank() == 0:
            raise ValueError(f"{left[0]}: an earlier training run left it: continue with --resume "
                             "(same flags), replace it with --overwrite, or name another file "
                             "with --model_save")

    def __call__(self, iteration: int) -> None:
        """Report after this iteration.

        Raises:
            ValueError: weights are NaN or infinite.
        """
        if not all(tensor.isfinite().all() for tensor in self.model.state_dict().values()):
            raise ValueError("the weights are not finite: try a lower --learning_rate (-l); the "
                             "best weights so far are saved")
        scores = sum(distributed.gather(self.scores(distributed.share(self.held_out))), [])
        # exact sums, so that the number of processes and the order of scores change no digit
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
        better = iou > self.best or not scores  # without held-out data the last weights win
        self.best = iou if better else self.best
        self.reports_since_best = 0 if better else self.reports_since_best + 1
        if distributed.rank():
            return
        files.write(self.options.save.with_suffix(".jsonl"),
                    "".join(json.dumps(line) + "\n" for line in self.history))
        if better:
            self.save_weights(iteration, **({"held_out_iou": iou} if scores else {}),
                              held_out=[s.name for s in self.held_out])
        save(self.state, {name: part.state_dict() for name, part in self.parts.items()} | {
            "run": self.run, "history": self.history, "best": self.best,
            "stale": self.reports_since_best})
        if self.options.plot and len(self.history) > 1:
            try:
                figures.curves(self.options.save.with_suffix(".png"), self.history)
            except Exception as error:  # a failed plot must not end hours of training
                log.warning("%s: curves not drawn (%s)",
                            self.options.save.with_suffix(".png"), error)
