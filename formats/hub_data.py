"""Data sets of the Hugging Face hub: what is fetched, how much, under which licence, joined with its pictures.

All downloads are huggingface_hub's (its cache, its resuming, its hashes); nothing here retries. NAMED are the papers'
sets; any other public `owner/name` with rows in json, jsonl or parquet works too. Pictures are matched by file stem:
the mDPO release names those of VLFeedback, but does not hold them.
"""

import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

from external.hub import download
from external.terminal import LONGEST, count, printable
from formats.rows import SUFFIXES

ROWS = ("*.json", "*.jsonl", "*.parquet")
ARCHIVES = ("*.zip", "*.tar", "*.tar.gz", "*.tgz")
PICTURES = ("*.jpg", "*.jpeg", "*.png", "*.webp", "*.JPG", "*.JPEG", "*.PNG")
LEAST_JOINED = 0.99  # of the pictures; below, something is wrong with the match
LARGEST_PICTURE = 200 * 10**6  # bytes; nothing larger is unpacked


class Source(NamedTuple):
    """Where a data set lies on the hub."""

    repository: str
    rows: str | None = None  # the one file of rows to take, of several that overlap
    pictures: str | None = None  # the pictures' repository, where that is another


PDS = "pdsdpo/pdsdpo-v1_0-data"
NAMED = {
    "mdpo-10k": Source("fwnlp/mDPO-preference-data", pictures="MMInstruction/VLFeedback"),  # mDPO 4.1
    "rlhf-v": Source("openbmb/RLHF-V-Dataset"),
    "rlaif-v": Source("openbmb/RLAIF-V-Dataset"),
    "pds-dpo": Source(PDS, rows="9k-pds-dpo.json"),  # PDS-DPO 4.1; the smaller ones are its Table 3
    "pds-dpo-7k": Source(PDS, rows="7k-pds-dpo.json"),
    "pds-dpo-5k": Source(PDS, rows="5k-pds-dpo.json"),
    "pds-dpo-2k": Source(PDS, rows="2k-pds-dpo.json"),
}
DEFAULT = "mdpo-10k"


def is_name(data: Path | str) -> bool:
    """Whether data names a hub data set; what lies on the disk wins, and so does a path into a folder that is there."""
    name = str(data)
    if Path(name).exists():
        return False
    if name in NAMED:
        return True
    owner, _, repository = name.partition("/")
    looks_like_a_name = bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name))
    looks_like_a_file = Path(repository).suffix.lower() in (*SUFFIXES, ".csv", ".tsv", ".txt", ".gz", ".zip")
    return looks_like_a_name and not looks_like_a_file and not Path(owner).is_dir()


def fetch(name: str, with_pictures: bool = True) -> Path:
    """The folder with the rows of a data set, or the one file that holds them; with its pictures beside it where they
    are in the same repository."""
    source = NAMED.get(name, Source(name))
    patterns = (source.rows,) if source.rows else ROWS
    if with_pictures and not source.pictures:
        patterns += ARCHIVES + PICTURES
    folder = download(source.repository, patterns)
    return folder / source.rows if source.rows else folder


# ---- pictures ------------------------------------------------------------------------------------------------------


def join(name: str, folder: Path, images: set[str], image_root: Path | None) -> dict[str, Path]:
    """Image paths as stored -> picture files, by stem, in image_root, else in the set's own repository (`folder`) or in
    that of its pictures. SystemExit if fewer than 99 % are found."""
    repository = NAMED.get(name, Source(name)).pictures
    where = image_root or (download(repository, ARCHIVES + PICTURES) if repository else folder)
    stems = {Path(image).stem for image in images}
    by_stem = defaultdict(list)
    for place in (where, unpack(name, folder, where, stems)):
        for file in place.rglob("*") if place else ():
            if file.stem in stems and any(fnmatch(file.name, pattern) for pattern in PICTURES):
                by_stem[file.stem].append(file)
    found = {}
    for image in images:
        file = nearest(image, by_stem[Path(image).stem])
        if file is not None:
            found[image] = file
    report = (
        f"{name}: {len(found):,} of {len(images):,} pictures found by file stem in {image_root or repository or name}"
    )
    if len(found) < LEAST_JOINED * len(images):
        missing = printable(", ".join(sorted(images - set(found))[:3]), LONGEST)
        raise SystemExit(f"{report}; at least {LEAST_JOINED:.0%} are needed. Not found, for example: {missing}")
    print(report)
    return found


def nearest(image: str, files: list[Path]) -> Path | None:
    """Of the files with image's stem the one with its path, else with its name, else the only one there is."""
    same_path = [f for f in files if f.as_posix().endswith("/" + image)]
    same_name = [f for f in files if f.name == Path(image).name]
    for fitting in (same_path, same_name, files):
        if len(fitting) == 1:
            return fitting[0]
    return None


def members(archive: Path) -> Iterator[tuple[str, int, Callable]]:
    """(name, bytes unpacked, function that opens it) of each regular file in a zip or tar."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            for info in z.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, partial(z.open, info)
    else:
        with tarfile.open(archive) as t:
            for member in t:
                if member.isfile():
                    yield member.name, member.size, partial(t.extractfile, member)


UNPACKING = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError)
UNPACKING += (RuntimeError, NotImplementedError)  # an encrypted zip, an unknown compression


def unpack(name: str, rows: Path, folder: Path, stems: set[str]) -> Path | None:
    """The pictures with these stems out of the folder's archives, in a folder written whole or not at all."""
    from huggingface_hub import constants

    archives = [f for f in sorted(folder.rglob("*")) if any(fnmatch(f.name, pattern) for pattern in ARCHIVES)]
    if not archives:
        return None
    out = Path(constants.HF_HOME) / "nanomdpo" / f"{name.replace('/', '--')}-{rows.name[:8]}-{folder.name[:8]}"
    if out.is_dir():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    names = ", ".join(archive.name for archive in archives)
    print(f"{name}: unpacking {count(len(stems), 'picture')} from {names} into {out}", flush=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        root = Path(temporary).resolve() / "pictures"
        root.mkdir()
        for archive in archives:
            try:
                unpack_one(archive, root, stems)
            except UNPACKING as e:
                raise SystemExit(f"{archive}: cannot be unpacked ({e}); remove and fetch it again") from None
        root.rename(out)
    return out


def unpack_one(archive: Path, root: Path, stems: set[str]) -> None:
    """The regular files of an archive that have one of these stems, and none that would lie outside root."""
    for member, size, open_member in members(archive):
        to = (root / member).resolve()
        if Path(member).stem not in stems or not to.is_relative_to(root):
            continue
        wanted = f"{archive}: {printable(member, LONGEST)} would take {size:,} bytes"
        free = shutil.disk_usage(root).free
        if size > LARGEST_PICTURE:
            raise SystemExit(f"{wanted}; a picture of more than {LARGEST_PICTURE:,} is not unpacked")
        if size > free:
            raise SystemExit(f"{wanted}, {free:,} are free")
        to.parent.mkdir(parents=True, exist_ok=True)
        with open_member() as packed, open(to, "wb") as file:
            shutil.copyfileobj(packed, file)
