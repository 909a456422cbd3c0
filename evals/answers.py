"""Answers to a file of questions, which evals.questions makes of a benchmark's own file.

    python -m evals.answers --base llava-1.5-7b --adapter RUN --questions q.jsonl --out answers.jsonl --beams 3

An answers row is the question's row and {answer, n_tokens (end token counted), finish: eos | length}. The same command
resumes a run that was stopped. answers.settings.json says how the answers were made: with other weights, pictures or
decoding a file is not resumed but refused, since its first half would be another model's.

Not from a paper. Deviations: none.
"""

import argparse
import glob
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import pictures
from bases import checkpoint, tokenizer
from bases.adapter import adapter_sha256
from data import SYSTEM, BadRow, Processor, bare_question
from engine.distributed import under_torchrun
from evals.questions import ADDED, Questions, read_questions
from external import files
from external.flags import file_ending, whole
from external.progress import progress
from external.terminal import set_up_terminal
from generate import (
    add_decoding_flags,
    add_model_flags,
    generate,
    load_model,
    load_processor,
    own_generator,
    parse_flags,
)
from model import LLaVA

# ---- asking --------------------------------------------------------------------------------------------------------


def make_batches(lengths: dict[str, int], rows: int, tokens: int, new: int) -> list[list[str]]:
    """Ids, longest prompt first, of at most `rows` questions whose prompts and `new` tokens each fit into `tokens`."""
    batches = []
    room = 0  # questions that the last batch still takes
    for key in sorted(lengths, key=lambda key: -lengths[key]):
        if not room:
            batches.append([])
            room = min(rows, max(1, tokens // (lengths[key] + new)))  # its first prompt is its longest
        batches[-1].append(key)
        room -= 1
    return batches


def cache_tokens(model: LLaVA) -> int:
    """How many tokens' keys and values fit into half of the GPU's free memory, or into 4 GiB."""
    c, weight = model.config, model.lm_head.weight
    free = torch.cuda.mem_get_info()[0] // 2 if weight.is_cuda else 4 * 2**30
    return free // (2 * c.layers * c.kv_heads * c.head_dim * weight.itemsize)


def ask(
    model: LLaVA,
    processor: Processor,
    questions: Questions,
    prompts: dict[str, torch.Tensor],
    args: argparse.Namespace,
    save: Callable[[list[dict]], None],
) -> None:
    """Answers all questions of `prompts` (id -> (T,)); the rows of each batch are saved before the next begins."""
    lengths = {key: len(prompt) for key, prompt in prompts.items()}
    tokens = args.batch_tokens or cache_tokens(model)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        for batch in make_batches(lengths, args.batch, tokens, args.beams * args.max_new_tokens):
            prepared = list(pool.map(lambda key: open_picture(questions, key, processor), batch))
            answers = generate(
                model,
                [prompts[key] for key in batch],
                torch.stack(prepared),  # (B, 3, S, S)
                args.max_new_tokens,
                args.temperature,
                [own_generator(args.seed, key) for key in batch],
                args.top_p,
                args.beams,
            )
            rows = []
            for key, ids in zip(batch, answers, strict=True):
                finish = "eos" if ids[-1] == model.config.eos_id else "length"
                added = {"answer": processor.decode(ids), "n_tokens": len(ids), "finish": finish}
                rows.append(questions.rows[key] | added)
            save(rows)


def read_prompts(args: argparse.Namespace, processor: Processor, questions: Questions, todo: list[str]) -> dict:
    """id -> prompt (T,) of the questions of `todo`. SystemExit by id if the base cannot read one of them."""
    context = tokenizer.context_of(checkpoint.resolve(args.base, args.weights))
    prompts, problems = {}, []
    for key in todo:
        try:
            prompts[key] = tokenizer.prompt_of(processor, bare_question(questions.rows[key]["prompt"]), context)
        except BadRow as error:
            problems.append(f"id {key}: {': '.join(error.args)}")
    if problems:
        shown = "\n".join(problems[:5])
        raise SystemExit(f"{args.questions}: {shown}\n{len(problems)} questions are too long; nothing was generated.")
    return prompts


def open_picture(questions: Questions, key: str, processor: Processor) -> torch.Tensor:
    """The prepared picture (3, S, S) of a question. SystemExit by name if it is gone or has changed since the check."""
    try:
        return processor.prepare(pictures.open_image(questions.paths[key]))
    except ValueError as error:
        raise SystemExit(
            f"id {key}: {questions.paths[key]}: {error}; bring it back, the same command resumes."
        ) from None


# ---- what the answers depend on ------------------------------------------------------------------------------------

BY_HASH = ("base", "weights", "adapter")  # said in the settings, but compared by the hash of what lies there


class Source:
    """The model that answers: hashed once, and loaded once if anything is left to ask, for any number of files."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.processor = load_processor(args)

    @cached_property
    def base_sha256(self) -> str:
        folder = checkpoint.resolve(self.args.base, self.args.weights)
        return checkpoint.base_sha256(folder, self.args.vision_weights)

    @cached_property
    def model(self) -> LLaVA:
        return load_model(self.args)


def describe(args: argparse.Namespace, source: Source, questions: Questions) -> dict:
    """All that decides what the answers are, beside the questions."""
    bos = "BOS " if source.processor.template.bos else ""
    decoding = {"method": "greedy"}
    if args.temperature:
        decoding = {"method": "sampling", "temperature": args.temperature, "top_p": args.top_p}
    if args.beams > 1:
        decoding = {"method": "beam search", "beams": args.beams, "length_penalty": 1.0, "early_stopping": False}
    return {
        "base": args.base,
        "base_sha256": source.base_sha256,
        "weights": args.weights and str(args.weights),
        "adapter": args.adapter and str(args.adapter),
        "adapter_sha256": args.adapter and adapter_sha256(args.adapter),
        "pictures_sha256": questions.pictures_sha256(),
        "decoding": decoding,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed if args.temperature else None,
        "template": f"{bos}{SYSTEM} USER: <image>\n{{prompt}} ASSISTANT:",
        "image_mode": args.image_mode,
        "dtype": args.dtype,
        "torch": torch.__version__,
    }


def check_settings(file: Path, beside: Path, old: dict, settings: dict) -> None:
    """SystemExit if answers in `file` were made with other settings."""
    for name in {**old, **settings}:
        if name in BY_HASH or old.get(name) == settings.get(name):
            continue
        shown = name.removesuffix("_sha256")
        was, now = old.get(shown), settings.get(shown)
        made = f"{shown} {was!r} ({beside.name}), this run has {now!r}"
        if was == now:
            made = f"other {shown} under the same name ({name} in {beside.name})"
        if name == "pictures_sha256":  # of all of them together
            made = f"other pictures, or questions about more or fewer of them ({name} in {beside.name})"
        raise SystemExit(f"{file} was made with {made}. Give the same settings, or another --out.")


def is_answered(row: dict) -> bool:
    """Whether a row has what this command adds to a question."""
    kinds = isinstance(row.get("answer"), str) and type(row.get("n_tokens")) is int
    return kinds and row.get("finish") in ("eos", "length")


def read_partial(file: Path, questions: dict[str, dict], settings: dict) -> dict[str, dict]:
    """id -> row of an answers file. SystemExit if it answers other questions, or was made with other settings."""
    if not file.exists():
        return {}
    complete, newline, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        print(f"{file}: the last line was cut off ({len(rest)} bytes); its question is asked again")
    if not newline:
        return {}  # a first try that ended before its first answer binds nobody to its settings
    beside = file.with_suffix(".settings.json")
    check_settings(file, beside, files.read_json(beside, dict), settings)
    found = {}
    for number, line in enumerate(complete.split(b"\n"), 1):
        row = files.parse_json(line, f"{file}:{number}")
        key = str(row.get("id")) if isinstance(row, dict) else ""
        if key not in questions or questions[key] != {name: row[name] for name in row if name not in ADDED}:
            raise SystemExit(f"{file}:{number}: id {key} was another question. Give another --out.")
        if not is_answered(row):
            raise SystemExit(f"{file}:{number}: id {key} has no answer; delete the line, and it is asked again.")
        if found.get(key, row) != row:
            raise SystemExit(f"{file}:{number}: id {key} is there twice, with two answers. Give another --out.")
        found[key] = row
    return found


# ---- command line --------------------------------------------------------------------------------------------------


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """`out` is this process's while the body runs. SystemExit if another one writes it: the two might differ."""
    file = out.with_suffix(".lock")
    held = FileLock(file)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f"{out}: another process is writing it; wait for it, or give another --out.") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        held.release()


def answer_file(args: argparse.Namespace, source: Source | None = None) -> int:
    """Answers --questions into --out, from where this command, or shards of it, had come; how many are new."""
    for file in (args.out, args.out.with_suffix(".settings.json")):
        files.check_writable(file, [args.questions])
    questions = read_questions(args.questions, args.image_root)
    source = source or Source(args)
    settings, out, keys = describe(args, source, questions), args.out, list(questions.rows)
    others = sorted(out.parent.glob(f"{glob.escape(out.stem)}.[0-9]*-of-[0-9]*{out.suffix}"))  # what shards have done
    if args.shard_count > 1:
        out = out.with_stem(f"{out.stem}.{args.shard_index}-of-{args.shard_count}")
        keys, others = keys[args.shard_index :: args.shard_count], []
    with alone(out):
        done = {}
        for file in (out, *others):
            done |= read_partial(file, questions.rows, settings)
        todo = [key for key in keys if key not in done]
        prompts = read_prompts(args, source.processor, questions, todo)
        files.write_json(out.with_suffix(".settings.json"), settings)
        files.write_rows(out, list(done.values()))  # without a line that was cut off
        if todo:
            with progress(what="answers", total=len(keys), done=len(keys) - len(todo)) as bar:

                def save(rows: list[dict]) -> None:
                    files.append_rows(out, rows)
                    done.update({str(row["id"]): row for row in rows})
                    bar.update(len(rows))

                ask(source.model, source.processor, questions, prompts, args, save)
        rows = [done[key] for key in keys]
        files.write_rows(out, rows)  # in the order of the questions, as some scorers want them
    tokens = sum(row["n_tokens"] for row in rows)
    cut = sum(row["finish"] == "length" for row in rows)
    print(
        f"{out}: {len(rows)} answers, {len(todo)} of them new; {tokens / max(1, len(rows)):.1f} tokens on average, "
        f"{cut} ended by --max-new-tokens"
    )
    return len(todo)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    set_up_terminal()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--questions", type=Path, required=True, help="jsonl of {id, image, prompt, ...}")
    jsonl = file_ending(".jsonl")
    p.add_argument("--out", type=jsonl, required=True, help="answers.jsonl; what is there already is resumed")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the questions')")
    add_model_flags(p)
    add_decoding_flags(p)
    p.add_argument("--batch", type=whole(1), default=64, help="questions at once, at most (default 64)")
    p.add_argument("--batch-tokens", type=whole(1), help="tokens in the cache, at most (default: what memory allows)")
    rank, ranks = 0, 1
    if under_torchrun():
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    p.add_argument("--shard-index", type=whole(0), default=rank, help="answer every Nth question, from this one on")
    p.add_argument("--shard-count", type=whole(1), default=ranks, help="N; the command without it joins the shards")
    args = parse_flags(p, argv)
    if args.shard_index >= args.shard_count:
        p.error("--shard-index runs from 0 to --shard-count - 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    ranks = "RANK" in os.environ and args.shard_count > 1  # of torchrun: a shard each
    if ranks and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    answer_file(args)
    if ranks:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
        torch.distributed.barrier()
        if args.shard_index == 0:
            answer_file(argparse.Namespace(**vars(args) | dict(shard_index=0, shard_count=1)))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
