"""Preference data as people have it -> Pair rows: read, placed, and everything that is not used named.

    rows.py      files -> rows with their place (file:line)
    layouts.py   a row as stored -> its fields, one function per format
    here         pictures and texts checked, a Pair or a Problem for every row

A row that cannot be used becomes a Problem with file, line and id; a row that makes no pair by its format's own rule (a
tie of ratings) is left out, counted and printed. Nothing is dropped without one of the two. To read a format that is
not here, write it as jsonl rows {id, image, prompt, chosen, rejected}; docs/data.md has examples.
"""

import base64
import binascii
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data import SYSTEM, BadRow, Pair, Problem, bare_question
from external import files
from external.progress import progress
from external.terminal import LONGEST, count, printable
from formats import hub_data
from formats.layouts import EVERYWHERE, NOT_FITTING, REJECTED_IMAGE, Fields, Layout, NoPair, detect
from formats.rows import Row, read_rows


class Found(NamedTuple):
    """A row that could be read, its pictures not yet placed."""

    row: int
    where: str
    id: str
    fields: Fields
    m_l: str | bytes | None  # the data's own rejected image


class Stored:
    """Rows as they are read: the good ones, problems of the others, and what is worth a line."""

    def __init__(self):
        self.found: list[Found] = []
        self.problems: list[Problem] = []
        self.left_out: Counter[str] = Counter()  # reason -> rows that make no pair
        self.keys_twice: Counter[str] = Counter()
        self.columns: set[str] = set()
        self.ids: Counter[str] = Counter()
        self.total = 0


class Read(NamedTuple):
    """What became of every row."""

    pairs: list[Pair]
    problems: list[Problem]  # rows that cannot be used
    left_out: Counter[str]  # reason -> rows that make no pair by their format's own rule


def read_pairs(data: Path | str, image_root: Path | None = None) -> tuple[list[Pair], list[Problem]]:
    """`read_data` where nobody asks for the rows that make no pair; they are printed all the same."""
    read = read_data(data, image_root)
    return read.pairs, read.problems


def read_data(data: Path | str, image_root: Path | None = None) -> Read:
    """Every row of a file, a folder or a hub data set (hub_data.py) as a Pair or a Problem. SystemExit if the data or
    its columns are not known. Pictures lie in image_root, else in the file's folder or in what was downloaded."""
    name = str(data)
    from_hub = hub_data.is_name(name)
    if from_hub:
        source = hub_data.fetch(name, with_pictures=image_root is None)
        shown = f"{name}/{source.name}" if source.is_file() else name
    else:
        source = Path(data)
        shown = name
    stored = Stored()
    layout = None
    for row in progress(read_rows(source, shown, stored.keys_twice), f"rows of {name}"):
        if layout is None and row.columns is not None:
            layout = detect(row.columns, row.where)
        read_one(row, layout, stored)
    if layout is None:
        first = stored.problems[0]
        raise SystemExit(f"{first.where}: {first.reason}: {first.detail}\n{name}: no row can be read")

    folder = source if source.is_dir() else source.parent
    if image_root and not Path(image_root).is_dir():
        raise SystemExit(f"--image-root {image_root}: no such folder")
    root = Path(image_root or folder).resolve()
    joined = None
    paths = {found.fields.image for found in stored.found} | {found.m_l for found in stored.found}
    paths = {path for path in paths if isinstance(path, str)}
    if from_hub and paths:
        joined = hub_data.join(name, folder, paths, image_root)
    pairs = place_all(stored, root, joined)
    report(name, layout, stored, pairs)
    return Read(pairs, stored.problems, stored.left_out)


def read_one(row: Row, layout: Layout, stored: Stored) -> None:
    """What one row holds, or its problem, into `stored`."""
    stored.total += 1
    row_id = str(row.number)
    if row.columns is not None:
        stored.columns |= row.columns.keys()
        given = [row.columns[key] for key in ("id", "idx") if row.columns.get(key) is not None]
        if given:
            row_id = str(given[0])
            stored.ids[row_id] += 1
    try:
        if row.columns is None:
            raise BadRow("broken row", row.detail)
        fields = read_fields(row.columns, layout)
        m_l = rejected_image(row.columns)
        stored.found.append(Found(row.number, row.where, row_id, fields, m_l))
    except BadRow as e:
        stored.problems.append(problem_of(row.number, row.where, row_id, e))
    except NoPair as e:
        stored.left_out[str(e)] += 1


def problem_of(row: int, where: str, row_id: str, error: BadRow) -> Problem:
    reason, detail = error.problem
    return Problem(row, row_id, reason, printable(detail, LONGEST), where)


def place_all(stored: Stored, root: Path, joined: dict[str, Path] | None) -> list[Pair]:
    """Pairs of all rows whose pictures can be placed; the others become problems or are left out."""
    pairs = []
    for found in stored.found:
        try:
            pair = Pair(
                id=found.id,
                image=place(found.fields.image, root, joined),
                prompt=found.fields.prompt,
                chosen=found.fields.chosen,
                rejected=found.fields.rejected,
                row=found.row,
                image_rejected=place(found.m_l, root, joined),
                system=found.fields.system or SYSTEM,
                where=found.where,
            )
            pairs.append(pair)
        except BadRow as e:
            stored.problems.append(problem_of(found.row, found.where, found.id, e))
        except NoPair as e:
            stored.left_out[str(e)] += 1
    return pairs


def report(name: str, layout: Layout, stored: Stored, pairs: list[Pair]) -> None:
    """What was read, and whatever of it is not used."""
    reasons = "".join(f"; left out: {n:,} with {reason}" for reason, n in stored.left_out.most_common())
    print(f"{name}: {count(stored.total, 'row')}, format {layout.name}, {count(len(pairs), 'pair')}{reasons}")
    unused = sorted(stored.columns - layout.needed - layout.optional - EVERYWHERE)
    if unused:
        print(f"{name}: columns not used: {printable(', '.join(unused), LONGEST)}")
    own_system = sum(pair.system != SYSTEM for pair in pairs)
    if own_system:
        print(
            f"{name}: {count(own_system, 'row')} with a system text; it stands in the prompt instead of the base's own"
        )
    own_image = sum(pair.image_rejected is not None for pair in pairs)
    if own_image:
        print(f"{name}: {own_image:,} of {count(len(pairs), 'pair')} with a rejected image")
    twice = [row_id for row_id, n in stored.ids.items() if n > 1]
    if twice:
        print(f"{name}: note: more than once: {count(len(twice), 'id')}, for example {printable(twice[0], LONGEST)}")
    for key, n in stored.keys_twice.most_common(3):
        print(
            f"{name}: note: key {printable(key, LONGEST)!r} stands twice in {count(n, 'object')}; the last one counts"
        )


# ---- texts ---------------------------------------------------------------------------------------------------------


def read_fields(columns: dict, layout: Layout) -> Fields:
    """A row's fields, checked: texts are texts, the question is bare, the picture is a path or bytes."""
    try:
        fields = layout.read(columns)
    except BadRow:
        raise
    except KeyError as e:
        raise BadRow(NOT_FITTING, f"it lacks {e}") from None
    except (TypeError, AttributeError, ValueError, RecursionError) as e:
        raise BadRow(NOT_FITTING, f"{type(e).__name__}: {e}") from None
    system = checked_text(columns.get("system") or "", "system").strip()
    if system and fields.system and system != fields.system:
        raise BadRow("several system texts in one row")
    return Fields(
        image=stored_image(fields.image),
        prompt=bare_question(checked_text(fields.prompt, "prompt")),
        chosen=checked_text(fields.chosen, "chosen").strip(),
        rejected=checked_text(fields.rejected, "rejected").strip(),
        system=checked_text(fields.system or system, "system").strip(),
    )


def checked_text(text, name: str) -> str:
    if not isinstance(text, str):
        raise BadRow(f"{name} is not text", type(text).__name__)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadRow(f"{name} is not valid Unicode", "it holds half of a surrogate pair")
    return text


# ---- pictures ------------------------------------------------------------------------------------------------------

LONGEST_PATH = 4096  # characters; a longer text is no path
ADDRESS = re.compile(r"[a-z]+://", re.IGNORECASE)


def rejected_image(columns: dict) -> str | bytes | None:
    """The picture for m_l that a row of any layout may bring."""
    given = [columns[key] for key in REJECTED_IMAGE if columns.get(key)]
    if len(given) > 1:
        raise BadRow("several rejected images", f"in columns {', '.join(k for k in REJECTED_IMAGE if columns.get(k))}")
    return stored_image(given[0]) if given else None


def stored_image(image) -> str | bytes | None:
    """A path, bytes, base64 (bare or a data: URL), {bytes, path}, or a list of one of these -> path, bytes or None."""
    if isinstance(image, list):
        if len(image) > 1:
            raise BadRow("several images", f"{len(image)} in one row; one picture per pair is supported")
        image = image[0] if image else None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return path_or_bytes(image)
    if image is not None and not isinstance(image, bytes):
        raise BadRow("image is neither a path nor bytes", type(image).__name__)
    return image or None


def path_or_bytes(image: str) -> str | bytes | None:
    """A path as it is, base64 decoded. Whether the bytes are a picture is found when it is opened."""
    if image.startswith("data:"):
        return from_base64(image.partition(",")[2])
    if ADDRESS.match(image):
        raise BadRow("image is an address", f"{image}: fetch the pictures first")
    if len(image) > 255 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", image):  # a path that long has a dot
        return from_base64(image)
    if len(image) > LONGEST_PATH:
        raise BadRow("image is neither a path nor bytes", f"text of {len(image):,} characters")
    return image or None


def from_base64(text: str) -> bytes:
    """Lines of base64, as `base64` writes them, or one line."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as e:  # ValueError: a character outside ASCII
        raise BadRow("broken image", f"not base64: {e}") from None


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
        if "is not inside" in str(e):
            raise BadRow("image path leaves the image folder", str(e)) from None
        raise BadRow("image path cannot be followed", f"{image}: {e}") from None  # a loop of links, a NUL
