"""Reads masks drawn in annotation tools: labelme and COCO files in JSON.

A polygon covers the pixels whose centres lie in it (even-odd rule); the polygons of one annotation
are joined. COCO's run lengths are read plain and compressed.
"""

import base64
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from media import images, run_lengths

log = logging.getLogger(__name__)

MAX_ID = 254  # the highest id: 255 means "not labelled"
NOT_OBJECTS = ("_background_", "__ignore__")  # reserved labels of labelme
EXPECTED = ('expected a file of labelme (with "shapes") or of COCO (with "images" and '
            '"annotations")')


class Region(NamedTuple):
    """One annotated region; an object may have several.

    Args:
        label: the object's name or category.
        instance: identifies the object among those with this label, also in files of other frames.
        file_id: the id that the file gives to the object; None if it gives none.
        mask: (H, W) bool.
    """

    label: str
    instance: Hashable
    file_id: int | None
    mask: np.ndarray


def read(path: Path, frame_name: str | None = None, assigned: dict | None = None,
         names: dict[int, str] | None = None,
         shape: tuple[int, int] | None = None) -> np.ndarray:
    """Read an annotation file as (H, W) uint8: 0 background, else the object's id.

    An object's id is its `track_id`, or its label if that is a number, or the id that `names` has
    for its label; other objects get free ids in the order of the file. Where objects overlap, the
    later one is in front. The log says which object has which id.

    Args:
        frame_name: which of several images to read: the one with this name, or with its number.
        assigned: ids of objects in other files; those of this file are added.
        names: labels of objects by id; those of this file are added.
        shape: (H, W) of the clip's frames; None if unknown. Nothing is drawn at another size.

    Raises:
        OSError: the file can't be read.
        ValueError: it is another kind of file, has no region, no image for the frame, or an image
            of another size than `shape`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {EXPECTED}, but it is not JSON ({error})") from None
    if not isinstance(content, dict) or not ("shapes" in content or "annotations" in content):
        raise ValueError(f"{path}: {EXPECTED}")
    try:
        regions = (_labelme(path, content, shape) if "shapes" in content
                   else _coco(path, content, frame_name, shape))
    except (LookupError, TypeError, AttributeError, ValueError, OSError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: {EXPECTED}; something in it is missing or of another kind "
                         f"({type(error).__name__}: {error})") from error
    if not regions:
        raise ValueError(f"{path}: expected polygons or masks, found none (a box can be passed "
                         "with --box)")
    ids = _assign_ids(path, regions, {} if assigned is None else assigned, names or {})
    mask, overlap = np.zeros(regions[0].mask.shape, np.uint8), 0
    for region in regions:
        object_id = ids.get((region.label, region.instance), 0)
        overlap += np.count_nonzero(mask[region.mask] * (mask[region.mask] != object_id))
        mask[region.mask] = object_id
    log.info("%s: %s", path, ", ".join(f"{label} is {i}" for (label, _), i in ids.items())
             or "no object")
    if overlap:
        log.info("%s: objects overlap in %d pixels, which go to the later one", path, overlap)
    if names is not None:
        names |= {i: label for (label, _), i in ids.items()}
    return mask


def _assign_ids(path: Path, regions: list[Region], assigned: dict,
                names: Mapping[int, str]) -> dict[tuple[str, Hashable], int]:
    """Return the id of each object in the order of the file, and add them to `assigned`."""
    objects = {(region.label, region.instance): region.file_id for region in regions
               if region.label not in NOT_OBJECTS}
    # objects with an id in the file come first, so that no other object takes it, then those whose
    # label has an id
    for key in sorted(objects, key=lambda key: (objects[key] is None,
                                                key[0] not in names.values())):
        if key in assigned:
            continue
        taken = set(assigned.values())
        wanted = [objects[key]] if objects[key] else [
            i for i, name in names.items() if name == key[0]]
        unused = (i for i in range(1, MAX_ID + 1) if i not in names)
        free = next((i for i in (*wanted, *unused) if i not in taken), None)
        if free is None:
            raise ValueError(f"{path}: {len(objects)} objects, expected at most {MAX_ID}")
        assigned[key] = free
    return {key: assigned[key] for key in objects}


def _label_as_id(label: str | int | None) -> int | None:
    """The label as an id; None if it can't be one."""
    text = str(label)
    return int(text) if text.isdecimal() and 0 < int(text) <= MAX_ID else None


def _labelme(path: Path, content: dict, clip_shape: tuple[int, int] | None) -> list[Region]:
    """Read labelme's shapes; those with the same label and `group_id` are one object."""
    shape = int(content["imageHeight"] or 0), int(content["imageWidth"] or 0)
    if not min(shape) > 0:
        raise ValueError(f"{path}: expected the image's size in imageHeight and imageWidth")
    images.check_same_shape("the clip", clip_shape or shape, path, shape)
    regions, counts, skipped = [], Counter[str](), Counter[str]()
    for entry in content["shapes"]:
        label, kind = str(entry["label"]), entry.get("shape_type") or "polygon"
        points = np.array(entry["points"], float).reshape(-1, 2)
        if kind == "polygon":
            mask = fill_polygon(points, shape)
        elif kind == "rectangle":
            (left, top), (right, bottom) = points.min(0), points.max(0)
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            mask = fill_polygon(np.array(corners), shape)
        elif kind == "circle":
            y, x = np.ogrid[:shape[0], :shape[1]]
            mask = np.hypot(x + 0.5 - points[0, 0], y + 0.5 - points[0, 1]) <= math.dist(*points)
        elif kind == "mask":
            mask = _place_png(entry["mask"], points[0], shape)
        else:
            skipped[kind] += 1
            continue
        instance = entry.get("group_id")
        if instance is None and _label_as_id(label) is None:
            instance = f"the {counts[label] + 1}. alone"
            counts[label] += 1
        regions.append(Region(label, instance, _label_as_id(label), mask))
    if skipped:
        log.warning("%s: %s left out, as they have no area", path,
                    ", ".join(f"{count} of shape {kind}" for kind, count in skipped.items()))
    return regions


def _place_png(data: str, corner: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Decode a base64 PNG into an (H, W) bool mask, with its upper left pixel at `corner`."""
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        small = np.array(image.convert("L")) > 0
    x, y = corner.astype(int)
    mask = np.zeros((max(shape[0], y + small.shape[0]), max(shape[1], x + small.shape[1])), bool)
    mask[y:y + small.shape[0], x:x + small.shape[1]] = small
    return mask[:shape[0], :shape[1]]


def _coco(path: Path, content: dict, frame_name: str | None,
          clip_shape: tuple[int, int] | None) -> list[Region]:
    """Read an image's annotations; those with the same label and `track_id` are one object."""
    image = _image(path, content["images"], frame_name)
    shape = int(image["height"]), int(image["width"])
    images.check_same_shape("the clip", clip_shape or shape, path, shape)
    categories = {entry["id"]: str(entry["name"]) for entry in content.get("categories", [])}
    regions, counts, boxes = [], Counter[str](), 0
    for entry in content["annotations"]:
        if entry["image_id"] != image["id"]:
            continue
        if not entry.get("segmentation"):
            boxes += 1
            continue
        label = categories.get(entry.get("category_id"), "object")
        track = entry.get("track_id")
        instance = f"track {track}"
        if track is None:
            instance = f"the {counts[label] + 1}. alone"
            counts[label] += 1
        try:
            mask = _segmentation(entry["segmentation"], shape)
        except ValueError as error:
            raise ValueError(f"{path}: annotation {entry.get('id')}: {error}") from error
        file_id = _label_as_id(label) if track is None else _label_as_id(track)
        regions.append(Region(label, instance, file_id, mask))
    if boxes:
        log.warning("%s: %d annotations without a segmentation left out", path, boxes)
    return regions


def _image(path: Path, entries: list[dict], frame_name: str | None) -> dict:
    """Select the image of a COCO file by the frame's name."""
    if len(entries) == 1:
        return entries[0]
    if frame_name is None:
        raise ValueError(f"{path}: holds {len(entries)} images, expected one")
    stems = [PureWindowsPath(image["file_name"]).stem for image in entries]  # either separator
    for same in (lambda stem: stem == frame_name,
                 lambda stem: _last_number(stem) == _last_number(frame_name) is not None):
        found = [image for image, stem in zip(entries, stems) if same(stem)]
        if len(found) == 1:
            log.info("%s: of its %d images the one called %s", path, len(entries),
                     found[0]["file_name"])
            return found[0]
    raise ValueError(f"{path}: {len(found) or 'none'} of its {len(entries)} images "
                     f"({entries[0]['file_name'] if entries else ''} ...) called {frame_name} as "
                     "the frame, expected one")


def _last_number(name: str) -> int | None:
    numbers = re.findall("[0-9]+", name)
    return int(numbers[-1]) if numbers else None


def _segmentation(value: dict | list, shape: tuple[int, int]) -> np.ndarray:
    """Decode polygons or run lengths into an (H, W) bool mask."""
    if isinstance(value, dict):
        counts = value["counts"]
        if tuple(value["size"]) != shape:
            raise ValueError(f"run lengths of {value['size'][1]}x{value['size'][0]} pixels, "
                             f"expected {shape[1]}x{shape[0]} as the image has")
        runs = run_lengths.decompress(counts) if isinstance(counts, str) else counts
        return run_lengths.decode(runs, shape)
    mask = np.zeros(shape, bool)
    for numbers in value:
        if len(numbers) % 2 or len(numbers) < 6:
            raise ValueError(f"a polygon of {len(numbers)} numbers, expected at least three pairs")
        mask |= fill_polygon(np.array(numbers, float).reshape(-1, 2), shape)
    return mask


def fill_polygon(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Rasterise a polygon: (H, W) bool, the pixels whose centres lie in it.

    Args:
        polygon: (n, 2) x and y. The centre of the upper left pixel is (0.5, 0.5).
        shape: (H, W).
    """
    height, width = shape
    crossed = np.zeros((height, width + 1), np.int32)  # edges to the left of a pixel's centre
    for (x, y), (u, v) in _edges(polygon):
        rows = np.arange(max(0, math.ceil(y - 0.5)), min(height, math.ceil(v - 0.5)))
        columns = np.ceil(x + (rows + 0.5 - y) * (u - x) / (v - y) - 0.5).clip(0, width)
        crossed[rows, columns.astype(int)] += 1  # no row twice
    return crossed.cumsum(1)[:, :width] % 2 == 1


def _edges(polygon: np.ndarray) -> Iterator[tuple]:
    """The edges that aren't horizontal, each from its upper to its lower end."""
    for start, end in zip(polygon.tolist(), np.roll(polygon, -1, axis=0).tolist()):
        if start[1] != end[1]:
            yield (start, end) if start[1] < end[1] else (end, start)
