"""Train a LoRA adapter with mDPO, DPO or PDS-DPO: the recipes, one plain loop, what it calls, the flags.

    python train.py --base toy                                       a small world, a minute or two on a CPU
    python train.py --base llava-1.5-7b --data preferences.json      the paper's run (mDPO 4.1) on one GPU

Files to read for one step, in order: train.py (the loop) -> data.py (Batch) -> losses.py (plain_logps, mdpo_terms) ->
model.py (forward) -> lora.py (the reference is the model with its adapter off). Everything fast is switched on in
`fast_path` and lives in engine/; the plain path needs none of it.

Deviations from the papers and their released code
1. The last, smaller batch of an epoch is used and averaged over what it holds; the release drops it.
2. Policy and reference see the same m_l (data.py, 1); in the release the first loss is not 3 ln 2.
3. PDS-DPO's text says batch 1 x accumulation 4 on 2 GPUs = 8, its script accumulates 1; the paper's 8 is the default.
4. LoRA weights are float32 and so is AdamW's state, on every base dtype.
"""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import losses
import pictures
import toy
from bases import quant
from bases.adapter import save_adapter
from bases.architectures import architecture_of, read_config
from bases.checkpoint import BASE_HELP, base_sha256, checkpoint_tensors, load_model, resolve, source_of
from bases.tokenizer import load_processor
from data import MAX_LENGTH, Example, PairData, collate
from engine import distributed
from engine.batches import batches, plan_steps, workers_watched
from engine.device import autocast_for, choose_device, compile_blocks, settle_speed
from engine.memory import Room, find_room
from engine.run_folder import Run, describe, probe
from engine.sharding import shard as shard_base
from external import tracking
from external.flags import HelpWithDefaults, layer_count, names_of, number, refuse_words, whole
from formats import hub_data
from formats.problems import Demands, examine, reasons, usable
from formats.readers import read_data
from lora import add_lora, lora_disabled
from model import LLaVA

MDPO = dict(
    terms=("dpo", "copo", "ancpo"),  # mDPO 3
    anchors=("w",),  # mDPO 3.2
    beta=0.1,  # mDPO 4.1
    delta=0.0,  # mDPO 4.1
    lr=1e-5,  # mDPO 4.1
    epochs=3,  # mDPO 4.1
    batch=32,  # mDPO 4.1
    warmup=0.1,  # mDPO 4.1: linear from 0, then a cosine to 0
    lora_r=64,  # mDPO 4.1
    lora_alpha=128.0,  # mDPO 4.1
    adam_beta2=0.98,  # mDPO release, config.yaml
    weight_decay=0.05,  # mDPO release, config.yaml
    clip=1.0,  # mDPO release, config.yaml
)
PDS_DPO = dict(
    terms=("dpo",),  # PDS-DPO 3.1, equation 4
    epochs=2,  # PDS-DPO 4.1
    batch=8,  # PDS-DPO 4.1: 1 x 4 accumulated x 2 GPUs
    lora_r=128,  # PDS-DPO release, as the rest
    lora_alpha=256.0,
    warmup=0.03,
    weight_decay=0.0,
    adam_beta2=0.999,
)
RECIPES = {
    "mdpo": MDPO,
    "dpo": MDPO | dict(terms=("dpo",)),  # mDPO 4.1: only the objective differs
    "dpo-no-image": MDPO | dict(terms=("dpo",)),  # mDPO Figure 1: picture and <image> left out of training prompts
    "pds-dpo": MDPO | PDS_DPO,
}


# ---- the loop ------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> Path:
    """One recipe: mDPO 4.1 as a loop. Returns the run folder."""
    world, device = distributed.join(), choose_device()
    probe(run_folder_of(args), args.resume)
    model, data = load_base_and_data(args, device)
    targets = architecture_of(model).lora_targets
    parameters = add_lora(model, args.lora_r, args.lora_alpha, seed=args.seed, targets=targets)
    path = choose_path(args, world, model)
    room = make_room(args, world, path, model, parameters, data)
    optimizer = make_optimizer(parameters, args.lr, args.adam_beta2, args.weight_decay)
    run = start_run(args, world, model, data, path, room, optimizer)

    for step, examples, step_size in batches(data, run.plan, run.step, args.workers):
        # 1. learning rate: linear warm-up, then half a cosine
        lr = lr_at(step, run.steps, args.warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. gradients, micro-batch by micro-batch
        for micro in room.micro_batches(examples, run.clear):
            policy = r = terms = loss = None  # the last micro-batch's graph: it may be what filled the memory
            with room:
                batch = path.make_batch(micro).to(device)
                with path.autocast:
                    reference = path.reference(model, batch)  # log pi_ref of the three triples
                    policy = path.score(model, batch)  # log pi_theta of (m_w, q, y_w), (m_w, q, y_l), (m_l, q, y_w)
                r = losses.rewards(policy, reference, args.beta)  # r = beta (log pi_theta - log pi_ref)
                terms = losses.mdpo_terms(r, args.delta, args.terms, args.anchors)
                loss = sum(terms.values())  # L_DPO + L_CoPO + L_AncPO, (B,)
                (loss.sum() / step_size).backward()  # a mean over the step's examples, not over micro-batches
                run.add(losses.metrics(policy, r, terms))

        # 3. step
        world.add_up(parameters, run)  # with several GPUs: the sum over all ranks
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        run.stop_if_not_finite(step, grad_norm, examples)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. log, and save where it is time
        run.log(step, lr, grad_norm)
    return run.finish()


def lr_at(step: int, steps: int, warmup: float, peak: float) -> float:
    """Linear from 0 over the warm-up (so the first optimiser step has lr 0), then half a cosine to 0 (mDPO 4.1)."""
    rising = min(math.ceil(steps * warmup), steps - 1)  # a run of one step is not spent on a learning rate of 0
    if step < rising:
        return peak * step / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# ---- how a micro-batch is scored -----------------------------------------------------------------------------------


class ScoringPath(NamedTuple):
    """The plain path or the fast one: the same arguments, the same Logps."""

    split: Callable  # (a step's examples, size) -> micro-batches
    make_batch: Callable  # examples -> what is scored
    score: Callable  # (model, batch) -> Logps
    reference: Callable  # (model, batch) -> Logps with the adapter off
    autocast: contextlib.AbstractContextManager


def choose_path(args: argparse.Namespace, world: distributed.World, model) -> ScoringPath:
    """The switch: --pack."""
    if not args.pack:
        return plain_path(model)
    return fast_path(model, args.compile, args.reference, any_rank=world.any if args.shard else bool)


def live_reference(model, batch, score: Callable) -> losses.Logps:
    """log pi_ref: the same weights with the adapter off, one more pass."""
    with torch.no_grad(), lora_disabled(model):
        return score(model, batch)


def plain_path(model) -> ScoringPath:
    """Three padded forward passes for the policy and three for the reference: what defines the numbers."""
    return ScoringPath(
        split=split_by_count,
        make_batch=partial(collate, config=model.config),
        score=losses.plain_logps,
        reference=partial(live_reference, score=losses.plain_logps),
        autocast=autocast_for(model.lm_head.weight),
    )


def split_by_count(examples: list[Example], size: int) -> list[list[Example]]:
    """Micro-batches of `size` examples, in order; the last may be smaller."""
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def fast_path(model, compiled: bool, reference: str, any_rank: Callable[[bool], bool] = bool) -> ScoringPath:
    """One packed row per micro-batch, log-probs without (T, V) logits, the reference scored once (engine/)."""
    from engine import packing
    from engine.reference import CachedReference

    if compiled:
        compile_blocks(model.language_model.layers)
    live = partial(live_reference, score=packing.packed_logps)
    return ScoringPath(
        split=packing.split_by_tokens,
        make_batch=packing.pack,
        score=packing.packed_logps,
        reference=live if reference == "live" else CachedReference(any_rank),
        autocast=autocast_for(model.lm_head.weight),
    )


# ---- set-up --------------------------------------------------------------------------------------------------------


def load_base_and_data(args: argparse.Namespace, device: torch.device) -> tuple[LLaVA, PairData]:
    """The frozen base, and the pairs as it reads them. A user's mistake ends here, before anything is written."""
    read = read_data(args.data, args.image_root)
    folder = resolve(args.base, args.weights)
    _, vision = checkpoint_tensors(folder, args.vision_weights)
    processor = load_processor(folder, read_config(folder, vision))
    if args.bunny_template == "released":
        if not processor.template.response_blank:
            raise SystemExit(f"--bunny-template released: {args.base} is no Bunny; leave it out")
        processor.template = dataclasses.replace(processor.template, response_blank=False)
    demands = Demands(
        rejected_image=args.rejected_image,
        needs_m_l=losses.needs_image_rejected(args.terms, args.anchors),
        with_image=args.recipe != "dpo-no-image",
        max_length=args.max_length,
        cut_long=args.cut_long,
    )
    examined = examine(args.data, read.pairs, read.problems, processor, demands)
    data = PairData(
        pairs=usable(examined, args.skip_bad),
        processor=processor,
        strategy=examined.strategy,
        seed=args.seed,
        fresh_every_epoch=args.crop_every_epoch,
        with_image=demands.with_image,
        max_length=args.max_length,
        left_out=read.left_out + reasons(examined.problems),
    )
    place = torch.device("cpu") if args.shard else device  # one GPU need not hold a base that is to be sharded
    model = load_model(folder, args.vision_weights, getattr(torch, args.dtype), place, args.quant)
    return model, data


def make_room(args: argparse.Namespace, world: distributed.World, path: ScoringPath, model, parameters, data) -> Room:
    """How large a micro-batch may be, agreed on by all processes; with --shard the base's layers in pieces."""
    size = args.tokens_per_batch if args.pack else args.micro_batch
    room = world.agree(find_room(path, model, parameters, data, args.batch, size, args.checkpointing))
    return shard_base(path, model, room, world, spare=data[(0, 0)]) if args.shard else room


def make_optimizer(parameters: list, lr: float, beta2: float, weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=parameters[0].is_cuda
    )


def run_folder_of(args: argparse.Namespace) -> Path:
    return args.out or Path("runs") / f"{Path(args.base).name}-{args.recipe}-{args.seed}"


def start_run(
    args: argparse.Namespace,
    world: distributed.World,
    model: LLaVA,
    data: PairData,
    path: ScoringPath,
    room: Room,
    optimizer: torch.optim.AdamW,
) -> Run:
    """The run in its folder, begun or resumed."""
    steps_per_epoch = math.ceil(len(data) / args.batch)
    steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    repository = source_of(args.base)  # what PEFT looks for beside the adapter
    base_hash = base_sha256(resolve(args.base, args.weights), args.vision_weights)
    return Run(
        folder=run_folder_of(args),
        settings=describe(vars(args) | {"base_sha256": base_hash}, model, data),
        plan=plan_steps(data, args.batch, steps, world),
        steps_per_epoch=steps_per_epoch,
        model=model,
        optimizer=optimizer,
        room=room,
        reference=path.reference if args.reference == "cached" else None,
        save_adapter=partial(save_adapter, model, base=repository),
        base=repository,
        world=world,
    )


# ---- flags ---------------------------------------------------------------------------------------------------------


def defaults_of(argv) -> tuple[str, dict]:
    """The recipe that argv names, and its settings: defaults, so a flag that is given wins."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--recipe", default="mdpo")
    early.add_argument("--base")
    chosen, _ = early.parse_known_args(argv)
    return chosen.recipe, RECIPES.get(chosen.recipe, MDPO) | (toy.SETTINGS if chosen.base == "toy" else {})


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpWithDefaults)
    recipe, defaults = defaults_of(argv)
    yes_no = argparse.BooleanOptionalAction
    cuda = torch.cuda.is_available()

    g = p.add_argument_group("what")
    g.add_argument("--base", required=True, help=BASE_HELP)
    g.add_argument("--recipe", choices=RECIPES, default="mdpo", help="objective and settings of a paper")
    g.add_argument("--data", help=f"preference file, folder or hub data set, such as {', '.join(hub_data.NAMED)}")
    g.add_argument("--image-root", type=Path, help="folder the image paths start from, if not the data file's")
    g.add_argument("--weights", type=Path, help="folder of the base's checkpoint, instead of the hub's cache")
    g.add_argument("--vision-weights", type=Path, help="CLIP or SigLIP folder, for layouts without the vision tower")
    g.add_argument("--out", type=Path, help="run folder, must be empty or new; else runs/BASE-RECIPE-SEED")

    g = p.add_argument_group(f"objective (defaults of --recipe {recipe}; RECIPES says where each comes from)")
    g.add_argument("--terms", type=names_of(losses.TERMS), help="which of dpo,copo,ancpo")
    g.add_argument("--anchors", type=names_of(losses.ANCHORS), help="AncPO holds w above delta, l and m_l below it")
    g.add_argument("--beta", type=number(0.0, above=True), help="temperature of the rewards")
    g.add_argument("--delta", type=number(-math.inf), help="anchor, outside beta")
    g.add_argument("--rejected-image", type=pictures.strategy, metavar="STRATEGY", help=pictures.STRATEGY_HELP)
    g.add_argument("--crop-every-epoch", default=True, action=yes_no, help="draw m_l anew each epoch, else epoch 0's")

    g = p.add_argument_group(f"optimisation (defaults of --recipe {recipe})")
    g.add_argument("--lr", type=number(0.0, 1.0, above=True), help="peak learning rate")
    g.add_argument("--epochs", type=whole(1, 10_000), help="passes over the pairs")
    g.add_argument("--batch", type=whole(1), help="pairs per optimiser step")
    g.add_argument("--warmup", type=number(0.0, 1.0), help="share of the steps with rising learning rate")
    g.add_argument("--adam-beta2", type=number(0.0, 0.999999), help="AdamW's second beta")
    g.add_argument("--weight-decay", type=number(0.0), help="of the LoRA matrices")
    g.add_argument("--clip", type=number(0.0, above=True), help="largest gradient norm")
    g.add_argument("--lora-r", type=whole(1, 2**16), help="rank of the update")
    g.add_argument("--lora-alpha", type=number(0.0, above=True), help="the update is scaled by alpha / r")
    g.add_argument("--max-steps", type=whole(1), help="stop after this many steps; the schedule ends there too")
    g.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="order of the data, m_l, LoRA's A")

    g = p.add_argument_group("data and machine")
    g.add_argument("--max-length", type=whole(1), default=MAX_LENGTH, help="longest prompt + response, in tokens")
    g.add_argument("--cut-long", action="store_true", help="cut the response of a longer example, instead of stopping")
    g.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used, instead of stopping")
    g.add_argument("--bunny-template", default="tuned", choices=("tuned", "released"), help="blank before a response")
    g.add_argument("--workers", type=whole(0, 256), default=2, help="processes that prepare pictures")
    g.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32", help="base's")
    g.add_argument("--micro-batch", type=whole(1), default=1, help="pairs per forward of the plain path")
    g.add_argument("--resume", action="store_true", help="resume after the last checkpoint of the run in --out")
    g.add_argument("--save-every", type=whole(1), help="steps between checkpoints; else ten minutes and each epoch")
    g.add_argument("--quant", choices=quant.KINDS, help="keep the decoder's frozen linears in 4 or 8 bits")
    g.add_argument("--track", type=tracking.installed, help="send the log's rows there too: wandb or tensorboard")
    g.add_argument("--shard", action="store_true", help="under torchrun: the frozen base in pieces over the GPUs")

    g = p.add_argument_group("speed (engine/)")
    g.add_argument("--pack", default=cuda, action=yes_no, help="shared-prefix rows without padding")
    g.add_argument("--tokens-per-batch", type=whole(1), help="packed tokens per forward; on CUDA as many as fit")
    g.add_argument("--reference", choices=("live", "cached"), help="reference log-probs; with --pack cached")
    g.add_argument("--compile", action=yes_no, help="torch.compile the decoder block; with --pack, on Ampere or newer")
    g.add_argument("--checkpointing", type=layer_count, help="recompute none, full or N layers; on CUDA as few as fit")

    refuse_words(p, argv)
    p.set_defaults(**defaults)
    args = p.parse_args(argv)
    if "ancpo" not in args.terms and (args.anchors, args.delta) != (p.get_default("anchors"), p.get_default("delta")):
        p.error("--anchors and --delta are AncPO's: add ancpo to --terms")
    settle_speed(p, args)
    if not args.data and args.base != "toy":  # the paper's own run
        args.data = "pds-dpo" if args.recipe == "pds-dpo" else hub_data.DEFAULT
    return args


def train_toy(args: argparse.Namespace) -> None:
    """One recipe on the toy base, made here if it is not there; ends with the toy's own table and picture."""
    if args.weights:
        raise SystemExit("--weights: the toy base is trained here. For one that is ready, give its folder as --base.")
    torch.set_num_threads(1)  # models this small gain little from a second, and waiting for a shared core costs minutes
    probe(run_folder_of(args), args.resume)  # before the minute that a new base takes
    folder = (args.out.parent if args.out else Path("runs")) / f"toy-world-{args.seed}"
    world = distributed.join()
    if world.main and args.data:
        print("--data: the toy knows the words of its own captions; all others are <unk> to it")
    if world.main:
        toy.make_world(folder, args.seed)
    world.wait()
    own = dict(weights=folder / "base", data=args.data or folder / "pairs" / "train.jsonl")
    run = train(argparse.Namespace(**vars(args) | own))
    if world.main:
        toy.score_rows(folder, {args.recipe: run}, run, args.seed)


def main(argv=None) -> None:
    args = parse_args(argv)
    with workers_watched():
        if args.base == "toy":
            train_toy(args)
        else:
            train(args)
    distributed.leave()


if __name__ == "__main__":
    main()
