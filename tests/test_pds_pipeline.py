"""From prompts to a trained step, every stage by its command: undisturbed, and by shards in two processes at once."""

import json
import os

import pytest

import train
from external import files
from lab import pds_demo
from pds import analyse, export, rank_images
from tests.llm_server import serve
from tests.test_pds_runner import read


@pytest.fixture(scope="module")
def models(tiny_judges, tiny_generators, tmp_path_factory):
    """All tiny models in one folder."""
    folder = tmp_path_factory.mktemp("models")
    for source in (*tiny_judges.iterdir(), *tiny_generators.iterdir()):
        (folder / source.name).symlink_to(source)
    return folder


def without_machine(row: dict) -> dict:
    """A row without scores, which a machine that is busy otherwise may round otherwise."""
    return {name: value for name, value in row.items() if name not in ("scores", "score", "rewards")}


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """Two topics, three prompts each, four scales, three responders, one of which fails, echoes, or says nothing."""
    out = tmp_path_factory.mktemp("run")
    with serve([(404, {})], moody) as server:
        with pytest.raises(SystemExit) as status:
            pds_demo.run_stages(out, models, server.url)
        assert status.value.code == 1  # the 404
        failed = [row for row in read(out / "answers.jsonl") if "error" in row]
        assert len(failed) == 1
        run_judge(out, models)
    return out


def moody(body: dict) -> str:
    """In turn: nothing at all, the question again, or an answer after the question."""
    question = body["messages"][0]["content"][1]["text"]
    moody.asked.append(question)
    kinds = ["", question, f"{question} A red boat near two tall trees."]
    return kinds[(len(moody.asked) - 1) % 3]


moody.asked = []


def run_judge(out, models) -> None:
    """What is left of run_stages when a stage ended with a failed row."""
    pds_demo.run(
        pds_demo.rank_responses, out / "answers.jsonl", "--out", out / "ranked.jsonl", "--armorm", models / "armorm"
    )


def test_every_stage_has_its_rows(finished):
    counts = {
        name: len(read(finished / f"{name}.jsonl"))
        for name in ("prompts", "images", "scores", "best", "questions", "answers", "ranked")
    }
    assert counts == {"prompts": 6, "images": 24, "scores": 24, "best": 6, "questions": 6, "answers": 18, "ranked": 18}
    assert {row["topic"] for row in read(finished / "best.jsonl")} == {"art", "school"}
    for row in read(finished / "best.jsonl"):
        assert row["image"].startswith(f"images/{row['id']}-g")


def test_no_failure_and_no_echo_is_a_candidate(finished):
    """The moody endpoint's nothing, its echo and its failure are counted; what came behind an echo is an answer."""
    said = [row for row in read(finished / "ranked.jsonl") if row["responder"] == "q"]
    answer = "A red boat near two tall trees."
    assert sorted(row.get("answer", "failed") for row in said) == ["", "", "", "", answer, "failed"]
    rows = files.read_rows(finished / "ranked.jsonl")
    found = export.make_pairs(rows, export.Rules())
    reasons = found.dropped_answers
    assert reasons["empty"] >= 4 and reasons["failed"] == 1  # and what the untrained bases left empty
    for pair in found.pairs:
        for side in ("chosen", "rejected"):
            assert len(pair[side].split()) >= 3 and not pair[side].startswith(pair["prompt"])
            own = pair["responder_" + side]
            assert own in "ab" or pair[side] == "A red boat near two tall trees."


def test_pairs_figures_and_a_step_of_training(finished, models, tmp_path, capsys):
    export.main([str(finished / "ranked.jsonl"), "--out", str(tmp_path / "pairs")])
    pairs = read(tmp_path / "pairs" / "pairs.jsonl")
    assert len(pairs) >= 2
    card = (tmp_path / "pairs" / "README.md").read_text()
    for stage in ("prompts", "images", "rank_images", "ask", "responses", "rank_responses"):
        assert f"| {stage} | " in card
    assert "| responses | answers.jsonl | 18 | 1 | 0 |" in card
    analyse.main(
        [
            str(finished / "scores.jsonl"),
            str(finished / "ranked.jsonl"),
            "--sheet",
            str(tmp_path / "s.png"),
            "--json",
            str(tmp_path / "a.json"),
        ]
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["images"]["prompts"] == 6 and set(found["answers"]["responders"]) == set("abq")
    train.main(
        [
            "--recipe",
            "pds-dpo",
            "--base",
            str(models / "base"),
            "--out",
            str(tmp_path / "run"),
            "--batch",
            "2",
            "--data",
            str(tmp_path / "pairs" / "pairs.jsonl"),
            "--max-steps",
            "1",
            "--lora-r",
            "2",
            "--workers",
            "0",
        ]
    )
    [line] = read(tmp_path / "run" / "log.jsonl")
    assert line["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_two_processes_by_shards_make_the_same_set(models, tmp_path):
    """Each process runs every stage on its shard, at the same time; joined, all rows are those of one process."""
    with serve(answer=lambda body: pds_demo.sentence(json.dumps(body))) as server:
        whole = tmp_path / "whole"
        pds_demo.run_stages(whole, models, server.url, per_topic=2)
        children = []
        for i in range(2):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    shard = ("--shard-index", i, "--shard-count", 2)
                    pds_demo.run_stages(tmp_path / f"shard-{i}", models, server.url, per_topic=2, more=shard)
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    for name in ("prompts", "images", "scores", "best", "questions", "answers", "ranked"):
        parts = [without_machine(row) for i in range(2) for row in read(tmp_path / f"shard-{i}" / f"{name}.jsonl")]
        wanted = [without_machine(row) for row in read(whole / f"{name}.jsonl")]
        assert sorted(map(json.dumps, parts)) == sorted(map(json.dumps, wanted)), name
    scores = [
        {row["id"]: row["scores"]["imagereward"] for folder in folders for row in read(folder / "scores.jsonl")}
        for folders in ([whole], [tmp_path / "shard-0", tmp_path / "shard-1"])
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    best, _ = rank_images.best_images(read(whole / "scores.jsonl"), "imagereward")
    assert {row["id"] for row in best} == {row["id"] for row in read(whole / "prompts.jsonl")}
