"""What the sections of bench/gpu_check.py share: their sizes, random models and examples, a clock, and the verdict."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.inputs import SHAPES, random_model, randomise_adapter
from data import Example, Pair
from engine.device import choose_device
from engine.packing import Packed, Span, pack
from lora import add_lora
from model import Config, LLaVA


class Sizes(NamedTuple):
    """How large everything is: as in training on CUDA, in miniature on a CPU."""

    device: torch.device
    small: Config  # against exact numbers on the CPU
    wide: Config  # the width of 7B, few layers
    full: Config  # 7B
    prompt: int  # tokens of a question beside its picture
    response: int
    row: int  # tokens of a packed row

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def sizes() -> Sizes:
    device, tiny = choose_device(), SHAPES["tiny"]
    if device.type == "cpu":
        return Sizes(device, tiny, tiny, tiny, prompt=8, response=6, row=300)
    return Sizes(device, SHAPES["mini"], Config(layers=8), Config(), prompt=64, response=130, row=8192)


class Report:
    """Prints what is measured as it comes, and at the end which stated bounds held."""

    def __init__(self, section: str):
        self.section = section
        self.verdicts: list[tuple[bool, str]] = []

    def measured(self, text: str) -> None:
        print(text, flush=True)

    def at_most(self, what: str, value: float, bound: float) -> None:
        self.verdicts.append((value <= bound, f"{what}: {value:.3g}, at most {bound:.3g}"))

    def at_least(self, what: str, value: float, bound: float) -> None:
        self.verdicts.append((value >= bound, f"{what}: {value:.3g}, at least {bound:.3g}"))

    def finish(self) -> bool:
        """PASS and FAIL lines; whether all passed."""
        for passed, text in self.verdicts:
            print(f"{'PASS' if passed else 'FAIL'} {self.section}: {text}", flush=True)
        return all(passed for passed, _ in self.verdicts)


def examples(config: Config, n: int, prompt: int, response: int, seed: int = 0) -> list[Example]:
    """Random texts and pictures: prompts of about `prompt` tokens and a picture, responses of about `response`."""
    g = torch.Generator().manual_seed(seed)
    low, high = 3, min(500, config.image_id)
    size = config.vision.image_size

    def words(about: int) -> torch.Tensor:
        length = int(torch.randint(about - about // 8, about + about // 8 + 1, (1,), generator=g))
        return torch.randint(low, high, (length,), generator=g)

    def answer() -> torch.Tensor:
        return torch.cat([words(response), torch.tensor([config.eos_id])])

    made = []
    for row in range(n):
        pair = Pair(id=f"r{row}", image=None, prompt="", chosen="", rejected="", row=row)
        placeholders = torch.full((config.vision.patches,), config.image_id)
        ids = torch.cat([torch.tensor([config.bos_id]), placeholders, words(prompt)])
        m_w, m_l = (torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=g) for _ in range(2))
        made.append(Example(pair, ids, answer(), answer(), m_w, m_l))
    return made


def fill_row(made: list[Example], tokens: int) -> Packed:
    """The first examples in one packed row, as many as fit, one at least."""
    taken, length = [made[0]], made[0].tokens()
    for example in made[1:]:
        length += example.tokens()
        if length > tokens:
            break
        taken.append(example)
    return pack(taken)


def adapted_model(config: Config, dtype: torch.dtype, device: torch.device, r: int = 64, zero: bool = False) -> LLaVA:
    """Random weights and an adapter, whose B is random too unless `zero`."""
    model = random_model(config, dtype, device)
    add_lora(model, r, 2 * r)
    if not zero:
        randomise_adapter(model)
    return model


def training_spans(rows: int, prompt: int, response: int) -> list[Span]:
    """The spans of `rows` examples of mDPO: [prompt y_w | y_l] with m_w, [prompt y_w] with m_l."""
    spans, start = [], 0
    for _ in range(rows):
        first = Span(start, prompt + response)
        second = Span(first.end, response, prefix=start, prefix_length=prompt)
        third = Span(second.end, prompt + response)
        spans += [first, second, third]
        start = third.end
    return spans


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def milliseconds(run: Callable[[], object], device: torch.device, times: int = 10, warm: int = 3) -> float:
    """The median of `times` runs after `warm` others."""
    if device.type == "cpu":
        times, warm = 2, 1
    for _ in range(warm):
        run()
    return 1e3 * statistics.median(seconds(run, device) for _ in range(times))


def relative(a: torch.Tensor, exact: torch.Tensor) -> float:
    """|a - exact| / |exact|."""
    exact = exact.detach().double().cpu()
    return ((a.detach().double().cpu() - exact).norm() / exact.norm()).item()


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()
