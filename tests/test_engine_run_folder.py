"""Runs that survive: resumed to the bit, damaged checkpoints passed over, and a defined end for every fault."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from engine import state
from engine.run_folder import Run, environment, lock
from external import files

PACKED = ("--pack", "--tokens-per-batch", "300")


class Killed(BaseException):
    """Stands in for kill -9: nothing of ours catches it."""


def flags(base, data, out, *more) -> list[str]:
    fixed = "--workers 0 --lora-r 4 --lora-alpha 8 --batch 2 --epochs 3 --lr 3e-3 --save-every 2".split()
    return ["--base", str(base), "--data", str(data), "--out", str(out), *fixed, *map(str, more)]


def result(out: Path) -> tuple[list, dict]:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return log, load_file(out / "adapter_model.safetensors")


def assert_equal_to_the_bit(a: Path, b: Path) -> None:
    (log_a, adapter_a), (log_b, adapter_b) = result(a), result(b)
    assert [row["step"] for row in log_b] == [row["step"] for row in log_a]  # each step once
    for x, y in zip(log_a, log_b, strict=True):
        same = {name for name in x if name not in ("pairs_per_s", "peak_gib")}
        assert {name: x[name] for name in same} == {name: y[name] for name in same}
    assert adapter_a.keys() == adapter_b.keys()
    assert all(torch.equal(adapter_a[name], adapter_b[name]) for name in adapter_a)


def killed_at(monkeypatch, step: int, before_the_log: bool):
    """Makes the run die in `step`, before or after its log and checkpoint."""
    log = Run.log

    def dies(self, at, *rest):
        if at == step and before_the_log:
            raise Killed
        log(self, at, *rest)
        if at == step:
            raise Killed

    monkeypatch.setattr(Run, "log", dies)


@pytest.fixture(autouse=True)
def same_signals_after():
    """A run that dies inside a test leaves its handlers behind, as no dead process does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole_runs(tiny_base, pairs_file, tmp_path_factory):
    """Undisturbed runs of 9 steps, by their flags: 5 pairs in batches of 2, 3 epochs."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def run(*more) -> Path:
        if more not in made:
            made[more] = folder / str(len(made))
            train.main(flags(tiny_base, pairs_file, made[more], *more))
        return made[more]

    return run


@pytest.fixture
def undisturbed(whole_runs, tmp_path):
    """A copy of an undisturbed run, so that a test may change it."""

    def copy(*more) -> Path:
        shutil.copytree(whole_runs(*more), tmp_path / "whole", ignore=shutil.ignore_patterns(".lock"))
        return tmp_path / "whole"

    return copy


@pytest.mark.parametrize("more", [(), PACKED], ids=["plain", "packed, cached reference"])
@pytest.mark.parametrize("step, before", [(0, True), (1, False), (4, True), (8, False)])
def test_a_killed_run_resumes_to_the_bit(undisturbed, tiny_base, pairs_file, tmp_path, step, before, more):
    whole, out = undisturbed(*more), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step, before)
        train.main(flags(tiny_base, pairs_file, out, *more))
    (out / ".lock").unlink()  # a killed process holds no lock; here it is our own
    train.main([*flags(tiny_base, pairs_file, out, *more), "--resume"])
    assert_equal_to_the_bit(whole, out)
    assert len(state.checkpoints(out)) == 2


def test_resumed_with_steps_split_otherwise(undisturbed, tiny_base, pairs_file, tmp_path):
    """For another GPU: the flag decides, not the room that the checkpoint had; the numbers are the same but rounded."""
    whole, out = undisturbed(), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 4, False)
        train.main(flags(tiny_base, pairs_file, out))
    (out / ".lock").unlink()
    train.main([*flags(tiny_base, pairs_file, out), "--resume", "--micro-batch", "2", "--checkpointing", "1"])
    rooms = [json.loads((folder / "state.json").read_text())["room"] for folder in state.checkpoints(out)]
    assert rooms == [{"size": 2, "checkpointed": 1}] * 2
    for expected, found in zip(result(whole)[0], result(out)[0], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    train.main([*flags(tiny_base, pairs_file, out), "--resume"])  # by the flags of the beginning again


def test_a_torn_log_line_is_dropped(undisturbed, tiny_base, pairs_file, tmp_path, monkeypatch):
    whole, out = undisturbed(), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 5, True)
        train.main(flags(tiny_base, pairs_file, out))
    (out / ".lock").unlink()
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 5, "los')
    train.main([*flags(tiny_base, pairs_file, out), "--resume"])
    assert_equal_to_the_bit(whole, out)


def test_a_log_that_lost_rows_is_said(undisturbed, tiny_base, pairs_file, tmp_path, capsys):
    out = undisturbed().rename(tmp_path / "run")  # where its settings say that it is
    train.main([*flags(tiny_base, pairs_file, out), "--resume"])
    assert "not one row for each" not in capsys.readouterr().out
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[1:]))
    train.main([*flags(tiny_base, pairs_file, out), "--resume"])
    assert "log.jsonl: note: it has not one row for each of the" in capsys.readouterr().out
    (out / "log.jsonl").unlink()  # a run that ended, and no row for its card
    train.main([*flags(tiny_base, pairs_file, out), "--resume"])
    (out / "log.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(SystemExit, match="log.jsonl:1: not UTF-8"):
        train.main([*flags(tiny_base, pairs_file, out), "--resume"])


@pytest.mark.parametrize("damage", ["torn weights", "torn json", "no json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    undisturbed, tiny_base, pairs_file, tmp_path, capsys, damage
):
    whole, out = undisturbed(), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 5, False)
        train.main(flags(tiny_base, pairs_file, out))
    (out / ".lock").unlink()
    before, newest = state.checkpoints(out)
    weights, numbers = newest / "state.safetensors", newest / "state.json"
    if damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "torn json":
        numbers.write_text(numbers.read_text()[:-20])
    else:
        numbers.unlink()
    capsys.readouterr()
    train.main([*flags(tiny_base, pairs_file, out), "--resume"])
    said = capsys.readouterr().out
    assert f"{newest}: damaged" in said and f"resumed after {int(before.name[-6:])} of 9 steps" in said
    assert_equal_to_the_bit(whole, out)


def test_a_begun_folder_and_other_settings_are_refused(undisturbed, tiny_base, pairs_file, tmp_path):
    whole = undisturbed()
    with pytest.raises(SystemExit, match="begun here. Resume it with --resume"):
        train.main(flags(tiny_base, pairs_file, whole))
    with pytest.raises(SystemExit, match="beta was 0.1, now 0.2; .*lr was 0.003, now 0.001"):
        train.main([*flags(tiny_base, pairs_file, whole), "--resume", "--beta", "0.2", "--lr", "0.001"])
    rows = json.loads(pairs_file.read_text())
    rows[0]["chosen"] = "Something else."
    other = pairs_file.parent / "edited.json"
    other.write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match="data_sha256 was"):
        train.main([*flags(tiny_base, other, whole), "--resume"])
    with pytest.raises(SystemExit, match="no run to resume"):
        train.main([*flags(tiny_base, pairs_file, tmp_path / "none"), "--resume"])
    train.main([*flags(tiny_base, pairs_file, whole), "--resume", "--save-every", "3"])  # that may differ


def test_an_older_run_moved_elsewhere_resumes(undisturbed, tiny_base, pairs_file, tmp_path):
    whole = undisturbed()
    moved = tmp_path / "moved"
    whole.rename(moved)
    train.main([*flags(tiny_base, pairs_file, moved), "--resume"])
    assert len(result(moved)[0]) == 9


def test_a_run_killed_before_its_settings_were_written_begins_anew(undisturbed, tiny_base, pairs_file, tmp_path):
    whole, out = undisturbed(), tmp_path / "run"
    out.mkdir()
    (out / ".lock").touch()
    (out / "args.json.part").write_text("{")
    train.main(flags(tiny_base, pairs_file, out))
    assert_equal_to_the_bit(whole, out)


def test_two_runs_in_one_folder(tiny_base, pairs_file, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 2, False)
        train.main(flags(tiny_base, pairs_file, out))  # its lock is still held by this process
    with pytest.raises(SystemExit, match="another process is training"):
        train.main([*flags(tiny_base, pairs_file, out), "--resume"])


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step(undisturbed, tiny_base, pairs_file, tmp_path, capsys, number, status):
    whole, out, log = undisturbed(), tmp_path / "run", Run.log
    before = signal.getsignal(signal.SIGINT)

    def asked_to_stop(self, step, *rest):
        if step == 3:
            os.kill(os.getpid(), number)
        log(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Run, "log", asked_to_stop)
        train.main(flags(tiny_base, pairs_file, out))
    assert end.value.code == status
    assert "stopped after 4 of 9 steps" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    train.main([*flags(tiny_base, pairs_file, out), "--resume"])
    assert_equal_to_the_bit(whole, out)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_ends_the_run_after_its_step(
    undisturbed, tiny_base, pairs_file, tmp_path, capsys, number, status
):
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach the workers too."""
    whole, out, log = undisturbed(), tmp_path / "run", Run.log
    before = multiprocessing.active_children()  # of other tests

    def all_asked_to_stop(self, step, *rest):
        if step == 3:
            workers = [child.pid for child in multiprocessing.active_children() if child not in before]
            assert len(workers) == 2
            for process in (*workers, os.getpid()):
                os.kill(process, number)
            time.sleep(0.5)  # a worker that dies of it has died
        log(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Run, "log", all_asked_to_stop)
        train.main(flags(tiny_base, pairs_file, out, "--workers", 2))
    assert end.value.code == status
    assert "stopped after 4 of 9 steps" in capsys.readouterr().out
    train.main([*flags(tiny_base, pairs_file, out), "--resume"])
    assert_equal_to_the_bit(whole, out)


@pytest.mark.parametrize("what", ["checkpoint", "log", "adapter"])
def test_a_full_disk_ends_the_run_with_a_sentence(undisturbed, tiny_base, pairs_file, tmp_path, what):
    whole, out = undisturbed(), tmp_path / "run"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")

    def fails(*_, **__):
        raise full

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="No space left.*--resume"):
        if what == "checkpoint":
            calls = []
            write = state.save_file
            patch.setattr(state, "save_file", lambda *a: fails() if len(calls) == 2 else calls.append(write(*a)))
        elif what == "adapter":
            patch.setattr(train, "save_adapter", fails)
        else:
            patch.setattr(files, "write_rows", fails)
        train.main(flags(tiny_base, pairs_file, out))
    assert not list(out.glob("*.part"))
    if what != "log":
        (out / ".lock").unlink(missing_ok=True)
        train.main([*flags(tiny_base, pairs_file, out), "--resume"])
        assert_equal_to_the_bit(whole, out)


def test_a_folder_that_cannot_be_written_is_found_first(tiny_base, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_base_and_data", lambda *_: pytest.fail("the base was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="is a file"):
        train.main(flags(tiny_base, pairs_file, tmp_path / "file"))
    with pytest.raises(SystemExit, match="file/run: .*file is not a writable folder"):
        train.main(flags(tiny_base, pairs_file, tmp_path / "file" / "run"))
    with pytest.raises(SystemExit, match="File name too long. Give another --out"):
        train.main(flags(tiny_base, pairs_file, tmp_path / ("a" * 300)))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(SystemExit, match="is not a writable folder"):
        train.main(flags(tiny_base, pairs_file, tmp_path / "run"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes_is_named(tiny_base, tmp_path, workers):
    for i in range(4):
        Image.new("RGB", (30, 30), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    row = {"prompt": "What is it?", "chosen": "A square.", "rejected": "A dog."}
    rows = [row | {"id": f"p{i}", "image": f"{i}.png"} for i in range(4)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    check = train.load_base_and_data

    def then_one_is_deleted(*args):
        found = check(*args)
        (tmp_path / "2.png").unlink()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_base_and_data", then_one_is_deleted)
        with pytest.raises(SystemExit, match=r"id .p2.: .*2.png: missing image; it was there") as end:
            train.main([*flags(tiny_base, tmp_path / "pairs.json", tmp_path / "run"), "--workers", str(workers)])
    assert "\n" not in str(end.value)


def test_a_killed_worker_ends_the_run_with_a_sentence(tiny_base, pairs_file, tmp_path):
    """In a process of its own: torch raises the error wherever the run is when the signal comes."""
    code = f"""
import os, signal, train
parent, get = os.getpid(), train.PairData.__getitem__

def suicide(self, key):
    if os.getpid() != parent and key[0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return get(self, key)

train.PairData.__getitem__ = suicide
train.main({flags(tiny_base, pairs_file, tmp_path / "run")!r} + ["--workers", "1"])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "A process that prepares pictures was killed" in done.stderr


@pytest.mark.slow
def test_killed_at_twenty_random_moments(undisturbed, tiny_base, pairs_file, tmp_path):
    """kill -9 of a real process at seeded random times, resumed each time: the adapter of the undisturbed run."""
    whole = undisturbed(*PACKED)
    generator = torch.Generator().manual_seed(0)
    command = [sys.executable, "train.py", *flags(tiny_base, pairs_file, tmp_path / "run", *PACKED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out, kills = tmp_path / "run", 0
    while kills < 20:
        more = ["--resume"] if (out / "args.json").exists() else []
        process = subprocess.Popen(
            [*command, *more],
            cwd=Path(train.__file__).parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        seconds = 3 + 6 * torch.rand((), generator=generator).item()
        time.sleep(seconds)
        process.kill()
        kills += 1
        process.wait()
    more = ["--resume"] if (out / "args.json").exists() else []
    done = subprocess.run([*command, *more], cwd=Path(train.__file__).parent, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert_equal_to_the_bit(whole, out)


def test_a_folder_that_cannot_be_made_ends_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="cannot be written .Not a directory.. Give another --out"):
        lock(tmp_path / "file" / "run")


@pytest.mark.parametrize("odd", ["garbage}", "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": 0}'])
def test_a_whole_line_that_is_no_row_is_named(tiny_base, pairs_file, tmp_path, odd):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 2, False)
        train.main(flags(tiny_base, pairs_file, out))
    (out / ".lock").unlink()
    log = out / "log.jsonl"
    log.write_text(f"{odd}\n{log.read_text()}")
    with pytest.raises(SystemExit, match="log.jsonl:1: "):
        train.main([*flags(tiny_base, pairs_file, out), "--resume"])


def test_a_machine_without_git_trains(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment(torch.device("cpu"))["commit"] is None


def test_only_our_own_checkpoints_are_taken_and_removed_by_age(tmp_path):
    """A user's copy never counts as the newest; the millionth step comes after the one before it."""
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-best", "checkpoint-000002.old"):
        (tmp_path / name).mkdir()
    assert [path.name for path in state.checkpoints(tmp_path)] == ["checkpoint-999999", "checkpoint-1000000"]
