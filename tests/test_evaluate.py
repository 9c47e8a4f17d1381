"""Files written by evaluation, and its scores against an independent scorer."""

import csv
import errno
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from conftest import ROOT, content, held
from PIL import Image
from vos_benchmark.benchmark import benchmark

import evaluate
import metrics
from davis import Davis, Sequence
from media import background, images
from tracking.tracker import Tracker

PALETTE_START = [0, 0, 0, 128, 0, 0, 0, 128, 0]


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def test_evaluation_writes_masks_tables_and_video(model, davis_2016, results, capsys):
    sequences = Davis(davis_2016, "2016", "val").sequences
    table = evaluate.evaluate(model, sequences, evaluate.Options(results=results, videos=True))
    assert sorted(p.name for p in (results / "dog").iterdir()) == [f"{i:05d}.png" for i in range(6)]
    for path in (results / "dog").iterdir():
        with Image.open(path) as mask:
            assert mask.mode == "P" and mask.size == (80, 48)
            assert mask.getpalette()[:9] == PALETTE_START
            assert set(np.unique(mask)) <= {0, 1}
    np.testing.assert_array_equal(np.array(Image.open(results / "dog/00000.png")),
                                  sequences[0].mask(0))
    video = cv2.VideoCapture(str(results / "dog.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 6
    overall, = read_csv(results / "global_results-val.csv")
    row, = read_csv(results / "per-sequence_results-val.csv")
    assert row["Sequence"] == "dog"
    for measure in metrics.MEASURES:
        assert float(overall[measure]) == pytest.approx(table["dog"][measure], abs=1e-5)
        assert float(row[measure]) == pytest.approx(table["dog"][measure], abs=1e-5)
    printed = capsys.readouterr().out
    assert "J&F-Mean" in printed and "frames per second" in printed


def test_many_objects_have_a_row_each(model, davis_2017, results):
    sequences = Davis(davis_2017, "2017", "val").sequences
    table = evaluate.evaluate(model, sequences, evaluate.Options(results=results))
    assert list(table) == ["dog_1", "dog_2"]
    overall, = read_csv(results / "global_results-val.csv")
    mean = np.mean([table[name]["J-Mean"] for name in table])
    assert float(overall["J-Mean"]) == pytest.approx(mean, abs=1e-5)


def test_masks_have_the_frame_size_at_any_network_size(model, davis_2016, results):
    sequences = Davis(davis_2016, "2016", "val").sequences
    options = evaluate.Options(results=results, input_shape=(96, 160), segmentation_shape=(24, 40))
    evaluate.evaluate(model, sequences, options)
    mask = np.array(Image.open(results / "dog/00003.png"))
    assert mask.shape == (48, 80)
    np.testing.assert_array_equal(mask, mask[::2, ::2].repeat(2, 0).repeat(2, 1))


def test_scoring_written_masks_gives_the_same_table(model, davis_2017, results):
    sequences = Davis(davis_2017, "2017", "train").sequences
    table = evaluate.evaluate(model, sequences, evaluate.Options(results=results))
    again = evaluate.table(evaluate.score_folder(results, sequences))
    assert table.keys() == again.keys()
    for name in table:
        assert table[name] == pytest.approx(again[name], abs=1e-12)


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_scores(model, davis_2017, results):
    sequences = Davis(davis_2017, "2017", "train").sequences
    evaluate.evaluate(model, sequences, evaluate.Options(results=results))
    tables = [evaluate.table(evaluate.score_folder(results, sequences, workers))
              for workers in (1, 2, 3)]
    assert tables[0] == tables[1] == tables[2]
    assert list(tables[0]) == list(tables[2]) == ["ant", "bee_1", "bee_2"]


def test_ground_truth_scores_one(davis_2016):
    sequences = Davis(davis_2016).sequences
    table = evaluate.table(evaluate.score_folder(davis_2016 / "Annotations" / "480p", sequences))
    for row in table.values():
        assert row == {m: 0.0 if "Decay" in m else 1.0 for m in metrics.MEASURES}


def test_the_first_and_last_frame_are_not_scored(davis_2016, tmp_path):
    sequence, = Davis(davis_2016, names=["ant"]).sequences
    folder = tmp_path / "ant"
    folder.mkdir()
    for i in range(len(sequence)):
        mask = sequence.mask(i) if 0 < i < 5 else np.zeros((48, 80), np.uint8)
        Image.fromarray(mask * 255).save(folder / f"{i:05d}.png")
    table = evaluate.table(evaluate.score_folder(tmp_path, [sequence]))
    assert table["ant"]["J-Mean"] == 1


@pytest.mark.parametrize("year", ["2016", "2017"])
def test_scores_agree_with_vos_benchmark(year, model, davis_2017, results, tmp_path):
    sequences = Davis(davis_2017, year, "val").sequences
    table = evaluate.evaluate(model, sequences, evaluate.Options(results=results))
    assert_agrees(sequences, results, table, tmp_path / "truth")


def test_scores_agree_with_vos_benchmark_on_real_video(model, davis_dir, results, tmp_path):
    sequence = Davis(davis_dir, "2016", "train").sequences[0]
    short = type(sequence)(sequence.name, sequence.images[:8], sequence.masks[:8])
    options = evaluate.Options(results=results, input_shape=(240, 427))
    table = evaluate.evaluate(model, [short], options)
    assert 0 < table[short.name]["J-Mean"] < 1
    assert_agrees([short], results, table, tmp_path / "truth")


def assert_agrees(sequences, results, table, truth_folder):
    for sequence in sequences:
        (truth_folder / sequence.name).mkdir(parents=True)
        for i, path in enumerate(sequence.masks):
            Image.fromarray(sequence.mask(i)).save(truth_folder / sequence.name / path.name)
    jf, j, f, _ = benchmark([truth_folder], [results], verbose=False, num_processes=1)
    mean = metrics.average(list(table.values()))
    assert mean["J-Mean"] == pytest.approx(j[0] / 100, abs=1e-9)
    assert mean["F-Mean"] == pytest.approx(f[0] / 100, abs=1e-9)
    assert mean["J&F-Mean"] == pytest.approx(jf[0] / 100, abs=1e-9)


def test_an_empty_reference_mask_is_named(model, davis_2016):
    sequence, = Davis(davis_2016, names=["ant"]).sequences
    Image.fromarray(np.zeros((48, 80), np.uint8)).save(sequence.masks[0])
    with pytest.raises(ValueError, match="00000.png.*no object"):
        evaluate.evaluate(model, [sequence], evaluate.Options())


def test_each_frame_is_read_once(model, davis_2016, results, monkeypatch):
    sequence, = Davis(davis_2016, names=["ant"]).sequences
    read, image = [], Sequence.image
    monkeypatch.setattr(Sequence, "image", lambda self, i: read.append(i) or image(self, i))
    evaluate.segment_sequence(model, sequence, evaluate.Options(results=results, videos=True))
    assert read == list(range(6))


@pytest.fixture
def slow_writes(monkeypatch):
    """Record the names of masks written, each more slowly than a frame is segmented."""
    names, write_mask = [], images.write_mask

    def write(path, mask):
        time.sleep(0.2)
        write_mask(path, mask)
        names.append(path.name)

    monkeypatch.setattr(images, "write_mask", write)
    return names


@pytest.fixture
def interruptible():
    """Let Ctrl+C interrupt, which background jobs of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_the_masks_segmented_so_far(model, davis_2016, results, slow_writes,
                                                     monkeypatch):
    sequence, = Davis(davis_2016, names=["ant"]).sequences
    segmented, step = [], Tracker.step

    def interrupted(*arguments):
        if len(segmented) == 4:
            signal.raise_signal(signal.SIGINT)
        segmented.append(step(*arguments))
        return segmented[-1]

    monkeypatch.setattr(Tracker, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(model, [sequence], evaluate.Options(results=results, videos=True,
                                                                  size=0))
    assert slow_writes == [f"{i:05d}.png" for i in range(5)]  # the frame under way ends whole
    np.testing.assert_array_equal(segmented[0].mask, sequence.mask(0))
    for path, found in zip(sorted((results / "ant").iterdir()), segmented, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(path)), found.mask)
    # no half of a video
    assert sorted(path.name for path in results.iterdir()) == [
        ".ant.progress", ".lock", "ant", "ant.confidence.csv", "manifest.json"]


def test_a_slow_writer_keeps_all_frames_in_order(model, davis_2016, results, slow_writes):
    sequence, = Davis(davis_2016, names=["ant"]).sequences
    evaluate.evaluate(model, [sequence], evaluate.Options(results=results))
    assert slow_writes == [path.name for path in sequence.masks]


@pytest.mark.parametrize("frame", [0, 2, 5])  # the last: when nothing is left to segment
def test_a_writer_error_ends_the_run(frame, model, davis_2016, results):
    sequence, = Davis(davis_2016, names=["ant"]).sequences
    (results / "ant" / f"{frame:05d}.png").mkdir(parents=True)
    with pytest.raises(OSError, match=f"{frame:05d}.png"):
        evaluate.evaluate(model, [sequence], evaluate.Options(results=results, overwrite=True))


def test_a_damaged_frame_ends_the_run_with_the_masks_before_it(model, davis_2016, results):
    sequence, = Davis(davis_2016, names=["ant"]).sequences
    sequence.images[4].write_bytes(sequence.images[4].read_bytes()[:300])
    with pytest.raises(OSError, match="00004.jpg"):
        evaluate.evaluate(model, [sequence], evaluate.Options(results=results))
    assert sorted(p.name for p in (results / "ant").iterdir()) == [f"{i:05d}.png" for i in range(4)]


def test_nothing_is_written_after_a_failed_write():
    """In particular no state to resume from, as an earlier frame would lack its mask."""
    written = []

    def write(frame):
        if frame == 2:
            raise OSError("the disk is full")
        written.append(frame)

    with pytest.raises(OSError, match="full"), background.Background(write) as later:
        for frame in range(9):
            later(frame)
    assert written == [0, 1]


def test_only_a_few_frames_are_read_ahead():
    taken, most = 0, 0

    def read(i):
        nonlocal most
        most = max(most, i - taken)
        return i

    with ThreadPoolExecutor(2) as pool:
        for i in background.ahead(pool, read, range(50)):
            assert i == taken
            time.sleep(0.002)
            taken += 1
    assert taken == 50 and 1 <= most <= background.AHEAD + 1


def script(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)],
                          capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_scores_masks_of_other_tools(davis_2016):
    masks = davis_2016 / "Annotations" / "480p"
    run = script(masks, "-d", davis_2016, "-t", "train")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2].split() == ["all"] + ["1.000"] * 3 + ["0.000", "1.000",
                                                                           "1.000", "0.000"]
    assert (masks / "global_results-train.csv").is_file() and (masks / "report.html").is_file()


def copied(masks, folder, *names):
    for name in names:
        shutil.copytree(masks / name, folder / name)
    return folder


@pytest.mark.slow
def test_scoring_some_sequences_keeps_the_tables_and_report_of_all(davis_2016, tmp_path):
    masks = copied(davis_2016 / "Annotations" / "480p", tmp_path / "out", "ant", "bee", "cat")
    assert script(masks, "-d", davis_2016, "-t", "train").returncode == 0
    before = content(masks)
    run = script(masks, "-d", davis_2016, "-t", "train", "-q", "bee")
    assert run.returncode == 0 and "bee" in run.stdout and "ant" not in run.stdout
    assert "the tables of the whole set were not" in run.stderr
    after = content(masks)
    assert {path.name for path in after.keys() - before.keys()} == {"report_selected.html"}
    assert all(after[path] == before[path] for path in before)


def test_evaluating_some_sequences_keeps_the_rows_of_the_others(
        model, davis_2016, results):
    sequences = Davis(davis_2016, set="train").sequences
    options = evaluate.Options(results=results, set_name="train")
    evaluate.evaluate(model, sequences, options)
    before = content(results)
    evaluate.evaluate(model, sequences[:1], options)
    after = content(results)
    assert {path.name for path in after.keys() - before.keys()} == {"report_selected.html"}
    assert all(after[path] == before[path] for path in before)
    options.set_name = "val"  # whose table holds no row of another set
    evaluate.evaluate(model, Davis(davis_2016, set="val").sequences, options)
    rows = read_csv(results / "per-sequence_results-val.csv")
    assert [row["Sequence"] for row in rows] == ["dog"]


@pytest.mark.slow
def test_two_folders_with_the_same_name_get_different_labels(davis_2016, tmp_path):
    masks = davis_2016 / "Annotations" / "480p"
    folders = [copied(masks, tmp_path / way / "results", "ant") for way in ("old", "new")]
    assert script(*folders, "-d", davis_2016, "-t", "train", "-q", "ant").returncode == 0
    page = (folders[1] / "against_results_selected.html").read_text()
    assert "old/results against new/results" in page
    names = evaluate.folder_labels
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names([tmp_path / "a", tmp_path / "x" / ".." / "a"]) == ["a (1)", "a (2)"]


# a read-only folder, a full disk
@pytest.mark.parametrize("refuses", ["lock_folder", "atomic_path"])
def test_tables_are_printed_even_if_they_cannot_be_written(refuses, davis_2016, monkeypatch, capsys,
                                                         caplog):
    masks = davis_2016 / "Annotations" / "480p"

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for module in (evaluate, evaluate.report.files):
        monkeypatch.setattr(module, "atomic_path", refuse)
    if refuses == "lock_folder":
        monkeypatch.setattr(evaluate, "lock_folder", refuse)
    evaluate.compare([masks], Davis(davis_2016, set="train").sequences, "train")
    assert capsys.readouterr().out.splitlines()[-1].startswith("all ")
    assert "not all tables and reports could be written" in caplog.text
    assert not list(masks.glob("*.csv")) + list(masks.glob("*.html"))


@pytest.mark.slow
def test_results_being_written_by_another_run_are_not_scored(davis_2016):
    masks = davis_2016 / "Annotations" / "480p"
    with held(masks) as other:
        run = script(masks, "-d", davis_2016, "-t", "train")
    assert run.returncode == 2
    assert f"{masks}: another run is writing there (process {other.pid}" in run.stderr


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: (folder / "ant/00002.png").unlink(), "00002.png"),
    (lambda folder: Image.new("L", (8, 9)).save(folder / "ant/00003.png"), "00003.png.*8x9.*80x48"),
    (lambda folder: noise().save(folder / "ant/00003.png"),
     "00003.png.*colour"),
])
def test_bad_results_are_named(spoil, message, davis_2016, tmp_path):
    sequence, = Davis(davis_2016, names=["ant"]).sequences
    (tmp_path / "ant").mkdir()
    for i, path in enumerate(sequence.masks):
        Image.fromarray(sequence.mask(i)).save(tmp_path / "ant" / path.name)
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.score_folder(tmp_path, [sequence])


def results_of(sequence, folder, change):
    """Write `change(mask)` of the true masks to `folder`."""
    (folder / sequence.name).mkdir(parents=True)
    for i, path in enumerate(sequence.masks):
        images.write_mask(folder / sequence.name / path.name, change(sequence.mask(i)))


@pytest.mark.slow
@pytest.mark.parametrize("colours", [False, True])  # 255 of DAVIS' palette is a colour
def test_unlabelled_pixels_are_not_scored(model, davis_2017, tmp_path, colours):
    folder = davis_2017 / "Annotations" / "480p" / "dog"
    for path in sorted(folder.iterdir())[1:]:
        mask = np.array(Image.open(path))
        mask[(mask == 0) & (cv2.dilate(mask, np.ones((9, 9))) > 0)] = 255  # a wide outline
        images.write_mask(path, mask)
        if colours:
            Image.open(path).convert("RGB").save(path)
    sequence, = Davis(davis_2017, "2017", "val").sequences
    results_of(sequence, tmp_path, lambda mask: cv2.dilate(mask, np.ones((5, 5))))
    table = evaluate.table(evaluate.score_folder(tmp_path, [sequence]))
    assert [row["J&F-Mean"] for row in table.values()] == [1.0, 1.0]
    # as while it is segmented
    found = evaluate.evaluate(model, [sequence], evaluate.Options(results=tmp_path / "own"))
    assert found == evaluate.table(evaluate.score_folder(tmp_path / "own", [sequence]))


@pytest.mark.parametrize("change, words", [
    (lambda mask: np.where(mask == 2, 3, mask), ["not scored", "bee has 3", "ground truth 1, 2"]),
    (lambda mask: mask * 0, ["all masks are empty", "bee"]),
    (lambda mask: mask, [])])
def test_unknown_ids_and_empty_masks_are_warned_about_once(change, words, davis_2017,
                                                                     tmp_path, caplog):
    sequences = Davis(davis_2017, "2017", "train", names=["bee"]).sequences
    results_of(sequences[0], tmp_path, lambda mask: change(mask).astype(np.uint8))
    evaluate.score_folder(tmp_path, sequences)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(words)
    assert all(word in warnings[0] and str(tmp_path) in warnings[0] for word in words)
