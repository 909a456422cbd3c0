"""Preference files as people have them -> Pair rows, one function of a few lines per format, recognised by its columns.

A row that cannot be used becomes a Problem with file, row and id; nothing is dropped without one. To read a format that is
not here, write it as jsonl rows {id, image, prompt, chosen, rejected}.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATED = (SYSTEM + " USER: ", " ASSISTANT:")  # the mDPO release stores its prompts inside this


@dataclass(frozen=True)
class Pair:
    """One preference: of two responses to (image, prompt), `chosen` (y_w) is better than `rejected` (y_l)."""

    id: str
    image: Path | bytes | None  # m_w
    prompt: str  # the bare question q, no template, no <image>
    chosen: str
    rejected: str
    row: int  # 1-based in the file; with the seed and epoch it decides m_l
    image_rejected: Path | bytes | None = None  # m_l, where the data gives one


class Problem(NamedTuple):
    row: int
    id: str
    reason: str  # a fixed phrase, counted by
    detail: str = ""


class BadRow(ValueError):
    """reason, detail of a row that cannot be used."""


def bare_question(text: str) -> str:
    """A question as stored, `<image>` once, anywhere, or not at all -> the question alone."""
    if not isinstance(text, str):
        raise BadRow("prompt is not text", type(text).__name__)
    if text.count("<image>") > 1:
        raise BadRow("several <image>", "one picture per pair is supported")
    return text.replace("<image>", "").strip()


# ---- one function per format: a row as stored -> (image, question, chosen, rejected[, rejected image]) -------------


def mdpo(row: dict) -> tuple:
    before, after = TEMPLATED
    if not (row["prompt"].startswith(before) and row["prompt"].endswith(after)):
        raise BadRow("prompt is not in the template", f"it should be {before!r} + question + {after!r}")
    return row["img_path"], row["prompt"][len(before) : -len(after)], row["chosen"], row["rejected"]


def conversations(row: dict) -> tuple:
    turns = [[turn["value"] for turn in row[key]] for key in ("conversations", "rejected_conversations")]
    if [len(t) for t in turns] != [2, 2]:
        raise BadRow("not one question and one answer", f"{len(turns[0])} and {len(turns[1])} turns")
    if turns[0][0] != turns[1][0]:
        raise BadRow("chosen and rejected answer different questions")
    return row["image"], turns[0][0], turns[0][1], turns[1][1]


def plain(row: dict) -> tuple:
    return row["image"], row["prompt"], row["chosen"], row["rejected"], row.get("image_rejected")


FORMATS: dict[str, tuple[set[str], Callable[[dict], tuple]]] = {  # name: columns that tell it, reader
    "mDPO": ({"img_path", "prompt", "chosen", "rejected"}, mdpo),
    "PDS-DPO / POVID (LLaVA conversations)": ({"image", "conversations", "rejected_conversations"}, conversations),
    "plain": ({"image", "prompt", "chosen", "rejected"}, plain),
}


def detect(columns: set[str], file: Path) -> Callable[[dict], tuple]:
    for needed, reader in FORMATS.values():
        if needed <= columns:
            return reader
    nearest = max(FORMATS, key=lambda name: len(FORMATS[name][0] & columns) / len(FORMATS[name][0]))
    known = "\n".join(f"  {name}: {', '.join(sorted(needed))}" for name, (needed, _) in FORMATS.items())
    raise SystemExit(
        f"{file}: unknown columns. Found: {', '.join(sorted(columns)) or 'none'}.\nNearest format: {nearest}, lacking "
        f"{', '.join(sorted(FORMATS[nearest][0] - columns))}.\nFormats known:\n{known}"
    )


# ---- files ---------------------------------------------------------------------------------------------------------


def load_rows(file: Path) -> list[dict]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except FileNotFoundError:
        raise SystemExit(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise SystemExit(f"{file}: not readable as {file.suffix or 'JSON'}: {e}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{file}: expected a non-empty list of rows with named columns")
    return rows


def locate(image, root: Path) -> Path | bytes | None:
    """A stored image -> bytes or a path inside root."""
    if image is None or image == "":
        return None
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise BadRow("several images" if isinstance(image, list) else "image is neither a path nor bytes")
    path = (root / image).resolve()
    if not path.is_relative_to(root):
        raise BadRow("image path leaves the image folder", f"{image} is not inside {root}")
    return path


def read_pairs(file: Path, image_root: Path | None = None) -> tuple[list[Pair], list[Problem]]:
    """Every row of a preference file as a Pair or a Problem. SystemExit if the file or its columns are not known."""
    file = Path(file)
    rows = load_rows(file)
    root = (image_root or file.parent).resolve()
    reader = detect(set(rows[0]), file)
    pairs, problems = [], []
    for number, row in enumerate(rows, 1):
        row_id = str(row.get("id", number))
        try:
            image, question, chosen, rejected, *image_rejected = reader(row)
            if not isinstance(chosen, str) or not isinstance(rejected, str):
                raise BadRow("a response is not text")
            rejected_path = locate(image_rejected[0], root) if image_rejected else None
            pairs.append(Pair(row_id, locate(image, root), bare_question(question), chosen.strip(), rejected.strip(),
                              number, rejected_path))  # fmt: skip
        except BadRow as e:
            problems.append(Problem(number, row_id, *e.args))
        except (KeyError, TypeError, AttributeError) as e:
            problems.append(Problem(number, row_id, "row does not fit the file's format", f"{type(e).__name__}: {e}"))
    return pairs, problems
