"""Several processes over gloo: the numbers of one process, whatever their number; a dead rank ends the job."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from engine.distributed import World, share

ROOT = Path(train.__file__).parent
PACKED = ("--pack", "--tokens-per-batch", "300")
COMMON = "--workers 0 --lora-r 4 --lora-alpha 8 --batch 3 --epochs 2 --lr 3e-3".split()


def launch(processes: int, base, data, out, *more, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    own = ["train.py", "--base", str(base), "--data", str(data), "--out", str(out), *COMMON, *map(str, more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*command, *own], cwd=ROOT, env=environment, **pipes | popen)


def run(processes: int, base, data, out, *more) -> tuple[list[dict], dict]:
    process = launch(processes, base, data, out, *more)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return result(out)


def result(out: Path) -> tuple[list[dict], dict]:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return log, load_file(out / "adapter_model.safetensors")


def alone(base, data, out, *more) -> tuple[list[dict], dict]:
    train.main(["--base", str(base), "--data", str(data), "--out", str(out), *COMMON, *map(str, more)])
    return result(out)


def assert_same_numbers(a, b) -> None:
    assert [row["step"] for row in a[0]] == [row["step"] for row in b[0]]
    for x, y in zip(a[0], b[0], strict=True):
        for name in ("loss", "rewards/chosen", "logps/rejected", "rewards/accuracies"):
            assert abs(x[name] - y[name]) < 1e-5 * max(1, abs(x[name])), (x["step"], name, x[name], y[name])
    for name, x in a[1].items():
        assert (x - b[1][name]).abs().max() < 1e-5, name


def test_shares_are_balanced_by_tokens_and_lose_nothing():
    # longest first to whoever has least, the first of equals: 900 | 500, | 500 400, 900 100 |, | 500 400 50
    lengths = [100, 900, 50, 500, 400]
    assert share(lengths, World(0, 2)) == [0, 1] and share(lengths, World(1, 2)) == [2, 3, 4]
    assert sorted(i for rank in range(3) for i in share(lengths, World(rank, 3))) == [0, 1, 2, 3, 4]
    assert share([7], World(1, 2)) == []  # a rank may have none


def test_two_processes_give_the_numbers_of_one(tiny_base, pairs_file, tmp_path):
    """5 pairs in batches of 3 and 2: uneven shares; packed, with the cached reference."""
    two = run(2, tiny_base, pairs_file, tmp_path / "two", *PACKED)
    assert_same_numbers(alone(tiny_base, pairs_file, tmp_path / "one", *PACKED), two)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [(), ("--shard",)], ids=["replicated", "sharded"])
@pytest.mark.parametrize("more", [(), PACKED, (*PACKED, "--reference", "live")], ids=["plain", "cached", "live"])
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes(tiny_base, pairs_file, tmp_path, processes, more, sharded):
    """With 4 processes and batches of 3 and 2 some ranks have no example at all."""
    several = run(processes, tiny_base, pairs_file, tmp_path / "several", *more, *sharded)
    assert_same_numbers(alone(tiny_base, pairs_file, tmp_path / "one", *more), several)


@pytest.mark.slow
@pytest.mark.parametrize("then", [4, 1])
def test_stopped_at_two_and_resumed_at_another_number(tiny_base, pairs_file, tmp_path, then):
    out = tmp_path / "run"
    process = launch(2, tiny_base, pairs_file, out, *PACKED, "--save-every", 1, "--epochs", 20)
    while len(list(out.glob("checkpoint-*[0-9]"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate()
    resumed = run(then, tiny_base, pairs_file, out, *PACKED, "--save-every", 1, "--epochs", 20, "--resume")
    assert_same_numbers(alone(tiny_base, pairs_file, tmp_path / "one", *PACKED, "--epochs", 20), resumed)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(tiny_base, pairs_file, tmp_path):
    out = tmp_path / "run"
    process = launch(2, tiny_base, pairs_file, out, "--epochs", 1000, start_new_session=True)
    while not (out / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), 9)
    start = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert "Signal 9" in said or "SIGKILL" in said


def test_without_torchrun_no_collective_runs(monkeypatch):
    for name in ("all_reduce", "all_gather_object", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: pytest.fail("a collective ran"))
    world = World()
    world.add_up([torch.nn.Parameter(torch.ones(2))], None)
    world.end_epoch(torch.nn.Linear(2, 2), None)
    world.wait()
    assert world.gather(3) == [3] and world.main


def test_ranks_that_were_given_different_things_all_end(monkeypatch):
    """Machines are started by hand, each with its own files: the same data and settings on all, or none trains."""
    given = [{"lr": 1e-5, "data_sha256": "a", "seed": 0}, {"lr": 1e-5, "data_sha256": "b", "seed": 1}]
    monkeypatch.setattr(World, "gather", lambda self, value: given)
    for rank in range(2):
        with pytest.raises(SystemExit, match="the processes differ in data_sha256, seed: give all the same"):
            World(rank, 2).agree_on(given[rank])
    given[1] = given[0]
    World(0, 2).agree_on(given[0])
