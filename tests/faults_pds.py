"""Faults of the pds room: inputs of another stage, numbers that are none, paths that leave the folder, files exchanged.

Only what happens before a model is loaded, and the stages that need none.
"""

from pathlib import Path

from pds import analyse, ask, export, images, prompts, rank_images, rank_responses, responses, tiny
from tests.faults_bench import Bench, Outcome, call, fault, holds, refused, used, worst

SECTION = "PDS-DPO's stages"
ANSWERS = [
    {"id": "a", "prompt": "What is it?", "responder": "x", "answer": "It is a red square.", "score": 0.2},
    {"id": "a", "prompt": "What is it?", "responder": "y", "answer": "It is a blue ball.", "score": 0.1},
]


def write(bench: Bench, rows: list[dict], name: str = "in.jsonl") -> Path:
    return bench.data(rows, name)


def answers(bench: Bench, **changes) -> Path:
    """Two ranked answers about a picture, the second of them changed."""
    rows = [row | {"image": "1.png"} for row in ANSWERS]
    return write(bench, [rows[0], rows[1] | changes])


def stages(bench: Bench) -> dict:
    """name -> (main, the flags it needs beside IN)."""
    out = ("--out", bench.folder / "pairs" / "out.jsonl")
    return {
        "images": (images.main, (*out, "--images", bench.folder / "pairs")),
        "rank_images": (rank_images.main, (*out, "--imagereward", bench.folder / "none")),
        "responses": (responses.main, (*out, "--responder", f"x={bench.base}")),
        "rank_responses": (rank_responses.main, (*out, "--armorm", bench.folder / "none")),
        "export": (export.main, ("--out", bench.out)),
        "analyse": (analyse.main, ()),
    }


@fault("P1", SECTION, "each stage with an input that is missing, empty, cut, a list of numbers, of another stage")
def inputs(bench: Bench) -> Outcome:
    outcomes = {}
    for name, (main, flags) in stages(bench).items():
        for content in ("", '{"id": 1', "[1, 2]\n", "3\n", '{"other": 1}\n', '{"id": "a"}\n'):
            file = bench.write("in.jsonl", content)
            outcomes[f"{name} {content!r}"] = refused(call(main, file, *flags), "in.jsonl")
        outcomes[f"{name} missing"] = refused(call(main, bench.folder / "none.jsonl", *flags), "none.jsonl")
        outcomes[f"{name} a folder"] = refused(call(main, bench.folder / "pairs", *flags), "pairs")
    return worst(outcomes)


@fault("P2", SECTION, "models that are not there; --out that is a folder, or cannot be written")
def places(bench: Bench) -> Outcome:
    rows = write(bench, [{"id": "a", "topic": "t", "caption": "a cat"}])
    pictures = write(
        bench,
        [{"id": "a", "prompt_id": "a", "topic": "t", "caption": "a cat", "guidance": 7.0, "image": "1.png"}],
        "p.jsonl",
    )
    asked = write(bench, [{"id": "a", "image": "1.png", "prompt": "What is it?"}], "q.jsonl")
    out = ("--out", bench.folder / "o.jsonl")
    outcomes = {
        "pipeline": refused(call(images.main, rows, *out, "--model", bench.folder / "none"), "none"),
        "imagereward": refused(call(rank_images.main, pictures, *out, "--imagereward", bench.folder / "none"), "none"),
        "clip": refused(
            call(rank_images.main, pictures, *out, "--scorer", "clip", "--clip", bench.folder / "none"), "none"
        ),
        "responder": refused(call(responses.main, asked, *out, "--responder", f"x={bench.folder / 'none'}"), "none"),
        "responder without a name": refused(call(responses.main, asked, *out, "--responder", "none"), "--responder"),
        "armorm": refused(call(rank_responses.main, answers(bench), *out, "--armorm", bench.folder / "none"), "none"),
        "a folder": refused(call(prompts.main, "--grammar", "--out", bench.folder), "--out"),
        "not writable": refused(call(prompts.main, "--grammar", "--out", "/proc/none/o.jsonl"), "o.jsonl"),
    }
    return worst(outcomes)


@fault(
    "P3",
    SECTION,
    "export: scores that are NaN, text, equal; a picture cut, missing, outside; too few pairs for --sizes",
)
def odd_answers(bench: Bench) -> Outcome:
    bench.write("cut.png", bench.picture()[:60])
    cases = {
        "NaN": ({"score": float("nan")}, "1 failed"),
        "infinite": ({"score": float("inf")}, "1 failed"),
        "text": ({"score": "0.1"}, "1 failed"),
        "true": ({"score": True}, "1 failed"),
        "equal": ({"score": 0.2}, "1 tie"),
        "empty": ({"answer": "  "}, "1 empty"),
        "number": ({"answer": 3}, "1 failed"),
        "half a surrogate": ({"answer": "half a pair \ud83d here"}, "in.jsonl"),
    }
    outcomes = {}
    for name, (changes, word) in cases.items():
        outcomes[name] = refused(call(export.main, answers(bench, **changes), "--out", bench.out), word, left=bench.out)
    for image in ("cut.png", "none.png", "../../../etc/passwd", "/etc/passwd"):
        both = write(bench, [row | {"image": image} for row in ANSWERS])
        ended = call(export.main, both, "--out", bench.out)
        outcomes[image] = refused(ended, "no pair", left=bench.out)
    sizes = call(export.main, answers(bench), "--out", bench.folder / "o2", "--sizes", 5)
    outcomes["--sizes"] = refused(sizes, "--sizes 5")
    return worst(outcomes | {"right": used(call(export.main, answers(bench), "--out", bench.out), "1 pairs")})


@fault("P4", SECTION, "the same --out with other settings, another input, a torn line, a row twice")
def other_settings(bench: Bench) -> Outcome:
    out = bench.folder / "o.jsonl"

    def make(*more):
        return call(prompts.main, "--grammar", "--topic", "art", "--per-topic", 3, "--out", out, *more)

    outcomes = {"first": used(make())}
    whole = out.read_bytes()
    outcomes["seed"] = refused(make("--seed", 1), "seed")
    out.write_bytes(whole[:-5])
    outcomes["torn"] = used(make(), "cut off")
    outcomes["the same file"] = holds(out.read_bytes() == whole, "equal", "another file")
    out.write_bytes(whole + whole.splitlines(keepends=True)[0])
    outcomes["twice"] = refused(make(), "twice")
    out.write_bytes(whole)
    out.with_suffix(".settings.json").write_text("[]")
    outcomes["settings of something else"] = refused(make(), "o.settings.json")
    out.with_suffix(".settings.json").unlink()
    outcomes["no settings"] = refused(make(), "o.settings.json")
    return worst(outcomes)


@fault(
    "P5",
    SECTION,
    "numbers that are none: --guidance nan, --temperature -1, --min-words -1; no source",
)
def odd_numbers(bench: Bench) -> Outcome:
    rows = write(bench, [{"id": "a", "topic": "t", "caption": "a cat"}])
    asked = write(bench, [{"id": "a", "image": "1.png", "prompt": "What is it?"}], "q.jsonl")
    out = ("--out", bench.folder / "o.jsonl")
    named = ("--images", bench.folder / "pairs")
    outcomes = {
        "guidance nan": refused(call(images.main, rows, *out, *named, "--guidance", "nan"), "--guidance"),
        "guidance -1": refused(call(images.main, rows, *out, *named, "--guidance", "-1"), "--guidance"),
        "temperature -1": refused(
            call(responses.main, asked, *out, "--responder", f"x={bench.base}", "--temperature", "-1"), "temperature"
        ),
        "temperature nan": refused(
            call(responses.main, asked, *out, "--responder", f"x={bench.base}", "--temperature", "nan"), "temperature"
        ),
        "max-new-tokens": refused(
            call(responses.main, asked, *out, "--responder", f"x={bench.base}", "--max-new-tokens", 10**9),
            "max-new-tokens",
        ),
        "min-words": refused(call(export.main, answers(bench), "--out", bench.out, "--min-words", -1), "--min-words"),
        "min-margin nan": refused(
            call(export.main, answers(bench), "--out", bench.out, "--min-margin", "nan"), "--min-margin"
        ),
        "topic": refused(call(prompts.main, "--grammar", "--topic", "", *out), "--topic"),
        "no source": refused(call(prompts.main, *out), "one source"),
        "endpoint": refused(call(prompts.main, "--endpoint", "file:///etc/passwd", "--model", "m", *out), "file:"),
    }
    return worst(outcomes)


@fault("P6", SECTION, "analyse: rows without scores, all failed, NaN; --json and --sheet in a folder that is none")
def odd_analysis(bench: Bench) -> Outcome:
    rows = [
        {
            "id": f"a-g{g}",
            "prompt_id": "a",
            "topic": "t",
            "caption": "a cat",
            "guidance": g,
            "image": "1.png",
            "scores": {"imagereward": 0.1 * g},
        }
        for g in (5.0, 7.0)
    ]
    good = write(bench, rows, "good.jsonl")
    odd = write(bench, [row | {"scores": {"imagereward": float("nan")}} for row in rows], "nan.jsonl")
    texts = write(bench, [row | {"scores": "high"} for row in rows], "texts.jsonl")
    failed = write(bench, [{"id": "a", "error": "no"}], "failed.jsonl")
    nowhere = "/proc/none/x.json"
    outcomes = {
        "right": used(call(analyse.main, good)),
        "NaN": refused(call(analyse.main, odd), "no imagereward score"),
        "texts": refused(call(analyse.main, texts), "texts.jsonl"),
        "all failed": refused(call(analyse.main, failed), "failed.jsonl"),
        "--json": refused(call(analyse.main, good, "--json", nowhere), nowhere),
        "--sheet": refused(call(analyse.main, good, "--sheet", "/proc/none/x.png"), "x.png"),
        "--sheet of answers": refused(call(analyse.main, answers(bench), "--sheet", bench.folder / "s.png"), "--sheet"),
    }
    return worst(outcomes)


CANDIDATE = {"prompt_id": "a", "topic": "t", "caption": "a cat", "guidance": 5.0, "image": "1.png"}
CANDIDATES = [{"id": "a/g5"} | CANDIDATE, {"id": "a/g7"} | CANDIDATE | {"guidance": 7.0}]


def unharmed(file: Path, before: bytes, outcome: Outcome) -> Outcome:
    """The outcome, or that the file is not what it was."""
    return outcome if file.read_bytes() == before else Outcome("BUG", f"{file.name} is overwritten")


@fault("P7", SECTION, "--best and --json that are IN or OUT, --sheet of another kind, a scorer called ../x, NaN")
def outputs_over_inputs(bench: Bench) -> Outcome:
    folder = bench.folder / "judge"
    tiny.write_imagereward(folder)
    rows, out = write(bench, CANDIDATES), bench.folder / "s.jsonl"

    def rank(*more, file: Path = rows):
        return call(rank_images.main, file, "--out", out, "--imagereward", folder, *more)

    outcomes = {"right": used(rank())}
    for name, file in (("--best IN", rows), ("--best OUT", out)):
        before = file.read_bytes()
        outcomes[name] = unharmed(file, before, refused(rank("--best", file), file.name))
    outcomes["--best .txt"] = refused(rank("--best", out.with_suffix(".txt")), "--best")
    outcomes["--best nowhere"] = refused(rank("--best", "/proc/none/b.jsonl"), "b.jsonl")
    outcomes["--min-score nan"] = refused(rank("--best", out.with_stem("b"), "--min-score", "nan"), "--min-score")
    for name, changes in (
        ("a list", {"scores": [1]}),
        ("../", {"scores": {"/../../x": 1}}),
        ("NaN", {"guidance": float("nan")}),
    ):
        odd = write(bench, [CANDIDATES[0] | changes], "odd.jsonl")
        outcomes[name] = refused(rank("--out", bench.folder / "odd.jsonl", file=odd), "odd.jsonl")
    before = out.read_bytes()
    outcomes["--json IN"] = unharmed(out, before, refused(call(analyse.main, out, "--json", out), "s.jsonl"))
    outcomes["--sheet .xyz"] = refused(call(analyse.main, out, "--sheet", bench.folder / "s.xyz"), "--sheet")
    outcomes["two files of a kind"] = refused(call(analyse.main, out, out), "cat")
    for line in ('{"x": 1}\n', "[1]\n", '{"id": "a/g5"}\n'):
        out.write_text(line)
        outcomes[f"OUT edited: {line}"] = refused(rank(), "s.jsonl:1")
    return worst(outcomes)


@fault("P8", SECTION, "analyse and export: rows that lack a key, two questions under one id, a question that failed")
def lacking_keys(bench: Bench) -> Outcome:
    scored = [row | {"scores": {"clip": 0.1}} for row in CANDIDATES]
    outcomes = {}
    for name, odd in (("guidance", {"guidance": "x"}), ("topic", {"topic": None})):
        outcomes[name] = refused(call(analyse.main, write(bench, [scored[0], scored[1] | odd])), "in.jsonl", name)
    for name, odd in (("prompt", {"prompt": 3}), ("responder", {"responder": None})):
        outcomes[name] = refused(call(analyse.main, write(bench, [ANSWERS[0], ANSWERS[1] | odd])), "in.jsonl", name)
    failed_question = [{"id": "b", "error": "no reply", "responder": name} for name in "xy"]
    outcomes["failed question"] = used(call(analyse.main, write(bench, [*ANSWERS, *failed_question])))
    for main, flags in ((analyse.main, ()), (export.main, ("--out", bench.out))):
        for name, odd in (("prompt", {"prompt": "Where?"}), ("image", {"image": "2.png"})):
            outcomes[f"{main.__module__}: another {name}"] = refused(call(main, answers(bench, **odd), *flags), "id a")
    return worst(outcomes)


@fault(
    "P9", SECTION, "export into a folder with a README.md of something else, over an older set; settings that are none"
)
def odd_exports(bench: Bench) -> Outcome:
    own = bench.folder / "own"
    own.mkdir()
    (own / "README.md").write_text("my thesis")
    outcomes = {"README": refused(call(export.main, answers(bench), "--out", own), "README.md")}
    outcomes["kept"] = holds((own / "README.md").read_text() == "my thesis", "kept", "README.md is overwritten")
    outcomes["--sizes"] = refused(
        call(export.main, answers(bench), "--out", bench.out, "--sizes", 5), "5", left=bench.out
    )
    outcomes["with a subset"] = used(call(export.main, answers(bench), "--out", bench.out, "--sizes", 1))
    outcomes["without"] = used(call(export.main, answers(bench, answer="It is something else."), "--out", bench.out))
    stale = (bench.out / "pairs-1.jsonl").exists()
    outcomes["the old subset"] = holds(not stale, "gone", "pairs-1.jsonl is of the older set")
    beside = bench.write("in.settings.json", '{"in": 3}')
    outcomes["settings of a number"] = used(call(export.main, answers(bench), "--out", bench.folder / "o2"))
    beside.write_text("{")
    broken = call(export.main, answers(bench), "--out", bench.folder / "o3")
    outcomes["settings cut"] = refused(broken, "in.settings.json", left=bench.folder / "o3")
    return worst(outcomes)


@fault(
    "P10",
    SECTION,
    "the questions edited before the same command; two for one id; answers as questions; an option twice",
)
def odd_questions(bench: Bench) -> Outcome:
    best = write(bench, [{"id": "a", "topic": "t", "caption": "a cat", "image": "1.png"}], "best.jsonl")
    out = ("--out", bench.folder / "q.jsonl")

    def asked(*texts: str):
        rows = [{"id": "a", "prompt": text, "responder": str(i)} for i, text in enumerate(texts)]
        return call(ask.main, best, *out, "--questions", write(bench, rows, "mine.jsonl"))

    outcomes = {"two": refused(asked("What?", "Where?"), "mine.jsonl", "two questions")}
    outcomes["right"] = used(asked("What?"))
    outcomes["edited"] = refused(asked("Where?"), "other settings")

    def respond(rows: list[dict], spec: str):
        return call(responses.main, write(bench, rows), "--out", bench.folder / "r.jsonl", "--responder", spec)

    question = {"id": "a", "image": "1.png", "prompt": "What is it?"}
    base = f"x=base:{bench.base}?max-new-tokens=4"
    outcomes["answers"] = refused(respond([question | {"responder": "z"}], base), "answers already")
    outcomes["option twice"] = refused(respond([question], f"{base}&max-new-tokens=5"), "twice")
    outcomes["no processor"] = refused(respond([question], f"x={bench.base}"), "no processor")
    return worst(outcomes)
