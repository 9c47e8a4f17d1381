"""The official DAVIS archives: fetched with progress, going on after a cut, checked, unpacked.

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

TRIES = 5  # after each other without a byte
WAIT = 2.0  # seconds between them, and more each time
BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Archive:
    url: str
    sha256: str | None  # where somebody published one; the archive's own check-sums count anyway


ARCHIVES = {
    "2016": Archive("https://graphics.ethz.ch/Downloads/Data/Davis/DAVIS-data.zip", None),
    # the check-sum that TensorFlow Datasets publishes (video/davis/checksums.tsv)
    "2017": Archive(
        "https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip",
        "e3d0b5b77c3d031b000a19e0e25e3e2cac65d183755601bc2cf066df1a2aa492"),
}


def download(folder: Path, year: str) -> None:
    """Fetch an archive and unpack its 480p frames and masks, so that `folder` is a DAVIS folder.

    A call that was cut off goes on where it stopped.

    Raises:
        OSError: the server can't be reached, the disk is full, or there is a data set already.
        ValueError: what was fetched is not the archive.
    """
    archive = ARCHIVES[year]
    if (folder / "JPEGImages").exists():
        raise FileExistsError(f"{folder}: holds a data set already, expected another folder")
    with files.hold(folder, instead="another folder (--download)"):
        path = folder / PurePosixPath(archive.url).name
        fetch(archive.url, path)
        try:
            check(path, archive.sha256)
            unpack(path, folder)
        except ValueError:
            path.unlink()  # the next call starts anew
            raise
        path.unlink()


def fetch(url: str, path: Path) -> None:
    """Write the file at `url` to `path`; what is there of it, in `path`.part, is not fetched again.

    Raises:
        OSError: the server can't be reached, or refuses.
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
        tries = 0 if after > before else tries + 1
    raise OSError(f"{url}: the connection broke {TRIES} times: the same command goes on after "
                  f"{after >> 20} MB")


def _fetch_rest(url: str, part: Path, have: int) -> bool:
    """Append what is missing to `part`; False if the connection broke before the end."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:  # the server sends it all
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if have else "wb") as file, \
                tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True,
                     disable=None) as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
            return total is None or file.tell() == total


def check(path: Path, sha256: str | None) -> None:
    """Raise a ValueError unless the file is a ZIP archive with this check-sum, if there is one."""
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(f"{path}: SHA-256 {found}, expected {sha256}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a ZIP archive")


def unpack(path: Path, folder: Path) -> None:
    """Unpack what DAVIS/ holds into `folder`, without larger frames; whole or not at all.

    Raises:
        OSError: the disk has too little room.
        ValueError: a member would lie outside, a check-sum is wrong, or it is not DAVIS.
    """
    beside = folder / ".unpacked.part"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(member, _place(member, path)) for member in archive.infolist()
                       if not member.is_dir()]
            members = [(m, place) for m, place in members
                       if not {"1080p", "Full-Resolution"} & {*place.parts}]
            if sum(m.file_size for m, _ in members) > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            for member, place in tqdm(members, desc="unpacking", disable=None):
                (beside / place).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, (beside / place).open("wb") as target:
                    shutil.copyfileobj(source, target)
        if not (beside / "JPEGImages" / "480p").is_dir():
            raise ValueError(f"{path}: expected DAVIS/JPEGImages/480p in it")
        for part in sorted(beside.iterdir(), key=lambda part: part.name == "JPEGImages"):
            part.replace(folder / part.name)  # the frames last, which tell that it is whole
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: a broken archive ({error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _place(member: zipfile.ZipInfo, path: Path) -> PurePosixPath:
    """Where in the data set a member belongs."""
    place = PurePosixPath(member.filename.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
        raise ValueError(f"{path}: {member.filename!r} would lie outside of the folder")
    return PurePosixPath(*place.parts[place.parts[0] == "DAVIS":])
