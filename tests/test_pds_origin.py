"""Hashes by which a stage sees that a model or a picture is another one than it was."""

import pytest
from PIL import Image

from external import files
from pds import origin


def test_the_hash_of_a_model_sees_a_change_in_the_middle(tmp_path):
    """Two checkpoints of one shape begin alike, and end alike where a frozen tower stands last."""
    file = tmp_path / "snapshots" / "abc123" / "w.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(400_000))
    first = origin.describe_model("m", file.parent, [file])
    assert first["revision"] == "abc123" and first["model"] == "m"
    file.write_bytes(bytes(200_000) + b"x" + bytes(199_999))
    assert origin.describe_model("m", file.parent, [file])["weights_sha256"] != first["weights_sha256"]


def test_rows_get_the_hash_of_a_picture_that_is_there(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"id": 1, "image": "a.png"}, {"id": 2, "image": "none.png"}, {"id": 3, "image": "../a.png"}]
    rows.append({"id": 4, "error": "no picture"})
    found = origin.with_pictures(rows, lambda row: files.inside(tmp_path, row["image"]))
    sha256 = files.sha256((tmp_path / "a.png").read_bytes())
    assert found == [rows[0] | {"image_sha256": sha256[:16]}, *rows[1:]]


def test_a_picture_that_is_not_the_earlier_stages_is_refused(tmp_path):
    """Scores of one picture must not stand beside answers about another."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = origin.with_pictures([{"id": 1, "image": "a.png"}], lambda row: tmp_path / row["image"])
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="id 1: a.png is another picture than the one that its row was made of"):
        origin.with_pictures(rows, lambda row: tmp_path / row["image"])
