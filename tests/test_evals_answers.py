"""Files of questions: answered, resumed, sharded, refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import lora
from bases import adapter, checkpoint
from evals import answers
from external import files

EOS = 2

# ---- files ---------------------------------------------------------------------------------------------------------


def test_batches_are_sorted_and_fit_the_budget():
    lengths = {"a": 10, "b": 40, "c": 30, "d": 20, "e": 10, "f": 10}
    # budget 100, 10 new tokens each: b (50) and c (as long as b: 100) fit, then 3 x (20 + 10) = 90, then what is left
    assert answers.make_batches(lengths, 8, 100, 10) == [["b", "c"], ["d", "a", "e"], ["f"]]
    assert answers.make_batches(lengths, 2, 10**6, 10) == [["b", "c"], ["d", "a"], ["e", "f"]]
    assert answers.make_batches({"a": 500, "b": 500}, 8, 100, 10) == [["a"], ["b"]]  # too long, but asked all the same


@pytest.fixture
def asked(tiny_base, tmp_path):
    """questions.jsonl with six rows about three pictures, and the arguments that answer them."""
    rows = []
    for i in range(6):
        Image.new("RGB", (30 + i % 3, 40), (40 * i, 90, 10)).save(tmp_path / f"{i % 3}.png")
        rows.append({"id": i, "image": f"{i % 3}.png", "prompt": "What is it? " * (i % 4 + 1), "label": "yes"})
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "a.jsonl"
    return rows, ["--base", str(tiny_base), "--questions", str(file), "--out", str(out), "--max-new-tokens", "6"], out


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_rows_and_settings(asked, capsys):
    rows, args, out = asked
    answers.main(args)
    found = read(out)
    assert [{k: v for k, v in a.items() if k not in ("answer", "n_tokens", "finish")} for a in found] == rows
    settings = json.loads(out.with_suffix(".settings.json").read_text())
    assert settings["decoding"] == {"method": "greedy"} and settings["seed"] is None
    assert settings["image_mode"] == "pad" and settings["max_new_tokens"] == 6 and settings["adapter_sha256"] is None
    assert settings["template"].startswith("BOS A chat between") and settings["torch"] == torch.__version__
    assert settings["template"].endswith("USER: <image>\n{prompt} ASSISTANT:")
    assert "6 answers, 6 of them new" in capsys.readouterr().out


def test_how_an_answer_ended_and_its_length(asked, monkeypatch):
    """The end token counts, and is what tells an ended answer from one that was cut."""
    _, args, out = asked
    monkeypatch.setattr(answers, "generate", lambda model, prompts, *rest: [[70, EOS], [70, 71], [EOS]] * 2)
    answers.main(args)
    found = sorted((a["n_tokens"], a["finish"]) for a in read(out))
    assert found == [(1, "eos")] * 2 + [(2, "eos")] * 2 + [(2, "length")] * 2
    assert sum(a["answer"] == "" for a in read(out)) == 2  # the end token alone


def test_image_mode_reaches_the_pictures(asked):
    _, args, _ = asked
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    padded, cut = (
        generate.load_processor(answers.parse_args([*args, "--image-mode", mode])).prepare(picture)
        for mode in ("pad", "crop")
    )
    assert padded[0, 0, 0] < padded[0, 14, 14]  # a row of mean colour above the red
    assert cut[0, 0, 0] == cut[0, 14, 14]  # all red


@pytest.mark.parametrize("more", [[], ["--beams", "3"], ["--temperature", "1", "--top-p", "0.9", "--seed", "5"]])
def test_a_run_goes_on_where_it_was(asked, capsys, monkeypatch, more):
    """Cut in the middle of a line, the rerun asks what is missing, says what was lost, and ends with the same file."""
    rows, args, out = asked
    answers.main([*args, "--batch", "2", *more])
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[4] + lines[1] + lines[0][:-20])
    capsys.readouterr()
    new, make_batches = [], answers.make_batches

    def noting(lengths, *rest):
        new.extend(lengths)
        return make_batches(lengths, *rest)

    monkeypatch.setattr(answers, "make_batches", noting)
    answers.main([*args, *more])
    assert out.read_bytes() == whole
    assert sorted(new) == ["0", "2", "3", "5"]
    assert f"{out}: the last line was cut off ({len(lines[0]) - 20} bytes)" in capsys.readouterr().out
    monkeypatch.setattr(answers, "load_model", None)  # nothing is left: no model is needed
    answers.main([*args, *more])


def test_each_batch_is_on_the_disk_before_the_next(asked, monkeypatch):
    rows, args, out = asked
    real, calls, synced = generate.generate, [], []
    monkeypatch.setattr(files.os, "fsync", lambda _: out.exists() and synced.append(len(read(out))))

    def killed_in_the_third(*a, **k):
        calls.append(len(read(out)))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(answers, "generate", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        answers.main([*args, "--batch", "2"])
    assert calls == [0, 2, 4] and synced == [2, 4] and len(read(out)) == 4


@pytest.mark.parametrize(
    "more, name",
    [
        (["--beams", "2"], "decoding"),
        (["--max-new-tokens", "7"], "max_new_tokens"),
        (["--image-mode", "crop"], "image_mode"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--temperature", "1"], "decoding"),
    ],
)
def test_other_settings_do_not_go_on(asked, more, name):
    _, args, out = asked
    answers.main(args)
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=f"made with {name} "):
        answers.main([*args, *more])
    assert out.read_bytes() == before


def test_answers_to_other_questions_do_not_go_on(asked):
    rows, args, out = asked
    answers.main(args)
    file = Path(args[3])
    file.write_text(file.read_text().replace("What is it? What", "Who is it? What", 1))
    with pytest.raises(SystemExit, match=r"a.jsonl:2: id 1 .* another question"):
        answers.main(args)


def test_shards_join_to_the_same_file(asked, capsys):
    rows, args, out = asked
    answers.main(args)
    whole = out.read_bytes()
    out.unlink()
    for i in "20":
        answers.main([*args, "--shard-index", i, "--shard-count", "3"])
    for i in (2, 0):  # a shard's own answers, also where another's are there
        assert [a["id"] for a in read(out.with_name(f"a.{i}-of-3.jsonl"))] == [i, i + 3]
    assert not out.exists()
    answers.main(args)  # joins what is there and asks the rest
    assert out.read_bytes() == whole
    assert "6 answers, 2 of them new" in capsys.readouterr().out


def test_adapter_changes_answers_and_is_recorded(asked, tiny_base, tmp_path):
    _, args, out = asked
    answers.main(args)
    before = [a["answer"] for a in read(out)]
    model, _ = checkpoint.load_base(str(tiny_base))
    parameters = lora.add_lora(model, r=4)
    for p in parameters:
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    adapter.save_adapter(model, tmp_path / "run", "tiny")
    with pytest.raises(SystemExit, match="made with adapter None"):
        answers.main([*args, "--adapter", str(tmp_path / "run")])
    args[5] = str(tmp_path / "b.jsonl")
    answers.main([*args, "--adapter", str(tmp_path / "run")])
    assert [a["answer"] for a in read(tmp_path / "b.jsonl")] != before
    config = tmp_path / "run" / "adapter_config.json"
    weights = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    both = [hashlib.sha256(data).hexdigest() for data in (weights, config.read_bytes())]
    digest = hashlib.sha256("".join(both).encode()).hexdigest()
    assert json.loads((tmp_path / "b.settings.json").read_text())["adapter_sha256"] == digest
    kept = config.read_text()
    config.write_text(kept.replace('"lora_alpha": ', '"lora_alpha": 9'))
    with pytest.raises(SystemExit, match="made with other adapter under the same name"):
        answers.main([*args, "--adapter", str(tmp_path / "run")])
    config.write_text(kept)
    for dtype, separate in (("float32", 0), ("bfloat16", 14)):  # 7 linears of 2 layers stay apart in 16 bits
        one = answers.parse_args([*args, "--adapter", str(tmp_path / "run"), "--dtype", dtype])
        loaded = lora.lora_modules(generate.load_model(one))
        assert len(loaded) == separate
    trained, _ = checkpoint.load_base(str(tiny_base), dtype=torch.bfloat16)
    adapter.load_adapter(trained, tmp_path / "run")
    for name, as_trained in lora.lora_modules(trained).items():  # the 16-bit answer is what training computes
        x = torch.randn(3, as_trained.base.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            expected = as_trained(x)
        assert torch.equal(loaded[name](x), expected)
    with pytest.raises(SystemExit, match="nowhere.*not there"):
        answers.main([*args, "--adapter", str(tmp_path / "nowhere")])


def test_one_picture_gets_the_answer_that_a_file_gets(asked, capsys):
    rows, args, out = asked
    answers.main([*args, "--beams", "2"])
    capsys.readouterr()
    one = ["--image", str(out.parent / "2.png"), "--prompt", rows[2]["prompt"], "--max-new-tokens", "6", "--beams", "2"]
    generate.main([*args[:2], *one])
    assert capsys.readouterr().out == read(out)[2]["answer"] + "\n"


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--questions", "q"],
        ["--questions", "q", "--out", "o", "--shard-index", "2", "--shard-count", "2"],
        ["--questions", "q", "--out", "o", "--beams", "2", "--temperature", "1"],
        ["--questions", "q", "--out", "o", "--batch", "0"],
    ],
)
def test_flags_that_do_not_go_together(more, capsys):
    with pytest.raises(SystemExit) as e:
        answers.main(["--base", "x", *more])
    assert e.value.code == 2 and "error: " in capsys.readouterr().err


# ---- answers of another model or of other pictures -----------------------------------------------------------------


def test_answers_of_another_base_under_the_same_name_are_not_resumed(asked, tiny_base, tmp_path):
    """One weight of the folder changes, nothing else does; the same folder by another name is the same base."""
    _, args, out = asked
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    args[1] = str(base)
    answers.main(args)
    before = out.read_bytes()
    shutil.copytree(base, tmp_path / "copy")
    answers.main([args[0], str(tmp_path / "copy"), *args[2:]])
    assert out.read_bytes() == before
    answers.main(args)
    weights = load_file(base / "model.safetensors")
    weights[min(weights)].view(-1)[0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="made with other base under the same name .base_sha256"):
        answers.main(args)
    assert out.read_bytes() == before


def test_answers_about_replaced_pictures_are_not_resumed(asked, tmp_path):
    _, args, out = asked
    answers.main(args)
    copy = tmp_path / "moved"
    copy.mkdir()
    for i in range(3):
        shutil.copy(tmp_path / f"{i}.png", copy)
    answers.main([*args, "--image-root", str(copy)])  # the same pictures elsewhere
    Image.new("RGB", (30, 40), (1, 2, 3)).save(copy / "2.png")
    with pytest.raises(SystemExit, match="made with other pictures, or questions about more or fewer of them"):
        answers.main([*args, "--image-root", str(copy)])


def test_an_adapter_in_bin_answers_too(asked, tiny_base, tmp_path):
    _, args, out = asked
    model, _ = checkpoint.load_base(str(tiny_base))
    for p in lora.add_lora(model, r=4):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    adapter.save_adapter(model, tmp_path / "run", "tiny")
    answers.main([*args, "--adapter", str(tmp_path / "run")])
    file = tmp_path / "run" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "run" / "adapter_model.bin")
    file.unlink()
    args[5] = str(tmp_path / "b.jsonl")
    answers.main([*args, "--adapter", str(tmp_path / "run")])
    assert (tmp_path / "b.jsonl").read_bytes() == out.read_bytes()


def test_a_first_try_without_an_answer_does_not_block_the_place(asked, monkeypatch):
    _, args, out = asked

    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(answers, "load_model", out_of_memory)
        with pytest.raises(MemoryError):
            answers.main([*args[:-1], "9"])
    answers.main(args)
    assert len(read(out)) == 6 and json.loads(out.with_suffix(".settings.json").read_text())["max_new_tokens"] == 6


def test_two_equal_answers_are_one_and_two_different_ones_are_refused(asked):
    """Two processes that were killed at the same --out leave the same row twice."""
    _, args, out = asked
    answers.main(args)
    whole = out.read_text()
    first = whole.splitlines()[0]
    out.write_text(whole + first + "\n")
    answers.main(args)
    assert out.read_text() == whole
    other = json.dumps({**json.loads(first), "answer": "another one"})
    out.write_text(whole + other + "\n")
    with pytest.raises(SystemExit, match="a.jsonl:7: id 0 is there twice, with two answers"):
        answers.main(args)


@pytest.mark.parametrize("damage", ["unlink", "write_text"])
def test_a_picture_that_goes_while_others_are_asked_is_named(asked, monkeypatch, damage):
    rows, args, out = asked
    real = answers.generate

    def then_it_goes(*a):
        picture = out.parent / "2.png"
        picture.unlink() if damage == "unlink" else picture.write_text("no picture")
        return real(*a)

    monkeypatch.setattr(answers, "generate", then_it_goes)
    with pytest.raises(SystemExit, match=r"id \d: .*2.png: .*the same command resumes"):
        answers.main([*args, "--batch", "1"])


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--out", "/proc/nowhere/a.jsonl"], "/proc/nowhere/a.jsonl: cannot be written"),
        (["--out", "folder.jsonl"], "cannot be written .Is a directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_first(asked, monkeypatch, more, reason):
    _, args, out = asked
    monkeypatch.chdir(out.parent)
    Path("folder.jsonl").mkdir()
    for name in ("read_questions", "load_processor", "load_model"):
        monkeypatch.setattr(answers, name, None)
    with pytest.raises(SystemExit, match=reason):
        answers.main([*args, *more])


@pytest.mark.parametrize(
    "more",
    [
        ["--temperature", "nan"],
        ["--beams", "1000"],
        ["--max-new-tokens", "1000000000"],
        ["--seed", "-1"],
        ["--top-p", "0"],
        ["--shard-count", "0"],
        ["--shard-index", "-1", "--shard-count", "2"],
        ["--batch-tokens", "-5"],
    ],
)
def test_numbers_out_of_range_end_before_anything_is_loaded(asked, monkeypatch, more, capsys):
    _, args, out = asked
    monkeypatch.setattr(answers, "read_questions", None)
    with pytest.raises(SystemExit) as e:
        answers.main([*args, *more])
    assert e.value.code == 2 and "must be a" in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
def test_torchrun_shares_the_questions_and_joins_the_answers(asked):
    rows, args, out = asked
    answers.main(args)
    whole = out.read_bytes()
    out.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "evals.answers", *args],
        cwd=Path(answers.__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole


def test_a_prompt_that_the_base_was_not_taught_to_read_is_refused_before_the_model_is_loaded(asked, monkeypatch):
    rows, args, out = asked
    rows[2]["prompt"] = "what is it " * 2000
    file = Path(args[args.index("--questions") + 1])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(answers, "load_model", None)
    with pytest.raises(SystemExit, match="id 2: prompt too long: .* tokens with the picture's, the base reads 4096"):
        answers.main(args)
    assert not out.exists()


@pytest.mark.parametrize("change", [{"answer": None}, {"n_tokens": "4"}, {"finish": 7}])
def test_an_edited_row_without_an_answer_is_named(asked, change):
    _, args, out = asked
    answers.main(args)
    rows = read(out)
    out.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], rows[1] | change, *rows[2:]]))
    with pytest.raises(SystemExit, match="a.jsonl:2: id 1 has no answer; delete the line"):
        answers.main(args)


def test_a_part_of_torchruns_variables_is_refused_and_a_world_alone_is_not_torchrun(asked, monkeypatch):
    _, args, _ = asked
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert answers.parse_args(args).shard_count == 1
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="is not as torchrun sets it"):
        answers.parse_args(args)


def test_two_processes_do_not_mix_their_answers_in_one_file(asked, monkeypatch):
    """With other beams, say: the second is refused while the first writes, and can be had when it has ended."""
    _, args, out = asked
    second = []
    generate_batch = answers.generate

    def meanwhile(*batch):
        with pytest.raises(SystemExit, match="another process is writing it"):
            answers.main([*args, "--beams", "2"])
        second.append(1)
        return generate_batch(*batch)

    monkeypatch.setattr(answers, "generate", meanwhile)
    answers.main(args)
    assert second and json.loads(out.with_suffix(".settings.json").read_text())["decoding"] == {"method": "greedy"}
    assert not out.with_suffix(".lock").exists()
