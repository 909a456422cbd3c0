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
from collections import defaultdict
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from external.hub import download

NAMED = {  # name: repository of the rows, repository of the pictures where that is another
    "mdpo-10k": ("fwnlp/mDPO-preference-data", "MMInstruction/VLFeedback"),  # mDPO 4.1
    "rlhf-v": ("openbmb/RLHF-V-Dataset", None),
    "rlaif-v": ("openbmb/RLAIF-V-Dataset", None),
    "pds-dpo": ("pdsdpo/pdsdpo-v1_0-data", None),
}
DEFAULT = "mdpo-10k"
ROWS = ("*.json", "*.jsonl", "*.parquet")
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # never rows
ARCHIVES = ("*.zip", "*.tar", "*.tar.gz", "*.tgz")
PICTURES = ("*.jpg", "*.jpeg", "*.png", "*.webp", "*.JPG", "*.JPEG", "*.PNG")
LEAST_JOINED = 0.99  # of the pictures; below, something is wrong with the match


def is_name(data: Path | str) -> bool:
    """Whether data names a hub data set; what lies on the disk wins."""
    name = str(data)
    repository = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not any(fnmatch(name, p) for p in ROWS)
    return not Path(name).exists() and (name in NAMED or bool(repository))


def fetch(name: str, with_pictures: bool = True) -> Path:
    """The folder with the rows of a data set, and with its pictures where they are in the same repository."""
    repository, pictures = NAMED.get(name, (name, None))
    return download(repository, ROWS + (ARCHIVES + PICTURES) * (with_pictures and not pictures))


# ---- pictures ------------------------------------------------------------------------------------------------------


def join(name: str, rows: Path, images: set[str], image_root: Path | None) -> dict[str, Path]:
    """Image paths as stored -> picture files, by stem, in image_root, else in the set's own repository or that of its
    pictures. SystemExit if fewer than 99 % are found."""
    pictures = NAMED.get(name, (name, None))[1]
    folder = image_root or (download(pictures, ARCHIVES + PICTURES) if pictures else rows)
    by_stem = defaultdict(list)
    stems = {Path(image).stem for image in images}
    for place in filter(None, (folder, unpack(name, rows, folder, stems))):
        for file in place.rglob("*"):
            if file.stem in stems and any(fnmatch(file.name, p) for p in PICTURES):
                by_stem[file.stem].append(file)
    found = {image: file for image in images if (file := nearest(image, by_stem[Path(image).stem]))}
    place = image_root or pictures or name
    report = f"{name}: {len(found):,} of {len(images):,} pictures found by file stem in {place}"
    if len(found) < LEAST_JOINED * len(images):
        missing = ", ".join(sorted(images - set(found))[:3])
        raise SystemExit(f"{report}; at least {LEAST_JOINED:.0%} are needed. Not found, for example: {missing}")
    print(report)
    return found


def nearest(image: str, files: list[Path]) -> Path | None:
    """Of the files with image's stem the one with its path, else with its name, else the only one there is."""
    for fits in (lambda f: f.as_posix().endswith("/" + image), lambda f: f.name == Path(image).name, lambda f: True):
        if len(found := [f for f in files if fits(f)]) == 1:
            return found[0]
    return None


def members(archive: Path) -> Iterator[tuple[str, Callable]]:
    """(name, function that opens it) of each file in a zip or tar."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            yield from ((i.filename, partial(z.open, i)) for i in z.infolist() if not i.is_dir())
    else:
        with tarfile.open(archive) as t:
            yield from ((m.name, partial(t.extractfile, m)) for m in t if m.isfile())


def unpack(name: str, rows: Path, folder: Path, stems: set[str]) -> Path | None:
    """The pictures with these stems out of the folder's archives, in a folder written whole or not at all."""
    from huggingface_hub import constants

    archives = [f for f in sorted(folder.rglob("*")) if any(fnmatch(f.name, p) for p in ARCHIVES)]
    if not archives:
        return None
    out = Path(constants.HF_HOME) / "nanomdpo" / f"{name.replace('/', '--')}-{rows.name[:8]}-{folder.name[:8]}"
    if out.is_dir():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    names = ", ".join(archive.name for archive in archives)
    print(f"{name}: unpacking {len(stems):,} pictures from {names} into {out}", flush=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        root = Path(temporary) / "pictures"
        root.mkdir()
        for archive in archives:
            try:
                for member, open_member in members(archive):
                    to = (root / member).resolve()
                    if Path(member).stem in stems and to.is_relative_to(root.resolve()):
                        to.parent.mkdir(parents=True, exist_ok=True)
                        with open_member() as source, open(to, "wb") as target:
                            shutil.copyfileobj(source, target)
            except (OSError, zipfile.BadZipFile, tarfile.TarError) as e:
                raise SystemExit(f"{archive}: cannot be unpacked ({e}); remove and fetch it again") from None
        root.rename(out)
    return out
