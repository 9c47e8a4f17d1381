"""Atomic file writing, and locks that keep two runs from writing to the same folder."""

import errno
import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# Names of the temporary files of `atomic_path`; the first group is the stem of the target.
UNFINISHED = re.compile(r"\.(.+)\.part\d*-\d+(\.[^.]+)?")
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # from some network file systems
MAX_COMMAND = 160  # characters of a command line in an error message: about two lines


@contextmanager
def atomic_path(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` at the end.

    If the context ends with an error, the temporary file is deleted and `path` stays as it was. The
    folder is created if missing.

    Args:
        durable: wait until the disk has the file, so that it also survives a power cut. That takes
            several milliseconds on an SSD, tens on a hard disk: too long for every mask.

    Raises:
        OSError: the file can't be written, or the disk is full; the error names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps runs apart that write the same file; the rank (set by torchrun) does so
    # for one job on several machines. The suffix stays, since libraries choose the format by it.
    rank = os.environ.get("RANK", "")
    temporary = path.with_name(f".{path.stem}.part{rank}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        temporary.replace(path)
        if durable and os.name == "posix":  # elsewhere a folder can't be opened
            _flush(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _flush(path: Path) -> None:
    """Wait until changes of a file or folder are on disk."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: str | Path, content: str | bytes, durable: bool = False) -> None:
    """Write text (as UTF-8) or bytes; see `atomic_path` for arguments and errors."""
    with atomic_path(path, durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def lock_folder(folder: Path, stem: str = "", instead: str = "another folder (--results_dir)"
         ) -> Iterator[None]:
    """Lock a folder against other runs. Enter it before anything there is read or deleted.

    It also deletes temporary files that a killed run left. The operating system releases the lock
    when the process ends, even if it is killed.

    Args:
        folder: created if missing.
        stem: lock only files with this stem (`vm` for vm.pth, vm.state, ...), not the folder.
        instead: alternative that the error message suggests.

    Raises:
        ValueError: another run has locked it; the message says which.
        OSError: the folder isn't writable; the error names it.
    """
    path = folder / (f".{stem}.lock" if stem else ".lock")
    # a file of its own, because older versions of filelock empty the lock file
    holder = path.with_name(f"{path.name}.holder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # with the folder's permissions: a group that shares it must be able to lock it; root may
        # lock a read-only one
        mode = folder.stat().st_mode & 0o666 | 0o600
        lock = FileLock(path, mode=mode, thread_local=False)
        lock.acquire(timeout=0)
    except Timeout:
        try:
            who = holder.read_text(encoding="utf-8").strip()
        except OSError:
            who = "a process that is starting or ending"
        raise ValueError(f"{folder / stem}: another run is writing there ({who}): wait until it "
                         f"ends, or use {instead}") from None
    except (OSError, NotImplementedError) as error:  # the latter is older filelock's for ENOSYS
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        log.warning("%s: the file system doesn't support locks, so a second run isn't detected",
                    folder)
    try:
        _delete_unfinished(folder, stem)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        with suppress(OSError):  # optional: it only adds details to the message above
            write(holder, f"process {os.getpid()} on {socket.gethostname()}, since "
                          f"{time.strftime('%Y-%m-%d %H:%M')}: {command[:MAX_COMMAND]}\n")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        # The lock file itself stays. If it were deleted, a run that opened it just before would
        # lock a file that other runs don't see, and a third run could start at the same time.
        lock.release()


def _delete_unfinished(folder: Path, stem: str) -> None:
    """Delete temporary files in a folder and its subfolders, except those locked by other runs."""
    folders = [folder]
    if not stem:
        folders += [inner for inner in folder.iterdir()
                    if inner.is_dir() and not (inner / ".lock").exists()]
    for place in folders:
        for path in place.iterdir():
            match = UNFINISHED.fullmatch(path.name)
            if match and (match[1] == stem if stem
                          else not (place / f".{match[1]}.lock").exists()):
                with suppress(OSError):
                    path.unlink()


def check_no_overlap(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that no output would overwrite an input.

    Raises:
        ValueError: an output is an input, contains it, or would be a file right inside it.
    """
    for output in (path.resolve() for path in outputs):
        for source in (path.resolve() for path in inputs):
            if output == source or output in source.parents or source == output.parent:
                raise ValueError(f"{output}: would be overwritten, but {source} is an input: "
                                 "choose another folder with --results_dir (-j)")
