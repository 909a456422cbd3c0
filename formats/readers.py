"""Preference data as people have it -> Pair rows: one function of a few lines per format, recognised by its columns.

A row that cannot be used becomes a Problem with file, row and id; a row that makes no pair by its format's own rule (a
tie of ratings) is left out, counted and printed. Nothing is dropped without one of the two. To read a format that is
not here, write it as jsonl rows {id, image, prompt, chosen, rejected}; docs/data.md has examples.
"""

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from operator import itemgetter
from pathlib import Path

from data import BadRow, Pair, Problem, bare_question
from external import files
from formats import hub_data


class NoPair(Exception):
    """Why a row makes no pair although nothing is wrong with it."""


def one_turn(turn) -> str:
    """Text, a message, or a chat of one message, whose content is text or a list of parts -> its text."""
    if isinstance(turn, str):
        return turn
    messages = [turn] if isinstance(turn, dict) else turn
    if len(messages) != 1:
        raise BadRow("not one question and one answer", f"{len(messages)} messages in one column")
    content = messages[0]["content" if "content" in messages[0] else "value"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def checked_text(text, name: str) -> str:
    if not isinstance(text, str):
        raise BadRow(f"{name} is not text", type(text).__name__)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadRow(f"{name} is not valid Unicode", "it holds half of a surrogate pair")
    return text


# ---- one function per format: a row as stored -> (image, question, chosen, rejected[, rejected image]) -------------


def conversations(row: dict) -> tuple:
    chosen, rejected = ([turn["value"] for turn in row[key]] for key in ("conversations", "rejected_conversations"))
    if [len(chosen), len(rejected)] != [2, 2]:
        raise BadRow("not one question and one answer", f"{len(chosen)} and {len(rejected)} turns")
    if chosen[0] != rejected[0]:
        raise BadRow("chosen and rejected answer different questions")
    return row["image"], chosen[0], chosen[1], rejected[1]


def rlhf_v(row: dict) -> tuple:
    text = json.loads(row["text"])
    return row["image"], text["question"], text["chosen"], text["rejected"]


def llamafactory(row: dict) -> tuple:
    return row["images"], one_turn(row["conversations"]), one_turn(row["chosen"]), one_turn(row["rejected"])


def vlfeedback(row: dict) -> tuple:
    """The response with the best mean rating against the one with the worst, the first of equals."""
    responses = row["completions"]
    if isinstance(responses, dict):  # parquet: a column of lists; jsonl: a list of rows
        responses = [dict(zip(responses, r, strict=True)) for r in zip(*responses.values(), strict=True)]
    rated = []
    for response in responses:
        ratings = [aspect["Rating"] for aspect in response["annotations"].values()]
        if ratings and all(re.fullmatch(r"\d+(\.\d+)?", str(r)) for r in ratings):  # some are "N/A"
            rated.append((sum(map(float, ratings)) / len(ratings), response["response"]))
    if len(rated) < 2:
        raise NoPair("fewer than two rated responses")
    best, worst = max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])
    if best[0] == worst[0]:
        raise NoPair("all ratings equal")
    return row["img_path"], row["prompt"], best[1], worst[1]


def plain(row: dict) -> tuple:
    """TRL's columns too: `image` or `images`, texts or chats."""
    image = row["images"] if "images" in row else row["image"]
    return image, *(one_turn(row[key]) for key in ("prompt", "chosen", "rejected")), row.get("image_rejected")


FORMATS: dict[str, tuple[set[str], Callable[[dict], tuple]]] = {  # name: columns that tell it, reader; first fit wins
    "mDPO": ({"img_path", "prompt", "chosen", "rejected"}, itemgetter("img_path", "prompt", "chosen", "rejected")),
    "PDS-DPO / POVID (LLaVA conversations)": ({"image", "conversations", "rejected_conversations"}, conversations),
    "RLHF-V": ({"image", "text"}, rlhf_v),
    "RLAIF-V": ({"image", "question", "chosen", "rejected"}, itemgetter("image", "question", "chosen", "rejected")),
    "LLaMA-Factory": ({"images", "conversations", "chosen", "rejected"}, llamafactory),
    "VLFeedback (ratings)": ({"img_path", "prompt", "completions"}, vlfeedback),
    "TRL": ({"images", "prompt", "chosen", "rejected"}, plain),
    "plain": ({"image", "prompt", "chosen", "rejected"}, plain),
}


def detect(columns: set[str], file: Path) -> str:
    """The name of the format with these columns. SystemExit with what was found and the nearest format."""
    for name, (needed, _) in FORMATS.items():
        if needed <= columns:
            return name
    nearest = max(FORMATS, key=lambda name: len(FORMATS[name][0] & columns) / len(FORMATS[name][0]))
    known = "\n".join(f"  {name}: {', '.join(sorted(needed))}" for name, (needed, _) in FORMATS.items())
    raise SystemExit(
        f"{file}: unknown columns. Found: {', '.join(sorted(columns)) or 'none'}.\nNearest format: {nearest}, lacking "
        f"{', '.join(sorted(FORMATS[nearest][0] - columns))}.\nFormats known:\n{known}\n"
        "Other data: write it as jsonl with the plain columns (docs/data.md)."
    )


# ---- pictures ------------------------------------------------------------------------------------------------------

BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how a JPEG, PNG, GIF, WebP begins


def stored_image(image) -> str | bytes | None:
    """A path, bytes, base64 (bare or a data: URL), {bytes, path}, or a list of one of these -> path, bytes or None."""
    if isinstance(image, list):
        if len(image) > 1:
            raise BadRow("several images", f"{len(image)} in one row; one picture per pair is supported")
        image = image[0] if image else None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and (image.startswith("data:") or len(image) > 255 and image.startswith(BASE64)):
        try:
            return base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image, validate=True)
        except binascii.Error as e:
            raise BadRow("broken image", f"not base64: {e}") from None
    if image is not None and not isinstance(image, str | bytes):
        raise BadRow("image is neither a path nor bytes", type(image).__name__)
    return image or None


def place(image: str | bytes | None, root: Path, joined: dict[str, Path] | None) -> Path | bytes | None:
    """A stored path -> the picture that was joined with it, or a path inside root, which is resolved."""
    if not isinstance(image, str):
        return image
    if joined is not None:
        if image not in joined:
            raise NoPair("no picture of that name")
        return joined[image]
    try:
        return files.inside(root, image)
    except ValueError as e:
        raise BadRow("image path leaves the image folder", str(e)) from None


# ---- files ---------------------------------------------------------------------------------------------------------


def load_rows(file: Path) -> Iterator[dict]:
    """Rows of a .json, .jsonl or .parquet file."""
    try:
        if file.suffix == ".parquet":
            yield from parquet_rows(file)
            return
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except FileNotFoundError:
        raise SystemExit(f"{file}: no such file") from None
    except (OSError, ValueError) as e:  # of JSON, of UTF-8, of parquet
        raise SystemExit(f"{file}: not readable as {file.suffix or 'JSON'}: {e}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{file}: expected a list of rows with named columns")
    yield from rows


def parquet_rows(file: Path) -> Iterator[dict]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SystemExit(f"{file}: reading parquet needs pyarrow; run `pip install pyarrow`") from None
    with ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(1000):  # pictures are in it: never the whole file twice
            yield from batch.to_pylist()


def data_files(data: Path) -> list[Path]:
    """The file itself, or those of a folder that hold its rows: the shards of one set, its train split if any."""
    if not data.is_dir():
        return [data]
    files = [f for f in sorted(data.rglob("*")) if f.suffix in (".json", ".jsonl", ".parquet")
             and f.name not in hub_data.METADATA]  # fmt: skip
    train = [f for f in files if "train" in f.name]
    if train and len(train) < len(files):
        print(f"{data}: reading {', '.join(f.name for f in train)}; {len(files) - len(train)} other files left alone")
        files = train
    if not files:
        raise SystemExit(f"{data}: no .json, .jsonl or .parquet file in this folder")
    if len(files) > 1 and any(f.suffix != ".parquet" for f in files):
        raise SystemExit(f"{data}: several data files ({', '.join(f.name for f in files)}); give one of them")
    return files


def read_row(row: dict, reader: Callable[[dict], tuple]) -> tuple:
    """(image, question, chosen, rejected, rejected image), checked. BadRow or NoPair."""
    try:
        image, question, chosen, rejected, *image_rejected = reader(row)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise BadRow("row does not fit the file's format", f"{type(e).__name__}: {e}") from None
    question = bare_question(checked_text(question, "prompt"))
    responses = (checked_text(t, name).strip() for t, name in ((chosen, "chosen"), (rejected, "rejected")))
    return stored_image(image), question, *responses, stored_image(image_rejected[0]) if image_rejected else None


def read_pairs(data: Path | str, image_root: Path | None = None) -> tuple[list[Pair], list[Problem]]:
    """Every row of a file, a folder or a hub data set (hub.py) as a Pair or a Problem. SystemExit if the data or its
    columns are not known. Pictures lie in image_root, else in the file's folder or in what was downloaded."""
    from_hub = hub_data.is_name(data)
    folder = hub_data.fetch(str(data), with_pictures=image_root is None) if from_hub else Path(data)
    rows = (row for file in data_files(folder) for row in load_rows(file))
    if (first := next(rows, None)) is None:
        raise SystemExit(f"{data}: no rows")
    name = detect(set(first), data)
    fields, pairs, problems, left_out = {}, [], [], Counter()
    for total, row in enumerate(chain([first], rows), 1):
        row_id = next((str(row[key]) for key in ("id", "idx") if row.get(key) is not None), str(total))
        try:
            fields[total, row_id] = read_row(row, FORMATS[name][1])
        except BadRow as e:
            problems.append(Problem(total, row_id, *e.args))
        except NoPair as e:
            left_out[str(e)] += 1

    root = Path(image_root or (folder if folder.is_dir() else folder.parent)).resolve()
    stored = {image for f in fields.values() for image in (f[0], f[-1]) if isinstance(image, str)}
    joined = hub_data.join(str(data), folder, stored, image_root) if from_hub and stored else None
    for (number, row_id), (image, *texts, image_rejected) in fields.items():
        try:
            image, image_rejected = (place(i, root, joined) for i in (image, image_rejected))
            pairs.append(Pair(row_id, image, *texts, number, image_rejected))
        except BadRow as e:
            problems.append(Problem(number, row_id, *e.args))
        except NoPair as e:
            left_out[str(e)] += 1
    reasons = "".join(f"; left out: {n:,} with {reason}" for reason, n in left_out.most_common())
    print(f"{data}: {total:,} rows, format {name}, {len(pairs):,} pairs{reasons}")
    return pairs, problems
