"""What only a GPU can show, one section a process; each ends with PASS or FAIL lines against stated bounds.

    python -m bench.gpu_check correct      every path against the CPU, first loss, flash, head, compilations
    python -m bench.gpu_check kernels      rates of the products and of attention
    python -m bench.gpu_check block        one decoder block of 7B, eager and compiled
    python -m bench.gpu_check generate     tokens a second, with the adapter and without
    python -m bench.gpu_check memory       peak memory by row length and layers recomputed, against the plan's table
    python -m bench.gpu_check profile      where the time of a step goes

Random weights, nothing is downloaded. Without CUDA every section runs in miniature, which shows that its code works
and says nothing about speed. The bounds are expectations, most of them for an H200; no section has run on a GPU yet.
"""

import argparse
import sys

import torch

from bench import gpu_correct, gpu_speed
from bench.measuring import Report, sizes

SECTIONS = {
    "correct": gpu_correct.correct,
    "kernels": gpu_speed.kernels,
    "block": gpu_speed.block,
    "generate": gpu_speed.generate,
    "memory": gpu_speed.memory,
    "profile": gpu_speed.profile,
}


def main(argv=None) -> bool:
    """Whether all bounds of the section held."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("section", choices=SECTIONS)
    args = p.parse_args(argv)
    s = sizes()
    machine = torch.cuda.get_device_name() if s.cuda else "CPU: in miniature"
    print(f"{args.section} on {machine}, torch {torch.__version__}", flush=True)
    report = Report(args.section)
    try:
        SECTIONS[args.section](s, report)
    finally:  # a part that breaks off leaves the verdicts of those before it
        passed = report.finish()
    return passed


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
