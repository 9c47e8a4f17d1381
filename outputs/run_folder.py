"""What a results folder holds: what made it, and what is known of each video that is finished.

`manifest.json` tells what made it. What is known of a finished video lies in `NAME.finished.json`,
so that several processes may work into one folder. What it is that is known, it doesn't know.
"""

import itertools
import json
import logging
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from media import files
from system import distributed

log = logging.getLogger(__name__)

FINISHED = ".finished.json"


class RunFolder:
    """The record of a results folder, kept up to date after each video.

    It reads, deletes and writes, so `files.hold` the folder first.

    Args:
        folder: None keeps nothing on disk.
        made_by: flags, versions and weights, all that changes the results.
        overwrite: forget what was finished before.

    Attributes:
        entries: what is known of the finished videos, by their names.

    Raises:
        ValueError: the folder's results were made by something else.
    """

    def __init__(self, folder: Path | None, made_by: dict[str, str], overwrite: bool = False):
        self.folder, self.made_by = folder, made_by
        self.entries: dict[str, dict] = {}
        self.begun = False
        if folder is None:
            return
        path = folder / "manifest.json"
        if overwrite:
            for old in (*folder.glob(f"*{FINISHED}"), *folder.glob(".*.progress"), path):
                old.unlink(missing_ok=True)
        elif path.is_file():
            before = _read(path)
            for name in differing_keys(before, made_by):
                old, new = before.get(name, "none"), made_by.get(name, "none")
                raise ValueError(f"{folder}: holds results of other {name} ({old!r}, now {new!r}): "
                                 "name another folder, or start over (--overwrite)")
            self.made_by = made_by | _commits(folder, before, made_by)
            self.entries = {old.name.removesuffix(FINISHED): _read(old)
                            for old in folder.glob(f"*{FINISHED}")}
        self.known = path.is_file() or overwrite

    def begin(self, folders: Iterable[Path] = ()) -> None:
        """Say what makes the results, before the first of them is written; once is enough.

        Args:
            folders: where they go.

        Raises:
            ValueError: something else than this toolkit wrote there before.
        """
        if self.folder is None or distributed.rank() or self.begun:
            return
        self.begun = True
        for folder in folders:
            if not self.known and folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"{folder}: holds files that no manifest tells of: name another "
                                 "folder (-j), or write over them (--overwrite)")
        files.write(self.folder / "manifest.json", json.dumps(self.made_by, indent=1))

    def finish(self, name: str, entry: dict) -> None:
        """Keep what is known of a video now that all of its files are there."""
        self.entries[name] = entry
        if self.folder:
            files.write(self.folder / f"{name}{FINISHED}", json.dumps(entry))

    def share(self) -> None:
        """Learn what the other processes of the job finished."""
        for entries in distributed.gather(self.entries):
            self.entries |= entries


def read_metadata(folder: Path) -> dict[str, str] | None:
    """What made a folder's results; None where no manifest tells."""
    path = folder / "manifest.json"
    return _read(path) if path.is_file() else None


def differing_keys(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What two results were not made by alike: the names, sorted.

    The commit does not count: most commits change no mask. Those that do raise the version.
    """
    return [name for name in sorted({*before, *now} - {"commit"})
            if before.get(name) != now.get(name)]


def _commits(folder: Path, before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """All commits that results were made by, where they are known; logs that there is another."""
    commits = before.get("commit", "").split(" then ") if "commit" in before else []
    if "commit" in now and now["commit"] not in commits:
        if commits:
            log.info("%s: begun by commit %s of this toolkit, resumed by %s", folder,
                     " then ".join(commits), now["commit"])
        commits.append(now["commit"])
    return {"commit": " then ".join(commits)} if commits else {}


def default_folder(name: str, data: str) -> Path:
    """results/NAME, or with a number behind it where that holds the results of other data."""
    folders = (Path("results") / (name if number == 1 else f"{name}-{number}")
               for number in itertools.count(1))
    return next(folder for folder in folders
                if (made := read_metadata(folder)) is None or made.get("data") == data)


def fingerprint(paths: Iterable[Path]) -> str:
    """A short text that changes when one of these files does: of their names, sizes and times."""
    found = 0
    for path in paths:
        status = path.stat()
        found = zlib.crc32(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode(), found)
    return f"{found:08x}"


def _read(path: Path) -> dict:
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    raise ValueError(f"{path}: not a manifest of this toolkit (--overwrite starts over)")
