"""Examples out of worker processes: exactly `data[key] for key in keys` of data.PairData, prepared ahead.

Workers hand pictures over as levels of 8 bits through /dev/shm, a quarter of the prepared float32; they are normalised
on the device (data.Batch.to). /dev/shm holds 64 MB in a container of Docker's default, and workers that find it full
wait for ever: so how many examples are under way is fitted to what is free.
"""

import atexit
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from data import Example, LostPicture, PairData

SHARE = 0.7  # of what is free in shared memory


def example_loader(data: PairData, keys: Sequence[tuple[int, int]], workers: int, batch: int = 8) -> Iterator[Example]:
    """The examples of `keys` (epoch, index) one by one, at least one step of `batch` ahead where there is room.

    SystemExit if a picture can no longer be opened.
    """
    ahead = max(8, math.ceil(batch / max(1, workers)))
    workers, ahead = fit_shared_memory(example_bytes(data), workers, ahead, free_shared_memory())
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=begin_worker,
    )
    atexit.register(end_workers)
    try:
        yield from loader
        return
    except LostPicture as e:
        lost = str(e).rpartition("LostPicture: ")[2].strip()  # a worker's brings its traceback along
        e.__traceback__ = None  # it holds the loader: freed in some later collection, that would wait for its workers
    raise SystemExit(lost)


def begin_worker(number: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process: the run ends its step and saves, then ends its workers.

    Ignored, not masked: a mask holds for one thread, and torch begins others before this is called.
    """
    sys.excepthook = say_but_cut_connections
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """Before multiprocessing's own end, which sends SIGTERM and then waits for workers that would not hear it."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the end as an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def say_but_cut_connections(kind, error, trace) -> None:
    """A worker that was just handing pictures over to a run that died has nothing to say; the run has."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def example_bytes(data: PairData) -> int:
    """Shared memory that one example takes, rounded up."""
    size = data.processor.template.image.size
    picture = 3 * size**2 if data.with_image else 0
    m_l = 0
    if data.strategy:
        m_l = 4 * picture if data.strategy == "crop-released" else picture  # a bilinear crop is float32
    return picture + m_l + 100_000  # token ids, and pages begun


def fit_shared_memory(example: int, workers: int, ahead: int, free: float) -> tuple[int, int]:
    """(workers, examples that each prepares ahead): as asked, or fewer if `free` bytes could not hold them.

    A worker has one example more in work than it prepares ahead.
    """
    room = int(SHARE * free / example) if free < math.inf else workers * (ahead + 1)  # examples under way at once
    if room >= workers * (ahead + 1):
        return workers, ahead
    fewer = min(workers, room // 2)
    if fewer == 0:
        print("/dev/shm has no room for worker processes: pictures are prepared between the steps (docker: --shm-size)")
        return 0, 0
    less = min(ahead, room // fewer - 1)
    print(
        f"/dev/shm has room for {room} examples: {fewer} of {workers} workers, each {less} ahead (docker: --shm-size)"
    )
    return fewer, less


def free_shared_memory() -> float:
    """This process's share of the free bytes of /dev/shm; no limit where there is no such folder."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")  # by torchrun: each process has workers of its own
    processes = max(1, int(told)) if told.isdigit() else 1
    try:
        return shutil.disk_usage("/dev/shm").free / processes
    except OSError:
        return math.inf
