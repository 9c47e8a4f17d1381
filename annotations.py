"""A clip's masks as annotations that other tools read: COCO with run lengths, YOLO with polygons.

Sinks like those of `sinks.py`, from masks alone; what the objects are called nobody knows here, so
all are of one category and their ids are track ids.
"""

import json
from pathlib import Path

import cv2
import numpy as np

from media import files
from media.video import Clip
from segment import Frame, Sink

FORMATS = ("coco", "yolo")
CATEGORY = "object"


def run_lengths(mask: np.ndarray) -> list[int]:
    """(H, W) bool -> COCO's uncompressed run-length code: by columns, the first run is of zeros."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def polygons(mask: np.ndarray) -> list[np.ndarray]:
    """(H, W) bool -> the outlines of its parts, (n, 2) x and y in [0, 1]; holes are left out."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    size = np.array(mask.shape[::-1])
    # a contour runs through the middle of pixels
    return [(contour[:, 0] + 0.5) / size for contour in found if len(contour) >= 3]


class Coco(Sink):
    """One JSON file in COCO's layout, with `track_id` beside each segmentation.

    Args:
        path: of the file.
        clip: which names the frames.
    """

    def __init__(self, path: Path, clip: Clip):
        self.path, self.clip = path, clip
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def write(self, frame: Frame) -> None:
        height, width = frame.mask.shape
        self.images.append({"id": frame.index, "file_name": self.clip.frame_name(frame.index),
                            "height": height, "width": width})
        for object_id in np.unique(frame.mask[frame.mask > 0]).tolist():
            mask = frame.mask == object_id
            x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
            self.annotations.append({
                "image_id": frame.index, "category_id": 1, "track_id": object_id, "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                "area": int(np.count_nonzero(mask)), "bbox": [x, y, w, h]})

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        self.images.sort(key=lambda image: image["id"])
        self.annotations.sort(key=lambda one: (one["image_id"], one["track_id"]))
        for number, annotation in enumerate(self.annotations, start=1):
            annotation["id"] = number
        files.write(self.path, json.dumps({
            "images": self.images, "annotations": self.annotations,
            "categories": [{"id": 1, "name": CATEGORY}]}))


class Yolo(Sink):
    """A text file for each frame: a line for each part of an object, class, polygon, track id.

    The order is that of Ultralytics' own tracks.
    """

    def __init__(self, folder: Path, clip: Clip):
        self.folder, self.clip = folder, clip

    def write(self, frame: Frame) -> None:
        lines = []
        for object_id in np.unique(frame.mask[frame.mask > 0]).tolist():
            for polygon in polygons(frame.mask == object_id):
                numbers = " ".join(f"{value:.6f}" for value in polygon.flatten())
                lines.append(f"0 {numbers} {object_id}\n")
        files.write(self.folder / f"{self.clip.frame_name(frame.index)}.txt", "".join(lines))


def of_a_clip(results: Path, clip: Clip, formats: list[str]) -> list[Sink]:
    """The sinks for some of `FORMATS`, in a results folder."""
    made = {"coco": lambda: Coco(results / "annotations.json", clip),
            "yolo": lambda: Yolo(results / "labels", clip)}
    return [made[name]() for name in formats]
