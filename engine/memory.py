"""What fits in memory: a plan before step 0, and more room when a step runs out of it all the same.

A packed row of T tokens keeps activations of every layer, unless the layer recomputes them in the backward pass, which
costs up to a third more time. Shorter rows cost little, so the plan halves the row before it recomputes anything.
Nothing here changes a number: a step's gradients are sums over its examples however they are split.
"""

import math
import resource
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from data import EpochSampler, Example, PairData

GIB = 2**30
CPU_TOKENS = 8192  # packed tokens per row where no trial step decides
SHARE = 0.92  # of the free memory that a trial step may take; the rest is for fragments


def peak_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
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


def candidates(layers: int, tokens: int | None, recomputed: int | None) -> list[tuple[int, int]]:
    """(tokens per packed row, layers recomputed) to try, fastest first; what the user gave is kept."""
    if tokens is None and recomputed is None:
        rows = [(16384, 0), (8192, 0), (4096, 0), (2048, 0)]
        return rows + [(2048, layers // 4), (2048, layers // 2), (2048, layers)]
    if tokens is None:
        return [(row, recomputed) for row in (16384, 8192, 4096, 2048)]
    if recomputed is None:
        return [(tokens, n) for n in (0, layers // 4, layers // 2, layers)]
    return [(tokens, recomputed)]


def choose(plans: list[tuple[int, int]], trial: Callable[[int, int], tuple[float, float]]) -> tuple[int, int]:
    """The first plan whose trial step fits; trial(tokens, recomputed) -> (peak, room) in GiB, an infinite peak when
    memory ran out. Prints one line of what was tried. SystemExit if nothing fits."""
    tried = []
    for tokens, recomputed in plans:
        peak, room = trial(tokens, recomputed)
        tried.append(f"{tokens:,} tokens, {recomputed} layers recomputed: {peak:.1f} of {room:.1f} GiB")
        if peak <= room:
            print(f"memory: trial steps on the largest row of the first epoch: {'; '.join(tried)}. Taken: the last.")
            return tokens, recomputed
    raise SystemExit(
        f"memory: no trial step fits ({'; '.join(tried)}). Give a smaller --tokens-per-batch or --max-length, "
        "a quantised base, or a larger GPU."
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
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()  # of this device, whoever else uses it
    return peak, SHARE * free / GIB


def largest_row(data: PairData, split: Callable, size: int, batch: int) -> list[Example]:
    """The examples of the micro-batch with the most tokens in the first epoch, split as training will split them."""
    keys = list(EpochSampler(len(data), epochs=1, seed=data.seed))
    most, largest = 0, []
    for start in range(0, len(keys), batch):
        step = {key: data.without_pixels(key) for key in keys[start : start + batch]}
        key_of = {id(example): key for key, example in step.items()}
        for micro in split(list(step.values()), size):
            tokens = sum(len(e.prompt) + len(e.chosen) + len(e.rejected) for e in micro)
            if tokens > most:
                most, largest = tokens, [key_of[id(example)] for example in micro]
    return [data[key] for key in largest]


def find_room(
    path, model, parameters: list, data: PairData, batch: int, size: int | None, recomputed: int | None
) -> "Room":
    """Prints where the memory goes and decides the micro-batch's size and how many layers recompute.

    `path` is a train.ScoringPath, `size` and `recomputed` what the user gave. Trial steps run on CUDA alone.
    """
    report(model, parameters)
    decoder, device = model.language_model, model.lm_head.weight.device

    def trial(size: int, recomputed: int) -> tuple[float, float]:
        decoder.checkpointed = recomputed
        scored = path.make_batch(largest_row(data, path.split, size, batch)).to(device)

        def step() -> None:
            with path.autocast:
                logps = path.score(model, scored)
                total = sum(value.sum() for value in logps if value is not None)
            total.backward()

        return trial_step(parameters, step)

    if device.type == "cuda":
        size, recomputed = choose(candidates(len(decoder.layers), size, recomputed), trial)
    decoder.checkpointed = recomputed or 0
    return Room(decoder, parameters, path.split, size or CPU_TOKENS)


# ---- out of memory in mid-run --------------------------------------------------------------------------------------


class Room:
    """Repeats a step that runs out of memory, with more layers recomputed, then with smaller micro-batches.

    for micro in room.micro_batches(examples, run.clear):
        with room:
            ...forward and backward...
    """

    def __init__(self, decoder: nn.Module, parameters: list, split: Callable, size: int):
        """`split(examples, size)` makes micro-batches of at most `size` (tokens or examples), one example at least."""
        self.decoder, self.parameters, self.split, self.size = decoder, parameters, split, size
        self.failed = False

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
        layers = len(self.decoder.layers)
        if self.decoder.checkpointed < layers:
            self.decoder.checkpointed = min(layers, max(2 * self.decoder.checkpointed, math.ceil(layers / 4)))
        elif len(micro) > 1:
            self.size = self.size // 2
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
        pass

    def __exit__(self, kind, error, trace) -> bool:
        if kind is None or not issubclass(kind, torch.OutOfMemoryError):
            return False
        error.__traceback__ = None  # it holds the graph that filled the memory
        self.failed = True
        return True
