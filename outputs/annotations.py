"""Sinks that write a clip's masks as annotations: COCO with run lengths, YOLO with polygons."""

import csv
import json
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from media import files, run_lengths
from media.clip import Clip
from media.images import SUFFIXES
from tracking.pipeline import Frame, Sink

FORMATS = {"coco": "annotations.json", "yolo": "labels"}  # what each writes in a results folder
CATEGORY = "object"  # of objects without a name


class Categories:
    """The categories of objects: those with the same name are of the same one.

    Args:
        names: by object id; the others are called `CATEGORY`.
    """

    def __init__(self, names: Mapping[int, str]):
        self.names = {object_id: name or CATEGORY for object_id, name in names.items()}
        self.all = list(dict.fromkeys(self.names[i] for i in sorted(self.names)))

    def index(self, object_id: int) -> int:
        """The place of an object's category in `all`, which gets it if it lacks it."""
        name = self.names.get(object_id, CATEGORY)
        if name not in self.all:
            self.all.append(name)
        return self.all.index(name)


class FrameLines:
    """Lines of text for each frame, handed in in any order and read back in that of the frames.

    In a temporary file, as an hour of masks takes gigabytes; 24 bytes a frame stay in memory.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.places = array("q")  # of each frame three values: index, position, number of lines

    def add(self, frame: int, lines: list[str]) -> None:
        """Keep the lines of a frame, none of which holds a line break."""
        self.places.extend((frame, self.file.tell(), len(lines)))
        self.file.write("".join(f"{line}\n" for line in lines).encode())

    @property
    def frames(self) -> list[int]:
        """Indices of the frames, ascending."""
        return sorted(self.places[::3])

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Index and lines of each frame, by index."""
        for frame, position, count in sorted(zip(*(self.places[i::3] for i in range(3)))):
            self.file.seek(position)
            yield frame, [self.file.readline().decode()[:-1] for _ in range(count)]

    def close(self) -> None:
        self.file.close()


class CocoSink(Sink):
    """One JSON file in COCO's format, with `track_id` (the object's id) in each annotation.

    Args:
        path: where it goes, when all frames were written.
        clip: gives the frames their file names, and the images their ids: the frames' numbers.
        names: of objects by their ids.
    """

    def __init__(self, path: Path, clip: Clip, names: Mapping[int, str] | None = None):
        self.path, self.clip, self.categories = path, clip, Categories(names or {})
        self.shape, self.lines = (0, 0), FrameLines()

    def write(self, frame: Frame) -> None:
        self.shape, lines = frame.mask.shape, []
        for object_id in np.unique(frame.mask[frame.mask > 0]).tolist():
            mask = frame.mask == object_id
            lines.append(json.dumps({
                "image_id": self.clip.number(frame.index),
                "category_id": self.categories.index(object_id) + 1, "track_id": object_id,
                "iscrowd": 0, "area": int(np.count_nonzero(mask)),
                "bbox": list(cv2.boundingRect(mask.astype(np.uint8))),
                "segmentation": {"size": list(mask.shape),
                                 "counts": run_lengths.compress(run_lengths.encode(mask))}}))
        self.lines.add(frame.index, lines)

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                with files.whole(self.path) as beside, \
                        beside.open("w", encoding="utf-8") as file:
                    file.writelines(self._parts())
        finally:
            self.lines.close()

    def _parts(self) -> Iterator[str]:
        """The file, piece by piece."""
        height, width = self.shape
        yield '{"images": ['
        for i, frame in enumerate(self.lines.frames):
            yield (",\n" if i else "\n") + json.dumps({
                "id": self.clip.number(frame), "file_name": file_name(self.clip, frame),
                "height": height, "width": width})
        yield '],\n"annotations": ['
        number = 0
        for _, lines in self.lines:
            for line in lines:
                number += 1
                yield (",\n" if number > 1 else "\n") + f'{{"id": {number}, {line[1:]}'
        yield '],\n"categories": ' + json.dumps([
            {"id": i, "name": name}
            for i, name in enumerate(self.categories.all or [CATEGORY], start=1)]) + "}\n"


class YoloSink(Sink):
    """Labels in Ultralytics' segmentation format: for each frame a file with a line per object.

    Beside them `tracks.csv`, which says which line is which object, as a line has no place for it,
    and `data.yaml`, which names the classes and is what a training is started with.

    Args:
        folder: of the labels.
        clip: gives the frames their names.
        names: of objects by their ids.
    """

    def __init__(self, folder: Path, clip: Clip, names: Mapping[int, str] | None = None):
        self.folder, self.clip, self.categories = folder, clip, Categories(names or {})
        self.lines = FrameLines()

    def write(self, frame: Frame) -> None:
        lines, tracks = [], []
        for object_id in np.unique(frame.mask[frame.mask > 0]).tolist():
            numbers = " ".join(f"{value:.6f}" for value in polygon(frame.mask == object_id).flat)
            lines.append(f"{self.categories.index(object_id)} {numbers}\n")
            tracks.append(str(object_id))
        files.write(self.folder / f"{self.clip.frame_name(frame.index)}.txt", "".join(lines))
        self.lines.add(frame.index, tracks)

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._write_tracks(self.folder.with_name("tracks.csv"))
                files.write(self.folder.with_name("data.yaml"), self._data())
        finally:
            self.lines.close()

    def _write_tracks(self, path: Path) -> None:
        with files.whole(path) as beside, \
                beside.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["frame", "file", "line", "track_id"])
            for frame, tracks in self.lines:
                name = f"{self.folder.name}/{self.clip.frame_name(frame)}.txt"
                rows.writerows([self.clip.number(frame), name, i, track]
                               for i, track in enumerate(tracks, start=1))

    def _data(self) -> str:
        if self.clip.path.is_dir():
            how = f"copy or link the frames of {self.clip.path}"
        else:
            how = (f"ffmpeg -i {self.clip.path} -fps_mode passthrough -start_number 0 "
                   "images/%05d.png")
        names = "".join(f"  {i}: {json.dumps(name)}\n"
                        for i, name in enumerate(self.categories.all or [CATEGORY]))
        return ("# yolo segment train data=data.yaml; paths are relative to this file\n"
                f"# images/ has to hold the frames: {how}\n"
                f"train: images\nval: images\nnames:\n{names}")


def file_name(clip: Clip, frame: int) -> str:
    """A frame's image file: its own, or of a video as `ffmpeg -start_number 0 %05d.png` writes it.

    Masks are called so as well.
    """
    files = clip.files or ()
    if files and len(files) == clip.count and files[frame].suffix.lower() in SUFFIXES:
        return files[frame].name
    return f"{clip.frame_name(frame)}.png"


def polygon(mask: np.ndarray) -> np.ndarray:
    """The outline of an (H, W) bool mask as one polygon: (n, 2) x and y in [0, 1], n >= 3.

    As in Ultralytics' converter, slits of no width lead to further parts of the object, and to its
    holes. Points are the centres of pixels: filled as Ultralytics fills it, the polygon gives back
    the mask, but for the slits between parts.
    """
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP,
                                           cv2.CHAIN_APPROX_NONE)
    rings, outside = [contour[:, 0] for contour in contours], hierarchy[0][:, 3]
    path = _joined([_joined([rings[i], *(rings[j] for j in np.flatnonzero(outside == i))])
                    for i in np.flatnonzero(outside < 0)])
    steps = np.diff(path, axis=0, append=path[:1])
    path, steps = path[steps.any(1)], steps[steps.any(1)]  # without points that are repeated
    path = path[(steps != np.roll(steps, 1, axis=0)).any(1)]  # nor those on a straight line
    if len(path) < 3:  # a pixel, or a line one pixel wide: its outline, within these pixels
        first, last = (path if len(path) else rings[0])[[0, -1]]
        path = np.array([np.subtract(first, 0.25), np.add(first, (0.25, -0.25)),
                         np.add(last, 0.25), np.add(last, (-0.25, 0.25))])
    return (path + 0.5) / mask.shape[::-1]


def _joined(rings: list[np.ndarray]) -> np.ndarray:
    """One closed path through all points of closed (n, 2) rings.

    The ring nearest to the path is always the next, by a slit from the nearest point. So a slit
    crosses no other ring.
    """
    path, rest = rings[0], rings[1:]
    gaps = [_nearest(path, ring) for ring in rest]
    while rest:
        i = min(range(len(rest)), key=lambda i: gaps[i][0])
        (_, point, other), ring = gaps.pop(i), rest.pop(i)
        a = np.flatnonzero((path == point).all(1))[0]
        b = np.flatnonzero((ring == other).all(1))[0]
        path = np.concatenate([path[:a + 1], ring[b:], ring[:b + 1], path[a:]])
        gaps = [min(gap, _nearest(ring, further), key=lambda gap: gap[0])
                for gap, further in zip(gaps, rest)]
    return path


def _nearest(path: np.ndarray, ring: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """The squared distance of two (n, 2) sets of points, and the two points that have it."""
    best = None
    for part in np.array_split(path, -(-len(path) // 256)):  # 4K: all pairs would take gigabytes
        apart = ((part[:, None] - ring) ** 2).sum(2)
        i, j = np.unravel_index(apart.argmin(), apart.shape)
        if best is None or apart[i, j] < best[0]:
            best = int(apart[i, j]), part[i], ring[j]
    return best


def clip_sinks(results: Path, clip: Clip, formats: list[str],
              names: Mapping[int, str] | None = None) -> list[Sink]:
    """The sinks for some of `FORMATS`, in a results folder.

    Args:
        names: of objects by their ids.
    """
    kinds = {"coco": CocoSink, "yolo": YoloSink}
    return [kinds[name](results / FORMATS[name], clip, names) for name in formats]
