"""Faults of runs that are resumed, and of processes: checkpoints and logs torn, workers and commands killed."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

from safetensors.torch import load_file

from engine import state
from formats import check
from tests.faults_bench import ROOT, Bench, Outcome, call, fault, holds, last_line, refused, shell, used, worst

RESUMED, PROCESSES = "Resumed runs", "Processes"
STEPS = ("--max-steps", 6, "--save-every", 2)


class Died(BaseException):
    """Stands in for kill -9: nothing of ours catches it."""


def died(bench: Bench, step: int = 4) -> None:
    """A run that is dead after `step`; nothing of it is tidied up."""
    from engine.run_folder import Run

    log = Run.log

    def dies(self, at, *rest):
        log(self, at, *rest)
        if at == step:
            raise Died

    try:
        with mock.patch.object(Run, "log", dies):
            bench.train(*STEPS)
    except Died:
        (bench.out / ".lock").unlink()  # a dead process holds no lock; here it is our own


def undisturbed(bench: Bench) -> dict:
    out, bench.out = bench.out, bench.folder / "undisturbed"
    assert bench.train(*STEPS).status == 0
    adapter = load_file(bench.out / "adapter_model.safetensors")
    bench.out = out
    return adapter


def resumed(bench: Bench, expected: dict, *words: str) -> Outcome:
    """Resumed with these words, and to the same adapter."""
    outcome = used(bench.train(*STEPS, "--resume"), *words)
    if outcome.verdict != "OK":
        return outcome
    found = load_file(bench.out / "adapter_model.safetensors")
    same = all((found[name] == tensor).all() for name, tensor in expected.items())
    return outcome if same else Outcome("BUG", "another adapter than the undisturbed run's")


@fault("2", RESUMED, "death after step 4 of 6, then --resume: the undisturbed run's adapter")
def death(bench: Bench) -> Outcome:
    expected = undisturbed(bench)
    died(bench)
    return resumed(bench, expected, "resumed after 4 of 6 steps")


@fault("2b", RESUMED, "the newest checkpoint torn; a last line of log.jsonl torn")
def torn_checkpoint(bench: Bench) -> Outcome:
    expected = undisturbed(bench)
    died(bench)
    newest = state.checkpoints(bench.out)[-1]
    file = max(newest.rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    with open(bench.out / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    return resumed(bench, expected, "the one before it is taken", newest.name)


@fault("2c", RESUMED, "args.json cut, a list; log.jsonl with a line of something else")
def torn_records(bench: Bench) -> Outcome:
    died(bench)
    args, log = bench.out / "args.json", bench.out / "log.jsonl"
    text, outcomes = args.read_text(), {}
    for odd in ("{", "[]", ""):
        args.write_text(odd)
        outcomes[f"args {odd!r}"] = refused(bench.train(*STEPS, "--resume"), "args.json")
    args.write_text(text)
    whole = log.read_text()
    for odd in ("garbage}\n", "[1]\n", '{"loss": 1}\n'):
        log.write_text(odd + whole)
        outcomes[f"log {odd!r}"] = refused(bench.train(*STEPS, "--resume"), "log.jsonl")
    return worst(outcomes)


@fault("2d", RESUMED, "--resume with another beta, edited data, another base, into an empty folder")
def other_settings(bench: Bench) -> Outcome:
    nothing = refused(bench.train(*STEPS, "--resume"), "no run to resume")
    died(bench)
    beta = refused(bench.train(*STEPS, "--resume", "--beta", 0.2), "beta")
    data = refused(bench.train(*STEPS, "--resume", data=bench.with_row(chosen="Other.")), "data")
    bench.with_row(chosen=json.loads((bench.folder / "pairs" / "pairs.json").read_text())[1]["chosen"])
    tensors = (bench.base / "model.safetensors").read_bytes()
    (bench.base / "model.safetensors").write_bytes(tensors[:-4] + b"\x00\x00\x00\x3f")
    base = refused(bench.train(*STEPS, "--resume"), "base")
    return worst({"nothing": nothing, "beta": beta, "data": data, "base": base})


# ---- processes -----------------------------------------------------------------------------------------------------


def start(bench: Bench, module: str, *flags) -> subprocess.Popen:
    words = [sys.executable, *module.split(), *map(str, flags)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_flags(bench: Bench, *more) -> list:
    fixed = "--lora-r 4 --lora-alpha 8 --batch 2".split()
    return ["--base", bench.base, "--data", bench.data(), "--out", bench.out, *fixed, *more]


def first_step(bench: Bench) -> None:
    """Waits until the run has logged."""
    while not (bench.out / "log.jsonl").is_file() or not (bench.out / "log.jsonl").read_bytes():
        time.sleep(0.1)


@fault("2e", PROCESSES, "kill -9 while train.py runs: no half-written file, --resume goes on", slow=True)
def killed(bench: Bench) -> Outcome:
    process = start(bench, "train.py", *train_flags(bench, "--workers", 0, "--max-steps", 4000, "--save-every", 1))
    first_step(bench)
    time.sleep(1)
    process.kill()
    process.communicate()
    done = int(max(row["step"] for row in bench.log()[:-1]))
    (bench.out / "args.json").write_text((bench.out / "args.json").read_text())
    ended = bench.train("--max-steps", 4000, "--save-every", 1, "--resume", "--beta", 0.2)
    return holds(done > 0 and "beta" in ended.text and not ended.crash, last_line(ended.text), str(ended))


@fault("4", PROCESSES, "Ctrl-C in mid-run", slow=True)
def interrupted(bench: Bench) -> Outcome:
    process = start(bench, "train.py", *train_flags(bench, "--workers", 0, "--max-steps", 4000))
    first_step(bench)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    right = process.returncode == 130 and "--resume" in text and "Traceback" not in text
    return holds(right, f"exit status 130, {last_line(text)}", f"exit status {process.returncode}: {last_line(text)}")


@fault("32", PROCESSES, "a worker that prepares pictures is killed", slow=True)
def worker_killed(bench: Bench) -> Outcome:
    process = start(bench, "train.py", *train_flags(bench, "--workers", 2, "--max-steps", 4000))
    first_step(bench)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    right = process.returncode not in (0, None) and "Traceback" not in text and "worker" in text
    return holds(right, last_line(text), f"exit status {process.returncode}: {last_line(text)}")


@fault("21", PROCESSES, "kill -9 while evals.answers runs, then the same command", slow=True)
def answers_killed(bench: Bench) -> Outcome:
    rows = [{"id": i, "image": f"{i % 5}.png", "prompt": "What is it?"} for i in range(400)]
    questions = bench.data(rows, "q.jsonl")
    flags = ("--base", bench.base, "--questions", questions, "--out", bench.answers, "--max-new-tokens", 4)
    process = start(bench, "-m evals.answers", *flags, "--batch", 2)
    while not bench.answers.is_file() or not bench.answers.read_bytes():
        time.sleep(0.05)
    process.kill()
    process.communicate()
    part = len(bench.answers.read_bytes().splitlines())
    ended = used(bench.ask("--batch", 2, rows=rows), "400 answers")
    found = bench.answers.read_bytes()
    bench.answers.unlink()
    bench.ask("--batch", 2, rows=rows)
    return ended if part < 400 and found == bench.answers.read_bytes() else Outcome("BUG", "another file")


@fault("19", PROCESSES, "two evals.answers with one --out at once", slow=True)
def answers_twice(bench: Bench) -> Outcome:
    questions = bench.data([{"id": i, "image": f"{i % 5}.png", "prompt": "What is it?"} for i in range(40)], "q.jsonl")
    flags = ("--base", bench.base, "--questions", questions, "--out", bench.answers, "--max-new-tokens", 4)
    both = [start(bench, "-m evals.answers", *flags) for _ in range(2)]
    texts = [process.communicate(timeout=80)[0] for process in both]
    rows = [json.loads(line) for line in bench.answers.read_text().splitlines()]
    whole = sorted(row["id"] for row in rows) == list(range(40)) and not any("Traceback" in text for text in texts)
    ends = [process.returncode for process in both]
    return holds(whole and 0 in ends, f"exit status {ends}, 40 answers, each once", f"{ends}: {last_line(texts[0])}")


@fault("39", PROCESSES, "two exports with one --out at once", slow=True)
def exports_twice(bench: Bench) -> Outcome:
    out = bench.folder / "merged"
    both = [start(bench, "-m bases.export", "--base", bench.base, "--out", out) for _ in range(2)]
    texts = [process.communicate(timeout=80)[0] for process in both]
    ends = sorted(process.returncode for process in both)
    whole = (out / "model.safetensors").is_file() and not any("Traceback" in text for text in texts)
    said = "; ".join(last_line(text) for text in texts)
    return holds(whole and ends[0] == 0, f"exit status {ends}: {said}", f"exit status {ends}: {said}")


@fault("71", PROCESSES, "200,000 rows: read and counted, with a line of progress a minute", slow=True)
def many_rows(bench: Bench) -> Outcome:
    rows = "".join(json.dumps(bench.pairs[i % 5] | {"id": f"r{i}"}) + "\n" for i in range(200_000))
    return used(call(check.main, bench.write("many.jsonl", rows), "--recipe", "dpo-no-image"), "200,000 rows")


@fault("35", PROCESSES, "--workers 8 in 64 KB of shared memory", slow=True)
def little_shared_memory(bench: Bench) -> Outcome:
    flags = " ".join(map(str, train_flags(bench, "--workers", 8, "--max-steps", 3)))
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    ended = shell(f"unshare -m bash -c '{mount} && python train.py {flags}'")
    if "unshare" in ended.text or "mount:" in ended.text:
        return Outcome("OK", "not injected: a mount namespace of its own needs root")
    return used(ended) if ended.status == 0 else refused(ended, "--workers")
