"""Masks from labelme and COCO files, against pycocotools, Matplotlib and by hand."""

import base64
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from masks import annotation_files
from masks.read import read_masks
from media import run_lengths
from media.clip import Clip
from outputs.annotations import CocoSink
from tracking.pipeline import Frame

SHAPE = (40, 60)


def star(rng, shape=SHAPE, points=9):
    """A polygon that does not cross itself."""
    angles = np.sort(rng.random(points)) * 2 * np.pi
    radii = rng.uniform(0.2, 0.6, points) * min(shape)
    return np.stack([shape[1] / 2 + radii * np.cos(angles), shape[0] / 2 + radii * np.sin(angles)],
                    1)


def overlap(a, b):
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


def test_a_polygon_covers_pixels_whose_centres_lie_in_it():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SHAPE[0], :SHAPE[1]] + 0.5
    for _ in range(20):
        polygon = star(rng)
        inside = Outline(polygon).contains_points(np.stack([x.ravel(), y.ravel()], 1))
        np.testing.assert_array_equal(annotation_files.fill_polygon(polygon, SHAPE),
                                      inside.reshape(SHAPE))


def test_filled_polygons_match_pycocotools_except_at_the_edge():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(1)
    for _ in range(10):
        polygon = 8 * star(rng)
        shape = 8 * SHAPE[0], 8 * SHAPE[1]
        code = coco.frPyObjects([polygon.ravel().tolist()], *shape)
        filled = annotation_files.fill_polygon(polygon, shape)
        assert overlap(filled, coco.decode(code)[..., 0] > 0) > 0.98


def square(x, y, side=10, **more):
    return {"label": "a", "points": [[x, y], [x + side, y], [x + side, y + side], [x, y + side]],
            "group_id": None, "shape_type": "polygon", **more}


def labelme(path, *shapes):
    path.write_text(json.dumps({"version": "5.4.1", "flags": {}, "shapes": shapes,
                                "imagePath": "0.png", "imageData": None,
                                "imageHeight": SHAPE[0], "imageWidth": SHAPE[1]}))
    return path


def drawn(**squares):
    """(H, W) from x, y and side of a square for each id."""
    mask = np.zeros(SHAPE, np.uint8)
    for name, (x, y, side) in squares.items():
        mask[y:y + side, x:x + side] = int(name[1:])
    return mask


def test_labelme_shapes_are_objects_and_groups_are_one_object(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    small = io.BytesIO()
    Image.fromarray(np.full((10, 10), 255, np.uint8)).save(small, "PNG")
    path = labelme(
        tmp_path / "m.json", square(0, 0), square(20, 0), square(0, 20, label="b", group_id=7),
        square(20, 20, label="b", group_id=7), square(20, 20, 4, label="_background_"),
        {"label": "c", "points": [[50, 10], [40, 0]], "shape_type": "rectangle"},
        {"label": "d", "points": [[40, 20], [49, 29]], "shape_type": "mask",
         "mask": base64.b64encode(small.getvalue()).decode()},
        square(50, 30, 8, label="250"), {"label": "e", "points": [[1, 1]], "shape_type": "point"})
    names = {}
    expected = drawn(_1=(0, 0, 10), _2=(20, 0, 10), _3=(0, 20, 10), _4=(40, 0, 10), _5=(40, 20, 10),
                     _250=(50, 30, 8))
    expected[20:30, 20:30], expected[20:24, 20:24] = 3, 0
    np.testing.assert_array_equal(annotation_files.read(path, names=names), expected)
    assert names == {1: "a", 2: "a", 3: "b", 4: "c", 5: "d", 250: "250"}
    assert "m.json: a is 1, a is 2, b is 3, c is 4, d is 5, 250 is 250" in caplog.text
    assert "1 of shape point left out" in caplog.text


def test_a_circle_is_filled(tmp_path):
    path = labelme(tmp_path / "m.json", {"label": "a", "points": [[30, 20], [30, 30]],
                                         "shape_type": "circle"})
    y, x = np.mgrid[:SHAPE[0], :SHAPE[1]] + 0.5
    np.testing.assert_array_equal(annotation_files.read(path) > 0, np.hypot(x - 30, y - 20) <= 10)


def test_an_object_keeps_its_id_in_the_masks_of_later_frames(tmp_path):
    first = labelme(tmp_path / "1.json", square(0, 0, label="cat"), square(20, 0, label="dog"))
    later = labelme(tmp_path / "2.json", square(0, 20, label="bird"), square(20, 20, label="dog"))
    names = {}
    found = read_masks({0: [first], 9: [later]}, names=names)
    np.testing.assert_array_equal(found[0], drawn(_1=(0, 0, 10), _2=(20, 0, 10)))
    np.testing.assert_array_equal(found[9], drawn(_3=(0, 20, 10), _2=(20, 20, 10)))
    assert names == {1: "cat", 2: "dog", 3: "bird"}


def coco_file(path, segmentations, images=None, **more):
    path.write_text(json.dumps({
        "images": images or [{"id": 5, "file_name": "a/b.jpg", "height": SHAPE[0],
                              "width": SHAPE[1]}],
        "annotations": [{"id": i, "image_id": 5, "category_id": 1, "segmentation": one, **more}
                        for i, one in enumerate(segmentations, 1)],
        "categories": [{"id": 1, "name": "cat"}]}))
    return path


def test_coco_masks_are_read_as_pycocotools_reads_them(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    mask = np.random.default_rng(0).random(SHAPE) > 0.5
    runs = run_lengths.encode(mask[:, ::-1])
    corners = [[2, 2, 12, 2, 12, 12, 2, 12], [30, 20, 40, 20, 40, 30, 30, 30]]
    for one in (corners, {"size": [*SHAPE], "counts": runs},
                {"size": [*SHAPE], "counts": run_lengths.compress(run_lengths.encode(mask))}):
        path = coco_file(tmp_path / "m.json", [one])
        read = coco.COCO(str(path))
        np.testing.assert_array_equal(annotation_files.read(path), read.annToMask(read.anns[1]))


def test_each_coco_annotation_is_an_object_and_later_ones_are_in_front(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    boxes = [[0, 0, 10, 0, 10, 10, 0, 10]], [[5, 5, 15, 5, 15, 15, 5, 15]], []
    expected = drawn(_1=(0, 0, 10), _2=(5, 5, 10))
    read = annotation_files.read(coco_file(tmp_path / "m.json", boxes))
    np.testing.assert_array_equal(read, expected)
    assert "cat is 1, cat is 2" in caplog.text and "overlap in 25 pixels" in caplog.text
    assert "1 annotations without a segmentation left out" in caplog.text


class Named(Clip):
    path, files, count = Path("clip.mp4"), [Path("clip.mp4")], 100


def test_an_exported_coco_file_is_read_back_exactly(tmp_path):
    masks = {4: drawn(_1=(0, 0, 10), _7=(20, 0, 10)), 5: drawn(_7=(30, 20, 10))}
    with CocoSink(tmp_path / "a.json", Named(), {1: "cat", 7: "dog"}) as sink:
        for index, mask in masks.items():
            sink.write(Frame(index, np.zeros((*SHAPE, 3), np.uint8), None, True, None, mask))
    names = {}
    found = read_masks({4: [tmp_path / "a.json"], 5: [tmp_path / "a.json"]}, names=names,
                       frame_names={4: "00004", 5: "frame_000005"})  # as CVAT calls it
    for index, mask in masks.items():
        np.testing.assert_array_equal(found[index], mask)
    assert names == {1: "cat", 7: "dog"}
    with pytest.raises(ValueError, match="a.json: none of its 2 images .* called 00006"):
        read_masks({6: [tmp_path / "a.json"]}, frame_names={6: "00006"})


SIZE = {"height": SHAPE[0], "width": SHAPE[1]}


@pytest.mark.parametrize("content, message", [
    ("{", "not JSON"), ("[]", "expected a file of labelme"), ('{"a": 1}', "expected a file of"),
    ('{"shapes": []}', "imageHeight"), ('{"shapes": [{}], "imageHeight": 9, "imageWidth": 9}',
                                        "KeyError: 'label'"),
    ('{"shapes": [{"label": "a", "points": [[1, 2], [3]]}], "imageHeight": 9, "imageWidth": 9}',
     "ValueError"),
    ('{"shapes": [{"label": "a", "points": [[1, 2]], "shape_type": "mask", "mask": "x"}], '
     '"imageHeight": 9, "imageWidth": 9}', "Error"),
    ('{"shapes": [], "imageHeight": 9, "imageWidth": 9}', "found none"),
    ('{"images": [], "annotations": []}', "holds 0 images"),
    (json.dumps({"images": [{"id": 1, **SIZE}], "annotations": [
        {"image_id": 1, "id": 3, "segmentation": {"size": [9, 9], "counts": [81]}}]}),
     "annotation 3: run lengths of 9x9 pixels, expected 60x40"),
    (json.dumps({"images": [{"id": 1, **SIZE}], "annotations": [
        {"image_id": 1, "id": 3, "segmentation": {"size": [*SHAPE], "counts": "01"}}]}),
     "annotation 3: runs of"),
    (json.dumps({"images": [{"id": 1, **SIZE}], "annotations": [
        {"image_id": 1, "id": 3, "segmentation": [[1, 2, 3, 4]]}]}), "a polygon of 4 numbers")])
def test_a_file_without_annotations_is_named(content, message, tmp_path):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(ValueError, match="m.json: ") as found:
        annotation_files.read(tmp_path / "m.json")
    assert message in str(found.value) and "\n" not in str(found.value)
