"""Pairs per second out of the worker processes, two prepared pictures each, with the loader that training uses.

python -m bench.loading DATA --base llava-1.5-7b --workers 4
"""

import argparse
import itertools
import math
import os
import time

from data import PairData, Processor
from engine.batches import epoch_keys
from engine.loading import example_loader
from external.flags import whole
from external.progress import progress
from formats.command import data_parser, read_and_examine
from formats.problems import Examined, usable


def measure(args: argparse.Namespace, examined: Examined, processor: Processor) -> None:
    """Times args.pairs examples, after as many as the workers need to start."""
    good = usable(examined, skip_bad=True)
    data = PairData(
        good,
        processor,
        strategy=examined.strategy,
        seed=args.seed,
        with_image=examined.demands.with_image,
        max_length=args.max_length,
    )
    first = 4 * max(1, args.workers)
    total = first + args.pairs
    sampler = epoch_keys(len(data), epochs=math.ceil(total / len(data)), seed=args.seed)
    loader = example_loader(data, sampler, args.workers)
    for done, _ in enumerate(progress(itertools.islice(loader, total), "pairs", total), 1):
        if done == first:
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    print(
        f"{args.pairs / seconds:.1f} pairs/s: {args.pairs} pairs in {seconds:.1f} s, {args.workers} workers, "
        f"{os.cpu_count()} cores, m_l by {data.strategy!r}, pictures of {processor.template.image.size} px"
    )


def main(argv=None) -> None:
    p = data_parser(__doc__.split("\n")[0], base_required=True)
    p.add_argument("--seed", type=whole(0), default=0, help="order of the pairs, and m_l (default: %(default)s)")
    p.add_argument("--workers", type=whole(0), default=2, help="processes that prepare pictures (default: %(default)s)")
    p.add_argument("--pairs", type=whole(1), default=300, help="how many are timed (default: %(default)s)")
    args = p.parse_args(argv)
    examined, processor = read_and_examine(args)
    measure(args, examined, processor)


if __name__ == "__main__":
    main()
