"""Fixtures: a small drawn data set in both DAVIS layouts, a small random model, real data."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from network.encoder import Encoder  # noqa: E402
from videomatch import SHIPPED, VideoMatch  # noqa: E402

# Shells start background jobs with Ctrl+C ignored, and children inherit that; some tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHAPE = (48, 80)
TOKEN = "a token"  # of the page


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
    """Write JPEG frames and grey PNG masks; `value` replaces every id, None keeps the ids."""
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


PAUSED = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import main, train
from media import images
write_mask, step, proceed = images.write_mask, train.step, pathlib.Path(sys.argv[2])
steps = []
def wait():
    proceed.with_name("paused").touch()
    while not proceed.exists():
        time.sleep(0.01)
def pausing_write(path, mask):
    if pathlib.Path(path).name == "00004.png":
        wait()
    write_mask(path, mask)
def pausing_step(*arguments, **more):
    steps.append(1)
    if len(steps) == 4:
        wait()
    return step(*arguments, **more)
images.write_mask, train.step = pausing_write, pausing_step
sys.exit(main.main(sys.argv[3:]))
"""


@contextmanager
def paused_run(folder: Path, arguments):
    """Run main.py in a process of its own, paused at mask 00004.png or at the fourth training step.

    It proceeds when the context is left, and has to end well.

    Args:
        folder: for the files by which the two processes tell each other.
    """
    process = subprocess.Popen([sys.executable, "-c", PAUSED, ROOT, folder / "proceed", *arguments],
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                               text=True)
    try:
        while not (folder / "paused").exists() and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        yield process
    finally:
        (folder / "proceed").touch()
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@contextmanager
def held(folder: Path, stem: str = ""):
    """Lock a folder from another process with `media.files.lock_folder`."""
    code = ("import pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
            "from media.files import lock_folder\n"
            "with lock_folder(pathlib.Path(sys.argv[2]), sys.argv[3]): print(flush=True); input()")
    process = subprocess.Popen([sys.executable, "-c", code, ROOT, folder, stem],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        yield process
    finally:
        process.communicate("\n")


STATE_OF_EACH_FRAME = """
import sys
sys.path.insert(0, sys.argv[1])
import main
from tracking import pipeline
pipeline.SAVE_INTERVAL = 0
sys.exit(main.main(sys.argv[2:]))
"""


def content(folder):
    """Contents of all files of a results folder, without run times."""
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
    """The real DAVIS-2016, if DAVIS_DIR is set."""
    path = os.environ.get("DAVIS_DIR")
    if not path:
        pytest.skip("DAVIS_DIR is not set")
    return Path(path)


@pytest.fixture
def one_thread():
    """One thread, as in the processes that are killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter):
    """Report how many tests ran in a real browser, which may be missing."""
    of = {outcome: sum("test_browser.py::" in report.nodeid for report in reports)
          for outcome, reports in terminalreporter.stats.items()
          if outcome in ("passed", "failed", "skipped")}
    if any(of.values()):
        terminalreporter.write_line("in a browser: " + ", ".join(
            f"{count} {outcome}" for outcome, count in of.items() if count))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A folder of 12 frames of 160x96: a bright square that moves right."""
    folder = tmp_path_factory.mktemp("my clip")
    for step in range(12):
        Image.fromarray(draw_frame(step)[0].repeat(2, 0).repeat(2, 1)).save(
            folder / f"{step:05d}.png")
    return folder


@pytest.fixture(scope="session")
def shipped() -> VideoMatch:
    """The small checkpoint in models/."""
    return VideoMatch.load(SHIPPED["mobilenet"]).for_inference()


def bright(image: np.ndarray, prompts) -> np.ndarray:
    """A stand-in for a prompter: the prompted ones of the bright objects."""
    _, parts = cv2.connectedComponents((image[..., 0] > 150).astype(np.uint8))
    meant = [parts[y + h // 2, x + w // 2] for x, y, w, h in prompts.boxes]
    meant += [parts[y, x] for x, y in prompts.points]
    wrong = [parts[y, x] for x, y in prompts.negative_points]
    return np.isin(parts, list({*meant} - {0, *wrong}))


@pytest.fixture
def begin(clip, shipped, tmp_path):
    """Start a session in the test's folder with each call."""
    from media.video import open_clip
    from tracking.pipeline import Options
    from webapp.session import Session
    begun = []

    def start(folder=tmp_path / "out", source=clip, data=None):
        begun.append(Session(
            shipped, open_clip(source), folder, Options(), bright,
            {"data": data or str(source)},
            ["python", "main.py", "-m", "segment", "--video", str(source)]))
        return begun[-1]

    yield start
    for one in begun:
        one.close()


@pytest.fixture
def client(begin):
    """An HTTP client of the session `client.session`."""
    from starlette.testclient import TestClient

    from webapp.server import application
    one = begin()
    client = TestClient(application(one, TOKEN), base_url="http://127.0.0.1:8000",
                        headers={"X-Token": TOKEN}, raise_server_exceptions=False)
    client.session = one
    return client


def truth(step: int, ids: tuple[int, ...] = (1,)) -> np.ndarray:
    """(96, 160) mask of a frame of `clip`."""
    return draw_frame(step, ids)[1].repeat(2, 0).repeat(2, 1)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """J of two masks, (H, W) bool."""
    return (a & b).sum() / max(1, (a | b).sum())


def do(client, action: str, **fields):
    return client.post(f"/do/{action}", json=fields)


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def shown(client, frame: int) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(client.get(f"/mask/{frame}").content)))
