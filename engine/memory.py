"""What fits in memory: a plan before step 0, and more room when a step runs out of it all the same.

A packed row of T tokens keeps activations of every layer, unless the layer recomputes them in the backward pass, which
costs up to a third more time. Shorter rows cost little, so the plan halves the row before it recomputes anything.
Nothing here changes a number: a step's gradients are sums over its examples however they are split.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from data import Example, PairData
from engine.batches import epoch_keys
from external.progress import progress

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

GIB = 2**30
CPU_TOKENS = 8192  # packed tokens per row where no trial step decides
SHARE = 0.92  # of the free memory that a trial step may take; the rest is for fragments


def peak_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident in this process; nan where nobody counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def report(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Prints what is taken before the first activation."""
    trained = sum(p.numel() * p.element_size() for p in parameters) / GIB
    frozen = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB - trained
    print(
        f"memory: frozen weights {frozen:.2f}, adapter and its gradients {2 * trained:.2f}, AdamW's state "
        f"{2 * trained:.2f} GiB; activations on top"
    )


# ---- the plan ------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    size: int  # a micro-batch's largest: packed tokens, or examples on the plain path
    recomputed: int  # decoder layers whose activations are not kept


def candidates(layers: int, size: int | None, recomputed: int | None) -> list[Plan]:
    """The plans to try, fastest first; what the user gave is kept."""
    sizes = (16384, 8192, 4096, 2048) if size is None else (size,)
    if recomputed is not None:
        return [Plan(size, min(recomputed, layers)) for size in sizes]
    kept = [Plan(size, 0) for size in sizes]
    return kept + [Plan(sizes[-1], n) for n in (layers // 4, layers // 2, layers)]


def choose(plans: list[Plan], trial: Callable[[Plan], tuple[float, float]]) -> Plan:
    """The first plan whose trial step fits; trial(plan) -> (peak, room) in GiB, an infinite peak when memory ran out.

    Prints one line of what was tried. SystemExit if nothing fits.
    """
    tried = []
    for plan in plans:
        peak, room = trial(plan)
        needed = "more than there is" if peak == math.inf else f"{peak:.1f} GiB"
        tried.append(f"at most {plan.size:,} with {plan.recomputed} layers recomputed needs {needed} of {room:.1f}")
        if peak <= room:
            print(f"memory: the largest micro-batch of the first epoch: {'; '.join(tried)}. The last is taken.")
            return plan
    raise SystemExit(
        f"memory: no trial step fits: {'; '.join(tried)}. Give a smaller --max-length, --quant nf4, or a larger "
        "GPU, or let the plan decide without --tokens-per-batch, --micro-batch and --checkpointing."
    )


def trial_step(parameters: list[nn.Parameter], step: Callable[[], None]) -> tuple[float, float]:
    """Runs `step` (forward and backward) on CUDA beside gradients and AdamW's state: (peak, room) in GiB."""
    state = [torch.zeros_like(p) for p in (*parameters, *parameters)]  # two moments each
    for p in parameters:
        p.grad = torch.zeros_like(p)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step()
        peak = torch.cuda.max_memory_reserved() / GIB
    except torch.OutOfMemoryError:
        peak = math.inf
    del state
    for p in parameters:
        p.grad = None
    gc.collect()  # an error's frames may hold the graph in a cycle, and the next trial would find no room
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()  # of this device, whoever else uses it
    return peak, SHARE * free / GIB


def first_epoch(data: PairData, batch: int) -> list[list[Example]]:
    """The first epoch's steps in the order of training, their pictures not yet loaded."""
    keys = epoch_keys(len(data), epochs=1, seed=data.seed)
    examples = [data.without_pixels(key) for key in progress(keys, "lengths of the first epoch")]
    return [examples[start : start + batch] for start in range(0, len(examples), batch)]


def largest_micro_batch(steps: list[list[Example]], split: Callable, size: int) -> list[Example]:
    """Of all micro-batches of `steps`, split as training splits them, the one with the most tokens."""
    micro_batches = [micro for step in steps for micro in split(step, size)]
    return max(micro_batches, key=lambda micro: sum(example.tokens() for example in micro))


def with_pixels(data: PairData, examples: list[Example]) -> list[Example]:
    index_of = {pair.row: index for index, pair in enumerate(data.pairs)}
    return [data[(example.draw, index_of[example.pair.row])] for example in examples]


def find_room(
    path, model, parameters: list, data: PairData, batch: int, size: int | None, recomputed: int | None
) -> "Room":
    """Prints where the memory goes and decides the micro-batch's size and how many layers recompute.

    `path` is a train.ScoringPath, `size` and `recomputed` what the user gave. Trial steps run on CUDA alone.
    """
    report(model, parameters)
    decoder, device = model.language_model, model.lm_head.weight.device
    layers = len(decoder.layers)
    plan = Plan(size or CPU_TOKENS, min(recomputed or 0, layers))
    if device.type == "cuda":
        steps = first_epoch(data, batch)

        def trial(plan: Plan) -> tuple[float, float]:
            largest = with_pixels(data, largest_micro_batch(steps, path.split, plan.size))
            scored = path.make_batch(largest).to(device)
            decoder.checkpointed = plan.recomputed

            return trial_step(parameters, lambda: forward_and_backward(path, model, scored))

        plan = choose(candidates(layers, size, recomputed), trial)
    decoder.checkpointed = plan.recomputed
    return Room(decoder, parameters, path.split, plan.size)


def forward_and_backward(path, model, scored) -> None:
    """A micro-batch as the loop computes it: the backward pass stands outside autocast, so it keeps the same dtypes."""
    with path.autocast:
        logps = path.score(model, scored)
        total = sum(value.sum() for value in logps if value is not None)
    total.backward()


# ---- out of memory in mid-run --------------------------------------------------------------------------------------


class Room:
    """Repeats a step that runs out of memory, with more layers recomputed, then with smaller micro-batches.

        for micro in room.micro_batches(examples, run.clear):
            policy = loss = None
            with room:
                ...forward and backward...

    What holds the graph must be let go of before the next attempt: it is what filled the memory.
    """

    def __init__(self, decoder: nn.Module, parameters: list, split: Callable, size: int):
        """`split(examples, size)` makes micro-batches of at most `size` (tokens or examples), one example at least."""
        self.decoder, self.parameters, self.split, self.size = decoder, parameters, split, size
        self.failed = False
        self.repeats = False

    def micro_batches(self, examples: list[Example], clear: Callable[[], None]) -> Iterator[list[Example]]:
        """The step's micro-batches, again from the first one after a failure; `clear` forgets the step's sums."""
        while True:
            clear()
            for p in self.parameters:  # a backward pass that broke off has added to some of them
                p.grad = None
            self.failed = False
            for micro in self.split(examples, self.size):
                yield micro
                if self.failed:
                    break
            if not self.failed:
                return
            self.make_more(micro)

    def make_more(self, micro: list[Example]) -> None:
        """Recomputes twice as many layers, then halves the micro-batch. SystemExit where neither is left."""
        self.repeats = True
        layers = len(self.decoder.layers)
        if self.decoder.checkpointed < layers:
            self.decoder.checkpointed = min(layers, max(2 * self.decoder.checkpointed, math.ceil(layers / 4)))
        elif len(micro) > 1:
            self.size = max(1, self.size // 2)
        else:
            raise SystemExit(
                f"out of memory with one example and every layer recomputed: id {micro[0].pair.id}. The adapter that "
                "was saved last is whole. A smaller --max-length with --skip-bad leaves the example out."
            )
        print(
            f"out of memory: the step is repeated with {self.decoder.checkpointed} of {layers} layers recomputed and "
            f"micro-batches of at most {self.size:,}"
        )

    def __enter__(self) -> None:
        if self.repeats:  # the loop has let the graph go; a cycle may hold it still
            gc.collect()
        self.repeats = False

    def __exit__(self, kind, error, trace) -> bool:
        if kind is None or not issubclass(kind, torch.OutOfMemoryError):
            return False
        self.failed = True
        return True
