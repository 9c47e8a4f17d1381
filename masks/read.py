"""Mask files: those of a person read and joined, and what is to be said of them before the work.

What values mean is decided in masks/encoding.py. It knows no frame number but the caller's.
"""

import logging
import tempfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from masks import annotation_files
from masks.channels import border, is_transparent
from masks.encoding import VOID, Coding
from media import images

log = logging.getLogger(__name__)

MANY = 32  # objects
NAMED = 8  # at most, in a line of the log


def read_mask(path: str | Path, single_object: bool = False, own: bool = False) -> np.ndarray:
    """Read a mask file by itself as (H, W) uint8; see `Coding.of` for arguments and errors."""
    return Coding.of([path], single_object, own).read(path)


def read_masks(paths: dict[int, list[Path]], shape: tuple[int, int] | None = None,
               clip: str | Path = "the clip", frame_names: Mapping[int, str] | None = None,
               names: dict[int, str] | None = None) -> dict[int, np.ndarray]:
    """Read a person's own masks, all before anything is done with any.

    Several files of one frame are joined: ids that are free are kept, an id that another file of
    the frame has already becomes the next one that is free. The pages of a TIFF are the masks of
    consecutive frames from the one it was given for; pages without an object count as not labelled.
    A file that ends in .json is one of labelme or COCO (`json_masks`).

    Args:
        paths: the mask files of each frame, by its number.
        shape: (H, W) of the frames of `clip`, None if unknown.
        frame_names: of frames by their numbers; from a COCO file the image of that name is taken.
        names: labels of objects by their ids; those that a file tells are added.

    Returns:
        (H, W) uint8 for each frame, the first with an object; an empty later mask says that no
        object is visible.

    Raises:
        OSError, ValueError: as `Coding.of` and `Coding.read` do; also for a mask of another size
            and a first mask without an object. They name the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _read_masks(_unstacked(paths, Path(folder)), shape, clip, frame_names or {}, names)


def _read_masks(paths: dict[int, list[Path]], shape: tuple[int, int] | None,
                clip: str | Path, frame_names: Mapping[int, str],
                names: dict[int, str] | None) -> dict[int, np.ndarray]:
    known: dict[tuple, int] = {}
    found: dict[int, np.ndarray] = {}
    white = []
    like, shape_of = (clip, shape) if shape else (None, None)
    for frame in sorted(paths):
        parts = []
        for path in paths[frame]:
            mask, is_white = _read_own(path, known, frame_names.get(frame), names)
            if shape_of is None:
                like, shape_of = path, mask.shape
            images.check_same_shape(like, shape_of, path, mask.shape)
            if (mask > 0).mean() > 0.5 and (border(mask) > 0).mean() > 0.9:
                log.warning("%s: objects cover the border of the frame; if object and background "
                            "are swapped, invert the mask", path)
            if is_white:
                white.append((frame, path))
            parts.append((path, mask))
        found[frame] = _join(frame, parts)
        if frame == min(paths) and not found[frame].any():
            raise ValueError(f"{paths[frame][0]}: the mask holds no object, expected one in the "
                             f"first mask (frame {frame})")
    frames = dict.fromkeys(frame for frame, _ in white)
    if len(frames) > 1 and all(len(paths[frame]) == 1 for frame in frames):
        log.info("%s: white is object 1 in each of them, the same object; another object needs "
                 "another number (such as 2)", ", ".join(Path(path).name for _, path in white))
    return found


def _unstacked(paths: dict[int, list[Path]], folder: Path) -> dict[int, list[Path]]:
    """The mask files of each frame, with the pages of multi-page TIFFs as files in `folder`."""
    found: dict[int, list[Path]] = {}
    for frame, files in paths.items():
        for file in map(Path, files):
            pages = _pages(file, folder) if file.suffix.lower() in (".tif", ".tiff") else {0: file}
            for page, path in pages.items():
                found.setdefault(frame + page, []).append(path)
            if list(pages.values()) != [file]:
                log.info("%s: its pages are the masks of consecutive frames from %d on, %d of them "
                         "hold an object: frames %s", file, frame, len(pages),
                         _shortened(frame + page for page in pages))
    return found


def _pages(file: Path, folder: Path) -> dict[int, Path]:
    """The pages of a TIFF that hold an object, by their number; {0: file} if it has only one."""
    with images.open_pictures(file, "a mask") as stack:
        count = images.pictures(stack)
        if count == 1:
            return {0: file}
        pages = {}
        for page in range(count):
            stack.seek(page)
            if np.asarray(stack).any():
                pages[page] = folder / f"{file.stem} page {page + 1}.tif"
                stack.copy().save(pages[page])
    if not pages:
        raise ValueError(f"{file}: no page of it holds an object, expected one in the first mask")
    return pages


def _shortened(values: Iterable[int]) -> str:
    """Comma-separated values, not more than `NAMED` of them."""
    first = list(islice(values, NAMED + 1))
    return ", ".join(map(str, first[:NAMED])) + (" ..." if len(first) > NAMED else "")


def _read_own(path: Path, known: dict, frame_name: str | None,
              names: dict[int, str] | None) -> tuple[np.ndarray, bool]:
    """A person's mask, and whether all that it says is white on black."""
    if Path(path).suffix.lower() == ".json":
        return annotation_files.read(Path(path), frame_name, known, names), False
    coding = Coding.of([path], own=True, known=known)
    mask = coding.read(path)
    return mask, bool(coding.numbers is not None and coding.numbers[VOID] == 1 and mask.any())


def _join(frame: int, parts: list[tuple[Path, np.ndarray]]) -> np.ndarray:
    """The masks of one frame in one; where they overlap the later file's object is in front."""
    joined = np.zeros_like(parts[0][1])
    if len(parts) == 1:
        return parts[0][1]
    told = []
    for path, mask in parts:
        taken = set(np.unique(joined).tolist())
        fresh = joined.copy()
        for object_id in np.unique(mask[mask > 0]).tolist():
            new = object_id
            if new in taken:
                new = next((i for i in range(1, VOID) if i not in taken), None)
                if new is None:
                    raise ValueError(f"{path}: more than {VOID - 1} objects in frame {frame}")
            taken.add(new)
            fresh[mask == object_id] = new
            told.append(f"{Path(path).name} {new}")
        overlap = np.count_nonzero((joined > 0) & (mask > 0))
        if overlap:
            log.warning("%s: overlaps the other masks of frame %d in %d pixels, which go to it",
                        path, frame, overlap)
        joined = fresh
    log.info("frame %d: objects %s", frame, ", ".join(told))
    return joined


def is_empty(path: str | Path) -> bool:
    """Whether all of a mask file is black, 0, or transparent; raises OSError as `read_mask`."""
    image = images.open_image(path, "a mask")
    if is_transparent(image):
        return False
    return not np.any(image.convert("RGB").getextrema() if "A" in image.mode
                      else image.getextrema())


def warn_about(mask: np.ndarray, cell: float) -> None:
    """Warn of what `concern` has to say."""
    if said := mask_warning(mask, cell):
        log.warning("%s", said)


def mask_warning(mask: np.ndarray, cell: float) -> str | None:
    """What is to be said of a first mask before the work, with the flag that helps; or None.

    Args:
        mask: (H, W) uint8.
        cell: side of a feature cell, in pixels of the mask.
    """
    ids, areas = np.unique(mask[mask > 0], return_counts=True)
    small, said = ids[areas < cell ** 2].tolist(), []
    if len(ids) > MANY:
        said.append(f"{len(ids)} objects take time and memory for each: fewer at a time, or a "
                    "smaller -p, if it is too much")
    if small:
        word = "object" if len(small) == 1 else f"{len(small)} objects,"
        names = _shortened(small)
        said.append(f"{word} {names}: smaller than a feature cell ({cell:.3g} pixels wide), which "
                    "a larger --size (to twice the frame's own) or -p makes smaller")
    return "; ".join(said) or None
