"""What the user brought is used or refused: rejected pictures, system texts, chats and pictures in every layout."""

import base64
import json

import pytest
from format_rows import PNG, Y_L, Y_W, Q, rating, write

from data import SYSTEM
from formats.readers import read_pairs


def say(role: str, text: str) -> dict:
    return {"role": role, "content": text}


LLAVA = [{"from": "human", "value": Q}, {"from": "gpt", "value": Y_W}]
LLAVA_REJECTED = [{"from": "human", "value": Q}, {"from": "gpt", "value": Y_L}]
TEXTS = {"chosen": Y_W, "rejected": Y_L}
LAYOUTS = {
    "mDPO": {"img_path": "a.png", "prompt": Q, **TEXTS},
    "PDS-DPO": {"image": "a.png", "conversations": LLAVA, "rejected_conversations": LLAVA_REJECTED},
    "RLHF-V": {"image": "a.png", "text": json.dumps({"question": Q, **TEXTS})},
    "RLAIF-V": {"image": "a.png", "question": Q, **TEXTS},
    "LLaMA-Factory": {
        "images": ["a.png"],
        "conversations": LLAVA[:1],
        "chosen": LLAVA[1],
        "rejected": LLAVA_REJECTED[1],
    },
    "LLaMA-Factory, OpenAI tags": {
        "images": ["a.png"],
        "messages": [say("user", Q)],
        "chosen": say("assistant", Y_W),
        "rejected": say("assistant", Y_L),
    },
    "ms-swift": {
        "images": ["a.png"],
        "messages": [say("user", Q), say("assistant", Y_W)],
        "rejected_response": Y_L,
    },
    "VLFeedback": {
        "img_path": "a.png",
        "prompt": Q,
        "completions": [
            {"response": Y_W, "annotations": rating("5", "5", "5")},
            {"response": Y_L, "annotations": rating("1", "1", "1")},
        ],
    },
    "TRL": {"images": ["a.png"], "prompt": Q, **TEXTS},
    "TRL, prompt and whole chats": {
        "images": ["a.png"],
        "prompt": Q,
        "chosen": [say("user", Q), say("assistant", Y_W)],
        "rejected": [say("user", Q), say("assistant", Y_L)],
    },
    "TRL, prompt inside": {
        "images": ["a.png"],
        "chosen": [say("user", f"<image>{Q}"), say("assistant", Y_W)],
        "rejected": [say("user", f"<image>{Q}"), say("assistant", Y_L)],
    },
    "plain": {"image": "a.png", "prompt": Q, **TEXTS},
}


def only(folder, row: dict):
    """The pair or the problem that one row becomes."""
    pairs, problems = read_pairs(write(folder, [row], "one.jsonl"))
    return (pairs + problems)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_of_every_layout(name, tmp_path):
    pair = only(tmp_path, LAYOUTS[name])
    assert (pair.prompt, pair.chosen, pair.rejected) == (Q, Y_W, Y_L)
    assert pair.image == tmp_path.resolve() / "a.png" and pair.system == SYSTEM and pair.image_rejected is None


@pytest.mark.parametrize("column", ["image_rejected", "rejected_image", "rejected_images"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_may_bring_m_l(name, column, tmp_path, capsys):
    value = ["b.png"] if column == "rejected_images" else "b.png"
    pair = only(tmp_path, LAYOUTS[name] | {column: value})
    assert pair.image_rejected == tmp_path.resolve() / "b.png"
    out = capsys.readouterr().out
    assert "1 of 1 pair with a rejected image" in out and "not used" not in out


def test_two_rejected_pictures_are_refused(tmp_path):
    problem = only(tmp_path, LAYOUTS["plain"] | {"image_rejected": "b.png", "rejected_image": "c.png"})
    assert problem.reason == "several rejected images"
    assert only(tmp_path, LAYOUTS["plain"] | {"rejected_images": ["b.png", "c.png"]}).reason == "several images"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_system_column_is_used(name, tmp_path, capsys):
    pair = only(tmp_path, LAYOUTS[name] | {"system": "Be brief."})
    assert pair.system == "Be brief."
    assert "1 row with a system text" in capsys.readouterr().out


SYSTEM_MESSAGE = say("system", "Be brief.")
WITH_SYSTEM = {
    "TRL, in the prompt": {"images": ["a.png"], "prompt": [SYSTEM_MESSAGE, say("user", Q)], **TEXTS},
    "TRL, prompt inside": {
        "images": ["a.png"],
        "chosen": [SYSTEM_MESSAGE, *LAYOUTS["TRL, prompt inside"]["chosen"]],
        "rejected": [SYSTEM_MESSAGE, *LAYOUTS["TRL, prompt inside"]["rejected"]],
    },
    "ms-swift": LAYOUTS["ms-swift"] | {"messages": [SYSTEM_MESSAGE, *LAYOUTS["ms-swift"]["messages"]]},
    "LLaVA": {
        "image": "a.png",
        "conversations": [{"from": "system", "value": "Be brief."}, *LLAVA],
        "rejected_conversations": LLAVA_REJECTED,
    },
}


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_message_is_used(name, tmp_path):
    pair = only(tmp_path, WITH_SYSTEM[name])
    assert (pair.system, pair.prompt, pair.chosen, pair.rejected) == ("Be brief.", Q, Y_W, Y_L)


REFUSED = {
    "two system texts": (
        {"images": ["a.png"], "prompt": [SYSTEM_MESSAGE, say("user", Q)], **TEXTS, "system": "Be long."},
        "several system texts in one row",
    ),
    "two questions": (
        LAYOUTS["TRL, prompt and whole chats"] | {"prompt": "Where?"},
        "chosen and rejected answer different questions",
    ),
    "no question": ({"images": ["a.png"], "chosen": [say("assistant", Y_W)], "rejected": Y_L}, "no prompt"),
    "two rounds": (
        LAYOUTS["TRL, prompt inside"] | {"chosen": LAYOUTS["TRL, prompt inside"]["chosen"] * 2},
        "not one question and one answer",
    ),
    "prompt with an answer": (
        LAYOUTS["TRL"] | {"prompt": [say("user", Q), say("assistant", Y_W)]},
        "not one question and one answer",
    ),
    "no answer": (LAYOUTS["TRL"] | {"chosen": [say("user", Q)]}, "not one question and one answer"),
    "tool": (LAYOUTS["TRL"] | {"chosen": [say("tool", "42")]}, "message of an unknown role"),
    "video": (
        LAYOUTS["TRL"] | {"prompt": [say("user", [{"type": "video"}])]},
        "message part is neither text nor a picture",
    ),
    "null answer": (LAYOUTS["plain"] | {"rejected": None}, "row does not fit the file's format"),
    "nested too deeply": (
        {"image": "a.png", "text": "[" * 200_000},
        "row does not fit the file's format",
    ),
    "two pictures": (
        LAYOUTS["TRL"] | {"prompt": [say("user", [{"type": "image", "image": "b.png"}, {"type": "text", "text": Q}])]},
        "a message's picture differs from the image column",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused(name, tmp_path):
    row, reason = REFUSED[name]
    problem = only(tmp_path, row)
    assert problem.reason == reason and problem.where.endswith("one.jsonl:1")


def test_null_and_numbers_are_named_in_words(tmp_path):
    assert only(tmp_path, LAYOUTS["plain"] | {"rejected": None}).detail.startswith("rejected: NoneType")
    assert only(tmp_path, LAYOUTS["plain"] | {"chosen": 3}).detail == "chosen: int where text or messages were wanted"


URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": URL}}, {"type": "image", "image": URL}])
@pytest.mark.parametrize("column", [{}, {"images": []}, {"images": [URL]}], ids=["none", "empty", "the same"])
def test_pictures_inside_messages(part, column, tmp_path):
    user = say("user", [part, {"type": "text", "text": Q}])
    row = {"chosen": [user, say("assistant", Y_W)], "rejected": [user, say("assistant", Y_L)], **column}
    pair = only(tmp_path, row)
    assert (pair.image, pair.prompt, pair.chosen, pair.rejected) == (PNG, Q, Y_W, Y_L)


def test_columns_that_nothing_takes_are_named_once(tmp_path, capsys):
    rows = [LAYOUTS["plain"] | {"preferred": "rejected", "score": i, "id": f"r{i}"} for i in range(3)]
    read_pairs(write(tmp_path, rows, "d.jsonl"))
    assert capsys.readouterr().out.count("columns not used: preferred, score\n") == 1


def test_doubled_ids_and_keys_are_counted(tmp_path, capsys):
    text = json.dumps(LAYOUTS["plain"] | {"id": "r1"})
    doubled = text[:-1] + ', "chosen": "Last"}'
    (tmp_path / "d.jsonl").write_text(f"{text}\n{doubled}\n{text}\n{doubled}\n")
    pairs, problems = read_pairs(tmp_path / "d.jsonl")
    assert [p.chosen for p in pairs] == [Y_W, "Last", Y_W, "Last"] and not problems
    out = capsys.readouterr().out
    assert "note: more than once: 1 id, for example r1" in out
    assert "note: key 'chosen' stands twice in 2 objects; the last one counts" in out


PLACE = {"type": "image"}


@pytest.mark.parametrize(
    "message, reason, detail",
    [
        ({"content": None, "tool_calls": [1]}, "message is not text and pictures alone", "it has tool_calls"),
        ({"content": "A.", "reasoning_content": "Hm."}, "message is not text and pictures alone", "it has reasoning"),
        ({"content": None}, "message is not text and pictures alone", "it has no content"),
        ({"content": [PLACE, PLACE, {"type": "text", "text": "A."}]}, "several images", "2 in one message"),
    ],
)
def test_what_a_message_holds_beside_text_is_refused(message, reason, detail, tmp_path):
    """It was left out without a word: the reasoning before an answer, a second picture's place."""
    row = {"images": ["a.png"], "prompt": Q, "chosen": [{"role": "assistant"} | message], "rejected": Y_L}
    _, (problem,) = read_pairs(write(tmp_path, [row]))
    assert problem.reason == reason and problem.detail.startswith(detail)
