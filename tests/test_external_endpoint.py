"""external/endpoint.py over real HTTP on this machine: what is kept, what is never kept, and what ends a run."""

import argparse
import base64
import json
import sys
import time

import pytest
from llm_server import endpoint_at, serve

from external import endpoint
from external.endpoint import ask_all


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def requests(*keys: str) -> dict[str, dict]:
    return {key: {"model": "m", "messages": [{"role": "user", "content": f"question {key}"}]} for key in keys}


def test_every_failure_is_tried_again(tmp_path, capsys):
    script = ["timeout", (429, {}), (503, {}), "garbage", "half", "no choices", "null", "ok"]
    with serve(script) as server:
        replies = ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url, timeout=0.2))
        assert len(server.seen) == 8
    assert endpoint.reply_text(replies[0]) == "fine"
    assert replies[0]["model"] == "served" and replies[0]["request_model"] == "m" and replies[0]["key"] == "1"
    printed = capsys.readouterr().out  # a wait has its reason
    for reason in ("no whole reply in 0.2 seconds", "HTTP 429", "HTTP 503", "RemoteProtocolError", "no choices"):
        assert reason in printed
    assert printed.count("no reply yet: ") == 7


def test_a_reply_that_the_caller_cannot_read_is_asked_for_again(tmp_path):
    answers = iter(["no list", "[]"])
    with serve(answer=lambda body: next(answers)) as server:
        (reply,) = ask_all(requests("1"), tmp_path / "r.json", json.loads, endpoint_at(server.url))
    assert endpoint.reply_text(reply) == "[]"


def test_a_failing_item_ends_the_run_and_a_second_run_asks_only_for_the_rest(tmp_path):
    path = tmp_path / "deep" / "r.json"
    with serve(["ok", (500, {}), (500, {})]) as server:
        with pytest.raises(SystemExit, match="no usable reply for 2: after 2 tries, last HTTP 500"):
            ask_all(requests("1", "2", "3"), path, str, endpoint_at(server.url, tries=2))
        assert [reply["key"] for reply in json.loads(path.read_text())] == ["1"]
        with pytest.raises(SystemExit, match="2 of 3 replies are missing"):  # scoring alone asks for nothing
            ask_all(requests("1", "2", "3"), path, str, endpoint_at(None, model=None))
        ask_all(requests("1", "2", "3"), path, str, endpoint_at(server.url))
        assert [r.body["messages"][0]["content"][-1] for r in server.seen] == ["1", "2", "2", "2", "3"]
    assert [reply["key"] for reply in json.loads(path.read_text())] == ["1", "2", "3"]
    assert len(ask_all(requests("1", "2", "3"), path, str, endpoint_at(None, model=None))) == 3


def test_several_are_asked_at_once_and_what_is_under_way_when_one_fails_is_kept(tmp_path):
    """Request 2 is refused at once, 1 and 3 take longer and are kept; 4 and 5 are never sent."""
    names = [str(i) for i in range(1, 6)]

    def slow(body) -> str:
        time.sleep(0.3)
        return "fine"

    with serve(answer=slow, script=["ok", (400, {}), "ok"]) as server:
        with pytest.raises(SystemExit, match="HTTP 400"):
            ask_all(requests(*names), tmp_path / "r.json", str, endpoint_at(server.url, parallel=3))
        assert len(server.seen) == 3
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2


def test_saved_replies_to_another_request_or_model_are_refused(tmp_path):
    with serve() as server:
        ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url))
    changed = {"1": {"model": "m", "messages": [{"role": "user", "content": "another answer"}]}}
    for bodies, model in ((changed, "m"), (requests("2"), "m"), (requests("1"), "other")):
        with pytest.raises(SystemExit, match="reply 1 is for other answers, prompt or model"):
            ask_all(bodies, tmp_path / "r.json", str, endpoint_at("http://127.0.0.1:9/v1", model=model))


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["drip", "drip headers"])
def test_a_reply_that_comes_a_byte_at_a_time_ends_at_the_time_limit(tmp_path, behaviour):
    """Every read is quick enough, so a time-out of each read would wait for ever."""
    start = time.monotonic()
    with serve([behaviour] * 2) as server:
        with pytest.raises(SystemExit, match="after 2 tries, last no whole reply in 0.3 seconds"):
            ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url, tries=2, timeout=0.3))
    assert time.monotonic() - start < 3


def test_a_reply_without_an_end_is_not_kept_in_memory(tmp_path):
    with serve(["flood"]) as server:
        with pytest.raises(SystemExit, match="the reply is larger than 16777216 bytes"):
            ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url, tries=1))


# ---- the key -------------------------------------------------------------------------------------------------------

KEY = 'sk-ve"ry/secret+%1'  # JSON, a URL and Python each write this in another way
SPELLINGS = (KEY, json.dumps(KEY)[1:-1], "sk-ve%22ry%2Fsecret%2B%251", base64.b64encode(KEY.encode()).decode())


def test_the_key_is_sent_and_never_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    with serve(["echo", (401, {})], answer=lambda body: " ".join(SPELLINGS)) as server:
        with pytest.raises(SystemExit) as error:
            ask_all(requests("1", "2"), tmp_path / "r.json", str, endpoint_at(server.url))
        assert server.seen[0].authorization == f"Bearer {KEY}"
    assert len(server.seen) == 2 and "HTTP 401" in str(error.value) and "your key is Bearer [key]" in str(error.value)
    printed = "".join(capsys.readouterr())
    kept = str(error.value) + printed + (tmp_path / "r.json").read_text()
    assert [form for form in SPELLINGS if form in kept] == [] and "secret" not in kept


def test_an_echo_in_every_spelling_is_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(answer=lambda body: " ".join(SPELLINGS)) as server:
        (reply,) = ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url))
    assert endpoint.reply_text(reply) == "[key] [key] [key] [key]"


@pytest.mark.parametrize("key", ["sk-SECRETabc123\nsk-OTHERKEY456", "sk-SECRET abc123", "SECRET", "sk-SECR\u00c9Tabc"])
def test_what_cannot_be_one_key_is_refused_unseen(tmp_path, monkeypatch, capsys, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serve() as server:
        with pytest.raises(SystemExit) as error:
            ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url))
    assert server.seen == [] and "OPENAI_API_KEY" in str(error.value)
    assert "SEC" not in str(error.value) + "".join(capsys.readouterr())


def test_without_a_key_none_is_sent(tmp_path):
    with serve() as server:
        ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url))
        assert server.seen[0].authorization is None


def test_a_redirect_is_not_followed_with_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve([(302, {"Location": "/elsewhere"})]) as server:
        with pytest.raises(SystemExit, match="HTTP 302"):
            ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url))
        assert [r.path for r in server.seen] == ["/v1/chat/completions"]


def test_control_characters_of_an_endpoint_do_not_reach_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-12345678")
    assert endpoint.printable("\x1b[2Jbusy\r\nsk-12345678\u202e now") == "[2Jbusy [key] now"


# ---- the address ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions"])
def test_the_url_may_have_the_tail_or_not(tmp_path, tail):
    with serve() as server:
        ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url + tail))
        assert [r.path for r in server.seen] == ["/v1/chat/completions"]


def test_an_url_without_a_scheme_is_refused_at_once(tmp_path):
    with pytest.raises(SystemExit, match="must start with http"):
        ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at("localhost:8000/v1"))


@pytest.mark.parametrize("url", ["http://me:hidden@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=hidden"])
def test_a_password_in_the_address_is_refused_unseen(tmp_path, url):
    with pytest.raises(SystemExit) as error:
        ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(url))
    assert "no user" in str(error.value) and "hidden" not in str(error.value)


def test_the_proxy_of_the_environment_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "other.example")
    with serve() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at("http://nowhere.example/v1"))
        assert [r.path for r in proxy.seen] == ["http://nowhere.example/v1/chat/completions"]
    assert endpoint.proxy_of("http://other.example/v1") is None


@pytest.mark.parametrize(
    "flag, value", [("--tries", "0"), ("--timeout", "0"), ("--timeout", "nan"), ("--parallel", "0")]
)
def test_numbers_out_of_range_end_at_once(flag, value, capsys):
    parser = argparse.ArgumentParser()
    endpoint.add_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([flag, value])
    assert f"argument {flag}: {value}: must be" in capsys.readouterr().err


def test_without_the_package_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SystemExit, match="pip install 'openai"):
        ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at("http://127.0.0.1:9/v1"))


def test_half_of_a_surrogate_pair_in_a_reply_can_be_kept(tmp_path):
    with serve(answer=lambda body: "Rating: 4 \ud83d") as server:
        replies = ask_all(requests("1"), tmp_path / "r.json", str, endpoint_at(server.url))
    assert endpoint.reply_text(replies[0]) == "Rating: 4 ?"
    assert json.loads((tmp_path / "r.json").read_text()) == replies


@pytest.mark.parametrize("name, value", [("http_proxy", "junk"), ("SSL_CERT_FILE", "/none")])
def test_surroundings_that_cannot_be_right_are_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=name.upper()):
        endpoint.check_endpoint("http://host/v1")
