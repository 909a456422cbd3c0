"""Speed and memory of one training step, trick by trick, on random weights of a real shape and real examples.

    python -m bench.training --shape mini --objective mdpo --data preferences.json --tokenizer tokenizer.json
    python -m bench.training --shape 7b --objective mdpo --data preferences.json --tokenizer tokenizer.json --peer

Arithmetic per token does not depend on the weights' values, so none are downloaded. Whole passes over the rows are
timed after one warm-up pass, as answers differ in length. Rows kept: both answers longer than three words. Each
setting runs in a process of its own, so that its peak memory is its own, in turns, `--repeats` times; medians shown.
Useful FLOPs count each prompt once per picture and each response once, forward and backward through frozen weights (no
weight gradients but LoRA's), the tower once per picture, the head on response tokens, and the reference where it runs;
recomputation, padding and prompts scored twice are not useful. `--peer` runs bench/trl_peer.py on the same rows.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import losses
from data import Example, PairData, Processor
from engine import packing
from engine.device import choose_device
from engine.memory import peak_gib
from formats.readers import read_pairs
from lora import add_lora
from model import Config, LLaVA, VisionConfig
from train import fast_path, make_optimizer, plain_path

SHAPES = {
    "mini": Config(VisionConfig(256, 4, 4, 1024), width=512, layers=8, heads=8, kv_heads=8, ffn=1376),
    "1b": Config(width=2048, layers=22, heads=16, kv_heads=16, ffn=5504),
    "7b": Config(),
}
H200 = 790e12  # bf16 FLOP/s of one large matmul; on other machines it is measured
PARTS = ("data", "vision", "reference", "forward", "backward", "optimiser")
BETA, LORA_R, LORA_ALPHA = 0.1, 64, 128


class Words:
    """Stands in for a tokenizer: random ids, one per 4.2 characters. Lengths are estimates; the output says so."""

    encode_special_tokens = True

    def encode(self, text: str, add_special_tokens: bool = False):
        rng = np.random.default_rng(len(text))
        return argparse.Namespace(ids=rng.integers(3, 32000, max(1, round(len(text) / 4.2))).tolist())

    def get_added_tokens_decoder(self) -> dict:
        return {}


def random_model(config: Config, dtype: torch.dtype, device: torch.device) -> LLaVA:
    """Random weights made in place, in their dtype."""
    with torch.device("meta"):
        model = LLaVA(config)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1.0)
    return model.eval()


def useful_flops(e: Example, model: LLaVA, reference: str) -> float:
    """FLOPs one step needs for this example; reference: "live", or "cached", of which only m_l's is left."""
    c = model.config
    linears = sum(p.numel() for n, p in model.language_model.named_parameters() if p.dim() == 2 and "lora" not in n)
    linears -= c.vocab * c.width  # the embedding is a look-up
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    tower = sum(p.numel() for p in model.vision_tower.parameters()) * c.vision.patches
    projector = sum(p.numel() for p in model.mm_projector.parameters()) * c.vision.patches

    def forward(which) -> tuple[float, float]:
        """Frozen FLOPs of one forward of these triples, and of the adapter."""
        frozen = adapted = 0.0
        for group in packing.groups(e, which):
            P, answers = len(e.prompt), [len(y) for y in group.responses]
            tokens = P + sum(answers)
            pairs_seen = P * P / 2 + sum(r * P + r * r / 2 for r in answers)  # causal
            frozen += 2 * tokens * linears + 4 * pairs_seen * c.width * c.layers + 2 * sum(answers) * c.vocab * c.width
            adapted += 2 * tokens * adapter
        return frozen, adapted

    pictures = (e.image is not None) + (e.image_rejected is not None)
    frozen, adapted = forward(packing.TRIPLES)
    total = 2 * frozen + 3 * adapted + 2 * pictures * (tower + projector)  # backward: inputs of all, weights of LoRA
    if reference == "live":
        total += frozen
    return total + (forward(("image_rejected",))[0] if reference == "cached" else 0)


def now(device: torch.device) -> float:
    """The clock, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds by part. It waits for the device at every mark, so it is on only in a pass of its own."""

    def __init__(self, on: bool, device: torch.device):
        self.on, self.device, self.parts, self.last = on, device, defaultdict(float), 0.0

    def mark(self, part: str) -> None:
        if self.on:
            last, self.last = self.last, now(self.device)
            self.parts[part] += self.last - last


class Setting:
    """One row of the table: a model with a fresh adapter and the tricks that are on."""

    def __init__(self, args, data: PairData, device: torch.device, pack=True, cached=True, compiled=False, recompute=0):
        self.args, self.data, self.device, self.pack, self.cached = args, data, device, pack, cached
        self.model = random_model(SHAPES[args.shape], getattr(torch, args.dtype), device)
        self.parameters = add_lora(self.model, LORA_R, LORA_ALPHA)
        self.model.language_model.checkpointed = recompute
        self.path = fast_path(self.model, compiled, "cached" if cached else "live") if pack else plain_path(self.model)
        self.optimizer = make_optimizer(self.parameters, lr=1e-5, beta2=0.98, weight_decay=0.05)
        self.epoch = 0

    def split(self, examples: list[Example]) -> list[list[Example]]:
        size = self.args.micro_batch or 1
        if self.pack and not self.args.micro_batch:
            return packing.split_by_tokens(examples, self.args.tokens_per_batch)
        return [examples[i : i + size] for i in range(0, len(examples), size)]

    def step(self, examples: list[Example], clock: Clock) -> None:
        """One micro-batch as one optimiser step, as the peer does it."""
        clock.mark("before")
        batch = self.path.make_batch(examples).to(self.device)
        clock.mark("data")
        with self.path.autocast:
            if clock.on and self.pack:  # kept for reference and policy
                batch.pictures.features(self.model)
                clock.mark("vision")
            reference = self.path.reference(self.model, batch)
            clock.mark("reference")
            policy = self.path.score(self.model, batch)
        r = losses.rewards(policy, reference, BETA)
        terms = losses.TERMS if self.args.objective == "mdpo" else ("dpo",)
        loss = sum(losses.mdpo_terms(r, terms=terms).values()).mean()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark("optimiser")

    def one_pass(self, clock: Clock) -> float:
        """Seconds of one pass over the data with its m_l; pictures are prepared outside the clock."""
        examples = [self.data[(self.epoch, i)] for i in range(len(self.data))]
        start = now(self.device)
        for micro in self.split(examples):
            self.step(micro, clock)
        self.epoch += 1
        return now(self.device) - start


def measure(setting: Setting, passes: int) -> dict:
    """A warm-up pass, a pass that scores the reference, the timed passes, one by parts."""
    data, silent, clock = setting.data, Clock(False, setting.device), Clock(True, setting.device)
    setting.one_pass(silent)
    if setting.cached:
        setting.path.reference.text.clear()
        setting.path.reference.image.clear()
    cold = setting.one_pass(silent)
    seconds = sum(setting.one_pass(silent) for _ in range(passes)) / passes
    peak = peak_gib(setting.device)
    setting.one_pass(clock)
    examples, n = [data[(0, i)] for i in range(len(data))], len(data)
    flops = sum(useful_flops(e, setting.model, "cached" if setting.cached else "live") for e in examples)
    lengths = [e.tokens() for e in examples]
    return {
        "pairs": n, "packed_tokens_per_pair": [min(lengths), sum(lengths) / n, max(lengths)], "peak_gib": peak,
        "pairs_per_s": n / seconds, "pairs_per_s_3_epochs": 3 * n / (cold + 2 * seconds),
        "tokens_per_s": sum(lengths) / seconds, "useful_tflop_per_pair": flops / n / 1e12,
        "useful_flops_per_s": flops / seconds, "parts_s_per_pair": {p: clock.parts[p] / n for p in PARTS},
    }  # fmt: skip


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


def settings_of(cuda: bool, layers: int) -> dict[str, dict]:
    """The table's rows: everything on, then each trick off in turn, then all off."""
    full = dict(pack=True, cached=True, compiled=cuda, recompute=0)
    rows = {"all-on": full, "reference-live": full | dict(cached=False)}
    if cuda:
        rows["not-compiled"] = full | dict(compiled=False)
    return rows | {"recomputed": full | dict(recompute=layers), "plain": dict(pack=False, cached=False)}


def peer_settings(cuda: bool, objective: str):
    """(micro-batch, head, recomputation) of TRL's rows: what its users can choose; its dpo always chunks the head."""
    heads = [[], ["--chunked-head"]] if objective == "mdpo" else [[]]
    return itertools.product((1, 4), heads, [[], ["--checkpointing"]] if cuda else [[]])


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--shape", choices=SHAPES, default="mini")
    p.add_argument("--objective", choices=("mdpo", "dpo"), default="mdpo")
    p.add_argument("--data", type=Path, required=True, help="preference file with pictures, or its folder")
    p.add_argument("--tokenizer", type=Path, help="tokenizer.json; without it lengths are estimated and ids random")
    p.add_argument("--setting", help="only this row of the table")
    p.add_argument("--plain", action="store_const", const="plain", dest="setting", help="same as --setting plain")
    p.add_argument("--longest", action="store_true", help="only the pair with the longest answers")
    p.add_argument("--passes", type=int, default=3, help="timed passes over the data")
    p.add_argument("--repeats", type=int, default=1, help="times every setting is run, in turns")
    p.add_argument("--tokens-per-batch", type=int, default=8192, help="packed tokens per forward")
    p.add_argument("--micro-batch", type=int, help="pairs per forward instead (default: by tokens; plain path 1)")
    p.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    p.add_argument("--peer", action="store_true", help="also run bench/trl_peer.py, all its settings (needs trl)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return p.parse_args(argv)


def one_setting(args: argparse.Namespace) -> dict:
    """Measures one row in this process."""
    device = choose_device()
    pairs, problems = read_pairs(args.data)
    kept = [r for r in pairs if min(len(r.chosen.split()), len(r.rejected.split())) > 3]
    kept = [max(kept, key=lambda r: len(r.chosen) + len(r.rejected))] if args.longest else kept
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else Words()
    config = SHAPES[args.shape]
    data = PairData(kept, Processor(tokenizer, config), "crop" if args.objective == "mdpo" else None)
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rate = H200 if "H200" in card else matmul_rate(device, getattr(torch, args.dtype))
    tricks = settings_of(device.type == "cuda", config.layers)[args.setting]
    row = measure(Setting(args, data, device, **tricks), args.passes)
    return row | {"utilisation": row["useful_flops_per_s"] / rate, "matmul_flops_per_s": rate, "device": card,
                  "left_out": len(pairs) + len(problems) - len(kept)}  # fmt: skip


def in_a_process(command: list[str]) -> dict | None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:  # the other rows are still worth having
        print(f"failed: {' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    cuda = torch.cuda.is_available()
    names = list(settings_of(cuda, 1))
    if args.setting and args.setting not in names:
        raise SystemExit(f"--setting {args.setting}: choose from {', '.join(names)}")
    if args.setting and args.json:  # the innermost call
        print(json.dumps(one_setting(args)))
        return
    commands = {
        n: ["-m", "bench.training", *argv, "--setting", n, "--json"]
        for n in ([args.setting] if args.setting else names)
    }
    if args.peer:
        same = [f"--{flag}={getattr(args, flag)}" for flag in ("shape", "objective", "data", "passes", "dtype")]
        same += [f"--tokenizer={args.tokenizer}"] if args.tokenizer else []
        same += ["--longest"] if args.longest else []
        for micro, head, recompute in peer_settings(cuda, args.objective):
            name = " ".join([f"TRL, micro-batch {micro}", *head, *recompute])
            commands[name] = ["-m", "bench.trl_peer", *same, f"--micro={micro}", *head, *recompute]
    runs = defaultdict(list)
    for name in tqdm(list(commands) * args.repeats, "settings", disable=None):
        if row := in_a_process(commands[name]):
            runs[name].append(row)
    rows = {
        name: sorted(found, key=lambda r: r["pairs_per_s"])[len(found) // 2] for name, found in runs.items()
    }  # median
    for name, found in runs.items():
        rows[name]["all_pairs_per_s"] = [r["pairs_per_s"] for r in found]
    result = {"shape": args.shape, "objective": args.objective, "dtype": args.dtype, "torch": torch.__version__,
              "lengths": "tokenized" if args.tokenizer else "estimated (characters / 4.2), random ids",
              "rows": rows}  # fmt: skip
    print(json.dumps(result) if args.json else table(result))


def table(r: dict) -> str:
    one = next(row for row in r["rows"].values() if "device" in row)
    low, mean, high = one["packed_tokens_per_pair"]
    width = max(map(len, ["setting", *r["rows"]]))
    lines = [
        f"{r['shape']} {r['objective']} on {one['device']}, {r['dtype']}, torch {r['torch']}; {one['pairs']} pairs "
        f"({one['left_out']} left out), {low}-{high} packed tokens, mean {mean:.0f}, {r['lengths']}; "
        f"matmul {one['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s",
        "",
        f"{'setting':{width}} {'pairs/s':>8} {'3 epochs':>9} {'tokens/s':>9} {'useful':>6} {'GiB':>6} | "
        f"s/pair: {' '.join(PARTS)}",
    ]
    for name, row in r["rows"].items():
        line = f"{name:{width}} {row['pairs_per_s']:8.3f}"
        if "parts_s_per_pair" in row:
            parts = " ".join(f"{row['parts_s_per_pair'][p]:.3f}" for p in PARTS)
            line += f" {row['pairs_per_s_3_epochs']:9.3f} {row['tokens_per_s']:9.0f} {row['utilisation']:6.1%}"
            line += f" {row['peak_gib']:6.2f} | {parts}"
        else:
            line += f" {row['pairs_per_s']:9.3f} {'':9} {'':6} {row['peak_gib']:6.2f}"
        lines.append(f"{line}   runs: {', '.join(f'{x:.3f}' for x in row['all_pairs_per_s'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
