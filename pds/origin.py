"""What rows were made of, told by hashes: which model, which pictures. The same names may stand for others later.

Not from a paper.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bases import checkpoint
from external import files
from external.progress import progress
from pds.runner import Row


def describe_model(name: str, folder: Path, deciding: list[Path]) -> dict:
    """Which model it was, for the settings: its name, the hub's revision, and one hash over the files that decide."""
    return named_model(name, folder, checkpoint.files_sha256(deciding, folder))


def named_model(name: str, folder: Path, sha256: str) -> dict:
    from_hub = folder.parent.name == "snapshots"
    return {"model": name, "revision": folder.name if from_hub else None, "weights_sha256": sha256[:16]}


def picture_sha256(path: Path) -> str:
    return files.file_sha256(path)[:16]


def with_pictures(rows: list[Row], picture_of: Callable[[Row], Path | None]) -> list[Row]:
    """Rows with `image_sha256`: by it a run that is resumed sees that a picture is another one than it was.

    Rows whose picture is not there, or that failed before, stay as they are: the stage says what is wrong with them.
    SystemExit where an earlier stage gave a row the hash of another picture.
    """

    def with_picture(row: Row) -> Row:
        if "error" in row:
            return row
        try:
            path = picture_of(row)
            return row | {"image_sha256": picture_sha256(path)} if path and path.is_file() else row
        except (ValueError, OSError):  # outside of the folder, or no name of a file
            return row

    with ThreadPoolExecutor() as pool:
        found = list(progress(pool.map(with_picture, rows), "pictures", len(rows)))
    for row, now in zip(rows, found, strict=True):
        if row.get("image_sha256", now.get("image_sha256")) != now.get("image_sha256"):
            raise SystemExit(
                f"id {row['id']}: {row['image']} is another picture than the one that its row was made of. Put it "
                "back, or run the earlier stages again with another --out."
            )
    return found
