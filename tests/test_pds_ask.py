"""Questions: joined by id, one a picture, what evals.answers reads."""

import json

import pytest

from evals.questions import read_questions
from pds import ask
from tests.llm_server import serve
from tests.test_pds_rank_images import killed_three_times, write
from tests.test_pds_runner import read


@pytest.fixture
def best(tmp_path, pairs_file):
    """Six chosen pictures, of which one failed."""
    rows = [
        {
            "id": f"art-{i}",
            "topic": "art",
            "caption": f"caption {i}",
            "image": f"{i % 5}.png",
            "guidance": 5.0,
            "scores": {"imagereward": 0.1},
        }
        for i in range(6)
    ]
    rows[4] = {"id": "art-4", "error": "grey"}
    return write(tmp_path / "best.jsonl", rows), tmp_path / "questions.jsonl"


def run(*argv) -> None:
    ask.main([str(word) for word in argv])


def test_templates_know_nothing_of_the_caption(best, pairs_file, capsys):
    file, out = best
    run(file, "--out", out, "--templates")
    rows = read(out)
    assert rows[0] == {"id": "art-4", "error": "grey"}  # passed on first
    assert list(rows[1]) == ["id", "topic", "caption", "image", "prompt"]
    asked = {row["prompt"] for row in rows if "error" not in row}
    assert asked <= set(ask.TEMPLATES) and len(asked) > 2
    assert "5 done (6 rows new), 0 failed, 1 had failed before" in capsys.readouterr().out
    again = out.with_name("again.jsonl")
    run(file, "--out", again, "--templates", "--limit", 3)
    assert read(again) == [row for row in rows if row["id"] in ("art-0", "art-1", "art-2")]
    write(out, [row for row in rows if "error" not in row])
    assert set(read_questions(out, pairs_file.parent).rows) == {f"art-{i}" for i in (0, 1, 2, 3, 5)}


def test_questions_of_a_file_are_joined_by_id(best, capsys):
    """In another order, one missing: the release would give every later picture the question of its neighbour."""
    file, out = best
    mine = write(
        out.with_name("mine.jsonl"), [{"id": f"art-{i}", "prompt": f"<image> What is {i}?"} for i in (5, 3, 0, 1)]
    )
    with pytest.raises(SystemExit) as status:
        run(file, "--out", out, "--questions", mine)
    assert status.value.code == 1
    found = {row["id"]: row.get("prompt") for row in read(out)}
    assert found == {
        "art-0": "What is 0?",
        "art-1": "What is 1?",
        "art-2": None,
        "art-3": "What is 3?",
        "art-4": None,
        "art-5": "What is 5?",
    }
    assert "no question for it in" in capsys.readouterr().out


def test_an_endpoint_writes_one_question_a_caption(best, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-key")
    file, out = best

    def answer(body):
        caption = body["messages"][0]["content"].split("description:\n")[1].split("\n")[0]
        return {"caption 1": "", "caption 2": "word " * 70}.get(caption, f'"How many\nof {caption}?"')

    with serve(answer=answer) as server, pytest.raises(SystemExit):
        run(file, "--out", out, "--endpoint", server.url, "--model", "m")
    rows = {row["id"]: row for row in read(out)}
    assert rows["art-3"]["prompt"] == "How many of caption 3?"
    assert "not one question" in rows["art-1"]["error"] and "not one question" in rows["art-2"]["error"]
    assert len(server.seen) == 5 and {seen.authorization for seen in server.seen} == {"Bearer sk-very-secret-key"}
    for written in (out, out.with_suffix(".settings.json")):
        assert "secret" not in written.read_text() and "127.0.0.1" not in written.read_text()


def test_killed_and_resumed(best):
    file, out = best
    killed_three_times(ask.main, [str(file), "--out", str(out), "--templates", "--batch", "1"], out, seed=4)


def test_three_shards_joined_are_one_run(best):
    file, out = best
    run(file, "--out", out, "--templates")
    joined = []
    for i in range(3):
        run(file, "--out", out.with_name(f"{i}.jsonl"), "--templates", "--shard-index", i, "--shard-count", 3)
        joined += read(out.with_name(f"{i}.jsonl"))
    assert sorted(map(json.dumps, joined)) == sorted(map(json.dumps, read(out)))


@pytest.mark.parametrize("flags", [[], ["--templates", "--questions", "x"], ["--endpoint", "http://h/v1"]])
def test_one_source(best, flags):
    file, out = best
    with pytest.raises(SystemExit) as error:
        run(file, "--out", out, *flags)
    assert error.value.code == 2
