"""The table of faults, run again whole (slow); and that a wrong end is seen as one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import faults_bench
from tests.faults_bench import call, refused, used, worst


@pytest.mark.slow
def test_no_fault_is_a_bug():
    command = [sys.executable, "-m", "tests.faults", "--slow"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " 0 BUG" in done.stdout.splitlines()[-1]


def ends(error: BaseException | None):
    """A command that prints a word and ends so."""

    def main(argv: list[str]) -> None:
        print("said")
        if error:
            raise error

    return call(main)


@pytest.mark.parametrize(
    "error, as_refused, as_used",
    [
        (SystemExit("d.jsonl:2: a sentence"), "OK", "POOR"),
        (SystemExit("d.jsonl: a sentence"), "POOR", "POOR"),  # without the line
        (SystemExit(1), "POOR", "POOR"),
        (SystemExit(0), "BUG", "POOR"),  # used, but :2 is not said
        (None, "BUG", "POOR"),
        (KeyError("loss"), "BUG", "BUG"),
    ],
)
def test_verdicts(error, as_refused, as_used):
    assert refused(ends(error), ":2").verdict == as_refused
    assert used(ends(error), ":2").verdict == as_used


def test_what_is_left_behind_and_the_worst_of_several(tmp_path):
    (tmp_path / ".lock").touch()
    sentence = ends(SystemExit("a sentence"))
    assert refused(sentence, left=tmp_path).verdict == "OK"
    (tmp_path / "log.jsonl").touch()
    left = refused(sentence, left=tmp_path)
    assert left.verdict == "POOR"
    crash = refused(ends(KeyError("loss")))
    assert worst({"a": left, "b": crash}).says == "1 of 2: b: traceback: KeyError: 'loss'"


def test_a_half_written_file_and_a_hang_are_bugs(tmp_path, monkeypatch):
    (tmp_path / "master" / "pairs").mkdir(parents=True)
    (tmp_path / "master" / "pairs" / "pairs.json").write_text("[]")
    monkeypatch.setattr(faults_bench, "LIMIT", 1)

    def half_written(bench):
        bench.write("answers.jsonl.part", "{")
        return faults_bench.Outcome("OK", "refused")

    def hangs(bench):
        while True:
            pass

    for inject, says in ((half_written, "half-written answers.jsonl.part"), (hangs, "no end in 1 seconds")):
        found = faults_bench.Fault("1", "s", "w", inject, slow=False)
        outcome = faults_bench.run_one(found, tmp_path / "bench", tmp_path / "master")
        assert outcome.verdict == "BUG" and outcome.says.startswith(says)
