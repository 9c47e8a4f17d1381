"""The page as a person uses it: in a real browser, on a clip of which the truth is known."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
from conftest import ROOT, overlap, truth
from PIL import Image

from media.masks import read_mask

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--force-device-scale-factor=1"]
PATIENCE = 60  # seconds

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER),
                                reason="no chromium and chromium-driver")


class Server:
    """`python main.py -m segment --page` in a process of its own."""

    def __init__(self, clip, folder):
        self.folder, self.clip = folder, clip
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "main.py", "-m", "segment", "--video", self.clip, "--page",
             "-j", self.folder], stdout=subprocess.PIPE, text=True, cwd=self.folder.parent,
            env=os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"})
        self.address = self.process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S{32}", self.address)

    def end(self, how=signal.SIGINT):
        self.process.send_signal(how)
        self.process.wait(PATIENCE)
        self.process.stdout.close()

    def masks(self, kind="found"):
        return {int(path.stem): read_mask(path)
                for path in sorted((self.folder / "page" / kind).glob("*.png"))}


class Tab:
    """A browser with the page open, and the hands to work it."""

    def __init__(self, address, profile):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,800"):
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

    def wait(self, script):
        end = time.monotonic() + PATIENCE
        while not self.ask(script):
            assert time.monotonic() < end, f"waited in vain for {script}; {self.log()}"
            time.sleep(0.05)

    def log(self):
        """The errors that the browser tells of."""
        return [entry["message"] for entry in self.driver.get_log("browser")
                if entry["level"] == "SEVERE"]

    def draw(self, *points, alt=False, answered="clip.version > before"):
        """Press at the first pixel of the frame, move through the others, let go."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys
        before, hand = self.ask("clip.version"), self.find("#hand")
        width, height = self.ask("clip.width"), self.ask("clip.height")
        places = [(round((x + 0.5 - width / 2) * hand.rect["width"] / width),
                   round((y + 0.5 - height / 2) * hand.rect["height"] / height))
                  for x, y in points]
        actions = ActionChains(self.driver, duration=20)
        if alt:
            actions.key_down(Keys.ALT)
        actions.move_to_element_with_offset(hand, *places[0]).click_and_hold()
        for place in places[1:]:
            actions.move_to_element_with_offset(hand, *place)
        actions.release()
        if alt:
            actions.key_up(Keys.ALT)
        actions.perform()
        self.wait(answered.replace("before", str(before)))
        self.wait("!hand.down && !at('sheet').classList.contains('waiting')")

    def go(self, frame):
        self.ask(f"go({frame})")
        self.drawn()

    def drawn(self):
        """Wait until the newest mask of the frame is to be seen."""
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
        """Click on what starts something, and wait for its end."""
        before = self.ask("clip.run?.number ?? 0")
        self.click(css)
        self.wait(f"clip.run?.number > {before} && !busy()")

    def segment(self, way="both"):
        self.run(f"[data-way={way}]")

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
    """Opens a browser on the page, each with a profile of its own."""
    tabs = []

    def start():
        tabs.append(Tab(server.address, tmp_path / f"profile {len(tabs)}"))
        return tabs[-1]

    yield start
    for one in tabs:
        one.close()


def test_from_a_box_to_a_corrected_cutout(server, tab):
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
    mended = server.masks("given")[6] > 0
    assert mended[80, 40]
    page.draw((40, 80), alt=True)
    mended = server.masks("given")[6] > 0
    assert not mended[80, 40] and overlap(mended, truth(6) > 0) > 0.6, "a click mends"
    assert "Correct from frame 6" in page.find("#from").text
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
        np.testing.assert_array_equal(cut[..., 3] > 0, mask > 0)
    assert f"6:{server.folder / 'mask_00006.png'}" in page.find("#exported code").text
    assert (server.folder / "overlay.mp4").stat().st_size > 1000
    assert not page.log()


def test_a_reload_a_second_tab_and_undo(server, tab):
    page, other = tab(), tab()
    page.draw((8, 6), (66, 52))
    other.wait("frames.has(0) && clip.objects.length === 1")
    assert (other.seen() == page.seen()).all()
    other.draw((60, 60), (61, 61), answered="!at('trouble').hidden")
    assert "the box is too small" in other.find("#trouble").text
    page.click("[data-way=forwards]")
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
    page.click("[data-way=both]")
    page.wait("[...frames.values()].filter(entry => entry.sure).length > 3")
    server.end(signal.SIGKILL)
    page.wait("at('status').textContent.includes('Is main.py still running')")
    given, found = server.masks("given"), server.masks()
    server.start()
    page.open(server.address)
    assert sorted(map(int, page.ask("[...frames.keys()]"))) == sorted({*given, *found})
    last = max(found)
    page.go(last)
    assert (page.seen() == (found[last] > 0)).all()
    page.segment("forwards")
    assert set(server.masks()) == set(range(1, 12))
    server.end()
    assert server.process.returncode == 0


def test_the_page_on_a_phone(server, tab):
    page = tab()
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})
    page.open(server.address)
    assert page.ask("document.documentElement.scrollWidth <= innerWidth")
    for css in ("[data-tool=not]", "[data-way=both]", "#timeline", "#undo"):
        box = page.find(css).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.ask("innerWidth")
        assert box["height"] >= 36
    page.draw((8, 6), (66, 52))
    assert overlap(page.seen(), truth(0) > 0) > 0.8
    page.click("[data-tool=not]")
    page.draw((66, 70))
    assert not page.seen()[70, 66]


def test_objects_and_keys(server, tab):
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
    page.wait("clip.objects[0].hidden")
    assert page.seen().sum() < both.sum()
    page.wait("at('objects').textContent.includes('Show')")
    page.find(".object button[aria-label^=delete]").click()
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


@pytest.mark.parametrize("change, status", [
    (lambda url: url.replace("token=", "token=x"), 403),
    (lambda url: url.split("?")[0], 403)])
def test_without_the_token_nothing_is_shown(change, status, server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(change(server.address), timeout=PATIENCE)
    assert refused.value.code == status


def test_a_stranger_on_the_wire(server):
    """What a real server does, byte for byte: a foreign host, a body of 100 MB."""
    import http.client
    from urllib.parse import urlsplit
    url = urlsplit(server.address)
    token = url.query.removeprefix("token=")

    def answer(method, path, body=None, **headers):
        line = http.client.HTTPConnection(url.hostname, url.port, timeout=PATIENCE)
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
