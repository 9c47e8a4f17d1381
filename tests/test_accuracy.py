"""Accuracy of the shipped checkpoint: a change that makes masks worse fails here.

Most other tests check rules and arithmetic, which hold for random weights as well.
"""

import csv
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from datasets import demo
from media.prompts import Prompts
from metrics import jaccard
from tracking import prompting
from training.simulated_user import bounding_box

# For each object; the shipped checkpoint has 0.982 to 0.990. An object that is lost in one of the
# 22 scored frames costs 0.045.
DEMO_JF = 0.98
# Rounding on another processor changes a few pixels of a mask (docs/reliability.md), which is far
# less than this. A better network fails too: its numbers belong in the docs.
DOCS_TOLERANCE = 0.01
# Mean of the five objects; the shipped checkpoint has 0.962.
BOX_J = 0.94


def evaluate(*flags, cwd: Path) -> dict[str, float]:
    """Run `main.py -m eval` with its default checkpoint; returns J&F of each object by its name."""
    result = subprocess.run(
        [sys.executable, ROOT / "main.py", "-m", "eval", "-j", "results", *flags],
        cwd=cwd, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = (cwd / "results").glob("per-sequence_results-*.csv")
    with path.open(newline="") as file:
        return {row["Sequence"]: float(row["J&F-Mean"]) for row in csv.DictReader(file)}


@pytest.mark.slow
def test_the_demo_is_segmented_as_accurately_as_documented(tmp_path):
    scores = evaluate("--demo", cwd=tmp_path)
    assert scores.keys() == {"stroll", "meeting_1", "meeting_2", "hiding", "hills"}
    assert min(scores.values()) >= DEMO_JF, scores


@pytest.mark.slow
def test_two_davis_sequences_score_as_documented(davis_dir, tmp_path):
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    documented = {name: float(re.search(rf"^\| {name} \| ([\d.]+) \|", text, re.MULTILINE)[1])
                  for name in ("blackswan", "drift-straight")}
    scores = evaluate("-d", davis_dir.resolve(), "-t", "val", "-q", *documented, cwd=tmp_path)
    assert scores == pytest.approx(documented, abs=DOCS_TOLERANCE)


def test_box_prompts_on_the_demo_give_accurate_masks(shipped):
    """The prompts are the true bounding boxes in the first frames."""
    prompt, scores = partial(prompting.predict_mask, shipped), {}
    for name, scene in demo.SCENES["val"].items():
        image, mask = next(demo.draw(scene))
        for object_id in np.unique(mask[mask > 0]).tolist():
            truth = mask == object_id
            found = prompt(image, Prompts([bounding_box(truth)]))
            scores[f"{name}_{object_id}"] = jaccard(found, truth)
    assert len(scores) == 5
    assert np.mean(list(scores.values())) >= BOX_J, scores
