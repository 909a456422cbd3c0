"""bench.py: its FLOPs against torch's own counter, one row on real text, and the rows it would run."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import training
from data import PairData, Processor
from engine import packing
from engine.reference import CachedReference
from formats.readers import read_pairs
from lora import add_lora
from model import Config, VisionConfig
from train import live_reference

TINY = Config(VisionConfig(32, 3, 2, 64, image_size=56), width=128, layers=6, heads=2, kv_heads=2, ffn=256)


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_useful_flops_are_those_that_torch_counts_in_a_packed_step(pairs_file, reference):
    pairs, _ = read_pairs(pairs_file)
    data = PairData(pairs, Processor(training.Words(), TINY), "crop")
    model = training.random_model(TINY, torch.float32, torch.device("cpu"))
    add_lora(model, 16, 32)
    cached = CachedReference()
    e = data[(1, 2)]
    batch = packing.pack([e])
    cached(model, packing.pack([data[(0, 2)]]))  # both answers known, this m_l not
    with FlopCounterMode(display=False) as counter:
        if reference == "live":
            live_reference(model, batch, packing.packed_logps)
        else:
            cached(model, batch)
        sum(logps.sum() for logps in packing.packed_logps(model, batch)).backward()
    # the counter leaves CPU attention out, the formula the first layer's missing backward and one tower pass
    assert training.useful_flops(e, model, reference) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_a_row_of_the_table(pairs_file, monkeypatch, capsys):
    monkeypatch.setitem(training.SHAPES, "mini", TINY)
    flags = f"--data {pairs_file} --passes 1 --json --setting all-on --longest"
    training.main(flags.split())
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["pairs"] == 1 and row["left_out"] == 4 and 0 < row["utilisation"] < 1
    low, mean, high = row["packed_tokens_per_pair"]
    assert low == mean == high and row["tokens_per_s"] == pytest.approx(high * row["pairs_per_s"])
    result = dict(shape="mini", objective="mdpo", dtype="float32", torch="2", lengths="")
    table = training.table(result | {"rows": {"all-on": row | {"all_pairs_per_s": [1.0]}}})
    assert f"{row['pairs_per_s']:.3f}" in table and "1 pairs (4 left out)" in table


def test_the_peer_is_run_in_every_setting_on_the_same_rows(pairs_file, monkeypatch, capsys):
    commands: list[list[str]] = []
    monkeypatch.setattr(training, "in_a_process", lambda command: commands.append(command))
    monkeypatch.setattr(training, "table", lambda result: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training.main(["--data", str(pairs_file), "--peer", "--longest", "--repeats", "2", "--dtype", "float32"])
    peers = [c for c in commands if "bench.trl_peer" in c]
    ours = [c for c in commands if "bench.training" in c]
    assert len(ours) == 2 * 4 and all("--longest" in c for c in commands)
    settings = {(next(a for a in c if "--micro" in a), "--chunked-head" in c) for c in peers}
    assert len(peers) == 2 * 4 and settings == {(f"--micro={m}", head) for m in (1, 4) for head in (True, False)}
    # in turns, not one after the other
    assert commands[: len(commands) // 2] == commands[len(commands) // 2 :]
