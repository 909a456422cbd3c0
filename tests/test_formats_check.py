"""`python -m formats.check DATA`, `formats.show`, `bench.loading`, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import losses
import train
from bases.checkpoint import read_config
from bases.tokenizer import load_tokenizer
from bench import loading
from data import Processor
from external import hub
from formats import check, command, show


def write(folder, rows):
    (folder / "d.json").write_text(json.dumps(rows))
    return str(folder / "d.json")


def row(i, **changes):
    return {
        "id": f"r{i}",
        "image": "ok.png",
        "prompt": f"Is {i} blue?",
        "chosen": "Yes it is",
        "rejected": "Not at all",
    } | changes


@pytest.fixture
def bad_data(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "ok.png")
    Image.new("RGB", (120, 20), "red").save(tmp_path / "long.png")  # aspect 6
    (tmp_path / "broken.png").write_bytes((tmp_path / "ok.png").read_bytes()[:50])
    return write(
        tmp_path,
        [
            row(1),
            row(2, chosen=" "),
            row(3, image="broken.png"),
            row(4, image="none.png"),
            row(5, image=["a", "b"]),
            row(6, chosen="Yes", rejected="Yes"),
            row(1, id="r7"),
            row(8, image="long.png", rejected="No"),
            row(9, image=None),
        ],
    )


def test_check_names_every_bad_row(bad_data, capsys):
    with pytest.raises(SystemExit) as e:
        check.main([bad_data])
    out = capsys.readouterr().out
    assert e.value.code == 1
    for line in (
        f"cannot be used: 1 empty chosen: {bad_data}:2:r2",
        f"cannot be used: 1 broken image: {bad_data}:3:r3",
        f"cannot be used: 1 missing image: {bad_data}:4:r4",
        f"cannot be used: 1 several images: {bad_data}:5:r5",
        f"cannot be used: 1 no image: {bad_data}:9:r9",
        f"note: 1 identical chosen and rejected: {bad_data}:6:r6",
        f"note: 2 one-word response: {bad_data}:6:r6; {bad_data}:8:r8",
        f"note: 1 duplicate of an earlier row: {bad_data}:7:r7",
        f"note: 1 with an aspect over 5: {bad_data}:8:r8",
        "pictures: 4 open, 30x20 smallest, 30x20 median, 120x20 largest",
        f"{bad_data}: 5 of 9 rows cannot be used",
    ):
        assert line in out, line
    assert "length in words (--base B: tokens)" in out and f"longest: {bad_data}:1:r1, 6" in out  # 3 + 3 words


def test_check_percentiles_by_hand(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "ok.png")
    rows = [
        row(i, prompt="a b", chosen="a " * i, rejected="no way") for i in range(2, 13)
    ]  # chosen: 2, 3, ... 12 words
    check.main([write(tmp_path, rows)])
    out = capsys.readouterr().out
    # 11 values: 5 % lies at position .5 -> 2.5, shown as 2; 50 % -> 7; 95 % at 9.5 -> 11.5, 99 % at 9.9 -> 11.9
    assert "  chosen                                 2     2     7    12    12    12" in out
    assert "0 of 11 rows cannot be used" in out and f"longest: {tmp_path}/d.json:11:r12, 14" in out


def test_check_counts_tokens_and_refuses_too_long(pairs_file, tiny_base, capsys):
    check.main([str(pairs_file), "--base", str(tiny_base)])
    out = capsys.readouterr().out
    processor = Processor(load_tokenizer(tiny_base), read_config(tiny_base))
    longest = max(
        len(processor.prompt_ids(r["prompt"])) + len(processor.encode(r[k])) + 1
        for r in json.loads(pairs_file.read_text())
        for k in ("chosen", "rejected")
    )
    assert "image + prompt + longer response" in out and f", {longest}\n" in out
    with pytest.raises(SystemExit):
        check.main([str(pairs_file), "--base", str(tiny_base), "--max-length", str(longest - 1)])
    assert "too long" in capsys.readouterr().out


def test_show_prints_what_the_model_sees(bad_data, tiny_base, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    show.main([bad_data, "--rows", "3", "--base", str(tiny_base), "--out", str(sheet), "--rejected-image", "same"])
    out = capsys.readouterr().out
    assert "answers to the user's questions. USER:  [4 x <image>] '\\nIs 1 blue? ASSISTANT:'" in out
    assert "scored: [[Yes it is</s>]]" in out and "scored: [[Not at all</s>]]" in out
    assert "m_w 30x20 -> 28x28; m_l by 'same'" in out
    assert "row 2, id r2" in out and "cannot be used: empty chosen" in out and "cannot be used: broken image" in out
    # one row of two 28 px pictures: 8 + 28 + 8 + 28 + 8 wide, 8 + 16 + 28 + 8 high; red 30x20 fills rows 5-23 of 28
    image = Image.open(sheet)
    assert image.size == (80, 60) and image.getpixel((8 + 14, 24 + 14)) == (255, 0, 0)
    assert image.getpixel((44 + 14, 24 + 14)) == (255, 0, 0)
    assert image.getpixel((8 + 14, 24 + 1)) == image.getpixel((44 + 14, 24 + 1)) == (122, 116, 104)  # padding


def test_show_draws_random_pictures_of_usable_rows_alone(tmp_path, tiny_base, capsys):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "ok.png")
    flags = ["--base", str(tiny_base), "--rejected-image", "random", "--out", str(tmp_path / "sheet.png")]
    bad = [row(n, image="none.png") for n in range(3, 9)]
    show.main([write(tmp_path, [row(1), row(2), *bad]), *flags])  # of seven others six have no picture to give
    assert "sheet.png: m_w and m_l of 2 rows" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="at least 2 pairs"):
        show.main([write(tmp_path, [row(1), *bad]), *flags])


def test_show_never_overwrites_a_picture_of_the_data(tmp_path, tiny_base):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "ok.png")
    before = (tmp_path / "ok.png").read_bytes()
    with pytest.raises(SystemExit, match="ok.png: is read by this command"):
        show.main([write(tmp_path, [row(1)]), "--base", str(tiny_base), "--out", str(tmp_path / "ok.png")])
    assert (tmp_path / "ok.png").read_bytes() == before


def test_show_of_no_usable_row_is_a_failure(tmp_path, tiny_base):
    with pytest.raises(SystemExit, match="no usable rows"):
        show.main([write(tmp_path, [row(1)]), "--base", str(tiny_base), "--out", str(tmp_path / "sheet.png")])


def outcome(command, arguments: list[str], capsys) -> tuple[int, str]:
    """Exit status and everything printed, as the shell shows it."""
    code = 0
    try:
        command.main(arguments)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        if isinstance(e.code, str):
            print(e.code)
    return code or 0, capsys.readouterr().out


def given_rows(**last) -> list[dict]:
    return [row(i, image_rejected="ok.png") for i in range(3)] + [row(3, **({"image_rejected": "ok.png"} | last))]


AGREE = {  # name: (rows, flags, exit status, words that check, show and train all print)
    "all given": (given_rows(), [], 0, "given"),
    "one given picture missing": (given_rows(image_rejected="none.png"), [], 1, "missing image"),
    "the same, not looked at": (given_rows(image_rejected="none.png"), ["--recipe", "dpo"], 0, ""),
    "the same, cropped": (given_rows(image_rejected="none.png"), ["--rejected-image", "crop:0.2-0.5"], 0, ""),
    "three of four given": (given_rows(image_rejected=None), [], 0, "a rejected image stands in only 3 of 4 rows"),
    "a missing picture": (given_rows(image="none.png"), [], 1, "missing image"),
    "no pictures looked at": ([row(1, image="none.png")], ["--recipe", "dpo-no-image"], 0, ""),
    "too long": ([row(1), row(2, chosen="no " * 60)], ["--max-length", "190"], 1, "too long"),
    "too long, cut": ([row(1), row(2, chosen="no " * 60)], ["--max-length", "190", "--cut-long"], 0, ""),
    "one row, random": ([row(1)], ["--rejected-image", "random"], 1, "at least 2 pairs"),
    "m_l made for nothing": ([row(1)], ["--recipe", "dpo", "--rejected-image", "same"], 1, "does not look at m_l"),
    "nothing usable": ([row(1, chosen="")], [], 1, "empty chosen"),
}


@pytest.mark.parametrize("name", AGREE)
def test_check_and_train_agree(name, tmp_path, tiny_base, capsys):
    rows, flags, status, words = AGREE[name]
    Image.new("RGB", (30, 20), "red").save(tmp_path / "ok.png")
    data = write(tmp_path, rows)
    checked, check_says = outcome(check, [data, "--base", str(tiny_base), *flags], capsys)
    run = ["--base", str(tiny_base), "--data", data, "--out", str(tmp_path / "run"), "--workers", "0", *flags]
    trained, train_says = outcome(train, [*run, "--max-steps", "1", "--lora-r", "2"], capsys)
    assert (checked, trained) == (status, status), check_says + train_says
    assert words in check_says and (words in train_says or words == "given")
    if status == 0:
        strategy = json.loads((tmp_path / "run/args.json").read_text())["rejected_image"]
        assert (f"m_l by {strategy!r}\n" in check_says) == (strategy is not None)
        shown, show_says = outcome(
            show, [data, "--base", str(tiny_base), "--out", str(tmp_path / "sheet.png"), *flags], capsys
        )
        assert shown == 0 and "cannot be used" not in show_says
        assert (f"m_l by {strategy!r}, " in show_says) == (strategy is not None)


def test_recipes_are_those_of_training():
    assert list(command.RECIPES) == list(train.RECIPES)
    for name, looks in command.RECIPES.items():
        assert looks.m_l == losses.needs_image_rejected(train.RECIPES[name]["terms"])
        assert looks.with_image == (name != "dpo-no-image")


@pytest.mark.parametrize(
    "prompt",
    [
        "[INST] What? [/INST]",
        "<|im_start|>user\nWhat?<|im_end|>",
        "USER: <image>\nWhat?",
        "### Human: What?",
        "<video>What?",
        "<|vision_start|><|image_pad|><|vision_end|>What?",
        "<|start_header_id|>user<|end_header_id|>What?",
        "Hm.\nASSISTANT: yes. What?",
    ],
)
def test_other_templates_inside_a_prompt_are_pointed_out(prompt, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "ok.png")
    check.main([write(tmp_path, [row(1), row(2, prompt=prompt)])])
    assert f"note: 1 with another template inside the prompt: {tmp_path}/d.json:2:r2\n" in capsys.readouterr().out


@pytest.mark.parametrize("end", [" USER: And now? ASSISTANT: A dog.", "<|im_end|>", "[INST]"])
def test_a_next_turn_inside_a_response_is_pointed_out(end, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "ok.png")
    check.main([write(tmp_path, [row(1), row(2, rejected=f"Not at all{end}")])])
    assert f"note: 1 with a turn's marker inside a response: {tmp_path}/d.json:2:r2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rows", "-1"], "--rows: -1"),
        (["--base", ""], "--base: is empty"),
        (["--rows", "0"], "--rows: 0"),
        (["--seed", "-1"], "--seed: -1"),
        (["--max-length", "0"], "--max-length: 0"),
        (["--rejected-image", "crop:2-3"], "crop:LOW-HIGH"),
    ],
)
def test_flags_are_refused_before_anything_is_read(flags, words, capsys):
    with pytest.raises(SystemExit):
        show.main(["nowhere.json", "--base", "nowhere", *flags])
    assert words in capsys.readouterr().err


def test_a_sheet_that_cannot_be_written_is_said_first(tmp_path):
    with pytest.raises(SystemExit, match="sheet.png: cannot be written"):
        (tmp_path / "sheet.png").mkdir()
        show.main(["nowhere.json", "--base", "nowhere", "--out", str(tmp_path / "sheet.png")])


def test_m_w_as_its_own_rejected_image_is_noted(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "ok.png")
    check.main([write(tmp_path, [row(1, image_rejected="ok.png")])])
    assert "note: 1 with m_w itself as rejected image" in capsys.readouterr().out


def test_check_of_no_pairs_at_all(tmp_path, capsys):
    rating = {"a": {"Rating": "3"}}
    tie = {"img_path": "a", "prompt": "Q?", "completions": [{"response": r, "annotations": rating} for r in "ab"]}
    status, says = outcome(check, [write(tmp_path, [tie])], capsys)
    assert status == 1 and "no usable rows" in says and "left out: 1 with all ratings equal" in says


def test_time_and_usage(pairs_file, tiny_base, capsys):
    loading.main([str(pairs_file), "--base", str(tiny_base), "--pairs", "12", "--workers", "1"])
    assert "pairs/s: 12 pairs in " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        show.main([str(pairs_file), "--rows", "1"])
    assert "required: --base" in capsys.readouterr().err


def test_a_named_base_needs_its_small_files_only(monkeypatch, tmp_path, tiny_base):
    asked = []
    monkeypatch.delenv("NANOMDPO_WEIGHTS", raising=False)
    monkeypatch.setattr(hub, "download", lambda *args: asked.append(args[:3]) or tiny_base)
    command.load_small_processor("llava-1.5-7b")
    assert asked == [("llava-hf/llava-1.5-7b-hf", ("*.json", "tokenizer.model"), "model")]


def test_the_command_itself(bad_data):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "formats.check", bad_data]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(check.__file__).parents[1])
    assert run.returncode == 1 and "5 of 9 rows cannot be used" in run.stdout, run.stderr
