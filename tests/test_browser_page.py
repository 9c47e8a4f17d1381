"""The page of `-m export --browser` in Chromium, and its loop in Node, find PyTorch's masks."""

import io
import itertools
import re
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from conftest import ROOT, draw_frame, overlap, truth
from PIL import Image

import main
import preprocess
from benchmarks import browser as benchmark
from datasets import demo
from lite_runtime import browser, export
from masks.read import read_mask
from media import images
from media.prompts import Prompts
from network import outliers, prompt_maps, state, views
from tracking import prompting
from tracking.tracker import Tracker
from videomatch import SHIPPED, VideoMatch

# .ci/run installs all of these
NEEDED = [name for name in ("chromium", "chromedriver", "node") if not shutil.which(name)]
if not browser.RUNTIME.is_dir() or not (browser.PAGE / "node_modules/onnxruntime-node").is_dir():
    NEEDED.append("npm ci --ignore-scripts --prefix examples/browser")
ROWS = 240  # of the frames that the network sees


@pytest.fixture(scope="module")
def exact():
    """The shipped checkpoint in float32."""
    return VideoMatch.load(SHIPPED["mobilenet"]).for_inference("fp32")


@pytest.fixture(scope="module")
def tools():
    if NEEDED:
        pytest.skip(f"missing: {', '.join(NEEDED)}")


@pytest.fixture(scope="module")
def site(tools, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert main.main(["-m", "export", "--browser", str(folder)]) == 0
    return folder


@pytest.fixture
def page(site, tmp_path):
    """The page on one thread, as tests run on few cores."""
    with benchmark.serve(site) as address, \
            benchmark.Page(f"{address}?backend=wasm&threads=1", tmp_path) as page:
        page.wait("app.backend", "the network")
        page.driver.execute_script(f"document.getElementById('size').value = {ROWS}")
        yield page
        assert not [entry for entry in page.driver.get_log("browser")
                    if entry["level"] == "SEVERE"]


def masks_of(page) -> dict[int, np.ndarray]:
    """The page's masks by frame."""
    width, height = page.ask("[app.clip.width, app.clip.height]")
    runs = page.ask("[...app.masks].map(([i, mask]) => [i, [...mask.runs]])")
    return {i: np.repeat(run[::2], run[1::2]).reshape(height, width) for i, run in runs}


def pytorch_masks(model, frames, first: np.ndarray) -> list[np.ndarray]:
    """The masks of `main.py -m segment` at ROWS."""
    tracker, masks = Tracker(model), []
    for i, image in enumerate(frames):
        step = tracker.step(preprocess.to_tensor(images.scaled(image, ROWS)), None if i else first)
        masks.append(step.mask_at(image.shape[:2], tracker.threshold) if i else first)
    return masks


def assert_equal_from_a_box(page, model, frames):
    """The page's mask of a box is PyTorch's, and so are the masks tracked from there."""
    page.track()
    found, (box,) = masks_of(page), page.ask("app.edits.get('0 1').boxes")
    first = prompting.predict_masks(model, frames[0], [Prompts([tuple(box)])])
    assert overlap(found[0] == 1, first == 1) >= 0.98
    expected = pytorch_masks(model, frames, found[0])
    assert sorted(found) == list(range(len(frames)))
    overlaps = [overlap(found[i] == 1, mask == 1) for i, mask in enumerate(expected)]
    assert min(overlaps) >= 0.99, overlaps


@pytest.mark.slow
def test_masks_of_the_demo_are_those_of_pytorch(page, site, exact):
    page.open_demo()
    page.draw_box(*benchmark.BOX)
    frames = [images.read_image(path) for path in sorted((site / "demo").glob("*.webp"))]
    assert_equal_from_a_box(page, exact, frames)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blackswan", "libby"])
def test_masks_on_davis_are_those_of_pytorch(name, page, exact, davis_dir):
    paths = sorted((davis_dir / "JPEGImages/480p" / name).glob("*.jpg"))[:20]
    box = cv2.boundingRect((read_mask(davis_dir / "Annotations/480p" / name / "00000.png") > 0)
                           .astype(np.uint8))
    page.open_frames(paths)
    page.draw_box(*box)
    assert_equal_from_a_box(page, exact, [images.read_image(path) for path in paths])


@pytest.mark.slow
def test_a_clip_is_cut_out_corrected_and_saved(page, tmp_path):
    """A second object is added at frame 4."""
    frames, truths = zip(*(draw_frame(step, (1, 2)) for step in range(8)))
    truths = [mask.repeat(2, 0).repeat(2, 1) for mask in truths]
    paths = [tmp_path / f"{i:05d}.png" for i in range(8)]
    for path, image in zip(paths, frames):
        Image.fromarray(image.repeat(2, 0).repeat(2, 1)).save(path)
    page.open_frames(paths)
    assert page.find("#track").get_attribute("disabled") and not page.find("#zip").is_enabled()
    page.draw_box(14, 10, 44, 36)
    assert overlap(masks_of(page)[0] == 1, truths[0] == 1) > 0.8
    page.track()
    before = masks_of(page)
    assert all(overlap(before[i] == 1, truths[i] == 1) > 0.6 for i in range(8))

    page.driver.execute_script("const line = document.getElementById('timeline');"
                               "line.value = 4; line.oninput()")
    page.wait("app.view === 4")
    page.click("#add")
    page.draw_box(44, 48, 48, 40)
    page.draw((140, 20), alt=True)
    assert len(page.ask("app.edits.get('4 2').negativePoints")) == 1
    assert page.find("#track").text == "Track from frame 4"
    corrected = masks_of(page)[4]
    assert overlap(corrected == 2, truths[4] == 2) > 0.6
    page.track()
    after = masks_of(page)
    assert all((after[i] == before[i]).all() for i in range(4)), "earlier frames stay"
    np.testing.assert_array_equal(after[4], corrected)
    for i in range(5, 8):
        assert all(overlap(after[i] == k, truths[i] == k) > 0.6 for k in (1, 2)), i

    page.click("#zip")
    page.idle()
    page.click("#webm")
    page.idle()
    masks, cutout = tmp_path / "frames_masks.zip", tmp_path / "frames_cutout.webm"
    assert page.find("#status").text == f"Saved {cutout.name}"
    while not (masks.is_file() and cutout.is_file()):
        time.sleep(0.1)
    with zipfile.ZipFile(masks) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{i:05d}.png" for i in range(8)]
        for i, name in enumerate(archive.namelist()):
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert image.mode == "P" and image.getpalette()[3:6] == [128, 0, 0]
                np.testing.assert_array_equal(np.array(image), after[i])
    with av.open(str(cutout)) as container:
        assert container.streams.video[0].metadata["alpha_mode"] == "1"
        assert sum(1 for _ in container.decode(video=0)) == 8


@pytest.mark.slow
def test_prompts_are_taken_back(page, clip):
    page.open_frames(sorted(clip.glob("*.png"))[:2])
    page.draw_box(14, 10, 44, 36)
    first = masks_of(page)[0]
    page.draw((20, 14), alt=True)
    assert page.ask("app.edits.get('0 1').actions.length") == 2
    page.click("#undo")
    page.idle()
    np.testing.assert_array_equal(masks_of(page)[0], first)
    page.click("#undo")
    page.idle()
    assert not masks_of(page) and not page.find("#undo").is_enabled()


def visit(page, frame):
    page.driver.execute_script("const line = document.getElementById('timeline');"
                               "line.value = arguments[0]; line.oninput()", frame)


@pytest.mark.slow
def test_a_prompt_is_for_the_frame_and_object_that_it_was_drawn_for(page, clip):
    """The user may go on before the network is loaded, and before a slow frame is on screen."""
    page.open_frames(sorted(clip.glob("*.png"))[:6])
    page.click("#add")
    page.click("#objects button")
    page.driver.execute_script("app.loaded = new Promise(done => { globalThis.loaded = done; });")
    page.stroke((14, 10), (58, 46))
    page.wait("app.busy")
    button = page.find("#objects button:last-child")
    button.click()
    visit(page, 3)
    page.wait("app.shown === 3")
    page.driver.execute_script("loaded()")
    page.idle()
    (frame, mask), = masks_of(page).items()
    assert frame == 0 and set(np.unique(mask)) == {0, 1} and page.ask("app.view") == 3
    assert button.get_attribute("aria-pressed") == "true", "still the same button"

    page.driver.execute_script(
        "const {picture} = app.clip; asked = []; app.clip.picture = async i => "
        "{ asked.push(i); await new Promise(done => setTimeout(done, 3000)); return picture(i); }")
    for i in (1, 2, 4, 5):
        visit(page, i)
    page.stroke((20, 20))
    page.wait("app.user.size === 2")
    assert sorted(masks_of(page)) == [0, 3] and page.ask("app.view") == 3
    visit(page, 4)
    visit(page, 5)
    page.wait("app.shown === 5")
    assert 2 not in page.ask("asked"), "frames that were passed are left out"


@pytest.mark.slow
def test_frames_before_the_first_prompt_are_tracked_backward(page, clip, exact):
    paths = sorted(clip.glob("*.png"))[:6]
    frames = [images.read_image(path) for path in paths]
    page.open_frames(paths)
    visit(page, 3)
    page.wait("app.shown === 3")
    page.draw_box(*cv2.boundingRect((truth(3) == 1).astype(np.uint8)))
    page.track()
    found = masks_of(page)
    assert sorted(found) == list(range(6))
    for order in ((3, 4, 5), (3, 2, 1, 0)):
        expected = pytorch_masks(exact, [frames[i] for i in order], found[3])
        for i, mask in zip(order, expected):
            assert overlap(found[i] == 1, mask == 1) >= 0.99, i

    visit(page, 4)
    page.wait("app.shown === 4")
    page.draw((140, 20), alt=True)
    assert page.ask("[app.next, app.previous]") == [4, -1], "they depend on frame 3 only"
    page.click("#undo")
    page.idle()
    assert page.ask("[...app.user.keys()]") == [3] and page.ask("app.edits.size") == 1
    np.testing.assert_array_equal(masks_of(page)[4], found[4])
    page.driver.execute_script(  # as after an object was removed while frame 1 was tracked
        "app.previous = 1; app.backward = null; asked = []; const {picture} = app.clip;"
        "app.clip.picture = i => { asked.push(i); return picture.call(app.clip, i); }")
    page.track()
    assert page.ask("asked") == [3, 4, 5, 3, 2, 1, 0]
    np.testing.assert_array_equal(masks_of(page)[0], found[0])
    visit(page, 1)
    page.wait("app.shown === 1")
    page.draw((140, 20), alt=True)
    assert page.ask("[app.next, app.previous]") == [1, 0]
    page.track()
    assert sorted(masks_of(page)) == list(range(6))


@pytest.mark.slow
def test_an_object_is_removed(page, clip):
    """The masks of the others stay, and so does the clip's first user mask if it has others."""
    page.open_frames(sorted(clip.glob("*.png"))[:4])
    assert not page.find("#remove").is_enabled(), "one object has to stay"
    page.draw_box(*cv2.boundingRect((truth(0) == 1).astype(np.uint8)))
    page.click("#add")
    page.draw((140, 20))
    page.track()
    before = masks_of(page)
    assert set(np.unique(before[3])) == {0, 1, 2}
    page.click("#remove")
    page.driver.switch_to.alert.accept()
    page.idle()
    after = masks_of(page)
    for i in range(4):
        np.testing.assert_array_equal(after[i], np.where(before[i] == 2, 0, before[i]))
    assert page.ask("[app.object, app.objects, app.next]") == [1, [1], 4]
    assert page.ask("[...app.edits.keys()]") == ["0 1"]
    visit(page, 2)
    page.wait("app.shown === 2")
    page.draw((140, 20), alt=True)
    page.track()
    assert set(np.unique(masks_of(page)[3])) == {0, 1}


@pytest.mark.slow
def test_stop_may_be_clicked_twice(page):
    page.open_demo()
    page.draw_box(*benchmark.BOX)
    page.click("#track")
    page.wait("app.next > 1")
    page.driver.execute_script("const button = document.getElementById('track');"
                               "button.click(); button.click()")
    page.wait("!app.tasks")
    assert page.find("#status").text == "Stopped" and page.ask("app.next") < 24


@pytest.mark.slow
def test_a_prompt_that_is_taken_back_leaves_no_trace(page, clip):
    page.open_frames(sorted(clip.glob("*.png"))[:6])
    page.draw_box(14, 10, 44, 36)
    visit(page, 4)
    page.wait("app.shown === 4")
    page.draw((120, 80))
    page.click("#undo")
    page.idle()
    assert sorted(masks_of(page)) == [0] and page.ask("[...app.user.keys()]") == [0]
    assert not page.find("#problem").text and not page.find("#status").text
    page.track()
    assert page.ask("Object.keys(app.trackers.get(0).shares)") == [], "it has seen no mask yet"
    visit(page, 2)
    page.wait("app.shown === 2")
    page.draw((140, 20), alt=True)
    page.track()
    visit(page, 0)
    page.wait("app.shown === 0")
    page.click("#undo")
    page.idle()
    assert sorted(masks_of(page)) == [2, 3, 4, 5] and page.ask("app.next") == 2
    assert page.ask("[...app.trackers.keys()]") == [0], "later ones have seen the mask of frame 0"


@pytest.mark.slow
def test_two_fingers_draw_nothing(page, clip):
    page.open_frames(sorted(clip.glob("*.png"))[:1])
    send = page.driver.execute_cdp_cmd
    send("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})
    box = page.find("#view").rect
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for places in (((-20, 0),), ((-20, 0), (20, 0)), ((-60, 0), (60, 0)), ()):
        kind = "touchMove" if places and places[0][0] == -60 else (
            "touchStart" if places else "touchEnd")
        send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [
            {"x": x + u, "y": y + v, "id": i} for i, (u, v) in enumerate(places)]})
    page.idle()
    assert not page.ask("app.edits.size")


def refuse_video(page, path: Path, problem: str) -> None:
    """Open a file that is no video, and wait until the page says so."""
    page.find("#video").send_keys(str(path))
    end = time.monotonic() + 20
    while problem not in page.find("#problem").text:
        assert time.monotonic() < end
        time.sleep(0.1)
    page.driver.get_log("browser")  # has that error, too


@pytest.mark.slow
def test_a_clip_stays_if_another_one_cannot_be_opened(page, clip, tmp_path):
    page.open_frames(sorted(clip.glob("*.png"))[:2])
    assert page.ask("at('frames').files.length") == 0, "else they couldn't be opened again"
    with av.open(str(tmp_path / "sound.webm"), "w") as container:
        stream = container.add_stream("libopus", rate=48000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "flt", "mono")
        sound.sample_rate = 48000
        for part in (*stream.encode(sound), *stream.encode()):
            container.mux(part)
    refuse_video(page, tmp_path / "sound.webm", "has no picture")
    page.driver.execute_script("document.getElementById('problem').textContent = ''")
    page.draw_box(14, 10, 44, 36)
    assert overlap(masks_of(page)[0] == 1, truth(0) == 1) > 0.8


@pytest.mark.slow
def test_a_video_file_has_all_its_frames(page, clip, tmp_path):
    path = tmp_path / "my clip.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("vp9", rate=10, width=160, height=96, pix_fmt="yuv420p")
        for i in range(12):
            frame = av.VideoFrame.from_image(Image.open(clip / f"{i:05d}.png"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    page.find("#video").send_keys(str(path))
    page.wait("app.clip && app.frame")
    page.idle()
    assert page.ask("[app.clip.count, app.clip.fps]") == [12, 10]
    page.draw_box(14, 10, 44, 36)
    page.track()
    found = masks_of(page)
    assert all(overlap(found[i] == 1, truth(i) == 1) > 0.6 for i in range(12))
    refuse_video(page, clip / "00000.png", "can't read it")


@pytest.mark.slow
def test_a_plain_server_means_one_thread_and_nothing_leaves(site, tmp_path):
    with benchmark.serve(site, isolated=False) as address, \
            benchmark.Page(address, tmp_path) as page:
        page.wait("app.backend", "the network")
        text = page.find("#runtime").text
        assert text == "WebAssembly, 1 thread (page not cross-origin isolated)"
        elsewhere = address.replace("127.0.0.1", "localhost")
        assert page.driver.execute_async_script(
            "const [url, done] = arguments; fetch(url).then(() => done('sent'),"
            "error => done(String(error)))", elsewhere).startswith("TypeError")


@pytest.mark.slow
def test_threads_where_the_page_is_isolated(site, tmp_path):
    with benchmark.serve(site) as address, \
            benchmark.Page(f"{address}?backend=wasm&threads=2", tmp_path) as page:
        page.wait("app.backend", "the network")
        assert page.find("#runtime").text == "WebAssembly, 2 threads"


@pytest.mark.slow
def test_the_folder_is_small(site, capsys):
    """Without the runtime, whose files alone have 14 MB."""
    paths = [path for path in site.rglob("*") if path.is_file() and path.parent.name != "ort"]
    assert sum(path.stat().st_size for path in paths) < 12e6


@pytest.mark.slow
def test_a_missing_runtime_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(browser, "RUNTIME", tmp_path / "nowhere")
    assert main.main(["-m", "export", "--browser", str(tmp_path / "site")]) == 2
    assert "expected onnxruntime-web: npm ci" in capsys.readouterr().err


@pytest.mark.slow
def test_node_finds_the_same(exact, tools, tmp_path):
    """Two objects; the sixth frame is remembered for long."""
    frames, truths = zip(*itertools.islice(demo.draw(demo.SCENES["val"]["meeting"]), 8))
    (tmp_path / "frames").mkdir()
    for i, image in enumerate(frames):
        Image.fromarray(image).save(tmp_path / "frames" / f"{i:05d}.ppm")
    Image.fromarray(truths[0]).save(tmp_path / "first.pgm")
    export.export(exact, tmp_path / "export")
    command = ["node", ROOT / "examples/browser/track.mjs", tmp_path / "export",
               tmp_path / "frames", tmp_path / "first.pgm", tmp_path / "out", str(ROWS)]
    subprocess.run(command, check=True, capture_output=True)
    for i, mask in enumerate(pytorch_masks(exact, frames, truths[0])):
        found = np.array(Image.open(tmp_path / "out" / f"{i:05d}.pgm"))
        for object_id in (1, 2):
            assert overlap(found == object_id, mask == object_id) >= 0.99, (i, object_id)
    done = subprocess.run(command[:4], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: node track.mjs EXPORT" in done.stderr


def test_the_scripts_are_short_and_have_the_constants_of_python():
    lines = {name: (browser.PAGE / name).read_text().splitlines()
             for name in ("loop.js", "picture.js", "prompts.js", "track.mjs")}
    assert len(lines["loop.js"]) <= 150 and len(lines["track.mjs"]) < 100
    text = "\n".join(line for part in lines.values() for line in part)
    constants = dict(re.findall(r"\b([A-Z][A-Z_]+) = ([\d.e*-][\d.e* -]*|\[[\d., ]+\])[,;]", text))
    python = {name: getattr(module, name) for module in (
        state, outliers, views, prompt_maps, prompting, images)
        for name in constants if hasattr(module, name)}
    python |= {"THRESHOLD": 0.5, "MAPS": prompt_maps.BOX + prompt_maps.CLICKS + prompt_maps.MASK}
    assert {"MEM_EVERY", "CLOSER", "REACH_ALONE", "CROP_AREA", "NEAR", "ENLARGED"} <= set(constants)
    for name, value in constants.items():
        assert np.allclose(eval(value), python[name]), name
