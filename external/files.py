"""Reading and writing files: text, JSON, rows; written whole or not at all."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.flags.optimize:  # said here, where every command comes by
    raise SystemExit("python -O leaves out checks that this program relies on: run it without -O and PYTHONOPTIMIZE.")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(file: Path) -> str:
    """Of a file of any size, without reading it whole."""
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# ---- reading -------------------------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    try:
        if not Path(path).is_file():
            raise SystemExit(f"{path}: no such file.")
        data = Path(path).read_bytes()
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror}).") from error
    if data.startswith(b"version https://git-lfs"):
        raise SystemExit(f"{path}: a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from error


def _unique_keys(pairs: list[tuple]) -> dict:
    # json keeps the last of two equal keys, which would drop an answer without a word
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice in one object: {sorted(key for key, _ in pairs)[:8]}")
    return found


def parse_json(text: str, where: str | Path):
    """The value of a JSON text that stands at `where`. SystemExit if it is none, or if an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{where}: broken JSON ({error}); was the file cut off, or edited by hand?") from error


def read_json(path: str | Path, kind: type = object):
    """The value in a JSON file. SystemExit if there is none, or if it is not of this kind (dict, list)."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, kind):
        raise SystemExit(f"{path}: holds a {type(value).__name__}, expected a {kind.__name__}.")
    return value


def read_rows(path: str | Path) -> list[dict]:
    """Rows of JSON Lines, of a JSON list, or of {"imgToEval": {image_id: row}}; `_where` is added for messages."""
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[0][1].strip() if lines else ""
    if first.startswith("[") or first == "{" or '"imgToEval"' in first:
        data = parse_json(text, path)
        if isinstance(data, dict):
            captions = data.get("imgToEval", {})
            data = list(captions.values()) if isinstance(captions, dict) else []
        rows = [(f"{path} row {i}", row) for i, row in enumerate(data)]
    else:
        rows = [(f"{path}:{number}", parse_json(line, f"{path}:{number}")) for number, line in lines]
    if not rows:
        raise SystemExit(f"{path}: no rows; it must be JSON Lines, a JSON list of rows, or an object with `imgToEval`.")
    for where, row in rows:
        if not isinstance(row, dict):
            raise SystemExit(f"{where}: a row must be a JSON object, this is {str(row)[:60]!r}.")
    return [{**row, "_where": where} for where, row in rows]


def inside(root: Path, path: str) -> Path:
    """The file at `path` in root, resolved. ValueError if it lies outside, links followed, or can be no file."""
    try:
        file = (root / path).resolve()
    except (OSError, RuntimeError) as error:  # a name that is too long, a link that leads back to itself
        raise ValueError(str(error)) from None
    if not file.is_relative_to(root):
        raise ValueError(f"{path} is not inside {root}; --image-root DIR changes it")
    return file


# ---- writing -------------------------------------------------------------------------------------------------------


def refuse_special(path: Path) -> None:
    """SystemExit for a pipe or a device: the first may be waited for in vain, and no file must replace the second."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise SystemExit(f"{path}: cannot be written (it is a pipe or a device); give the name of a file.")


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a file beside `path` to write; it becomes `path` at the end, or is removed if the body fails.

        with whole("result.json") as part:
            part.write_text("{}")

    Whoever looks at `path` sees the old file or the new one, never half of it, whatever ended the run. SystemExit if
    it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # what the user's umask says; safetensors makes files that only their owner can read
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it gets the name, or a power cut could leave an empty file
        os.replace(part, path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        remove(part)  # still there only if something failed


def remove(part: Path) -> None:
    with suppress(OSError):  # in a folder that cannot be written, nothing was
        part.unlink(missing_ok=True)


def check_writable(path: str | Path, reads: Iterable[str | Path | None] = ()) -> None:
    """SystemExit if a file could not be written at `path`, or if it is one of those that the command reads.

    For before the long work. Leaves nothing but the file's folder.
    """
    if Path(path).resolve() in [Path(file).resolve() for file in reads if file]:
        raise SystemExit(f"{path}: is read by this command and would be overwritten; give another name.")
    part = Path(f"{path}.part")
    try:
        refuse_special(Path(path))
        part.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        part.touch()
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        remove(part)


def write_text(path: str | Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def json_lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_rows(path: str | Path, rows: list) -> None:
    """JSON Lines."""
    write_text(path, json_lines(rows))


def append_rows(path: str | Path, rows: list) -> None:
    """JSON Lines after those that are there; on the disk when this returns. SystemExit if they cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_lines(rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error.strerror or error}).") from error


def write_json(path: str | Path, data, indent: int = 1) -> None:
    write_text(path, json.dumps(data, indent=indent, ensure_ascii=False) + "\n")
