"""Answers of bases, of transformers' models, of endpoints; and that no failure ever looks like an answer."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from bases.architectures import read_config
from bases.checkpoint import load_base
from bases.hub_files import write_llava_files
from generate import greedy
from pds import candidates, responses
from tests import tiny_models
from tests.llm_server import serve
from tests.test_pds_rank_images import killed_three_times, write
from tests.test_pds_runner import read


@pytest.fixture
def questions(tmp_path):
    """Four questions about four pictures."""
    rows = []
    for i in range(4):
        Image.new("RGB", (30 + 3 * i, 40), (60 * i, 90, 10)).save(tmp_path / f"{i}.png")
        rows.append(
            {"id": f"art-{i}", "image": f"{i}.png", "prompt": f"<image> What is {'there ' * i}?", "topic": "art"}
        )
    return write(tmp_path / "questions.jsonl", rows), tmp_path / "answers.jsonl"


def run(*argv) -> None:
    responses.main([str(word) for word in argv])


def by_responder(out: Path, name: str) -> dict[str, dict]:
    return {row["id"]: row for row in read(out) if row["responder"] == name}


# ---- bases ---------------------------------------------------------------------------------------------------------


def test_a_base_answers_as_generate_does(questions, tiny_generators):
    """Greedily: the plain loop's tokens, one question at a time; with finish and length."""
    file, out = questions
    base = tiny_generators / "base"
    run(file, "--out", out, "--responder", f"a=base:{base}", "--max-new-tokens", 6, "--batch", 3)
    responder = responses.parse_responder(f"a=base:{base}", ["--max-new-tokens=6"])
    processor = responses.Base(responder).processor
    model, _ = load_base(str(base))
    for row in read(file):
        prompt = torch.tensor(processor.prompt_ids(candidates.bare(row["prompt"])))
        ids = greedy(model, prompt, processor.prepare(Image.open(out.parent / row["image"]).convert("RGB")), 6)
        own = by_responder(out, "a")[row["id"]]
        assert own["answer"] == processor.decode(ids) and own["n_tokens"] == len(ids)
        assert own["finish"] == ("eos" if ids[-1] == model.config.eos_id else "length")
        assert {name: own[name] for name in row} == row


def test_another_seed_is_another_responder(questions, tiny_generators):
    file, out = questions
    spec = f"base:{tiny_generators / 'base'}?temperature=1"
    names = ["--responder", f"a={spec}&seed=1", "--responder", f"b={spec}&seed=2", "--responder", f"c={spec}&seed=1"]
    run(file, "--out", out, *names, "--max-new-tokens", 8)
    said = {name: [row["answer"] for row in by_responder(out, name).values()] for name in "abc"}
    assert said["a"] == said["c"] != said["b"] and len(read(out)) == 12
    settings = json.loads(out.with_suffix(".settings.json").read_text())["responders"]
    assert settings["a"]["seed"] == 1 and settings["b"]["temperature"] == 1.0
    with pytest.raises(SystemExit, match="made with other settings:\n  responders"):
        run(file, "--out", out, *names[:4], "--max-new-tokens", 8)


def test_a_missing_picture_is_an_error_row(questions, tiny_generators):
    file, out = questions
    (file.parent / "2.png").unlink()
    with pytest.raises(SystemExit) as status:
        run(file, "--out", out, "--responder", f"a=base:{tiny_generators / 'base'}", "--max-new-tokens", 2)
    assert status.value.code == 1
    rows = by_responder(out, "a")
    assert "missing image" in rows["art-2"]["error"] and "answer" not in rows["art-2"]
    assert all("answer" in rows[f"art-{i}"] for i in (0, 1, 3))


@pytest.mark.parametrize("option", ["?image-mode=crop", ""])
def test_answers_to_another_picture_or_cut_in_another_way_are_not_kept(questions, tiny_generators, option):
    file, out = questions
    spec = f"a=base:{tiny_generators / 'base'}"
    run(file, "--out", out, "--responder", spec, "--max-new-tokens", 2)
    Image.new("RGB", (50, 50)).save(file.parent / "1.png")
    with pytest.raises(SystemExit, match="other settings" if option else "art-1 had another image_sha256"):
        run(file, "--out", out, "--responder", spec + option, "--max-new-tokens", 2)


def test_the_towers_own_weights_are_part_of_what_a_base_is(tmp_path):
    base = tiny_models.write_original(tiny_models.llava(), tmp_path / "base")
    tower = tmp_path / "some-clip"
    responder = responses.parse_responder(f"a=base:{base}?vision-weights={tower}", [])
    before = responses.prepare_base(responder)
    state = torch.load(tower / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor * 2 for name, tensor in state.items()}, tower / "pytorch_model.bin")
    assert responses.prepare_base(responder) != before


def test_a_prompt_that_is_too_long_is_an_error_row(questions, tiny_generators):
    file, out = questions
    rows = [row | {"prompt": "what is it " * 2000} if row["id"] == "art-2" else row for row in read(file)]
    with pytest.raises(SystemExit):
        run(write(file, rows), "--out", out, "--responder", f"a=base:{tiny_generators / 'base'}", "--max-new-tokens", 2)
    failed = [row for row in read(out) if "error" in row]
    assert [row["id"] for row in failed] == ["art-2"] and "the base reads 4096" in failed[0]["error"]


# ---- transformers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library_base(tiny_base, tmp_path_factory):
    """The tiny base as we export it, completed by transformers: the library wants the layers that nothing reads too."""
    from transformers import LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("library")
    config = read_config(tiny_base)
    write_llava_files(tiny_base, folder, config, torch.float32)
    (folder / "model.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes())
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.lm_head.weight.data[config.image_id :] = 0  # our loop never chooses what is no text; the library might
    model.save_pretrained(folder)
    return folder


def test_a_weight_that_is_not_there_is_never_random(questions, tiny_generators):
    file, out = questions
    with pytest.raises(SystemExit, match=r"no weights for model.vision_tower.encoder.layers.3"):
        run(file, "--out", out, "--responder", f"a={tiny_generators / 'base'}")


def test_a_model_of_transformers_is_asked_through_its_chat_template(questions, library_base):
    """The same base, read by transformers: template and picture are ours, so its greedy answers are ours too."""
    file, out = questions
    run(
        file,
        "--out",
        out,
        "--responder",
        f"ours=base:{library_base}",
        "--responder",
        f"theirs={library_base}",
        "--max-new-tokens",
        12,
        "--batch",
        4,
    )
    ours, theirs = by_responder(out, "ours"), by_responder(out, "theirs")
    for key, row in theirs.items():
        assert row["answer"] and "What is" not in row["answer"] and "USER" not in row["answer"]
        assert (row["finish"], row["n_tokens"]) == (ours[key]["finish"], ours[key]["n_tokens"])
        assert row["answer"] == ours[key]["answer"]


def test_without_a_chat_template_it_is_refused(questions, library_base, tmp_path):
    """The release sends the bare line, and LLaVA-1.6 says nothing to it."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in library_base.iterdir():
        if "chat_template" not in file.name:
            (copy / file.name).write_bytes(file.read_bytes())
    file, out = questions
    with pytest.raises(SystemExit, match="no chat template"):
        run(file, "--out", out, "--responder", f"a={copy}")


# ---- endpoints -----------------------------------------------------------------------------------------------------


def test_an_endpoint_gets_the_picture_and_the_bare_question(questions):
    file, out = questions
    with serve(answer=lambda body: "A red boat.\r\nAnd a tree.\n") as server:
        run(file, "--out", out, "--responder", f"q={server.url}#m?temperature=0.5&seed=3", "--max-new-tokens", 9)
    bodies = {seen.body["messages"][0]["content"][1]["text"]: seen.body for seen in server.seen}
    assert set(bodies) == {"What is ?", "What is there ?", "What is there there ?", "What is there there there ?"}
    body = bodies["What is there ?"]
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("m", 0.5, 3, 9)
    kind, _, data = body["messages"][0]["content"][0]["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png" and Image.open(io.BytesIO(base64.b64decode(data))).size == (33, 40)
    assert {row["answer"] for row in read(out)} == {"A red boat.\r\nAnd a tree."}


@pytest.mark.parametrize("usage, tokens", [({"completion_tokens": 4}, 4), (3, None), (None, None)])
def test_a_reply_whose_usage_is_odd_is_an_answer(usage, tokens):
    """Servers differ in what they count."""
    reply = {"choices": [{"message": {"content": "A boat. "}, "finish_reason": "length"}], "usage": usage}
    assert responses.with_answer({"id": 1}, reply) == {
        "id": 1,
        "answer": "A boat.",
        "finish": "length",
        "n_tokens": tokens,
    }


def test_failures_of_an_endpoint_are_error_rows_and_are_tried_again(questions):
    """4xx, garbage, half a body and no content; 429 and 500 are waited for."""
    file, out = questions
    script = [(404, {}), "garbage", (429, {"Retry-After": "0"}), "ok", "null"]
    flags = ["--parallel", 1, "--tries", 2]
    with serve(script, lambda body: "A red boat.") as server:
        with pytest.raises(SystemExit) as status:
            run(file, "--out", out, "--responder", f"q={server.url}#m", "--parallel", 1, "--tries", 1)
        assert status.value.code == 1
        rows = by_responder(out, "q")
        assert [("error" in row, "answer" in row) for row in rows.values()].count((True, False)) >= 3
        assert not any(row.get("answer") == "" for row in rows.values())
        run(file, "--out", out, "--responder", f"q={server.url}#m", *flags, "--retry-failed")
    assert {row["answer"] for row in read(out)} == {"A red boat."} and len(read(out)) == 4


def test_an_endpoint_that_dies_is_not_asked_for_ever(questions):
    """Down after the second reply: what was answered stays, the run ends, --retry-failed completes it elsewhere."""
    file, out = questions
    write(file, [row | {"id": f"{row['id']}-{k}"} for row in read(file) for k in range(5)])
    flags = ["--parallel", 1, "--tries", 1, "--batch", 2]
    with serve(answer=lambda body: "A red boat.") as server:
        url = server.url
        run(file, "--out", out, "--responder", f"q={url}#m", *flags, "--limit", 4)
    with pytest.raises(SystemExit, match="no row of the last batch got a reply"):
        run(file, "--out", out, "--responder", f"q={url}#m", *flags)
    rows = read(out)
    assert len(rows) == 6 and sum("error" in row for row in rows) == 2  # one batch of two, then the end
    with serve(answer=lambda body: "A red boat.") as server:
        run(file, "--out", out, "--responder", f"q={server.url}#m", *flags, "--retry-failed")
    assert len(read(out)) == 20 and not any("error" in row for row in read(out))


# ---- the stage -----------------------------------------------------------------------------------------------------


def test_killed_and_resumed(questions, tiny_generators):
    file, out = questions
    spec = f"base:{tiny_generators / 'base'}?temperature=1"
    args = [
        str(file),
        "--out",
        str(out),
        "--responder",
        f"a={spec}&seed=1",
        "--responder",
        f"b={spec}&seed=2",
        "--max-new-tokens",
        "4",
        "--batch",
        "1",
    ]
    killed_three_times(responses.main, args, out, seed=5)


def test_three_shards_joined_are_one_run(questions, tiny_generators):
    file, out = questions
    flags = ["--responder", f"a=base:{tiny_generators / 'base'}", "--max-new-tokens", 4]
    run(file, "--out", out, *flags)
    joined = []
    for i in range(3):
        run(file, "--out", out.with_name(f"{i}.jsonl"), *flags, "--shard-index", i, "--shard-count", 3)
        joined += read(out.with_name(f"{i}.jsonl"))
    assert sorted(map(json.dumps, joined)) == sorted(map(json.dumps, read(out)))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("llava", "give NAME=SPEC"),
        ("a=http://host/v1", "which model of the endpoint"),
        ("a=base:x?colour=red", "no option colour for this kind, base; known: .*adapter"),
        ("a=base:/no/such/folder", "no checkpoint folder"),
        ("a=/no/such/folder", "neither a folder with a config.json nor a name on the hub"),
    ],
)
def test_a_responder_that_cannot_be_one(questions, spec, message):
    file, out = questions
    with pytest.raises(SystemExit, match=message):
        run(file, "--out", out, "--responder", spec)
    assert not out.exists()


def test_names_are_there_once(questions):
    file, out = questions
    with pytest.raises(SystemExit, match="a name is there twice"):
        run(file, "--out", out, "--responder", "a=http://h/v1#m", "--responder", "a=http://h/v1#n")
