"""questions.jsonl from the benchmarks' own files, and the reading of questions.

    python -m evals.questions pope coco_pope_random.json --out pope/random.jsonl
    python -m evals.questions folder pictures --prompt "Describe this image." --out q.jsonl

A row is {id, image, prompt, source} and what the benchmark's scorer wants; `image` is a path inside the questions'
folder or the --image-root of evals.answers. Nothing is fetched: OFFICIAL says where the files are. One that is not a
published version is used with a warning that also stands in every row's `source`, or refused with --strict.

Deviations from the benchmarks
1. AMBER's yes-or-no questions say nothing of the form of the answer, but the scorer takes only Yes and No: AMBER_SUFFIX
   is added. POPE's get the suffix of LLaVA's evaluation.
2. Object HalBench's pictures lie in its rows as base64; they are written out, unchanged, beside the questions.
"""

import argparse
import base64
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pictures
from data import BadRow, bare_question
from evals.pope import VERSIONS as POPE_VERSIONS
from evals.stats import UNKNOWN_VERSION
from external import files
from external.progress import progress
from external.terminal import printable, set_up_terminal

POPE_SUFFIX = "\nAnswer the question using a single word or phrase."
AMBER_SUFFIX = "\nAnswer with one word, Yes or No."
AMBER_DESCRIPTIONS = 1004  # AMBER's ids up to here ask for a description, those above for Yes or No
ADDED = ("answer", "n_tokens", "finish")  # what an answers row has more than its question
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


# ---- reading -------------------------------------------------------------------------------------------------------


class Questions(NamedTuple):
    rows: dict[str, dict]  # id -> question row, in the order of the file
    paths: dict[str, Path]  # id -> picture

    def pictures_sha256(self) -> str:
        """One hash over the pictures, each under the name that the questions call it by."""
        total = hashlib.sha256()
        for image, path in sorted({(row["image"], self.paths[key]) for key, row in self.rows.items()}):
            total.update(f"{image} {files.sha256(path.read_bytes())}\n".encode())
        return total.hexdigest()


def check_question(row: dict, root: Path) -> Path:
    """The picture of a question row. BadRow if it cannot be asked."""
    if not isinstance(row.get("id"), str | int):
        raise BadRow("no id")
    for name in ("image", "prompt"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise BadRow(f"no {name}")
    if taken := [name for name in ADDED if name in row]:
        raise BadRow("a field has the name of one that is added to answers", ", ".join(taken))
    bare_question(row["prompt"])
    try:
        json.dumps(row, ensure_ascii=False).encode()
        return files.inside(root, row["image"])
    except UnicodeEncodeError:
        raise BadRow("half a surrogate pair, which is no text") from None
    except (ValueError, OSError, RuntimeError) as e:  # outside, too long, a link that leads back to itself
        raise BadRow("image path leaves the image folder", str(e)) from None


def read_questions(file: Path, image_root: Path | None) -> Questions:
    """SystemExit with file, row and id if any question cannot be asked."""
    root = Path(image_root or file.parent).resolve()
    rows = files.read_rows(file)
    questions = Questions({}, {})
    wheres, problems = {}, []
    for row in rows:
        where, key = row.pop("_where"), str(row.get("id"))
        try:
            path = check_question(row, root)
            if key in wheres:
                raise BadRow("this id was there before", wheres[key])
        except BadRow as e:
            problems.append(f"{where}: id {key}: {': '.join(e.args)}")
            continue
        questions.rows[key], questions.paths[key], wheres[key] = row, path, where
    broken = broken_pictures(set(questions.paths.values()))
    for key, path in questions.paths.items():
        if broken[path]:
            problems.append(f"{wheres[key]}: id {key}: {broken[path]}")
    if problems:
        shown = "\n".join(problems[:5])
        raise SystemExit(
            f"{shown}\n{len(problems)} of {len(rows)} questions cannot be asked; nothing was generated. Fix the file, "
            "or give the folder of the pictures with --image-root."
        )
    return questions


def broken_pictures(paths: set[Path]) -> dict[Path, str | None]:
    """What is wrong with each picture; None: nothing."""
    wanted = sorted(paths)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        problems = progress(pool.map(pictures.picture_problem, wanted), "pictures", len(wanted))
        return dict(zip(wanted, problems, strict=True))


# ---- making: one function per benchmark, its row -> ours -----------------------------------------------------------


def objhal_row(row: dict, number: int) -> dict:
    picture = base64.b64decode(row["image"], validate=True)
    pictures.open_image(picture)  # ValueError if it is none
    return {
        "id": row["image_id"],
        "image": f"images/COCO_val2014_{int(row['image_id']):012d}.jpg",
        "prompt": row["question"],
        "image_id": row["image_id"],
        "_picture": picture,
    }


def amber_row(row: dict, number: int) -> dict:
    suffix = AMBER_SUFFIX if row["id"] > AMBER_DESCRIPTIONS else ""
    return {"id": row["id"], "image": row["image"], "prompt": row["query"] + suffix}


def pope_row(row: dict, number: int) -> dict:
    return {
        "id": row["question_id"],
        "image": row["image"],
        "prompt": row["text"] + POPE_SUFFIX,
        "question_id": row["question_id"],
        "label": row["label"],
    }


def mmhal_row(row: dict, number: int) -> dict:
    name = row["image_src"].rpartition("/")[2]
    return {"id": number, "image": name, "prompt": row["question"], "question_type": row["question_type"]}


MAKERS = {
    "objhal": objhal_row,
    "amber-generative": amber_row,
    "amber-discriminative": amber_row,
    "pope": pope_row,
    "mmhal": mmhal_row,
}


class Official(NamedTuple):
    versions: dict[str, str]  # sha256, or git's hash of the blob -> which published version
    file: str  # where it is
    pictures: str  # where the pictures are


OFFICIAL = {
    "objhal": Official(
        {
            "e89c705f3cdebc35b7863878e059c88a97506767b87ad17014d58428ce6547a7": "RLHF-V",
            "cb8e15a81a1ddf720f306fda0decefb1ed80c31f": "RLHF-V",
        },
        "eval/data/obj_halbench_300_with_image.jsonl of github.com/RLHF-V/RLHF-V (300 rows, 63.5 MB)",
        "beside it",
    ),
    "amber-generative": Official(
        {"b7e4c36596126ee36d2c3922638b7fa98743c26efda78fea2315f4425258d087": "AMBER 534babf6"},
        "data/query/query_generative.json of github.com/junyangwang0410/AMBER (1,004 rows)",
        "see its README",
    ),
    "amber-discriminative": Official(
        {"1502887ac020f4bb7ea564af4e37bddcb030d61b78490d00f9da492a2307abb8": "AMBER 534babf6"},
        "data/query/query_discriminative.json of github.com/junyangwang0410/AMBER (14,216 rows)",
        "see its README",
    ),
    "pope": Official(
        POPE_VERSIONS,
        "output/coco/coco_pope_{random,popular,adversarial}.json of github.com/RUCAIBox/POPE (3,000 rows each; the "
        "older ones: its commit e3e3926)",
        "COCO val2014 (cocodataset.org)",
    ),
    "mmhal": Official(
        {"28ed24e19ffef292597c35f1dad37760b2e0a088b3b40ca3b50f105fc1b951bb": "MMHal-Bench"},
        "response_template.json of huggingface.co/datasets/Shengcao1006/MMHal-Bench (96 rows)",
        "its test_data.zip",
    ),
}


def version(benchmark: str, file: Path, strict: bool) -> str:
    """Which published file this is, by its hash, for the rows' `source`; unknown ones warn, or end the run."""
    versions, official, _ = OFFICIAL[benchmark]
    if not file.is_file():
        raise SystemExit(f"{file}: no such file. The official one: {official}")
    data = file.read_bytes()
    digest = files.sha256(data)
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # what `git hash-object` says
    name = versions.get(digest) or versions.get(blob)
    if not name:
        message = f"{file}: not a published version of {benchmark} (sha256 {digest}). The official one: {official}"
        if strict:
            raise SystemExit(message)
        print(f"warning: {message}")
    return f"{benchmark}, {name or UNKNOWN_VERSION}, sha256 {digest[:16]}"


def make(benchmark: str, file: Path, strict: bool) -> list[dict]:
    """The rows of a benchmark's file, in its order. SystemExit with file and row if one does not fit."""
    source = version(benchmark, file, strict)
    rows = []
    for number, row in enumerate(progress(files.read_rows(file), benchmark)):
        try:
            rows.append(MAKERS[benchmark](row, number) | {"source": source})
        except KeyError as e:
            raise SystemExit(f"{row['_where']}: no {e}; is this the file of {benchmark}?") from None
        except (TypeError, ValueError, AttributeError) as e:  # not base64, not a picture, not a number, not a text
            raise SystemExit(f"{row['_where']}: cannot be used ({e}); is the download complete?") from None
    return rows


def folder_rows(root: Path, prompt: str) -> list[dict]:
    """One row for each picture file below root, by name."""
    names = sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not names:
        raise SystemExit(f"{root}: no pictures ({', '.join(sorted(SUFFIXES))}) in this folder")
    return [{"id": name, "image": name, "prompt": prompt, "source": "folder"} for name in names]


def check_made(rows: list[dict], where: Path) -> None:
    """SystemExit by id if one of the rows could not be asked, or two have one id."""
    ids = set()
    for row in rows:
        try:
            check_question(row, Path.cwd())
            if str(row["id"]) in ids:
                raise BadRow("this id was there before")
        except BadRow as e:
            raise SystemExit(f"{where}: id {printable(str(row['id']))}: {': '.join(e.args)}") from None
        ids.add(str(row["id"]))


def write(rows: list[dict], out: Path, where: Path) -> None:
    """The rows, and beside them the pictures that were in them. What is at `out` already is kept if it is the same."""
    shown = [{name: row[name] for name in row if name != "_picture"} for row in rows]
    check_made(shown, where)
    if out.exists():
        there = [{name: row[name] for name in row if name != "_where"} for row in files.read_rows(out)]
        if there != shown:
            raise SystemExit(f"{out}: holds other questions already. Give another --out, or remove it.")
    for row in rows:
        if "_picture" in row:
            with files.whole(out.parent / row["image"]) as part:
                part.write_bytes(row["_picture"])
    files.write_rows(out, shown)


def main(argv: list[str] | None = None) -> None:
    set_up_terminal()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("benchmark", choices=[*MAKERS, "folder"])
    p.add_argument("file", type=Path, help="the benchmark's file of questions, or a folder of pictures")
    p.add_argument("--out", type=Path, required=True, help="questions.jsonl")
    p.add_argument("--prompt", help="the question about each picture of a folder")
    p.add_argument("--strict", action="store_true", help="refuse a file that is not a published one")
    args = p.parse_args(argv)
    if (args.benchmark == "folder") != bool(args.prompt):
        p.error("folder needs --prompt, and the benchmarks have their own")
    if args.prompt and not args.prompt.replace("<image>", "").strip():
        p.error("--prompt: no question in it")
    if args.benchmark == "folder":
        rows, where = folder_rows(args.file, args.prompt), args.file
    else:
        rows, where = make(args.benchmark, args.file, args.strict), OFFICIAL[args.benchmark].pictures
    files.check_writable(args.out, [args.file])
    write(rows, args.out, args.file)
    print(f"{args.out}: {len(rows)} questions. Their pictures: {where} (a folder elsewhere is --image-root)")


if __name__ == "__main__":
    main()
