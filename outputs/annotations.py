"""Sinks that write predicted masks as annotations: COCO (run lengths) and YOLO (polygons)."""

import csv
import json
import shlex
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

FORMATS = {"coco": "annotations.json", "yolo": "labels"}  # the main output of each format
CATEGORY = "object"  # category of objects without a name
# Points per block of pairwise distances. All pairs of two 4K outlines at once would take gigabytes;
# smaller blocks take more Python steps.
BLOCK = 256


class Categories:
    """Maps objects to categories: objects with the same name share one.

    Args:
        names: by object id; objects without one belong to `CATEGORY`.
    """

    def __init__(self, names: Mapping[int, str]):
        self.names = {object_id: name or CATEGORY for object_id, name in names.items()}
        self.all = list(dict.fromkeys(self.names[i] for i in sorted(self.names)))

    def index(self, object_id: int) -> int:
        """Index of an object's category in `all`; a new category is appended."""
        name = self.names.get(object_id, CATEGORY)
        if name not in self.all:
            self.all.append(name)
        return self.all.index(name)


class FrameLines:
    """Buffers lines of text per frame, added in any order, and iterates in frame order.

    Masks before the first user mask arrive last to first, and an hour of them takes gigabytes, so
    the lines are in a temporary file. Memory use is 24 bytes per frame.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.entries = array("q")  # three values per frame: index, file position, number of lines

    def add(self, frame: int, lines: list[str]) -> None:
        """Add the lines of a frame; they may not contain line breaks."""
        self.entries.extend((frame, self.file.tell(), len(lines)))
        self.file.write("".join(f"{line}\n" for line in lines).encode())

    @property
    def frames(self) -> list[int]:
        """Frame indices, ascending."""
        return sorted(self.entries[::3])

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Frame index and lines, in frame order."""
        for frame, position, count in sorted(zip(*(self.entries[i::3] for i in range(3)))):
            self.file.seek(position)
            yield frame, [self.file.readline().decode()[:-1] for _ in range(count)]

    def close(self) -> None:
        self.file.close()


class AnnotationSink(Sink):
    """Base class of the sinks below.

    Args:
        path: the main output; it, or files next to it, are written when the sink closes without an
            error.
        clip: source of file names and frame numbers.
        names: object names, by object id; they become categories.
    """

    def __init__(self, path: Path, clip: Clip, names: Mapping[int, str] | None = None):
        self.path, self.clip, self.categories = path, clip, Categories(names or {})
        self.lines = FrameLines()

    def finish(self) -> None:
        """Write the files that need all frames."""
        raise NotImplementedError

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.finish()
        finally:
            self.lines.close()


class CocoSink(AnnotationSink):
    """Writes one JSON file in COCO's format; each annotation's `track_id` is the object id."""

    shape = (0, 0)  # (H, W) of the frames

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

    def finish(self) -> None:
        with files.atomic_path(self.path) as unfinished, \
                unfinished.open("w", encoding="utf-8") as file:
            file.writelines(self._parts())

    def _parts(self) -> Iterator[str]:
        """The JSON text in pieces: as a whole it may not fit into memory."""
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


class YoloSink(AnnotationSink):
    """Writes labels in Ultralytics' segmentation format: a file per frame, a line per object.

    Next to the folder it writes `tracks.csv`, which maps lines to object ids (Ultralytics rejects
    label lines with an id), and `data.yaml`, which names the classes and starts a training.
    """

    def write(self, frame: Frame) -> None:
        lines, tracks = [], []
        for object_id in np.unique(frame.mask[frame.mask > 0]).tolist():
            numbers = " ".join(f"{value:.6f}" for value in polygon(frame.mask == object_id).flat)
            lines.append(f"{self.categories.index(object_id)} {numbers}\n")
            tracks.append(str(object_id))
        files.write(self.path / f"{self.clip.frame_name(frame.index)}.txt", "".join(lines))
        self.lines.add(frame.index, tracks)

    def finish(self) -> None:
        files.write(self.path.with_name("data.yaml"), self._data())
        with files.atomic_path(self.path.with_name("tracks.csv")) as unfinished, \
                unfinished.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["frame", "file", "line", "track_id"])
            for frame, tracks in self.lines:
                name = f"{self.path.name}/{self.clip.frame_name(frame)}.txt"
                rows.writerows([self.clip.number(frame), name, i, track]
                               for i, track in enumerate(tracks, start=1))

    def _data(self) -> str:
        """The text of data.yaml, with the command that provides the frames as images."""
        if self.clip.path.is_dir():
            command = f"copy or link the frames of {self.clip.path}"
        else:
            command = (f"ffmpeg -i {shlex.quote(str(self.clip.path))} -fps_mode passthrough "
                       "-start_number 0 images/%05d.png")
        names = "".join(f"  {i}: {json.dumps(name, ensure_ascii=False)}\n"
                        for i, name in enumerate(self.categories.all or [CATEGORY]))
        return ("# yolo segment train data=data.yaml; paths are relative to this file\n"
                f"# images/ has to hold the frames: {command}\n"
                f"train: images\nval: images\nnames:\n{names}")


def file_name(clip: Clip, frame: int) -> str:
    """Name of a frame's image file: its own, or for a video the one that ffmpeg gives it.

    That is with `ffmpeg -start_number 0 %05d.png`; mask files have the same names.
    """
    paths = clip.files or ()
    if paths and len(paths) == clip.count and paths[frame].suffix.lower() in SUFFIXES:
        return paths[frame].name
    return f"{clip.frame_name(frame)}.png"


def polygon(mask: np.ndarray) -> np.ndarray:
    """The outline of a mask as one polygon.

    As in Ultralytics' converter, slits of zero width connect the parts of an object and its holes.
    Points are pixel centres: filled as Ultralytics does, the polygon gives the mask again, except
    for the slits between parts.

    Args:
        mask: (H, W) bool with at least one true pixel.

    Returns:
        (n, 2) x and y as shares of width and height, in [0, 1]; n >= 3.
    """
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP,
                                           cv2.CHAIN_APPROX_NONE)
    # RETR_CCOMP: a contour without a parent is the outside of a part, its children are holes
    rings, parent = [contour[:, 0] for contour in contours], hierarchy[0][:, 3]
    path = _join([_join([rings[i], *(rings[j] for j in np.flatnonzero(parent == i))])
                  for i in np.flatnonzero(parent < 0)])
    steps = np.diff(path, axis=0, append=path[:1])
    path, steps = path[steps.any(1)], steps[steps.any(1)]  # drop repeated points
    path = path[(steps != np.roll(steps, 1, axis=0)).any(1)]  # and those on a straight line
    if len(path) < 3:  # a single pixel, or a line one pixel wide: a rectangle within these pixels
        first, last = (path if len(path) else rings[0])[[0, -1]]
        path = np.array([np.subtract(first, 0.25), np.add(first, (0.25, -0.25)),
                         np.add(last, 0.25), np.add(last, (-0.25, 0.25))])
    return (path + 0.5) / mask.shape[::-1]


def _join(rings: list[np.ndarray]) -> np.ndarray:
    """Join closed (n, 2) rings into one closed path through all their points.

    The ring nearest to the path so far is added next, by a slit between the nearest points. The
    shortest slit to any ring cannot cross another ring: that one would be nearer.
    """
    path, remaining = rings[0], rings[1:]
    slits = [_nearest_points(path, ring) for ring in remaining]
    while remaining:
        i = min(range(len(remaining)), key=lambda i: slits[i][0])
        (_, on_path, on_ring), ring = slits.pop(i), remaining.pop(i)
        a = np.flatnonzero((path == on_path).all(1))[0]
        b = np.flatnonzero((ring == on_ring).all(1))[0]
        path = np.concatenate([path[:a + 1], ring[b:], ring[:b + 1], path[a:]])
        slits = [min(slit, _nearest_points(ring, other), key=lambda slit: slit[0])
                 for slit, other in zip(slits, remaining)]
    return path


def _nearest_points(path: np.ndarray, ring: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """The smallest squared distance between two (n, 2) point sets, and the two points."""
    best = None
    for block in np.array_split(path, -(-len(path) // BLOCK)):
        distances = ((block[:, None] - ring) ** 2).sum(2)
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        if best is None or distances[i, j] < best[0]:
            best = int(distances[i, j]), block[i], ring[j]
    return best


def clip_sinks(results: Path, clip: Clip, formats: list[str],
              names: Mapping[int, str] | None = None) -> list[Sink]:
    """The sinks for some of `FORMATS`.

    Args:
        results: the results folder.
        names: object names, by object id.
    """
    kinds = {"coco": CocoSink, "yolo": YoloSink}
    return [kinds[name](results / FORMATS[name], clip, names) for name in formats]
