"""Reads the user's mask files, joins several files of a frame, and warns of risky masks.

`encoding` decides what the values of a file mean.
"""

import logging
import tempfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from masks import annotation_files
from masks.channels import border, is_transparent
from masks.encoding import VOID, MaskEncoding
from media import images

log = logging.getLogger(__name__)

MANY_OBJECTS = 32  # from more objects on, a warning names their cost, which grows with their number
MAX_LOGGED = 8  # values in one log line


def read_mask(path: str | Path, user_drawn: bool = False) -> np.ndarray:
    """Read one mask file as (H, W) uint8; see `MaskEncoding.detect` for arguments and errors."""
    return MaskEncoding.detect([path], user_drawn=user_drawn).read(path)


def read_masks(paths: dict[int, list[Path]], shape: tuple[int, int] | None = None,
               clip: str | Path = "the clip", frame_names: Mapping[int, str] | None = None,
               names: dict[int, str] | None = None) -> dict[int, np.ndarray]:
    """Read all of the user's mask files.

    Several files of one frame are joined; if an object id occurs in more than one of them, the
    later one gets the next free id. The pages of a TIFF are masks of consecutive frames, starting
    with the frame the file was given for; pages without an object are skipped. Files that end in
    .json are read by `annotation_files`.

    Args:
        paths: mask files by frame number.
        shape: (H, W) of the frames of `clip`, None if unknown.
        clip: what messages call the clip.
        frame_names: by frame number; selects the image of that name in a COCO file.
        names: labels of objects by id; those found in annotation files are added.

    Returns:
        (H, W) uint8 masks by frame number. The first has an object; an empty later mask means that
        no object is visible.

    Raises:
        OSError, ValueError: see `MaskEncoding.detect` and `MaskEncoding.read`; also if a mask has
            another size or the first has no object. The message names the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = _split_stacks(paths, Path(folder))
        return _read_masks(paths, shape, clip, frame_names or {}, names)


def _read_masks(paths: dict[int, list[Path]], shape: tuple[int, int] | None,
                clip: str | Path, frame_names: Mapping[int, str],
                names: dict[int, str] | None) -> dict[int, np.ndarray]:
    assigned: dict[tuple, int] = {}
    masks: dict[int, np.ndarray] = {}
    only_255 = []
    like, shape_of = (clip, shape) if shape else (None, None)
    for frame in sorted(paths):
        parts = []
        for path in paths[frame]:
            mask, is_only_255 = _read_user_mask(path, assigned, frame_names.get(frame), names)
            if shape_of is None:
                like, shape_of = path, mask.shape
            images.check_same_shape(like, shape_of, path, mask.shape)
            # half the frame alone may be a close-up; the border is rarely covered by objects
            if (mask > 0).mean() > 0.5 and (border(mask) > 0).mean() > 0.9:
                log.warning("%s: objects cover the border of the frame; if object and background "
                            "are swapped, invert the mask", path)
            if is_only_255:
                only_255.append((frame, path))
            parts.append((path, mask))
        masks[frame] = _join(frame, parts)
        if frame == min(paths) and not masks[frame].any():
            raise ValueError(f"{paths[frame][0]}: the mask holds no object, expected one in the "
                             f"first mask (frame {frame})")
    frames = dict.fromkeys(frame for frame, _ in only_255)
    if len(frames) > 1 and all(len(paths[frame]) == 1 for frame in frames):
        log.info("%s: white is object 1 in each of them, the same object; another object needs "
                 "another number (such as 2)", ", ".join(Path(path).name for _, path in only_255))
    return masks


def _split_stacks(paths: dict[int, list[Path]], folder: Path) -> dict[int, list[Path]]:
    """Return mask files by frame, with each page of a multi-page TIFF as a file in `folder`."""
    split: dict[int, list[Path]] = {}
    for frame, files in paths.items():
        for file in map(Path, files):
            pages = _pages(file, folder) if file.suffix.lower() in (".tif", ".tiff") else {0: file}
            for page, path in pages.items():
                split.setdefault(frame + page, []).append(path)
            if list(pages.values()) != [file]:
                log.info("%s: its pages are the masks of consecutive frames from %d on, %d of them "
                         "hold an object: frames %s", file, frame, len(pages),
                         _shorten(frame + page for page in pages))
    return split


def _pages(file: Path, folder: Path) -> dict[int, Path]:
    """Save the pages of a TIFF that have an object, by page number; {0: file} for a single page."""
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


def _shorten(values: Iterable[int]) -> str:
    """The first `MAX_LOGGED` values, separated by commas."""
    first = list(islice(values, MAX_LOGGED + 1))
    return ", ".join(map(str, first[:MAX_LOGGED])) + (" ..." if len(first) > MAX_LOGGED else "")


def _read_user_mask(path: Path, assigned: dict, frame_name: str | None,
                    names: dict[int, str] | None) -> tuple[np.ndarray, bool]:
    """Read a mask file; also return whether its only object is white (255) on black."""
    if Path(path).suffix.lower() == ".json":
        return annotation_files.read(Path(path), frame_name, assigned, names), False
    encoding = MaskEncoding.detect([path], user_drawn=True, assigned=assigned)
    mask = encoding.read(path)
    return mask, bool(encoding.id_table is not None and encoding.id_table[VOID] == 1 and mask.any())


def _join(frame: int, parts: list[tuple[Path, np.ndarray]]) -> np.ndarray:
    """Join the masks of one frame; where they overlap, the later file wins."""
    joined = np.zeros_like(parts[0][1])
    if len(parts) == 1:
        return parts[0][1]
    assignments = []
    for path, mask in parts:
        taken = set(np.unique(joined).tolist())
        result = joined.copy()
        for object_id in np.unique(mask[mask > 0]).tolist():
            new = object_id
            if new in taken:
                new = next((i for i in range(1, VOID) if i not in taken), None)
                if new is None:
                    raise ValueError(f"{path}: more than {VOID - 1} objects in frame {frame}")
            taken.add(new)
            result[mask == object_id] = new
            assignments.append(f"{Path(path).name} {new}")
        overlap = np.count_nonzero((joined > 0) & (mask > 0))
        if overlap:
            log.warning("%s: overlaps the other masks of frame %d in %d pixels, which go to it",
                        path, frame, overlap)
        joined = result
    log.info("frame %d: objects %s", frame, ", ".join(assignments))
    return joined


def is_empty(path: str | Path) -> bool:
    """Whether a mask file is entirely black, 0 or transparent; raises OSError as `read_mask`."""
    image = images.open_image(path, "a mask")
    if is_transparent(image):
        return False
    if image.mode.startswith(("I", "F")):  # Pillow lacks the extrema of some of them
        return not np.asarray(image).any()
    return not np.any(image.convert("RGB").getextrema() if "A" in image.mode
                      else image.getextrema())


def warn_about(mask: np.ndarray, location_size: float) -> None:
    """Log the warning of `mask_warning`, if there is one."""
    if warning := mask_warning(mask, location_size):
        log.warning("%s", warning)


def mask_warning(mask: np.ndarray, location_size: float) -> str | None:
    """A warning about a reference mask, with the flag that helps; None if all is well.

    It names objects that are too small to fill a location of the feature map, and too many objects.

    Args:
        mask: (H, W) uint8.
        location_size: side of a feature-map location, in pixels of the mask.
    """
    ids, areas = np.unique(mask[mask > 0], return_counts=True)
    small, warnings = ids[areas < location_size ** 2].tolist(), []
    if len(ids) > MANY_OBJECTS:
        warnings.append(f"{len(ids)} objects, each of which costs time and memory: segment fewer "
                        "at a time, or use a smaller -p, if that is too much")
    if small:
        word = "object" if len(small) == 1 else f"{len(small)} objects,"
        warnings.append(f"{word} {_shorten(small)}: smaller than a feature-map location "
                        f"({location_size:.3g} pixels wide), which a larger --size (up to twice "
                        "the frame's own) or -p makes smaller")
    return "; ".join(warnings) or None
