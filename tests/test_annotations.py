"""Masks as other tools read them: COCO by pycocotools, YOLO's polygons filled again."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from annotations import Coco, Yolo, run_lengths
from segment import Frame


class Named:
    def frame_name(self, index):
        return f"f{index:03d}"


def frame(index, mask):
    return Frame(index, np.zeros((*mask.shape, 3), np.uint8), None, True, None, mask)


def squares():
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 3:22], mask[15:35, 30:50], mask[2:9, 40:55] = 1, 7, 7
    return mask


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_are_cocos(mask):
    coco = pytest.importorskip("pycocotools.mask")
    height, width = mask.shape
    code = coco.frPyObjects({"size": [height, width], "counts": run_lengths(mask)}, height, width)
    np.testing.assert_array_equal(coco.decode(code), mask)


def test_a_coco_file_is_read_by_its_own_code(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    with Coco(tmp_path / "a.json", Named()) as sink:
        for index in (2, 1, 3):  # as they come where the first mask is of frame 2
            sink.write(frame(index, squares() * (index > 1)))
    found = coco.COCO(str(tmp_path / "a.json"))
    assert [found.imgs[i]["file_name"] for i in sorted(found.imgs)] == ["f001", "f002", "f003"]
    for index, ids in ((1, []), (2, [1, 7]), (3, [1, 7])):
        anns = found.loadAnns(found.getAnnIds(imgIds=[index]))
        assert [a["track_id"] for a in anns] == ids
        for a in anns:
            mask = squares() == a["track_id"]
            np.testing.assert_array_equal(found.annToMask(a), mask)
            assert a["area"] == mask.sum()
            ys, xs = np.nonzero(mask)
            assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_a_coco_file_of_a_run_that_failed_is_not_written(tmp_path):
    with pytest.raises(OSError), Coco(tmp_path / "a.json", Named()) as sink:
        sink.write(frame(0, squares()))
        raise OSError
    assert not (tmp_path / "a.json").exists()


def test_yolo_polygons_fill_the_masks(tmp_path):
    with Yolo(tmp_path, Named()) as sink:
        sink.write(frame(4, squares()))
    filled = np.zeros((40, 60), np.uint8)
    for line in (tmp_path / "f004.txt").read_text().splitlines():
        name, *numbers, track = line.split()
        points = np.array(numbers, float).reshape(-1, 2) * (60, 40) - 0.5
        assert name == "0" and (points >= 0).all()
        cv2.fillPoly(filled, [points.round().astype(np.int32)], int(track))
    np.testing.assert_array_equal(filled, squares())


def test_coco_is_plain_json(tmp_path):
    with Coco(tmp_path / "a.json", Named()) as sink:
        sink.write(frame(0, squares()))
    assert json.loads((tmp_path / "a.json").read_text())["annotations"][0]["id"] == 1
