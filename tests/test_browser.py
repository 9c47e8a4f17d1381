"""The annotation page in a real browser, on a clip with known ground truth."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import ROOT, overlap, truth
from PIL import Image

from benchmarks.browser import stroke
from masks.read import read_mask

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--force-device-scale-factor=1"]
PATIENCE = 60  # seconds

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (CHROMIUM and DRIVER),
                                                   reason="no chromium and chromium-driver")]


class Server:
    """`python main.py -m segment --page` in a process of its own."""

    def __init__(self, clip, folder, *flags, port=0, browser="true"):
        self.folder, self.clip, self.flags, self.port = folder, clip, flags, str(port)
        self.browser = browser  # the command that is started to open the page
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "main.py", "-m", "segment", "--video", self.clip, "--page",
             self.port, *self.flags, "-j", self.folder], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=self.folder.parent,
            env=os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1",
                              "BROWSER": self.browser})
        self.address = self.process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S{32}", self.address)

    def end(self, how=signal.SIGINT):
        """Stop the server and return its stderr."""
        self.process.send_signal(how)
        return self.process.communicate(timeout=PATIENCE)[1]

    def masks(self, kind="found"):
        return {int(path.stem): read_mask(path)
                for path in sorted((self.folder / "page" / kind).glob("*.png"))}


class Tab:
    """A browser with the page open, and methods that operate it."""

    def __init__(self, address, profile, *flags):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}", "--window-size=1280,800"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.open(address)

    def open(self, address):
        self.driver.get(address)
        self.wait("clip.count > 0 && at('stage').dataset.shown")

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def click(self, css):
        self.find(css).click()

    def ask(self, script):
        return self.driver.execute_script(f"return {script}")

    def wait(self, script, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while not self.ask(script):
            assert time.monotonic() < end, f"timed out waiting for {script}; {self.log()}"
            time.sleep(0.05)

    def log(self):
        """Errors logged by the browser."""
        return [entry["message"] for entry in self.driver.get_log("browser")
                if entry["level"] == "SEVERE"]

    # an object is added first, which is a change too, but not yet the answer
    def draw(self, *points, alt=False,
             answered="(frames.get(view.frame)?.version ?? 0) > before"):
        """Press at the first pixel of the frame, move through the others, release."""
        before, hand = self.ask("clip.version"), self.find("#hand")
        width, height = self.ask("clip.width"), self.ask("clip.height")
        places = [(round((x + 0.5 - width / 2) * hand.rect["width"] / width),
                   round((y + 0.5 - height / 2) * hand.rect["height"] / height))
                  for x, y in points]
        stroke(self.driver, hand, places, alt)
        self.wait(answered.replace("before", str(before)))
        self.wait("!hand.down && !at('sheet').classList.contains('waiting')")

    def go(self, frame):
        self.ask(f"go({frame})")
        self.drawn()

    def drawn(self):
        """Wait until the newest mask of the frame is drawn."""
        self.wait("at('stage').dataset.shown === "
                  "`${view.frame} ${frames.get(view.frame)?.version ?? 0}`")

    def seen(self):
        """(H, W) bool where a mask is drawn over the frame."""
        self.drawn()
        width, height = self.ask("clip.width"), self.ask("clip.height")
        alpha = self.ask("Array.from(at('masks').getContext('2d').getImageData(0, 0, "
                         "clip.width, clip.height).data.filter((_, i) => i % 4 === 3))")
        return np.array(alpha).reshape(height, width) > 0

    def run(self, css):
        """Click a button that starts a run, and wait for its end."""
        before = self.ask("clip.run?.number ?? 0")
        self.click(css)
        self.wait(f"clip.run?.number > {before} && !busy()")

    def segment(self, direction="both"):
        self.run(f"[data-direction={direction}]")

    def close(self):
        self.driver.quit()


@pytest.fixture
def server(clip, tmp_path):
    one = Server(clip, tmp_path / "out")
    yield one
    if one.process.poll() is None:
        one.end(signal.SIGKILL)


@pytest.fixture
def tab(server, tmp_path):
    """Open the page in a browser with its own profile."""
    tabs = []

    def start(address=None, *flags):
        tabs.append(Tab(address or server.address, tmp_path / f"profile {len(tabs)}", *flags))
        return tabs[-1]

    yield start
    for one in tabs:
        one.close()


def test_a_box_is_segmented_corrected_and_exported_as_a_cutout(server, tab):
    page = tab()
    page.draw((8, 6), (40, 30), (66, 52))
    assert overlap(page.seen(), truth(0) > 0) > 0.8, "a box is answered by a mask at once"
    page.segment()
    found = server.masks()
    assert set(found) == set(range(1, 12))
    assert all(overlap(mask > 0, truth(i) > 0) > 0.6 for i, mask in found.items())

    page.go(6)
    assert (page.seen() == (found[6] > 0)).all(), "what is seen is what lies on disk"
    page.click("[data-tool=brush]")
    page.draw((20, 80), (60, 80))
    page.click("[data-tool=point]")
    corrected = server.masks("given")[6] > 0
    assert corrected[80, 40]
    page.draw((40, 80), alt=True)
    corrected = server.masks("given")[6] > 0
    assert not corrected[80, 40] and overlap(corrected, truth(6) > 0) > 0.6, "a click corrects"
    assert "Segment again from frame 6" in page.find("#from").text
    page.segment()
    again = server.masks()
    assert any((again[i] != found[i]).any() for i in (4, 5, 7, 8))
    assert all((again[i] == found[i]).all() for i in (1, 2)), "nearer to the first given mask"

    page.ask("at('cutout').value = 'transparent'")
    page.run("#export")
    page.wait("at('exported').textContent.includes('python main.py')")
    for i in range(12):
        mask = read_mask(server.folder / "masks" / f"{i:05d}.png")
        cut = np.array(Image.open(server.folder / "cutout" / f"{i:05d}.png"))
        assert overlap(mask > 0, truth(i) > 0) > 0.6
        np.testing.assert_array_equal(cut[..., 3] >= 128, mask > 0)
    assert f"6:{server.folder / 'mask_00006.png'}" in page.find("#exported code").text
    assert (server.folder / "overlay.mp4").stat().st_size > 1000
    assert not page.log()


def test_an_object_that_left_can_be_marked_as_gone(server, tab):
    page = tab()
    page.draw((16, 12), (56, 44))
    page.segment("forward")
    pressed = "at('{}').getAttribute('aria-pressed') === 'true'"
    page.go(7)
    assert page.seen().any() and not page.ask(pressed.format("gone"))
    page.go(5)
    page.click("#gone")
    page.wait(pressed.format("gone"))
    for frame, visible in ((4, True), (5, False), (9, False)):
        page.go(frame)
        page.wait(f"clip.objects[0].gone.length && frames.get({frame}).version")
        assert page.seen().any() == visible
    assert page.find("#gone").text == "Gone since frame 5"
    page.click("#gone")
    page.wait(f"!({pressed.format('gone')})")
    page.go(8)
    page.go(9)
    assert page.seen().any()
    page.click("#absent")
    page.wait(pressed.format("absent"))
    page.go(8)
    assert page.seen().any()
    page.go(9)
    assert not page.seen().any()
    page.click("#undo")
    page.wait(f"!({pressed.format('absent')})")
    page.go(8)
    page.go(9)
    assert page.seen().any() and not page.log()


def test_reload_second_tab_and_undo_show_the_same_session(server, tab):
    page, other = tab(), tab()
    page.draw((8, 6), (66, 52))
    other.wait("frames.has(0) && clip.objects.length === 1")
    assert (other.seen() == page.seen()).all()
    other.draw((60, 60), (61, 61), answered="!at('trouble').hidden")
    assert "the box is too small" in other.find("#trouble").text
    page.click("[data-direction=forward]")
    page.wait("frames.size > 2")
    page.driver.refresh()
    page.wait("clip.count > 0 && frames.size > 2")
    page.wait("!busy()")
    other.wait("!busy() && frames.size === 12")
    assert len(server.masks()) == 11
    page.click("#undo")
    page.wait("!frames.get(0)")
    other.wait("!frames.get(0) && view.frame === 0")
    assert not other.seen().any()


def test_a_kill_loses_nothing(server, tab):
    page = tab()
    page.draw((8, 6), (66, 52))
    page.click("[data-direction=both]")
    page.wait("[...frames.values()].filter(entry => entry.confidence).length > 3")
    server.end(signal.SIGKILL)
    page.wait("at('status').textContent.includes('Is main.py still running')")
    given, found = server.masks("given"), server.masks()
    server.start()
    page.open(server.address)
    assert sorted(map(int, page.ask("[...frames.keys()]"))) == sorted({*given, *found})
    last = max(found)
    page.go(last)
    assert (page.seen() == (found[last] > 0)).all()
    page.segment("forward")
    assert set(server.masks()) == set(range(1, 12))
    server.end()
    assert server.process.returncode == 0


def test_frames_are_numbered_as_their_files(server, tab):
    from selenium.webdriver.common.keys import Keys
    page = tab()
    assert page.ask("clip.numbers") is None and page.find("#total").text == "/ 11"
    page.driver.execute_script("clip.numbers = [1, 2, 3, 20, 21, 22, 23, 24, 25, 26, 27, 28]")
    for typed, index, number in (("20", 3, 20), ("4", 3, 20), ("2", 1, 2), ("99", 11, 28)):
        field = page.find("#number")
        field.click()
        field.send_keys(typed, Keys.ENTER)
        page.wait(f"view.frame === {index}")
        assert page.find("#total").text == f"({index + 1} of 12)"
        assert page.ask("at('number').value") == str(number)
        assert page.ask("at('from').textContent") == f"Segment from frame {number}"
    page.driver.execute_script(
        "clip.objects = [{id: 1, name: 'dog', hidden: false, absent: [], gone: []}];"
        "frames.set(3, {user_mask: false, version: 1, confidence: {1: null}}); "
        "clip.review = [{object_id: 1, first: 3, last: 5, confidence: null}]; go(3)")
    assert page.find("#review .stretch").text == "Frames 20–22 · dog · not visible"
    assert page.ask("at('where').textContent").endswith("predicted, not visible")


class Finger:
    """Taps and drags on a touch screen of a given size, in CSS pixels."""

    def __init__(self, page, address, width, height):
        self.page, self.send = page, page.driver.execute_cdp_cmd
        self.send("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": True})
        self.send("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})
        page.open(address)

    def drag(self, *places):
        for i, (x, y) in enumerate(places):
            self.send("Input.dispatchTouchEvent", {"type": "touchMove" if i else "touchStart",
                                                   "touchPoints": [{"x": x, "y": y}]})
        self.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def box(self, css):
        return self.page.ask(f"document.querySelector('{css}').getBoundingClientRect().toJSON()")

    def tap(self, css):
        """Scroll to a control and tap it; it must not be covered by anything."""
        element = self.page.find(css)
        self.page.driver.execute_script("arguments[0].scrollIntoView({block: 'nearest'})", element)
        box = self.box(css)
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        assert self.page.driver.execute_script(
            "return arguments[0].contains(document.elementFromPoint(arguments[1], arguments[2]))",
            element, *middle), f"{css} is covered"
        self.drag(middle)

    def drag_in_frame(self, *pixels):
        box, width = self.box("#hand"), self.page.ask("clip.width")
        scale = box["width"] / width
        self.drag(*((box["x"] + scale * (x + 0.5), box["y"] + scale * (y + 0.5))
                    for x, y in pixels))


@pytest.mark.parametrize("width, height", [(390, 844), (360, 640), (820, 1180), (844, 390)],
                         ids=["phone", "small phone", "tablet", "phone on its side"])
def test_fingers_reach_everything_on_a_small_screen(width, height, server, tab):
    page = tab()
    finger = Finger(page, server.address, width, height)
    upright = height > width
    assert page.ask("document.documentElement.scrollWidth <= innerWidth")
    assert page.ask("document.documentElement.scrollHeight <= innerHeight"), "the frame stays"
    small = page.ask("[...document.querySelectorAll('button, select')].filter(e => e.offsetParent)"
                     ".filter(e => e.offsetHeight < 40 || e.offsetWidth < 32).map(e => e.id)")
    assert not small
    finger.drag_in_frame((8, 6), (40, 30), (66, 52))
    page.wait("frames.has(0) && !at('sheet').classList.contains('waiting')")
    assert overlap(page.seen(), truth(0) > 0) > 0.8
    finger.tap("[data-tool=not]")
    finger.drag_in_frame((66, 70))
    page.wait("clip.undo === 2")
    assert not page.seen()[70, 66]
    frame = finger.box("#sheet")
    assert frame["width"] > width / 3
    if upright:
        assert finger.box("#hint")["y"] >= frame["y"] + frame["height"], "covers no pixel"
    for css in ("#add", "[data-tool=brush]", "#size", "#undo", "#absent", "#coco", "#next"):
        finger.tap(css)
    page.wait("view.frame === 1")
    finger.tap("#previous")
    page.wait("view.frame === 0")
    page.driver.execute_script("act = (name) => { called = name; }; called = '';")
    finger.tap("[data-direction=both]")
    page.wait("called === 'segment'")
    finger.tap("#export")
    page.wait("called === 'export'")
    assert finger.box("#sheet") == pytest.approx(finger.box("#sheet") | {"y": frame["y"]}, abs=60)


def test_stop_takes_the_place_of_segment(server, tab):
    page = tab()
    finger = Finger(page, server.address, 390, 844)
    finger.drag_in_frame((8, 6), (66, 52))
    page.wait("frames.has(0) && !at('sheet').classList.contains('waiting')")
    before = finger.box("#directions")
    # a run that stays in progress, as nothing from the server is applied any more
    page.driver.execute_script("take = () => {}; clip.run = {kind: 'segment', number: 1, done: 1, "
                               "total: 9, seconds: 1, ended: null}; show()")
    assert abs(finger.box("#run")["y"] - before["y"]) < 3
    page.driver.execute_script("act = (name) => { called = name; }; called = '';")
    finger.tap("#stop")
    page.wait("called === 'stop'")
    page.driver.execute_script("clip.run.ended = 'done'; show()")
    assert page.ask("at('run').hidden") and finger.box("#directions") == before


def test_a_tap_right_after_a_stroke_is_a_click(server, tab):
    page = tab()
    finger = Finger(page, server.address, 390, 844)
    finger.drag_in_frame((8, 6), (66, 52))
    # a control that stays where it is when the answer to the stroke adds an object to the list
    finger.tap("[data-tool=brush]")
    page.wait("view.tool === 'brush'", seconds=20)


def test_an_upright_clip_uses_the_height_of_an_upright_screen(tmp_path, tab):
    (tmp_path / "upright").mkdir()
    for i in range(2):
        Image.new("RGB", (96, 160), (90, 30, 30)).save(tmp_path / "upright" / f"{i:05d}.png")
    server = Server(tmp_path / "upright", tmp_path / "upright out")
    try:
        page = tab(server.address)
        finger = Finger(page, server.address, 390, 844)
        assert finger.box("#sheet")["height"] == pytest.approx(0.45 * 844, abs=2)
        assert finger.box("aside")["height"] > 150
    finally:
        server.end()


def test_objects_are_added_hidden_deleted_and_keys_navigate(server, tab):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    page = tab()
    page.draw((8, 6), (66, 52))
    page.click("#add")
    page.wait("clip.objects.length === 2 && view.object === 2")
    page.click("[data-tool=brush]")
    page.draw((120, 80), (140, 80))
    assert set(np.unique(server.masks("given")[0])) == {0, 1, 2}
    both = page.seen()
    page.find(".object button").click()
    page.wait("hidden.has(1)")
    assert page.seen().sum() < both.sum()
    page.wait("at('objects').textContent.includes('Show')")
    page.find(".object button[aria-label^=Delete]").click()
    page.wait("clip.objects.length === 1")
    press = lambda *keys: ActionChains(page.driver).send_keys(*keys).perform()  # noqa: E731
    press(Keys.END)
    page.wait("view.frame === 11")
    press(Keys.ARROW_LEFT)
    page.wait("view.frame === 10")
    press(Keys.HOME, " ")
    page.wait("view.frame > 2 && !frames.get(view.frame)")
    ActionChains(page.driver).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    page.wait("clip.objects.length === 2")


def test_an_added_object_stays_selected_when_older_news_arrive(server, tab):
    """News on their way when an object was added list the objects before it."""
    page = tab()
    page.draw((8, 6), (66, 52))
    page.ask("(globalThis.older = {...clip, frames: {}}, 0)")
    page.ask("(view.object = 2, take(older), 0)")
    assert page.ask("view.object") == 2
    page.click("#add")
    page.wait("clip.objects.length === 2 && view.object === 2")
    page.find(".object:last-child button[aria-label^=Delete]").click()
    page.wait("clip.objects.length === 1 && view.object === 1")


def test_what_is_drawn_before_an_object_is_added_belongs_to_it(server, tab):
    page = tab()
    page.driver.execute_script(
        "const real = fetch; window.fetch = async (url, ...rest) => "
        "(url.includes('do/add') ? await sleep(800) : 0, real(url, ...rest))")
    page.draw((30, 30), answered="!at('trouble').hidden")
    assert "too small" in page.find("#trouble").text and page.ask("view.tool") == "box"
    page.click(".object button[aria-label^=Delete]")
    page.wait("!clip.objects.length")
    page.click("[data-tool=point]")
    for place in (-20, 20):
        stroke(page.driver, page.find("#hand"), [(place, 0)])
    page.wait("frames.has(0) && clip.undo === 3")  # with the deletion
    assert page.ask("clip.objects.map(object => object.id)") == [2], "two clicks, one object"
    page.click("[data-tool=brush]")
    page.click("#add")
    page.draw((120, 80), (140, 80))
    assert server.masks("given")[0][80, 130] == 3
    page.driver.execute_script("act('add'); act('rename', {object: 3, name: 'cup'})")
    page.wait("clip.objects.some(object => object.name === 'cup')")
    assert page.ask("at('sheet').classList.contains('waiting')"), "one answer of two is there"
    page.wait("!at('sheet').classList.contains('waiting')")


def test_playback_keeps_its_pace_and_shows_each_frame(server, tab):
    """Also if it was paused and resumed while it waited for a frame, and if masks take a while."""
    page = tab()
    page.driver.execute_script(
        "const real = go; times = []; go = (...all) => { times.push(performance.now()); "
        "real(...all); }; clip.fps = 2; play(); play(); play()")
    page.wait("times.length > 5")
    times = np.array(page.ask("times"))
    assert np.diff(times)[1:].min() > 450

    page.driver.execute_script(
        "view.playing = false; take = () => 0; clip.fps = 24; go(0); shown = new Set(); "
        "new MutationObserver(() => shown.add(view.shown)).observe(at('stage'), "
        "{attributeFilter: ['data-shown']}); const real = maskOf; "
        "maskOf = async frame => (await sleep(200), real(frame)); play()")
    page.wait("view.frame === 11 && !view.playing")
    assert page.ask("shown.size") > 8


def test_a_run_is_followed_although_masks_take_longer_than_its_frames(server, tab):
    page = tab()
    page.driver.execute_script("""
        shown = new Set();
        new MutationObserver(() => shown.add(view.shown)).observe(
          at('stage'), {attributeFilter: ['data-shown']});
        const mask = maskOf, asked = ask;
        maskOf = async frame => (await sleep(300), mask(frame));
        let frame = 0;
        ask = async (path, ...rest) => {
          if (!path.startsWith('state') || frame === 11) return asked(path, ...rest);
          await sleep(50);
          frame++;
          const entry = { user_mask: false, version: frame, confidence: { 1: .9 } };
          return { json: async () => ({ ...clip, frames: { [frame]: entry },
                                        run: { kind: 'segment', ended: '' } }) };
        };
        view.following = true;
        act('add');""")
    page.wait("view.frame === 11")
    assert page.ask("shown.size") > 8


def test_lists_keep_what_is_clicked_selected_and_typed(server, tab):
    from selenium.webdriver.common.keys import Keys
    page = tab()
    for count in (1, 2, 3):
        page.click("#add")
        page.wait(f"clip.objects.length === {count} && view.object === {count}")
    selected = "[...document.querySelectorAll('.object[aria-selected=true] input')]" \
               ".map(input => input.value)"
    page.find(".object button[aria-label='Delete object 2']").click()
    page.wait("clip.objects.length === 2")
    page.click(".object button")
    page.wait("hidden.has(1)")
    assert page.ask("view.object") == 3 and page.ask(selected) == ["object 3"]
    field = page.find(".object input")
    field.click()
    assert page.ask("view.object") == 1 and page.ask(selected) == ["object 1"]
    field.send_keys("x", Keys.ENTER)
    page.wait("clip.objects[0].name === 'object 1x' && document.activeElement === document.body")
    page.find(".object input").send_keys("\N{NO-BREAK SPACE}", Keys.ENTER)
    page.wait("!at('trouble').hidden")
    page.wait("document.querySelector('.object input').value === 'object 1x'")

    page.driver.execute_script(
        "clip.review = [{object_id: 2, first: 3, last: 5, confidence: null}]; "
        "clip.run = {kind: 'export', number: 1, ended: 'done', folder: 'out', command: 'main.py'};"
        "clip.pending = [1]; show(); before = [...document.querySelectorAll("
        "'#review .stretch, #pending button, #exported code')]; show()")
    assert page.ask("before.map(element => element.isConnected)") == [True, True, True]
    page.click("#review .stretch")
    assert page.ask("[view.frame, view.object]") == [3, 1], "object 2 is deleted"


def test_news_of_a_shorter_clip_an_error_or_a_live_frame(server, tab):
    page = tab()
    page.go(11)
    page.driver.execute_script("take({...clip, frames: {}, count: 8})")
    assert page.ask("view.frame") == 7
    page.driver.execute_script("take({...clip, frames: {}, run: {kind: 'segment', number: 1, "
                               "ended: 'error', error: 'no object'}})")
    assert page.find("#warning").text == "no object" and not page.find("#exported").text
    page.driver.execute_script(
        "at('file').click = () => 0; view.following = view.playing = true; at('bring').click()")
    assert not page.ask("view.following || view.playing"), "the file is for the frame on screen"

    page.go(0)
    page.draw((8, 6), (66, 52))
    page.wait("kept.get(0)?.key.startsWith(`0 ${frames.get(0)?.version} `)")
    page.driver.execute_script(
        "window.real = maskOf; maskOf = () => Promise.reject(new Error('broken')); act('stroke', "
        "{frame: 0, object: 1, radius: 5, points: [[20, 80]]})")
    page.wait("!at('trouble').hidden")
    page.driver.execute_script("maskOf = real; show()")
    page.wait("kept.get(0).key.startsWith(`0 ${frames.get(0).version} `)")

    page.driver.execute_script(
        "for (const frame of [0, 1, 2]) frames.set(frame, {}); view.shown = 1; "
        "clip.live = {frame: 2}; followLive()")
    assert page.ask("[...frames.keys()]") == [1, 2], "the one on screen may be drawn on"


def test_a_double_click_starts_one_run_and_a_lost_connection_is_named(server, tab):
    page = tab()
    page.draw((8, 6), (66, 52))
    page.driver.execute_script("for (let i = 0; i < 2; i++) document.querySelector("
                               "'[data-direction=forward]').click()")
    page.wait("clip.run && !busy()")
    page.driver.execute_script("at('export').click(); at('export').click()")
    page.wait("clip.run.kind === 'export' && !busy()")
    assert page.ask("at('trouble').hidden")
    page.driver.execute_script("window.fetch = () => Promise.reject(new TypeError('Failed'));"
                               "act('add')")
    page.wait("!at('trouble').hidden")
    assert page.find("#trouble").text == "The server can't be reached"


def frame_seen(page):
    """The (H, W, 3) uint8 pixels of the frame that the page shows."""
    page.drawn()
    return frame_seen_at_once(page)


def frame_seen_at_once(page):
    height, width = page.ask("clip.height"), page.ask("clip.width")
    data = page.ask("Array.from(at('image').getContext('2d').getImageData(0, 0, clip.width, "
                    "clip.height).data)")
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def test_a_new_clip_on_the_same_port_does_not_show_cached_frames(tmp_path, tab):
    frames = {}
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / name).mkdir()
        frames[name] = Image.new("RGB", (160, 96), colour)
        for i in range(3):
            frames[name].save(tmp_path / name / f"{i:05d}.png")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = Server(tmp_path / "red", tmp_path / "first", port=port)
    page = tab(first.address)
    assert abs(frame_seen(page).astype(int) - np.array(frames["red"])).max() < 8
    first.end()
    second = Server(tmp_path / "blue", tmp_path / "second", port=port)
    try:
        # the tab of the first clip is refused, until another one has brought the new cookie
        page.wait("at('status').textContent.includes('token')")
        page.driver.switch_to.new_window("tab")
        page.open(second.address)
        assert abs(frame_seen(page).astype(int) - np.array(frames["blue"])).max() < 8
        thumbnail = page.ask("Array.from(at('timeline').getContext('2d')"
                             ".getImageData(5, 5, 1, 1).data)")
        page.wait("(async () => { await drawTimeline(); return true; })()")
        assert thumbnail[2] > thumbnail[0]
        page.driver.switch_to.window(page.driver.window_handles[0])
        page.wait("clip.count > 0 && at('stage').dataset.shown && !at('status').textContent")
        assert abs(frame_seen(page).astype(int) - np.array(frames["blue"])).max() < 8
    finally:
        second.end()


@contextmanager
def proxy(port, prefix, host=None):
    """A reverse proxy that strips a prefix, as nginx and JupyterHub do; yields its port and the
    paths that it was asked for. Redirects and cookies are the browser's business.

    Args:
        host: what it sends as Host; None passes on what the browser sent.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def pass_on(self):
            asked.append(self.path)
            if not self.path.startswith(prefix + "/"):
                return self.send_error(404)
            line = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            headers = {key: value for key, value in self.headers.items() if key != "Connection"}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            line.request(self.command, self.path[len(prefix):], body or None,
                         headers | ({"Host": host} if host else {}))
            answer = line.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = pass_on

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        one.daemon_threads = True
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one.server_address[1], asked
        one.shutdown()


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_the_page_works_behind_a_proxy_with_prefix_and_host_name(host, clip, tmp_path, tab):
    """JupyterHub passes the host name on, nginx replaces it by its own."""
    prefix, name = "/user/ann/proxy/8123", "hub.example"
    server = Server(clip, tmp_path / "behind", "--page_host", "127.0.0.1", name)
    url = urlsplit(server.address)
    try:
        with proxy(url.port, prefix, host) as (port, asked):
            page = tab(f"http://{name}:{port}{prefix}/?{url.query}",
                       f"--host-resolver-rules=MAP {name} 127.0.0.1")
            assert page.driver.current_url == f"http://{name}:{port}{prefix}/"
            cookie, = page.driver.get_cookies()
            assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
            assert cookie["path"] == prefix and cookie["domain"] == name
            page.draw((8, 6), (66, 52))
            assert overlap(page.seen(), truth(0) > 0) > 0.8
            page.driver.refresh()
            page.wait("clip.count > 0 && frames.has(0)")
            assert all(path.startswith(prefix) for path in asked)
            assert not page.log()
    finally:
        server.end()


def test_the_page_works_without_the_trailing_slash(server, tab):
    with proxy(urlsplit(server.address).port, "/a/b") as (port, _):
        page = tab(f"http://127.0.0.1:{port}/a/b/?{urlsplit(server.address).query}")
        page.ask("history.replaceState(null, '', '/a/b')")
        assert page.ask("location.pathname") == "/a/b"
        page.driver.execute_script("act('add')")
        page.wait("clip.objects.length === 1")


def test_a_stroke_edits_the_frame_on_screen(server, tab):
    """It does not matter what the page is loading or which key is pressed meanwhile."""
    page = tab()
    page.draw((8, 6), (66, 52))
    page.click("[data-tool=brush]")
    event = "{bubbles: true, pointerId: 1, clientX: box.left + 20, clientY: box.top + 20}"
    draw = ("const box = at('hand').getBoundingClientRect(); "
            "at('hand').setPointerCapture = () => 0; "
            "const send = kind => at('hand').dispatchEvent(new PointerEvent(kind, " + event + "));")
    # frame 5 never arrives, so frame 0 stays on screen
    page.driver.execute_script(
        "const real = fetch; window.fetch = (url, ...rest) => "
        "url.includes('frame/5') ? new Promise(() => 0) : real(url, ...rest); go(5); "
        + draw + "send('pointerdown'); send('pointerup');")
    page.wait("clip.undo === 2 && view.frame === 0")
    assert set(server.masks("given")) == {0}
    # a key leads to another frame in the middle of a stroke
    page.driver.execute_script(draw + "send('pointerdown'); go(1); send('pointerup');")
    page.drawn()
    assert page.ask("clip.undo") == 2
    # the previous frame isn't shown in place of an unreadable one
    page.driver.execute_script("window.fetch = () => Promise.reject(new Error('broken')); go(7)")
    page.wait("view.shown === null")
    assert not frame_seen_at_once(page).any()


def test_ctrl_c_with_an_open_tab_exits_quietly(server, tab):
    page = tab()
    page.draw((8, 6), (66, 52))
    time.sleep(0.5)  # by then the tab waits for news, which the server answers after 15 seconds
    errors = server.end()
    assert server.process.returncode == 0
    assert "Traceback" not in errors and "ERROR" not in errors and "Cancel" not in errors, errors
    page.wait("at('status').textContent.includes('Is main.py still running')")


def test_two_fingers_zoom_and_pan_without_drawing(server, tab):
    page = tab()
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled",
                                {"enabled": True, "maxTouchPoints": 2})
    page.open(server.address)  # as on a touch screen, with larger buttons from the beginning

    def touch(kind, *points):
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [
            {"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]})

    box = page.ask("at('hand').getBoundingClientRect().toJSON()")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    place = ("(() => { const r = at('hand').getBoundingClientRect(); "
             f"return [({x} - r.left) / r.width, ({y} - r.top) / r.height]; }})()")
    for tool in ("box", "point", "brush"):
        page.click(f"[data-tool={tool}]")
        page.driver.execute_script("resetZoom()")
        touch("touchStart", (x - 20, y))
        touch("touchMove", (x - 18, y))
        touch("touchStart", (x - 20, y), (x + 20, y))
        for step in range(1, 11):
            touch("touchMove", (x - 20 - 4 * step, y), (x + 20 + 4 * step, y))
        page.wait("Math.abs(view.zoom - 3) < 0.1")  # 40 pixels apart, then 120
        assert page.ask(place) == pytest.approx([0.5, 0.5], abs=0.01), "the middle stays"
        before = page.ask("[view.left, view.top, view.zoom]")
        touch("touchMove", (x - 60 + 30, y + 20), (x + 60 + 30, y + 20))
        page.wait(f"view.left > {before[0]} + 29")
        after = page.ask("[view.left, view.top, view.zoom]")
        assert np.subtract(after, before) == pytest.approx([30, 20, 0], abs=1)
        touch("touchEnd", (x - 30, y + 20))  # the finger that is left draws nothing
        touch("touchMove", (x + 30, y + 40))
        touch("touchEnd")
        assert not page.ask("hand.down || pinching || fingers.size")
        assert np.array_equal(page.ask("[view.left, view.top, view.zoom]"), after)
    assert not page.ask("clip.objects.length"), "nothing was drawn"
    page.driver.execute_script("resetZoom(); chooseTool('box')")
    scale = box["width"] / 160
    corner = [(box["x"] + scale * u, box["y"] + scale * v) for u, v in ((8, 6), (66, 52))]
    touch("touchStart", corner[0])
    touch("touchMove", corner[1])
    touch("touchEnd")
    page.wait("frames.has(0)")
    assert overlap(page.seen(), truth(0) > 0) > 0.8, "one finger draws"


def test_shortcuts_use_key_positions(server, tab):
    page = tab()

    def tool_after(where="document.body", **event):
        page.driver.execute_script(
            "chooseTool('eraser'); "
            f"{where}.dispatchEvent(new KeyboardEvent('keydown', "
            "{bubbles: true, ...arguments[0]}))", event)
        return page.ask("view.tool")

    for letter in ("b", "B", "и", "x"):  # plain, Caps Lock, Russian, Dvorak
        assert tool_after(key=letter, code="KeyB") == "box"
    assert tool_after(key="b", code="KeyN") == "not"
    for held in ("ctrlKey", "metaKey", "altKey"):
        assert tool_after(key="b", code="KeyB", **{held: True}) == "eraser"
    page.draw((8, 6), (66, 52), answered="clip.objects.length > 0")
    assert tool_after("document.querySelector('.object input')", key="b", code="KeyB") == "eraser"
    assert tool_after("at('cutout')", key="b", code="KeyB") == "eraser"
    assert tool_after("at('size')", key="b", code="KeyB") == "box", "a slider takes no letters"

    def undone(**event):
        before = page.ask("clip.version")
        page.driver.execute_script("act('stroke', {frame: 0, object: 1, radius: 2, "
                                   "points: [[arguments[0], 90]]})", before % 150)
        page.wait(f"clip.version > {before} && clip.undo > 0")
        steps = page.ask("clip.undo")
        tool_after(ctrlKey=True, **event)
        with suppress(AssertionError):
            page.wait(f"clip.undo < {steps}", seconds=event.pop("seconds", 2))
        return page.ask("clip.undo") < steps

    assert undone(key="z", code="KeyY"), "a German keyboard"
    assert undone(key="Z", code="KeyZ"), "Caps Lock"
    assert undone(key="я", code="KeyZ"), "a Russian keyboard"
    assert not undone(key="y", code="KeyZ"), "redo on a German keyboard"
    page.driver.execute_script("act('add')")
    page.wait("clip.objects.length === 2")
    page.driver.execute_script("document.body.dispatchEvent(new KeyboardEvent('keydown', "
                               "{key: '&', code: 'Digit1', bubbles: true}))")
    assert page.ask("view.object") == 1, "a French keyboard"


def test_an_object_out_of_frame_is_labelled_not_visible(tmp_path, tab):
    """Checks the texts of the page for predictions with such confidences."""
    (tmp_path / "clip").mkdir()
    Image.new("RGB", (160, 96)).save(tmp_path / "clip" / "00000.png")
    for i in range(1, 4):
        shutil.copy(tmp_path / "clip" / "00000.png", tmp_path / "clip" / f"{i:05d}.png")
    server = Server(tmp_path / "clip", tmp_path / "gone")
    try:
        page = tab(server.address)
        page.driver.execute_script("""
            const sure = value => ({ user_mask: false, version: 9, confidence: { 1: value } });
            frames.set(1, sure(.9)); frames.set(2, sure(null)); frames.set(3, sure(null));
            Object.assign(clip, {
              objects: [{ id: 1, name: "cat", absent: [], gone: [] }],
              review: [{ object_id: 1, first: 2, last: 3, confidence: null },
                       { object_id: 1, first: 1, last: 1, confidence: .9 }] });
            go(2);""")
        assert "not visible" in page.find("#where").text
        rows = [row.text for row in page.driver.find_elements("css selector", "#review .stretch")]
        assert rows == ["Frames 2–3 · cat · not visible", "Frame 1 · cat · 90%"]
        assert "0%" not in page.find("#where").text
    finally:
        server.end()


@pytest.mark.parametrize("change, status", [
    (lambda url: url.replace("token=", "token=x"), 403),
    (lambda url: url.split("?")[0], 403)])
def test_nothing_is_served_without_the_token(change, status, server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(change(server.address), timeout=PATIENCE)
    assert refused.value.code == status


def test_malformed_requests_are_rejected(server):
    """Sent byte by byte to a real server: a foreign host, a body of 100 MB."""
    url = urlsplit(server.address)
    token = url.query.removeprefix("token=")

    def answer(method, path, body=None, **headers):
        line = HTTPConnection(url.hostname, url.port, timeout=PATIENCE)
        with suppress(ConnectionError):  # it answers, and hangs up, before all is sent
            line.request(method, path, body, {"X-Token": token, **headers})
        try:
            return line.getresponse().status
        finally:
            line.close()

    assert answer("GET", "/state/0", Host="evil.example") == 421
    assert answer("GET", "/state/0", Origin="http://evil.example") == 403
    assert answer("PUT", "/mask/0", b"", **{"Content-Length": str(10**8)}) == 413
    assert answer("PUT", "/mask/0", b"no mask") == 400
    assert answer("GET", "/state/0") == 200
