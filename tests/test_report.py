"""The report: scores by hand, colours of images, no external resources."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT, write_list, write_sequence
from PIL import Image

import evaluate
import metrics
from davis import Davis
from media.clip import Clip
from outputs import report
from tracking.confidence import Measures

SCORES = {"ant": ([0.5, 0.9, 0.7, 0.6], [0.4, 0.8, 0.6, 0.5]),
          "bee": ([0.9, 0.9, 0.9, 0.9], [1.0, 1.0, 1.0, 1.0])}


@pytest.fixture
def sequences(davis_2016):
    return Davis(davis_2016, names=["ant", "bee"]).sequences


def run(name, sequences, better=0.0):
    """A run of true masks with invented scores."""
    scores = {}
    for sequence in sequences:
        scores[sequence.name] = score = metrics.SequenceScore([1])
        for j, f in zip(*SCORES[sequence.name]):
            score.add([(j + better * (sequence.name == "ant"), f)])
    return report.Run(name, sequences[0].masks[0].parent.parent, scores)



def test_the_report_of_one_run_shows_its_scores(sequences, tmp_path):
    path = report.write(tmp_path / "report.html", sequences, [run("mine", sequences)],
                        {"flags": "--top_k 5 <b>"})
    page = path.read_text()
    assert not re.search(r"(src|href)=.?(https?:|/)", page)
    assert "--top_k 5 &lt;b&gt;" in page
    ant = re.search(r"#ant'>ant</a><td>([\d.]+)<td>([\d.]+)", page)
    assert [float(ant[1]), float(ant[2])] == [pytest.approx(0.625), pytest.approx(0.675)]
    assert page.count("<svg") == 2 and page.count("<polyline") == 4
    captions = re.findall(r"<figcaption>(.*?)<", page.split("id='ant'")[1].split("<h2")[0])
    assert captions == ["frame 1, worst: J&amp;F 0.450", "frame 2, best: J&amp;F 0.850",
                        "frame 3, median: J&amp;F 0.650"]
    for picture in re.findall(r"base64,([^']+)", page):
        assert cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), 1).shape[1] == 480


def test_the_report_of_two_runs_compares_them(sequences, tmp_path):
    runs = [run("old", sequences), run("new", sequences, better=0.1)]
    page = report.write(tmp_path / "report.html", sequences, runs, {}).read_text()
    ant = re.search(r"#ant'>ant</a><td>([\d.]+)<td>([\d.]+)<td class=won>([\d.]+)", page)
    assert [float(x) for x in ant.groups()] == [0.625, 0.675, 0.05]
    assert re.search(r"#bee'>bee</a><td>[\d.]+<td>[\d.]+<td>0.000", page)
    assert "new, frame 1, largest difference" in page


def test_false_positives_and_negatives_have_different_colours():
    image = np.full((2, 4, 3), 100, np.uint8)
    truth = np.array([[0, 1, 1, 0], [2, 0, 0, 0]], np.uint8)
    mask = np.array([[0, 1, 0, 1], [1, 0, 0, 0]], np.uint8)
    picture = report.error_image(image, mask, truth).astype(int)

    def leading(y, x):
        return "rgb"[picture[y, x].argmax()] if np.ptp(picture[y, x]) else "grey"

    assert [leading(0, x) for x in range(4)] == ["grey", "g", "b", "r"]
    assert leading(1, 0) == "r"  # the other object
    truth[0, 2:] = truth[1, 0] = 255  # not labelled: no error
    picture = report.error_image(image, mask, truth).astype(int)
    assert [leading(0, x) for x in range(4)] == ["grey", "g", "grey", "grey"]
    assert leading(1, 0) == "grey"


def lines_of(page):
    """The points of each line in an SVG."""
    return [[tuple(map(float, point.split(","))) for point in points.split()]
            for points in re.findall("polyline points='([^']+)'", page)]


def test_curves_are_drawn_at_their_frames_and_end_where_an_object_is_not_visible(tmp_path):
    class Numbered(Clip):
        numbers = [*range(1, 101)]

    def sure(frame, object_id, value):
        return Measures(frame, object_id, value is not None, value, value, 0.1, value, value)

    measures = [sure(i, 1, 0.97) for i in range(100)]
    measures += [sure(i, 2, 0.99 if i < 80 or i == 90 else None) for i in range(50, 100)]
    page = report.write_clip(tmp_path / "r.html", "mine", Numbered(), measures, {}).read_text()
    one, two, again = lines_of(page)
    left, right = one[0][0], one[-1][0]
    place = {frame: left + frame * (right - left) / 99 for frame in range(100)}
    assert [x for x, _ in two] == pytest.approx([place[i] for i in range(50, 80)], abs=0.06)
    assert [x for x, _ in again] == pytest.approx([place[90]] * 2, abs=0.06)  # a dot
    assert re.findall("<text [^>]*y=156[^>]*>(\\d+)", page) == ["1", "100"]
    assert "frames 81 to 90 of object 2 (not visible)" in page
    assert "frames 92 to 100 of object 2 (not visible)" in page


def test_an_object_has_the_same_colour_in_every_frame(tmp_path):
    root = tmp_path / "davis"
    write_sequence(root, "ant", ids=(1, 2), value=None)
    write_list(root, "2017", "val", ["ant"])
    for i, path in enumerate(sorted((root / "Annotations" / "480p" / "ant").iterdir())):
        truth = np.array(Image.open(path))
        truth = np.flipud(truth) if i == 2 else truth  # object 2 is above object 1
        Image.fromarray(truth).save(path)
        colours = np.array([(0, 0, 0), (255, 140, 0), (30, 144, 255)], np.uint8)
        (tmp_path / "found" / "ant").mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours[truth]).save(tmp_path / "found" / "ant" / f"{5 * i:05d}.png")
        path.rename(path.with_name(f"r{5 * i:05d}.png"))
        image = root / "JPEGImages" / "480p" / "ant" / f"{i:05d}.jpg"
        image.rename(image.with_name(f"r{5 * i:05d}.jpg"))
    for path in root.rglob("r*.[jp][pn]g"):
        path.rename(path.with_name(path.name[1:]))
    sequences = Davis(root, "2017", "val").sequences
    runs = [report.Run("found", tmp_path / "found",
                       evaluate.score_folder(tmp_path / "found", sequences, 1))]
    page = report.write(tmp_path / "r.html", sequences, runs, {}).read_text()
    pictures = re.findall(r"base64,([^']+)", page)
    assert {"frame 5", "frame 20"} & set(re.findall(r"frame \d+", page)) and pictures
    for picture in pictures:
        blue, green, red = cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), 1) \
            .astype(int).transpose(2, 0, 1)
        assert (green - red > 20).any() and not (red - green > 40).any()


def test_evaluation_writes_a_report(model, davis_2016, tmp_path):
    sequences = Davis(davis_2016, names=["ant"]).sequences
    evaluate.evaluate(model, sequences, evaluate.Options(
        results=tmp_path / "out", metadata={"flags": "--demo"}))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "--demo" in page and "frames per second" in page


@pytest.mark.slow
def test_two_folders_are_compared(tmp_path):
    write_sequence(tmp_path / "davis", "ant")
    write_list(tmp_path / "davis", "2016", "val", ["ant"])
    truth = tmp_path / "davis" / "Annotations" / "480p"
    for name, shift in (("good", 0), ("bad", 6)):
        (tmp_path / name / "ant").mkdir(parents=True)
        for path in (truth / "ant").iterdir():
            mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            cv2.imwrite(str(tmp_path / name / "ant" / path.name), np.roll(mask, shift, 1))
    run = subprocess.run([sys.executable, ROOT / "evaluate.py", tmp_path / "good",
                          tmp_path / "bad", "-d", tmp_path / "davis"],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "bad" / "against_good.html").read_text()
    assert re.search(r"#ant'>ant</a><td>1.000<td>0.\d+<td class=lost>-0.\d+", page)


@pytest.fixture
def ask_browser(tmp_path):
    """Run a script in a page as wide as a phone; returns its result, from JSON."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no Chromium")

    def ask(page: str, script: str):
        phone = tmp_path / "phone.html"
        phone.write_text(
            f"<iframe width=390 height=800 srcdoc=\"{html.escape(page)}\"></iframe><pre></pre>"
            "<script>const frame = document.querySelector('iframe')\n"
            f"frame.onload = () => {{ const page = frame.contentDocument\n"
            f"document.querySelector('pre').textContent = JSON.stringify((() => {{{script}}})()) }}"
            "</script>", encoding="utf-8")
        run = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", phone.as_uri()],
            capture_output=True, text=True, timeout=60)
        return json.loads(html.unescape(re.search("<pre>(.*)</pre>", run.stdout)[1]))

    return ask


@pytest.mark.slow
def test_a_click_sorts_the_table(sequences, tmp_path, ask_browser):
    page = report.write(tmp_path / "r.html", sequences, [run("mine", sequences)], {}).read_text()
    orders = ask_browser(page, """
        const names = () => [...page.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent)
        const heads = page.querySelectorAll('th')
        return [1, 1, 0, 0].map(column => (heads[column].click(), names()))""")
    assert orders == [["bee", "ant"], ["ant", "bee"], ["ant", "bee"], ["bee", "ant"]]


@pytest.mark.slow
@pytest.mark.parametrize("names", [["mine"], ["old", "new"]])
def test_the_report_fits_a_phone(names, sequences, tmp_path, ask_browser):
    runs = [run(name, sequences) for name in names]
    page = report.write(tmp_path / "r.html", sequences, runs, {"flags": "-x" * 300}).read_text()
    width, pictures, small = ask_browser(page, """
        const pictures = [...page.images]
        return [page.documentElement.scrollWidth, pictures.filter(p => p.naturalWidth).length,
                pictures.filter(p => p.getBoundingClientRect().width < 240).length]""")
    assert width <= 390 and pictures == page.count("<img") > 0 and small == 0
