"""Masks as other tools read them: COCO by pycocotools, YOLO labels as Ultralytics has them."""

import csv
import json
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from media import run_lengths
from media.clip import Clip
from outputs.annotations import CocoSink, YoloSink, polygon
from tracking.pipeline import Frame

SMALL = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


class Numbered(Clip):
    """A folder of frames numbered from 1."""

    def __init__(self, folder):
        self.path, self.numbers = folder, [1, 2, 3, 20, 21]
        self.files = [folder / f"f{number:03d}.jpg" for number in self.numbers]
        self.count = len(self.files)

    def frame_name(self, frame):
        return self.files[frame].stem


class Video(Clip):
    def __init__(self, path):
        self.path, self.files, self.count = path, [path], 100


def frame(index, mask):
    return Frame(index, np.zeros((*mask.shape, 3), np.uint8), None, True, None, mask)


def squares():
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 3:22], mask[15:35, 30:50], mask[2:9, 40:55] = 1, 7, 7
    return mask


def ring(shape=(96, 160)):
    y, x = np.mgrid[:shape[0], :shape[1]]
    apart = (y - 48) ** 2 + (x - 60) ** 2
    return (apart < 30 ** 2) & (apart > 14 ** 2)


@given(SMALL)
def test_run_lengths_match_coco(mask):
    coco = pytest.importorskip("pycocotools.mask")
    runs = run_lengths.encode(mask)
    height, width = mask.shape
    code = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    assert run_lengths.compress(runs) == code["counts"].decode()
    np.testing.assert_array_equal(coco.decode(code), mask)
    assert run_lengths.decompress(code["counts"].decode()) == runs
    np.testing.assert_array_equal(run_lengths.decode(runs, mask.shape), mask)


@given(st.lists(st.integers(0, 2**21), min_size=1, max_size=12))
def test_long_run_lengths_match_coco(runs):
    coco = pytest.importorskip("pycocotools.mask")
    size = [1, sum(runs)]
    code = coco.frPyObjects({"size": size, "counts": runs}, *size)
    assert run_lengths.compress(runs) == code["counts"].decode()
    assert run_lengths.decompress(code["counts"].decode()) == runs


@pytest.mark.parametrize("text", ["01", "0~", "`", "Ü"])
def test_damaged_run_lengths_are_refused(text):
    with pytest.raises(ValueError, match="run"):
        run_lengths.decode(run_lengths.decompress(text), (2, 2))


def test_pycocotools_reads_the_coco_file(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    with CocoSink(tmp_path / "a.json", Numbered(tmp_path), {7: "cat"}) as sink:
        for index in (2, 1, 0, 3):  # as they come where the first mask is of frame 2
            sink.write(frame(index, squares() * (index > 0)))
    found = coco.COCO(str(tmp_path / "a.json"))
    assert [(i, found.imgs[i]["file_name"]) for i in found.imgs] == [
        (1, "f001.jpg"), (2, "f002.jpg"), (3, "f003.jpg"), (20, "f020.jpg")]
    assert [found.cats[i]["name"] for i in sorted(found.cats)] == ["cat", "object"]
    assert sorted(found.anns) == [1, 2, 3, 4, 5, 6]
    for number, ids in ((1, []), (2, [1, 7]), (3, [1, 7]), (20, [1, 7])):
        anns = found.loadAnns(found.getAnnIds(imgIds=[number]))
        assert [a["track_id"] for a in anns] == ids
        for a in anns:
            mask = squares() == a["track_id"]
            np.testing.assert_array_equal(found.annToMask(a), mask)
            assert a["area"] == mask.sum()
            ys, xs = np.nonzero(mask)
            assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert found.cats[a["category_id"]]["name"] == ("cat" if a["track_id"] == 7
                                                            else "object")
    assert found.getAnnIds(catIds=found.getCatIds(catNms=["cat"])) == [2, 4, 6]


def test_video_frames_are_named_as_ffmpeg_extracts_them(tmp_path):
    with CocoSink(tmp_path / "a.json", Video(tmp_path / "clip.mp4")) as sink:
        sink.write(frame(12, squares()))
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(one["id"], one["file_name"]) for one in found["images"]] == [(12, "00012.png")]
    assert found["categories"] == [{"id": 1, "name": "object"}]


@pytest.mark.parametrize("kind, name", [(CocoSink, "a.json"), (YoloSink, "labels")])
def test_a_failed_run_leaves_no_finished_file(kind, name, tmp_path):
    with pytest.raises(OSError), kind(tmp_path / name, Video(tmp_path / "clip.mp4")) as sink:
        sink.write(frame(0, squares()))
        raise OSError
    assert not [*tmp_path.glob("*.json"), *tmp_path.glob("*.csv"), *tmp_path.glob("*.yaml")]


@pytest.mark.parametrize("kind, name", [(CocoSink, "a.json"), (YoloSink, "labels")])
def test_memory_does_not_grow_with_the_clip_length(kind, name, tmp_path):
    ragged = np.random.default_rng(0).random((64, 64)) > 0.5
    ragged = frame(0, cv2.morphologyEx(ragged.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3))))
    tracemalloc.start()
    with kind(tmp_path / name, Video(tmp_path / "clip.mp4")) as sink:
        held = []
        for index in range(60):
            ragged.index = index
            sink.write(ragged)
            held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert held[-1] - held[20] < 40 * 1000  # bytes a frame


def ultralytics(path, shape):
    """Class and mask of each line of a label file, read as Ultralytics documents it.

    A row is a class and pairs of x and y in [0, 1]; a row of five values would be a box. Polygons
    are filled at whole pixels. Identical rows would be dropped, and so is not a second one.
    """
    rows = [line.split() for line in path.read_text().splitlines()]
    found = []
    for row in rows:
        assert len(row) >= 7 and len(row) % 2 == 1
        points = np.array(row[1:], np.float32).reshape(-1, 2)
        assert points.min() >= 0 and points.max() <= 1
        assert (points.max(0) > points.min(0)).all(), "a box without an area"
        mask = np.zeros(shape, np.uint8)
        cv2.fillPoly(mask, [(points * shape[::-1]).astype(np.int32)], 1)
        found.append((int(row[0]), mask > 0))
    return found


def test_each_object_is_one_line_of_yolo_labels(tmp_path):
    with YoloSink(tmp_path / "labels", Numbered(tmp_path), {1: "dog", 7: "cat: black"}) as sink:
        for index in (1, 0, 3):
            sink.write(frame(index, squares() * (index > 0)))
    assert (tmp_path / "labels" / "f001.txt").read_text() == ""
    for name in ("f002", "f020"):
        (first, dog), (second, cat) = ultralytics(tmp_path / "labels" / f"{name}.txt", (40, 60))
        assert (first, second) == (0, 1)
        np.testing.assert_array_equal(dog, squares() == 1)
        truth = squares() == 7  # of two parts, 6 pixels from each other
        assert cat[truth].all() and np.count_nonzero(cat & ~truth) <= 7
    rows = list(csv.reader((tmp_path / "tracks.csv").open(newline="")))
    assert rows == [["frame", "file", "line", "track_id"],
                    ["2", "labels/f002.txt", "1", "1"], ["2", "labels/f002.txt", "2", "7"],
                    ["20", "labels/f020.txt", "1", "1"], ["20", "labels/f020.txt", "2", "7"]]
    lines = (tmp_path / "data.yaml").read_text().splitlines()
    assert lines[-5:] == ["train: images", "val: images", "names:", '  0: "dog"',
                          '  1: "cat: black"']


@given(SMALL.filter(np.any))
def test_filled_polygons_equal_the_mask_except_for_slits_between_parts(mask):
    points = polygon(mask)
    assert len(points) >= 3 and points.min() >= 0 and points.max() <= 1
    filled = np.zeros(mask.shape, np.uint8)
    cv2.fillPoly(filled, [np.floor(points * mask.shape[::-1] + 1e-9).astype(np.int32)], 1)
    assert filled[mask].all()
    if cv2.connectedComponents(mask.astype(np.uint8))[0] == 2:
        np.testing.assert_array_equal(filled > 0, mask)


def test_a_hole_stays_a_hole_under_either_fill_rule():
    mask = ring()
    mask[46:51, 58:63] = True  # another part, within the hole
    mask[20:24, 58:60] = False  # a second hole
    points = polygon(mask) * mask.shape[::-1]
    even_odd = np.zeros(mask.shape, np.uint8)
    cv2.fillPoly(even_odd, [points.astype(np.int32)], 1)
    assert even_odd[mask].all() and np.count_nonzero(even_odd.astype(bool) & ~mask) < 14
    y, x = np.mgrid[:mask.shape[0], :mask.shape[1]] + 0.49
    winding = np.zeros(mask.shape, int)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0)):
        left = (x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)
        winding += ((y1 <= y) & (y < y2) & (left > 0)).astype(int) - (
            (y2 <= y) & (y < y1) & (left < 0))
    # the polygon runs through the centres of the outermost pixels, so half of these are outside
    assert set(np.unique(winding)) <= {-1, 0} or set(np.unique(winding)) <= {0, 1}
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) > 0
    outside = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) == 0
    assert winding[inside].all() and not winding[outside].any()
