"""Files -> rows with their place: .json, .jsonl and .parquet, one file or the shards of a folder.

A line of a .jsonl file that cannot be read is a row of its own, with the reason: it stops no scan. A file that cannot
be read as a whole ends in a SystemExit that says what it looks like.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from external import files
from external.terminal import LONGEST, count, printable

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # never rows
PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz")


class Row(NamedTuple):
    """One row as stored. `columns` is None where it cannot be read; `detail` then says why."""

    number: int  # 1-based over all files; m_l is drawn from it
    where: str  # file:line of a .jsonl file, file:row of the others
    columns: dict | None
    detail: str = ""


def read_rows(folder: Path, name: str, keys_twice: Counter) -> Iterator[Row]:
    """The rows of a file or of a folder's shards. `name` is what the user calls it; keys that stand twice in one JSON
    object, of which the last counts, are counted in `keys_twice`."""
    number = 0
    for file in data_files(folder):
        place = name if file == folder else f"{name}/{file.relative_to(folder).as_posix()}"
        for at, columns, detail in file_rows(file, keys_twice):
            number += 1
            yield Row(number, f"{place}:{at}", columns, detail)
    if number == 0:
        raise SystemExit(f"{name}: no rows")


def data_files(data: Path) -> list[Path]:
    """The file itself, or those of a folder that hold its rows: the shards of one set, its train split if any."""
    if not data.is_dir():
        return [data]
    found = []
    for file in sorted(data.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(data).parts)  # .ipynb_checkpoints, macOS's ._x
        if file.suffix.lower() in SUFFIXES and file.name not in METADATA and not hidden:
            found.append(file)
    train = [f for f in found if "train" in f.name]
    if train and len(train) < len(found):
        others = count(len(found) - len(train), "other file")
        print(f"{data}: reading {', '.join(f.name for f in train)}; {others} left alone")
        found = train
    if not found:
        hint = ""
        if any(data.rglob("*.arrow")):
            hint = "; .arrow files are written as parquet by datasets.load_from_disk(FOLDER).to_parquet(FILE)"
        raise SystemExit(f"{data}: no .json, .jsonl or .parquet file in this folder{hint}")
    if len(found) > 1 and any(f.suffix.lower() != ".parquet" for f in found):
        raise SystemExit(f"{data}: several data files ({', '.join(f.name for f in found)}); give one of them")
    refuse_missing_shards(data, found)
    if len(found) > 1 and found != train:
        print(f"{data}: reading {len(found)} files as one set: {printable(', '.join(f.name for f in found), LONGEST)}")
    return found


def refuse_missing_shards(data: Path, found: list[Path]) -> None:
    """SystemExit where the names say how many shards there are (train-00000-of-00003.parquet), and some are not."""
    names = {file.name for file in found}
    for name in sorted(names):
        shard = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\..+)", name)
        if shard is None:
            continue
        start, total, end = shard.groups()
        missing = {f"{start}-{i:05d}-of-{total}{end}" for i in range(int(total))} - names
        if missing:
            raise SystemExit(f"{data}: {min(missing)} is not there; is the download complete?")


def file_rows(file: Path, keys_twice: Counter) -> Iterator[tuple[int, dict | None, str]]:
    """(line or row number, columns, why there are none) of each row of one file."""
    suffix = file.suffix.lower() or ".json"
    if suffix in PACKED:
        raise SystemExit(f"{file}: a packed file; unpack it first. .json, .jsonl and .parquet are read")
    if suffix not in SUFFIXES:
        raise SystemExit(f"{file}: a {suffix} file; .json, .jsonl and .parquet are read (docs/data.md)")
    if not file.is_file():  # a pipe would be waited for
        raise SystemExit(f"{file}: no such file")
    if suffix == ".parquet":
        yield from parquet_rows(file)
    elif suffix == ".json":
        yield from json_rows(file, keys_twice)
    else:
        yield from jsonl_rows(file, keys_twice)


def parse(text: str, keys_twice: Counter):
    """The value of a JSON text. ValueError with line and column if it is none."""

    def as_dict(items: list[tuple]) -> dict:
        found = dict(items)
        if len(found) < len(items):
            counts = Counter(key for key, _ in items)
            keys_twice.update(key for key, n in counts.items() if n > 1)
        return found

    try:
        return json.loads(text, object_pairs_hook=as_dict)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_rows(file: Path, keys_twice: Counter) -> Iterator[tuple[int, dict | None, str]]:
    """Of a .json file that is a list of rows."""
    try:
        rows = parse(files.read_text(file), keys_twice)
    except ValueError as e:
        hint = "; one JSON value a line? Then name it .jsonl" if str(e).startswith("Extra data: line 2") else ""
        raise SystemExit(f"{file}: not readable as .json: {e}{hint}") from None
    if isinstance(rows, dict):
        keys = printable(", ".join(rows)) or "none"
        raise SystemExit(f"{file}: expected a list of rows, this is one object with the keys {keys}")
    if not isinstance(rows, list):
        raise SystemExit(f"{file}: expected a list of rows with named columns, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield number, *columns_of(row)


def columns_of(row) -> tuple[dict | None, str]:
    """The columns of a row, or why it has none."""
    if isinstance(row, dict):
        return row, ""
    return None, f"it is of type {type(row).__name__}, wanted an object with named columns"


def jsonl_rows(file: Path, keys_twice: Counter) -> Iterator[tuple[int, dict | None, str]]:
    """One JSON object a line; blank lines are none."""
    text = files.read_text(file)
    if re.match(r"\s*\[\s*\{", text) and text.rstrip().endswith("]"):
        raise SystemExit(f"{file}: one list of rows, not one JSON object a line; name it .json")
    for line_number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON allows U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = parse(line, keys_twice)
        except ValueError as e:
            reason = f"column {e.colno}: {e.msg}" if isinstance(e, json.JSONDecodeError) else str(e)
            yield line_number, None, reason
            continue
        yield line_number, *columns_of(row)


def parquet_rows(file: Path) -> Iterator[tuple[int, dict | None, str]]:
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SystemExit(f"{file}: reading parquet needs pyarrow; run `pip install pyarrow`") from None
    number = 0
    try:
        with ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:  # a row as a dict would hold the last one only
                raise SystemExit(f"{file}: several columns are called {', '.join(twice)}; rename all but one")
            for batch in parquet.iter_batches(1000):  # pictures are in it: never the whole file twice
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, ""
    except (OSError, ValueError, ArithmeticError, ArrowException) as e:
        raise SystemExit(f"{file}: not readable as .parquet, after row {number}: {e}") from None
