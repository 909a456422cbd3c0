"""Where the memory goes, and a trial step on the longest batch: out of memory in the first minute or never."""

import torch

from data import PairData

TRIED = (0, 0.25, 0.5, 0.75, 1.0)  # shares of the layers whose activations are recomputed
LONGEST = 8  # examples the trial batch is made of
GIB = 2**30


def plan(model, parameters: list) -> dict[str, float]:
    """GiB that are known before the first step."""
    trained = sum(p.numel() * p.element_size() for p in parameters)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters()) - trained
    return {"frozen weights": frozen / GIB, "adapter": trained / GIB, "its gradients": trained / GIB,
            "AdamW state": 2 * trained / GIB}  # fmt: skip


def longest_examples(data: PairData) -> list:
    def characters(i: int) -> int:
        p = data.pairs[i]
        return len(p.prompt) + 2 * len(p.chosen) + len(p.rejected)  # y_w is scored after both pictures

    return [data[(0, i)] for i in sorted(range(len(data)), key=characters, reverse=True)[:LONGEST]]


def trial(model, score, batch, parameters: list) -> float:
    """One policy forward and backward; GiB at the peak on CUDA. The gradients are thrown away."""
    cuda = model.lm_head.weight.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        sum(logps.sum() for logps in score(model, batch) if logps is not None).backward()
    finally:
        for p in parameters:
            p.grad = None
    return torch.cuda.max_memory_allocated() / GIB if cuda else 0.0


def prepare(model, score, batch, tokens: int, parameters: list, checkpointing: str | None) -> None:
    """Prints the plan, runs the trial and sets how many layers are recomputed: the given number, else as few as fit."""
    known, layers = plan(model, parameters), len(model.language_model.layers)
    print("memory: " + ", ".join(f"{name} {gib:.2f}" for name, gib in known.items()) + " GiB")
    fixed = {"none": 0, "full": layers}.get(checkpointing, checkpointing)
    device = model.lm_head.weight.device
    total = torch.cuda.mem_get_info()[1] / GIB if device.type == "cuda" else float("inf")
    for recomputed in [int(fixed)] if fixed is not None else [round(share * layers) for share in TRIED]:
        model.language_model.checkpointed = recomputed
        try:
            peak = trial(model, score, batch, parameters) + known["AdamW state"]
        except torch.cuda.OutOfMemoryError:
            peak = float("inf")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            print(f"memory: trial step, {tokens:,} tokens, {recomputed} of {layers} layers recomputed: peak "
                  f"{peak:.1f} of {total:.1f} GiB")  # fmt: skip
        if peak < 0.95 * total:
            return
    raise SystemExit("the longest batch does not fit in memory: give a smaller --tokens-per-batch (or --micro-batch), "
                     "a smaller --max-length, or --checkpointing full")  # fmt: skip
