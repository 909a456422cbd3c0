"""Where the memory goes, and how many layers recompute their activations."""

import math
import resource
import sys

import torch

from data import PairData
from engine import packing

GIB = 2**30


def fit_in_memory(args, model, parameters, data: PairData, split, make_batch, score, autocast) -> None:
    """Prints where the memory goes and, on CUDA, runs one policy step on the longest batch: out of memory now or never.

    Sets how many layers recompute their activations: --checkpointing, else as few as fit.
    """
    trained = sum(p.numel() * p.element_size() for p in parameters) / GIB
    frozen = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB - trained
    print(f"memory: frozen weights {frozen:.2f}, adapter and its gradients {2 * trained:.2f}, AdamW's state "
          f"{2 * trained:.2f} GiB; activations on top")  # fmt: skip
    layers, device = len(model.language_model.layers), model.lm_head.weight.device
    given = {None: None, "none": 0, "full": layers}.get(args.checkpointing, args.checkpointing)
    if device.type != "cuda":
        model.language_model.checkpointed = int(given or 0)
        return
    by_length = sorted(range(len(data)), key=lambda i: len(data.pairs[i].chosen) + len(data.pairs[i].rejected))
    longest = split([data[(0, i)] for i in by_length[-8:]])[0]
    batch, total = make_batch(longest).to(device), torch.cuda.mem_get_info()[1] / GIB
    for recomputed in [layers * i // 4 for i in range(5)] if given is None else [int(given)]:
        model.language_model.checkpointed = recomputed
        torch.cuda.reset_peak_memory_stats()
        try:
            with autocast:
                sum(logps.sum() for logps in score(model, batch) if logps is not None).backward()
            peak = peak_gib(device) + 2 * trained
        except torch.cuda.OutOfMemoryError:
            peak = math.inf
        for p in parameters:
            p.grad = None
        torch.cuda.empty_cache()
        print(f"memory: trial step, {sum(map(packing.tokens_of, longest)):,} tokens, {recomputed} of {layers} layers "
              f"recomputed: peak {peak:.1f} of {total:.1f} GiB")  # fmt: skip
        if peak < 0.95 * total:
            return
    raise SystemExit("the longest batch does not fit in memory: give a smaller --tokens-per-batch (or --micro-batch), "
                     "a smaller --max-length, or --checkpointing full")  # fmt: skip


def peak_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
