"""Ranking answers: what the judge is given, what comes back, and what is never judged."""

import json
from pathlib import Path

import pytest
import torch

from pds import armorm, rank_responses
from tests.test_pds_rank_images import killed_three_times, write
from tests.test_pds_runner import read

QUESTION = "What is in the picture?"
ANSWERS = {"a": "A red boat on a calm sea.", "b": f"{QUESTION} Two dogs sleep near an old door.", "c": "A tree."}


@pytest.fixture
def command(tmp_path, tiny_judges):
    """Three questions, three answers each, one failed, one empty."""
    rows = []
    for i in range(3):
        for responder, text in ANSWERS.items():
            row = {"id": f"art-{i}", "image": "x.png", "prompt": f"<image> {QUESTION}", "responder": responder}
            rows.append(row | {"answer": text * (i + 1), "finish": "eos", "n_tokens": 5})
    rows[5] = rows[5] | {"answer": ""}
    rows[7] = {"id": "art-2", "responder": "b", "error": "HTTP 500"}
    file, out = write(tmp_path / "answers.jsonl", rows), tmp_path / "ranked.jsonl"
    return [str(file), "--out", str(out), "--armorm", str(tiny_judges / "armorm"), "--batch", "2"], out


def test_what_reaches_the_judge_is_what_is_exported(command, monkeypatch, capsys):
    """No echo and no <image>; the release scores both. An answer that was not given is not judged."""
    args, out = command
    seen, real = [], armorm.Judge.score

    def noting(self, questions, answers):
        seen.extend(zip(questions, answers, strict=True))
        return real(self, questions, answers)

    monkeypatch.setattr(armorm.Judge, "score", noting)
    rank_responses.main(args)
    assert len(seen) == 8 and {question for question, _ in seen} == {QUESTION}
    assert "Two dogs sleep near an old door." in {answer for _, answer in seen}
    rows = {(row["id"], row["responder"]): row for row in read(out)}
    assert rows["art-0", "b"]["answer"] == "Two dogs sleep near an old door."
    assert rows["art-2", "b"] == {"id": "art-2", "responder": "b", "error": "HTTP 500"}
    assert "8 done (9 rows new), 0 failed, 1 had failed before" in capsys.readouterr().out


def test_scores_and_rewards_of_a_row(command, tiny_judges):
    args, out = command
    rank_responses.main(args)
    judge = armorm.load(tiny_judges / "armorm")
    [row] = [row for row in read(out) if (row["id"], row["responder"]) == ("art-0", "a")]
    [judged] = judge.score_ids([judge.chat.ids(QUESTION, ANSWERS["a"])])
    assert row["score"] == pytest.approx(judged.score, abs=1e-5)
    assert list(row["rewards"]) == list(armorm.OBJECTIVES)
    assert list(row["rewards"].values()) == pytest.approx(judged.rewards, abs=1e-5)
    assert row["finish"] == "eos" and row["n_tokens"] == 5
    settings = json.loads(out.with_suffix(".settings.json").read_text())
    assert settings["judge"]["model"].endswith("armorm") and settings["dtype"] == "float32"


def test_an_answer_longer_than_the_judge_reads_is_an_error_row(command):
    args, out = command
    file = Path(args[0])
    rows = read(file)
    rows[0]["answer"] = "boat " * 600
    write(file, rows)
    with pytest.raises(SystemExit) as status:
        rank_responses.main(args)
    assert status.value.code == 1
    [bad] = [row for row in read(out) if "tokens, the judge reads 512" in row.get("error", "")]
    assert (bad["id"], bad["responder"]) == ("art-0", "a") and "score" not in bad


def test_killed_and_resumed(command):
    args, out = command
    args[-1] = "1"
    killed_three_times(rank_responses.main, args, out, seed=1)


def test_three_shards_joined_are_one_run(command):
    args, out = command
    rank_responses.main(args)
    joined = []
    for i in range(3):
        part = out.with_name(f"part-{i}.jsonl")
        rank_responses.main([args[0], "--out", str(part), *args[3:], "--shard-index", str(i), "--shard-count", "3"])
        joined += read(part)
    scores = [{(row["id"], row["responder"]): row.get("score", 9.0) for row in rows} for rows in (joined, read(out))]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


# ---- another judge -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_judges):
    """A Llama with one output, a chat template and a padding token, as transformers writes it."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(tiny_judges / "armorm" / "tokenizer.json")),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="[PAD]",
        model_max_length=256,
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=256,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_any_sequence_classifier_ranks_and_a_batch_is_as_good_as_one(command, classifier):
    args, out = command
    args = [*args[:3], "--classifier", str(classifier), "--batch", "9"]
    rank_responses.main(args)
    together = {(row["id"], row["responder"]): row.get("score") for row in read(out)}
    judge = rank_responses.load_classifier(classifier, torch.float32, "cpu")
    assert judge.max_length == 256
    for row in read(out):
        if "score" in row:
            [(alone, rewards)] = judge.score([QUESTION], [row["answer"]])
            assert together[row["id"], row["responder"]] == pytest.approx(alone, abs=1e-5) and row["rewards"] == {}
            ids = judge.tokenizer(
                f"user: {QUESTION}<|eot_id|>assistant: {row['answer'].strip()}<|eot_id|>", add_special_tokens=False
            )["input_ids"]
            assert judge.ids(QUESTION, row["answer"]) == ids
    judge.pads = False  # no padding token: one at a time, the same scores
    assert judge.score([QUESTION] * 2, ["A tree.", "Two dogs sleep."])[0][0] == pytest.approx(
        judge.score([QUESTION], ["A tree."])[0][0], abs=1e-6
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "wants remote code"),
        ({"num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}}, "no weights for .*score.weight"),
        ({"num_hidden_layers": 2}, r"no weights for .*layers\.1\."),
        ({"model_type": "no-such-model"}, "not a sequence classifier"),
    ],
)
def test_a_classifier_that_cannot_be_trusted_is_refused(classifier, tmp_path, change, message):
    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((classifier / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SystemExit, match=message):
        rank_responses.load_classifier(tmp_path, torch.float32, "cpu")


def test_armorms_own_folder_is_no_classifier(tiny_judges):
    """The library would load its body and give it a random head."""
    with pytest.raises(SystemExit, match="wants remote code"):
        rank_responses.load_classifier(tiny_judges / "armorm", torch.float32, "cpu")
