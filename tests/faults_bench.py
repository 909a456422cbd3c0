"""What the faults are injected with: a small base and pairs in a fresh folder, commands called in-process, verdicts.

A verdict is OK (one sentence and an exit status that is not 0, nothing half-written; or used rightly), POOR (safe, but
the words do not help, or something is left behind) or BUG (a traceback, a wrong number, exit status 0 with a wrong
result, no end).
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import train
from bases import export
from evals import answers
from formats import check
from tests import conftest

ROOT = Path(__file__).parent.parent
LIMIT = 90  # seconds after which a fault counts as a hang
SMALL = ("--workers", "0", "--lora-r", "4", "--lora-alpha", "8", "--batch", "2", "--max-steps", "2")
FAULTS: list["Fault"] = []


class Outcome(NamedTuple):
    verdict: str  # OK, POOR or BUG
    says: str


class Fault(NamedTuple):
    number: str  # of the list of faults, with a letter where one row holds several
    section: str
    what: str
    inject: Callable[["Bench"], Outcome]
    slow: bool


class Hung(BaseException):
    """The command did not end in LIMIT seconds; nothing of ours catches it."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    text: str  # all it printed, and the sentence it ended with
    crash: str  # the traceback's last line, or nothing


def fault(number: str, section: str, what: str, slow: bool = False):
    """Puts a function that injects one fault into the list."""

    def register(inject: Callable[["Bench"], Outcome]):
        FAULTS.append(Fault(number, section, what, inject, slow))
        return inject

    return register


# ---- commands ------------------------------------------------------------------------------------------------------


def call(main: Callable, *argv) -> Ended:
    """A command in this process."""
    printed = io.StringIO()
    status, sentence, crash = 0, "", ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), same_signals_after():
        try:
            main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1 if end.code else 0
            sentence = end.code if isinstance(end.code, str) else ""
        except Exception as error:  # the very thing that is looked for
            status, crash = 1, traceback.format_exception_only(error)[-1].strip()
    text = f"{printed.getvalue()}\n{sentence}".strip()
    if status == 2 and text.startswith("usage: "):
        text = text[text.rindex("error: ") :]  # the usage names every flag
    return Ended(status, text, crash)


@contextlib.contextmanager
def same_signals_after() -> Iterator[None]:
    """A command that dies in this process leaves its handlers behind, as no dead process does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shell(line: str) -> Ended:
    """A command line in a process of its own, from the repository's root; `python` is this one."""
    line = line.replace("python ", f"{sys.executable} ")
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=LIMIT
    )
    crash = done.stderr.strip().splitlines()[-1] if "Traceback (most recent" in done.stderr else ""
    return Ended(done.returncode, f"{done.stdout}\n{done.stderr}".strip(), crash)


class Bench:
    """A fresh folder with a base and five pairs, all of which may be damaged."""

    def __init__(self, folder: Path, master: Path):
        self.folder = folder
        shutil.copytree(master, folder)
        self.base = folder / "base"
        self.out = folder / "out"
        self.pairs: list[dict] = json.loads((folder / "pairs" / "pairs.json").read_text())

    def data(self, rows: list | None = None, name: str = "pairs.jsonl") -> Path:
        """The pairs, or these rows, beside the pictures."""
        rows = self.pairs if rows is None else rows
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def with_row(self, **changes) -> Path:
        """The pairs, the second of them changed."""
        self.pairs[1] |= changes
        return self.data()

    def with_picture(self, content: bytes, name: str = "1.png") -> Path:
        """The pairs, the second picture exchanged for these bytes."""
        self.write(name, content)
        return self.with_row(image=name)

    def write(self, name: str, content: str | bytes) -> Path:
        """A file beside the pictures."""
        file = self.folder / "pairs" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, str):
            file.write_text(content, encoding="utf-8")
        else:
            file.write_bytes(content)
        return file

    def picture(self, i: int = 1) -> bytes:
        return (self.folder / "pairs" / f"{i}.png").read_bytes()

    def check(self, data: Path | str | None = None, *more) -> Ended:
        return call(check.main, data or self.data(), "--base", self.base, *more)

    def train(self, *more, data: Path | None = None) -> Ended:
        flags = ["--base", self.base, "--data", data or self.data(), "--out", self.out, *SMALL]
        return call(train.main, *flags, *more)

    def adapter(self) -> Path:
        """The folder of a small run."""
        ended = self.train()
        assert ended.status == 0, ended
        return self.out

    def ask(self, *more, rows: list[dict] | None = None) -> Ended:
        """evals.answers about three pictures, to a.jsonl."""
        rows = rows or [{"id": i, "image": f"{i}.png", "prompt": "What is it?"} for i in range(3)]
        questions = self.data(rows, "q.jsonl")
        flags = ["--base", self.base, "--questions", questions, "--out", self.answers, "--max-new-tokens", 4]
        return call(answers.main, *flags, *more)

    @property
    def answers(self) -> Path:
        return self.folder / "a.jsonl"

    def export(self, *more) -> Ended:
        return call(export.main, "--base", self.base, "--out", self.folder / "merged", *more)

    def config(self, **changes) -> None:
        """Changes the base's config.json; a.b is b inside a."""
        file = self.base / "config.json"
        change_json(file, changes)

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "log.jsonl").read_text().splitlines()]


def change_json(file: Path, changes: dict) -> None:
    """Sets keys of a JSON file; a.b is b inside a."""
    data = json.loads(file.read_text())
    for name, value in changes.items():
        inside, _, key = name.rpartition(".")
        (data[inside] if inside else data)[key] = value
    file.write_text(json.dumps(data))


def make_master(folder: Path) -> Path:
    """What every bench is a copy of."""
    (folder / "base").mkdir(parents=True)
    (folder / "pairs").mkdir()
    conftest.write_base(folder / "base")
    conftest.write_pairs(folder / "pairs")
    return folder


# ---- verdicts ------------------------------------------------------------------------------------------------------


def refused(ended: Ended, *words: str, left: Path | None = None) -> Outcome:
    """A sentence with these words and an exit status that is not 0; `left` must hold nothing afterwards."""
    if ended.crash:
        return Outcome("BUG", f"traceback: {ended.crash}")
    if ended.status == 0:
        return Outcome("BUG", f"exit status 0: {last_line(ended.text)}")
    line = line_with(ended.text, words)
    lacking = [word for word in words if word.lower() not in line.lower()]
    if lacking:
        return Outcome("POOR", f"no line says {lacking}: {line}")
    if left and left.exists() and [file for file in left.rglob("*") if file.is_file() and file.name != ".lock"]:
        return Outcome("POOR", f"{left.name} is left behind: {last_line(ended.text)}")
    return Outcome("OK", f"refused: {line}")


def used(ended: Ended, *words: str) -> Outcome:
    """Exit status 0, and these words said."""
    if ended.crash:
        return Outcome("BUG", f"traceback: {ended.crash}")
    if ended.status != 0:
        return Outcome("POOR", f"refused: {last_line(ended.text)}")
    lacking = [word for word in words if word.lower() not in ended.text.lower()]
    if lacking:
        return Outcome("POOR", f"does not say {lacking}: {last_line(ended.text)}")
    return Outcome("OK", f"used: {line_with(ended.text, words)}" if words else "used")


def worst(outcomes: dict[str, Outcome]) -> Outcome:
    """Of several cases of one row: the worst verdict with its cases, or how many are right."""
    for verdict in ("BUG", "POOR"):
        some = [f"{name}: {outcome.says}" for name, outcome in outcomes.items() if outcome.verdict == verdict]
        if some:
            return Outcome(verdict, f"{len(some)} of {len(outcomes)}: {'; '.join(some)}")
    return Outcome("OK", f"all {len(outcomes)}; one: {next(iter(outcomes.values())).says}")


def holds(condition: bool, right: str, wrong: str) -> Outcome:
    """A right result, or a wrong one."""
    return Outcome("OK", right) if condition else Outcome("BUG", wrong)


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def line_with(text: str, words: tuple[str, ...]) -> str:
    """The last of the lines that hold most of the words."""
    lines = [line for line in text.splitlines() if line.strip()] or ["nothing"]
    return max(reversed(lines), key=lambda line: sum(word.lower() in line.lower() for word in words))


def run_one(found: Fault, folder: Path, master: Path) -> Outcome:
    """Injects one fault in a fresh folder, for LIMIT seconds at most."""

    def ring(number, frame):
        raise Hung

    bench = Bench(folder, master)
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    here = os.getcwd()
    try:
        outcome = found.inject(bench)
        parts = [file for file in folder.rglob("*.part*") if "kept" not in file.name]
        if parts and outcome.verdict == "OK":
            outcome = Outcome("BUG", f"half-written {parts[0].name}: {outcome.says}")
    except (Hung, subprocess.TimeoutExpired):
        outcome = Outcome("BUG", f"no end in {LIMIT} seconds")
    except Exception as error:  # of the injection itself, or of a file that should be there
        outcome = Outcome("BUG", f"injection: {traceback.format_exception_only(error)[-1].strip()}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.chdir(here)
    shutil.rmtree(folder, ignore_errors=True)
    clean = " ".join(outcome.says.replace(f"{folder}/", "").replace(str(folder), "").split())
    return Outcome(outcome.verdict, "".join(char if char.isprintable() else "?" for char in clean))
