"""What all stages share: rows in, rows out, and a run that may be killed at any moment.

    python -m pds.STAGE IN.jsonl --out OUT.jsonl

A stage reads every row of IN and checks it before a model is loaded. It works on batches, and each batch is on the disk
before the next one begins. The same command resumes a run that was stopped: a last line that was cut off goes, rows
that are there stay, the rest is done. Rows are found by `id`, answers by (`id`, `responder`), never by position.

OUT.settings.json says how the rows were made; a run with other settings does not resume. `--shard-index I
--shard-count N` takes the rows whose id hashes to I, each shard with an --out of its own; `cat` joins them, and the
settings file of one shard is that of the whole.

A row that could not be done stays as a row with `error`, and makes the exit status 1. A row that failed in an earlier
stage is passed on as it is.

Not from a paper; pds-dpo's scripts have a resume of their own, see docs/pds.md for where it loses rows.
"""

import argparse
import errno
import fcntl
import hashlib
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from external import files
from external.flags import file_ending, whole
from external.progress import progress
from external.terminal import printable, set_up_terminal

INSTALL = "python .ci/install.py pds"
Row = dict
Key = tuple[str, str]  # id, responder ("" where there is none)


class Work(NamedTuple):
    """What a stage does with a batch: the same rows, in the same order, with more keys, or with `error`."""

    do: Callable[[list[Row]], list[Row]]
    row_bytes: int  # memory that one row of a batch takes, roughly
    rows: int | None = None  # rows at once, where memory does not decide it


def each_row(make: Callable[[Row], Row]) -> Work:
    """Work that needs no batches: `make` turns a row into the same with more keys, in no time."""
    return Work(lambda rows: [make(row) for row in rows], row_bytes=1, rows=1000)


# ---- rows ----------------------------------------------------------------------------------------------------------


def row_key(row: Row) -> Key:
    return str(row["id"]), str(row.get("responder", ""))


def is_number(value) -> bool:
    """Whether it is a number to count with: not NaN, not infinite, not too large for a float, not true or false."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def row_problem(row: Row, needed: dict[str, type]) -> str | None:
    """Why a row cannot be used. A row with `error` needs nothing but its id."""
    if not isinstance(row.get("id"), str | int) or isinstance(row["id"], bool):
        return "no `id`; every row needs one, a text or a whole number"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair in a text; it cannot be written as UTF-8"
    if "error" in row:
        return None
    for name, kind in needed.items():
        if name not in row:
            return f"id {row['id']} has no `{name}`"
        value = row[name]
        odd = isinstance(value, int | float) and not is_number(value)
        if odd or not isinstance(value, kind):
            return f"id {row['id']}: `{name}` is {json.dumps(value)[:40]}, which is of the wrong kind"
    return None


def read_inputs(path: Path, needed: dict[str, type]) -> list[Row]:
    """The rows of a stage's input, all checked. SystemExit with file and line of each that cannot be used."""
    return check_inputs(path, files.read_rows(path), needed)


def check_inputs(path: Path, found: list[Row], needed: dict[str, type]) -> list[Row]:
    """The rows as files.read_rows found them, checked and without `_where`. SystemExit as read_inputs."""
    rows, problems, first_at = [], [], {}
    for row in found:
        where = row.pop("_where")
        problem = row_problem(row, needed)
        if problem is None and row_key(row) in first_at:
            problem = f"{' of '.join(filter(None, row_key(row)))} was there before, at {first_at[row_key(row)]}"
        if problem is None:
            first_at[row_key(row)] = where
            rows.append(row)
        else:
            problems.append(f"{where}: {problem}")
    if problems:
        shown = "\n".join(problems[:5])
        raise SystemExit(f"{shown}\n{len(problems)} rows of {path} cannot be used; nothing was done. Correct the file.")
    return rows


def in_shard(row: Row, index: int, count: int) -> bool:
    """Whether a row is this shard's, by its id; all candidates of a prompt fall into one shard."""
    name = str(row.get("prompt_id", row["id"]))
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % count == index


def failed(row: Row, reason: str) -> Row:
    return row | {"error": " ".join(reason.split())[:300]}


# ---- what was done before ------------------------------------------------------------------------------------------


def settings_file(out: Path) -> Path:
    return out.with_suffix(".settings.json")


def check_settings(out: Path, settings: dict) -> None:
    """SystemExit naming every setting in which a run that was begun differs from this one."""
    if not out.exists() or not out.stat().st_size:
        return
    beside = settings_file(out)
    if not beside.exists():
        raise SystemExit(
            f"{out} has rows, but {beside.name} is not beside it, so nobody knows how they were made. "
            "Joined from shards? Copy the settings file of one of them to that name. Otherwise give another --out."
        )
    old = files.read_json(beside, dict)
    differing = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
    if differing:
        lines = (f"  {name}: {old.get(name)!r} then, {settings.get(name)!r} now" for name in differing)
        raise SystemExit(
            f"{out} was made with other settings:\n" + "\n".join(lines) + "\nGive the same ones, or another --out."
        )


def cut_torn_line(out: Path) -> None:
    """Removes a last line that was not written to its end."""
    data = out.read_bytes()
    complete = data.rfind(b"\n") + 1
    if complete < len(data):
        os.truncate(out, complete)
        print(f"{out}: the last line was cut off ({len(data) - complete} bytes); its row is done again")


def read_done(out: Path, inputs: dict[Key, Row], added: set[str]) -> dict[Key, Row]:
    """key -> row of OUT. SystemExit if it holds rows that IN does not, or that were made from other ones.

    `added` names what the stage writes into a row; everything else must be as it is in IN.
    """
    done = {}
    for number, line in enumerate(out.read_bytes().split(b"\n")[:-1], 1):
        where = f"{out}:{number}"
        row = files.parse_json(line, where)
        if not isinstance(row, dict) or row_problem(row, {}) or added and not added & row.keys():
            raise SystemExit(f"{where}: not a row of this stage; was it edited? Delete the line, and it is done again.")
        key = row_key(row)
        source = inputs.get(key)
        if source is None:
            raise SystemExit(f"{where}: {key[0]} is not in the input; give the one it was made from, or another --out.")
        if key in done:
            raise SystemExit(f"{where}: {key[0]} is there twice; delete one of the lines.")
        changed = [name for name in source if name not in added and row.get(name) != source[name]]
        if changed and "error" not in row:  # nothing was made of a row that failed: its input may be mended
            raise SystemExit(
                f"{where}: {key[0]} had another {', '.join(changed)} when it was made. Give another --out, or put "
                "back the old input."
            )
        done[key] = row
    return done


class Log:
    """OUT, open for one process at a time; a batch is appended whole, or not at all."""

    def __init__(self, out: Path):
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.open()

    def open(self) -> None:
        self.file = open(self.out, "ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{self.out}: another process is writing it; a shard needs an --out of its own.") from None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def replace(self, rows: list[Row]) -> None:
        """OUT with these rows only; the old file is there until the new one is complete."""
        files.write_rows(self.out, rows)
        self.file.close()
        self.open()

    def append(self, rows: list[Row]) -> None:
        """Writes rows and waits for the disk. SystemExit without a trace of them if there is no room."""
        end = os.fstat(self.file.fileno()).st_size
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        left = memoryview(text.encode("utf-8", "replace"))  # half of a surrogate pair becomes "?"
        try:
            while left:
                left = left[self.file.write(left) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            os.ftruncate(self.file.fileno(), end)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise SystemExit(
                f"{self.out}: {error.strerror}; what was done before is complete. Make room, then run it again."
            ) from None


# ---- the run -------------------------------------------------------------------------------------------------------


def batch_size(asked: int | None, row_bytes: int) -> int:
    """Rows at once: as asked, else what fits into half of the GPU's free memory; 8 on a CPU."""
    if asked:
        return asked
    if not torch.cuda.is_available():
        return 8
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(256, free // 2 // row_bytes))


def in_batches(rows: list[Row], work: Work, size: int) -> Iterator[list[Row]]:
    """Results, batch by batch. A batch that does not fit into the GPU is halved, and stays so."""
    at = 0
    while at < len(rows):
        batch = rows[at : at + size]
        try:
            results = work.do(batch)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(batch) > 1:
                size = len(batch) // 2
                print(f"out of GPU memory: batches of {size} from here")
                continue
            results = [failed(batch[0], "out of GPU memory, although it was alone in its batch")]
        assert [row_key(row) for row in results] == [row_key(row) for row in batch], "results are not those of the rows"
        yield results
        at += len(batch)


class Result(NamedTuple):
    rows: list[Row]  # those of this shard, in the order of the input
    new: int  # how many of them this run added
    failed: int  # by this stage


def run(
    args: argparse.Namespace,
    inputs: list[Row],
    settings: dict,
    added: set[str],
    load: Callable[[], Work],
    order: Callable[[Row], int] | None = None,
) -> Result:
    """Every row of `inputs` that is not yet in args.out, done and appended; `order` sorts what is left to do.

    `added` names what the stage writes into a row. `load` is called only if something is left to do.
    """
    check_settings(args.out, settings)
    chosen = [row for row in inputs[: args.limit] if in_shard(row, args.shard_index, args.shard_count)]
    with Log(args.out) as log:
        cut_torn_line(args.out)
        done = read_done(args.out, {row_key(row): row for row in inputs}, added)
        if args.retry_failed:
            again = {row_key(row) for row in chosen}  # no other row: what is taken out here is done below
            done = {key: row for key, row in done.items() if "error" not in row or key not in again}
            log.replace(list(done.values()))
        files.write_json(settings_file(args.out), settings)
        todo = [row for row in chosen if row_key(row) not in done]
        passed_on = [row for row in todo if "error" in row]
        todo = sorted((row for row in todo if "error" not in row), key=order or (lambda row: 0))
        log.append(passed_on)
        done |= {row_key(row): row for row in passed_on}
        if todo:
            work = load()
            size = batch_size(args.batch or work.rows, work.row_bytes)
            with progress(what="rows", total=len(chosen), done=len(chosen) - len(todo)) as bar:
                for results in in_batches(todo, work, size):
                    log.append(results)
                    done |= {row_key(row): row for row in results}
                    bar.update(len(results))
    rows = [done[row_key(row)] for row in chosen]
    own_failures = [row for row, source in zip(rows, chosen, strict=True) if "error" in row and "error" not in source]
    return Result(rows, len(passed_on) + len(todo), len(own_failures))


def report(args: argparse.Namespace, result: Result, dropped: Counter | None = None) -> None:
    """The last line of a stage. Exit status 1 if a row failed."""
    passed_on = sum("error" in row for row in result.rows) - result.failed
    done = len(result.rows) - result.failed - passed_on
    line = f"{args.out}: {done} done ({result.new} rows new), {result.failed} failed"
    if passed_on:
        line += f", {passed_on} had failed before"
    if dropped:
        line += "; dropped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    print(printable(line))
    if result.failed:
        example = next(row for row in result.rows if "error" in row)
        print(printable(f"such as {example['id']}: {example['error']}"))
        print("The same command with --retry-failed tries them again.")
        sys.exit(1)


# ---- flags, packages, models ---------------------------------------------------------------------------------------


def stage_parser(doc: str, what: str) -> argparse.ArgumentParser:
    """IN, --out and the flags that every stage has."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0])
    p.add_argument("input", type=Path, metavar="IN", help=what)
    add_flags(p)
    return p


def add_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out",
        type=file_ending(".jsonl"),
        required=True,
        help="OUT.jsonl; the same command resumes one that was begun",
    )
    p.add_argument("--batch", type=whole(1), help="rows at once (default: as the GPU's free memory allows; 8 on a CPU)")
    p.add_argument("--limit", type=whole(1), help="only the first N rows of IN")
    p.add_argument("--retry-failed", action="store_true", help="do the rows again that ended with an error")
    p.add_argument(
        "--shard-index", type=whole(0), default=0, help="the rows whose id hashes to this, of 0 .. count - 1"
    )
    p.add_argument("--shard-count", type=whole(1), default=1, help="how many processes share IN (default 1)")


def check_flags(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    set_up_terminal()
    if not 0 <= args.shard_index < args.shard_count:
        p.error(f"--shard-index runs from 0 to --shard-count - 1, which is {args.shard_count - 1}")
    files.check_writable(args.out, [args.input] if "input" in args else [])


def optional(module: str) -> ModuleType:
    """A package of the extra that the core does without. SystemExit with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed, it is needed here: {INSTALL}") from None


def beside(path: Path, out: Path) -> str:
    """How OUT's settings name a file: from OUT's folder, so that both can be moved together."""
    return os.path.relpath(path.resolve(), out.parent.resolve())


def refuse_misfits(where: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """name -> shape of what a model has and of what a file holds. SystemExit names what is missing or of another shape.

    What the model does not have is only printed: it changes no score.
    """
    problems = [f"{name} is missing" for name in wanted if name not in found]
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            problems.append(f"{name} is {found[name]} instead of {shape}")
    if problems:
        named = "\n  ".join(problems[:10])
        raise SystemExit(
            f"{where}: {len(problems)} tensors do not fit, and no score may come from a random one:\n  {named}"
        )
    surplus = [name for name in found if name not in wanted]
    if surplus:
        print(f"{where}: {len(surplus)} tensors are not used: {', '.join(surplus[:10])}")
