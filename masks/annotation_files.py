"""Masks drawn in annotation tools: labelme and COCO files in JSON.

Polygons are filled by pixel centres with the even-odd rule, several polygons of an object are
joined. COCO's run lengths are read plain and compressed (`run_lengths`).
"""

import base64
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from media import run_lengths

log = logging.getLogger(__name__)

MOST = 254  # the highest id: 255 means "not labelled"
NOTHING = ("_background_", "__ignore__")  # labels of labelme that are no objects
EXPECTED = ('expected a file of labelme (with "shapes") or of COCO (with "images" and '
            '"annotations")')


class Part(NamedTuple):
    """A region of an object.

    Args:
        label: the object's name or category.
        instance: with the label says which object it is, also in the masks of other frames.
        wanted: the id that the file itself gives to the object; None if it gives none.
        mask: (H, W) bool.
    """

    label: str
    instance: Hashable
    wanted: int | None
    mask: np.ndarray


def read(path: Path, frame_name: str | None = None, known: dict | None = None,
         names: dict[int, str] | None = None) -> np.ndarray:
    """Read an annotation file as (H, W) uint8: 0 background, else the object's id.

    Objects are numbered in the order of the file, but for those that the file has ids for: a
    `track_id` or a label that is a number. Where they overlap the later one is in front. The log
    says which object has which id.

    Args:
        frame_name: of the file's images takes the one that is called so, or has its number.
        known: ids of objects in other files; those of this one are added.
        names: the labels of objects by their ids, which those of this file are added to.

    Raises:
        OSError: it can't be read.
        ValueError: not such a file, no region in it, or no image for the frame.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {EXPECTED}, but it is not JSON ({error})") from None
    if not isinstance(content, dict) or not ("shapes" in content or "annotations" in content):
        raise ValueError(f"{path}: {EXPECTED}")
    try:
        parts = (_labelme(path, content) if "shapes" in content
                 else _coco(path, content, frame_name))
    except (LookupError, TypeError, AttributeError, ValueError, OSError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: {EXPECTED}; something in it is missing or of another kind "
                         f"({type(error).__name__}: {error})") from error
    if not parts:
        raise ValueError(f"{path}: expected polygons or masks, found none in it (a box can be "
                         "given by --box)")
    ids = _ids(path, parts, {} if known is None else known)
    mask, overlap = np.zeros(parts[0].mask.shape, np.uint8), 0
    for part in parts:
        object_id = ids.get((part.label, part.instance), 0)
        overlap += np.count_nonzero(mask[part.mask] * (mask[part.mask] != object_id))
        mask[part.mask] = object_id
    log.info("%s: %s", path, ", ".join(f"{label} is {i}" for (label, _), i in ids.items())
             or "no object")
    if overlap:
        log.info("%s: objects overlap in %d pixels, which go to the later one", path, overlap)
    if names is not None:
        names |= {i: label for (label, _), i in ids.items()}
    return mask


def _ids(path: Path, parts: list[Part], known: dict) -> dict[tuple[str, Hashable], int]:
    """The id of each object, in the order of the file; adds them to `known`."""
    objects = {(part.label, part.instance): part.wanted for part in parts
               if part.label not in NOTHING}
    for key in sorted(objects, key=lambda key: objects[key] is None):  # first who has an id
        if key in known:
            continue
        taken, wanted = set(known.values()), objects[key]
        free = wanted if wanted and wanted not in taken else next(
            (i for i in range(1, MOST + 1) if i not in taken), None)
        if free is None:
            raise ValueError(f"{path}: {len(objects)} objects, expected at most {MOST}")
        known[key] = free
    return {key: known[key] for key in objects}


def _number(label: str | int | None) -> int | None:
    """A label that can be an id."""
    text = str(label)
    return int(text) if text.isdecimal() and 0 < int(text) <= MOST else None


def _labelme(path: Path, content: dict) -> list[Part]:
    """Shapes of one label are objects of their own, unless they have one `group_id`."""
    shape = int(content["imageHeight"] or 0), int(content["imageWidth"] or 0)
    if not min(shape) > 0:
        raise ValueError(f"{path}: expected the image's size in imageHeight and imageWidth")
    parts, counts, others = [], Counter[str](), Counter[str]()
    for one in content["shapes"]:
        label, kind = str(one["label"]), one.get("shape_type") or "polygon"
        points = np.array(one["points"], float).reshape(-1, 2)
        if kind == "polygon":
            mask = filled(points, shape)
        elif kind == "rectangle":
            (left, top), (right, bottom) = points.min(0), points.max(0)
            mask = filled(np.array([(left, top), (right, top), (right, bottom), (left, bottom)]),
                          shape)
        elif kind == "circle":
            y, x = np.ogrid[:shape[0], :shape[1]]
            mask = np.hypot(x + 0.5 - points[0, 0], y + 0.5 - points[0, 1]) <= math.dist(*points)
        elif kind == "mask":
            mask = _placed(one["mask"], points[0], shape)
        else:
            others[kind] += 1
            continue
        instance = one.get("group_id")
        if instance is None and _number(label) is None:
            instance = f"the {counts[label] + 1}. alone"
            counts[label] += 1
        parts.append(Part(label, instance, _number(label), mask))
    if others:
        log.warning("%s: %s left out, which have no area", path,
                    ", ".join(f"{count} of shape {kind}" for kind, count in others.items()))
    return parts


def _placed(data: str, corner: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A PNG in base64, whose upper left pixel lies at `corner`, as (H, W) bool."""
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        small = np.array(image.convert("L")) > 0
    x, y = corner.astype(int)
    mask = np.zeros((max(shape[0], y + small.shape[0]), max(shape[1], x + small.shape[1])), bool)
    mask[y:y + small.shape[0], x:x + small.shape[1]] = small
    return mask[:shape[0], :shape[1]]


def _coco(path: Path, content: dict, frame_name: str | None) -> list[Part]:
    """Annotations of one image are objects of their own; a `track_id` says which."""
    image = _image(path, content["images"], frame_name)
    shape = int(image["height"]), int(image["width"])
    categories = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
    parts, counts, boxes = [], Counter[str](), 0
    for one in content["annotations"]:
        if one["image_id"] != image["id"]:
            continue
        if not one.get("segmentation"):
            boxes += 1
            continue
        label = categories.get(one.get("category_id"), "object")
        track = one.get("track_id")
        instance = f"track {track}"
        if track is None:
            instance = f"the {counts[label] + 1}. alone"
            counts[label] += 1
        try:
            mask = _segmentation(one["segmentation"], shape)
        except ValueError as error:
            raise ValueError(f"{path}: annotation {one.get('id')}: {error}") from error
        wanted = _number(label) if track is None else _number(track)
        parts.append(Part(label, instance, wanted, mask))
    if boxes:
        log.warning("%s: %d annotations without a segmentation left out", path, boxes)
    return parts


def _image(path: Path, images: list[dict], frame_name: str | None) -> dict:
    """The image of a COCO file that is meant."""
    if len(images) == 1:
        return images[0]
    if frame_name is None:
        raise ValueError(f"{path}: holds {len(images)} images, expected one")
    stems = [PureWindowsPath(image["file_name"]).stem for image in images]  # either separator
    for same in (lambda stem: stem == frame_name,
                 lambda stem: _last_number(stem) == _last_number(frame_name) is not None):
        found = [image for image, stem in zip(images, stems) if same(stem)]
        if len(found) == 1:
            log.info("%s: of its %d images the one called %s", path, len(images),
                     found[0]["file_name"])
            return found[0]
    raise ValueError(f"{path}: {len(found) or 'none'} of its {len(images)} images "
                     f"({images[0]['file_name'] if images else ''} ...) called {frame_name} as the "
                     "frame, expected one")


def _last_number(name: str) -> int | None:
    numbers = re.findall("[0-9]+", name)
    return int(numbers[-1]) if numbers else None


def _segmentation(found: dict | list, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of polygons, or of run lengths."""
    if isinstance(found, dict):
        counts = found["counts"]
        if tuple(found["size"]) != shape:
            raise ValueError(f"run lengths of {found['size'][1]}x{found['size'][0]} pixels, "
                             f"expected {shape[1]}x{shape[0]} as the image has")
        runs = run_lengths.decompress(counts) if isinstance(counts, str) else counts
        return run_lengths.decode(runs, shape)
    mask = np.zeros(shape, bool)
    for numbers in found:
        if len(numbers) % 2 or len(numbers) < 6:
            raise ValueError(f"a polygon of {len(numbers)} numbers, expected pairs, three at least")
        mask |= filled(np.array(numbers, float).reshape(-1, 2), shape)
    return mask


def filled(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels whose centres lie in a polygon of (n, 2) x and y.

    0, 0 is the upper left corner of the upper left pixel, whose centre is 0.5, 0.5.
    """
    height, width = shape
    crossed = np.zeros((height, width + 1), np.int32)  # edges that a row crosses before a pixel
    for (x, y), (u, v) in _edges(polygon):
        rows = np.arange(max(0, math.ceil(y - 0.5)), min(height, math.ceil(v - 0.5)))
        columns = np.ceil(x + (rows + 0.5 - y) * (u - x) / (v - y) - 0.5).clip(0, width)
        crossed[rows, columns.astype(int)] += 1  # no row twice
    return crossed.cumsum(1)[:, :width] % 2 == 1


def _edges(polygon: np.ndarray) -> Iterator[tuple]:
    """Those that aren't level, each from its upper to its lower end."""
    for start, end in zip(polygon.tolist(), np.roll(polygon, -1, axis=0).tolist()):
        if start[1] != end[1]:
            yield (start, end) if start[1] < end[1] else (end, start)
