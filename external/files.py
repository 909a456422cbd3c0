"""Reading and writing files: text, JSON, rows; whole or not at all."""

import hashlib
import json
import os
from pathlib import Path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_text(path: str | Path) -> str:
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file.")
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from error


def _unique_keys(pairs: list[tuple]) -> dict:
    # json keeps the last of two equal keys, which would drop an answer without a word
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice in one object: {sorted(key for key, _ in pairs)[:8]}")
    return dict(pairs)


def read_json(path: str | Path, text: str | None = None, where: str | None = None):
    """A JSON file, or `text` (answers) that stands at `where` in it."""
    try:
        return json.loads(read_text(path)) if text is None else json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise SystemExit(f"{where or path}: broken JSON ({error}); was the file cut off, or edited by hand?") from error


def read_rows(path: str | Path) -> list[dict]:
    """Rows of JSON Lines, of a JSON list, or of {"imgToEval": {image_id: row}}; `_where` is added for messages."""
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[0][1].strip() if lines else ""
    if first.startswith("[") or first == "{" or '"imgToEval"' in first:
        data = read_json(path, text)
        data = list(data.get("imgToEval", {}).values()) if isinstance(data, dict) else data
        rows = [(f"{path} row {i}", row) for i, row in enumerate(data)]
    else:
        rows = [(f"{path}:{number}", read_json(path, line, f"{path}:{number}")) for number, line in lines]
    if not rows:
        raise SystemExit(f"{path}: no rows; it must be JSON Lines, a JSON list of rows, or an object with `imgToEval`.")
    for where, row in rows:
        if not isinstance(row, dict):
            raise SystemExit(f"{where}: a row must be a JSON object, this is {str(row)[:60]!r}.")
    return [{**row, "_where": where} for where, row in rows]


def inside(root: Path, path: str) -> Path:
    """The file at `path` in root, resolved. ValueError if it lies outside, links followed."""
    file = (root / path).resolve()
    if not file.is_relative_to(root):
        raise ValueError(f"{path} is not inside {root}; --image-root DIR changes it")
    return file


def write_rows(path: str | Path, rows: list, indent: int | None = None) -> None:
    """JSON Lines. Atomic: a killed run leaves the old file or the new one, never half of it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, indent=indent, ensure_ascii=False) + "\n" for row in rows)
    Path(f"{path}.part").write_text("".join(lines), encoding="utf-8")
    os.replace(f"{path}.part", path)


def write_json(path: str | Path, data) -> None:
    write_rows(path, [data], indent=1)
