"""bases/checkpoint.py: every layout loads to the same model; every kind of bad folder is one readable message."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS_ID, IMAGE_ID, LAYOUTS, PAD_ID, batch, llava, write_hub, write_in_memory, write_original

from bases.architectures import read_config
from bases.checkpoint import load_base, load_model, resolve, source_of
from model import Config


@pytest.fixture(scope="module")
def library():
    return llava(2)


@pytest.fixture
def hub(library, tmp_path):
    return write_hub(library, tmp_path / "hub")


# ---- what loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_to_the_same_logits(library, tmp_path, layout):
    ours, folder = load_base(str(LAYOUTS[layout](library, tmp_path / "w")))
    image_id = -200 if layout == "original" else IMAGE_ID
    ids, images, _ = batch(image_id=image_id)
    with torch.no_grad():
        expected = library(input_ids=batch()[0], pixel_values=images).logits
        torch.testing.assert_close(ours(ids, images), expected, atol=2e-5, rtol=0)
    assert ours.config.image_id == image_id and ours.config.eos_id == EOS_ID and folder == tmp_path / "w"
    assert ours.config.pad_id == (0 if layout == "original" else PAD_ID)
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_vision_folder_given_wins_over_the_tower_inside(library, tmp_path):
    folder = write_hub(library, tmp_path / "hub")
    write_original(llava(2, seed=1), tmp_path / "other" / "original")
    ours = load_model(folder, tmp_path / "other" / "some-clip")
    other = llava(2, seed=1).model.vision_tower
    images = batch()[1]
    with torch.no_grad():
        expected = other(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(ours.vision_tower(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored, wanted", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_dtypes(library, tmp_path, stored, wanted):
    folder = write_in_memory(llava(2).to(stored), tmp_path / "w")
    ours = load_model(folder, dtype=wanted)
    assert {p.dtype for p in ours.parameters()} == {wanted}
    expected = library.lm_head.weight.to(stored).to(wanted)
    assert torch.equal(ours.lm_head.weight, expected)


def test_a_bin_file_of_old_torch(library, tmp_path):
    """Before torch 1.6 files were not zip files and cannot be mapped."""
    folder = write_original(library, tmp_path / "w")
    clip = tmp_path / "some-clip" / "pytorch_model.bin"
    torch.save(torch.load(clip), clip, _use_new_zipfile_serialization=False)
    ids, images, _ = batch(image_id=-200)
    with torch.no_grad():
        expected = library(input_ids=batch()[0], pixel_values=images).logits
        torch.testing.assert_close(load_model(folder)(ids, images), expected, atol=2e-5, rtol=0)


def test_the_real_sparse_config(tmp_path):
    """What the hub's 7B says; all else is the default of Llama-7B and CLIP ViT-L."""
    config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "patch_size": 14,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == Config()


def test_llamas_eps_where_the_file_is_silent(hub):
    """1e-6 is the default of Llama's config class; LLaVA-1.5's files say 1e-5."""
    config = json.loads((hub / "config.json").read_text())
    assert read_config(hub).eps == 1e-5
    del config["text_config"]["rms_norm_eps"]
    (hub / "config.json").write_text(json.dumps(config))
    assert read_config(hub).eps == 1e-6


def test_rope_theta_in_both_spellings(hub):
    config = json.loads((hub / "config.json").read_text())
    for entry in ({"rope_theta": 5e4}, {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}):
        (hub / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | entry}))
        assert read_config(hub).rope_theta == 5e4


def test_resolve(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOMDPO_WEIGHTS", str(tmp_path))
    shutil.copytree(hub, tmp_path / "llava-1.5-7b")
    assert resolve("llava-1.5-7b") == tmp_path / "llava-1.5-7b"
    assert resolve("llava-1.5-7b", hub) == hub  # a folder that is given wins
    with pytest.raises(SystemExit, match=r"llava-1\.5-7c.*no config\.json.*llava-1\.5-7b, llava-1\.5-13b, bunny"):
        resolve("llava-1.5-7c")


def test_a_revision_of_the_hub(hub, tmp_path, monkeypatch):
    """NAME@REVISION is asked of the hub, even where another revision lies ready."""
    asked = []
    info = SimpleNamespace(sha="c0ffee00", siblings=[SimpleNamespace(rfilename="config.json", size=1)], card_data=None)

    def repo_info(self, repository, **settings):
        asked.append((repository, settings["revision"]))
        return info

    def snapshot_download(repository, **settings):
        asked.append((repository, settings["revision"]))
        return str(hub)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("NANOMDPO_WEIGHTS", str(tmp_path))
    shutil.copytree(hub, tmp_path / "llava-1.5-7b")
    assert resolve("llava-1.5-7b@c0ffee") == hub
    assert asked == [("llava-hf/llava-1.5-7b-hf", "c0ffee")] * 2
    assert source_of("llava-1.5-7b@c0ffee") == "llava-hf/llava-1.5-7b-hf"
    assert resolve(f"{hub}") == hub and source_of(f"{hub}@x") == f"{hub}@x"


def test_the_toy_is_found_where_training_made_it(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="`python train.py --base toy` makes it"):
        resolve("toy")
    for seed in (10, 3):
        shutil.copytree(hub, tmp_path / "runs" / f"toy-world-{seed}" / "base")
    assert resolve("toy") == Path("runs/toy-world-3/base")
    assert resolve("toy", hub) == hub


def test_offline_and_not_cached(tmp_path):
    """One sentence with the repository, its size and what to do; in a process of its own, the hub reads its
    environment when imported."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    env.pop("NANOMDPO_WEIGHTS", None)
    code = "from bases import checkpoint; checkpoint.load_base('llava-1.5-7b')"
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "llava-hf/llava-1.5-7b-hf (14.1 GB)" in run.stderr and "hf download" in run.stderr


# ---- what is refused -----------------------------------------------------------------------------------------------

SHARD = "model-00002-of-00003.safetensors"


def edit(folder: Path, shard: str = SHARD, drop: str = "", add=None, reshape: str = "") -> None:
    state = load_file(folder / shard)
    state = {k: v for k, v in state.items() if not drop or drop not in k}
    state = {k: v[:-1].clone() if reshape and reshape in k else v for k, v in state.items()} | (add or {})
    save_file(state, folder / shard)


def truncate(file: Path, size: float = 0.6) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * size)])


def configure(folder: Path, **change) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


def text(folder: Path, **change) -> None:
    configure(folder, text_config=json.loads((folder / "config.json").read_text())["text_config"] | change)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 4988000000\n"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: truncate(f / SHARD), "00002-of-00003.safetensors: truncated or damaged"),
        (lambda f: truncate(f / SHARD, 0), "00002-of-00003.safetensors: truncated or damaged"),
        (lambda f: (f / SHARD).write_bytes(POINTER), "00002-of-00003.safetensors: truncated or damaged"),
        (lambda f: (f / SHARD).unlink(), r"names 1 file not there: model-00002-of-00003.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: truncate(f / "config.json"), r"config\.json: broken JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: holds a list"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "no weights"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), r"index\.json: weight_map names no tensor"),
        (lambda f: edit(f, drop="layers.1.mlp"), r"in the index but in no file: 2 tensors, language_model\.model"),
        (
            lambda f: edit(f, add={"language_model.model.layers.7.extra": torch.ones(2)}),
            r"1 unexpected: language_model\.model\.layers\.7\.extra",
        ),
        (
            lambda f: edit(f, reshape="pre_layrnorm.weight"),
            r"1 of wrong shape: vision_tower\.pre_layrnorm\.weight \(15,\) instead of \(16,\)",
        ),
        (lambda f: edit(f, add={"multi_modal_projector.linear_1.bias": torch.ones(32)}), "twice"),
        (lambda f: text(f, num_hidden_layers=4), r"9 missing: language_model\.layers\.3\."),
        (lambda f: text(f, num_hidden_layers=2), r"9 unexpected: language_model\.model\.layers\.2\."),
        (lambda f: text(f, hidden_act="gelu"), "not a LLaVA-1.5: hidden_act"),
        (lambda f: text(f, rope_scaling={"type": "linear", "factor": 2.0}), "not a LLaVA-1.5: rope scaling"),
        (lambda f: text(f, head_dim=16), "not a LLaVA-1.5: head_dim"),
        (lambda f: configure(f, vision_feature_layer=[-2, -5]), "not a LLaVA-1.5: several feature layers"),
        (lambda f: configure(f, vision_feature_select_strategy="full"), "not a LLaVA-1.5: feature select strategy"),
        (lambda f: configure(f, image_aspect_ratio="anyres"), "not a LLaVA-1.5: image_aspect_ratio 'anyres'"),
        (lambda f: configure(f, model_type="qwen2_vl"), r"model_type 'qwen2_vl'; supported: llava"),
    ],
)
def test_bad_folders(hub, spoil, message):
    spoil(hub)
    with pytest.raises(SystemExit, match=message):
        load_base(str(hub))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: spread(f, torch.int32), r"24 of a type that no weights have: vision_tower\.class_embedding I32"),
        (lambda f: spread(f, torch.uint8), r"of a type that no weights have: .* U8"),
        (lambda f: poison(f, float("nan")), r"00002-of-00003.safetensors: vision_\S+norm\S* holds numbers that are"),
        (lambda f: poison(f, float("inf")), "not finite in float32"),
        (lambda f: reindex(f, [1]), r"index\.json: weight_map is a list"),
        (lambda f: reindex(f, 7), r"index\.json: weight_map is a int"),
        (lambda f: reindex(f, {"a": 7}), r"index\.json: a is in 7, expected the name of a file"),
        (lambda f: reindex(f, {"a": "../hub/model-00001-of-00003.safetensors"}), "expected the name of a file beside"),
        (lambda f: reindex(f, {"a": "/etc/passwd"}), "expected the name of a file beside"),
        (lambda f: configure(f, mm_vision_tower=5) or drop_vision(f), "mm_vision_tower is 5"),
    ],
)
def test_weights_that_are_none(hub, spoil, message):
    spoil(hub)
    with pytest.raises(SystemExit, match=message):
        load_base(str(hub))


def spread(folder: Path, dtype: torch.dtype) -> None:
    state = load_file(folder / SHARD)
    save_file({name: t.to(dtype) for name, t in state.items()}, folder / SHARD)


def poison(folder: Path, value: float) -> None:
    state = load_file(folder / SHARD)
    state["vision_tower.vision_model.pre_layrnorm.weight"][3] = value
    save_file(state, folder / SHARD)


def reindex(folder: Path, table) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def drop_vision(folder: Path) -> None:
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file({n: t for n, t in state.items() if "vision" not in n}, folder / "model.safetensors")


def test_a_large_finite_tensor_is_loaded(library, tmp_path):
    """Its sum overflows float32, its numbers do not."""
    folder = write_in_memory(library, tmp_path / "w")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"].fill_(3e38)
    save_file(state, folder / "model.safetensors")
    assert load_model(folder).lm_head.weight.max() == torch.tensor(3e38)


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("text_config", "num_hidden_layers", "3"),
        ("text_config", "num_hidden_layers", 0),
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "num_attention_heads", 3),
        ("text_config", "num_attention_heads", 32),
        ("text_config", "num_key_value_heads", 3),
        ("text_config", "num_key_value_heads", True),
        ("text_config", "hidden_size", -32),
        ("text_config", "hidden_size", [32]),
        ("text_config", "vocab_size", 96.0),
        ("text_config", "rms_norm_eps", 1e9),
        ("text_config", "rms_norm_eps", "1e-5"),
        ("text_config", "rope_theta", -1.0),
        ("text_config", "rope_theta", {}),
        ("text_config", "rope_scaling", 2.0),
        ("text_config", "eos_token_id", [2]),
        ("text_config", "eos_token_id", 96),
        ("text_config", "bos_token_id", 5000),
        ("text_config", "model_type", "mistral"),
        ("vision_config", "patch_size", 0),
        ("vision_config", "patch_size", 43),
        ("vision_config", "image_size", "42"),
        ("vision_config", "image_size", 10**6),
        ("vision_config", "num_attention_heads", 5),
        ("vision_config", "num_hidden_layers", None),
        (None, "vision_feature_layer", 0),
        (None, "vision_feature_layer", 4),
        (None, "vision_feature_layer", -4),
        (None, "vision_feature_layer", "-2"),
        (None, "text_config", [1]),
        (None, "vision_config", 3),
        (None, "image_token_index", "<image>"),
        (None, "image_token_index", -1),
        (None, "pad_token_id", 96),
        (None, "model_type", ["llava"]),
        (None, "model_type", {}),
    ],
)
def test_absurd_values_in_config_json(hub, part, name, value):
    config = json.loads((hub / "config.json").read_text())
    (config[part] if part else config)[name] = value
    (hub / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        load_base(str(hub))


def test_ten_names_of_each_kind_and_their_number(hub):
    """3 layers x 9 tensors: all missing under another name."""
    for i in range(3):
        shard = f"model-0000{i + 1}-of-00003.safetensors"
        state = load_file(hub / shard)
        save_file({k.replace("model.layers.", "model.blocks."): v for k, v in state.items()}, hub / shard)
    index = (hub / "model.safetensors.index.json").read_text()
    (hub / "model.safetensors.index.json").write_text(index.replace("model.layers.", "model.blocks."))
    with pytest.raises(SystemExit) as error:
        load_model(hub)
    missing, unexpected = str(error.value).splitlines()[1:]
    assert missing.startswith("  27 missing: ") and missing.count("language_model.layers.") == 10
    assert unexpected.startswith("  27 unexpected: ") and unexpected.count(".blocks.") == 10


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_code_in_a_pickle_does_not_run(library, tmp_path, zipped):
    folder = write_original(library, tmp_path / "w")
    file = folder / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(file) | {"x": Bomb(tmp_path / "sentinel")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit, match="00001-of-00002.bin: damaged, or holds more than tensors; not opened$"):
        load_model(folder)
    assert not (tmp_path / "sentinel").exists()
    torch.load(file, weights_only=False)  # the bomb is real
    assert (tmp_path / "sentinel").exists()


NO_TABLES = [
    {"state_dict": {"a": torch.ones(1)}},
    [torch.ones(1)],
    {"a": 1},
    {1: torch.ones(1)},
    {"a": torch.ones(1, device="meta")},
]


@pytest.mark.parametrize("content", NO_TABLES)
def test_a_bin_file_that_is_no_table_of_tensors(library, tmp_path, content):
    folder = write_original(library, tmp_path / "w")
    torch.save(content, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(SystemExit, match="not a table of tensors"):
        load_model(folder)


def test_a_truncated_bin_file(library, tmp_path):
    folder = write_original(library, tmp_path / "w")
    truncate(folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(SystemExit, match="00002-of-00002.bin: truncated or damaged"):
        load_model(folder)


def test_a_vision_tower_that_is_nowhere(library, tmp_path, monkeypatch):
    """The name is looked for beside the checkpoint, then asked of the hub; here there is neither."""
    folder = write_original(library, tmp_path / "w")
    shutil.rmtree(tmp_path / "some-clip")
    asked = []

    def from_hub(name, size):
        asked.append(name)
        raise SystemExit

    monkeypatch.setattr("bases.checkpoint.from_hub", from_hub)
    with pytest.raises(SystemExit):
        load_model(folder)
    assert asked == ["openai/some-clip"]
