"""Named data sets without a network: the library's own cache laid out by hand, and a stand-in for the hub's answers."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from formats import hub_data
from formats.readers import read_pairs

SHA = "0123456789abcdef0123456789abcdef01234567"
MDPO = [{"img_path": f"images/pic-{i}.jpg", "prompt": f"Q{i}?", "chosen": "Yes", "rejected": "No"} for i in range(200)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The library's cache, empty, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, repository: str, files: dict[str, bytes]) -> Path:
    """Files as the library keeps them: content-named blobs, a snapshot folder of links to them, a ref to it."""
    root = cache / f"datasets--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / SHA
    (root / "refs").mkdir(parents=True), (root / "blobs").mkdir()
    (root / "refs/main").write_text(SHA)
    for i, (name, content) in enumerate(files.items()):
        (root / f"blobs/{i:064x}").write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(root / f"blobs/{i:064x}")
    return snapshot


def zipped(names) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name in names:
            z.writestr(name, f"picture {name}")
    return out.getvalue()


def tarred(names) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name in names:
            content = f"picture {name}".encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            t.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_names():
    assert all(map(hub_data.is_name, ["mdpo-10k", "rlhf-v", "rlaif-v", "pds-dpo", "openbmb/RLHF-V-Dataset"]))
    assert not any(map(hub_data.is_name, ["data/pairs.json", "pairs.jsonl", "../x/y", "a/b/c", "mdpo-11k", __file__]))
    assert hub_data.DEFAULT == "mdpo-10k" and hub_data.NAMED["mdpo-10k"].repository == "fwnlp/mDPO-preference-data"


def test_a_typo_in_a_local_path_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for typo in ("data/pairs", "mydata/pairs.csv", "mydata/pairs.JSONL"):
        with pytest.raises(SystemExit, match="no such file|a .csv file"):
            read_pairs(typo)


@pytest.mark.parametrize("name, file", [("pds-dpo", "9k"), ("pds-dpo-2k", "2k")])
def test_pds_dpo_is_one_of_four_overlapping_files(name, file, cache, capsys):
    sizes = {"2k": 2, "5k": 3, "7k": 4, "9k": 5}
    files = {"images.tar": tarred(f"images/art-{i}.jpg" for i in range(1, 6))}
    for size, n in sizes.items():
        rows = [
            {"id": f"art-{i}", "image": f"images/art-{i}.jpg", "prompt": "Q?", "chosen": "Yes", "rejected": "No"}
            for i in range(1, n + 1)
        ]
        files[f"{size}-pds-dpo.json"] = json.dumps(rows).encode()
    put(cache, "pdsdpo/pdsdpo-v1_0-data", files)
    pairs, problems = read_pairs(name)
    assert len(pairs) == sizes[file] and not problems
    assert pairs[1].image.read_text() == "picture images/art-2.jpg"
    assert pairs[1].where == f"{name}/{file}-pds-dpo.json:2"


def test_of_overlapping_files_only_one_is_fetched(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub_data, "download", lambda *args: asked.append(args) or tmp_path)
    assert hub_data.fetch("pds-dpo-5k", with_pictures=False) == tmp_path / "5k-pds-dpo.json"
    assert asked == [("pdsdpo/pdsdpo-v1_0-data", ("5k-pds-dpo.json",))]


@pytest.mark.parametrize("damage", ["cut tar", "encrypted zip", "large"])
def test_archives_that_cannot_be_unpacked_leave_nothing(damage, cache, tmp_path, monkeypatch):
    put(cache, "fwnlp/mDPO-preference-data", {"d.json": json.dumps(MDPO).encode()})
    names = [f"pic-{i}.png" for i in range(200)]
    packed = {"cut tar": tarred(names)[:700], "encrypted zip": bytearray(zipped(names)), "large": zipped(names)}[damage]
    if damage == "encrypted zip":
        for start in (b"PK\x03\x04", b"PK\x01\x02"):  # bit 0 of the flags, 6 or 8 bytes into each header
            at = packed.find(start)
            packed[at + (6 if start[2] == 3 else 8)] |= 1
    if damage == "large":
        monkeypatch.setattr(hub_data, "LARGEST_PICTURE", 10)
    name = "m.tar.gz" if damage == "cut tar" else "m.zip"
    put(cache, "MMInstruction/VLFeedback", {name: bytes(packed)})
    with pytest.raises(SystemExit, match="cannot be unpacked|would take 17 bytes"):  # "picture pic-0.png"
        read_pairs("mdpo-10k")
    assert not list((tmp_path / "nanomdpo").iterdir())


@pytest.mark.parametrize("name", [*hub_data.NAMED, "some/thing"])
def test_offline_and_not_cached_is_one_sentence(name, cache):
    repository = hub_data.NAMED[name].repository if name in hub_data.NAMED else name
    with pytest.raises(SystemExit) as e:
        read_pairs(name)
    message = str(e.value)
    assert message.startswith(f"{repository}: not on this machine, and the hub did not give it (OfflineModeIsEnabled")
    assert f"hf download --repo-type dataset {repository}" in message and "\n" not in message
    assert not cache.exists()


@pytest.mark.parametrize("name", ["a..b/c", "a--b/c", "a" * 100 + "/b"])
def test_a_name_that_the_hub_cannot_have(name, cache):
    with pytest.raises(SystemExit, match="neither a file nor a name that the hub can have"):
        read_pairs(name)


@pytest.mark.parametrize("pack, archive", [(zipped, "merged.zip"), (tarred, "merged.tar.gz")], ids=["zip", "tar.gz"])
def test_mdpo_10k_is_joined_by_file_stem(pack, archive, cache, capsys):
    put(cache, "fwnlp/mDPO-preference-data", {"vlfeedback_llava_10k.json": json.dumps(MDPO).encode()})
    names = [f"merged_images/pic-{i}.png" for i in range(1, 200)]
    names += ["merged_images/unused.png", "../../../escape/pic-0.png"]
    put(cache, "MMInstruction/VLFeedback", {archive: pack(names), "vlfeedback_80k.jsonl": b"{}"})
    pairs, problems = read_pairs("mdpo-10k")
    assert [p.row for p in pairs] == list(range(2, 201)) and not problems  # 199 of 200: row 1 has no picture
    assert pairs[0].image.read_text() == "picture merged_images/pic-1.png"
    out = capsys.readouterr().out
    assert "199 of 200 pictures found by file stem in MMInstruction/VLFeedback" in out
    assert "199 pairs; left out: 1 with no picture of that name" in out
    unpacked = sorted(f.name for f in (cache.parent / "nanomdpo").rglob("*.png"))
    assert len(unpacked) == 199 and "unused.png" not in unpacked and not (cache.parent / "escape").exists()
    assert read_pairs("mdpo-10k")[0] == pairs and "unpacking" not in capsys.readouterr().out  # once


def test_join_stops_below_99_percent_and_on_broken_archives(cache, tmp_path):
    put(cache, "fwnlp/mDPO-preference-data", {"d.json": json.dumps(MDPO).encode()})
    snapshot = put(cache, "MMInstruction/VLFeedback", {"m.zip": zipped(f"pic-{i}.png" for i in range(3, 200))})
    with pytest.raises(SystemExit, match=r"197 of 200 .* at least 99% are needed.* images/pic-0.jpg, images/pic-1.jpg"):
        read_pairs("mdpo-10k")
    (snapshot / "m.zip").resolve().write_bytes(b"PK\x03\x04 half")
    for left in (tmp_path / "nanomdpo").iterdir():
        left.rename(tmp_path / "gone")
    with pytest.raises(SystemExit, match="m.zip: cannot be unpacked"):
        read_pairs("mdpo-10k")
    assert not list((tmp_path / "nanomdpo").iterdir())  # nothing half-written


def test_pictures_of_your_own_with_a_named_set(cache, tmp_path):
    put(cache, "fwnlp/mDPO-preference-data", {"d.json": json.dumps(MDPO[:2]).encode()})
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        (tmp_path / f"pictures/pic-{i}.jpg").touch()
    pairs, _ = read_pairs("mdpo-10k", tmp_path / "pictures")  # VLFeedback is not asked for
    assert [p.image for p in pairs] == [tmp_path / f"pictures/pic-{i}.jpg" for i in range(2)]


def test_loose_pictures_in_the_sets_own_repository(cache):
    rows = [{"image": f"{side}/art-1.jpg", "prompt": "Q?", "chosen": "Yes", "rejected": "No"} for side in "ab"]
    files = {"data.json": json.dumps(rows).encode(), "img/a/art-1.jpg": b"A", "img/b/art-1.jpg": b"B"}
    put(cache, "some/thing", files | {"dataset_infos.json": b"{}"})
    pairs, _ = read_pairs("some/thing")
    assert [p.image.read_bytes() for p in pairs] == [b"A", b"B"]  # the same stem: the longer path decides


def test_nearest():
    files = [Path("x/a/1.png"), Path("x/b/1.png"), Path("x/b/1.jpg")]
    assert hub_data.nearest("b/1.png", files) == files[1]
    assert hub_data.nearest("c/1.jpg", files) == files[2]  # no such path, but one such name
    assert hub_data.nearest("c/1.png", files) is None  # two
    assert hub_data.nearest("c/1.webp", files[:1]) == files[0] and hub_data.nearest("1.png", []) is None


def test_says_what_how_much_and_under_which_licence(cache, tmp_path, monkeypatch, capsys):
    names = {"a.parquet": 2_500_000, "b.parquet": 500_000, "README.md": 9_000_000}
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in names.items()]
    info = SimpleNamespace(sha=SHA, siblings=siblings, card_data={"license": "cc-by-nc-4.0"})
    asked = []

    def snapshot_download(repository, **settings):
        asked.append((repository, settings["repo_type"], "*.parquet" in settings["allow_patterns"]))
        assert "licence" in capsys.readouterr().out  # said before
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *a, **k: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda r, name, **k: "x" if name[0] == "b" else None)
    printed = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: printed.append(a[0]) or __import__("sys").stdout.write(a[0]))
    assert hub_data.fetch("rlhf-v") == tmp_path / "snapshot" and asked == [("openbmb/RLHF-V-Dataset", "dataset", True)]
    assert printed[0].startswith(
        "openbmb/RLHF-V-Dataset at 01234567: 2 files, 3.0 MB, of these 2.5 MB to download into "
    )
    assert printed[0].endswith("; licence: cc-by-nc-4.0")
    info.card_data = None
    hub_data.fetch("rlhf-v")
    assert printed[1].endswith("; licence: none given on the hub")
    info.siblings = siblings[2:]
    with pytest.raises(SystemExit, match="holds no "):
        hub_data.fetch("rlhf-v")


def test_a_download_that_breaks_off(cache, monkeypatch):
    sibling = SimpleNamespace(rfilename="a.json", size=1)
    info = SimpleNamespace(sha=SHA, siblings=[sibling], card_data=None)

    def breaks(*args, **settings):
        raise LocalEntryNotFoundError("connection reset")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *a, **k: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks)
    with pytest.raises(SystemExit, match="some/thing: the download broke off .*; the same command resumes it"):
        hub_data.fetch("some/thing")
