"""A step's examples: which ones, for which process, and prepared before the step needs them."""

import errno
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np

from data import Example, PairData
from engine.distributed import World, share
from engine.loading import example_loader


def epoch_keys(n: int, epochs: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, index) of all epochs, each in an order of its own that (seed, epoch) alone decides."""
    keys = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n)
        keys += [(epoch, int(index)) for index in order]
    return keys


def plan_steps(data: PairData, batch: int, steps: int, world: World) -> list[tuple[list[tuple[int, int]], int]]:
    """For each step the (epoch, index) of the examples that this process takes, and how many the step has in all.

    Every epoch has its own order; its last batch holds what is left. Several processes share by tokens, not by count.
    """
    epochs = math.ceil(steps / math.ceil(len(data) / batch))
    keys = epoch_keys(len(data), epochs, data.seed)
    plan, start = [], 0
    for _ in range(steps):
        left_in_epoch = len(data) - start % len(data)
        size = min(batch, left_in_epoch)
        own = step_keys = keys[start : start + size]
        if world.size > 1:
            lengths = [data.without_pixels(key).tokens() for key in step_keys]
            own = [step_keys[i] for i in share(lengths, world)]
        plan.append((own, size))
        start += size
    return plan


def batches(data: PairData, plan: list, start: int, workers: int) -> Iterator[tuple[int, list[Example], int]]:
    """(step, its examples, how many all processes have together) from step `start` on, prepared ahead by workers."""
    left = plan[start:]
    keys = [key for step_keys, _ in left for key in step_keys]
    most = max((len(step_keys) for step_keys, _ in left), default=1)
    examples = example_loader(data, keys, workers, most)
    for step, (step_keys, size) in enumerate(left, start):
        yield step, list(islice(examples, len(step_keys))), size


OUTSIDE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)  # what a disk or its owner refuses


@contextmanager
def workers_watched():
    """Inside, a killed worker process ends the run with a sentence; torch raises it wherever the run is just then.

    So do Ctrl-C outside the loop, and a file or an output that the system refuses.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted. What was saved before is whole.", file=sys.stderr)
        raise SystemExit(130) from None
    except (RuntimeError, OSError, EOFError) as e:
        if "Too many open files" in str(e):
            raise SystemExit("Too many open files: raise the limit (ulimit -n 4096), or lower --workers.") from None
        if "can't allocate memory" in str(e):
            raise SystemExit("Not enough memory on this machine: lower --micro-batch or --lora-r.") from None
        if isinstance(e, OSError) and e.errno in OUTSIDE:
            place = "standard output" if e.filename is None and output_is_gone() else e.filename
            raise SystemExit(f"{place}: {e.strerror}.") from None
        if isinstance(e, BrokenPipeError) and output_is_gone():
            raise SystemExit("Nobody reads the output any more (`| head`?); --resume takes the run up.") from None
        if "DataLoader worker" not in str(e) and not isinstance(e, (ConnectionError, EOFError)):  # its queue is cut
            raise
        raise SystemExit(
            f"A process that prepares pictures was killed ({str(e).partition(chr(10))[0]}); most often memory ran out. "
            "Resume with the same command, --resume and fewer --workers."
        ) from None


def output_is_gone() -> bool:
    """Whether it is standard output that has no reader or no room; what is still to be printed goes nowhere then."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
