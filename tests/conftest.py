"""Fixtures: a small drawn data set in both DAVIS layouts, a small random model, real data."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from network.encoder import Encoder  # noqa: E402
from videomatch import VideoMatch  # noqa: E402

SHAPE = (48, 80)


def draw_frame(step: int, ids: tuple[int, ...] = (1,)) -> tuple[np.ndarray, np.ndarray]:
    """A (48, 80, 3) frame with bright squares on dark noise, moving right, and its mask."""
    rng = np.random.default_rng(step)
    image = rng.integers(0, 60, (*SHAPE, 3), dtype=np.uint8)
    mask = np.zeros(SHAPE, np.uint8)
    for row, object_id in enumerate(ids):
        box = slice(6 + 20 * row, 22 + 20 * row), slice(8 + 4 * step, 28 + 4 * step)
        image[box] = (230, 200 - 120 * row, 40 + 150 * row)
        mask[box] = object_id
    return image, mask


def write_sequence(root: Path, name: str, frames: int = 6, ids: tuple[int, ...] = (1,),
                   value: int | None = 255) -> None:
    """JPEGs and grey PNG masks; `value` replaces every id, None keeps the ids."""
    images, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i in range(frames):
        image, mask = draw_frame(i, ids)
        if value is not None:
            mask = np.where(mask > 0, value, 0).astype(np.uint8)
        Image.fromarray(image).save(images / f"{i:05d}.jpg", quality=95)
        Image.fromarray(mask).save(masks / f"{i:05d}.png")


def write_list(root: Path, folder: str, name: str, lines: list[str]) -> None:
    path = root / "ImageSets" / folder / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def kill_when(condition, arguments, program=(ROOT / "main.py",)):
    """Run main.py and kill it, by a signal that it can't catch, as soon as `condition` holds."""
    process = subprocess.Popen([sys.executable, *program, *arguments],
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        while not condition() and process.poll() is None:
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


STATE_OF_EACH_FRAME = """
import sys
sys.path.insert(0, sys.argv[1])
import main, segment
segment.KEPT_EVERY = 0
sys.exit(main.main(sys.argv[2:]))
"""


def content(folder):
    """Every file of a results folder, without what tells how long it took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            found[path.relative_to(folder)] = re.sub(
                rb'"seconds": [\d.]+|frames in [\d.]+ s: [\d.]+|<title>.*?</title>|<h1>.*?</h1>',
                b"", data)
    return found


@pytest.fixture
def davis_2016(tmp_path) -> Path:
    """The 2016 archive's layout: lists of files; train: ant, bee, cat, val: dog."""
    root = tmp_path / "davis 2016"
    for set_name, names in (("train", ("ant", "bee", "cat")), ("val", ("dog",))):
        for name in names:
            write_sequence(root, name)
        write_list(root, "480p", set_name, [
            f"/JPEGImages/480p/{name}/{i:05d}.jpg /Annotations/480p/{name}/{i:05d}.png "
            for name in names for i in range(6)])
    return root


@pytest.fixture
def davis_2017(tmp_path) -> Path:
    """The 2017 archive's layout: lists of names, masks of ids; train: ant, bee, val: dog."""
    root = tmp_path / "davis 2017"
    for name, ids in (("ant", (1,)), ("bee", (1, 2)), ("dog", (1, 2))):
        write_sequence(root, name, ids=ids, value=None)
    write_list(root, "2016", "train", ["ant"])
    write_list(root, "2016", "val", ["dog"])
    write_list(root, "2017", "train", ["ant", "bee"])
    write_list(root, "2017", "val", ["dog"])
    return root


@pytest.fixture
def model() -> VideoMatch:
    """MobileNetV2 with random weights, the same every time."""
    torch.manual_seed(0)
    return VideoMatch(Encoder("mobilenet"), 2.0, top_k=3).eval()


@pytest.fixture(scope="session")
def davis_dir() -> Path:
    """Real DAVIS-2016, where the environment names it."""
    path = os.environ.get("DAVIS_DIR")
    if not path:
        pytest.skip("DAVIS_DIR is not set")
    return Path(path)


@pytest.fixture
def one_thread():
    """As in the processes that are killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
