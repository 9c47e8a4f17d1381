"""Files that appear whole or not at all, whatever ends the program in between."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write, which becomes `path` when the context ends without an error.

    The folder is made if it isn't there.

    Raises:
        OSError: nothing can be written there, or the disk is full; it names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rank = os.environ.get("RANK", "")  # of several processes, as torchrun sets it
    beside = path.with_name(f".{path.stem}.part{rank}{path.suffix}")  # writers go by the suffix
    try:
        yield beside
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def write(path: str | Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes; raises as `whole` does."""
    with whole(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


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
