"""Prompts: sources, near-duplicates by hand, numbers that are never used again."""

import json
import random

import pytest

from pds import prompts
from tests.llm_server import serve
from tests.test_pds_rank_images import killed_three_times
from tests.test_pds_runner import read


def run(*argv) -> None:
    prompts.main([str(word) for word in argv])


# ---- near-duplicates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second, near",
    [
        ("a b c d e", "A, b c d e!", True),  # the same words
        ("a b c d e", "a b c d", True),  # 4 of 5: 0.8
        ("a b c d e", "a b c d x", False),  # 4 of 6
        ("a b c d e f g h i", "a b c d e f g h x", True),  # 8 of 10: 0.8
        ("a b c d e f g h", "a b c d e f g x", False),  # 7 of 9: 0.78
        ("a", "b", False),
    ],
)
def test_near_duplicates_by_hand(first, second, near):
    for pair in ((first, second), (second, first)):
        seen = prompts.Seen()
        assert [seen.is_near(caption) for caption in pair] == [False, near]


def test_looking_up_the_rarest_words_finds_what_comparing_all_finds():
    rng = random.Random(0)
    captions = []
    for _ in range(300):
        words = rng.choices("abcdefghijklmnopqrst", k=rng.randrange(1, 16))
        captions.append(" ".join(words))
        captions.append(" ".join(words[1:] + [rng.choice("abcxyz")]))
    kept, plain = [], []
    seen = prompts.Seen()
    for caption in captions:
        if not seen.is_near(caption):
            kept.append(caption)
        words = set(caption.split())
        if not any(5 * len(words & own) >= 4 * len(words | own) for own in plain):
            plain.append(words)
    assert [set(caption.split()) for caption in kept] == plain and 100 < len(kept) < 550


# ---- files and the grammar -----------------------------------------------------------------------------------------


def test_a_text_file_keeps_its_numbers(tmp_path, capsys):
    """The second line is dropped, the third stays number 3; ids name their topic."""
    file, out = tmp_path / "mine.txt", tmp_path / "p.jsonl"
    file.write_text("A red boat on a calm sea.\n\na red BOAT on a calm sea\nTwo dogs  sleep.\n")
    run("--file", file, "--topic", "daily life", "--out", out)
    assert read(out) == [
        {"id": "daily-life-1", "topic": "daily life", "caption": "A red boat on a calm sea."},
        {"id": "daily-life-3", "topic": "daily life", "caption": "Two dogs sleep."},
    ]
    assert "2 done (2 rows new), 0 failed; dropped: 1 near-duplicate in daily life" in capsys.readouterr().out


def test_rows_of_json_bring_their_own_topics(tmp_path):
    file, out = tmp_path / "mine.jsonl", tmp_path / "p.jsonl"
    rows = [
        {"caption": "A red boat.", "topic": "art"},
        {"caption": "Two dogs."},
        {"caption": "A tree.", "topic": "art"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--file", file, "--topic", "school", "--out", out)
    assert [row["id"] for row in read(out)] == ["art-1", "school-1", "art-2"]
    file.write_text('{"caption": "A red boat."}\n')
    with pytest.raises(SystemExit, match=r"mine.jsonl:1: no `topic`"):
        run("--file", file, "--out", tmp_path / "q.jsonl")


def test_the_grammar_draws_the_same_prompts_again(tmp_path):
    run("--grammar", "--per-topic", 20, "--out", tmp_path / "a.jsonl")
    run("--grammar", "--per-topic", 20, "--out", tmp_path / "b.jsonl")
    rows = read(tmp_path / "a.jsonl")
    assert rows == read(tmp_path / "b.jsonl") and 150 < len(rows) <= 200
    assert {row["topic"] for row in rows} == set(prompts.TOPICS) and len({row["caption"] for row in rows}) == len(rows)
    run("--grammar", "--per-topic", 20, "--seed", 1, "--out", tmp_path / "c.jsonl")
    assert read(tmp_path / "c.jsonl") != rows
    with pytest.raises(SystemExit, match="the grammar knows art, culinary"):
        run("--grammar", "--topic", "physics", "--out", tmp_path / "d.jsonl")


def test_three_shards_joined_are_one_run(tmp_path):
    run("--grammar", "--per-topic", 9, "--out", tmp_path / "all.jsonl")
    joined = []
    for i in range(3):
        run("--grammar", "--per-topic", 9, "--out", tmp_path / f"{i}.jsonl", "--shard-index", i, "--shard-count", 3)
        joined += read(tmp_path / f"{i}.jsonl")
    assert sorted(joined, key=str) == sorted(read(tmp_path / "all.jsonl"), key=str)


def test_killed_and_resumed(tmp_path):
    out = tmp_path / "p.jsonl"
    killed_three_times(prompts.main, ["--grammar", "--per-topic", "8", "--out", str(out), "--batch", "1"], out, seed=2)


# ---- an endpoint ---------------------------------------------------------------------------------------------------


def reply(body: dict) -> str:
    """Four usable lines and three that are not, other words for every request."""
    text = body["messages"][0]["content"]
    place = text.split('topic is "')[1].split('"')[0] + text.split("request ")[1].split(":")[0]
    lines = [
        f"{i}. \u201cA {word} {place}x{i} {word}y stands {word}z\u201d" for i, word in enumerate(("red", "blue"), 1)
    ]
    return "\n".join(
        [
            "Here you are:",
            *lines,
            f"- A green {place} in {place}w fog",
            "",
            "too short",
            "w " * 99,
            f"* Three {place}v birds above {place}u roofs",
        ]
    )


def test_an_endpoint_is_asked_per_topic_and_its_lines_are_numbered(tmp_path):
    with serve(answer=reply) as server:
        argv = ["--endpoint", server.url, "--model", "m", "--topic", "art", "--topic", "school", "--per-topic", 40]
        run(*argv, "--out", tmp_path / "p.jsonl")
        assert len(server.seen) == 4  # two topics, two requests of 20 each
        rows = read(tmp_path / "p.jsonl")
        assert [row["id"] for row in rows[:8]] == [
            "art-1",
            "art-2",
            "art-3",
            "art-4",
            "art-21",
            "art-22",
            "art-23",
            "art-24",
        ]
        assert (
            rows[0]["caption"] == "A red art1x1 redy stands redz" and rows[2]["caption"] == "A green art1 in art1w fog"
        )
        bodies = [seen.body for seen in server.seen]
        assert {body["model"] for body in bodies} == {"m"} and len({body["seed"] for body in bodies}) == 2
        run(*argv, "--out", tmp_path / "p.jsonl")
        assert len(server.seen) == 4  # nothing is asked twice


def test_nothing_is_numbered_before_all_replies_are_there(tmp_path):
    """A request that fails stays, an error row beside OUT; --retry-failed asks for it alone."""
    argv = [
        "--model",
        "m",
        "--topic",
        "art",
        "--per-topic",
        40,
        "--out",
        tmp_path / "p.jsonl",
        "--parallel",
        1,
        "--tries",
        1,
    ]
    with serve([(404, {})], reply) as server:
        with pytest.raises(SystemExit) as status:
            run("--endpoint", server.url, *argv)
        assert status.value.code == 1 and not (tmp_path / "p.jsonl").exists()
        errors = [row.get("error", "") for row in read(tmp_path / "p.replies.jsonl")]
        assert sorted(bool(error) for error in errors) == [False, True] and any("HTTP 404" in error for error in errors)
        run("--endpoint", server.url, *argv, "--retry-failed")
        assert len(server.seen) == 3 and len(read(tmp_path / "p.jsonl")) == 8


@pytest.mark.parametrize(
    "flags",
    [[], ["--grammar", "--file", "x"], ["--endpoint", "http://h/v1"], ["--file", "x", "--topic", "a", "--topic", "b"]],
)
def test_one_source(tmp_path, flags):
    with pytest.raises(SystemExit) as error:
        run(*flags, "--out", tmp_path / "p.jsonl")
    assert error.value.code == 2


def test_a_topic_with_fewer_prompts_than_asked_for_is_named(tmp_path, capsys):
    """An endpoint that always writes the same: 2 requests, 1 prompt."""
    flags = ("--model", "m", "--topic", "art", "--per-topic", 40, "--out", tmp_path / "p.jsonl")
    with serve(answer=lambda body: "A red cat sits on a wooden table") as server:
        run("--endpoint", server.url, *flags)
    assert "art: 1 of 40 prompts" in capsys.readouterr().out
