"""Pairs per second out of the worker processes, two prepared pictures each, with the loader that training uses.

python -m bench.loading DATA --base llava-1.5-7b --workers 4
"""

import argparse
import itertools
import math
import os
import time

from tqdm import tqdm

from data import EpochSampler, Pair, PairData, Processor, example_loader
from formats.command import data_parser, load_small_processor
from formats.problems import image_problem
from formats.readers import read_pairs


def measure(args: argparse.Namespace, pairs: list[Pair], processor: Processor) -> None:
    """Times args.pairs examples, after as many as the workers need to start."""
    good = [pair for pair in pairs if not image_problem(pair, args.rejected_image)]
    if not good:
        raise SystemExit(f"{args.data}: no row has a picture that opens")
    data = PairData(good, processor, args.rejected_image, args.seed)
    first = 4 * max(1, args.workers)
    total = first + args.pairs
    sampler = EpochSampler(len(data), epochs=math.ceil(total / len(data)), seed=args.seed)
    loader = example_loader(data, sampler, args.workers)
    for done, _ in enumerate(tqdm(itertools.islice(loader, total), "pairs", total, disable=None), 1):
        if done == first:
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    print(
        f"{args.pairs / seconds:.1f} pairs/s: {args.pairs} pairs in {seconds:.1f} s, {args.workers} workers, "
        f"{os.cpu_count()} cores, m_l by {args.rejected_image!r}, pictures of {processor.template.image.size} px"
    )


def main(argv=None) -> None:
    p = data_parser(__doc__.split("\n")[0], base_required=True)
    p.add_argument("--seed", type=int, default=0, help="order of the pairs, and m_l")
    p.add_argument("--workers", type=int, default=2, help="processes that prepare pictures")
    p.add_argument("--pairs", type=int, default=300, help="how many are timed")
    args = p.parse_args(argv)
    processor = load_small_processor(args.base)
    pairs, _ = read_pairs(args.data, args.image_root)
    measure(args, pairs, processor)


if __name__ == "__main__":
    main()
