"""The bench: its FLOPs against torch's own counter, one row on real text, and the rows it would run."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bases.tokenizer import load_tokenizer
from bench import training
from bench.inputs import SHAPES, random_model
from data import PairData, Processor
from engine import packing
from engine.reference import CachedReference
from formats.readers import read_pairs
from lora import add_lora
from train import live_reference


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_useful_flops_are_those_that_torch_counts_in_a_packed_step(tiny_base, pairs_file, reference):
    pairs, _ = read_pairs(pairs_file)
    config = dataclasses.replace(SHAPES["tiny"], ffn=2048)  # so that attention is a small part
    data = PairData(pairs, Processor(load_tokenizer(tiny_base), config), "crop")
    cpu = torch.device("cpu")
    model = random_model(config, torch.float32, cpu)
    add_lora(model, 16, 32)
    cached = CachedReference()
    e = data[(1, 2)]
    batch = packing.pack([e]).to(cpu)
    cached(model, packing.pack([data[(0, 2)]]).to(cpu))  # both answers known, this m_l not
    with FlopCounterMode(display=False) as counter:
        if reference == "live":
            live_reference(model, batch, packing.packed_logps)
        else:
            cached(model, batch)
        sum(logps.sum() for logps in packing.packed_logps(model, batch)).backward()
    # the counter takes masked attention for whole; the formula forgets that the first layer's input has no gradient
    assert training.useful_flops(e, model, reference) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_row_of_the_table(tiny_base, pairs_file, capsys):
    flags = ["--data", str(pairs_file), "--tokenizer", str(tiny_base / "tokenizer.json"), "--shape", "tiny"]
    flags += ["--passes", "1", "--longest"]
    training.main([*flags, "--json", "--setting", "all-on"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["pairs"] == 1 and row["left_out"] == 4 and 0 < row["utilisation"] < 1
    low, mean, high = row["packed_tokens_per_pair"]
    assert low == mean == high and row["tokens_per_s"] == pytest.approx(high * row["pairs_per_s"])
    assert all(seconds > 0 for seconds in row["parts_s_per_pair"].values())
    shown = training.table(training.parse_args(flags), {"all-on": row | {"all_pairs_per_s": [1.0]}})
    assert f"{row['pairs_per_s']:.3f}" in shown and "1 pairs (4 left out)" in shown


@pytest.mark.parametrize("cuda, ours, peers", [(False, 4, 4), (True, 6, 8)])
def test_the_peer_is_run_in_every_setting_on_the_same_rows(cuda, ours, peers, monkeypatch):
    argv = ["--data", "x.json", "--tokenizer", "t.json", "--peer", "--longest", "--dtype", "float32"]
    commands = training.commands_of(training.parse_args(argv), argv, cuda)
    theirs = [command for command in commands.values() if "bench.trl_peer" in command]
    assert len(theirs) == peers and len(commands) == ours + peers
    assert all("--longest" in command for command in commands.values())
    heads = {(next(a for a in c if "--micro" in a), "--chunked-head" in c) for c in theirs}
    assert heads == {(f"--micro={m}", head) for m in (1, 4) for head in (True, False)}
    ran = []
    monkeypatch.setattr(training, "in_a_process", lambda command: ran.append(command))
    assert training.medians(commands, repeats=2) == {}
    assert ran == [*commands.values(), *commands.values()]  # in turns, not one after the other
