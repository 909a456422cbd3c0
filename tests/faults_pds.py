"""Faults of the pds room: inputs of another stage, numbers that are none, paths that leave the folder, files exchanged.

Only what happens before a model is loaded, and the stages that need none.
"""

from pathlib import Path

from pds import analyse, export, images, prompts, rank_images, rank_responses, responses
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
    rows = [{"id": f"a-g{g}", "prompt_id": "a", "topic": "t", "caption": "a cat", "guidance": g, "image": "1.png",
             "scores": {"imagereward": 0.1 * g}} for g in (5.0, 7.0)]  # fmt: skip
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
