"""The browser page in Chromium: seconds per frame, time to the first mask.

    python -m benchmarks.browser [--rows H ...] [--threads N ...] [--json FILE]

Builds the page (docs/browser.md), serves it on the loopback address, and works it with Selenium on
the demo clip. Needs chromium, chromium-driver and the npm packages of examples/browser.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks import common
from lite_runtime import browser
from videomatch import SHIPPED, VideoMatch

FLAGS = ("--headless=new", "--no-sandbox", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--force-device-scale-factor=1",
         "--window-size=1280,860")
PATIENCE = 300  # seconds that one state of the page may take to come
BOX = 18, 111, 174, 153  # x, y, width, height of the object in the demo clip's first frame


class Handler(SimpleHTTPRequestHandler):
    """Hands out files, with the two headers that let a page use threads."""

    isolated = True

    def end_headers(self):
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_):
        pass


class Plain(Handler):
    """Hands out files like any static host."""

    isolated = False


@contextmanager
def serve(folder: Path, isolated: bool = True) -> Iterator[str]:
    """Serve a folder on the loopback address; yields the address.

    Args:
        isolated: with the headers that let a page use threads.
    """
    handler = partial(Handler if isolated else Plain, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def stroke(driver, element, offsets: list[tuple[int, int]], alt: bool = False) -> None:
    """Press the mouse button over an element, move, and release it.

    Args:
        driver: a Selenium WebDriver.
        offsets: x and y from the element's centre, in CSS pixels: where to press, then where to
            move.
        alt: hold the Alt key meanwhile.
    """
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    actions = ActionChains(driver, duration=20)
    if alt:
        actions.key_down(Keys.ALT)
    actions.move_to_element_with_offset(element, *offsets[0]).click_and_hold()
    for offset in offsets[1:]:
        actions.move_to_element_with_offset(element, *offset)
    actions.release()
    if alt:
        actions.key_up(Keys.ALT)
    actions.perform()


class Page:
    """Operates the page in a headless Chromium. A context manager.

    Args:
        address: of the page; may have a query.
        downloads: folder for what it saves.
        flags: further flags of Chromium.
    """

    def __init__(self, address: str, downloads: Path, *flags: str):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*FLAGS, *flags):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options,
                                       service=Service(shutil.which("chromedriver")))
        self.driver.set_script_timeout(PATIENCE)
        self.driver.get(address)
        self.wait("app.network || at('problem')", "the network")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.driver.quit()

    def find(self, css: str):
        return self.driver.find_element("css selector", css)

    def click(self, css: str) -> None:
        self.find(css).click()

    def ask(self, script: str):
        """The value of a JavaScript expression."""
        return self.driver.execute_script(
            f"const at = id => document.getElementById(id); return {script}")

    def wait(self, script: str, what: str = "") -> None:
        """Wait until a JavaScript expression is true.

        Raises:
            TimeoutError: it wasn't within `PATIENCE` seconds.
        """
        end = time.monotonic() + PATIENCE
        while not self.ask(script):
            if time.monotonic() > end or self.ask("at('problem').textContent"):
                raise TimeoutError(f"timed out waiting for {what or script}: " + self.ask(
                    "at('status').textContent + at('problem').textContent"))
            time.sleep(0.2)

    def idle(self) -> None:
        """Wait until the page has finished."""
        self.wait("!app.busy && !app.running", "the page to finish")

    def open_demo(self) -> None:
        self.click("#demo")
        self.wait("app.clip && app.frame", "the demo clip")
        self.idle()

    def open_frames(self, paths: list[Path]) -> None:
        self.find("#frames").send_keys("\n".join(map(str, paths)))
        self.wait(f"app.clip?.count === {len(paths)} && app.frame", "the frames")
        self.idle()

    def stroke(self, *places: tuple[float, float], alt: bool = False) -> None:
        """Press at the first pixel of the frame, move through the others, let go."""
        view = self.find("#view")
        width, height = self.ask("[app.clip.width, app.clip.height]")
        scale = min(view.rect["width"] / width, view.rect["height"] / height)
        offsets = [(round((x + 0.5 - width / 2) * scale), round((y + 0.5 - height / 2) * scale))
                   for x, y in places]
        stroke(self.driver, view, offsets, alt)

    def draw(self, *places: tuple[float, float], alt: bool = False) -> None:
        """Like `stroke`, and wait for the mask."""
        before = self.ask("[...app.edits.values()].map(edit => edit.actions.length)")
        self.stroke(*places, alt=alt)
        self.wait(f"JSON.stringify([...app.edits.values()].map(edit => edit.actions.length)) !== "
                  f"'{json.dumps(before, separators=(',', ':'))}'", "the prompt")
        self.idle()

    def draw_box(self, x: int, y: int, width: int, height: int) -> None:
        self.draw((x, y), (x + width // 2, y + height // 2), (x + width - 1, y + height - 1))

    def track(self) -> None:
        """Track all frames that have no mask that is up to date."""
        self.click("#track")
        self.wait("app.next === app.clip.count && app.previous < 0", "the end of the clip")
        self.idle()


def measure(address: str, downloads: Path, rows: int, threads: int) -> dict:
    """Track the demo clip on a freshly opened page.

    Returns:
        "load": seconds until the network is loaded; "prompt": from a box to its mask; "seconds":
        median per tracked frame, without decoding the picture; "backend".
    """
    with Page(f"{address}?backend=wasm&threads={threads}", downloads) as page:
        page.driver.execute_script(f"const size = document.getElementById('size');"
                                   f"size.add(new Option({rows})); size.value = {rows};")
        page.open_demo()
        page.draw_box(*BOX)
        page.track()
        times = page.ask("app.times")
        return {"rows": rows, "threads": threads, "backend": page.ask("app.backend"),
                "load": times["load"], "prompt": times["prompt"],
                "seconds": statistics.median(times["frames"])}


def middle(runs: list[dict]) -> dict:
    """The medians of several measurements of the same kind."""
    return runs[0] | {name: statistics.median(run[name] for run in runs)
                      for name in ("load", "prompt", "seconds")}


def measure_all(args: argparse.Namespace) -> dict:
    model = VideoMatch.load(SHIPPED["mobilenet"]).for_inference("fp32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = browser.build(model, folder / "page")
        with serve(folder / "page") as address:
            rows = [middle([measure(address, folder, height, count) for _ in range(args.repeats)])
                    for height in args.rows for count in args.threads]
    print("bytes: " + ", ".join(f"{part} {size}" for part, size in sizes.items()))
    print(f"{'rows':>5} {'threads':>7} {'load s':>7} {'box s':>7} {'frame s':>8}")
    for row in rows:
        print(f"{row['rows']:5} {row['threads']:7} {row['load']:7.2f} {row['prompt']:7.2f} "
              f"{row['seconds']:8.3f}")
    return {"sizes": sizes, "rows": rows}


def main() -> int:
    parser = common.parser("Benchmark of the page in Chromium.")
    parser.add_argument("--rows", type=int, nargs="+", default=(240, 480), metavar="H",
                        help="short sides of the frames that the network sees (default: 240 480)")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), metavar="N",
                        help="numbers of threads (default: 1 2)")
    return common.run(parser, measure_all)


if __name__ == "__main__":
    sys.exit(main())
