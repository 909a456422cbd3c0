"""Decoding equals transformers' token for token; sampling by hand; files of answers: resumed, sharded, refused."""

import copy
import math

import pytest
import tiny_models
import torch
from PIL import Image
from transformers.generation import TopPLogitsWarper

import generate
from bases import checkpoint, tokenizer

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
    return theirs, checkpoint.load_model(folder)


def theirs_generate(model, new: int, beams: int, suppress, **inputs) -> list[int]:
    out = model.generate(
        max_new_tokens=new,
        do_sample=False,
        num_beams=beams,
        length_penalty=1.0,
        early_stopping=False,
        suppress_tokens=suppress,
        pad_token_id=0,
        **inputs,
    )
    return out[0].tolist()


def until_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_llava_equals_transformers(llava, beams):
    """A batch of different lengths gives, row by row, the tokens that transformers gives one question alone."""
    theirs, ours = llava
    prompts, pictures = prompts_and_pictures(42, 9, tiny_models.IMAGE_ID)

    def one_by_one(suppress):
        answers = []
        for p, x in zip(prompts, pictures, strict=True):
            inputs = {"input_ids": p[None], "attention_mask": torch.ones_like(p[None]), "pixel_values": x[None]}
            ids = theirs_generate(theirs, 20, beams, suppress, eos_token_id=EOS, **inputs)
            answers.append(until_eos(ids[len(p) :], EOS))
        return answers

    expected = one_by_one(list(range(90, 96)))
    assert generate.generate(ours, prompts, pictures, 20, beams=beams) == expected
    assert one_by_one(None) != expected  # so the suppressed rows do matter here
    lengths = [len(ids) for ids in expected]
    assert len(set(lengths)) > 2, lengths  # rows end at several steps


def test_the_cached_loop_equals_the_plain_one(llava):
    """Batched, padded, rows leaving early: each row has the tokens that reading everything anew gives it alone."""
    _, ours = llava
    prompts, pictures = prompts_and_pictures(42, 9, tiny_models.IMAGE_ID)
    plain = [generate.greedy(ours, p, x, 20) for p, x in zip(prompts, pictures, strict=True)]
    assert generate.generate(ours, prompts, pictures, 20) == plain
    assert len({len(ids) for ids in plain}) > 2, plain


@pytest.mark.parametrize("beams", [1, 3])
def test_bunny_equals_phi(tmp_path, beams):
    """Bunny gives the tokens of transformers' Phi when Phi is fed Bunny's embeddings."""
    phi, siglip = tiny_models.phi_and_siglip()
    phi.lm_head.weight.data *= 0.8
    phi.lm_head.weight.data[95] = torch.randn(80, generator=torch.Generator().manual_seed(3)) * 0.15  # it likes to end
    ours = checkpoint.load_model(tiny_models.write_bunny(phi, siglip, tmp_path / "bunny"))
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


@pytest.mark.parametrize("dtype, advice", [(torch.float32, "weights are damaged"), (torch.bfloat16, "--dtype float32")])
def test_numbers_that_are_not_finite_are_said(llava, dtype, advice):
    """In float32 there is no wider type to try."""
    model = copy.deepcopy(llava[1]).to(dtype)
    model.language_model.norm.weight.data[0] = torch.nan
    with pytest.raises(SystemExit, match=f"not finite in {dtype}; .*{advice}"):
        generate.generate(model, *prompts_and_pictures(42, 9, tiny_models.IMAGE_ID, 2), 3)


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "temperature, top_p, draws, expected",
    [
        (1.0, 1.0, (0.0, 0.29, 0.31, 0.79, 0.81, 0.9999999), (0, 0, 1, 1, 2, 2)),  # cdf .3 .8 1
        (0.5, 1.0, (0.23, 0.24, 0.89, 0.90), (0, 1, 1, 2)),  # squared: .09 .25 .04 of .38 -> cdf .2368 .8947 1
        (1.0, 0.7, (0.37, 0.38, 0.9999999), (0, 1, 1)),  # .5 < .7, so .3 stays, .2 goes: .375 .625 -> cdf .375 1
        (1.0, 0.5, (0.0, 0.9999999), (1, 1)),  # .5 alone holds .5
        (1.0, 1e-300, (0.0, 0.9999999), (1, 1)),  # the best always stays
        (1e-300, 1.0, (0.0, 0.9999999), (1, 1)),  # as greedy; log .5 / 1e-300 is infinite
    ],
)
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


def test_one_picture_is_answered_as_it_is_written(tiny_base, tmp_path, capsys, monkeypatch):
    """Printed a token at a time; a character of several tokens when it is whole."""
    Image.new("RGB", (30, 40), (80, 90, 10)).save(tmp_path / "x.png")
    encoder = tokenizer.load_tokenizer(tiny_base)
    ids = encoder.encode("It shows a \N{SNOWMAN}.", add_special_tokens=False).ids + [EOS]
    seen = []

    def writes(model, prompts, pictures, new, temperature, generator, top_p, beams, on_token):
        assert len(prompts) == 1 and pictures.shape == (1, 3, 28, 28)
        for n in range(1, len(ids) + 1):
            on_token(ids[:n])
            seen.append(capsys.readouterr().out)
        return [ids]

    monkeypatch.setattr(generate, "generate", writes)
    generate.main(["--base", str(tiny_base), "--image", str(tmp_path / "x.png"), "--prompt", "What is it?"])
    assert "".join(seen) + capsys.readouterr().out == "It shows a \N{SNOWMAN}.\n"
    assert "".join(seen[:3]) and "\N{SNOWMAN}" in [piece.strip() for piece in seen], seen


@pytest.mark.parametrize(
    "more",
    [
        ["--image", "x"],
        ["--prompt", "p"],
        ["--image", "x", "--prompt", "p", "--beams", "2", "--temperature", "1"],
        ["--image", "x", "--prompt", "p", "--top-p", ".5"],
        ["--image", "x", "--prompt", "p", "--temperature", "-1"],
        ["--image", "x", "--prompt", "p", "--beams", "0"],
    ],
)
def test_flags_that_do_not_go_together(more, capsys):
    with pytest.raises(SystemExit) as e:
        generate.main(["--base", "x", *more])
    assert e.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "question, reason",
    [
        ("<image> and <image>", "several <image>"),
        ("USER: what? ASSISTANT:", "another template"),
        ("<image> ", "no question in it"),
        ("What\udcff?", "not UTF-8"),
    ],
)
def test_a_question_that_cannot_be_asked_ends_before_the_model_is_loaded(tmp_path, monkeypatch, question, reason):
    Image.new("RGB", (30, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(generate, "load_processor", None)
    with pytest.raises(SystemExit, match=f"--prompt: .*{reason}"):
        generate.main(["--base", "x", "--image", str(tmp_path / "x.png"), "--prompt", question])
