"""Errors in one line, for those that a user can do something about; bugs keep their traceback."""

import argparse
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRAME = re.compile(r'File "(.+)", line \d+, in .+\n\s+(.+)')  # of a traceback as text


@contextmanager
def one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End a script with exit status 2 and one line for an error that `explained` knows."""
    try:
        yield
    except (OSError, ValueError) as error:
        message = explained(error)
        if message is None:
            raise
        parser.error(message)


def explained(error: BaseException) -> str | None:
    """One line for an error of the system, or one that this toolkit raises on purpose; else None.

    A ValueError of numpy's, torch's or Python's that nothing caught is a bug of this toolkit: its
    message alone ("operands could not be broadcast together") would tell nobody what to change.
    """
    if isinstance(error, OSError):
        if error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif not isinstance(error, ValueError) or not _raised_here(error):
        return None
    return last_line(error)


def last_line(error: BaseException) -> str:
    """The message of an error; of one that a loader's worker passed on, its last line."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return last.removeprefix(f"{type(error).__name__}: ")


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` in this toolkit's own code raised the error.

    The innermost frame alone does not tell: functions written in C have none, so an error of
    numpy's comes from the line that called it.
    """
    if "\nOriginal Traceback" in str(error):  # of a worker of torch's loader
        frames = FRAME.findall(str(error))
    elif type(error.__cause__).__name__ == "_RemoteTraceback":  # of a worker of a process pool
        frames = FRAME.findall(str(error.__cause__))
    else:
        frames = [(frame.filename, frame.line)
                  for frame in traceback.extract_tb(error.__traceback__)]
    if not frames or not frames[-1][1]:  # never raised, or no source at hand
        return True
    path, line = Path(frames[-1][0]).resolve(), frames[-1][1]
    return (ROOT in path.parents and "site-packages" not in path.parts
            and line.startswith("raise"))
