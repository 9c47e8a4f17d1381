"""Every `python` command and every example in README and docs is run, on small data."""

import importlib
import re
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, draw_frame, write_list, write_sequence
from PIL import Image
from torchvision import models

from benchmarks import browser as browser_bench
from benchmarks import runtimes, video
from datasets import demo, download
from lite_runtime import browser, export
from media import live as media_live
from tracking import prompting
from training import prompt_training as train_prompts
from videomatch import VideoMatch
from webapp import server as page

PAGES = [ROOT / "README.md", ROOT / "models/README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted({line.strip() for page in PAGES for line in re.findall(
    r"python (?:\w+\.py|-m benchmarks\.\w+)[^`\n]*", page.read_text().replace("\\\n", " "))})
EXAMPLES = [code for page in PAGES
            for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
QUICKLY = {"train": ["-i", "1", "-r", "-1", "-p", "32", "48", "--workers", "0"],
           "benchmarks.matching": ["-en", "mobilenet", "-p", "32", "48", "-uf", "1",
                                   "--repeats", "1"],
           "benchmarks.video": ["--rows", "64", "--frames", "1"],
           "benchmarks.live": ["--rows", "64", "--seconds", "0.1"]}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    model = VideoMatch.load(ROOT / "models/videomatch_mobilenet.pth").for_inference("fp32")
    folder = tmp_path_factory.mktemp("lite")
    export.export(model, folder)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch, exported):
    """The files that commands name: DAVIS, a clip with its mask, results, checkpoint, weights."""
    for set_name, names in (("train", ("ant", "bee")), ("val", ("blackswan",))):
        for name in names:
            write_sequence(tmp_path / "DAVIS", name, frames=4)
        write_list(tmp_path / "DAVIS", "2016", set_name, list(names))
    for results in ("results", "OLD", "NEW"):
        shutil.copytree(tmp_path / "DAVIS/Annotations/480p/blackswan",
                        tmp_path / results / "blackswan")
    clip = cv2.VideoWriter(str(tmp_path / "CLIP.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10,
                           (800, 480))
    for step in range(2):
        image, mask = (np.kron(part, np.ones((10, 10) + (1,) * (part.ndim - 2), np.uint8))
                       for part in draw_frame(step + 1))
        clip.write(image[..., ::-1])
        for name in ("IMG.jpg", "REFERENCE.jpg", "FRAME.jpg", f"{step:05d}.jpg", "00002.jpg"):
            Image.fromarray(image).save(tmp_path / name)
        for name in ("FIRST.png", "MASK.png", "00000.png"):
            if not step:
                Image.fromarray(mask).save(tmp_path / name)
    clip.release()
    for kind in ("images", "masks"):
        (tmp_path / "STILLS" / kind).mkdir(parents=True)
    for i, part in enumerate(draw_frame(0)):
        Image.fromarray(part).save(tmp_path / "STILLS" / ("images", "masks")[i] / "still.png")
    monkeypatch.setattr(train_prompts, "evaluate_prompts", lambda model, sources, count: [
        {"name": "object", "box": 0.5, "jittered": 0.5, "clicks": [0.5] * count}])
    (tmp_path / "models").mkdir()
    shown = VideoMatch.load(ROOT / "models/videomatch_mobilenet.pth")
    train_prompts.add_prompt_decoder(shown)
    shown.save(tmp_path / "models/my.pth")
    shutil.copytree(exported, tmp_path / "models/lite")
    name = Path(models.MobileNet_V2_Weights.IMAGENET1K_V1.url).name
    weights = tmp_path / "hub/checkpoints" / name
    weights.parent.mkdir(parents=True)
    torch.save(models.mobilenet_v2().state_dict(), weights)
    first = dict(list(demo.SCENES["val"].items())[:2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "SCENES", {"train": first, "val": first})
    monkeypatch.setattr(demo, "draw", partial(demo.draw, frames=3))
    monkeypatch.setattr(demo.make, "__defaults__", (tmp_path / "demo",))
    # the checkpoint in models/ may lack a prompt decoder
    monkeypatch.setattr(prompting, "predict_masks", lambda model, image, objects: (
        image[..., 0] > 150).astype(np.uint8))
    monkeypatch.setattr(video, "WARM_UP", 1)  # the clip has three frames
    # in place of cameras and streams elsewhere FFmpeg's test picture, for a second
    address = media_live._address
    monkeypatch.setattr(media_live, "_address", lambda source: address(source) if "127." in source
                        else ("testsrc=size=800x480:rate=25:duration=1", "lavfi", {}))
    monkeypatch.setattr(media_live, "RETURN", 0)
    monkeypatch.setattr(runtimes, "measure_runtime", lambda *_: {
        "seconds": 0.1, "first": 1.0, "peak_bytes": None, "precision": "float32"})
    monkeypatch.setattr(browser_bench, "measure", lambda _, __, rows, threads: {
        "rows": rows, "threads": threads, "load": 1.0, "prompt": 1.0, "seconds": 0.1})
    monkeypatch.setattr(browser, "RUNTIME", tmp_path / "dist")  # npm may be missing
    (tmp_path / "dist").mkdir()
    for names in browser.FLAVOURS.values():
        for name in names:
            (tmp_path / "dist" / name).touch()
    monkeypatch.setattr(page, "serve", lambda *_: None)
    monkeypatch.setattr(download, "download", lambda folder, year: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_run(command, folder, monkeypatch):
    arguments = shlex.split(re.sub(r"\[.*?\]", "", command))[1:]
    if arguments[0] == "-m":
        arguments = arguments[1:]
    script = arguments[0].removesuffix(".py")
    quickly = QUICKLY["train"] if "train" in arguments[:3] else QUICKLY.get(script, [])
    if script == "main" and "segment" not in arguments:
        quickly = [*quickly, "--overwrite"]  # the folder holds what other commands are to read
    monkeypatch.setattr(sys, "argv", [*arguments, *quickly])
    try:
        if arguments[0].endswith(".py"):
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        else:
            assert not importlib.import_module(arguments[0]).main()
    except SystemExit as end:
        assert not end.code
    for flag in ("-j", "-s", "--save", "--json"):
        if flag in arguments:
            path = folder / arguments[arguments.index(flag) + 1]
            assert path.is_file() or any(path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_documented_examples_run(example, folder):
    variables = {}
    exec(example, variables)
    assert variables["mask"].shape == (480, 800)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_resolve(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
