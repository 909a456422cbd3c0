"""Progress of long work: a bar on a terminal, in a log a line a minute. Both say how much is left.

for file in progress(files, "pictures"): ...

with progress(what="answers", total=300, done=12) as bar:
    bar.update(8)
"""

import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator

from tqdm import tqdm

SECONDS = 60.0  # between two lines of a log


def progress(iterable: Iterable | None = None, what: str = "", total: int | None = None, done: int = 0):
    """Counts what an iterable gives, or what `update(n)` is told; `done` of `total` were there before."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if sys.stderr and sys.stderr.isatty():  # None where it was closed: 2>&-
        return tqdm(iterable, what, total, initial=done)
    return LogLines(iterable, what, total, done)


class LogLines:
    """`answers: 132 of 300, 4:10 gone, 5:50 left`; a thread writes it, so that a slow step is no silence."""

    def __init__(self, iterable: Iterable | None, what: str, total: int | None, done: int):
        self.iterable = iterable
        self.what = what
        self.total = total
        self.first = self.n = done
        self.start = time.monotonic()
        self.ended = threading.Event()
        threading.Thread(target=tick, args=(weakref.ref(self), self.ended), daemon=True).start()

    def line(self) -> str:
        gone = time.monotonic() - self.start
        new = self.n - self.first
        if self.total is None:
            return f"{self.what}: {self.n}, {clock(gone)} gone"
        left = clock(gone / new * (self.total - self.n)) if new else "?"
        return f"{self.what}: {self.n} of {self.total}, {clock(gone)} gone, {left} left"

    def update(self, n: int = 1) -> None:
        self.n += n

    def write(self, text: str) -> None:
        """A line between those of the bar; tqdm has it too."""
        print(text, flush=True)

    def close(self) -> None:
        self.ended.set()

    def __iter__(self) -> Iterator:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def tick(lines: weakref.ref[LogLines], ended: threading.Event) -> None:
    """Until the work ends, or breaks off and its lines are forgotten."""
    while not ended.wait(SECONDS) and lines() is not None:
        print(lines().line(), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
