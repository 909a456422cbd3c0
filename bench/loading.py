"""Pairs per second out of the worker processes: `python -m bench.loading DATA --base B`."""

import argparse
import os
import time
from pathlib import Path

from tqdm import tqdm

import data
import pictures
from bases import checkpoint
from data import Pair
from formats import check, hub_data
from formats.check import load_small_processor
from formats.readers import read_pairs

# ---- --time --------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, pairs: list[Pair], processor: data.Processor) -> None:
    """Pairs per second, two prepared pictures each, out of the loader that training uses."""
    good = [p for p in pairs if not check.image_problem(p, args.rejected_image)]
    if not good:
        raise SystemExit(f"{args.data}: no row has a picture that opens")
    examples = data.PairData(good, processor, args.rejected_image, args.seed)
    n, first = args.pairs, 4 * max(1, args.workers)  # the first wait for the workers to start
    sampler = data.EpochSampler(len(examples), -(-(n + first) // len(examples)), args.seed)
    loader = data.example_loader(examples, sampler, args.workers)
    for done, _ in enumerate(tqdm(loader, "pairs", n + first, disable=None), 1):
        if done == first:
            start = time.perf_counter()
        if done == first + n:
            break
    seconds = time.perf_counter() - start
    print(f"{n / seconds:.1f} pairs/s: {n} pairs in {seconds:.1f} s, {args.workers} workers, {os.cpu_count()} cores, "
          f"m_l by {args.rejected_image!r}, pictures of {processor.template.image.size} px")  # fmt: skip


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("data", help=f"preference file, folder, or hub data set ({', '.join(hub_data.NAMED)}, owner/name)")
    p.add_argument("--base", required=True, help=f"{', '.join(checkpoint.SOURCES)}, or a checkpoint folder")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the data file's)")
    p.add_argument("--rejected-image", default="crop", choices=pictures.STRATEGIES, help="how m_l is made from m_w")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2, help="processes that prepare pictures")
    p.add_argument("--pairs", type=int, default=300, help="how many are timed")
    args = p.parse_args(argv)
    processor = load_small_processor(args.base)
    measure(args, read_pairs(args.data, args.image_root)[0], processor)


if __name__ == "__main__":
    main()
