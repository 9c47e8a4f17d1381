"""Work beside the network: threads a few frames ahead or late, in order; progress; Ctrl+C."""

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

from tqdm import tqdm

AHEAD = 3  # items that are got before their turn, or calls that wait


def ahead(pool: Executor, function: Callable, items: Iterable) -> Iterator:
    """function(item) of each item in order, with AHEAD calls more under way than are asked for."""
    calls: deque[Future] = deque()
    for item in items:
        calls.append(pool.submit(function, item))
        if len(calls) > AHEAD:
            yield calls.popleft().result()
    while calls:
        yield calls.popleft().result()


class Background:
    """Calls of a function, one after the other, in a thread of their own.

    Leaving the context, by an error or by Ctrl+C too, waits for the calls that were made. An
    error in one is raised by a later call, or on leaving. The calls after it are dropped: what
    they write could contradict the gap, such as the state of a run at a frame behind it.
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
        """Arguments may not be changed any more by anybody."""
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
    """Turn Ctrl+C into a flag for as long as the context lasts: it yields a function that asks.

    So what is under way ends whole. Outside of the main thread, which alone may do so, it does
    nothing.
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
    """A file for tqdm where there is no terminal: a line for each state of the bar."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable | None = None, **options) -> tqdm:
    """A bar on a terminal, elsewhere a line a minute; arguments are those of tqdm."""
    if not sys.stderr.isatty():
        options = {"file": Lines(), "mininterval": 60, "maxinterval": 60, "miniters": 1,
                   "ascii": True, "ncols": 80} | options
    return tqdm(items, **options)
