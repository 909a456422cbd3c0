"""Ranking pictures: chosen by score and id, resumed after kill -9, failures as rows."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pds import rank_images
from tests.test_pds_runner import read

SCALES = (5.0, 7.0, 9.0, 11.0)


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def candidate(prompt: str, guidance: float, scores: dict | None = None) -> dict:
    row = {
        "id": f"{prompt}/g{guidance:g}",
        "prompt_id": prompt,
        "topic": prompt.split("-")[0],
        "caption": f"a picture of {prompt}",
        "guidance": guidance,
        "image": f"{prompt}-g{guidance:g}.png",
    }
    return row | ({} if scores is None else {"scores": scores})


@pytest.fixture
def images(tmp_path):
    """images.jsonl: two topics whose numbers interleave, four pictures each."""
    rng, rows = np.random.default_rng(0), []
    for prompt in ("art-1", "school-1", "art-2"):
        for guidance in SCALES:
            rows.append(candidate(prompt, guidance))
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / rows[-1]["image"])
    return write(tmp_path / "images.jsonl", rows)


@pytest.fixture
def command(images, tiny_judges):
    out = images.with_name("scores.jsonl")
    return [str(images), "--out", str(out), "--imagereward", str(tiny_judges / "imagereward"), "--batch", "2"], out


# ---- choosing ------------------------------------------------------------------------------------------------------


def scored(prompt: str, *values) -> list[dict]:
    return [candidate(prompt, g, {"r": value}) for g, value in zip(SCALES, values, strict=True)]


def test_the_highest_wins_and_the_lower_guidance_breaks_a_tie():
    rows = scored("art-1", 0.1, 0.7, 0.3, 0.7) + scored("art-2", -2.0, -3.0, -1.5, -4.0)
    best, dropped = rank_images.best_images(rows[::-1], "r")
    assert {row["id"]: row["guidance"] for row in best} == {"art-1": 7.0, "art-2": 9.0} and not dropped
    assert set(best[0]) == {"id", "topic", "caption", "image", "guidance", "scores"}


def test_poor_prompts_are_dropped_and_counted():
    rows = [row for i, top in enumerate((0.1, 0.9, 0.5, -1.0)) for row in scored(f"art-{i}", top, -2, -2, -2)]
    best, dropped = rank_images.best_images(rows, "r", min_score=0.0)
    assert [row["id"] for row in best] == ["art-0", "art-1", "art-2"] and dropped == {"min-score": 1}
    best, dropped = rank_images.best_images(rows, "r", drop_lowest=50)
    assert [row["id"] for row in best] == ["art-1", "art-2"] and dropped == {"drop-lowest": 2}
    best, dropped = rank_images.best_images(rows, "r", 0.0, 34)  # a third of the three that are left
    assert [row["id"] for row in best] == ["art-1", "art-2"] and dropped == {"min-score": 1, "drop-lowest": 1}


def test_a_failed_candidate_is_no_candidate():
    rows = scored("art-1", 0.1, 0.7, 0.3, 0.2)
    rows[1] = {"id": "art-1/g7", "prompt_id": "art-1", "error": "grey"}
    best, dropped = rank_images.best_images(rows, "r")
    assert best[0]["guidance"] == 9.0
    best, dropped = rank_images.best_images([rows[1]], "r")
    assert best == [] and dropped == {"no picture": 1}


def test_a_prompt_with_fewer_pictures_is_named(capsys):
    rows = scored("art-1", 0.1, 0.7, 0.3, 0.2) + scored("art-2", 0.1, 0.7, 0.3, 0.2)[:2]
    rank_images.say_fewer(rows, "r")
    assert capsys.readouterr().out == "1 prompt with fewer than 4 pictures, such as art-2\n"
    rank_images.say_fewer(rows[:4], "r")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode, kept", [("RGBA", "RGBA"), ("P", "P"), ("L", "RGB"), ("RGB", "RGB")])
def test_a_picture_reaches_the_scorers_as_it_was_saved(tmp_path, mode, kept):
    """Transparency and palettes are resized before they are RGB, as both official scorers do."""
    Image.new(mode, (9, 9)).save(tmp_path / "x.png")
    assert rank_images.open_as_saved(tmp_path / "x.png").mode == kept


# ---- the stage -----------------------------------------------------------------------------------------------------


def test_every_prompt_keeps_its_own_picture(command, capsys):
    """The release pairs sorted pictures with lines of prompts: school-1 would get art-2's."""
    args, out = command
    best = out.with_name("best.jsonl")
    rank_images.main([*args, "--best", str(best)])
    assert [row["id"] for row in read(best)] == ["art-1", "art-2", "school-1"] or len(read(best)) == 3
    scores = {row["id"]: row["scores"]["imagereward"] for row in read(out)}
    for row in read(best):
        own = {g: scores[f"{row['id']}/g{g:g}"] for g in SCALES}
        assert row["guidance"] == max(own, key=own.get)
        assert row["image"] == f"{row['id']}-g{row['guidance']:g}.png" and row["caption"].endswith(row["id"])
    assert "12 done (12 rows new), 0 failed" in capsys.readouterr().out
    settings = json.loads(best.with_suffix(".settings.json").read_text())
    assert settings["stage"] == "rank_images" and settings["best_by"] == "imagereward"
    assert len(settings["scorers"]["imagereward"]["weights_sha256"]) == 16


def test_three_scorers_and_a_later_one_is_added(command, tiny_judges):
    args, out = command
    more = ["--clip", str(tiny_judges / "clip"), "--blip", str(tiny_judges / "imagereward")]
    rank_images.main([*args, *more, "--scorer", "imagereward", "--scorer", "clip", "--scorer", "blip"])
    together = {row["id"]: row["scores"] for row in read(out)}
    assert list(together["art-1/g5"]) == ["imagereward", "clip", "blip"]
    first, second = out.with_name("first.jsonl"), out.with_name("second.jsonl")
    rank_images.main([args[0], "--out", str(first), *args[3:]])
    rank_images.main([str(first), "--out", str(second), *args[3:], *more, "--scorer", "clip"])
    for row in read(second):
        assert list(row["scores"]) == ["imagereward", "clip"]
        assert row["scores"] == pytest.approx({name: together[row["id"]][name] for name in row["scores"]}, abs=1e-5)


def test_cut_captions_are_counted(command, images, capsys):
    args, out = command
    rows = read(images)
    for row in rows[:8]:
        row["caption"] = f"a long caption of {row['prompt_id']} " * 9
    write(images, rows)
    rank_images.main(args)
    assert "imagereward: 2 of 3 captions are longer than it reads, and were cut" in capsys.readouterr().out


def test_a_picture_that_cannot_be_used_is_an_error_row_and_the_rest_goes_on(command, images, capsys):
    args, out = command
    rows = read(images)
    (images.parent / rows[1]["image"]).unlink()
    (images.parent / rows[2]["image"]).write_bytes((images.parent / rows[3]["image"]).read_bytes()[:300])
    rows[3]["image"] = "../../etc/passwd"
    write(images, rows)
    with pytest.raises(SystemExit) as status:
        rank_images.main(args)
    assert status.value.code == 1
    errors = {row["id"]: row["error"] for row in read(out) if "error" in row}
    assert list(errors) == ["art-1/g7", "art-1/g9", "art-1/g11"]
    assert "missing image" in errors["art-1/g7"] and "broken image" in errors["art-1/g9"]
    assert "is not inside" in errors["art-1/g11"]
    assert "9 done (12 rows new), 3 failed" in capsys.readouterr().out
    Image.new("RGB", (30, 30), "red").save(images.parent / "art-1-g7.png")
    with pytest.raises(SystemExit):
        rank_images.main([*args, "--retry-failed"])
    assert sum("error" in row for row in read(out)) == 2


def test_bad_rows_end_the_run_before_a_model_is_looked_for(images, tmp_path):
    rows = read(images)
    del rows[4]["caption"]
    write(images, rows)
    with pytest.raises(SystemExit, match=r"images.jsonl:5: id school-1/g5 has no `caption`"):
        rank_images.main([str(images), "--out", str(tmp_path / "o.jsonl"), "--imagereward", "/nowhere"])


def run_and_kill(command, args: list[str], out: Path, at_bytes: int) -> None:
    """A stage in a process of its own, killed when OUT has grown to a size."""
    child = os.fork()
    if child == 0:
        try:
            command(args)
        finally:
            os._exit(0)
    ended = 0
    while not ended and (not out.exists() or out.stat().st_size < at_bytes):
        time.sleep(0.001)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def killed_three_times(command, args: list[str], out: Path, seed: int = 0) -> None:
    """Undisturbed first; then killed at three seeded moments and cut once, and resumed: the same rows, none twice."""
    command(args)
    whole = sorted(out.read_text().splitlines())
    size = out.stat().st_size
    out.unlink()
    rng = random.Random(seed)
    for moment in sorted(rng.uniform(0.05, 0.9) for _ in range(3)):
        run_and_kill(command, args, out, int(moment * size))
    out.write_bytes(out.read_bytes()[: -rng.randrange(1, 40)])
    command(args)
    assert sorted(out.read_text().splitlines()) == whole


def test_killed_and_resumed(command):
    args, out = command
    args[-1] = "1"
    killed_three_times(rank_images.main, args, out)


def test_three_shards_joined_choose_the_same(command):
    args, out = command
    best = out.with_name("best.jsonl")
    rank_images.main([*args, "--best", str(best)])
    parts, chosen = [], []
    for i in range(3):
        part = out.with_name(f"part-{i}.jsonl")
        own = [args[0], "--out", str(part), *args[3:], "--best", str(out.with_name(f"best-{i}.jsonl"))]
        rank_images.main([*own, "--shard-index", str(i), "--shard-count", "3"])
        parts += read(part)
        chosen += read(out.with_name(f"best-{i}.jsonl"))
    wanted = {row["id"]: row["scores"]["imagereward"] for row in read(out)}
    assert {row["id"]: row["scores"]["imagereward"] for row in parts} == pytest.approx(wanted, abs=1e-5)
    assert {row["id"]: row["image"] for row in chosen} == {row["id"]: row["image"] for row in read(best)}


def test_flags_that_need_each_other(command, capsys):
    args, _ = command
    for more in (["--min-score", "0"], ["--scorer", "blip"], ["--best", "b", "--drop-lowest", "100"]):
        with pytest.raises(SystemExit) as error:
            rank_images.main([*args, *more])
        assert error.value.code == 2
