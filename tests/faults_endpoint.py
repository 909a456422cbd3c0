"""Faults of a language model behind an endpoint, as MMHal-Bench's judge: all on loopback."""

import json
import os
import time
from unittest import mock

from evals import mmhal
from tests.faults_bench import Bench, Ended, Outcome, call, fault, holds, refused, used, worst
from tests.llm_server import serve

SECTION = "Endpoints"
KEY = "sk-SECRETabc123"


def judge(bench: Bench, url: str, *more, key: str = KEY) -> Ended:
    """evals.mmhal with 96 made-up answers."""
    template = [{"question": f"Question {i}?", "image_content": ["Vase"], "gt_answer": "A."} for i in range(96)]
    rows = [{"id": i, "prompt": f"Question {i}?", "answer": f"Answer {i}"} for i in range(96)]
    files = {"--answers": bench.data(rows, "a.jsonl"), "--template": bench.write("t.json", json.dumps(template))}
    files |= {"--prompt": bench.write("p.txt", "{} {} {} {}"), "--reviews": bench.folder / "reviews.json"}
    flags = [word for pair in files.items() for word in pair]
    asked = ("--judge", url, "--judge-model", "m", "--parallel", 1, "--tries", 2, "--timeout", 2)
    with mock.patch.dict(os.environ, {"OPENAI_API_KEY": key}):
        return call(mmhal.main, *flags, *asked, *more)


def rating(body: dict) -> str:
    return "Rating: 4"


@fault("113", SECTION, "garbage bytes, half a reply, no choices, content null")
def odd_replies(bench: Bench) -> Outcome:
    outcomes = {}
    for behaviour in ("garbage", "half", "no choices", "null"):
        with serve([behaviour] * 4) as server:
            outcomes[behaviour] = refused(judge(bench, server.url), "no usable reply for 0", "after 2 tries")
    return worst(outcomes)


@fault("116", SECTION, "an empty reply")
def empty_reply(bench: Bench) -> Outcome:
    with serve(answer=lambda body: " ") as server:
        return refused(judge(bench, server.url), "an empty reply")


@fault("117", SECTION, "nobody listens")
def closed(bench: Bench) -> Outcome:
    return refused(judge(bench, "http://127.0.0.1:9/v1"), "127.0.0.1:9")


@fault("118", SECTION, "an answer that does not come in time; one that drips a byte now and then")
def slow_replies(bench: Bench) -> Outcome:
    outcomes = {}
    for behaviour in ("timeout", "drip", "drip headers"):
        began = time.monotonic()
        with serve([behaviour] * 4) as server:
            ended = judge(bench, server.url, "--timeout", 0.4)
        outcomes[behaviour] = refused(ended, "no whole reply in 0.4 seconds")
        if time.monotonic() - began > 20:
            outcomes[behaviour] = Outcome("BUG", "far beyond the time-out")
    return worst(outcomes)


@fault("120", SECTION, "a reply of gigabytes")
def flood(bench: Bench) -> Outcome:
    with serve(["flood"] * 4) as server:
        return refused(judge(bench, server.url, "--timeout", 20), "larger than")


@fault("121", SECTION, "429 with Retry-After, then a reply: obeyed, said")
def too_many(bench: Bench) -> Outcome:
    with serve([(429, {"Retry-After": "1"})], rating) as server:
        ended = used(judge(bench, server.url), "429", "Retry-After 1")
        waited = server.seen[1].time - server.seen[0].time
    return ended if waited >= 0.9 else Outcome("BUG", f"asked again after {waited:.1f} s")


@fault("122", SECTION, "302 to file:///etc/passwd, 307 to another host: not followed, the key stays")
def redirects(bench: Bench) -> Outcome:
    outcomes = {}
    with serve() as other:
        for status, place in ((302, "file:///etc/passwd"), (307, other.url), (302, other.url)):
            with serve([(status, {"Location": place})] * 4) as server:
                outcomes[f"{status} {place}"] = refused(judge(bench, server.url), f"HTTP {status}")
        if other.seen:
            return Outcome("BUG", "the other host was asked")
    return worst(outcomes)


@fault("123", SECTION, "a 401 that echoes the key; a reply that echoes it")
def echoes(bench: Bench) -> Outcome:
    outcomes, texts = {}, ""
    with serve([(401, {})]) as server:
        ended = judge(bench, server.url)
        texts += ended.text
        outcomes["401"] = refused(ended, "HTTP 401", "[key]")
    with serve(["echo"] * 200) as server:
        ended = judge(bench, server.url)
        texts += ended.text + (bench.folder / "reviews.json").read_text()
        outcomes["reply"] = used(ended)
    return Outcome("BUG", "the key is shown") if KEY in texts else worst(outcomes)


@fault("124", SECTION, "a key of two lines, of three letters, with a blank, not ASCII")
def odd_keys(bench: Bench) -> Outcome:
    outcomes = {}
    for key in (f"{KEY}\nsk-OTHERKEY456", "abc", f"{KEY} x", f"{KEY}é"):
        with serve() as server:
            ended = judge(bench, server.url, key=key)
        outcomes[repr(key[-4:])] = refused(ended, "OPENAI_API_KEY")
        if KEY in ended.text or "abc" in ended.text:
            outcomes[repr(key[-4:])] = Outcome("BUG", "the key is shown")
    return worst(outcomes)


@fault("125", SECTION, "ESC sequences in a reply")
def escapes(bench: Bench) -> Outcome:
    with serve(answer=lambda body: "\x1b[2J\x1b]0;x\x07 Rating: 4") as server:
        ended = judge(bench, server.url)
    return Outcome("BUG", "raw on the terminal") if "\x1b" in ended.text else used(ended)


@fault("126", SECTION, "500 in mid-run, then the same command: what is paid is kept")
def goes_on(bench: Bench) -> Outcome:
    with serve([*["ok"] * 5, (500, {}), (500, {})], rating) as server:
        first = refused(judge(bench, server.url), "500", "run again")
        again = used(judge(bench, server.url))
        asked = len(server.seen)
    outcome = worst({"first": first, "again": again})
    return outcome if asked == 98 else Outcome("BUG", f"{asked} requests, not 96 and the two that failed")


@fault("127", SECTION, "no rating in any reply")
def no_rating(bench: Bench) -> Outcome:
    with serve() as server:
        return used(judge(bench, server.url), "96 replies without exactly one rating, counted as 0")


@fault("128", SECTION, "--tries 0, --parallel 0, --timeout 0, nan")
def odd_flags(bench: Bench) -> Outcome:
    cases = (("--tries", 0), ("--tries", -1), ("--parallel", 0), ("--timeout", 0), ("--timeout", "nan"))
    return worst({f"{flag} {n}": refused(judge(bench, "http://127.0.0.1:9", flag, n), flag) for flag, n in cases})


@fault("129", SECTION, "reviews cut, a list of texts, of other answers")
def odd_reviews(bench: Bench) -> Outcome:
    with serve(answer=rating) as server:
        first = used(judge(bench, server.url))
        reviews = bench.folder / "reviews.json"
        whole = reviews.read_text()
        outcomes = {"first": first}
        texts = {"cut": whole[:-100], "texts": '["a"]', "others": whole.replace('"request_sha256": "', "\\g<0>0", 1)}
        texts["others"] = whole.replace('"request_sha256": "', '"request_sha256": "0', 1)
        for name, text in texts.items():
            reviews.write_text(text)
            outcomes[name] = refused(judge(bench, server.url), "reviews.json")
    return worst(outcomes)


@fault("130b", SECTION, "--json that would overwrite the paid replies")
def json_over_reviews(bench: Bench) -> Outcome:
    with serve(answer=rating) as server:
        used(judge(bench, server.url))
        before = (bench.folder / "reviews.json").read_text()
        ended = refused(judge(bench, server.url, "--json", bench.folder / "reviews.json"), "is read by")
    return ended if (bench.folder / "reviews.json").read_text() == before else Outcome("BUG", "overwritten")


@fault("131", SECTION, "--judge file://, ftp://, a path, with a password")
def odd_addresses(bench: Bench) -> Outcome:
    outcomes = {}
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/v1", "localhost:8000", "http://me:secret@127.0.0.1:9/v1"):
        ended = judge(bench, url)
        outcomes[url] = refused(ended, "endpoint")
        if "secret" in ended.text:
            outcomes[url] = Outcome("BUG", "the password is shown")
    return worst(outcomes)


@fault("118b", SECTION, "reviews that cannot be written: found before the first paid reply")
def no_place(bench: Bench) -> Outcome:
    with serve(answer=rating) as server:
        ended = refused(judge(bench, server.url, "--reviews", "/proc/none/r.json"), "r.json")
        paid = len(server.seen)
    return holds(ended.verdict == "OK" and not paid, ended.says, f"{paid} paid; {ended.says}")
