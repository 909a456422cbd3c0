"""Flags that are out of range are refused with the range; those inside are taken."""

import argparse
import math
import re
import sys
from pathlib import Path

import pytest

import train
from external import flags

PAGE = (Path(__file__).parent.parent / "docs" / "flags.md").read_text()


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (flags.whole(1), "3", 3),
        (flags.whole(-5), "-5", -5),
        (flags.number(0.0), "0", 0.0),
        (flags.number(0.0, above=True), "1e-5", 1e-5),
        (flags.number(0.0, 1.0), "1", 1.0),
        (flags.names_of(("dpo", "copo")), "copo,dpo", ("copo", "dpo")),
    ],
)
def test_taken(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    "kind, text, said",
    [
        (flags.whole(1), "0", "a whole number of at least 1"),
        (flags.whole(1), "1.5", "a whole number"),
        (flags.whole(1, 4), "5", "from 1 to 4"),
        (flags.number(0.0), "-1", "a number of at least 0"),
        (flags.number(0.0), "nan", "a number of at least 0"),
        (flags.number(0.0), "inf", "a number of at least 0"),
        (flags.number(0.0, above=True), "0", "a number above 0"),
        (flags.number(0.0, 1.0), "1.1", "from 0 to 1"),
        (flags.number(0.0, 1.0, above=True), "1.1", "a number above 0, at most 1"),
        (flags.number(-math.inf), "nan", "a number that is finite"),
        (flags.number(-math.inf), "-inf", "a number that is finite"),
        (flags.names_of(("dpo", "copo")), "dpo,kto", "unknown kto; choose from dpo, copo"),
    ],
)
def test_refused(kind, text, said):
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        kind(text)


# ---- other trainers' names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--per_device_train_batch_size", "4"],
            "--per_device_train_batch_size: here --batch and --micro-batch (docs/flags.md)",
        ),
        (["--learning-rate", "1e-5"], "--learning-rate: here --lr (docs/flags.md)"),
        (["--base", "toy", "--learning_rate=1e-5"], "--learning_rate: here --lr (docs/flags.md)"),
        (["--base", "toy", "--lora_rank", "8"], "--lora_rank: here --lora-r (docs/flags.md)"),
    ],
)
def test_another_trainers_flag_is_answered_with_ours(words, said, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        train.parse_args(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit):
        train.parse_args()
    assert said in capsys.readouterr().err


def test_what_they_are_called_here_exists_and_is_on_the_page(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    ours = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `") or line.startswith("| |")]
    assert len(rows) > 20
    for foreign, here in flags.FOREIGN.items():
        named = set(re.findall(r"--[\w-]+", here))
        assert named <= ours, foreign
        name = f"`{foreign.removeprefix('--')}`"
        assert any(name in "".join(row[1:3]) and named <= set(re.findall(r"--[\w-]+", row[3])) for row in rows), foreign
    on_the_page = {flag for row in rows for flag in re.findall(r"--[\w-]+", row[3])}
    assert on_the_page <= ours


def test_every_flag_of_train_is_on_the_page_and_defaults_are_written_as_they_are_taken(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    ours = {flag.replace("--no-", "--") for flag in re.findall(r"--[a-z][\w-]+", said)} - {"--help"}
    on_the_page = {flag.replace("--no-", "--") for flag in re.findall(r"--[a-z][\w-]+", PAGE)}
    assert ours - on_the_page == set()
    assert "which of dpo,copo,ancpo (default: dpo,copo,ancpo)" in said
