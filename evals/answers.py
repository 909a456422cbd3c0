"""Answers to a file of questions: `python -m evals.answers`."""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import pictures
from bases import checkpoint
from data import SYSTEM, Processor, bare_question
from evals.questions import ADDED, read_questions
from external import files
from generate import generate, load_model, load_processor, own_generator
from model import LLaVA

# ---- a file of questions -------------------------------------------------------------------------------------------


def make_batches(lengths: dict[str, int], rows: int, tokens: int, new: int) -> list[list[str]]:
    """Ids, longest prompt first, of at most `rows` questions whose prompts and `new` tokens each fit into `tokens`."""
    batches = []
    for key in sorted(lengths, key=lambda key: -lengths[key]):
        if not batches or len(batches[-1]) == min(rows, max(1, tokens // (lengths[batches[-1][0]] + new))):
            batches.append([])
        batches[-1].append(key)
    return batches


def cache_tokens(model: LLaVA) -> int:
    """How many tokens' keys and values fit into half of the GPU's free memory, or into 4 GiB."""
    c, weight = model.config, model.lm_head.weight
    free = torch.cuda.mem_get_info()[0] // 2 if weight.is_cuda else 4 * 2**30
    return free // (2 * c.layers * c.kv_heads * c.head_dim * weight.itemsize)


def ask(model: LLaVA, processor: Processor, todo: dict[str, dict], paths: dict[str, Path], args, bar, log) -> dict:
    """id -> answers row of all questions in `todo`; each batch is on the disk, in `log`, before the next begins."""
    prompts = {key: torch.tensor(processor.prompt_ids(bare_question(q["prompt"]))) for key, q in todo.items()}
    batches = make_batches({key: len(p) for key, p in prompts.items()}, args.batch,
                           args.batch_tokens or cache_tokens(model), args.beams * args.max_new_tokens)  # fmt: skip
    done = {}
    with ThreadPoolExecutor() as pool:
        for batch in batches:
            prepared = pool.map(lambda key: processor.prepare(pictures.open_image(paths[key])), batch)
            answers = generate(model, [prompts[key] for key in batch], torch.stack(list(prepared)),
                               args.max_new_tokens, args.temperature, [own_generator(args.seed, key) for key in batch],
                               args.top_p, args.beams)  # fmt: skip
            for key, ids in zip(batch, answers, strict=True):
                finish = "eos" if ids[-1] == model.config.eos_id else "length"
                done[key] = todo[key] | {"answer": processor.decode(ids), "n_tokens": len(ids), "finish": finish}
            log.write("".join(json.dumps(done[key], ensure_ascii=False) + "\n" for key in batch))
            log.flush()
            os.fsync(log.fileno())
            bar.update(len(batch))
    return done


def describe(args: argparse.Namespace, processor: Processor) -> dict:
    """All that decides what the answers are, beside the questions."""
    adapter = args.adapter and args.adapter / "adapter_model.safetensors"
    if adapter and not adapter.is_file():
        raise SystemExit(f"{adapter}: not there; --adapter takes the folder of a run or of a PEFT adapter")
    decoding = {"method": "greedy"}
    if args.temperature:
        decoding = {"method": "sampling", "temperature": args.temperature, "top_p": args.top_p}
    if args.beams > 1:
        decoding = {"method": "beam search", "beams": args.beams, "length_penalty": 1.0, "early_stopping": False}
    return {
        "base": args.base, "weights": args.weights and str(args.weights), "adapter": args.adapter and str(args.adapter),
        "adapter_sha256": adapter and files.sha256(adapter.read_bytes()),
        "decoding": decoding, "max_new_tokens": args.max_new_tokens, "seed": args.seed if args.temperature else None,
        "template": f"{'BOS ' * processor.template.bos}{SYSTEM} USER: <image>\n{{prompt}} ASSISTANT:",
        "image_mode": args.image_mode, "dtype": args.dtype, "torch": torch.__version__,
    }  # fmt: skip


def answer_file(args: argparse.Namespace) -> None:
    """Answers --questions into --out, going on with what was begun, there or by shards of this command."""
    questions, paths = read_questions(args.questions, args.image_root)
    processor = load_processor(args)
    settings, out, keys = describe(args, processor), args.out, list(questions)
    others = sorted(out.parent.glob(f"{out.stem}.*-of-*{out.suffix}"))  # what shards have done
    if args.shard_count > 1:
        out = out.with_stem(f"{out.stem}.{args.shard_index}-of-{args.shard_count}")
        keys, others = keys[args.shard_index :: args.shard_count], []
    done = {}
    for file in (out, *others):
        done |= read_begun(file, questions, settings)
    todo = {key: questions[key] for key in keys if key not in done}
    files.write_json(out.with_suffix(".settings.json"), settings)
    files.write_rows(out, list(done.values()))  # without a line that was cut off
    if todo:
        model = load_model(args)
        with open(out, "a", encoding="utf-8") as log, tqdm(total=len(keys), initial=len(done), disable=None) as bar:
            done |= ask(model, processor, todo, paths, args, bar, log)
    rows = [done[key] for key in keys]
    files.write_rows(out, rows)  # in the order of the questions, as some scorers want them
    tokens, cut = sum(row["n_tokens"] for row in rows), sum(row["finish"] == "length" for row in rows)
    print(f"{out}: {len(rows)} answers, {len(todo)} of them new; {tokens / max(1, len(rows)):.1f} tokens on average, "
          f"{cut} ended by --max-new-tokens")  # fmt: skip


def read_begun(file: Path, questions: dict[str, dict], settings: dict) -> dict[str, dict]:
    """id -> row of an answers file. SystemExit if it answers other questions, or was made with other settings."""
    if not file.exists():
        return {}
    beside = file.with_suffix(".settings.json")
    old = files.read_json(beside)
    for name in {**old, **settings}:
        if old.get(name) != settings.get(name):
            raise SystemExit(f"{file} was begun with {name} {old.get(name)!r} ({beside.name}), this run has "
                             f"{settings.get(name)!r}. Give the same settings, or another --out.")  # fmt: skip
    complete, newline, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        print(f"{file}: the last line was cut off ({len(rest)} bytes); its question is asked again")
    begun = {}
    for number, line in enumerate(complete.split(b"\n") if newline else (), 1):
        row = files.parse_json(line, f"{file}:{number}")
        key = str(row["id"])
        if {name: value for name, value in row.items() if name not in ADDED} != questions.get(key) or key in begun:
            raise SystemExit(f"{file}:{number}: id {key} is there twice, or was another question. Give another --out.")
        begun[key] = row
    return begun


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--base", required=True, help=f"{', '.join(checkpoint.SOURCES)}, or a checkpoint folder")
    p.add_argument("--weights", type=Path, help="folder of the base's checkpoint, instead of the hub's cache")
    p.add_argument("--vision-weights", type=Path, help="CLIP or SigLIP folder, for layouts without the vision tower")
    p.add_argument("--adapter", type=Path, help="run folder, or any PEFT LoRA folder")
    p.add_argument("--questions", type=Path, required=True, help="jsonl of {id, image, prompt, ...}")
    p.add_argument("--out", type=Path, required=True, help="answers.jsonl; one that was begun is gone on with")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the questions')")
    p.add_argument("--beams", type=int, default=1, help="3 for Object HalBench as published (default 1)")
    p.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the fewest tokens that hold this probability")
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument("--max-new-tokens", type=int, default=1024, help="default 1024")
    p.add_argument("--image-mode", choices=("pad", "crop"), default="pad", help="crop is what the hub's processor does")
    p.add_argument("--batch", type=int, default=64, help="questions at once, at most (default 64)")
    p.add_argument("--batch-tokens", type=int, help="tokens in the cache, at most (default: as the memory allows)")
    p.add_argument("--shard-index", type=int, default=0, help="answer every Nth question, from this one on")
    p.add_argument("--shard-count", type=int, default=1, help="N; the command without it joins what shards have done")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on CUDA, else float32")
    args = p.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or not args.temperature and args.top_p < 1:
        p.error("--temperature must not be negative; --top-p is a probability and needs --temperature")
    if args.beams > 1 and args.temperature:
        p.error("--beams does not sample: leave --temperature out")
    if min(args.beams, args.max_new_tokens, args.batch, args.batch_tokens or 1) < 1:
        p.error("--beams, --max-new-tokens, --batch and --batch-tokens must be at least 1")
    if not 0 <= args.shard_index < args.shard_count:
        p.error("--shard-index runs from 0 to --shard-count - 1")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    answer_file(args)


if __name__ == "__main__":
    main()
