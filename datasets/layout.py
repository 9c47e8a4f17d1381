"""Where the files of a data set lie: DAVIS, YouTube-VOS and its relatives, folders of one's own.

It knows paths and lists of names, and opens no image.
"""

import codecs
import json
import re
from pathlib import Path

from media import images

PAIRS = (("JPEGImages", "Annotations"), ("images", "masks"))  # folders of frames and of masks
LEVEL = re.compile(r"\d+p|full[-_ ]?res(olution)?", re.IGNORECASE)  # DAVIS-2016 has two
FAVOURITE = "480p"
SETS = {"val": ("val", "valid")}  # what else the folder of a set may be called


def find_root(root: Path, set_name: str) -> Path:
    """The folder itself, or that of the set in it, where only this holds a data set."""
    if not any((root / frames).is_dir() for frames, _ in PAIRS):
        for name in SETS.get(set_name, (set_name,)):
            if any((root / name / frames).is_dir() for frames, _ in PAIRS):
                inner = root / name
                # a sequence of that name, in a folder of sequences, has images inside
                if any(_folders(inner / frames) for frames, _ in PAIRS):
                    return inner
    return root


def sequence_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of frames and masks of each sequence by its name, in natural order."""
    pair = _pair(root)
    if pair is None:
        inside = {folder.name: _pair(folder) for folder in _folders(root)}
        return {name: (_level(found[0]), _level(found[1]))
                for name, found in inside.items() if found}
    frames, masks = pair
    inner = _level(frames)
    masks = masks / inner.name if inner != frames and (masks / inner.name).is_dir() else (
        _level(masks))
    found = {folder.name: (folder, masks / folder.name) for folder in _folders(inner)}
    return found or ({root.name: (inner, masks)} if images.files_in(inner) else {})


def _pair(folder: Path) -> tuple[Path, Path] | None:
    for frames, masks in PAIRS:
        if (folder / frames).is_dir():
            return folder / frames, folder / masks
    return None


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((inner for inner in folder.iterdir()
                   if inner.is_dir() and not inner.name.startswith(".")), key=images.natural)


def _level(folder: Path) -> Path:
    """The folder of one resolution, where there is such a level."""
    levels = [inner for inner in _folders(folder) if LEVEL.fullmatch(inner.name)]
    return next((inner for inner in levels if inner.name == FAVOURITE),
                levels[0] if levels else folder)


def frames_and_masks(frames: Path, masks: Path) -> tuple[tuple[Path, ...], tuple[Path | None, ...]]:
    """The frames of a sequence in natural order, and of each its mask or None.

    Raises:
        FileNotFoundError: no frames, or a mask without its frame.
        ValueError: two frames or two masks of one name.
    """
    shown = images.files_in(frames) if frames.is_dir() else []
    if not shown:
        raise FileNotFoundError(f"{frames}: no frames of sequence {frames.name} there, expected "
                                f"images ({', '.join(images.SUFFIXES)})")
    painted = _by_stem(images.files_in(masks) if masks.is_dir() else [])
    stems = _by_stem(shown)
    for stem, path in painted.items():
        if stem not in stems:
            raise FileNotFoundError(f"{frames / stem}{shown[0].suffix}: no such frame, expected "
                                    f"one for the mask {path}")
    return tuple(shown), tuple(painted.get(path.stem) for path in shown)


def _by_stem(paths: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(path.stem, path)
        if other != path:
            raise ValueError(f"{path}: a second file of that name beside {other.name}")
    return found


def listed_sequences(root: Path, year: str, set_name: str) -> list[str]:
    """Names of the sequences in the lists of DAVIS.

    Args:
        year: "2016", "2017", or "all" for both.
        set_name: a list's name; "trainval" joins two where there is no such list.

    Raises:
        FileNotFoundError: no such list; the message names those that are there.
        ValueError: not a list of names.
    """
    names: list[str] = []
    for part in ("2016", "2017") if year == "all" else (year,):
        whole = set_name != "trainval" or _list(root, part, set_name)
        for name in (set_name,) if whole else ("train", "val"):
            path = _list(root, part, name)
            if path is None:
                there = ", ".join(sorted(str(p.relative_to(root))
                                         for p in (root / "ImageSets").rglob("[!.]*.txt")))
                raise FileNotFoundError(
                    f"{root / 'ImageSets' / part / name}.txt: no such list, expected the names of "
                    f"the {name} sequences of DAVIS-{part}; there are: {there or 'none'}")
            names += _names(path)
    return list(dict.fromkeys(names))


def has_list(root: Path, year: str, set_name: str) -> bool:
    """Whether DAVIS has a list, or both that it is joined of."""
    return all(_list(root, year, name) for name in
               (("train", "val") if set_name == "trainval" else (set_name,)))


def _list(root: Path, year: str, set_name: str) -> Path | None:
    folders = [year, FAVOURITE, "1080p", "."] if year == "2016" else [year, "."]
    paths = (root / "ImageSets" / folder / f"{set_name}.txt" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def _names(path: Path) -> list[str]:
    """A line is a name, or /JPEGImages/480p/NAME/00000.jpg and its mask."""
    content = path.read_bytes()
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
    """For each sequence the stems of the frames that YouTube-VOS' `meta.json` lists for objects.

    Raises:
        ValueError: the file is no JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: expected what YouTube-VOS has there, as JSON") from error
    found = {}
    videos = content.get("videos", {}) if isinstance(content, dict) else {}
    for name, video in videos.items():
        objects = video.get("objects") if isinstance(video, dict) else None
        # others, LVOS among them, tell of objects in other words, and ask for all frames
        known = objects.values() if isinstance(objects, dict) else ()
        frames = [frame for one in known if isinstance(one, dict)
                  for frame in one.get("frames", ())]
        if frames:
            found[name] = frozenset(map(str, frames))
    return found
