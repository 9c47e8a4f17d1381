"""Run folder: what its results were made from, and which videos in it are finished.

`manifest.json` holds the run metadata: flags, data, weights, versions. `NAME.finished.json` holds
the entry of a finished video, one file each so that several processes can write into one folder.
"""

import itertools
import json
import logging
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from media import files
from system import distributed

log = logging.getLogger(__name__)

FINISHED = ".finished.json"
# The commit alone does not make results differ: most commits change no mask, and refusing to resume
# after each of them would make every development version start over. Commits that do change masks
# raise the version, which is compared.
NOT_COMPARED = {"commit"}


class RunFolder:
    """The run metadata and the finished videos of a results folder.

    The constructor reads and deletes files there, so lock the folder (`files.lock_folder`) first.
    The lock is separate because `-m segment --box` writes its mask before the metadata are
    complete.

    Args:
        path: the folder; None keeps the entries in memory only.
        metadata: flags, data, weights and versions: everything that changes the results.
        overwrite: delete the metadata, entries and tracker states of earlier runs.
        starts_over: keys of the metadata that overwrite as well if only they differ.

    Attributes:
        metadata: as given; with the commits of all runs that wrote there.
        finished: the entry of each finished video, by its name.
        replaces: whether results of an earlier run are there that have to be deleted.

    Raises:
        ValueError: the folder's results were made from other metadata, or its files are damaged.
    """

    def __init__(self, path: Path | None, metadata: dict[str, str], overwrite: bool = False,
                 starts_over: Collection[str] = ()):
        self.path, self.metadata = path, metadata
        self.finished: dict[str, dict] = {}
        self._started, self.replaces = False, False
        if path is None:
            return
        manifest = path / "manifest.json"
        self._may_write = overwrite or manifest.is_file()
        earlier = None if overwrite else read_metadata(path)
        differing = [] if earlier is None else differing_keys(earlier, metadata)
        if differing and set(differing) <= set(starts_over):
            log.info("%s: made from other %s; starting over with these", path,
                     " and ".join(differing))
            overwrite = True
        if overwrite:
            self.replaces = manifest.is_file()
            for file in (*path.glob(f"*{FINISHED}"), *path.glob(".*.progress"), manifest):
                file.unlink(missing_ok=True)
        elif earlier is not None:
            for key in differing:
                old, new = earlier.get(key, "none"), metadata.get(key, "none")
                raise ValueError(f"{path}: holds results of other {key} ({old!r}, now {new!r}): "
                                 "name another folder, or start over (--overwrite)")
            self.metadata = metadata | _commits(path, earlier, metadata)
            self.finished = {file.name.removesuffix(FINISHED): _read(file)
                             for file in path.glob(f"*{FINISHED}")}

    def start(self, output_folders: Iterable[Path] = ()) -> None:
        """Write `manifest.json`; call it before the first result. Later calls do nothing.

        Args:
            output_folders: where the results go.

        Raises:
            ValueError: see `check`.
        """
        if self.path is None or distributed.rank() or self._started:
            return
        self._started = True
        self.check(output_folders)
        files.write(self.path / "manifest.json", json.dumps(self.metadata, indent=1))

    def check(self, output_folders: Iterable[Path]) -> None:
        """Refuse to replace results of another program.

        Raises:
            ValueError: a folder holds files, but there was no manifest, and they may not be
                replaced.
        """
        for folder in output_folders:
            if not self._may_write and folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"{folder}: holds files, but {self.path} has no manifest.json of "
                                 "this toolkit: name another folder (-j), or replace them "
                                 "(--overwrite)")

    def finish(self, name: str, entry: dict) -> None:
        """Record a video as finished; call it when all of its files are written.

        Args:
            entry: what a later run needs to know about it, as JSON.
        """
        self.finished[name] = entry
        if self.path:
            files.write(self.path / f"{name}{FINISHED}", json.dumps(entry))

    def gather(self) -> None:
        """Add the entries of the job's other processes to `finished`."""
        for entries in distributed.gather(self.finished):
            self.finished |= entries


def read_metadata(folder: Path) -> dict[str, str] | None:
    """The run metadata of a folder; None if it has no `manifest.json`."""
    path = folder / "manifest.json"
    return _read(path) if path.is_file() else None


def differing_keys(earlier: dict[str, str], now: dict[str, str]) -> list[str]:
    """The keys in which two runs' metadata differ, sorted; `NOT_COMPARED` keys are left out."""
    return [key for key in sorted({*earlier, *now} - NOT_COMPARED)
            if earlier.get(key) != now.get(key)]


def _commits(folder: Path, earlier: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """The metadata entry with all commits that made the results; a new one is logged."""
    commits = earlier["commit"].split(" then ") if earlier.get("commit") else []
    if "commit" in now and now["commit"] not in commits:
        if commits:
            log.info("%s: begun by commit %s of this toolkit, resumed by %s", folder,
                     " then ".join(commits), now["commit"])
        commits.append(now["commit"])
    return {"commit": " then ".join(commits)} if commits else {}


def default_folder(name: str, data: str) -> Path:
    """results/NAME, or the first of results/NAME-2, NAME-3, ... without results of other data.

    Args:
        data: the run metadata's "data".
    """
    folders = (Path("results") / (name if number == 1 else f"{name}-{number}")
               for number in itertools.count(1))
    return next(folder for folder in folders
                if (metadata := read_metadata(folder)) is None or metadata.get("data") == data)


def fingerprint(paths: Iterable[Path]) -> str:
    """Eight hex digits that change when a file's name, size or modification time does.

    Contents are not read: a fingerprint of an hour of video would take minutes.
    """
    checksum = 0
    for path in paths:
        status = path.stat()
        checksum = zlib.crc32(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode(),
                              checksum)
    return f"{checksum:08x}"


def _read(path: Path) -> dict:
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    raise ValueError(f"{path}: not a manifest of this toolkit (--overwrite starts over)")
