"""The loop: what it writes, what its first numbers are, and that its switches change only what they should."""

import json
import math
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import losses
import train
from bases.checkpoint import load_model
from data import Batch, Tokens
from engine.run_folder import line
from losses import Logps


def run(base, data, out, *flags):
    torch.manual_seed(0)
    folder = train.train(
        train.parse_args(
            [
                "--base",
                str(base),
                "--data",
                str(data),
                "--out",
                str(out),
                "--workers",
                "0",
                "--lora-r",
                "4",
                "--lora-alpha",
                "8",
                *map(str, flags),
            ]
        )
    )
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, load_file(folder / "adapter_model.safetensors")


def assert_same_run(a, b, rtol=1e-4):
    for x, y in zip(a[0], b[0], strict=True):
        assert abs(x["loss"] - y["loss"]) < 1e-4, (x["step"], x["loss"], y["loss"])
    for key, x in a[1].items():
        assert (x - b[1][key]).abs().max() <= rtol * x.abs().max() + 1e-7, key


@pytest.mark.parametrize("recipe, first", [("mdpo", 2.0794), ("dpo", 0.6931), ("dpo-no-image", 0.6931)])
def test_first_loss_is_ln2_per_term_and_the_loss_falls(tiny_base, pairs_file, tmp_path, recipe, first):
    log, _ = run(tiny_base, pairs_file, tmp_path / "run", "--recipe", recipe, "--batch", 5, "--epochs", 8, "--lr", 3e-3)
    assert math.isclose(log[0]["loss"], first, abs_tol=1e-4)
    assert log[0]["lr"] == 0 and math.isclose(log[1]["loss"], first, abs_tol=0.05)  # only m_l is another crop
    assert log[-1]["loss"] < first - 0.1


def test_run_folder_and_log_keys(tiny_base, pairs_file, tmp_path):
    log, adapter = run(tiny_base, pairs_file, tmp_path / "run", "--batch", 2, "--epochs", 2)
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    state = {f"checkpoint-00000{n}/state.{kind}" for n in (3, 6) for kind in ("json", "safetensors")}
    adapter_files = {"adapter_model.safetensors", "adapter_config.json"}
    epochs = {f"epoch-{n}/{f}" for n in (1, 2) for f in adapter_files}
    assert files == adapter_files | epochs | state | {"args.json", "log.jsonl", "README.md", ".lock"}
    assert len(log) == 6  # 5 pairs in batches of 2, 2 and 1, twice: the short one is used
    assert len(adapter) == 2 * 7 * 2  # layers, linears, A and B
    wanted = """step loss losses/dpo losses/copo losses/ancpo rewards/chosen rewards/rejected rewards/image_rejected
        rewards/margins rewards/image_margins rewards/accuracies rewards/image_accuracies logps/chosen logps/rejected
        logps/image_rejected lr grad_norm pairs_per_s peak_gib""".split()
    assert set(wanted) <= log[0].keys()
    assert json.loads((tmp_path / "run/args.json").read_text())["beta"] == 0.1


def test_a_run_never_overwrites_another(tiny_base, pairs_file, tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(SystemExit, match="not empty"):
        run(tiny_base, pairs_file, tmp_path, "--max-steps", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_bad_row_stops_before_anything_is_written_or_is_left_out(tiny_base, pairs_file, tmp_path, capsys):
    rows = json.loads(pairs_file.read_text())
    rows[1]["rejected"] = "  \n"
    rows[3]["chosen"] = "It says </s> here."
    for row in rows:
        row["image"] = str(pairs_file.parent / row["image"])
    data = pairs_file.parent / "bad.json"
    data.write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "load_model", lambda *_: pytest.fail("the base was loaded before the data was checked"))
        run(tiny_base, data, tmp_path / "run")
    message = str(stop.value)
    assert "bad.json:2: id p1: empty rejected" in message and "2 of 5 rows" in message
    assert "1 empty rejected" in message and "1 special-token text inside data" in message
    assert not (tmp_path / "run").exists()
    log, _ = run(tiny_base, data, tmp_path / "run", "--skip-bad", "--batch", 2, "--epochs", 1)
    assert len(log) == 2 and "2 of 5 rows cannot be used" in capsys.readouterr().out  # 3 pairs: batches of 2 and 1
    said = json.loads((tmp_path / "run" / "args.json").read_text())
    assert said["pairs"] == 3
    assert said["left_out"] == {"empty rejected": 1, "special-token text inside data": 1}


def test_the_loss_is_a_mean_over_examples_not_over_micro_batches(tiny_base, pairs_file, tmp_path):
    flags = ("--batch", 5, "--epochs", 3, "--lr", 3e-3)
    whole = run(tiny_base, pairs_file, tmp_path / "5", *flags, "--micro-batch", 5)
    for size in (1, 2):  # 2: micro-batches of 2, 2 and 1 examples
        assert_same_run(whole, run(tiny_base, pairs_file, tmp_path / str(size), *flags, "--micro-batch", size))


def test_beta_delta_and_clip_reach_the_loop(tiny_base, pairs_file, tmp_path):
    """In step 0 all rewards are 0. There the gradient is beta / 2 a term, of AncPO beta sigma(delta), and L_AncPO is
    log(1 + e^delta); a gradient clipped to nothing leaves AdamW's step far below its epsilon, and the rewards at 0."""
    flags = ("--batch", 5, "--epochs", 2, "--warmup", 0, "--lr", 1e-3)
    ancpo = (*flags, "--terms", "ancpo")
    one = run(tiny_base, pairs_file, tmp_path / "1", *ancpo, "--beta", 0.1)[0]
    two = run(tiny_base, pairs_file, tmp_path / "2", *ancpo, "--beta", 0.2)[0]
    assert two[0]["grad_norm"] == pytest.approx(2 * one[0]["grad_norm"], rel=1e-4)
    shifted = run(tiny_base, pairs_file, tmp_path / "3", *ancpo, "--beta", 0.1, "--delta", 2)[0]
    assert shifted[0]["losses/ancpo"] == pytest.approx(math.log(1 + math.exp(2)), rel=1e-5)
    assert shifted[0]["grad_norm"] == pytest.approx(2 / (1 + math.exp(-2)) * one[0]["grad_norm"], rel=1e-4)
    clipped = run(tiny_base, pairs_file, tmp_path / "4", *ancpo, "--clip", 1e-12)[0]
    assert clipped[1]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert abs(one[1]["rewards/chosen"]) > 0.01


NONSENSE = (
    "--clip -1,--clip 0,--max-steps -3,--max-steps 0,--beta 0,--beta -1,--lora-alpha 0,--warmup -1,--warmup 2,--lr nan"
)


@pytest.mark.parametrize("words", NONSENSE.split(","))
def test_a_number_out_of_its_range_ends_before_anything_is_loaded(words, capsys):
    """Each of these once trained, with exit status 0: --clip -1 uphill, --max-steps -3 not at all."""
    with pytest.raises(SystemExit) as end:
        train.parse_args(["--base", "none", *words.split()])
    flag, value = words.split()
    assert end.value.code == 2 and f"argument {flag}: {value}: must be" in capsys.readouterr().err


def test_fast_path_follows_the_plain_path_for_20_steps(tiny_base, pairs_file, tmp_path):
    flags = ("--batch", 3, "--epochs", 10, "--lr", 1e-3)
    plain = run(tiny_base, pairs_file, tmp_path / "plain", *flags)
    assert len(plain[0]) == 20
    fast = run(tiny_base, pairs_file, tmp_path / "fast", *flags, "--pack", "--tokens-per-batch", 500)
    assert_same_run(plain, fast, rtol=1e-2)
    live = run(tiny_base, pairs_file, tmp_path / "live", *flags, "--pack", "--reference", "live")
    assert_same_run(plain, live, rtol=1e-2)


def test_training_changes_the_adapter_only(tiny_base, pairs_file, tmp_path, monkeypatch):
    """LoRA is never merged while training, and tower, projector and head stay frozen."""
    kept = []
    load = train.load_base_and_data
    monkeypatch.setattr(train, "load_base_and_data", lambda *a: kept.append(load(*a)) or kept[0])
    run(tiny_base, pairs_file, tmp_path / "run", "--batch", 5, "--epochs", 3, "--lr", 1e-2)
    trained = {n.replace(".base.", "."): p for n, p in kept[0][0].named_parameters() if "lora_" not in n}
    for name, original in load_model(tiny_base).named_parameters():
        assert torch.equal(trained[name], original), name


def test_dpo_no_image_leaves_picture_and_placeholder_out(tiny_base, pairs_file, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the vision tower ran")

    monkeypatch.setattr("model.VisionTower.forward", refuse)
    run(tiny_base, pairs_file, tmp_path / "run", "--recipe", "dpo-no-image", "--max-steps", 1)
    with pytest.raises(AssertionError, match="tower ran"):
        run(tiny_base, pairs_file, tmp_path / "with", "--recipe", "dpo", "--max-steps", 1)


@pytest.mark.parametrize("recipe, drawn", [("dpo", 0), ("pds-dpo", 0), ("mdpo", 2)])
def test_only_recipes_that_look_at_m_l_draw_one(tiny_base, pairs_file, tmp_path, monkeypatch, recipe, drawn):
    calls = []
    draw = train.PairData.image_rejected
    monkeypatch.setattr(train.PairData, "image_rejected", lambda *a: calls.append(1) or draw(*a))
    run(tiny_base, pairs_file, tmp_path / "run", "--recipe", recipe, "--batch", 2, "--max-steps", 1)
    assert len(calls) == drawn


def test_a_rejected_image_in_the_data_is_used(tiny_base, pairs_file, tmp_path):
    rows = json.loads(pairs_file.read_text())
    args = ["--base", str(tiny_base), "--out", str(tmp_path), "--data"]
    for missing, expected in ((None, "given"), (2, "crop")):
        for i, row in enumerate(rows):
            row["image_rejected"] = None if i == missing else rows[i - 1]["image"]
        file = pairs_file.parent / "own.json"
        file.write_text(json.dumps(rows))
        _, data = train.load_base_and_data(train.parse_args([*args, str(file)]), torch.device("cpu"))
        assert data.strategy == expected
        if expected == "given":
            assert torch.equal(data[(0, 1)].image_rejected, data[(0, 0)].image)


def test_learning_rate_by_hand():
    # 10 steps, 2 of warm-up: 0, 1/2, then cosine over 8: at 2 the peak, at 6 half of it, at 10 zero
    lr = [train.lr_at(step, 10, 0.2, 1.0) for step in range(10)]
    expected = [0, 0.5, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]
    assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(lr, expected, strict=True)), lr
    assert train.lr_at(0, 1, 0.1, 1.0) == 1.0  # a run of one step
    assert train.lr_at(0, 936, 0.1, 1e-5) == 0 and train.lr_at(94, 936, 0.1, 1e-5) == 1e-5  # ceil(93.6) warm-up steps


def test_recipes_are_the_papers():
    a = train.parse_args(["--base", "llava-1.5-7b"])
    assert (a.lr, a.epochs, a.batch, a.warmup, a.beta, a.delta, a.lora_r, a.lora_alpha) == (
        1e-5,
        3,
        32,
        0.1,
        0.1,
        0.0,
        64,
        128.0,
    )
    assert a.terms == ("dpo", "copo", "ancpo") and a.anchors == ("w",) and a.rejected_image is None
    assert (a.adam_beta2, a.weight_decay, a.clip) == (0.98, 0.05, 1.0)
    p = train.parse_args(["--base", "llava-1.5-7b", "--recipe", "pds-dpo"])
    assert (p.terms, p.epochs, p.batch, p.lr, p.lora_r, p.lora_alpha) == (("dpo",), 2, 8, 1e-5, 128, 256.0)
    assert (p.warmup, p.weight_decay, p.adam_beta2, p.beta) == (0.03, 0.0, 0.999, 0.1)
    given = train.parse_args(["--base", "x", "--recipe", "pds-dpo", "--lr", "3e-5", "--terms", "dpo,ancpo"])
    assert given.lr == 3e-5 and given.terms == ("dpo", "ancpo") and given.epochs == 2  # a flag wins over the recipe


def test_unknown_terms_and_flags_that_exclude_each_other_are_named(capsys):
    wrong = [
        ("--terms dpo,kto", "kto"),
        ("--anchors x", "x"),
        ("--batch 0", "--batch"),
        ("--checkpointing all", "all"),
        ("--reference cached --no-pack", "--pack"),
        ("--tokens-per-batch 99 --no-pack", "--tokens-per-batch"),
        ("--micro-batch 2 --pack", "--micro-batch"),
        ("--recipe dpo --delta 1", "add ancpo to --terms"),
        ("--terms dpo,copo --anchors l", "add ancpo to --terms"),
        ("--epochs 10001", "--epochs"),
        ("--workers 257", "--workers"),
        ("--lora-r 65537", "--lora-r"),
        ("--seed 4294967296", "--seed"),
        ("--data=", "--data is empty"),
    ]
    for flags, named in wrong:
        with pytest.raises(SystemExit):
            train.parse_args(["--base", "x", *flags.split()])
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "value, said",
    [("", "--data is empty; a shell variable that is not set?"), ("\udcff.json", "not UTF-8"), ("~/a.json", "the ~")],
)
def test_a_value_that_is_empty_or_no_text(value, said, capsys):
    """`--data "$DATA"` with DATA unset once trained on the paper's own data."""
    with pytest.raises(SystemExit):
        train.parse_args(["--base", "x", "--data", value])
    assert said in capsys.readouterr().err


def test_a_template_of_bunnys_on_another_base(tiny_base, pairs_file):
    flags = ["--base", str(tiny_base), "--data", str(pairs_file), "--bunny-template", "released"]
    with pytest.raises(SystemExit, match="is no Bunny"):
        train.load_base_and_data(train.parse_args(flags), torch.device("cpu"))


def test_plain_logps_scores_each_triple_with_its_own_picture_and_answer():
    """A stand-in model that says 'token 1' with a probability painted in the picture: m_w .9, m_l .2."""

    def model(input_ids, images):
        p = images.view(-1, 1).expand(-1, input_ids.shape[1])  # (B, 1) -> (B, T)
        return torch.stack([1 - p, p], dim=-1).log()  # (B, T, 2)

    mask = torch.tensor([[False, True, True]])
    y_w, y_l = Tokens(torch.tensor([[0, 1, 1]]), mask), Tokens(torch.tensor([[0, 0, 0]]), mask)
    m_w, m_l = torch.tensor([0.9]), torch.tensor([0.2])
    logps = losses.plain_logps(model, Batch(y_w, y_l, m_w, m_l))
    assert math.isclose(logps.chosen.item(), 2 * math.log(0.9), abs_tol=1e-5)
    assert math.isclose(logps.rejected.item(), 2 * math.log(0.1), abs_tol=1e-5)
    assert math.isclose(logps.image_rejected.item(), 2 * math.log(0.2), abs_tol=1e-5)


def test_the_plain_path_needs_no_fast_file(tiny_base, pairs_file, tmp_path):
    """With packing, head and reference made impossible to import, a plain run trains all the same."""
    code = f"""
import sys
for name in ("engine.packing", "engine.head", "engine.reference"):
    sys.modules[name] = None
import train
train.main(["--base", {str(tiny_base)!r}, "--data", {str(pairs_file)!r}, "--out", {str(tmp_path / "run")!r},
            "--workers", "0", "--max-steps", "1", "--no-pack"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2.0794" in done.stdout


@pytest.mark.parametrize("margin, shown", [(-0.1234, "-0.1234"), (0.1234, " 0.1234"), (-12.5, "-12.5000")])
def test_the_line_keeps_the_sign(margin, shown):
    row = {
        "step": 3,
        "loss": 0.5,
        "losses/dpo": 0.5,
        "rewards/margins": margin,
        "rewards/accuracies": 0.5,
        "lr": 1e-5,
        "grad_norm": 1.0,
        "pairs_per_s": 2.0,
        "peak_gib": 1.0,
    }
    assert f"| {shown} " in line(row, 9)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_step(tiny_base, pairs_file, tmp_path, monkeypatch, bad):
    if bad == "loss":
        score = losses.plain_logps
        monkeypatch.setattr(
            losses, "plain_logps", lambda model, batch: Logps(*(x * math.nan for x in score(model, batch)))
        )
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("the optimizer stepped"))
    with pytest.raises(SystemExit, match=r"step 0: .*(nan|inf).*p\d"):
        run(tiny_base, pairs_file, tmp_path / "run", "--batch", 2)


def test_the_model_card_says_what_was_trained(tiny_base, pairs_file, tmp_path):
    log, _ = run(tiny_base, pairs_file, tmp_path / "run", "--batch", 5, "--epochs", 3)
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {tiny_base}\nlibrary_name: peft\n")
    assert "L_DPO + L_CoPO (mDPO) + L_AncPO (mDPO)" in card and "| beta | 0.1 |" in card and "5 pairs" in card
    assert f"| 2 | {log[2]['loss']:.4f} |" in card


def test_rows_go_where_track_says(tiny_base, pairs_file, tmp_path, monkeypatch, capsys):
    sent = []
    stand_in = SimpleNamespace(log=lambda row, step: sent.append((step, row["loss"])))
    wandb = SimpleNamespace(__spec__=ModuleSpec("wandb", None), init=lambda **settings: stand_in)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log, _ = run(tiny_base, pairs_file, tmp_path / "run", "--batch", 5, "--epochs", 2, "--track", "wandb")
    assert sent == [(row["step"], row["loss"]) for row in log]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        run(tiny_base, pairs_file, tmp_path / "without", "--track", "wandb")
    assert "--track: wandb is not installed; run `pip install wandb`" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains_from_3_ln_2(tiny_base, pairs_file, tmp_path, kind):
    log, _ = run(tiny_base, pairs_file, tmp_path / "run", "--batch", 5, "--epochs", 8, "--lr", 3e-3, "--quant", kind)
    assert math.isclose(log[0]["loss"], 2.0794, abs_tol=1e-4) and log[-1]["loss"] < log[0]["loss"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert kind in json.dumps(config)


def test_the_optimizer_gets_the_recipes_numbers(tiny_base, pairs_file, tmp_path, monkeypatch):
    given, real = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **settings: given.append(settings) or real(*a, **settings))
    run(tiny_base, pairs_file, tmp_path / "mdpo", "--max-steps", 1)
    run(tiny_base, pairs_file, tmp_path / "pds", "--recipe", "pds-dpo", "--max-steps", 1)
    assert [(s["betas"], s["weight_decay"]) for s in given] == [((0.9, 0.98), 0.05), ((0.9, 0.999), 0.0)]


def test_the_last_smaller_batch_is_averaged_over_what_it_holds(tiny_base, pairs_file, tmp_path, monkeypatch):
    """B stays 0 at this learning rate, so gradients of parts add up: 5 g(5) = 3 g(3) + 2 g(2), each g a mean."""
    gradients = []

    def keep(parameters, clip):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    for batch in (5, 3):
        run(tiny_base, pairs_file, tmp_path / str(batch), "--batch", batch, "--epochs", 1, "--lr", 1e-12)
    whole, three, two = gradients
    torch.testing.assert_close(3 * three + 2 * two, 5 * whole, rtol=1e-3, atol=1e-5)


def test_a_toy_run_that_cannot_begin_ends_before_its_base_is_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train.toy, "make_world", lambda folder, seed: made.append(folder))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    with pytest.raises(SystemExit, match="a run was begun here"):
        train.main(["--base", "toy", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="is not a writable folder"):
        train.main(["--base", "toy", "--out", str(tmp_path / "run" / "args.json" / "x")])
    assert made == []
