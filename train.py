"""Train a LoRA adapter with mDPO, DPO or PDS-DPO: one flag block, one plain loop.

    python train.py --base toy                                       the demo: a small world, a few minutes on a CPU
    python train.py --base llava-1.5-7b --data preferences.json      the paper's run (mDPO 4.1) on one GPU

Files to read for one step, in order: train.py (loop) -> data.py (Batch) -> losses.py (plain_logps, mdpo_terms) ->
model.py (forward) -> lora.py (the reference is the model with its adapter off). Everything fast is switched on in
`plain_or_fast`, `reference_cache` and `fit_in_memory`; it lives in packing.py and engine/head.py.

Deviations from the papers and their released code
1. The last, smaller batch of an epoch is used and averaged over what it holds; the release drops it.
2. Policy and reference see the same m_l (data.py, 1); in the release the first loss is not 3 ln 2.
3. PDS-DPO's text says batch 1 x accumulation 4 on 2 GPUs = 8, its script accumulates 1; the paper's 8 is the default.
4. LoRA weights are float32 and so is AdamW's state, on every base dtype.
"""

import argparse
import contextlib
import json
import math
import time
from collections import defaultdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import losses
import pictures
import toy
from bases import bunny
from bases.adapter import SPELLINGS, save_adapter
from bases.checkpoint import SOURCES, load_base
from bases.tokenizer import load_tokenizer
from data import BUNNY, BUNNY_RELEASED, MAX_LENGTH, VICUNA, EpochSampler, PairData, Processor, collate, example_loader
from engine import packing
from engine.memory import fit_in_memory, peak_gib
from engine.reference import DRIFT_ROWS, ReferenceCache, base_digest
from engine.run_folder import HEADER, line, new_run_folder
from formats import hub_data
from formats.problems import find_problems, usable
from formats.readers import read_pairs
from lora import add_lora, lora_disabled, lora_modules

# mDPO 4.1 gives lr, epochs, batch, schedule, warm-up, beta, delta, LoRA; its release adds AdamW's numbers and clipping.
MDPO = dict(
    terms="dpo,copo,ancpo", anchors="w", beta=0.1, delta=0.0,  # mDPO 3, 4.1
    lr=1e-5, epochs=3, batch=32, warmup=0.1,  # mDPO 4.1; linear warm-up from 0, cosine to 0
    lora_r=64, lora_alpha=128.0,  # mDPO 4.1
    adam_beta2=0.98, weight_decay=0.05, clip=1.0,  # mDPO release, config.yaml
)  # fmt: skip
RECIPES = {
    "mdpo": MDPO,
    "dpo": MDPO | dict(terms="dpo"),  # mDPO 4.1: only the objective differs
    "dpo-no-image": MDPO | dict(terms="dpo"),  # mDPO Fig. 1: picture and <image> left out of training prompts
    "pds-dpo": MDPO | dict(
        terms="dpo", epochs=2, batch=8,  # PDS-DPO paper: 2 epochs, lr 1e-5, 1 x 4 x 2 GPUs
        lora_r=128, lora_alpha=256.0, warmup=0.03, weight_decay=0.0, adam_beta2=0.999,  # PDS-DPO release
    ),
}  # fmt: skip


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    yes_no = argparse.BooleanOptionalAction
    g = p.add_argument_group("what")
    g.add_argument("--base", required=True, help=f"toy, {', '.join(SOURCES)}, or a checkpoint folder")
    g.add_argument("--recipe", choices=RECIPES, help="objective and settings of a paper (default mdpo)")
    g.add_argument("--data", help="preference file, folder or hub data set (docs/data.md); default the recipe's own: "
                   + ", ".join(hub_data.NAMED))  # fmt: skip
    g.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the data file's)")
    g.add_argument("--weights", type=Path, help="folder of the base's checkpoint, instead of the hub's cache")
    g.add_argument("--vision-weights", type=Path, help="CLIP or SigLIP folder, for layouts without the vision tower")
    g.add_argument("--adapter-keys", choices=SPELLINGS, help="names of the adapter's tensors (default: the base's hub)")
    g.add_argument("--out", type=Path, help="run folder, must be empty or new (default runs/BASE-RECIPE-SEED)")
    g = p.add_argument_group("objective (default: the recipe's)")
    g.add_argument("--terms", help="which of dpo,copo,ancpo")
    g.add_argument("--anchors", help="what AncPO holds: w (chosen, above delta), l and m_l (below it)")
    g.add_argument("--beta", type=float, help="temperature of the rewards")
    g.add_argument("--delta", type=float, help="anchor, outside beta")
    g.add_argument("--rejected-image", choices=pictures.STRATEGIES,
                   help="how m_l is made from m_w (default: given where all rows bring one, else crop)")  # fmt: skip
    g.add_argument("--crop-every-epoch", default=True, action=yes_no, help="draw m_l anew each epoch, else epoch 0's")
    g = p.add_argument_group("optimisation (default: the recipe's)")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--epochs", type=int)
    g.add_argument("--batch", type=int, help="pairs per optimiser step")
    g.add_argument("--micro-batch", type=int, default=1, help="pairs per forward")
    g.add_argument("--warmup", type=float, help="share of the steps with rising learning rate")
    g.add_argument("--adam-beta2", type=float)
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--clip", type=float, help="largest gradient norm")
    g.add_argument("--lora-r", type=int)
    g.add_argument("--lora-alpha", type=float)
    g.add_argument("--max-steps", type=int, help="stop after this many optimiser steps; the schedule ends there too")
    g.add_argument("--seed", type=int, default=0, help="order of the data, m_l, LoRA's A")
    g = p.add_argument_group("data and machine")
    g.add_argument("--max-length", type=int, default=MAX_LENGTH, help="longest prompt + response, image tokens counted")
    g.add_argument("--cut-long", action="store_true", help="cut the response of a longer example, instead of stopping")
    g.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used, instead of stopping")
    g.add_argument("--bunny-template", default="tuned", choices=("tuned", "released"), help="blank before a response")
    g.add_argument("--workers", type=int, default=2, help="processes that prepare pictures")
    g.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base (default bfloat16 on CUDA)")
    g = p.add_argument_group("speed (packing.py, engine/head.py)")
    g.add_argument(
        "--pack", default=torch.cuda.is_available(), action=yes_no, help="shared-prefix rows without padding"
    )
    g.add_argument("--tokens-per-batch", type=int, default=8192, help="packed tokens per forward, with --pack")
    g.add_argument("--reference", choices=("live", "cached"), help="reference log-probs (default cached with --pack)")
    g.add_argument(
        "--reference-file", type=Path, help="where cached ones are kept between runs (default: the run folder)"
    )
    g.add_argument("--compile", action=yes_no, help="torch.compile the decoder block (default on CUDA with --pack)")
    g.add_argument("--checkpointing", help="recompute activations of none, full or N layers (default: as few as fit)")
    # the recipe's settings are defaults: a flag that is given wins
    chosen, _ = p.parse_known_args(argv)
    p.set_defaults(**RECIPES[chosen.recipe or "mdpo"] | (toy.SETTINGS if chosen.base == "toy" else {}))
    args = p.parse_args(argv)
    if wrong := settle(args):
        p.error(wrong)
    return args


def settle(args: argparse.Namespace) -> str | None:
    """Fills in the defaults that depend on other flags; what is wrong with the flags, if anything."""
    args.recipe = args.recipe or "mdpo"
    if not args.data and args.base != "toy":  # the paper's own run
        args.data = "pds-dpo" if args.recipe == "pds-dpo" else hub_data.DEFAULT
    args.reference = args.reference or ("cached" if args.pack else "live")
    args.compile = args.pack and torch.cuda.is_available() if args.compile is None else args.compile
    args.terms, args.anchors = args.terms.split(","), args.anchors.split(",")
    for flag, known in (("terms", losses.TERMS), ("anchors", losses.ANCHORS)):
        if unknown := [v for v in getattr(args, flag) if v not in known]:
            return f"--{flag}: unknown {', '.join(unknown)}; choose from {', '.join(known)}"
    for flag in ("epochs", "batch", "micro_batch", "lora_r", "tokens_per_batch"):
        if getattr(args, flag) < 1:
            return f"--{flag.replace('_', '-')} must be at least 1"
    if args.reference == "cached" and not args.pack:
        return "--reference cached keeps the log-probs of packed rows: add --pack"
    if not (args.checkpointing in (None, "none", "full") or args.checkpointing.isdigit()):
        return f"--checkpointing {args.checkpointing}: none, full or a number of layers"
    return None


def load_everything(args: argparse.Namespace, device: torch.device):
    """Model with a fresh adapter, adapter parameters, data set. Data trouble stops here, before anything is written."""
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    pairs, problems = read_pairs(args.data, args.image_root)
    model, folder = load_base(args.base, args.weights, args.vision_weights, dtype, device)
    template = VICUNA
    if isinstance(model, bunny.Bunny):
        template = BUNNY if args.bunny_template == "tuned" else BUNNY_RELEASED
    processor = Processor(load_tokenizer(folder), model.config, template)
    with_image = args.recipe != "dpo-no-image"
    given = sum(pair.image_rejected is not None for pair in pairs)
    if args.rejected_image is None:
        args.rejected_image = "given" if given == len(pairs) else "crop"
        if 0 < given < len(pairs):
            print(f"{args.data}: only {given} of {len(pairs)} rows bring a rejected image; all get a crop instead")
    strategy = args.rejected_image if losses.needs_image_rejected(args.terms, args.anchors) else None
    if strategy and not with_image:
        raise SystemExit("dpo-no-image has no pictures: leave copo out of --terms and m_l out of --anchors")
    problems += find_problems(pairs, processor, with_image, strategy, args.max_length)
    pairs = usable(pairs, problems, args.data, args.skip_bad, args.cut_long)
    data = PairData(pairs, processor, strategy, args.seed, args.crop_every_epoch, with_image, args.max_length)
    parameters = add_lora(model, args.lora_r, args.lora_alpha, seed=args.seed)
    print(f"{len(pairs)} pairs; LoRA r {args.lora_r} on {len(lora_modules(model))} linears, "
          f"{sum(p.numel() for p in parameters):,} of {sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{device} {dtype}".replace("torch.", ""))  # fmt: skip
    return model, parameters, data


def plain_or_fast(args: argparse.Namespace, model):
    """The switch: how a step's examples are split, how a part becomes a batch, how a batch is scored."""
    if not args.pack:
        size = args.micro_batch
        return (lambda examples: [examples[i : i + size] for i in range(0, len(examples), size)],
                partial(collate, config=model.config), losses.plain_logps)  # fmt: skip
    if args.compile:
        for layer in model.language_model.layers:
            layer.compile(dynamic=True)  # one graph for all layers and token counts
    return partial(packing.split_by_tokens, budget=args.tokens_per_batch), packing.pack, packing.packed_logps


def reference_cache(args: argparse.Namespace, model, data: PairData, out: Path) -> ReferenceCache:
    template = data.processor.template
    key = {"base weights": base_digest(model), "template": repr(template),
           "image preparation": repr(template.image),
           "rejected image": str(data.strategy), "seed": str(args.seed), "dtype": str(model.lm_head.weight.dtype),
           "torch": torch.__version__, "kernel": "varlen" if torch.cuda.is_available() else "spans",
           "compile": str(args.compile), "head": "float32",
           "cut at": str(args.cut_long and args.max_length), "pictures": str(data.with_image)}  # fmt: skip
    return ReferenceCache(args.reference_file or out / "reference.json", key, data)


@torch.no_grad()
def live_reference(model, batch, score) -> losses.Logps:
    """log pi_ref: the same weights with the adapter off, one more pass."""
    with lora_disabled(model):
        return score(model, batch)


def lr_at(step: int, total: int, warmup: float, peak: float) -> float:
    """Linear from 0 over the warm-up (so the first optimiser step has lr 0), then half a cosine to 0 (mDPO 4.1)."""
    rising = math.ceil(total * warmup)
    if step < rising:
        return peak * step / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


# ---- the loop ------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> Path:
    """Trains one recipe and returns its run folder: adapter, args.json, log.jsonl."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, parameters, data = load_everything(args, device)
    out = new_run_folder(args)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    (out / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    repository = SOURCES.get(args.base, (args.base,))[0]  # what PEFT looks for beside the adapter
    split, make_batch, score = plain_or_fast(args, model)
    cache = reference_cache(args, model, data, out) if args.reference == "cached" else None
    fit_in_memory(args, model, parameters, data, split, make_batch, score, autocast)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay)

    sizes = [args.batch] * (len(data) // args.batch) + [len(data) % args.batch] * (len(data) % args.batch > 0)
    steps = min(len(sizes) * args.epochs, args.max_steps or math.inf)
    examples = iter(example_loader(data, EpochSampler(len(data), args.epochs, args.seed), args.workers))
    print(HEADER)
    with open(out / "log.jsonl", "w") as log, tqdm(total=steps, desc=args.recipe, disable=None) as bar:
        for step in range(steps):
            start = time.perf_counter()
            epoch, size = step // len(sizes), sizes[step % len(sizes)]
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, steps, args.warmup, args.lr)
            if cache and step == len(sizes):  # from the second epoch on, rows are packed differently
                with autocast:
                    cache.check_drift(
                        model, split([data[(1, i)] for i in range(min(DRIFT_ROWS, len(data)))]), args.beta
                    )
            sums = defaultdict(float)
            for micro in split(list(islice(examples, size))):
                batch = make_batch(micro).to(device)
                with autocast:
                    if cache:
                        reference = cache.reference(model, batch, micro, epoch)
                    else:
                        reference = live_reference(model, batch, score)
                    policy = score(model, batch)
                r = losses.rewards(policy, reference, args.beta)
                terms = losses.mdpo_terms(r, args.delta, args.terms, args.anchors)  # each (B,)
                loss = sum(terms.values())  # L_mDPO per example, (B,)
                if not loss.isfinite().all():
                    raise SystemExit(f"step {step}: loss {loss.tolist()} for examples {[e.pair.id for e in micro]}")
                (loss.sum() / size).backward()  # a mean over the examples of the step, not over micro-batches
                sums["loss"] += loss.detach().sum()
                for key, value in losses.metrics(policy, r, terms).items():
                    sums[key] += value.sum()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            row = {"step": step, "epoch": epoch} | {key: float(value) / size for key, value in sums.items()}
            row |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": float(grad_norm)}
            row |= {"pairs_per_s": size / (time.perf_counter() - start), "peak_gib": peak_gib(device)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.update()
            bar.write(line(row, steps))
            if (step + 1) % len(sizes) == 0:
                save_adapter(model, out / f"epoch-{epoch + 1}", repository, args.adapter_keys)
            if cache and ((step + 1) % len(sizes) == 0 or step + 1 == steps):
                cache.save()
    save_adapter(model, out, repository, args.adapter_keys)
    print(f"{out}: adapter_model.safetensors, adapter_config.json, args.json, log.jsonl")
    return out


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.base != "toy":
        train(args)
        return
    if args.weights:
        raise SystemExit("--weights: the toy base is trained here. For one that is ready, give its folder as --base.")
    torch.set_num_threads(1)  # models this small gain little from a second, and waiting for a shared core costs minutes
    world = toy.make_world((args.out.parent if args.out else Path("runs")) / f"toy-world-{args.seed}", args.seed)
    own = dict(weights=world / "base", data=args.data or world / "pairs" / "train.jsonl")
    run = train(argparse.Namespace(**vars(args) | own))
    toy.score_rows(world, {args.recipe: run}, run, args.seed)


if __name__ == "__main__":
    main()
