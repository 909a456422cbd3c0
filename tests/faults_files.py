"""Faults in files between commands: answers, questions, labels, archives, and what is exchanged under them."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

from PIL import Image
from safetensors.torch import load_file, save_file

from evals import answers, pope, questions
from formats import hub_data
from tests.faults_bench import Bench, Outcome, call, fault, holds, refused, used, worst

ANSWERS, SCORERS, ARCHIVES = "Answers", "Scorers", "Archives"


def answered(bench: Bench) -> bytes:
    """The answers file of an undisturbed run."""
    ended = bench.ask()
    assert ended.status == 0, ended
    return bench.answers.read_bytes()


@fault("22", ANSWERS, "the last line torn: asked again, the same file")
def torn_line(bench: Bench) -> Outcome:
    whole = answered(bench)
    bench.answers.write_bytes(whole[:-20])
    ended = used(bench.ask(), "cut off", "1 of them new")
    return ended if bench.answers.read_bytes() == whole else Outcome("BUG", "another file")


@fault("23", ANSWERS, "a line torn in the middle")
def torn_inside(bench: Bench) -> Outcome:
    lines = answered(bench).splitlines(keepends=True)
    bench.answers.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    return refused(bench.ask(), "a.jsonl:2")


@fault("24", ANSWERS, "the settings file missing, cut, a list")
def settings_file(bench: Bench) -> Outcome:
    answered(bench)
    beside = bench.answers.with_suffix(".settings.json")
    outcomes = {}
    for text in ("{", "[]", ""):
        beside.write_text(text)
        outcomes[repr(text)] = refused(bench.ask(), "settings.json")
    beside.unlink()
    return worst(outcomes | {"missing": refused(bench.ask(), "settings.json")})


@fault("25", ANSWERS, "a question edited after it was answered")
def edited(bench: Bench) -> Outcome:
    answered(bench)
    rows = [{"id": i, "image": f"{i}.png", "prompt": "What else?"} for i in range(3)]
    return refused(bench.ask(rows=rows), "a.jsonl:1", "another question")


@fault("26", ANSWERS, "the base exchanged under its path; other settings")
def base_exchanged(bench: Bench) -> Outcome:
    answered(bench)
    decoding = refused(bench.ask("--beams", 2), "decoding")
    file = bench.base / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    return worst({"base": refused(bench.ask(), "other base under the same name"), "beams": decoding})


@fault("27", ANSWERS, "pictures exchanged under their names")
def pictures_exchanged(bench: Bench) -> Outcome:
    answered(bench)
    Image.new("RGB", (30, 30), "blue").save(bench.folder / "pairs" / "0.png")
    return refused(bench.ask(), "other pictures, or")


@fault("0.5", ANSWERS, "the same base, spelled otherwise")
def other_spelling(bench: Bench) -> Outcome:
    answered(bench)
    bench.base = Path(f"{bench.folder}/./base")
    return used(bench.ask("--base", f"{bench.folder}/pairs/../base"), "0 of them new")


@fault("28", ANSWERS, "a first try that ends before an answer, then other settings")
def first_try(bench: Bench) -> Outcome:
    with mock.patch.object(answers, "generate", side_effect=SystemExit("out of memory")):
        failed = refused(bench.ask(), "out of memory")
    return worst({"first": failed, "then": used(bench.ask("--max-new-tokens", 3), "3 of them new")})


@fault("20", ANSWERS, "an answer twice, equal and not")
def twice(bench: Bench) -> Outcome:
    whole = answered(bench)
    first = whole.splitlines(keepends=True)[0]
    bench.answers.write_bytes(whole + first)
    equal = used(bench.ask(), "0 of them new")
    other = json.loads(first) | {"answer": "Another."}
    bench.answers.write_bytes(whole + json.dumps(other).encode() + b"\n")
    return worst({"equal": equal, "not": refused(bench.ask(), "a.jsonl:4", "twice")})


@fault("29b", ANSWERS, "a picture deleted, and one cut, between check and answer")
def picture_gone(bench: Bench) -> Outcome:
    changes = {"cut": lambda file: file.write_bytes(file.read_bytes()[:60]), "deleted": lambda file: file.unlink()}
    outcomes = {}
    for name, change in changes.items():
        load = answers.load_model

        def then_change(args, load=load, change=change):
            change(bench.folder / "pairs" / "1.png")
            return load(args)

        with mock.patch.object(answers, "load_model", then_change):
            outcomes[name] = refused(bench.ask(), "1.png", "resumes")
        bench.answers.unlink(missing_ok=True)
        Image.new("RGB", (30, 30)).save(bench.folder / "pairs" / "1.png")
    return worst(outcomes)


@fault("110", ANSWERS, "questions: an id twice, null, 1.5, an answer field, ../, http://, half a surrogate, </s>")
def odd_questions(bench: Bench) -> Outcome:
    good = {"id": 1, "image": "1.png", "prompt": "What?"}
    cases = {
        "id null": {"id": None},
        "id 1.5": {"id": 1.5},
        "answer": {"answer": "Yes."},
        "../": {"image": "../base/config.json"},
        "http": {"image": "http://127.0.0.1/1.png"},
        "surrogate": {"prompt": "a\ud800"},
        "surrogate id": {"id": "a\ud800"},
        "no image": {"image": None},
        "prompt 3": {"prompt": 3},
        "<image> twice": {"prompt": "<image><image> What?"},
        "empty": {"prompt": " "},
    }
    outcomes = {name: refused(bench.ask(rows=[good | change]), "q.jsonl") for name, change in cases.items()}
    outcomes["</s>"] = used(bench.ask(rows=[good | {"prompt": "What? </s>"}]))  # five letters, not the token
    bench.answers.unlink()
    outcomes["id twice"] = refused(bench.ask(rows=[good, good]), "q.jsonl")
    return worst(outcomes)


@fault("112", ANSWERS, "evals.questions: --out on a file that is there; a wrong file")
def questions_out(bench: Bench) -> Outcome:
    kept = bench.write("mine.jsonl", "mine")
    flags = ("--prompt", "What?", "--out", kept)
    over = refused(call(questions.main, "folder", bench.folder / "pairs", *flags), "mine.jsonl")
    if kept.read_text() != "mine":
        over = Outcome("BUG", "overwritten")
    wrong = call(questions.main, "pope", bench.data(), "--out", bench.folder / "q.jsonl")
    return worst({"--out": over, "wrong file": refused(wrong, "pairs.jsonl")})


# ---- scorers -------------------------------------------------------------------------------------------------------

LABELS = [{"question_id": i, "text": f"Is there a thing{i} in the image?", "label": "yes"} for i in range(4)]
SAID = [{"question_id": i, "id": i, "prompt": f"Is there a thing{i} in the image?", "answer": "Yes"} for i in range(4)]


def score(bench: Bench, said: str | bytes, *more):
    file = bench.write("said.jsonl", said)
    return call(pope.main, "--answers", file, "--labels", bench.data(LABELS, "labels.jsonl"), *more)


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@fault(
    "132", SCORERS, "answers: twice, null, unknown, cut, not UTF-8, empty, a list, imgToEval wrong, in another order"
)
def odd_answers(bench: Bench) -> Outcome:
    texts = {
        "twice": lines([*SAID, SAID[0]]),
        "one missing": lines(SAID[:3]),
        "null": lines([*SAID[:3], SAID[3] | {"answer": None}]),
        "number": lines([*SAID[:3], SAID[3] | {"answer": 1}]),
        "unknown": lines([*SAID[:3], SAID[3] | {"question_id": 9}]),
        "other question": lines([*SAID[:3], SAID[3] | {"prompt": "Is it day?"}]),
        "key twice": lines(SAID).replace('{"question_id": 3', '{"answer": "No", "question_id": 3'),
        "cut": lines(SAID)[:-20],
        "Latin-1": lines(SAID).encode() + b"\xe9\n",
        "empty": "",
        "numbers": "1\n2\n3\n4\n",
        "imgToEval": json.dumps({"imgToEval": [1, 2]}),
        "imgToEval of texts": json.dumps({"imgToEval": {"1": "x"}}),
    }
    outcomes = {name: refused(score(bench, text), "said.jsonl") for name, text in texts.items()}
    outcomes["as it should be"] = used(score(bench, lines(SAID)))
    return worst(outcomes)


@fault("130", SCORERS, "--json that would overwrite the answers, or cannot be written")
def json_over_answers(bench: Bench) -> Outcome:
    file = bench.write("said.jsonl", lines(SAID))
    over = refused(score(bench, lines(SAID), "--json", file), "is read by")
    if file.read_text() != lines(SAID):
        over = Outcome("BUG", "the answers are overwritten")
    return worst(
        {"answers": over, "place": refused(score(bench, lines(SAID), "--json", "/proc/none/r.json"), "r.json")}
    )


@fault("133", SCORERS, "an answer of 300 KB made for the patterns")
def long_answer(bench: Bench) -> Outcome:
    rows = [*SAID[:3], SAID[3] | {"answer": "no " * 50_000 + "a" * 50_000 + " ." * 50_000}]
    return used(score(bench, lines(rows)))


# ---- archives ------------------------------------------------------------------------------------------------------


def unpacked(bench: Bench, archive: str, data: bytes, stems: set[str]) -> tuple[str, list[str]]:
    """How unpacking an archive ended, and all files that lie outside of it afterwards."""
    root = bench.folder / "unpacked"
    root.mkdir()
    (bench.folder / archive).write_bytes(data)
    ended = call(lambda argv: hub_data.unpack_one(bench.folder / archive, root, stems))
    return ended.crash, sorted(str(file.relative_to(root)) for file in root.rglob("*"))


@fault("134", ARCHIVES, "zip with ../, an absolute name, backslashes")
def zip_names(bench: Bench) -> Outcome:
    out, evil = io.BytesIO(), ("../evil.png", f"{bench.folder}/evil.png", "..\\..\\evil.png", "a/../../evil.png")
    with zipfile.ZipFile(out, "w") as z:
        for name in (*evil, "a/good.png"):
            z.writestr(name, b"x")
    crash, _ = unpacked(bench, "m.zip", out.getvalue(), {"evil", "good"})
    escaped = [file for file in bench.folder.glob("*evil*")] + [file for file in bench.folder.parent.glob("*evil*")]
    good = any((bench.folder / "unpacked").rglob("good.png"))
    return holds(not crash and not escaped and good, "only the inner file", f"{crash} {escaped}, good: {good}")


@fault("135", ARCHIVES, "tar with ../, a link out and a file through it, links to /etc/passwd, a FIFO")
def tar_names(bench: Bench) -> Outcome:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for name, kind, target in (
            ("../evil.png", tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, str(bench.folder)),
            ("link/evil.png", tarfile.REGTYPE, ""),
            ("passwd.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.png", tarfile.LNKTYPE, "/etc/passwd"),
            ("fifo.png", tarfile.FIFOTYPE, ""),
            ("good.png", tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 0
            t.addfile(member, io.BytesIO(b""))
    crash, inside = unpacked(bench, "m.tar", out.getvalue(), {"evil", "passwd", "hard", "fifo", "good"})
    escaped = (bench.folder / "evil.png").exists()
    links = [name for name in inside if (bench.folder / "unpacked" / name).is_symlink()]
    odd = {"passwd.png", "hard.png", "fifo.png"} & {Path(name).name for name in inside}
    return holds(not crash and not escaped and not links and not odd, f"{inside}", f"{crash} {inside} {escaped}")
