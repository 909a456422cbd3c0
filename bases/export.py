"""A base and an adapter -> one merged checkpoint that other tools open.

    python -m bases.export --base llava-1.5-7b --adapter runs/llava-1.5-7b-mdpo-0 --out merged
    python -m bases.export --base liuhaotian-folder --out converted     no adapter: the same model in the hub's layout

LLaVA is written in the hub's layout (transformers, vLLM and lmms-eval open it), Bunny in its own, shard by shard, every
tensor merged in float32 and cast. Then base + adapter and the files just written read the same picture and prompt, and
if their logits differ by more than a bound nothing is kept. docs/export.md shows how to use the result.

Deviations from the hub's llava-1.5-*-hf
1. Pictures are padded to a square, as LLaVA was trained; the hub's own config cuts the middle out.
2. The chat template has the Vicuna system prompt, as LLaVA was trained; the hub's has none.
3. From the original layout, which has no rows for <image> and <pad>, the added rows are the mean of the others.
"""

import argparse
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bases import checkpoint
from bases.adapter import Adapter, load_adapter, read_adapter
from bases.architectures import LLAVA_15, architecture_of
from bases.hub_files import write_llava_files
from bases.layouts import IGNORED, their_name
from bases.tensors import Stored, check_finite, read_tensor, write_tensors
from bases.tokenizer import load_processor
from external import files
from external.progress import progress
from lora import lora_disabled, scaling_of
from model import Config, LLaVA

SHARD_BYTES = 5 * 10**9
# Largest logit difference allowed between base + adapter and the merged weights: what rounding the merged weights to
# the dtype explains, with room. A wrong scale or a forgotten layer is far above.
MAX_DIFFERENCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 1.0}
GROWN = ("language_model.embed_tokens.weight", "lm_head.weight")  # may get rows for <image> and <pad>
QUESTION = "Describe this image in detail."


def main(argv=None) -> None:
    args = parse_args(argv)
    out, part = args.out, Path(f"{args.out}.part")
    if out.exists() or out.is_symlink():
        raise SystemExit(f"{out}: exists already; an export never overwrites")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        hint = "If no other export is writing it, one was killed there: remove it"
        raise SystemExit(f"{part}: exists already. {hint}") from None
    except OSError as error:
        raise SystemExit(f"{out}: cannot be written ({error.strerror}).") from None
    try:
        if out.exists():
            raise SystemExit(f"{out}: exists already; an export never overwrites")
        export(args, part)
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


def export(args: argparse.Namespace, part: Path) -> None:
    """Writes base + adapter to the folder `part` and compares the logits. SystemExit if they differ by too much."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = checkpoint.resolve(args.base, args.weights)
    stored, _ = checkpoint.checkpoint_tensors(folder, args.vision_weights)
    own = read_tensor(stored["language_model.norm.weight"]).dtype
    dtype = getattr(torch, args.dtype) if args.dtype else own
    bound = MAX_DIFFERENCE[dtype] if args.max_difference is None else args.max_difference

    model, _ = checkpoint.load_base(args.base, folder, args.vision_weights, own, device)
    config, adapter = model.config, None
    if args.adapter:
        load_adapter(model, args.adapter)
        adapter = read_adapter(args.adapter)
    expected = logits(model, folder)
    if args.adapter:
        with lora_disabled(model):
            print(f"the adapter changes a logit by up to {largest_difference(expected, logits(model, folder)):.3g}")
    del model  # the merged one needs its room

    write_checkpoint(folder, part, stored, adapter, config, dtype)
    found = logits(checkpoint.load_model(part, None, dtype, device), part)
    difference = largest_difference(found[:, : config.vocab], expected)
    print(f"writing it as {args.dtype or dtype} changes a logit by up to {difference:.3g}".replace("torch.", ""))
    if not difference <= bound:
        raise SystemExit(f"More than {bound}: nothing is kept. Try --dtype float32, or raise --max-difference.")


# ---- is it the same model? -----------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: LLaVA, folder: Path) -> Tensor:
    """Logits (T, V) of a question about a drawn picture, in float32 arithmetic.

    The decoder's weights are widened while their layer runs, so there is no second copy of them.
    """
    processor = load_processor(folder, model.config)
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    ids = torch.tensor([processor.prompt_ids(QUESTION)], device=device)  # (1, T)
    picture = processor.prepare(Image.linear_gradient("L").convert("RGB"))[None].to(device)  # (1, 3, S, S)

    def widen(module, _):
        module.float()

    def narrow(module, *_):
        module.to(dtype)

    hooks = []
    for m in (*model.language_model.modules(), model.lm_head):
        if m._parameters and not m._modules:  # a layer with weights of its own, and no adapter
            hooks += [m.register_forward_pre_hook(widen), m.register_forward_hook(narrow)]
    model.vision_tower.float()
    model.mm_projector.float()
    found = model(ids, picture)[0].cpu()  # (1, T, V) -> (T, V)
    for hook in hooks:
        hook.remove()
    return found


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# ---- what is written -----------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    out: Path,
    stored: dict[str, Stored],
    adapter: Adapter | None,
    config: Config,
    dtype: torch.dtype,
) -> None:
    """Weights and all files beside them, in the architecture's own layout."""
    if architecture_of(config) is LLAVA_15:
        config = with_image_rows(config)
        write_weights(out, stored, adapter, config, dtype)
        write_llava_files(folder, out, config, dtype)
    else:
        run = config.vision.layers_run  # BAAI's layout ends with the last layer that runs
        stored = {name: s for name, s in stored.items() if not checkpoint.unused_layer(name, run)}
        write_weights(out, stored, adapter, config, dtype)
        copy_other_files(folder, out, dtype)


def with_image_rows(config: Config) -> Config:
    """A config of the original layout -> with <image> and <pad> after its vocabulary, padded up to a multiple of 64."""
    if config.image_id >= 0:
        return config
    vocab = (config.vocab + 2 + 63) // 64 * 64
    return replace(config, vocab=vocab, image_id=config.vocab, pad_id=config.vocab + 1)


def write_weights(
    out: Path,
    stored: dict[str, Stored],
    adapter: Adapter | None,
    c: Config,
    dtype: torch.dtype,
) -> None:
    """Every tensor of the base, those with an adapter merged: W + s B A in float32, then cast. `c`: what is written."""
    layout = architecture_of(c).export_layout
    ours, shapes = {}, {}
    for name, s in stored.items():
        if IGNORED.search(name) and not name.startswith("vision_tower.post_layernorm."):
            continue
        theirs = their_name(name, layout)
        ours[theirs] = name
        shapes[theirs] = (c.vocab, c.width) if name in GROWN else s.shape
    lora = adapter.tensors if adapter else {}
    scaling = scaling_of(adapter.r, adapter.alpha, adapter.rslora) if adapter else 1.0

    def tensor(theirs: str) -> Tensor:
        name = ours[theirs]
        linear = name.removesuffix(".weight")
        t = read_tensor(stored[name], torch.float32)
        if f"{linear}.lora_A" in lora:
            t += scaling * (lora[f"{linear}.lora_B"].float() @ lora[f"{linear}.lora_A"].float())  # (out, in)
        missing = shapes[theirs][0] - len(t)
        if missing:
            t = torch.cat([t, t.mean(0, keepdim=True).expand(missing, -1)])  # (V, C) -> (V', C)
        check_finite(t.to(dtype), name)
        return t.to(dtype)

    write_shards(out, shapes, dtype, tensor)


def write_shards(
    folder: Path,
    shapes: dict[str, tuple],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
    limit: int = SHARD_BYTES,
) -> None:
    """model.safetensors, or an index and shards of at most `limit` bytes (or one tensor); tensor(name) makes each."""
    shards, room = [[]], limit
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    table = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name in progress(names, file):
            tensors[name] = tensor(name)
            made = tuple(tensors[name].shape), tensors[name].dtype
            assert made == (tuple(shapes[name]), dtype), (name, made, shapes[name], dtype)
            table[name] = file
        write_tensors(folder / file, tensors)
        del tensors  # before the next ones are made
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": table}
        files.write_json(folder / "model.safetensors.index.json", index)


def copy_other_files(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Everything of the base's folder that is not weights, with the dtype in its config."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    config = files.read_json(folder / "config.json", dict) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    files.write_json(out / "config.json", config)


# ---- command line --------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--base", required=True, help=checkpoint.BASE_HELP)
    p.add_argument("--weights", type=Path, help="folder of the base's checkpoint, instead of the hub's cache")
    p.add_argument("--vision-weights", type=Path, help="CLIP or SigLIP folder, for layouts without the vision tower")
    p.add_argument("--adapter", type=Path, help="run folder or PEFT folder; none: only the layout changes")
    p.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the checkpoint's")
    p.add_argument("--max-difference", type=float, help="bound on the logits (default: MAX_DIFFERENCE, by dtype)")
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
