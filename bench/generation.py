"""Seconds for 64 greedy captions of 128 tokens: ours, transformers' generate in the same batches, and one at a time.

    python -m bench.generation --batch 16 --rounds 3

Random weights of the mini shape (vision 256/1024/4/4, decoder 512/1376/8/8, vocabulary 32,064, 576 image tokens),
no end token, so that all write 128. The three take turns. Not collected by pytest; results stand in docs/results.md.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import generate
from bases import checkpoint
from engine.device import choose_device
from external.progress import progress

IMAGE, PAD = 32000, 32001  # ids


def models(device: str, dtype: torch.dtype):
    """One set of random weights in transformers' module and in ours."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.generation_config.pad_token_id = PAD
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = checkpoint.load_model(Path(folder), None, dtype, device)
    ours.config = dataclasses.replace(ours.config, eos_id=-1)  # nothing ends early
    return ours, theirs.to(device, dtype)


def questions(n: int):
    """n prompts of 30 to 60 text tokens around 576 image tokens, and random pictures (n, 3, 336, 336)."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for i in range(n):
        words = torch.randint(3, 32000, (30 + i % 31,), generator=generator)
        prompts.append(torch.cat([torch.tensor([1]), torch.full((576,), IMAGE), words]))
    prompts.sort(key=len, reverse=True)
    return prompts, torch.randn(n, 3, 336, 336, generator=generator)


def run_ours(model, prompts, images, batch: int, new: int) -> list[list[int]]:
    out = []
    for i in range(0, len(prompts), batch):
        out += generate.generate(model, prompts[i : i + batch], images[i : i + batch], new)
    return out


@torch.no_grad()
def run_theirs(model, prompts, images, batch: int, new: int) -> list[list[int]]:
    out = []
    for i in range(0, len(prompts), batch):
        rows = prompts[i : i + batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, PAD, padding_side="left").to(model.device)  # (B, T)
        found = model.generate(
            input_ids=ids,
            attention_mask=(ids != PAD).long(),
            pixel_values=images[i : i + batch].to(model.device, model.dtype),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=list(range(IMAGE, 32064)),
        )
        out += found[:, ids.shape[1] :].tolist()
    return out


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--captions", type=int, default=64)
    p.add_argument("--tokens", type=int, default=128, help="tokens a caption")
    p.add_argument("--batch", type=int, default=16, help="captions a batch, ours and theirs")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = p.parse_args(argv)
    device = choose_device().type
    ours, theirs = models(device, getattr(torch, args.dtype))
    prompts, images = questions(args.captions)
    sides = {
        "ours": lambda: run_ours(ours, prompts, images, args.batch, args.tokens),
        "transformers, same batch": lambda: run_theirs(theirs, prompts, images, args.batch, args.tokens),
        "transformers, one at a time": lambda: run_theirs(theirs, prompts, images, 1, args.tokens),
    }
    wall = {name: [] for name in sides}  # seconds of each round
    cpu = {name: [] for name in sides}
    answers = {}
    for _ in progress(range(args.rounds), "rounds"):
        for name, side in sides.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            answers[name] = side()
            wall[name].append(time.perf_counter() - wall_start)
            cpu[name].append(time.process_time() - cpu_start)
            print(f"{name}: {wall[name][-1]:.1f} s, CPU {cpu[name][-1]:.1f} s", flush=True)
    print(
        f"{args.captions} captions of {args.tokens} tokens, batch {args.batch}, {device} {args.dtype}, "
        f"{torch.get_num_threads()} threads"
    )
    for name, runs in wall.items():
        same = sum(a == b for a, b in zip(answers["ours"], answers[name], strict=True))
        times = statistics.median(runs) / statistics.median(wall["ours"])
        print(
            f"{name:28s} {statistics.median(runs):7.1f} s ({min(runs):.1f}-{max(runs):.1f})  {times:5.2f} x ours  "
            f"CPU {statistics.median(cpu[name]):6.1f} s  {same}/{args.captions} answers equal"
        )


if __name__ == "__main__":
    main()
