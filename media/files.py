"""Files that appear whole or not at all, whatever ends the program, and locks on where they go."""

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

# what `whole` calls a file that is not complete yet; the first group is the stem of its target
UNFINISHED = re.compile(r"\.(.+)\.part\d*-\d+(\.[^.]+)?")
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # as some network file systems say
COMMAND = 160  # characters of a command line that fit into a message


@contextmanager
def whole(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """A file beside `path` to write, which becomes `path` when the context ends without an error.

    The folder is made if it isn't there.

    Args:
        durable: wait until the disk has the file, so that it survives a power cut too. That takes
            several milliseconds on an SSD, tens on a hard disk: too long for every mask.

    Raises:
        OSError: nothing can be written there, or the disk is full; it names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps apart runs that write the same file, the rank (set by torchrun) those
    # processes of one job that run on several machines. Writers go by the suffix, so it stays.
    rank = os.environ.get("RANK", "")
    beside = path.with_name(f".{path.stem}.part{rank}-{os.getpid()}{path.suffix}")
    try:
        yield beside
        if durable:
            _flush(beside)
        beside.replace(path)
        if durable and os.name == "posix":  # elsewhere a folder can't be opened
            _flush(path.parent)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _flush(path: Path) -> None:
    """Wait until the disk has what was written to a file or changed in a folder."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: str | Path, content: str | bytes, durable: bool = False) -> None:
    """Write text, as UTF-8, or bytes; arguments and errors are those of `whole`."""
    with whole(path, durable) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def hold(folder: Path, stem: str = "", instead: str = "another folder (--results_dir)"
         ) -> Iterator[None]:
    """Lock a folder against other runs; enter before anything in it is read, deleted or opened.

    Also deletes the unfinished files that a killed run left there. The operating system releases
    the lock of a process that ends, however it ends.

    Args:
        folder: created if missing.
        stem: lock only the files named so (`vm` for vm.pth, vm.state, ...), not the folder.
        instead: what the error message suggests to use.

    Raises:
        ValueError: another run holds it; the message says which.
        OSError: nothing can be written there; it names `folder`.
    """
    path = folder / (f".{stem}.lock" if stem else ".lock")
    holder = path.with_name(f"{path.name}.holder")  # older versions of filelock empty the lock file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # whoever may write into the folder may lock it: it may be a group's
        lock = FileLock(path, mode=folder.stat().st_mode & 0o666, thread_local=False)
        lock.acquire(timeout=0)
    except Timeout:
        try:
            who = holder.read_text(encoding="utf-8").strip()
        except OSError:
            who = "a process that is starting or ending"
        raise ValueError(f"{folder / stem}: another run is writing there ({who}): wait until it "
                         f"has ended, or name {instead}") from None
    except (OSError, NotImplementedError) as error:  # the latter is older filelock's for ENOSYS
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        log.warning("%s: its file system has no locks, so nothing keeps a second run out", folder)
    try:
        _delete_unfinished(folder, stem)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        with suppress(OSError):  # it only makes the message above say more
            write(holder, f"process {os.getpid()} on {socket.gethostname()}, since "
                          f"{time.strftime('%Y-%m-%d %H:%M')}: {command[:COMMAND]}\n")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        # The lock file itself stays: if it were deleted, a run that had opened it just before
        # would lock a file that nobody sees any more, and a third run could start beside it.
        lock.release()


def _delete_unfinished(folder: Path, stem: str) -> None:
    """Delete what `whole` left in a folder and right below it, but for what others have locked."""
    folders = [folder]
    if not stem:
        folders += [inner for inner in folder.iterdir()
                    if inner.is_dir() and not (inner / ".lock").exists()]
    for place in folders:
        for path in place.iterdir():
            of = UNFINISHED.fullmatch(path.name)
            if of and (of[1] == stem if stem else not (place / f".{of[1]}.lock").exists()):
                with suppress(OSError):
                    path.unlink()


def keep_apart(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse to write where something is read from.

    Raises:
        ValueError: an output is an input, holds it, or would lie right in it.
    """
    for output in (path.resolve() for path in outputs):
        for source in (path.resolve() for path in inputs):
            if output == source or output in source.parents or source == output.parent:
                raise ValueError(f"{output}: would be written, but {source} is read: name another "
                                 "folder with --results_dir (-j)")
