"""Download the official DAVIS archives: resumes, verifies and unpacks them.

    python davis.py --download DIR [--year 2017]
"""

import errno
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from media import files

TRIES = 5  # attempts in a row without a single byte before giving up
WAIT = 2.0  # seconds, times the number of failed attempts: a busy server gets more time each time
BLOCK = 1 << 20  # bytes per read: few system calls, yet a steady progress bar


@dataclass(frozen=True)
class Archive:
    """An archive's address and checksum."""

    url: str
    sha256: str | None  # None if none is published; the ZIP's own ones are always verified


ARCHIVES = {
    "2016": Archive("https://graphics.ethz.ch/Downloads/Data/Davis/DAVIS-data.zip", None),
    # the checksum that TensorFlow Datasets publishes (video/davis/checksums.tsv)
    "2017": Archive(
        "https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip",
        "e3d0b5b77c3d031b000a19e0e25e3e2cac65d183755601bc2cf066df1a2aa492"),
}


def download(folder: Path, year: str) -> None:
    """Download an archive and unpack its 480p frames and masks into a DAVIS folder.

    After an interruption the same call resumes. The archive is deleted afterwards.

    Raises:
        OSError: the server can't be reached, the disk is full, or `folder` holds a data set.
        ValueError: the downloaded file is not the archive, or damaged.
    """
    archive = ARCHIVES[year]
    if (folder / "JPEGImages").exists():
        raise FileExistsError(f"{folder}: already holds a data set, expected another folder")
    with files.lock_folder(folder, instead="another folder (--download)"):
        path = folder / PurePosixPath(archive.url).name
        fetch(archive.url, path)
        try:
            check(path, archive.sha256)
            unpack(path, folder)
        except ValueError:
            path.unlink()  # so that the next call downloads it again
            raise
        path.unlink()


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path`. Data go to `path`.part first, where an interrupted call resumes.

    Raises:
        OSError: the server can't be reached or answers with an error.
    """
    if path.is_file():
        return
    part, tries = path.with_name(path.name + ".part"), 0
    while tries < TRIES:
        time.sleep(WAIT * tries)
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _fetch_rest(url, part, before):
                part.replace(path)
                return
        except urllib.error.HTTPError as error:
            raise OSError(f"{url}: {error.code} {error.reason}") from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
            pass
        after = part.stat().st_size if part.is_file() else 0
        # a slow, fragile connection may take any number of attempts while it makes progress
        tries = 0 if after > before else tries + 1
    raise OSError(f"{url}: the connection broke {TRIES} times: run the same command again to "
                  f"resume after {after >> 20} MB")


def _fetch_rest(url: str, part: Path, offset: int) -> bool:
    """Append the bytes from `offset` on to `part`; returns False if the connection broke early."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:  # no partial content: the server sends the whole file
            offset = 0
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        with part.open("ab" if offset else "wb") as file, \
                tqdm(total=total, initial=offset, desc=part.stem, unit="B", unit_scale=True,
                     disable=None) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
            return total is None or file.tell() == total


def check(path: Path, sha256: str | None) -> None:
    """Check that a file is a ZIP archive with this checksum (None: with any).

    Raises:
        ValueError: it is not.
    """
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise ValueError(f"{path}: SHA-256 {digest}, expected {sha256}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a ZIP archive")


def unpack(path: Path, folder: Path) -> None:
    """Unpack the contents of the archive's DAVIS/ into `folder`, completely or not at all.

    Frames of more than 480p are left out: they take several times the space, and published scores
    refer to 480p.

    Raises:
        OSError: there is not enough space on the disk.
        ValueError: a member's path leads out of the folder, a checksum is wrong, or the archive is
            not DAVIS.
    """
    temporary = folder / ".unpacked.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(member, _target(member, path)) for member in archive.infolist()
                       if not member.is_dir()]
            members = [(m, relative) for m, relative in members
                       if not {"1080p", "Full-Resolution"} & {*relative.parts}]
            if sum(m.file_size for m, _ in members) > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            for member, relative in tqdm(members, desc="unpacking", disable=None):
                (temporary / relative).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, (temporary / relative).open("wb") as target:
                    shutil.copyfileobj(source, target)
        if not (temporary / "JPEGImages" / "480p").is_dir():
            raise ValueError(f"{path}: expected it to contain DAVIS/JPEGImages/480p")
        # frames last: `download` takes their folder as the sign of a complete data set
        for part in sorted(temporary.iterdir(), key=lambda part: part.name == "JPEGImages"):
            part.replace(folder / part.name)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: damaged archive ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _target(member: zipfile.ZipInfo, path: Path) -> PurePosixPath:
    """Return the path of an archive's member within the data set: without the leading DAVIS/."""
    relative = PurePosixPath(member.filename.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or ":" in relative.parts[0]:
        raise ValueError(f"{path}: {member.filename!r} would be written outside of the folder")
    return PurePosixPath(*relative.parts[relative.parts[0] == "DAVIS":])
