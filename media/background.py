"""Background threads for reading ahead and writing, progress bars, and Ctrl+C."""

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

from tqdm import tqdm

# Items read ahead, and calls that may wait: a few even out frames that take longer than others;
# each holds a decoded frame in memory.
AHEAD = 3


def ahead(pool: Executor, function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) for each item, in order, with up to AHEAD calls running in advance."""
    calls: deque[Future] = deque()
    for item in items:
        calls.append(pool.submit(function, item))
        if len(calls) > AHEAD:
            yield calls.popleft().result()
    while calls:
        yield calls.popleft().result()


class Background:
    """Calls a function in a background thread, one call after the other.

    Leaving the context waits for pending calls, also after an error or Ctrl+C. An error in a call
    is raised by a later call, or on exit. The calls after it are dropped: what they write could
    contradict the gap, such as the state of a run at a later frame.
    """

    def __init__(self, function: Callable):
        self.function, self.thread = function, ThreadPoolExecutor(1)
        self.calls: deque[Future] = deque()
        self.failed = False

    def _call(self, *arguments) -> None:
        if self.failed:
            return
        try:
            self.function(*arguments)
        except BaseException:
            self.failed = True
            raise

    def __call__(self, *arguments) -> None:
        """Queue a call. The arguments must not be modified afterwards."""
        self.calls.append(self.thread.submit(self._call, *arguments))
        if len(self.calls) > AHEAD:
            self.calls.popleft().result()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.thread.shutdown()
        if kind is None:
            for call in self.calls:
                call.result()


@contextmanager
def interruptible():
    """Turn Ctrl+C into a flag while the context lasts, so that the frame in progress is finished.

    Yields a function that returns whether Ctrl+C was pressed. Only the main thread may install a
    signal handler; in others that function always returns False.
    """
    caught: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGINT, before)


class Lines:
    """A file for tqdm that prints each state of the bar on a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable | None = None, **options) -> tqdm:
    """Wrap items in a tqdm bar; without a terminal it prints one line a minute.

    A log file would otherwise fill with thousands of states of the bar.
    """
    if not sys.stderr.isatty():
        options = {"file": Lines(), "mininterval": 60, "maxinterval": 60, "miniters": 1,
                   "ascii": True, "ncols": 80} | options
    return tqdm(items, **options)
