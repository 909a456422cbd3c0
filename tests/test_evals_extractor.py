"""What an extractor's reply lists, and which replies list nothing. Over HTTP: tests/test_eval_chair.py."""

import json

import pytest

from evals import extractor
from evals.extractor import reply_objects
from tests.llm_server import endpoint_at


@pytest.mark.parametrize(
    "reply, names",
    [
        ('["dog", "hot dogs"]', ["dog", "hot dogs"]),
        ("[]", []),
        ('Here it is:\n["dog"]', ["dog"]),
        ('```json\n["dog",\n "cat"]\n```', ["dog", "cat"]),
    ],
)
def test_reply_parser(reply, names):
    assert reply_objects(reply) == names


@pytest.mark.parametrize("reply", ["", "a dog", "Objects: []", '["dog"]\nThat is all.', '{"a": 1}', "[1]", '["dog'])
def test_unreadable_replies_are_refused(reply):
    with pytest.raises(ValueError):
        reply_objects(reply)


@pytest.mark.parametrize("saved", [3, None, ["dog"], "[" * 100_000])
def test_a_saved_reply_that_is_no_list_is_named(tmp_path, saved):
    file = tmp_path / "replies.json"
    file.write_text(json.dumps({"42": saved}))
    rows = [{"answer": "There is a dog here."}]
    with pytest.raises(SystemExit, match="replies.json: the reply for image 42 has no list of objects"):
        extractor.extract(rows, [42], str(file), endpoint_at(None))
