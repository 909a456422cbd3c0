"""Speed and memory of one training step, trick by trick, on random weights of a real shape and real examples.

    python -m bench.training --shape mini --data preferences.json --tokenizer tokenizer.json
    python -m bench.training --shape 7b --data preferences.json --tokenizer tokenizer.json --peer

The step is train.py's: its two paths, its split, its optimiser. Whole passes over the rows are timed after one warm-up
pass, as answers differ in length. Each setting runs in a process of its own, so that its peak memory is its own, in
turns, `--repeats` times; medians are shown. `--peer` runs bench/trl_peer.py on the same rows.

Useful FLOPs count each prompt once per picture and each response once, forward and backward through frozen weights (no
weight gradients but LoRA's), the tower once per picture, the head on response tokens, and the reference where it runs;
recomputation, padding and prompts scored twice are not useful.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

import losses
from bases.tokenizer import read_tokenizer
from bench.inputs import BETA, LORA_ALPHA, LORA_R, SHAPES, kept_rows, random_model
from data import Example, PairData, Processor
from engine import packing
from engine.batches import batches, plan_steps
from engine.device import choose_device
from engine.distributed import World
from engine.memory import peak_gib
from external.flags import whole
from external.progress import progress
from lora import add_lora
from model import LLaVA
from train import fast_path, make_optimizer, plain_path, split_by_count

H200 = 790e12  # bfloat16 FLOP/s of one large matmul there; on other machines and in float32 it is measured
PARTS = ("data", "vision", "reference", "forward", "backward", "optimiser")
STEP = 32  # pairs that are asked of the loader at once, mDPO 4.1


class Tricks(NamedTuple):
    """One row of the table."""

    pack: bool = True
    cached: bool = True  # the reference
    compiled: bool = False
    recomputed: int = 0  # layers
    workers: int = 0  # 0: pictures are prepared outside the clock


def tricks_of_rows(cuda: bool, layers: int) -> dict[str, Tricks]:
    """Everything on, then each trick off in turn, then all off. With CUDA also the step that waits for its pictures."""
    full = Tricks(compiled=cuda)
    rows = {"all-on": full, "reference-live": full._replace(cached=False)}
    if cuda:
        rows["not-compiled"] = full._replace(compiled=False)
        rows["from-workers"] = full._replace(workers=2)
    rows["recomputed"] = full._replace(recomputed=layers)
    rows["plain"] = Tricks(pack=False, cached=False)
    return rows


# ---- useful FLOPs --------------------------------------------------------------------------------------------------


def useful_flops(example: Example, model: LLaVA, reference: str) -> float:
    """FLOPs that one step needs for this example. reference "cached": known but for m_l's; "live": none is known."""
    c = model.config
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    vision = (*model.vision_tower.parameters(), *model.mm_projector.parameters())
    picture = 2 * c.vision.patches * sum(p.numel() for p in vision)
    pictures = (example.image is not None) + (example.image_rejected is not None)
    frozen = decoder_flops(example, model, packing.TRIPLES)
    adapted = 2 * example.tokens() * adapter
    total = 2 * frozen + 3 * adapted + pictures * picture  # backward: inputs of all, weights of LoRA's
    if reference == "live":
        return total + frozen
    return total + decoder_flops(example, model, ("image_rejected",))


def decoder_flops(example: Example, model: LLaVA, which) -> float:
    """One forward pass of these triples through frozen decoder and head."""
    c = model.config
    named = model.language_model.layers.named_parameters()
    linears = sum(p.numel() for name, p in named if p.dim() == 2 and "lora_" not in name)
    flops = 0.0
    for group in packing.groups(example, which):
        P = len(example.prompt)
        lengths = [len(y) for y in group.responses]
        seen = P * P / 2 + sum(R * P + R * R / 2 for R in lengths)  # pairs of query and key
        flops += 2 * (P + sum(lengths)) * linears
        flops += 4 * seen * c.width * c.layers  # q k^T and its product with v
        flops += 2 * sum(lengths) * c.vocab * c.width  # the head
    return flops


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matmul on this machine."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = now(device)
        a @ a
        seconds.append(now(device) - start)
    return 2 * n**3 / min(seconds)


# ---- one row of the table ------------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """The clock, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds by part. It waits for the device at every mark, so it is on only in a pass of its own."""

    def __init__(self, on: bool, device: torch.device):
        self.on, self.device = on, device
        self.parts, self.last = defaultdict(float), 0.0

    def mark(self, part: str) -> None:
        if self.on:
            last, self.last = self.last, now(self.device)
            self.parts[part] += self.last - last


class Setting:
    """A model with a fresh adapter, and the tricks that are on."""

    def __init__(self, args: argparse.Namespace, data: PairData, tricks: Tricks, device: torch.device):
        self.data, self.tricks, self.device = data, tricks, device
        self.terms = losses.TERMS if args.objective == "mdpo" else ("dpo",)
        self.model = random_model(SHAPES[args.shape], getattr(torch, args.dtype), device)
        self.parameters = add_lora(self.model, LORA_R, LORA_ALPHA)
        self.model.language_model.checkpointed = tricks.recomputed
        reference = "cached" if tricks.cached else "live"
        self.path = fast_path(self.model, tricks.compiled, reference) if tricks.pack else plain_path(self.model)
        self.optimizer = make_optimizer(self.parameters, lr=1e-5, beta2=0.98, weight_decay=0.05)
        by_count = args.micro_batch or not tricks.pack
        self.split = split_by_count if by_count else self.path.split
        self.size = args.micro_batch or (args.tokens_per_batch if tricks.pack else 1)
        self.epoch = 0

    def step(self, examples: list[Example], clock: Clock) -> None:
        """One micro-batch as one optimiser step, as the peer does it."""
        clock.mark("before")
        batch = self.path.make_batch(examples).to(self.device)
        clock.mark("data")
        with self.path.autocast:
            if clock.on and self.tricks.pack:
                batch.pictures.features(self.model)  # kept for reference and policy
                clock.mark("vision")
            reference = self.path.reference(self.model, batch)
            clock.mark("reference")
            policy = self.path.score(self.model, batch)
        r = losses.rewards(policy, reference, BETA)
        loss = sum(losses.mdpo_terms(r, terms=self.terms).values()).mean()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark("optimiser")

    def one_pass(self, clock: Clock) -> float:
        """Seconds of one pass over the data with its m_l."""
        if self.tricks.workers:
            plan = plan_steps(self.data, STEP, steps=math.ceil(len(self.data) / STEP), world=World())
            steps = (examples for _, examples, _ in batches(self.data, plan, 0, self.tricks.workers))
        else:
            steps = [[self.data[(self.epoch, i)] for i in range(len(self.data))]]
        start = now(self.device)
        for examples in steps:
            for micro in self.split(examples, self.size):
                self.step(micro, clock)
        self.epoch += 1
        return now(self.device) - start


def measure(setting: Setting, passes: int) -> dict:
    """A warm-up pass, a pass that scores the reference, the timed passes, one by parts."""
    data, model = setting.data, setting.model
    silent, clock = Clock(False, setting.device), Clock(True, setting.device)
    setting.one_pass(silent)
    if setting.tricks.cached:
        setting.path.reference.text.clear()
        setting.path.reference.image.clear()
    cold = setting.one_pass(silent)
    seconds = sum(setting.one_pass(silent) for _ in range(passes)) / passes
    peak = peak_gib(setting.device)
    setting.one_pass(clock)
    n = len(data)
    examples = [data.without_pixels((0, i)) for i in range(n)]
    reference = "cached" if setting.tricks.cached else "live"
    flops = sum(useful_flops(e, model, reference) for e in examples)
    lengths = [e.tokens() for e in examples]
    return {
        "pairs": n,
        "packed_tokens_per_pair": [min(lengths), sum(lengths) / n, max(lengths)],
        "peak_gib": peak,
        "pairs_per_s": n / seconds,
        "pairs_per_s_3_epochs": 3 * n / (cold + 2 * seconds),
        "tokens_per_s": sum(lengths) / seconds,
        "useful_tflop_per_pair": flops / n / 1e12,
        "useful_flops_per_s": flops / seconds,
        "parts_s_per_pair": {part: clock.parts[part] / n for part in PARTS},
    }


def one_setting(args: argparse.Namespace) -> dict:
    """Measures one row in this process."""
    device = choose_device()
    cuda = device.type == "cuda"
    config, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    tricks = tricks_of_rows(cuda, config.layers)[args.setting]
    pairs, left_out = kept_rows(args.data, args.longest)
    if tricks.workers:
        pairs = pairs * math.ceil(2 * STEP / len(pairs))  # two steps: the loader has something to be late for
    processor = Processor(read_tokenizer(args.tokenizer), config)
    data = PairData(pairs, processor, "crop" if args.objective == "mdpo" else None)
    card = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    rate = H200 if "H200" in card and dtype == torch.bfloat16 else matmul_rate(device, dtype)
    row = measure(Setting(args, data, tricks, device), args.passes)
    row["utilisation"] = row["useful_flops_per_s"] / rate
    row["matmul_flops_per_s"] = rate
    row["device"] = card
    row["left_out"] = left_out
    return row


# ---- all rows ------------------------------------------------------------------------------------------------------


def commands_of(args: argparse.Namespace, argv: list[str], cuda: bool) -> dict[str, list[str]]:
    """Row of the table -> the command that measures it."""
    commands = {}
    for name in [args.setting] if args.setting else tricks_of_rows(cuda, layers=1):
        commands[name] = ["-m", "bench.training", *argv, "--setting", name, "--json"]
    if not args.peer:
        return commands
    same = [
        f"--{flag}={getattr(args, flag)}" for flag in ("shape", "objective", "data", "tokenizer", "passes", "dtype")
    ]
    if args.longest:
        same.append("--longest")
    # what TRL's users can choose; its dpo always chunks the head
    heads = [[], ["--chunked-head"]] if args.objective == "mdpo" else [[]]
    recomputing = [[], ["--checkpointing"]] if cuda else [[]]
    for micro, head, recompute in itertools.product((1, 4), heads, recomputing):
        name = " ".join([f"TRL, micro-batch {micro}", *head, *recompute])
        commands[name] = ["-m", "bench.trl_peer", *same, f"--micro={micro}", *head, *recompute]
    return commands


def in_a_process(command: list[str]) -> dict | None:
    """The JSON object that a command prints last; None if it failed: the other rows are still worth having."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        print(f"failed: {' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def medians(commands: dict[str, list[str]], repeats: int) -> dict[str, dict]:
    """The row with the median speed of each command's runs, which are made in turns."""
    runs = defaultdict(list)
    for name in progress(list(commands) * repeats, "settings"):
        row = in_a_process(commands[name])
        if row is not None:
            runs[name].append(row)
    rows = {}
    for name, found in runs.items():
        ranked = sorted(found, key=lambda row: row["pairs_per_s"])
        rows[name] = ranked[len(ranked) // 2]
        rows[name]["all_pairs_per_s"] = [row["pairs_per_s"] for row in found]
    return rows


def table(args: argparse.Namespace, rows: dict[str, dict]) -> str:
    ours = next(row for row in rows.values() if "device" in row)
    low, mean, high = ours["packed_tokens_per_pair"]
    width = max(len(name) for name in ["setting", *rows])
    lines = [
        f"{args.shape} {args.objective} on {ours['device']}, {args.dtype}, torch {torch.__version__}; {ours['pairs']} "
        f"pairs ({ours['left_out']} left out), {low}-{high} packed tokens, mean {mean:.0f}; "
        f"matmul {ours['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s",
        "",
        f"{'setting':{width}} {'pairs/s':>8} {'3 epochs':>9} {'tokens/s':>9} {'useful':>6} {'GiB':>6} | "
        f"s/pair: {' '.join(PARTS)}",
    ]
    for name, row in rows.items():
        runs = ", ".join(f"{speed:.3f}" for speed in row["all_pairs_per_s"])
        lines.append(f"{name:{width}} {row['pairs_per_s']:8.3f} {columns(row)}   runs: {runs}")
    return "\n".join(lines)


def columns(row: dict) -> str:
    """What follows the speed: the peer has one speed for all epochs, and knows of no parts."""
    if "parts_s_per_pair" not in row:
        return f"{row['pairs_per_s']:9.3f} {'':9} {'':6} {row['peak_gib']:6.2f}"
    parts = " ".join(f"{row['parts_s_per_pair'][part]:.3f}" for part in PARTS)
    return (
        f"{row['pairs_per_s_3_epochs']:9.3f} {row['tokens_per_s']:9.0f} {row['utilisation']:6.1%} "
        f"{row['peak_gib']:6.2f} | {parts}"
    )


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = list(tricks_of_rows(torch.cuda.is_available(), layers=1))
    p.add_argument("--shape", choices=SHAPES, default="mini")
    p.add_argument("--objective", choices=("mdpo", "dpo"), default="mdpo")
    p.add_argument("--data", type=Path, required=True, help="preference file with pictures, or its folder")
    p.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the base")
    p.add_argument("--setting", choices=names, help="only this row of the table")
    p.add_argument("--longest", action="store_true", help="only the pair with the longest answers")
    p.add_argument("--passes", type=whole(1), default=3, help="timed passes over the data")
    p.add_argument("--repeats", type=whole(1), default=1, help="times every setting is run, in turns")
    p.add_argument("--tokens-per-batch", type=whole(1), default=8192, help="packed tokens per forward")
    p.add_argument("--micro-batch", type=whole(1), help="pairs per forward instead")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if torch.cuda.is_available() else "float32"
    )
    p.add_argument("--peer", action="store_true", help="also run bench/trl_peer.py, all its settings (needs trl)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return p.parse_args(argv)


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.setting and args.json:  # the innermost call
        print(json.dumps(one_setting(args)))
        return
    rows = medians(commands_of(args, argv, torch.cuda.is_available()), args.repeats)
    if not rows:
        raise SystemExit("every setting failed; see above")
    print(json.dumps(rows) if args.json else table(args, rows))


if __name__ == "__main__":
    main()
