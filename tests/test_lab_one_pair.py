"""One pair's numbers are those that training logs for it, and the printed formulas are true."""

import argparse
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

import train
from lab import one_pair
from losses import Rewards


@pytest.fixture(scope="module")
def run(tiny_base, pairs_file, tmp_path_factory):
    """Two epochs of one pair a step, with a learning rate that moves the numbers; its folder."""
    out = tmp_path_factory.mktemp("one-pair") / "run"
    train.main(
        ["--base", str(tiny_base), "--data", str(pairs_file), "--out", str(out), "--workers", "0", "--seed", "3"]
        + ["--batch", "1", "--epochs", "2", "--lr", "3e-3", "--lora-r", "4", "--lora-alpha", "8", "--delta", "0.05"]
    )
    return out


def opened(*flags) -> one_pair.Opened:
    return one_pair.open_pairs(one_pair.pair_parser("").parse_args(list(map(str, flags))))


def test_numbers_equal_the_log_of_a_run_with_one_pair_a_step(run):
    """A step logs what it sees before it changes the weights: step 5, the first of epoch 1, is seen with epoch-1."""
    row = json.loads((run / "log.jsonl").read_text().splitlines()[5])
    assert row["epoch"] == 1 and abs(row["rewards/margins"]) > 0.05  # five updates did something
    first = (
        np.random.default_rng((3, 1)).permutation(5)[0] + 1
    )  # engine.batches.epoch_keys: seed 3, epoch 1; rows from 1
    found = opened("--adapter", run / "epoch-1", "--epoch", 1, "--row", first)
    numbers = one_pair.pair_numbers(found.model, found.data[found.keys[0]], found.settings)
    logged = {
        "logps/chosen": numbers.chosen.policy.sum(),
        "logps/rejected": numbers.rejected.policy.sum(),
        "logps/image_rejected": numbers.image_rejected.policy.sum(),
        "rewards/chosen": numbers.chosen.reward,
        "rewards/rejected": numbers.rejected.reward,
        "rewards/image_rejected": numbers.image_rejected.reward,
        "losses/dpo": numbers.terms[0].value,
        "losses/copo": numbers.terms[1].value,
        "losses/ancpo": numbers.terms[2].value,
        "loss": numbers.loss,
    }
    assert {key: float(value) for key, value in logged.items()} == pytest.approx({k: row[k] for k in logged}, abs=1e-4)


def test_before_training_every_term_is_ln_2(tiny_base, pairs_file):
    found = opened("--base", tiny_base, "--data", pairs_file, "--row", 2)
    numbers = one_pair.pair_numbers(found.model, found.data[found.keys[0]], found.settings)
    assert [term.value for term in numbers.terms] == pytest.approx([0.693147] * 3, abs=1e-6)
    assert [triple.reward for triple in numbers.triples] == [0, 0, 0]


def test_a_base_by_name_is_the_one_its_adapter_names(tiny_base, pairs_file, tmp_path, monkeypatch, capsys):
    """The adapter says llava-hf/llava-1.5-7b-hf, the folder is called otherwise: no note of another base."""
    (tmp_path / "llava-1.5-7b").symlink_to(tiny_base)
    monkeypatch.setenv("NANOMDPO_WEIGHTS", str(tmp_path))
    own = ["--base", "llava-1.5-7b", "--data", str(pairs_file)]
    out = tmp_path / "run"
    train.main([*own, "--out", str(out), "--workers", "0", "--max-steps", "1", "--lora-r", "2"])
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llava-hf/llava-1.5-7b-hf"
    opened("--adapter", out, "--row", 1)
    assert "an adapter of" not in capsys.readouterr().out


def test_terms_of_the_worked_example_with_every_anchor():
    """Rewards 0.2, -0.1, 0.1 as in losses.py, delta 0.05; -log sigma(x) = log(1 + e^-x)."""
    r = Rewards(torch.tensor([0.2]), torch.tensor([-0.1]), torch.tensor([0.1]))
    every = argparse.Namespace(terms=("dpo", "copo", "ancpo"), anchors=("w", "l", "m_l"), delta=0.05)
    terms = {term.name: term for term in one_pair.loss_terms(r, every)}
    assert {name: round(term.value, 4) for name, term in terms.items()} == {
        "L_DPO": 0.5544,  # x = 0.2 + 0.1
        "L_CoPO": 0.6444,  # x = 0.2 - 0.1
        "L_AncPO": 0.6210,  # x = 0.2 - 0.05
        "L_AncPO(y_l)": 0.6210,  # x = 0.05 + 0.1
        "L_AncPO(m_l)": 0.7185,  # x = 0.05 - 0.1
    }
    assert terms["L_DPO"].formula == "-log sigma(r(m_w, q, y_w) - r(m_w, q, y_l))"
    assert terms["L_DPO"].filled == "-log sigma(0.2000 - (-0.1000))"
    assert terms["L_AncPO(m_l)"].filled == "-log sigma(0.0500 - 0.1000)"


def test_printed_equations_come_out(run, capsys):
    """Every line `left = expression = value` with numbers is worked out again."""
    one_pair.main(["--adapter", str(run), "--row", "1", "4"])
    out = capsys.readouterr().out
    rewards = re.findall(r"r\(\w+, q, \w+\) = ([\d.]+) \(\(?(-[\d.]+)\)? - \(?(-[\d.]+)\)?\) = (-?[\d.]+)", out)
    assert len(rewards) == 6  # three triples of two rows
    for beta, policy, reference, reward in rewards:
        assert float(beta) * (float(policy) - float(reference)) == pytest.approx(float(reward), abs=1e-4)
    terms = re.findall(r"= -log sigma\(\(?(-?[\d.]+)\)? - \(?(-?[\d.]+)\)?\) = ([\d.]+)", out)
    assert len(terms) == 6
    for above, below, value in terms:
        assert math.log1p(math.exp(float(below) - float(above))) == pytest.approx(float(value), abs=2e-4)


def test_a_dpo_run_has_one_term_and_a_crop_to_compare_with(run, tmp_path):
    folder = tmp_path / "dpo"
    shutil.copytree(run / "epoch-1", folder)
    settings = json.loads((run / "args.json").read_text())
    settings |= {"recipe": "dpo", "terms": ["dpo"], "delta": 0.0, "rejected_image": None}
    (folder / "args.json").write_text(json.dumps(settings))
    found = opened("--adapter", folder, "--row", 1)
    numbers = one_pair.pair_numbers(found.model, found.data[found.keys[0]], found.settings)
    assert [term.name for term in numbers.terms] == ["L_DPO"]
    assert found.data.strategy == "crop" and numbers.image_rejected is not None


def test_flags_win_over_the_run_and_an_adapter_from_elsewhere_is_said(run, pairs_file, tmp_path, capsys):
    own = tmp_path / "own.json"
    rows = json.loads(pairs_file.read_text())
    own.write_text(json.dumps([row | {"image": str(pairs_file.parent / row["image"])} for row in rows[:2]]))
    found = opened("--adapter", run, "--data", own, "--image-root", pairs_file.parent, "--row", 2)
    assert len(found.data) == 2 and found.settings.seed == 3 and found.settings.delta == 0.05
    alone = tmp_path / "elsewhere" / "adapter"
    shutil.copytree(run / "epoch-2", alone)
    with pytest.raises(SystemExit, match="--base is needed"):
        opened("--adapter", alone, "--row", 1)
    found = opened(
        "--adapter",
        alone,
        "--base",
        json.loads((run / "args.json").read_text())["base"],
        "--data",
        pairs_file,
        "--row",
        1,
    )
    assert "no args.json" in capsys.readouterr().out
    assert found.settings.delta == 0 and not found.settings.recorded


def test_a_bad_row_elsewhere_in_the_data_is_no_hindrance(run, pairs_file, capsys):
    rows = json.loads(pairs_file.read_text())
    rows[1]["chosen"] = " "
    (pairs_file.parent / "bad.json").write_text(json.dumps(rows))
    data = pairs_file.parent / "bad.json"
    assert opened("--adapter", run, "--data", data, "--row", 3).keys == [(0, 1)]  # the second of four
    assert "1 empty chosen" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no usable row 2; it has 4 usable rows, from 1 to 5"):
        opened("--adapter", run, "--data", data, "--row", 2)


def test_folders_of_the_run_are_not_taken_for_another_base_or_other_data(tmp_path):
    recorded = {"base": "b", "data": "d", "weights": "w", "vision_weights": "v", "image_root": "r", "beta": 0.3}
    (tmp_path / "args.json").write_text(json.dumps(recorded))

    def settings(*flags):
        args = one_pair.pair_parser("").parse_args(["--adapter", str(tmp_path), "--row", "1", *flags])
        found = vars(one_pair.run_settings(args))
        return [str(found[name]) for name in ("weights", "vision_weights", "image_root", "beta")]

    assert settings() == ["w", "v", "r", "0.3"]
    assert settings("--base", "other") == ["None", "None", "r", "0.3"]
    assert settings("--data", "other") == ["w", "v", "None", "0.3"]
    assert settings("--weights", "mine") == ["mine", "v", "r", "0.3"]


def test_a_row_or_a_run_that_is_not_there_is_named(run):
    with pytest.raises(SystemExit, match=r"--adapter .*nowhere: no such folder"):
        opened("--adapter", run / "nowhere", "--row", 1)
    with pytest.raises(SystemExit, match=r"no usable row 9, 77; it has 5 usable rows, from 1 to 5"):
        opened("--adapter", run, "--row", 1, 9, 77)


@pytest.mark.parametrize("flag, value", [("--row", "0"), ("--row", "two"), ("--epoch", "-1")])
def test_a_number_that_cannot_be_is_refused_at_once(run, flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        opened("--adapter", run, "--row", 1, flag, value)
    assert end.value.code == 2 and f"{value}: must be a whole number" in capsys.readouterr().err


def test_control_characters_of_the_data_never_reach_the_terminal(run, pairs_file, tmp_path, capsys):
    rows = json.loads(pairs_file.read_text())
    rows[0] |= {"chosen": "red \x1b[31m alarm \u202e mirrored", "id": "a\x07b"}
    (pairs_file.parent / "steer.json").write_text(json.dumps(rows))
    one_pair.main(["--adapter", str(run), "--data", str(pairs_file.parent / "steer.json"), "--row", "1"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out and r"red \x1b[31m" in out


@pytest.mark.parametrize("name, value, said", [("quant", "x", "--quant"), ("dtype", "float99", "--dtype")])
def test_a_setting_that_no_run_has_is_refused(run, tmp_path, name, value, said, capsys):
    shutil.copytree(run / "epoch-1", tmp_path / "edited")
    settings = json.loads((run / "args.json").read_text())
    (tmp_path / "edited" / "args.json").write_text(json.dumps(settings | {name: value}))
    with pytest.raises(SystemExit):
        opened("--adapter", tmp_path / "edited", "--row", 1)
    assert f"argument {said}: invalid choice: '{value}'" in capsys.readouterr().err


def test_data_that_is_no_text(run, tmp_path):
    shutil.copytree(run / "epoch-1", tmp_path / "edited")
    settings = json.loads((run / "args.json").read_text())
    (tmp_path / "edited" / "args.json").write_text(json.dumps(settings | {"data": 5}))
    with pytest.raises(SystemExit, match="5: no such file"):
        opened("--adapter", tmp_path / "edited", "--row", 1)
