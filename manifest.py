"""What a results folder holds: what made it, and what is known of each video that is finished.

`manifest.json` tells what made it. What is known of a finished video lies in `NAME.finished.json`,
so that several processes may work into one folder. What it is that is known, it doesn't know.
"""

import json
from contextlib import suppress
from pathlib import Path

import distributed
from media import files

FINISHED = ".finished.json"


class Manifest:
    """The record of a results folder, kept up to date after each video.

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
        if folder is None:
            return
        path = folder / "manifest.json"
        if overwrite:
            for old in (*folder.glob(f"*{FINISHED}"), *folder.glob(".*.progress"), path):
                old.unlink(missing_ok=True)
        elif path.is_file():
            self._compare(_read(path), made_by)
            self.entries = {old.name.removesuffix(FINISHED): _read(old)
                            for old in folder.glob(f"*{FINISHED}")}

    def _compare(self, before: dict[str, str], now: dict[str, str]) -> None:
        for name in sorted({*before, *now}):
            old, new = before.get(name, "none"), now.get(name, "none")
            if old != new:
                raise ValueError(f"{self.folder}: holds results of other {name} ({old!r}, now "
                                 f"{new!r}): name another folder, or start over (--overwrite)")

    def begin(self) -> None:
        """Say what makes the results that are about to be written."""
        if self.folder and distributed.rank() == 0:
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


def _read(path: Path) -> dict:
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    raise ValueError(f"{path}: not a manifest of this toolkit (--overwrite starts over)")
