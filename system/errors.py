"""One-line messages for errors that a user can do something about; bugs keep their traceback."""

import argparse
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRAME = re.compile(r'File "(.+)", line \d+, in .+\n\s+(.+)')  # in a traceback as text
# Out of memory, in the messages of PyTorch, oneDNN and Python's threads
OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive",
                 "could not create a memory", "can't start new thread")
# Out of shared memory, in the messages of PyTorch's data loader and of the system
SHARED_MEMORY = ("DataLoader worker", "shared memory", "/dev/shm", "Shared memory")


@contextmanager
def one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End a script with exit status 2 and one line for errors that have a one-line message."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        message = explained(error)
        if message is None:
            raise
        parser.error(message)


def explained(error: BaseException) -> str | None:
    """One-line message for an error with a cause outside this toolkit; None for a bug.

    Causes are the operating system, too little memory, a device that lacks an operation, and what
    the toolkit itself raises as ValueError: wrong flags and files. A ValueError that NumPy, torch
    or Python raised and nothing caught is a bug. Its message alone ("operands could not be
    broadcast together") would not tell users what to change.
    """
    if _is_out_of_memory(error):
        return ("out of memory: use a smaller --size, --input_image_shape or --upsample_factor, "
                "or for training a smaller --batch_size")
    if isinstance(error, OSError):
        if error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return last_line(error)
    if isinstance(error, ValueError):
        return last_line(error) if _raised_here(error) else None
    if any(words in str(error) for words in SHARED_MEMORY):
        return (f"too little shared memory for the data loader ({last_line(error)}): use "
                "--workers 0, or --shm-size 1g for Docker")
    if isinstance(error, NotImplementedError):
        return (f"the device lacks an operation ({last_line(error)}): use -c cpu, or set "
                "PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment")
    return None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, reports that memory ran out."""
    return error is not None and (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which lite.py must not import
        or any(words in str(error) for words in OUT_OF_MEMORY)
        or _is_out_of_memory(error.__cause__))


def last_line(error: BaseException) -> str:
    """The last line of an error's message: data loader workers put a traceback before it."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return last.removeprefix(f"{type(error).__name__}: ")


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` statement in this toolkit's own code raised the error.

    The file of the innermost frame is not enough: functions written in C have no frame, so an
    error raised by NumPy seems to come from the line that called it.
    """
    if "\nOriginal Traceback" in str(error):  # from a worker of torch's data loader
        frames = FRAME.findall(str(error))
    elif type(error.__cause__).__name__ == "_RemoteTraceback":  # from a worker of a process pool
        frames = FRAME.findall(str(error.__cause__))
    else:
        frames = [(frame.filename, frame.line)
                  for frame in traceback.extract_tb(error.__traceback__)]
    if not frames or not frames[-1][1]:  # never raised, or the source is missing
        return True
    path, line = Path(frames[-1][0]).resolve(), frames[-1][1]
    return (ROOT in path.parents and "site-packages" not in path.parts
            and line.startswith("raise"))
