"""The memory plan against a fake allocator, and runs that run out of memory against undisturbed ones."""

import math
import weakref

import numpy as np
import pytest
import torch

import losses
import train
from bases.checkpoint import load_model
from bases.tokenizer import load_processor
from data import PairData
from engine import memory, packing
from engine.batches import batches, plan_steps
from engine.distributed import World
from engine.memory import Plan
from external.flags import ALL_LAYERS
from formats.readers import read_pairs
from lora import add_lora
from model import Config, LLaVA
from tests.test_train import assert_same_run, run

# ---- the plan ------------------------------------------------------------------------------------------------------

TOKENS = [1670, 2885, 8350, 16700]
PEAK = {  # GiB of a step of 7B in bfloat16, r 64, AdamW's state included, by layers recomputed; computed, not measured
    0: [22.5, 27.3, 49.6, 84.0],
    8: [20.9, 24.7, 42.0, 68.0],
    16: [19.4, 22.0, 34.0, 52.0],
    24: [17.8, 19.4, 26.0, 37.0],
    32: [16.2, 16.7, 18.8, 22.6],
}


def allocator(card: float):
    """A card of `card` GiB, of which CUDA itself takes 0.5; rows as long as the plan allows."""

    def trial(plan: Plan) -> tuple[float, float]:
        peak = float(np.interp(plan.size, TOKENS, PEAK[plan.recomputed]))
        free = card - 0.5
        return (peak if peak <= free else math.inf), memory.SHARE * free

    return trial


@pytest.mark.parametrize(
    "card, expected",
    [
        (24, Plan(2048, 16)),  # 0.92 x 23.5 = 21.6; 2,048 tokens need 24.0, with 8 layers recomputed 22.1, with 16 20.2
        (48, Plan(4096, 0)),  # 43.7; 8,192 tokens need 49.0, 4,096 need 32.2
        (80, Plan(8192, 0)),  # 73.1; 16,384 tokens need 82.7
        (141, Plan(16384, 0)),  # 129.3
    ],
)
def test_the_plan_for_7b_on_four_cards(card, expected, capsys):
    plans = memory.candidates(layers=32, size=None, recomputed=None)
    assert memory.choose(plans, allocator(card)) == expected
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "The last is taken" in printed
    assert f"at most {expected.size:,} with {expected.recomputed} layers recomputed" in printed


def test_a_card_that_is_too_small_is_refused_before_step_0():
    with pytest.raises(SystemExit, match="no trial step fits.*32 layers recomputed.*--quant nf4"):
        memory.choose(memory.candidates(layers=32, size=None, recomputed=None), allocator(16))


def test_what_the_user_gave_is_kept():
    assert memory.candidates(32, 5000, None) == [Plan(5000, 0), Plan(5000, 8), Plan(5000, 16), Plan(5000, 32)]
    assert memory.candidates(32, None, ALL_LAYERS)[0] == Plan(16384, 32)
    assert memory.candidates(32, 1, 4) == [Plan(1, 4)]


def test_a_trial_step_stands_beside_gradients_and_adamw(monkeypatch):
    """The step sees 3 tensors more a parameter; room is a share of what is free and what this process holds already."""
    gib = memory.GIB
    for name, value in dict(
        max_memory_reserved=10 * gib,
        memory_reserved=4 * gib,
        mem_get_info=(16 * gib, 80 * gib),
        empty_cache=None,
        reset_peak_memory_stats=None,
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    parameters = [torch.nn.Parameter(torch.zeros(1000, 7)), torch.nn.Parameter(torch.zeros(3))]
    zeros_like, made = torch.zeros_like, []

    def noted(p):
        made.append(weakref.ref(zeros := zeros_like(p)))
        return zeros

    monkeypatch.setattr(torch, "zeros_like", noted)
    beside = []

    def step():
        beside.extend(tuple(ref().shape) for ref in made if ref() is not None)

    assert memory.trial_step(parameters, step) == (10, pytest.approx(0.92 * 20))  # 16 free + 4 held
    assert sorted(beside) == [(3,)] * 3 + [(1000, 7)] * 3  # the gradient and both moments
    assert all(ref() is None for ref in made) and all(p.grad is None for p in parameters)

    activations = []

    def fail():
        cycle = [torch.zeros(1)]
        cycle.append(cycle)
        activations.append(weakref.ref(cycle[0]))
        raise torch.OutOfMemoryError("injected")

    assert memory.trial_step(parameters, fail)[0] == math.inf
    assert activations[0]() is None
    assert all(p.grad is None for p in parameters)


@pytest.fixture
def world(tiny_base, pairs_file):
    """A tiny model with an adapter; 24 pairs in which the longest text is not the longest row, in two ways."""
    model = load_model(tiny_base)
    add_lora(model, r=4, alpha=8)
    pairs = [pair for pair in read_pairs(pairs_file)[0] for _ in range(5)][:24]
    long_prompt = "?" * 80
    for row in range(24):
        texts = {"rejected": "?" * 60} if row < 8 else {"prompt": long_prompt} if row == 20 else {}
        pairs[row] = train.dataclasses.replace(pairs[row], row=row + 1, id=f"p{row + 1}", **texts)
    return model, PairData(pairs, load_processor(tiny_base, model.config), "crop", seed=3)


@pytest.mark.parametrize("packed", [True, False])
def test_the_trial_takes_the_largest_micro_batch_of_epoch_0(world, packed):
    """As training makes it: the loader's order, the step's split. Not the eight with the longest answers."""
    model, data = world
    path = train.fast_path(model, compiled=False, reference="live") if packed else train.plain_path(model)
    size, batch = (300, 5) if packed else (2, 5)
    largest = memory.with_pixels(data, memory.largest_micro_batch(memory.first_epoch(data, batch), path.split, size))
    trained = [
        micro
        for _, examples, _ in batches(data, plan_steps(data, batch, 5, World()), start=0, workers=0)
        for micro in path.split(examples, size)
    ]

    def length(micro) -> int:
        return path.make_batch(micro).input_ids.shape[1] if packed else sum(e.tokens() for e in micro)

    lengths = [length(micro) for micro in trained]
    assert length(largest) == max(lengths)
    real = trained[lengths.index(max(lengths))]
    assert [e.pair.id for e in largest] == [e.pair.id for e in real]
    assert torch.equal(largest[0].image_rejected, real[0].image_rejected)  # its own m_l
    by_answers = sorted(range(24), key=lambda i: -len(data.pairs[i].chosen) - len(data.pairs[i].rejected))[:8]
    first = path.split([data[(0, i)] for i in by_answers], size)[0]
    assert length(first) < max(lengths)


@pytest.mark.parametrize("packed", [True, False])
def test_the_trial_computes_its_gradients_outside_autocast(world, packed):
    """As the loop does. Inside, the backward pass of what autocast casts would keep other bytes."""
    model, data = world
    path = train.fast_path(model, compiled=False, reference="live") if packed else train.plain_path(model)
    path = path._replace(autocast=torch.autocast("cpu", torch.bfloat16))
    scored = path.make_batch([data[(0, 0)]])
    inside = {"forward": [], "backward": []}

    def note(when):
        return lambda *_: inside[when].append(torch.is_autocast_enabled("cpu"))

    norm = model.language_model.norm
    norm.register_forward_hook(note("forward"))
    norm.register_full_backward_hook(note("backward"))
    memory.forward_and_backward(path, model, scored)
    assert set(inside["forward"]) == {True} and set(inside["backward"]) == {False}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_7b_in_nf4_trains_one_example_of_1670_tokens_in_10_gb():
    """The planner's arithmetic. Weights: NF4 has 4 bits a weight and a float32 a block of 64, so 0.5625 bytes."""
    with torch.device("meta"):
        model = LLaVA(Config())
    parameters = add_lora(model, r=64, alpha=128)
    linears = sum(p.numel() for n, p in model.language_model.layers.named_parameters() if n.endswith("base.weight"))
    assert linears == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    trained = sum(p.numel() for p in parameters)
    other = sum(p.numel() for p in model.parameters()) - linears - trained
    weights = 0.5625 * linears + 2 * other  # 4.8 GB
    adapter = 4 * 4 * trained  # itself, its gradient, two moments, in float32: 2.6 GB
    activations = (16.2 - 15.5) * memory.GIB  # all layers recomputed, one of them at work
    dequantised = 2 * 11008 * 4096  # of the layer at work, one weight
    assert 7e9 < weights + adapter + activations + dequantised < 10e9


# ---- out of memory in mid-run --------------------------------------------------------------------------------------


def failing(score, calls: set[int], where: str):
    """`score`, out of memory in its n-th calls, in the forward pass or in the backward pass from there."""
    made = []
    graphs = []

    def hook(gradient):
        raise torch.OutOfMemoryError("injected in backward")

    def scored(model, batch):
        if not torch.is_grad_enabled():  # the reference
            return score(model, batch)
        made.append(1)
        for graph in graphs:
            assert graph() is None, "the graph that filled the memory is still there"
        graphs.clear()
        if len(made) in calls and where == "forward":
            raise torch.OutOfMemoryError("injected in forward")
        logps = score(model, batch)
        if len(made) in calls:
            logps.chosen.register_hook(hook)
            graphs.append(weakref.ref(logps.chosen))
            cycle = [logps.chosen]
            cycle.append(cycle)  # as the frames of a caught error can be: only the collector frees it
        return logps

    return scored


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "flags, module, name",
    [
        (("--micro-batch", 2), losses, "plain_logps"),
        (("--pack", "--tokens-per-batch", 300), packing, "packed_logps"),
    ],
)
def test_a_run_that_runs_out_of_memory_ends_as_one_that_does_not(
    tiny_base, pairs_file, tmp_path, monkeypatch, capsys, where, flags, module, name
):
    """In the second micro-batch of the second step; the next attempt fails too."""
    flags = ("--batch", 5, "--epochs", 3, "--lr", 3e-3, *flags)
    whole = run(tiny_base, pairs_file, tmp_path / "whole", *flags)
    monkeypatch.setattr(module, name, failing(getattr(module, name), {5, 6}, where))
    disturbed = run(tiny_base, pairs_file, tmp_path / "disturbed", *flags)
    for a, b in zip(whole[0], disturbed[0], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-6)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-5)
    assert_same_run(whole, disturbed, rtol=1e-5)
    printed = capsys.readouterr().out
    assert "out of memory: the step is repeated with 1 of 2 layers recomputed" in printed
    assert "out of memory: the step is repeated with 2 of 2 layers recomputed" in printed


def test_the_run_ends_only_where_one_example_does_not_fit(tiny_base, pairs_file, tmp_path, monkeypatch, capsys):
    score = losses.plain_logps

    def scored(model, batch):
        if torch.is_grad_enabled() and len(batch.chosen.input_ids) > 1:
            raise torch.OutOfMemoryError("injected")
        return score(model, batch)

    monkeypatch.setattr(losses, "plain_logps", scored)
    flags = ("--batch", 5, "--micro-batch", 4, "--max-steps", 2)
    log, _ = run(tiny_base, pairs_file, tmp_path / "run", *flags)
    assert len(log) == 2
    printed = capsys.readouterr().out
    assert printed.count("out of memory") == 4  # 1 and 2 layers recomputed, then micro-batches of 2 and 1
    assert "2 of 2 layers recomputed and micro-batches of at most 1\n" in printed

    monkeypatch.setattr(losses, "plain_logps", failing(score, set(range(99)), "forward"))
    with pytest.raises(SystemExit, match=r"one example and every layer recomputed: id p\d\. "):
        run(tiny_base, pairs_file, tmp_path / "other", *flags)


def test_another_error_is_not_swallowed(tiny_base, pairs_file, tmp_path, monkeypatch):
    def scored(model, batch):
        raise RuntimeError("not about memory")

    monkeypatch.setattr(losses, "plain_logps", scored)
    with pytest.raises(RuntimeError, match="not about memory"):
        run(tiny_base, pairs_file, tmp_path / "run", "--max-steps", 1)
