"""File layouts of data sets: DAVIS, YouTube-VOS and its relatives, and your own folders.

Finds paths and reads lists of names; opens no image.
"""

import codecs
import json
import re
from pathlib import Path

from media import images

PAIRS = (("JPEGImages", "Annotations"), ("images", "masks"))  # folders of frames and masks
LEVEL = re.compile(r"\d+p|full[-_ ]?res(olution)?", re.IGNORECASE)  # DAVIS-2016 has two
FAVOURITE = "480p"  # the resolution that published scores refer to
SETS = {"val": ("val", "valid")}  # other names of a set's folder


def find_root(root: Path, set_name: str) -> Path:
    """Return the folder of the data set: `root`, or the subfolder of the set if only that has one.

    YouTube-VOS has a subfolder per set.
    """
    if not any((root / frames).is_dir() for frames, _ in PAIRS):
        for name in SETS.get(set_name, (set_name,)):
            if any((root / name / frames).is_dir() for frames, _ in PAIRS):
                inner = root / name
                # not a sequence that happens to be named like the set: it has images inside
                if any(_folders(inner / frames) for frames, _ in PAIRS):
                    return inner
    return root


def sequence_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of frames and masks of each sequence by name, in natural order.

    A folder that holds frames itself is one sequence.
    """
    pair = _pair(root)
    if pair is None:
        pairs = {folder.name: _pair(folder) for folder in _folders(root)}
        return {name: (_level(pair[0]), _level(pair[1])) for name, pair in pairs.items() if pair}
    frames, masks = pair
    inner = _level(frames)
    masks = masks / inner.name if inner != frames and (masks / inner.name).is_dir() else (
        _level(masks))
    sequences = {folder.name: (folder, masks / folder.name) for folder in _folders(inner)}
    return sequences or ({root.name: (inner, masks)} if images.files_in(inner) else {})


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """Return the subfolders of frames and masks, or None if there are no frames."""
    for frames, masks in PAIRS:
        if (folder / frames).is_dir():
            return folder / frames, folder / masks
    return None


def _folders(folder: Path) -> list[Path]:
    """Return the visible subfolders in natural order."""
    if not folder.is_dir():
        return []
    return sorted((inner for inner in folder.iterdir()
                   if inner.is_dir() and not inner.name.startswith(".")), key=images.natural)


def _level(folder: Path) -> Path:
    """Return the subfolder of one resolution, or the folder itself without such subfolders."""
    levels = [inner for inner in _folders(folder) if LEVEL.fullmatch(inner.name)]
    return next((inner for inner in levels if inner.name == FAVOURITE),
                levels[0] if levels else folder)


def frames_and_masks(frames: Path, masks: Path) -> tuple[tuple[Path, ...], tuple[Path | None, ...]]:
    """Return the frames of a sequence in natural order, and for each its mask or None.

    Raises:
        FileNotFoundError: no frames, or a mask without its frame.
        ValueError: two frames or two masks have the same name.
    """
    images_found = images.files_in(frames) if frames.is_dir() else []
    if not images_found:
        raise FileNotFoundError(f"{frames}: no frames of sequence {frames.name} there, expected "
                                f"images ({', '.join(images.SUFFIXES)})")
    masks_found = _by_stem(images.files_in(masks) if masks.is_dir() else [])
    stems = _by_stem(images_found)
    for stem, path in masks_found.items():
        if stem not in stems:
            raise FileNotFoundError(f"{frames / stem}{images_found[0].suffix}: no such frame, "
                                    f"expected one for the mask {path}")
    return tuple(images_found), tuple(masks_found.get(path.stem) for path in images_found)


def _by_stem(paths: list[Path]) -> dict[str, Path]:
    """Map file names without suffix to paths; raises a ValueError if two are equal."""
    by_stem: dict[str, Path] = {}
    for path in paths:
        other = by_stem.setdefault(path.stem, path)
        if other != path:
            raise ValueError(f"{path}: a second file of that name, expected only {other.name}")
    return by_stem


def listed_sequences(root: Path, year: str, set_name: str) -> list[str]:
    """Return the names of the sequences in DAVIS's lists, each once.

    Args:
        year: "2016", "2017", or "all" for both.
        set_name: name of a list; "trainval" joins train and val unless there is such a list.

    Raises:
        FileNotFoundError: no such list; the message names the existing ones.
        ValueError: not a list of names.
    """
    names: list[str] = []
    for part in ("2016", "2017") if year == "all" else (year,):
        whole = set_name != "trainval" or _list(root, part, set_name)
        for name in (set_name,) if whole else ("train", "val"):
            path = _list(root, part, name)
            if path is None:
                existing = ", ".join(sorted(str(p.relative_to(root))
                                            for p in (root / "ImageSets").rglob("[!.]*.txt")))
                raise FileNotFoundError(
                    f"{root / 'ImageSets' / part / name}.txt: no such list, expected the names of "
                    f"the {name} sequences of DAVIS-{part}; existing lists: {existing or 'none'}")
            names += _names(path)
    return list(dict.fromkeys(names))


def has_list(root: Path, year: str, set_name: str) -> bool:
    """Return whether DAVIS has the list; for "trainval", both that it consists of."""
    return all(_list(root, year, name) for name in
               (("train", "val") if set_name == "trainval" else (set_name,)))


def _list(root: Path, year: str, set_name: str) -> Path | None:
    folders = [year, FAVOURITE, "1080p", "."] if year == "2016" else [year, "."]
    paths = (root / "ImageSets" / folder / f"{set_name}.txt" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def _names(path: Path) -> list[str]:
    """Return the names in a list of sequences.

    Each line is a name, or as in DAVIS-2016 the files of a frame and its mask:
    /JPEGImages/480p/NAME/00000.jpg /Annotations/480p/NAME/00000.png.
    """
    content = path.read_bytes()
    # Windows editors save UTF-16 or UTF-8 with a byte order mark
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a list of sequences, expected text") from error
    lines = [line.strip() for line in text.splitlines()]
    names = [Path(line).parts[3] if line.startswith("/JPEGImages/") and line.count("/") > 3
             else line for line in lines if line]
    for name in names:
        if name != Path(name).name or name == "..":
            raise ValueError(f"{path}: expected names of sequences, found {name!r}")
    if not names:
        raise ValueError(f"{path}: an empty list, expected names of sequences")
    return names


def requested_frames(path: Path) -> dict[str, frozenset[str]]:
    """Return for each sequence the stems of the frames that YouTube-VOS's `meta.json` lists.

    These are the frames that its evaluation server expects masks of. Without the file the result
    is empty.

    Raises:
        ValueError: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: expected YouTube-VOS's meta.json, found no JSON") from error
    requested = {}
    videos = content.get("videos", {}) if isinstance(content, dict) else {}
    for name, video in videos.items():
        objects = video.get("objects") if isinstance(video, dict) else None
        # LVOS and others have a file of this name with another structure, and expect all frames
        entries = objects.values() if isinstance(objects, dict) else ()
        frames = [frame for entry in entries if isinstance(entry, dict)
                  for frame in entry.get("frames", ())]
        if frames:
            requested[name] = frozenset(map(str, frames))
    return requested
