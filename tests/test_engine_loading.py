"""Worker processes: the same examples, never more of them than shared memory holds, and a picture that has gone."""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bases.checkpoint import read_config
from bases.tokenizer import load_processor
from data import PairData
from engine import batches, loading
from engine.batches import epoch_keys, workers_watched
from engine.distributed import World
from engine.loading import example_bytes, example_loader, fit_shared_memory, free_shared_memory
from formats.readers import read_pairs

ROOT = Path(__file__).parent.parent
ROOMY = 10**12


@pytest.mark.parametrize(
    "free, workers, ahead, expected",
    [
        (ROOMY, 8, 8, (8, 8)),
        (float("inf"), 8, 8, (8, 8)),
        (1000 * 103, 8, 8, (8, 8)),  # 0.7 x 103,000 / 1,000 = 72 examples: 8 x (8 ahead + 1 in work)
        (1000 * 102, 8, 8, (8, 7)),  # 71: 7 ahead each
        (1000 * 30, 8, 8, (8, 1)),  # 21: 8 x (1 + 1), and 2 x 8 more would be too many
        (1000 * 10, 8, 8, (3, 1)),  # 7: three workers with two each
        (1000 * 2, 8, 8, (0, 0)),  # 1: none
        (0, 0, 8, (0, 8)),  # no workers asked for
    ],
)
def test_no_more_under_way_than_there_is_room_for(free, workers, ahead, expected, capsys):
    assert fit_shared_memory(1000, workers, ahead, free) == expected
    out = capsys.readouterr().out
    assert ("/dev/shm" in out) == (expected not in [(8, 8), (0, 8)])
    fewer, less = expected
    assert fewer * (less + 1) * 1000 <= max(0.7 * free, 0)


@pytest.fixture
def data(tiny_base, pairs_file, tmp_path) -> PairData:
    shutil.copytree(pairs_file.parent, tmp_path / "pairs")
    pairs, _ = read_pairs(tmp_path / "pairs" / pairs_file.name)
    return PairData(pairs, load_processor(tiny_base, read_config(tiny_base)), "crop")


@pytest.mark.parametrize("strategy, bytes_of_m_l", [("crop", 1), ("crop-released", 4), (None, 0)])
def test_bytes_of_an_example(data, strategy, bytes_of_m_l):
    data.strategy = strategy
    example = data[0, 0]
    tensors = [example.image, example.image_rejected, example.prompt, example.chosen, example.rejected]
    real = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    # 3 x 28 x 28 levels of one byte; a bilinear crop of them is float32
    assert example_bytes(data) == 2352 * (1 + bytes_of_m_l) + 100_000 >= real
    # two pictures of 336 px: 0.68 MB where float32 took 2.7 MB
    data.processor.template.image.__dict__["size"] = 336
    assert example_bytes(data) == 338_688 * (1 + bytes_of_m_l) + 100_000


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_has_gone_is_named(data, workers, tmp_path):
    before = multiprocessing.active_children()  # of other tests
    (tmp_path / "pairs/3.png").unlink()
    with pytest.raises(SystemExit) as e:  # from a worker too, without its traceback
        list(example_loader(data, epoch_keys(5, 1, seed=0), workers))
    place = f"{tmp_path}/pairs/pairs.json:4: id 'p3': {tmp_path.resolve()}/pairs/3.png"
    assert str(e.value) == f"{place}: missing image; it was there when the run began"
    assert set(multiprocessing.active_children()) <= set(before)  # nothing waits for the workers later


def test_every_epoch_has_its_own_order():
    """numpy's permutation by (seed, epoch), whatever the number of epochs."""
    keys = epoch_keys(6, 2, seed=3)
    for epoch in (0, 1):
        order = np.random.default_rng((3, epoch)).permutation(6)
        assert keys[6 * epoch : 6 * epoch + 6] == [(epoch, index) for index in order]
    assert [index for _, index in keys[:6]] != [index for _, index in keys[6:]]
    assert epoch_keys(6, 1, seed=3) == keys[:6] != epoch_keys(6, 1, seed=4)


def test_a_worker_ignores_the_signals_that_end_the_run(data):
    before = multiprocessing.active_children()  # of other tests
    examples = example_loader(data, epoch_keys(5, 1000, seed=0), workers=1)
    next(examples)
    [worker] = [child for child in multiprocessing.active_children() if child not in before]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # a scheduler's, a terminal's
        os.kill(worker.pid, number)
    for _ in range(100):
        next(examples)
    assert worker.is_alive()
    examples.close()  # as at the end of a run
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process ignores")
def test_whichever_thread_of_a_worker_hears_it(data):
    """A mask holds for one thread: the system may choose another, and did."""
    before = multiprocessing.active_children()
    examples = example_loader(data, epoch_keys(5, 1, seed=0), workers=1)
    next(examples)
    [worker] = [child for child in multiprocessing.active_children() if child not in before]
    status = dict(line.split(":\t") for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
    ignored = int(status["SigIgn"], 16)  # bit n - 1 is signal n
    assert ignored >> signal.SIGTERM - 1 & 1 and ignored >> signal.SIGINT - 1 & 1


def test_the_workers_of_a_run_that_dies_do_not_keep_it():
    code = """
from types import SimpleNamespace
from engine.loading import example_loader

class Data:
    processor = SimpleNamespace(template=SimpleNamespace(image=SimpleNamespace(size=8)))
    with_image, strategy = False, None

    def __getitem__(self, key):
        return key

examples = example_loader(Data(), [(0, row) for row in range(100)], workers=2)
next(examples)
raise KeyError("a fault of the run")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "KeyError: 'a fault of the run'"


def test_a_worker_is_silent_where_the_run_has_died(capsys):
    loading.say_but_cut_connections(ConnectionResetError, ConnectionResetError(104, "reset"), None)
    assert capsys.readouterr().err == ""
    loading.say_but_cut_connections(KeyError, KeyError("pixels"), None)
    assert "KeyError: 'pixels'" in capsys.readouterr().err


def test_processes_share_what_is_free(monkeypatch):
    free = free_shared_memory()
    for told, processes in (("4", 4), ("0", 1), ("x", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
        assert free_shared_memory() == pytest.approx(free / processes, rel=0.5)  # others use the folder meanwhile


def test_workers_hand_over_levels_of_one_byte(data):
    for example in example_loader(data, epoch_keys(5, 1, seed=0), workers=1):
        assert example.image.dtype == example.image_rejected.dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_eight_workers_in_64_mb_of_shared_memory(tmp_path):
    """Docker's default, at 336 px: with float32 pictures, 8 ahead, three workers waited for ever."""
    script = (
        "import torch, numpy as np\n"
        "from PIL import Image\n"
        "from data import Pair, PairData, Processor\n"
        "from engine.batches import epoch_keys, workers_watched\n"
        "from engine.loading import example_loader\n"
        "from model import Config\n"
        "import test_data\n"
        "from dataclasses import replace\n"
        "pairs = [test_data.pair(row, image=test_data.png(row, (500, 400))) for row in range(1, 200)]\n"
        "data = PairData(pairs, Processor(test_data.letter_tokenizer(), replace(Config(), image_id=99)), 'crop')\n"
        "print(sum(e.image.shape == (3, 336, 336) for e in example_loader(data, epoch_keys(199, 1, 0), 8, 32)))\n"
    )
    mount = 'mount -t tmpfs -o size=64m shm /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", mount, sys.executable, script]
    if subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("no mount namespaces here")
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)
    assert run.stdout.splitlines()[-1:] == ["199"], run.stdout + run.stderr


@pytest.mark.parametrize(
    "workers, batch, each",
    [
        (2, 32, 16),  # 8 each left half a step to be prepared while the GPU waited
        (4, 32, 8),
        (3, 32, 11),  # 3 x 11 = 33
        (2, 4, 8),
    ],
)
def test_a_whole_step_is_prepared_ahead(data, workers, batch, each, monkeypatch):
    asked = {}
    monkeypatch.setattr(loading, "DataLoader", lambda _, **flags: asked.update(flags) or [])
    monkeypatch.setattr(loading, "free_shared_memory", lambda: ROOMY)
    assert list(example_loader(data, [], workers, batch)) == []
    assert asked["prefetch_factor"] == each and workers * each >= batch


class ClosedPipe(io.StringIO):
    """Standard output whose reader has gone."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def fileno(self):
        return self.file.fileno()


def test_a_reader_that_has_gone_is_not_taken_for_a_killed_worker(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as file:
        monkeypatch.setattr("sys.stdout", ClosedPipe(file))
        with pytest.raises(SystemExit, match="Nobody reads the output"), workers_watched():
            print("a line")


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(24, "Too many open files"), "ulimit -n 4096"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n 4096"),
        (ConnectionResetError(104, "Connection reset by peer"), "prepares pictures was killed"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "prepares pictures was killed"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "Not enough memory on this machine"),
        (PermissionError(13, "Permission denied", "base/config.json"), "base/config.json: Permission denied"),
        (OSError(28, "No space left on device", "run/log.jsonl"), "run/log.jsonl: No space left on device"),
    ],
)
def test_what_ends_the_workers_ends_in_a_sentence(error, said):
    with pytest.raises(SystemExit, match=said), workers_watched():
        raise error


@pytest.mark.parametrize("error", [OSError(2, "No such file"), RuntimeError("shape mismatch")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)), workers_watched():
        raise error


def test_ctrl_c_outside_the_loop_ends_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as end, workers_watched():
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == "Interrupted. What was saved before is whole.\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_an_output_without_room_ends_in_a_sentence():
    code = "from engine.batches import workers_watched\nwith workers_watched():\n    print('a line', flush=True)\n"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "standard output: No space left on device.\n")


class FivePairs(list):
    seed = 0


def test_only_as_many_epochs_are_drawn_as_the_steps_need(monkeypatch):
    """Five pairs in batches of two are three steps an epoch: the fourth step needs a second epoch, and no third."""
    asked = []

    def keys(n, epochs, seed):
        asked.append(epochs)
        return epoch_keys(n, epochs, seed)

    monkeypatch.setattr(batches, "epoch_keys", keys)
    plan = batches.plan_steps(FivePairs(range(5)), batch=2, steps=4, world=World())
    assert asked == [2] and [size for _, size in plan] == [2, 2, 1, 2]
