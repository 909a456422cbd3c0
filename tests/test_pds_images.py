"""Pictures: noise and scale by id, text encoded once, failures as failures; a tiny pipeline of the real classes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pds import images
from tests.test_pds_rank_images import killed_three_times, write
from tests.test_pds_runner import read


@pytest.fixture
def command(tmp_path, tiny_generators):
    """Three prompts of two topics, two scales, two steps."""
    rows = [
        {"id": key, "topic": key[:3], "caption": f"a red boat near {key}"} for key in ("art-1", "school-1", "art-2")
    ]
    file, out = write(tmp_path / "prompts.jsonl", rows), tmp_path / "images.jsonl"
    argv = [str(file), "--out", str(out), "--model", str(tiny_generators / "sd3"), "--guidance", "11", "5"]
    return [*argv, "--steps", "2", "--batch", "2"], out


def pixels(out: Path) -> dict[str, np.ndarray]:
    return {row["id"]: np.asarray(Image.open(out.parent / row["image"])).astype(int) for row in read(out)}


def test_a_row_and_a_file_per_prompt_and_scale(command):
    args, out = command
    images.main(args)
    rows = {row["id"]: row for row in read(out)}
    assert set(rows) == {f"{key}/g{g}" for key in ("art-1", "school-1", "art-2") for g in (5, 11)}
    assert rows["art-2/g11"] == {
        "id": "art-2/g11",
        "prompt_id": "art-2",
        "topic": "art",
        "caption": "a red boat near art-2",
        "guidance": 11.0,
        "seed": rows["art-2/g11"]["seed"],
        "image": "images/art-2-g11.png",
    }
    assert len({row["seed"] for row in rows.values()}) == 6 and 0 <= rows["art-1/g5"]["seed"] < 2**32
    shapes = {picture.shape for picture in pixels(out).values()}
    assert shapes == {(32, 32, 3)}
    settings = json.loads(out.with_suffix(".settings.json").read_text())
    assert settings["guidance"] == [5.0, 11.0] and settings["steps"] == 2 and settings["diffusers"]


def test_a_picture_is_what_the_pipeline_paints_for_its_caption_scale_and_seed(command, tiny_generators):
    """One call of the library per picture, text as text: what batches and embeddings kept for all scales must equal."""
    args, out = command
    images.main(args)
    pipeline = images.load_pipeline(tiny_generators / "sd3", "float32", offload=False)
    pipeline.set_progress_bar_config(disable=True)
    found = pixels(out)
    for row in read(out):
        plain = pipeline(
            prompt=row["caption"],
            negative_prompt="",
            guidance_scale=row["guidance"],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(row["seed"]),
        )
        assert np.abs(np.asarray(plain.images[0]).astype(int) - found[row["id"]]).max() <= 1
    assert (
        np.abs(found["art-1/g5"] - found["art-1/g11"]).max() > 8 < np.abs(found["art-1/g5"] - found["art-2/g5"]).max()
    )


def test_text_is_encoded_once_for_all_scales(command, monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    args, out = command
    real, encoded = StableDiffusion3Pipeline.encode_prompt, []

    def noting(self, *positional, **named):
        if named.get("prompt_embeds") is None:
            encoded.append(named["prompt"])
        return real(self, *positional, **named)

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", noting)
    images.main(args)
    assert sorted(encoded) == [f"a red boat near {key}" for key in ("art-1", "art-2", "school-1")]


def test_one_noise_for_all_scales_of_a_prompt(command):
    args, out = command
    images.main([*args, "--same-noise"])
    seeds = {}
    for row in read(out):
        seeds.setdefault(row["prompt_id"], set()).add(row["seed"])
    assert all(len(own) == 1 for own in seeds.values()) and len(set.union(*seeds.values())) == 3
    assert images.seed_of(0, "art-1", 5.0) != images.seed_of(1, "art-1", 5.0) != images.seed_of(1, "art-1", None)


def test_killed_and_resumed(command):
    args, out = command
    args[-1] = "1"
    killed_three_times(images.main, args, out, seed=3)


def test_three_shards_joined_paint_the_same(command):
    args, out = command
    images.main(args)
    whole = pixels(out)
    for i in range(3):
        part = out.parent / f"shard-{i}" / "images.jsonl"
        images.main([args[0], "--out", str(part), *args[3:], "--shard-index", str(i), "--shard-count", "3"])
        for key, picture in pixels(part).items():
            assert np.abs(picture - whole.pop(key)).max() <= 1
    assert not whole


# ---- failures ------------------------------------------------------------------------------------------------------


def test_a_picture_of_one_colour_or_of_no_numbers_is_no_candidate():
    rng = np.random.default_rng(0)
    assert images.picture_problem(rng.uniform(size=(8, 8, 3))) is None
    grey = 0.5 + 0.001 * rng.uniform(size=(8, 8, 3))
    assert "of one colour" in images.picture_problem(grey)
    broken = rng.uniform(size=(8, 8, 3))
    broken[2, 2, 0] = np.nan
    assert "not numbers" in images.picture_problem(broken)


def test_a_grey_picture_is_an_error_row(command, monkeypatch):
    args, out = command
    real = images.Painter.paint

    def grey(self, captions, scale, seeds, steps):
        painted = real(self, captions, scale, seeds, steps)
        painted[[i for i, caption in enumerate(captions) if caption.endswith("school-1") and scale == 5]] = 0.5
        return painted

    monkeypatch.setattr(images.Painter, "paint", grey)
    with pytest.raises(SystemExit) as status:
        images.main(args)
    assert status.value.code == 1
    assert [row["id"] for row in read(out) if "error" in row] == ["school-1/g5"]
    assert not (out.parent / "images" / "school-1-g5.png").exists()
    monkeypatch.undo()
    images.main([*args, "--retry-failed"])
    assert not any("error" in row for row in read(out)) and len(read(out)) == 6


def test_a_scale_that_changes_nothing_stops_the_run(command, monkeypatch):
    """A distilled model: whatever the scale, the same picture."""
    args, out = command
    real = images.Painter.paint
    monkeypatch.setattr(images.Painter, "paint", lambda self, c, scale, seeds, n: real(self, c, 7.0, seeds, n))
    with pytest.raises(SystemExit, match="guidance_scale 5 and 11 give the same picture"):
        images.main(args)
    assert read(out) == []


def test_an_argument_that_the_pipeline_does_not_have(command):
    args, _ = command
    with pytest.raises(SystemExit, match="no true_cfg_scale; --scale-argument: guidance_scale"):
        images.main([*args, "--scale-argument", "true_cfg_scale"])


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["pipeline", "MyPipeline"]},
        {"_class_name": "StableDiffusion3Pipeline", "transformer": ["my_transformer", "Model"]},
    ],
)
def test_a_pipeline_that_brings_code_is_refused(command, tmp_path, index):
    args, _ = command
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    args[args.index("--model") + 1] = str(tmp_path / "model")
    with pytest.raises(SystemExit, match="wants code of its own"):
        images.main(args)


def test_another_out_in_the_same_folder_has_pictures_of_its_own(command):
    args, out = command
    images.main(args)
    before = pixels(out)
    images.main([*args, "--out", str(out.with_stem("again")), "--seed", "1"])
    assert all((pixels(out)[name] == picture).all() for name, picture in before.items())
    assert any((pixels(out.with_stem("again"))[name] != picture).any() for name, picture in before.items())


def test_a_size_that_the_pipeline_does_not_paint(command):
    args, _ = command
    with pytest.raises(SystemExit, match="does not paint with these flags: .*divisible"):
        images.main([*args, "--size", "7"])


def test_ids_that_would_leave_the_folder_are_refused(command):
    args, out = command
    write(Path(args[0]), [{"id": "../../x", "topic": "a", "caption": "b"}])
    with pytest.raises(SystemExit, match=r"prompt ../../x: an id names files"):
        images.main(args)


def test_a_gated_model_says_how_to_get_access(monkeypatch):
    seen = []
    monkeypatch.setattr(images.hub, "download", lambda *words: seen.append(words) or Path("."))
    images.find_pipeline(images.DEFAULT)
    assert "accepted at https://huggingface.co/stabilityai/stable-diffusion-3-medium-diffusers" in seen[0][-1]
    with pytest.raises(SystemExit, match="neither a folder with a model_index.json nor a name on the hub"):
        images.find_pipeline("/nowhere/at/all")


def test_another_pipeline_gets_words_and_only_what_it_knows():
    """Not SD3: no embeddings are made; `negative_prompt` only where it is known."""

    class Other:
        def __call__(self, prompt, true_cfg_scale, num_inference_steps, generator, output_type):
            noise = [torch.rand(4, 4, 3, generator=g) * true_cfg_scale for g in generator]
            return SimpleNamespace(images=torch.stack(noise).numpy())

        def set_progress_bar_config(self, disable):
            pass

    args = SimpleNamespace(steps=3, scale_argument="true_cfg_scale", size=None)
    painter = images.Painter(Other(), args, Path("x"))
    assert painter.paint(["a", "b"], 5.0, [1, 2], 3).shape == (2, 4, 4, 3)


# ---- pictures made elsewhere ---------------------------------------------------------------------------------------


def test_pictures_made_elsewhere_are_taken_by_name(command, tmp_path):
    args, out = command
    folder = tmp_path / "made"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("art-1-g5.png", "art-1-g11.jpg", "art-2-g5.webp", "school-1-g11.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    Image.new("RGB", (20, 20), "grey").save(folder / "art-2-g11.png")
    own = [args[0], "--out", str(out), "--images", str(folder), "--guidance", "5", "11"]
    with pytest.raises(SystemExit):
        images.main(own)
    rows = {row["id"]: row for row in read(out)}
    assert rows["art-1/g11"]["image"] == "images/art-1-g11.jpg" and rows["art-1/g11"]["seed"] is None
    assert (out.parent / "images" / "art-2-g5.webp").read_bytes() == (folder / "art-2-g5.webp").read_bytes()
    assert "no school-1-g5.png" in rows["school-1/g5"]["error"] and "one colour" in rows["art-2/g11"]["error"]
