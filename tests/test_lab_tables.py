"""Rows are trained once, resumed, nested and paired; verdicts by hand; the demo and its figure."""

import json

import pytest
from PIL import Image
from toy_world import shrink

import toy
import train
from lab import claims, demo, figure, tables


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "study"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        tables.main(["--seeds", "7", "--out", str(out), "--groups", "headline"])
    return out


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_has_its_own_objective(study):
    seed = study / "seed-7"
    losses = {}
    for name in ("dpo", "dpo-no-image", "mdpo", "mdpo-conditional", "mdpo-anchored"):
        losses[name] = json.loads((seed / name / "log.jsonl").read_text().splitlines()[0])["loss"]
    ln2 = 0.69315
    assert losses["mdpo"] == pytest.approx(3 * ln2, abs=1e-3)
    assert losses["mdpo-conditional"] == losses["mdpo-anchored"] == pytest.approx(2 * ln2, abs=1e-3)
    assert losses["dpo"] == losses["dpo-no-image"] == pytest.approx(ln2, abs=1e-3)
    assert json.loads((seed / "dpo-no-image" / "args.json").read_text())["recipe"] == "dpo-no-image"


def test_only_rows_that_every_seed_has_are_reported(tmp_path):
    scores = dict.fromkeys(claims.SCORES, 10.0)
    for seed, chair in ((7, 40.0), (8, 44.0)):
        folder = tmp_path / f"seed-{seed}" / "rows"
        folder.mkdir(parents=True)
        for name in ("base", "DPO", "mDPO", "SFT on y_w"):
            curve = [] if name == "base" else [0.0, seed / 3]
            result = {"row": name, "scores": scores | {"CHAIR_s": chair}, "chosen_by_step": curve}
            if (name, seed) != ("SFT on y_w", 8):
                (folder / f"{tables.slug(name)}.json").write_text(json.dumps(result))
    tables.report(tmp_path, [7, 8])
    numbers = json.loads((tmp_path / "study.json").read_text())
    assert numbers["seeds"] == [7, 8]
    assert list(numbers["rows"]) == ["base", "DPO", "mDPO"]
    assert numbers["rows"]["mDPO"]["CHAIR_s"] == [40.0, 44.0]
    assert numbers["chosen_by_step"] == {"DPO": [0.0, 2.5], "mDPO": [0.0, 2.5]}  # mean of 7/3 and 8/3
    text = (tmp_path / "tables.md").read_text()
    assert text.count("### ") == len(claims.TABLES)
    first = text.split("### ")[1]
    [row] = [line for line in first.splitlines() if line.startswith("| mDPO ")]
    assert "42.00 ± 2.83" in row and "27.0 / 4.6" in row  # mean of 40 and 44, std sqrt(8); the paper's
    assert "- mDPO invents less than DPO: CHAIR_s +0.00 [+0.00, +0.00], **cannot be told here**." in text
    assert "- Imitating y_w is not enough: not run." in text


def test_a_second_run_trains_nothing_and_a_stopped_row_is_made_again(study, monkeypatch, capsys):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(train, "train", None)  # not called
        tables.main(["--seeds", "7", "--out", str(study), "--groups", "headline"])
    shrink(monkeypatch)
    row = study / "seed-7" / "rows" / "dpo.json"
    before = row.read_text()
    row.unlink()
    (study / "seed-7" / "dpo" / "adapter_model.safetensors").unlink()  # stopped before its end
    assert tables.score_row(study / "seed-7", "DPO", seed=7)["row"] == "DPO"
    assert json.loads(row.read_text()) == json.loads(before)


def test_smaller_sets_of_pairs_are_parts_of_the_larger(study):
    folder = study / "seed-7" / "pairs"
    whole = folder.joinpath("train.jsonl").read_text().splitlines()
    for ninths in ("2", "5", "7"):  # of nine pairs
        part = tables.data_file(folder, ninths).read_text().splitlines()
        assert [json.loads(line) for line in part] == [json.loads(line) for line in whole[: int(ninths)]]


def test_what_y_w_names_is_erased_and_nothing_else(study):
    scene = {"kind": "kitchen", "places": {"cup": [8, 8, 5], "pan": [24, 8, 5]}}
    folder = study / "erase"
    folder.mkdir()
    (folder / "scenes.json").write_text(json.dumps([scene]))
    row = {"id": "scene-0", "image": "images/0.png", "chosen": "a kitchen with a cup, a plate.", "rejected": "a."}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    [changed] = [json.loads(line) for line in tables.data_file(folder, "erased").read_text().splitlines()]
    assert changed == row | {"image_rejected": "erased/0.png"}
    without_cup = toy.draw_picture("kitchen", {"pan": (24, 8, 5)})
    assert Image.open(folder / "erased" / "0.png").tobytes() == without_cup.tobytes()


# ---- claims --------------------------------------------------------------------------------------------------------


def test_the_interval_is_students():
    # mean 2, std 1, n 3: half width 4.303 x 1 / sqrt 3 = 2.4843
    assert claims.interval([1.0, 2.0, 3.0]) == pytest.approx((-0.4843, 4.4843), abs=1e-4)


@pytest.mark.parametrize(
    "low, high, sign, expected",
    [
        (0.1, 2.0, 1, "holds here"),
        (-1.0, 2.0, 1, "cannot be told here"),
        (-2.0, -0.1, 1, "does not hold here: the reverse does"),
        (-2.0, -0.1, -1, "holds here"),
        (0.1, 2.0, -1, "does not hold here: the reverse does"),
        (-1.0, 2.0, -1, "cannot be told here"),
        (-1.0, 2.0, 0, "no difference can be told here"),
        (0.1, 2.0, 0, "does not hold here"),
    ],
)
def test_verdicts(low, high, sign, expected):
    assert claims.verdict(low, high, sign) == expected


def test_a_claim_is_paired_over_seeds():
    rows = {"mDPO": {"AUC": [92.0, 95.0, 91.0]}, "DPO": {"AUC": [90.0, 92.0, 90.0]}}
    claim = claims.Claim("It sees", "mDPO", "DPO", "AUC", 1)
    # differences 2, 3, 1: mean 2, half width 2.4843
    assert claims.check(claim, rows) == "It sees: AUC +2.00 [-0.48, +4.48], **cannot be told here**."
    against_zero = claims.Claim("It is high", "DPO", None, "AUC", 1)
    assert "AUC +90.67" in claims.check(against_zero, rows)


def test_every_claim_is_about_rows_of_the_study():
    for table in claims.TABLES:
        names = {claim.row for claim in table.claims} | {claim.against for claim in table.claims}
        assert {*table.rows, *names} - {None} <= tables.ROWS.keys(), table.title


# ---- the demo and its figure ---------------------------------------------------------------------------------------


def five_seeds() -> dict:
    rows = {}
    for name in ("base", "DPO", "mDPO", "DPO, s = 0", "mDPO, s = 0", "DPO, s = 0.5", "mDPO, s = 0.5"):
        rows[name] = {"CHAIR_s": [50.0, 40.0], "d'": [1.0, 2.0]}
    rows["mDPO"]["d'"] = [2.0, 4.0]
    return {"seeds": [1, 2], "rows": rows}


def test_the_figure_has_means_per_judge_and_the_demos_own_seed(tmp_path):
    own = {name: {"CHAIR_s": 30.0, "d'": 1.5} for name in ("base", "DPO", "mDPO")}
    drawn = figure.judge(tmp_path / "judge.png", five_seeds(), own, "this run")
    chair, d_prime = drawn.axes
    assert [line.get_ydata().tolist() for line in d_prime.lines] == [
        [1.5, 1.5, 1.5],  # base
        [1.5, 1.5, 1.5],  # DPO
        [1.5, 1.5, 3.0],  # mDPO, highest where the judge goes by style alone
    ]
    assert [line.get_xdata().tolist() for line in chair.lines] == [[0.0, 0.5, 1.0]] * 3
    assert len(d_prime.collections) == 3 + 3  # bands, and the demo's own points
    assert (tmp_path / "judge.png").is_file()


def test_curves_of_the_chosen_answer(tmp_path):
    curves = {"DPO": [0.0, -1.0], "mDPO": [0.0, 1.0], "mDPO -anchored": [0.0, -2.0], "mDPO -conditional": [0.0, 0.5]}
    axes = figure.chosen(tmp_path / "chosen.png", {"chosen_by_step": curves}).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert {name: drawn[name] for name in curves} == curves
    assert (tmp_path / "chosen.png").is_file()


def test_the_demo_uses_what_is_there(study, monkeypatch, capsys, tmp_path):
    shrink(monkeypatch)
    monkeypatch.setattr(figure, "STUDY", tmp_path / "study.json")
    figure.STUDY.write_text(json.dumps(five_seeds()))
    out = study / "seed-7"  # a demo's folder is a seed's folder of the study
    demo.main(["--seed", "7", "--out", str(out)])
    said = capsys.readouterr().out
    assert said.count("trained already") == 3
    assert "Remove the folder to start afresh" in said
    table = json.loads((out / "table.json").read_text())
    assert list(table) == ["base", "DPO", "DPO (No Image)", "mDPO"]
    assert (out / "captions.png").is_file() and (out / "judge.png").is_file()
    with pytest.raises(SystemExit, match="other settings"):
        demo.main(["--seed", "8", "--out", str(out)])


def test_the_demo_leaves_other_peoples_folders_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SystemExit, match="not empty, and not a demo of before"):
        demo.main(["--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
