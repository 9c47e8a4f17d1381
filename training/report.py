"""What is done from time to time in a training: validate, log, keep weights and state.

It doesn't know what a step is.
"""

import json
import logging
import math
import time
from contextlib import ExitStack

import numpy as np
import torch

import metrics
import preprocess
from checkpoint import save
from davis import Sequence
from masks.encoding import VOID
from media import figures, files
from system import distributed, version
from tracker import Tracker
from training.options import Options
from training.static_images import Still
from videomatch import VideoMatch

log = logging.getLogger(__name__)


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
            truth = sequence.truth(frame)
            result = np.where(truth == VOID, 0, tracker.step(image, shape=mask.shape).mask)
            scores.append(float(np.mean([metrics.jaccard(result == i, truth == i)
                                         for i in tracker.object_ids])))
    return scores


class Report:
    """Validate, log one JSON line, keep the best weights and the state, draw the curves.

    Of several processes each validates some sequences; the first one writes. `begin` locks the
    files against other runs, leaving the context releases them.
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
        self._held = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._held.close()

    def begin(self) -> int:
        """The iteration to go on from; at 0 with a first report.

        Raises:
            ValueError: another run writes to these files, or an earlier one did and is neither to
                be resumed nor overwritten.
        """
        if distributed.rank() == 0:
            save = self.options.save
            self._held.enter_context(files.hold(save.parent, save.stem,
                                                "another file (--model_save)"))
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
        of_prompts = {name: fact for name, fact in self.model.facts.items() if name == "prompts"}
        self.model.save(self.options.save, iteration=iteration, version=version.__version__,
                        **held_out, **of_prompts)

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
