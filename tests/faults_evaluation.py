"""Faults of answers and scores: prompts too long, files edited under a scorer, odd judges, odd surroundings."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import generate
from evals import amber, answers, mmhal, pope, questions, table1
from lab import report
from tests.faults_bench import Bench, Ended, Outcome, call, change_json, fault, holds, refused, used, worst
from tests.faults_endpoint import judge, rating
from tests.faults_files import LABELS, SAID, lines, score
from tests.faults_more import chair, coco
from tests.llm_server import serve

SECTION = "Answers and scores"
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def answered(bench: Bench) -> list[dict]:
    assert bench.ask().status == 0
    return [json.loads(line) for line in bench.answers.read_text().splitlines()]


@fault("E1", SECTION, "a prompt longer than the base was taught to read: generate.py, evals.answers")
def long_prompt(bench: Bench) -> Outcome:
    bench.config(**{"text_config.max_position_embeddings": 200})
    long = "what is it " * 40
    flags = ("--base", bench.base, "--image", bench.folder / "pairs" / "0.png", "--max-new-tokens", 2)
    outcomes = {"generate": refused(call(generate.main, *flags, "--prompt", long), "--prompt", "the base reads 200")}
    rows = [{"id": 1, "image": "0.png", "prompt": "What?"}, {"id": "long", "image": "0.png", "prompt": long}]
    outcomes["answers"] = refused(bench.ask(rows=rows), "q.jsonl", "id long", "200", left=bench.answers)
    return worst(outcomes | {"right": used(call(generate.main, *flags, "--prompt", "What?"))})


@fault("E2", SECTION, "an answers file whose rows were edited: no answer, a number, no length")
def edited_answers(bench: Bench) -> Outcome:
    rows = answered(bench)
    outcomes = {}
    for name, value in (("answer", None), ("answer", 3), ("n_tokens", "x"), ("n_tokens", None), ("finish", 7)):
        bench.answers.write_text(lines([rows[0], rows[1] | {name: value}, rows[2]]))
        outcomes[f"{name} {value}"] = refused(bench.ask(), "a.jsonl:2", "id 1")
    return worst(outcomes)


@fault("E3", SECTION, "a part of torchrun's variables; WORLD_SIZE of a cluster alone; evals.table1 under torchrun")
def ranks(bench: Bench) -> Outcome:
    outcomes = {}
    for variables in ({"RANK": "x"}, {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}):
        with mock.patch.dict(os.environ, variables):
            outcomes[str(variables)] = refused(bench.ask(), "torchrun", left=bench.answers)
    with mock.patch.dict(os.environ, WORLD_SIZE="2"):
        outcomes["WORLD_SIZE"] = used(bench.ask(), "3 answers")
    with mock.patch.dict(os.environ, TORCHRUN):
        ended = call(table1.main, "--base", bench.base, "--data", bench.folder, "--out", bench.out)
    return worst(outcomes | {"table1": refused(ended, "without torchrun")})


@fault(
    "E4", SECTION, "--out and --json that are what the command reads beside its inputs: settings, AMBER's data, COCO's"
)
def over_what_is_read(bench: Bench) -> Outcome:
    outcomes = {"--out a.json": refused(bench.ask("--out", bench.folder / "a.json"), "--out", ".jsonl")}
    asked = bench.write("a.settings.json", '{"id": 1, "image": "0.png", "prompt": "What?"}\n')
    ended = bench.ask("--questions", asked, "--out", bench.folder / "pairs" / "a.jsonl")
    outcomes["questions"] = unharmed(asked, refused(ended, "a.settings.json", "is read by"))
    settings = bench.write("said.settings.json", "{}")
    outcomes["settings"] = unharmed(settings, refused(score(bench, lines(SAID), "--json", settings), "is read by"))
    instances = coco(bench) / "instances_val2014.json"
    ended = chair(bench, [{"image_id": 1, "caption": "A dog."}], "--json", instances)
    outcomes["annotations"] = unharmed(instances, refused(ended, "is read by"))
    words = write_amber(bench) / "safe_words.txt"
    outcomes["safe words"] = unharmed(words, refused(score_amber(bench, "--json", words), "is read by"))
    return worst(outcomes)


def unharmed(file: Path, outcome: Outcome) -> Outcome:
    """The outcome, or that a result was written over the file."""
    overwritten = '"scorer"' in file.read_text() or '"base_sha256"' in file.read_text()
    return Outcome("BUG", f"{file.name} is overwritten") if overwritten else outcome


@fault("E5", SECTION, "POPE: a question_id that is a list, a question that is a number, a label without a text")
def odd_pope(bench: Bench) -> Outcome:
    outcomes = {}
    for change in ({"question_id": [3]}, {"question_id": 1.5}, {"prompt": 3}):
        outcomes[str(change)] = refused(score(bench, lines([*SAID[:3], SAID[3] | change])), "said.jsonl:4")
    said = bench.write("said.jsonl", lines(SAID))
    for change in ({"text": ""}, {"question_id": {}}):
        labels = bench.data([*LABELS[:3], LABELS[3] | change], "labels.jsonl")
        outcomes[f"label {change}"] = refused(call(pope.main, "--answers", said, "--labels", labels), "labels.jsonl:4")
    return worst(outcomes)


# ---- AMBER ---------------------------------------------------------------------------------------------------------

DESCRIBED = {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}


def write_amber(bench: Bench, annotation: dict = DESCRIBED, relation: object = None) -> Path:
    """AMBER's data folder, of one picture."""
    bench.write("amber/annotations.json", json.dumps([annotation]))
    bench.write("amber/relation.json", json.dumps({"dog": ["puppy"]} if relation is None else relation))
    return bench.write("amber/safe_words.txt", "light\n").parent


def score_amber(bench: Bench, *more) -> Ended:
    said = bench.data([{"id": 1, "response": "A dog."}], "am.jsonl")
    return call(amber.main, "--answers", said, "--data", bench.folder / "pairs" / "amber", "--no-tagger", *more)


@fault("E6", SECTION, "AMBER's annotations, related words, similar words of another kind; files that are not its own")
def odd_amber(bench: Bench) -> Outcome:
    outcomes = {}
    described = ({"truth": "dog"}, {"truth": 3}, {"hallu": None}, {"truth": [["dog"]]}, {"type": 3})
    for change in (*described, {"type": "relation"}, {"type": "relation", "truth": "Yes"}):
        write_amber(bench, DESCRIBED | change)
        outcomes[str(change)] = refused(score_amber(bench), "annotations.json", "row 1")
    for related in (3, "puppy", None, [["puppy"]]):
        write_amber(bench, relation={"dog": related})
        outcomes[f"related {related}"] = refused(score_amber(bench), "relation.json", "dog")
    write_amber(bench)
    similar = bench.write("similar.json", '[[["a"], ["b"]]]')
    outcomes["pairs of lists"] = refused(score_amber(bench, "--similarity", similar), "similar.json")
    similar.write_text('{"pairs": [["a", "b"]], "made_with": []}')
    outcomes["made with a list"] = used(score_amber(bench, "--similarity", similar), "an unknown model")
    outcomes["not its own"] = used(score_amber(bench), "annotations.json is not AMBER's published one")
    return worst(outcomes)


@fault("E7", SECTION, "evals.table1 with a file that a scorer cannot read: found before the model is asked")
def unreadable(bench: Bench) -> Outcome:
    data = bench.folder / "benchmarks"
    shutil.copytree(write_amber(bench), data / "AMBER" / "data")
    (data / "AMBER" / "image").mkdir()
    (data / "AMBER" / "data" / "query").mkdir()
    (data / "AMBER" / "data" / "query" / "query_generative.json").write_text("[]")
    (data / "tagger").mkdir()
    for part, content in {"weights": "{}", "tagdict": "{}", "classes": '["NN"]'}.items():
        (data / "tagger" / f"averaged_perceptron_tagger_eng.{part}.json").write_text(content)
    flags = ("--base", bench.base, "--data", data, "--out", bench.out, "--parts", "amber")
    files = {
        "amber_pairs.json": "{",
        "AMBER/data/relation.json": "[]",
        "tagger/averaged_perceptron_tagger_eng.classes.json": "[]",
    }
    outcomes = {}
    with mock.patch.object(table1, "answer", side_effect=AssertionError("the model was asked")):
        for name, content in files.items():
            whole = (data / name).read_text() if (data / name).exists() else "[]"
            (data / name).write_text(content)
            outcomes[name] = refused(call(table1.main, *flags), Path(name).name)
            (data / name).write_text(whole)
    (bench.out).mkdir(exist_ok=True)
    (bench.out / "table1.json").write_text('{"amber-generative": "x"}')
    return worst(outcomes | {"times": refused(call(table1.main, *flags), "table1.json", "delete it")})


@fault("E8", SECTION, "evals.questions: rows that could not be asked, an id twice, file names that are no text")
def odd_benchmark(bench: Bench) -> Outcome:
    good = {"question_id": 1, "image": "1.png", "text": "Is it?", "label": "yes"}
    outcomes = {}
    cases = {"twice": [good, good], "id": [good | {"question_id": 1.5}], "image": [good | {"image": 3}]}
    for name, rows in (cases | {"outside": [good | {"image": "../1.png"}]}).items():
        out = bench.folder / "made" / f"{name}.jsonl"
        ended = call(questions.main, "pope", bench.data(rows, "b.json"), "--out", out)
        outcomes[name] = refused(ended, "b.json", left=out.parent)
    pictures = bench.folder / "pairs"
    flags = ("--out", bench.folder / "q.jsonl", "--prompt")
    for prompt in ("a\ud800", "USER: What? ASSISTANT:"):
        outcomes[repr(prompt)] = refused(call(questions.main, "folder", pictures, *flags, prompt), "id 0.png")
    open(os.fsencode(pictures) + b"/\xff.png", "wb").close()
    outcomes["name"] = refused(call(questions.main, "folder", pictures, *flags, "What?"), "udcff.png")
    return worst(outcomes)


# ---- judges --------------------------------------------------------------------------------------------------------


@fault("E9", SECTION, "MMHal's template without an answer, with contents of another kind; one that was edited")
def odd_template(bench: Bench) -> Outcome:
    outcomes = {}
    changes = ({"image_content": "Vase"}, {"image_content": [{"a": 1}]}, {"question": None}, {"gt_answer": 3})
    for change in changes:
        with odd_record(change):
            outcomes[str(change)] = refused(judge(bench, "http://127.0.0.1:9/v1"), "t.json row 1")
    with serve(answer=rating) as server:
        outcomes["edited"] = used(judge(bench, server.url), "t.json is not the official template")
    return worst(outcomes)


def odd_record(change: dict):
    """The template with its second record changed, as it is read."""
    read = mmhal.files.read_rows

    def changed(path):
        rows = read(path)
        if path.endswith("t.json"):
            rows[1] |= change
        return rows

    return mock.patch.object(mmhal.files, "read_rows", changed)


@fault("E10", SECTION, "replies cut by the judge's limit, with half a surrogate; a connection that is closed")
def odd_judges(bench: Bench) -> Outcome:
    cut = mock.patch.object(mmhal.endpoint, "ask_all", lambda requests, *rest: [reply("I think", "length")] * 96)
    with cut:
        outcomes = {"cut": used(judge(bench, "http://127.0.0.1:9/v1"), "96 replies were cut off")}
    with serve(answer=lambda body: "Rating: 4 \ud83d") as server:
        outcomes["surrogate"] = used(judge(bench, server.url))
    (bench.folder / "reviews.json").unlink()
    with mock.patch("tests.llm_server.BaseHTTPRequestHandler.handle", lambda self: None), serve() as server:
        ended = judge(bench, server.url)
    unsaid = "last ;" in ended.text
    outcomes["closed"] = Outcome("POOR", "no reason") if unsaid else refused(ended, "after 2 tries, last")
    return worst(outcomes)


def reply(text: str, finish: str) -> dict:
    return {"request_model": "m", "choices": [{"message": {"content": text}, "finish_reason": finish}]}


@fault("E11", SECTION, "an address with a line break or half a surrogate; proxies and certificates that are none")
def surroundings(bench: Bench) -> Outcome:
    outcomes = {}
    for address in ("http://host\n/v1", "http://ho st/v1", "http://127.0.0.1:9/\ud800"):
        outcomes[repr(address)] = refused(judge(bench, address), "no blank")
    for name, value in (("HTTP_PROXY", "junk"), ("HTTP_PROXY", "ftp://a:1"), ("SSL_CERT_FILE", "/none")):
        with mock.patch.dict(os.environ, {name: value, "NO_PROXY": "", "no_proxy": ""}):
            os.environ.pop("http_proxy", None)
            outcomes[f"{name} {value}"] = refused(judge(bench, "http://127.0.0.1:9/v1"), name)
    return worst(outcomes)


@fault("E12", SECTION, "an extractor's saved replies that are numbers, null, lists, nested without end")
def odd_lists(bench: Bench) -> Outcome:
    coco(bench)
    rows = [{"image_id": 1, "caption": "There is a nice dog here."}]
    outcomes = {}
    for said in (3, None, ["dog"], "[" * 100_000):
        saved = bench.write("lists.json", json.dumps({"1": said}))
        ended = chair(bench, rows, "--protocol", "objhal", "--replies", saved)
        outcomes[str(said)[:20]] = refused(ended, "lists.json", "image 1")
    return worst(outcomes)


@fault("E13", SECTION, "lab.report: a run whose adapter changed after it was scored, a result with odd settings")
def stale_result(bench: Bench) -> Outcome:
    run = bench.adapter()
    assert bench.ask("--adapter", run).status == 0
    generation = json.loads(bench.answers.with_suffix(".settings.json").read_text())
    result = {"protocol": "p", "metrics": {"accuracy": 0.5}, "generation": generation, "n": 3, "warnings": []}
    (run / "eval_pope.json").write_text(json.dumps(result))
    before = call(report.main, run, "--table")
    change_json(run / "adapter_config.json", {"lora_alpha": 99})
    after = used(call(report.main, run, "--table"), "answers of another adapter", "50.0 (a)")
    fresh = holds(before.status == 0 and "another adapter" not in before.text, "not marked", before.text[-200:])
    (run / "eval_pope.json").write_text(json.dumps(result | {"generation": 3}))
    return worst({"fresh": fresh, "after": after, "odd": refused(call(report.main, run, "--table"), "eval_pope.json")})


@fault("E14", SECTION, "--out and --json that are pipes; a second evals.answers with other beams while one writes")
def places(bench: Bench) -> Outcome:
    pipe = bench.folder / "pipe.jsonl"
    os.mkfifo(pipe)
    outcomes = {"answers": refused(bench.ask("--out", pipe), "pipe.jsonl", "pipe or a device")}
    outcomes["--json"] = refused(score(bench, lines(SAID), "--json", pipe), "pipe.jsonl", "pipe or a device")
    generate_batch, second = answers.generate, []

    def meanwhile(*batch):
        if not second:
            second.append(None)
            second[0] = bench.ask("--beams", 2)
        return generate_batch(*batch)

    with mock.patch.object(answers, "generate", meanwhile):
        outcomes["first"] = used(bench.ask(), "3 of them new")
    return worst(outcomes | {"second": refused(second[0], "another process is writing it")})


@fault("E15", SECTION, "--compare of two judges, and of two decodings: said beside the difference")
def compared(bench: Bench) -> Outcome:
    first, second = (bench.write(name, lines(SAID)) for name in ("a.jsonl", "b.jsonl"))
    for file, beams in ((first, 1), (second, 3)):
        file.with_suffix(".settings.json").write_text(json.dumps({"decoding": {"beams": beams}}))
    ended = call(pope.main, "--compare", first, second, "--labels", bench.data(LABELS, "labels.jsonl"))
    reviews = [bench.write(f"{name}.json", json.dumps([reply("Rating: 4", "stop")] * 96)) for name in "ab"]
    reviews[1].write_text(reviews[1].read_text().replace('"m"', '"n"'))
    judges = call(mmhal.main, "--compare", *reviews)
    both = {
        "decoding": used(ended, "B - A shows that too", "decoding"),
        "judge": used(judges, "judge m, B is", "judge n"),
    }
    return worst(both)
