"""The certificate of a run, the claims that it refuses, and the whole speedrun in the toy world."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bench import certificate, gpu_check
from tests.test_train import run

ROOT = Path(__file__).parent.parent


def issue(tiny_base, pairs_file, folder, out) -> dict:
    certificate.main(["--run", str(folder), "--base", str(tiny_base), "--data", str(pairs_file), "--out", str(out)])
    return json.loads(out.read_text())


def test_a_run_and_two_that_were_touched(tiny_base, pairs_file, tmp_path, monkeypatch):
    run(tiny_base, pairs_file, tmp_path / "run", "--max-steps", 2)
    found = issue(tiny_base, pairs_file, tmp_path / "run", tmp_path / "certificate.json")
    assert found["first_loss"]["expected"] == pytest.approx(2.0794, abs=1e-4) and found["first_loss"]["holds"]
    assert found["equal_at_zero"]["holds"] and len(found["equal_at_zero"]["policy_and_reference"]) == 3
    assert found["adapter_reloads"] | {"sha256": ""} == {"tensors": 28, "sha256": "", "holds": True}
    assert found["settings"]["recipe"] == "mdpo" and len(found["scorers"]["eval_chair.py"]) == 64

    shutil.copytree(tmp_path / "run", tmp_path / "other-loss")
    log = tmp_path / "other-loss" / "log.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(json.loads(first) | {"loss": 2.09}), *rest]))
    with pytest.raises(SystemExit, match="first_loss does not hold"):
        issue(tiny_base, pairs_file, tmp_path / "other-loss", tmp_path / "b.json")

    shutil.copytree(tmp_path / "run", tmp_path / "halved")
    file = tmp_path / "halved" / certificate.ADAPTER
    save_file({name: tensor.double() / 3 for name, tensor in load_file(file).items()}, file)  # not float32's numbers
    with pytest.raises(SystemExit, match="adapter_reloads does not hold"):
        issue(tiny_base, pairs_file, tmp_path / "halved", tmp_path / "c.json")


SMALL_PYTHON = """#!{python}
import runpy, sys
import pytest
sys.path.insert(0, {root!r})
from tests.toy_world import shrink
shrink(pytest.MonkeyPatch())
kind, *rest = sys.argv[1:]
if kind == "-c":
    sys.argv = ["-c", *rest[1:]]
    exec(rest[0])
elif kind == "-m":
    sys.argv = rest
    runpy.run_module(rest[0], run_name="__main__")
else:
    sys.argv = [kind, *rest]
    runpy.run_path(kind, run_name="__main__")
"""


@pytest.mark.slow  # seven processes one after the other
def test_the_speedrun_in_a_small_toy_world(tmp_path):
    """Every step of the script; the world is made at sizes at which nothing is learned."""
    python = tmp_path / "python"
    python.write_text(SMALL_PYTHON.format(python=sys.executable, root=str(ROOT)))
    python.chmod(0o755)
    out = tmp_path / "out"
    settings = dict(BASE="toy", OUT=str(out), PYTHON=str(python), TRAIN="--workers 0 --max-steps 1")
    command = ["bash", "scripts/speedrun.sh"]
    for _ in range(2):  # the second time it only goes on
        done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = [line.split()[0] for line in (out / "wall-clock.txt").read_text().splitlines()]
    assert parts[:6] == ["download", "check", "train", "answer", "report", "certificate"]
    assert "train" not in parts[6:]
    found = json.loads((out / "certificate.json").read_text())
    assert found["first_loss"]["holds"] and found["equal_at_zero"]["holds"] and found["adapter_reloads"]["holds"]
    assert (out / "run" / "table.json").exists() and (out / "curves.svg").exists()
    assert len((out / "answers.jsonl").read_text().splitlines()) == 4  # the held-out pairs


def test_the_speedrun_names_missing_benchmarks_before_it_downloads_or_trains(tmp_path):
    settings = dict(OUT=str(tmp_path / "out"), BENCHMARKS=str(tmp_path / "none"), PYTHON=sys.executable, JUDGE="")
    command = ["bash", "scripts/speedrun.sh"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 1
    assert "objhal/synonyms_refine.txt" in done.stderr and "Nothing was started" in done.stderr
    assert "mmhal" not in done.stderr  # no judge: that part is left out
    assert not (tmp_path / "out" / "wall-clock.txt").exists()


def test_the_speedrun_without_its_python_and_with_an_odd_folder(tmp_path):
    settings = dict(BASE="toy", OUT=str(tmp_path / "it's"), PYTHON=str(tmp_path / "none"))
    command = ["bash", "scripts/speedrun.sh"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 1 and "PYTHON=... names one" in done.stderr and not (tmp_path / "it's").exists()
    settings["PYTHON"] = "echo"  # says what it would run: the folder is no part of the code
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("-c ")]
    assert line.endswith(f"make_world(pathlib.Path(sys.argv[1]), seed=0) {tmp_path}/it's/toy-world-0")


@pytest.mark.parametrize("script", ["speedrun.sh", "h200.sh"])
def test_scripts_are_whole(script):
    """Their syntax; that each command of ours in them exists is seen by running them."""
    text = (ROOT / "scripts" / script).read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)]).returncode == 0
    assert "has not been made" in text or "No call has run" in text
    for module in set(word for line in text.splitlines() for word in line.split() if word.startswith("bench.")):
        assert (ROOT / (module.strip('"').replace(".", "/") + ".py")).exists(), module


def test_the_gpu_calls_try_every_row_and_leave_six_files(tmp_path):
    """With a Python that fails at everything, and with a time-out: `correct` hangs."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "PASS $*"\n[[ "$*" = *correct ]] && sleep 60\nexit 3\n')
    python.chmod(0o755)
    script = tmp_path / "scripts" / "h200.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "scripts" / "h200.sh").read_text().replace("check-correct 210", "check-correct 1"))
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(script), "all", str(python), str(python), str(out)],
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    logs = [f"call-{n}.log" for n in (1, 2, 3)]
    assert sorted(p.name for p in out.iterdir()) == [*logs, "machine.txt", "status.txt", "verdicts.txt"]
    first, *others = (out / "status.txt").read_text().splitlines()
    assert first == "check-correct: exit status 124"
    assert len(others) == 24 and all(line.endswith("exit status 3") for line in others)
    printed = "".join((out / log).read_text() for log in logs)
    for section in gpu_check.SECTIONS:
        assert f"PASS -m bench.gpu_check {section}\n" in printed
