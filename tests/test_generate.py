"""Decoding equals transformers' token for token; sampling by hand; files of answers: resumed, sharded, refused."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
from transformers.generation import TopPLogitsWarper

import generate
import lora
import weights

EOS = 2


def prompts_and_pictures(size: int, patches: int, image_id: int, n: int = 8):
    """Prompts of different lengths with one picture each: (n,) 1-D tensors, (n, 3, size, size)."""
    g = torch.Generator().manual_seed(1)
    words = [torch.randint(3, 90, (3 + 5 * i % 11,), generator=g) for i in range(n)]
    prompts = [torch.cat([torch.tensor([1]), torch.full((patches,), image_id), w]) for w in words]
    return prompts, torch.randn(n, 3, size, size, generator=g)


@pytest.fixture(scope="module", params=[4, 2], ids=["4 kv heads", "2 kv heads"])
def llava(request, tmp_path_factory):
    """A random LLaVA that likes to end, and to say <image>, <pad> and padding rows if it is let; in both libraries."""
    theirs = tiny_models.llava(request.param)
    g = torch.Generator().manual_seed(3)
    theirs.lm_head.weight.data *= 0.8
    theirs.lm_head.weight.data[[EOS, *range(90, 96)]] = torch.randn(7, 32, generator=g) * 0.56
    folder = tiny_models.write_library(theirs, tmp_path_factory.mktemp("llava") / "model")
    return theirs, weights.load_model(folder)


def theirs_generate(model, new: int, beams: int, suppress, **inputs) -> list[int]:
    out = model.generate(max_new_tokens=new, do_sample=False, num_beams=beams, length_penalty=1.0, early_stopping=False,
                         suppress_tokens=suppress, pad_token_id=0, **inputs)  # fmt: skip
    return out[0].tolist()


def until_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_llava_equals_transformers(llava, beams):
    """A batch of different lengths gives, row by row, the tokens that transformers gives one question alone."""
    theirs, ours = llava
    prompts, pictures = prompts_and_pictures(42, 9, tiny_models.IMAGE_ID)

    def one_by_one(suppress):
        return [until_eos(theirs_generate(theirs, 20, beams, suppress, input_ids=p[None], eos_token_id=EOS,
                                          attention_mask=torch.ones_like(p[None]), pixel_values=x[None])[len(p):], EOS)
                for p, x in zip(prompts, pictures, strict=True)]  # fmt: skip

    expected = one_by_one(list(range(90, 96)))
    assert generate.generate(ours, prompts, pictures, 20, beams=beams) == expected
    assert one_by_one(None) != expected  # so the suppressed rows do matter here
    lengths = [len(ids) for ids in expected]
    assert len(set(lengths)) > 2, lengths  # rows end at several steps


@pytest.mark.parametrize("beams", [1, 3])
def test_bunny_equals_phi(tmp_path, beams):
    """Bunny gives the tokens of transformers' Phi when Phi is fed Bunny's embeddings."""
    phi, siglip = tiny_models.phi_and_siglip()
    phi.lm_head.weight.data *= 0.8
    phi.lm_head.weight.data[95] = torch.randn(80, generator=torch.Generator().manual_seed(3)) * 0.15  # it likes to end
    ours = weights.load_model(tiny_models.write_bunny(phi, siglip, tmp_path / "bunny"))
    eos = ours.config.eos_id
    prompts, pictures = prompts_and_pictures(44, 9, ours.config.image_id)
    expected = []
    for p, x in zip(prompts, pictures, strict=True):
        with torch.no_grad():
            embeds = ours.embed(p[None], ours.image_features(x[None]))
        mask = torch.ones(1, len(p), dtype=torch.long)
        ids = theirs_generate(phi, 25, beams, None, inputs_embeds=embeds, attention_mask=mask, eos_token_id=eos)
        expected.append(until_eos(ids, eos))
    assert generate.generate(ours, prompts, pictures, 25, beams=beams) == expected
    assert len({len(ids) for ids in expected}) > 1, expected


@pytest.mark.parametrize("beams", [1, 3])
def test_finished_rows_cost_nothing(llava, beams, monkeypatch):
    """Greedy reads every token that it writes once, but for the last of a row; beams leave when their row is done."""
    _, ours = llava
    prompts, pictures = prompts_and_pictures(42, 9, tiny_models.IMAGE_ID)
    read, run = [], generate.Cache.run

    def counting(self, ids, *rest):
        read.append(ids.numel())
        return run(self, ids, *rest)

    monkeypatch.setattr(generate.Cache, "run", counting)
    answers = generate.generate(ours, prompts, pictures, 20, beams=beams)
    assert read[0] == 8 * max(len(p) for p in prompts)
    if beams == 1:
        assert sum(read[1:]) == sum(len(ids) - 1 for ids in answers)
    assert read[1] > read[-1] and all(a >= b for a, b in zip(read[1:], read[2:], strict=False))


def test_greedy_draws_no_random_numbers(llava):
    before = torch.get_rng_state()
    generate.generate(llava[1], *prompts_and_pictures(42, 9, tiny_models.IMAGE_ID, 2), 3)
    assert torch.equal(before, torch.get_rng_state())


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_p, draws, expected", [
    (1.0, 1.0, (0.0, 0.29, 0.31, 0.79, 0.81, 0.9999999), (0, 0, 1, 1, 2, 2)),  # cdf .3 .8 1
    (0.5, 1.0, (0.23, 0.24, 0.89, 0.90), (0, 1, 1, 2)),  # squared: .09 .25 .04 of .38 -> cdf .2368 .8947 1
    (1.0, 0.7, (0.37, 0.38, 0.9999999), (0, 1, 1)),  # .5 < .7, so .3 stays, .2 goes: .375 .625 -> cdf .375 1
    (1.0, 0.5, (0.0, 0.9999999), (1, 1)),  # .5 alone holds .5
    (1.0, 1e-9, (0.0, 0.9999999), (1, 1)),  # the best always stays
])  # fmt: skip
def test_a_draw_falls_where_the_arithmetic_says(temperature, top_p, draws, expected):
    """Probabilities .3 .5 .2 of ids 0 1 2, and an id of probability 0 after them that is never drawn."""
    logits = torch.tensor([math.log(0.3), math.log(0.5), math.log(0.2), -math.inf]).expand(len(draws), 4)
    found = generate.pick(logits, temperature, top_p, torch.tensor(draws, dtype=torch.float64))
    assert tuple(found.tolist()) == expected


def test_top_p_keeps_what_transformers_keeps():
    """Every token that transformers' filter leaves is drawn by its own share of [0, 1), and no other."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)) * 2
    for top_p in (0.2, 0.6, 0.95):
        probs = TopPLogitsWarper(top_p)(None, logits.clone()).softmax(-1)[0].double()
        draws = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        found = generate.pick(logits.expand(2000, 30), 1.0, top_p, draws)
        share = found.bincount(minlength=30) / 2000
        assert (share - probs).abs().max() < 1e-3, top_p  # a token's share is off by less than two draws
        assert set(found.tolist()) <= set(probs.nonzero()[:, 0].tolist())


def test_a_sampled_answer_does_not_depend_on_its_batch(llava):
    prompts, pictures = prompts_and_pictures(42, 9, tiny_models.IMAGE_ID)

    def sample(rows: list[int], seed: int):
        own = [generate.own_generator(seed, str(i)) for i in rows]
        return generate.generate(llava[1], [prompts[i] for i in rows], pictures[rows], 12, 1.0, own, 0.9)

    together = sample(list(range(8)), 7)
    assert together == [sample([i], 7)[0] for i in range(8)]
    assert together != sample(list(range(8)), 8)
    first = [torch.rand(1, generator=generate.own_generator(7, key)).item() for key in ("a", "b", "a")]
    assert first[0] != first[1] and first[0] == first[2]  # each question has numbers of its own


# ---- files ---------------------------------------------------------------------------------------------------------


def test_batches_are_sorted_and_fit_the_budget():
    lengths = {"a": 10, "b": 40, "c": 30, "d": 20, "e": 10, "f": 10}
    # budget 100, 10 new tokens each: b (50) and c (as long as b: 100) fit, then 3 x (20 + 10) = 90, then what is left
    assert generate.make_batches(lengths, 8, 100, 10) == [["b", "c"], ["d", "a", "e"], ["f"]]
    assert generate.make_batches(lengths, 2, 10**6, 10) == [["b", "c"], ["d", "a"], ["e", "f"]]
    assert generate.make_batches({"a": 500, "b": 500}, 8, 100, 10) == [["a"], ["b"]]  # too long, but asked all the same


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
    generate.main(args)
    answers = read(out)
    assert [{k: v for k, v in a.items() if k not in ("answer", "n_tokens", "finish")} for a in answers] == rows
    settings = json.loads(out.with_suffix(".settings.json").read_text())
    assert settings["decoding"] == {"method": "greedy"} and settings["seed"] is None
    assert settings["image_mode"] == "pad" and settings["max_new_tokens"] == 6 and settings["adapter_sha256"] is None
    assert settings["template"].startswith("BOS A chat between") and settings["torch"] == torch.__version__
    assert settings["template"].endswith("USER: <image>\n{prompt} ASSISTANT:")
    assert "6 answers, 6 of them new" in capsys.readouterr().out


def test_how_an_answer_ended_and_its_length(asked, monkeypatch):
    """The end token counts, and is what tells an ended answer from one that was cut."""
    _, args, out = asked
    monkeypatch.setattr(generate, "generate", lambda model, prompts, *rest: [[70, EOS], [70, 71], [EOS]] * 2)
    generate.main(args)
    found = sorted((a["n_tokens"], a["finish"]) for a in read(out))
    assert found == [(1, "eos")] * 2 + [(2, "eos")] * 2 + [(2, "length")] * 2
    assert sum(a["answer"] == "" for a in read(out)) == 2  # the end token alone


def test_image_mode_reaches_the_pictures(asked):
    _, args, _ = asked
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    padded, cut = (
        generate.load_processor(generate.parse_args([*args, "--image-mode", mode])).prepare(picture)
        for mode in ("pad", "crop")
    )
    assert padded[0, 0, 0] < padded[0, 14, 14]  # a row of mean colour above the red
    assert cut[0, 0, 0] == cut[0, 14, 14]  # all red


@pytest.mark.parametrize("more", [[], ["--beams", "3"], ["--temperature", "1", "--top-p", "0.9", "--seed", "5"]])
def test_a_run_goes_on_where_it_was(asked, capsys, monkeypatch, more):
    """Cut in the middle of a line, the rerun asks what is missing, says what was lost, and ends with the same file."""
    rows, args, out = asked
    generate.main([*args, "--batch", "2", *more])
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[4] + lines[1] + lines[0][:-20])
    capsys.readouterr()
    new, make_batches = [], generate.make_batches

    def noting(lengths, *rest):
        new.extend(lengths)
        return make_batches(lengths, *rest)

    monkeypatch.setattr(generate, "make_batches", noting)
    generate.main([*args, *more])
    assert out.read_bytes() == whole
    assert sorted(new) == ["0", "2", "3", "5"]
    assert f"{out}: the last line was cut off ({len(lines[0]) - 20} bytes)" in capsys.readouterr().out
    monkeypatch.setattr(generate, "load_model", None)  # nothing is left: no model is needed
    generate.main([*args, *more])


def test_each_batch_is_on_the_disk_before_the_next(asked, monkeypatch):
    rows, args, out = asked
    real, calls, synced = generate.generate, [], []
    monkeypatch.setattr(generate.os, "fsync", lambda _: synced.append(len(read(out))))

    def killed_in_the_third(*a, **k):
        calls.append(len(read(out)))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(generate, "generate", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate.main([*args, "--batch", "2"])
    assert calls == [0, 2, 4] and synced == [2, 4] and len(read(out)) == 4


@pytest.mark.parametrize("more, name", [
    (["--beams", "2"], "decoding"), (["--max-new-tokens", "7"], "max_new_tokens"),
    (["--image-mode", "crop"], "image_mode"),
    (["--dtype", "bfloat16"], "dtype"), (["--temperature", "1"], "decoding"),
])  # fmt: skip
def test_other_settings_do_not_go_on(asked, more, name):
    _, args, out = asked
    generate.main(args)
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=f"begun with {name} "):
        generate.main([*args, *more])
    assert out.read_bytes() == before


def test_answers_to_other_questions_do_not_go_on(asked):
    rows, args, out = asked
    generate.main(args)
    file = Path(args[3])
    file.write_text(file.read_text().replace("What is it? What", "Who is it? What", 1))
    with pytest.raises(SystemExit, match=r"a.jsonl:2: id 1 .* another question"):
        generate.main(args)


def test_shards_join_to_the_same_file(asked, capsys):
    rows, args, out = asked
    generate.main(args)
    whole = out.read_bytes()
    out.unlink()
    for i in "20":
        generate.main([*args, "--shard-index", i, "--shard-count", "3"])
    assert [a["id"] for a in read(out.with_name("a.2-of-3.jsonl"))] == [2, 5] and not out.exists()
    generate.main(args)  # joins what is there and asks the rest
    assert out.read_bytes() == whole
    assert "6 answers, 2 of them new" in capsys.readouterr().out


def test_adapter_changes_answers_and_is_recorded(asked, tiny_base, tmp_path):
    _, args, out = asked
    generate.main(args)
    before = [a["answer"] for a in read(out)]
    model, _ = weights.load_base(str(tiny_base))
    parameters = lora.add_lora(model, r=4)
    for p in parameters:
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    lora.save_adapter(model, tmp_path / "run", "tiny")
    with pytest.raises(SystemExit, match="begun with adapter None"):
        generate.main([*args, "--adapter", str(tmp_path / "run")])
    args[5] = str(tmp_path / "b.jsonl")
    generate.main([*args, "--adapter", str(tmp_path / "run")])
    assert [a["answer"] for a in read(tmp_path / "b.jsonl")] != before
    digest = hashlib.sha256((tmp_path / "run" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "b.settings.json").read_text())["adapter_sha256"] == digest
    for dtype, separate in (("float32", 0), ("bfloat16", 14)):  # 7 linears of 2 layers stay apart in 16 bits
        one = generate.parse_args([*args, "--adapter", str(tmp_path / "run"), "--dtype", dtype])
        assert len(lora.lora_modules(generate.load_model(one))) == separate
    with pytest.raises(SystemExit, match="nowhere.*not there"):
        generate.main([*args, "--adapter", str(tmp_path / "nowhere")])


def test_one_picture_is_answered_as_it_is_written(asked, capsys, monkeypatch):
    """Printed a token at a time; a character of several tokens when it is whole."""
    _, args, out = asked
    tokenizer = weights.load_tokenizer(Path(args[1]))
    ids = tokenizer.encode("It shows a \N{SNOWMAN}.", add_special_tokens=False).ids + [EOS]
    seen = []

    def writes(model, prompts, pictures, new, temperature, generator, top_p, beams, on_token):
        assert len(prompts) == 1 and pictures.shape == (1, 3, 28, 28)
        for n in range(1, len(ids) + 1):
            on_token(ids[:n])
            seen.append(capsys.readouterr().out)
        return [ids]

    monkeypatch.setattr(generate, "generate", writes)
    generate.main([*args[:2], "--image", str(out.parent / "2.png"), "--prompt", "What is it?"])
    assert "".join(seen) + capsys.readouterr().out == "It shows a \N{SNOWMAN}.\n"
    assert "".join(seen[:3]) and "\N{SNOWMAN}" in [piece.strip() for piece in seen], seen


def test_one_picture_gets_the_answer_that_a_file_gets(asked, capsys):
    rows, args, out = asked
    generate.main([*args, "--beams", "2"])
    capsys.readouterr()
    one = ["--image", str(out.parent / "2.png"), "--prompt", rows[2]["prompt"], "--max-new-tokens", "6", "--beams", "2"]
    generate.main([*args[:2], *one])
    assert capsys.readouterr().out == read(out)[2]["answer"] + "\n"


@pytest.mark.parametrize("more", [
    [], ["--questions", "q"], ["--image", "x"], ["--image", "x", "--prompt", "p", "--out", "o"],
    ["--image", "x", "--prompt", "p", "--beams", "2", "--temperature", "1"],
    ["--image", "x", "--prompt", "p", "--top-p", ".5"], ["--image", "x", "--prompt", "p", "--batch", "0"],
    ["--image", "x", "--prompt", "p", "--temperature", "-1"], ["--image", "x", "--prompt", "p", "--beams", "0"],
    ["--questions", "q", "--out", "o", "--shard-index", "2", "--shard-count", "2"],
])  # fmt: skip
def test_flags_that_do_not_go_together(more, capsys):
    with pytest.raises(SystemExit) as e:
        generate.main(["--base", "x", *more])
    assert e.value.code == 2 and "error: " in capsys.readouterr().err
