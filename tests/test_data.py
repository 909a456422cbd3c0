"""Prompt, mask, pictures and batches: golden ids from a vocabulary of single letters, properties on random texts."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import llama_like_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers

import losses
import pictures
from data import (
    BUNNY,
    BUNNY_RELEASED,
    Example,
    Pair,
    PairData,
    Problem,
    Processor,
    collate,
    pad_rows,
)
from engine.batches import epoch_keys
from engine.loading import example_loader
from formats.problems import Demands, Examined, examine, token_lengths, usable
from model import Config, VisionConfig

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LETTERS = [chr(c) for c in range(33, 127)]  # ids 3 to 96
BLANK, NEWLINE, IMAGE, PAD = 97, 98, 99, 100
CONFIG = Config(
    vision=VisionConfig(image_size=28, patch=14), vocab=101, image_id=IMAGE, pad_id=PAD
)  # 2 x 2 = 4 patches


def letter_tokenizer(prepend: bool = True) -> Tokenizer:
    """One id per letter; like Llama's it puts a blank before every text it is given."""
    words = ["<unk>", "<s>", "</s>", *LETTERS, "▁", "\n", "<image>", "<pad>"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    first = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    return tokenizer


def ids(text: str) -> list[int]:
    """The letters' ids by hand: ! is 33 in ASCII and 3 here."""
    return [{" ": BLANK, "\n": NEWLINE}.get(c, ord(c) - 30) for c in text]


PROCESSOR = Processor(letter_tokenizer(), CONFIG)


def png(seed: int, size=(20, 14)) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def problems_of(pairs: list[Pair], **demands) -> list[Problem]:
    return examine("f.json", pairs, [], PROCESSOR, Demands(**demands)).problems


def examined(pairs: list[Pair], problems: list[Problem]) -> Examined:
    return Examined("f.json", Demands(), pairs, "crop", [], sorted(problems), [])


def pair(row: int = 1, **changes) -> Pair:
    return replace(Pair(f"p{row}", png(row), "What is it?", "A red bus.", "No", row), **changes)


PAIRS = [pair(row, image=png(row, (20 + row, 30 - row))) for row in range(1, 7)]


# ---- tokens --------------------------------------------------------------------------------------------------------


def test_golden_prompt_and_mask():
    batch = collate([PairData([pair()], PROCESSOR)[0, 0]], CONFIG)
    # <s>, the text before <image> and the text after it: each text gets a blank of its own in front
    prompt = [1] + ids(f" {SYSTEM} USER: ") + [IMAGE] * 4 + ids(" \nWhat is it? ASSISTANT:")
    assert batch.chosen.input_ids.tolist() == [prompt + ids(" A red bus.") + [2]]
    assert batch.rejected.input_ids.tolist() == [prompt + ids(" No") + [2]]
    # " A red bus." is 11 ids, " No" 3; </s> is scored as well
    assert batch.chosen.response_mask.tolist() == [[False] * len(prompt) + [True] * 12]
    assert batch.rejected.response_mask.tolist() == [[False] * len(prompt) + [True] * 4]
    assert token_lengths(pair(), PROCESSOR) == (len(prompt), 12, 4)
    assert PROCESSOR.response_ids(" \n No\t") == PROCESSOR.response_ids("No") == ids(" No") + [2]


def test_the_datas_own_system_text_stands_in_the_prompt():
    own = pair(system="Be brief.")
    prompt = [1] + ids(" Be brief. USER: ") + [IMAGE] * 4 + ids(" \nWhat is it? ASSISTANT:")
    assert PairData([own], PROCESSOR)[0, 0].prompt.tolist() == prompt
    without = [1] + ids(" Be brief. USER: What is it? ASSISTANT:")
    assert PairData([own], PROCESSOR, with_image=False)[0, 0].prompt.tolist() == without
    assert token_lengths(own, PROCESSOR)[0] == len(prompt)
    assert token_lengths(own, PROCESSOR, with_image=False)[0] == len(without)
    assert PairData([own], PROCESSOR).digest() != PairData([pair()], PROCESSOR).digest()
    (problem,) = problems_of([pair(system="Be </s> brief.")])
    assert (problem.reason, problem.detail) == ("special-token text inside data", "</s> in system")


def test_golden_prompt_without_image():
    example = PairData([pair()], PROCESSOR, with_image=False)[0, 0]
    assert example.prompt.tolist() == [1] + ids(f" {SYSTEM} USER: What is it? ASSISTANT:")
    assert example.image is None and collate([example], CONFIG).images is None


@pytest.mark.parametrize("template, first", [(BUNNY, [BLANK, 54]), (BUNNY_RELEASED, [54])], ids=["tuned", "released"])
def test_bunny_templates(template, first):
    bunny = Processor(letter_tokenizer(prepend=False), CONFIG, template)
    assert bunny.prompt_ids("Hm?")[:3] == ids("A c")  # no BOS, no blank in front
    assert bunny.response_ids("The end") == first + ids("he end") + [2]  # T is 84 in ASCII
    assert bunny.template.image.size == 28  # the base's own


@pytest.mark.parametrize("text", ["</s>", "a<s>b", "<image>", "x <pad>"])
def test_special_token_text_never_becomes_a_special_id(text):
    assert PROCESSOR.encode(text) == ids(" " + text)
    assert pickle.loads(pickle.dumps(PROCESSOR)).encode(text) == ids(" " + text)  # as worker processes get it
    for name in ("prompt", "chosen", "rejected"):
        problem = problems_of([pair(**{name: text})])[0]
        assert problem[:3] == (1, "p1", "special-token text inside data") and problem.detail.endswith(f" in {name}")


PROCESSOR_BPE = Processor(llama_like_tokenizer(), replace(CONFIG, image_id=340, pad_id=341))
# without U+2581, which Llama's tokenizers read as a blank, and without the texts of special tokens
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30).filter(
    lambda text: text.strip() and not any(s in text for s in ("<unk>", "<s>", "</s>", "<image>", "<pad>"))
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT), min_size=1, max_size=3))
def test_random_texts_survive(rows):
    p, c = PROCESSOR_BPE, PROCESSOR_BPE.config
    rows = [[text.strip() for text in row] for row in rows]
    blank = torch.zeros(3, 28, 28)
    texts = [(p.prompt_ids(q), p.response_ids(y_w), p.response_ids(y_l)) for q, y_w, y_l in rows]
    batch = collate([Example(pair(), *map(torch.tensor, t), blank, None) for t in texts], c)
    decode = p.tokenizer.decode
    for i, (q, *responses) in enumerate(rows):
        for side, response in zip((batch.chosen, batch.rejected), responses, strict=True):
            row, mask = side.input_ids[i], side.response_mask[i]
            assert row[mask][-1] == c.eos_id and not (row[mask][:-1] <= 2).any()  # one EOS, the last
            assert decode(row[mask][:-1].tolist(), skip_special_tokens=False) == response
            start, end = mask.nonzero()[0].item(), mask.nonzero()[-1].item() + 1
            assert mask[start:end].all() and (row[end:] == c.pad_id).all()
            at = (row == c.image_id).nonzero()[:, 0].tolist()
            assert at == list(range(at[0], at[0] + 4)) and at[-1] < start  # the picture is one piece
            assert decode(row[1 : at[0]].tolist(), skip_special_tokens=False) == f"{SYSTEM} USER: "
            assert decode(row[at[-1] + 1 : start].tolist(), skip_special_tokens=False) == f"\n{q} ASSISTANT:"


# ---- checking ------------------------------------------------------------------------------------------------------

BAD = {
    "empty prompt": dict(prompt=" "),
    "empty chosen": dict(chosen=""),
    "empty rejected": dict(rejected=" \n"),
    "no image": dict(image=None),
    "missing image": dict(image=Path("nowhere.png")),
    "broken image": dict(image=b"GIF89a"),
    "too long": dict(rejected="x" * 300),
    "prompt too long": dict(prompt="x" * 500),
    "no image_rejected": dict(image_rejected=None),
}


@pytest.mark.parametrize("reason", BAD)
def test_reasons(reason):
    bad = pair(7, **{"image_rejected": png(0)} | BAD[reason])
    good = pair(8, image_rejected=png(0), chosen="Y")  # one-letter answers are legal
    problems = problems_of([bad, good], rejected_image="given", max_length=450)
    assert [p[:3] for p in problems] == [(7, "p7", reason)]


def test_usable_stops_at_the_first_bad_row_or_leaves_all_out(capsys):
    problems = [Problem(9, "p9", "no image"), Problem(2, "p2", "empty chosen"), Problem(4, "p4", "no image")]
    found = examined(PAIRS, problems)
    with pytest.raises(SystemExit) as e:
        usable(found, skip_bad=False)
    assert "f.json:2: id p2: empty chosen" in str(e.value)
    assert "3 of 7 rows cannot be used (2 no image, 1 empty chosen)" in str(e.value)  # row 9 is not among the six pairs
    assert [p.row for p in usable(found, skip_bad=True)] == [1, 3, 5, 6]
    assert "3 of 7 rows" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no usable rows"):
        usable(examined(PAIRS[:1], [Problem(1, "p1", "no image")]), skip_bad=True)


def test_cut_long_cuts_responses_only_and_counts(capsys):
    long = pair(chosen="x" * 300)
    length = len(PROCESSOR.prompt_ids(long.prompt))
    limit = length + 50
    assert not problems_of([pair(chosen="x" * 48)], max_length=limit)  # with the blank before it and EOS exactly 50
    with pytest.raises(SystemExit, match="1 too long"):
        usable(examine("f.json", [long, PAIRS[1]], [], PROCESSOR, Demands(max_length=limit)), skip_bad=False)
    found = examine("f.json", [long, PAIRS[1]], [], PROCESSOR, Demands(max_length=limit, cut_long=True))
    pairs = usable(found, skip_bad=False)
    assert len(pairs) == 2 and "a response too long for --max-length in 1 of 2 rows" in capsys.readouterr().out
    example = PairData(pairs, PROCESSOR, max_length=limit)[0, 0]
    assert example.prompt.tolist() == PROCESSOR.prompt_ids(long.prompt)
    assert example.chosen.tolist() == ids(" " + "x" * 49)  # 50 ids; the text does not end here: no EOS
    assert example.rejected.tolist() == ids(" No") + [2]
    # a long response hides no broken picture, since it can be cut
    broken = [replace(long, image=b"GIF89a")]
    assert [p.reason for p in problems_of(broken, max_length=limit)] == ["broken image", "too long"]
    assert [p.reason for p in problems_of(broken, max_length=limit, cut_long=True)] == ["broken image"]
    # a prompt that leaves no room cannot be fixed by cutting
    with pytest.raises(SystemExit, match="1 prompt too long"):
        usable(examine("f.json", [long], [], PROCESSOR, Demands(max_length=length, cut_long=True)), skip_bad=False)


# ---- pictures and m_l ----------------------------------------------------------------------------------------------


def test_pictures_of_an_example():
    example = PairData(PAIRS, PROCESSOR, "crop")[0, 2]
    original = pictures.open_image(PAIRS[2].image)
    spec = pictures.ImageSpec(size=28)
    assert torch.equal(example.image, pictures.levels(original, spec)) and example.image.dtype == torch.uint8
    # the crop is drawn from (seed, row, epoch) = (0, 3, 0) alone
    cropped = pictures.crop(original, np.random.default_rng((0, 3, 0)), 0.01, 0.2)
    assert torch.equal(example.image_rejected, pictures.levels(cropped, spec))
    batch = collate([example], CONFIG).to("cpu")  # normalised on the device, once
    assert torch.equal(batch.images[0], pictures.prepare(original, spec))
    assert torch.equal(batch.image_rejected[0], pictures.prepare(cropped, spec))
    assert torch.equal(batch.to("cpu").images, batch.images)
    assert PairData(PAIRS, PROCESSOR)[0, 2].image_rejected is None


@pytest.mark.parametrize("strategy", [s for s in pictures.STRATEGIES if s not in ("same", "given", "random")])
def test_m_l_is_new_in_each_epoch_and_for_each_seed(strategy):
    data = PairData(PAIRS, PROCESSOR, strategy)
    m_l = [data[key].image_rejected for key in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert torch.equal(m_l[0], m_l[1]) and not torch.equal(m_l[0], m_l[2]) and not torch.equal(m_l[0], m_l[3])
    assert not torch.equal(m_l[0], PairData(PAIRS, PROCESSOR, strategy, seed=1)[0, 1].image_rejected)


def test_no_crop_every_epoch_draws_epoch_0():
    always, once = (PairData(PAIRS, PROCESSOR, "crop", fresh_every_epoch=fresh) for fresh in (True, False))
    assert torch.equal(once[5, 1].image_rejected, always[0, 1].image_rejected)
    assert not torch.equal(always[5, 1].image_rejected, always[0, 1].image_rejected)


def test_same_given_and_random():
    same = PairData(PAIRS, PROCESSOR, "same")[0, 0]
    assert torch.equal(same.image_rejected, same.image)
    given = PairData([pair(image_rejected=png(99))], PROCESSOR, "given")[0, 0]
    assert torch.equal(given.image_rejected, pictures.levels(pictures.open_image(png(99)), given.spec))
    random = PairData(PAIRS, PROCESSOR, "random")
    m_w = [random[0, i].image for i in range(6)]
    chosen = {
        (i, next(j for j in range(6) if torch.equal(random[e, i].image_rejected, m_w[j])))
        for e in range(30)
        for i in range(6)
    }
    assert chosen == {(i, j) for i in range(6) for j in range(6) if i != j}  # every other picture, never its own
    one = examine("f.json", PAIRS[:1], [], PROCESSOR, Demands(rejected_image="random"))
    with pytest.raises(SystemExit, match="at least 2 pairs"):
        usable(one, skip_bad=True)


def test_policy_and_reference_see_the_same_m_l():
    batch = collate([PairData(PAIRS, PROCESSOR, "crop")[0, i] for i in range(2)], CONFIG)
    seen = []

    def model(input_ids, images):
        seen.append(images)
        return torch.zeros(*input_ids.shape, CONFIG.vocab)

    losses.plain_logps(model, batch), losses.plain_logps(model, batch)  # reference, policy
    m_w, m_l = batch.images, batch.image_rejected
    assert all(torch.equal(a, b) for a, b in zip(seen, [m_w, m_w, m_l] * 2, strict=True)) and not torch.equal(m_w, m_l)


@pytest.mark.parametrize("strategy", ["crop", "random", "moco", "crop-released"])
def test_workers_and_batch_size_change_nothing(strategy):
    data = PairData(PAIRS, PROCESSOR, strategy, seed=3)
    alone = [data[key] for key in epoch_keys(6, 2, seed=3)]
    worked = list(example_loader(data, epoch_keys(6, 2, seed=3), workers=2))
    for a, b in zip(alone, worked, strict=True):
        assert (a.pair.id, a.draw) == (b.pair.id, b.draw)
        for name in ("prompt", "chosen", "rejected", "image", "image_rejected"):
            assert torch.equal(a._asdict()[name], b._asdict()[name]), name
    together, single = collate(worked[:4], CONFIG), [collate([e], CONFIG) for e in worked[:4]]
    assert torch.equal(together.image_rejected, torch.cat([s.image_rejected for s in single]))
    for i, s in enumerate(single):
        T = s.chosen.input_ids.shape[1]
        assert torch.equal(together.chosen.input_ids[i, :T], s.chosen.input_ids[0])


# ---- batches -------------------------------------------------------------------------------------------------------


def test_pad_rows_by_hand():
    tokens = pad_rows([torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8]), torch.tensor([9, 4, 2])], pad_id=0)
    assert tokens.input_ids.tolist() == [[5, 6, 8, 0], [7, 9, 4, 2]]
    assert tokens.response_mask.tolist() == [[False, False, True, False], [False, True, True, True]]


def test_batch_refuses_lost_pictures_and_empty_responses():
    example = PairData(PAIRS, PROCESSOR)[0, 0]
    at = example.prompt.tolist().index(IMAGE)
    cut = example._replace(prompt=torch.cat([example.prompt[:at], example.prompt[at + 1 :]]))  # one placeholder lost
    doubled = example._replace(prompt=torch.cat([torch.tensor([IMAGE]), example.prompt]))
    with pytest.raises(AssertionError, match=r"\[4, 3\] placeholders"):
        collate([example, cut], CONFIG)
    with pytest.raises(AssertionError, match=r"\[3, 5\] placeholders"):  # 8 in all, and still wrong
        collate([cut, doubled], CONFIG)
    with pytest.raises(AssertionError, match=r"without a scored token: \['p1'\]"):
        collate([example._replace(rejected=example.rejected[:0])], CONFIG)


def test_sampler_goes_through_every_epoch_in_a_new_order():
    keys = list(epoch_keys(5, 3, seed=7))
    assert [e for e, _ in keys] == [0] * 5 + [1] * 5 + [2] * 5
    orders = [[i for e, i in keys if e == epoch] for epoch in range(3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and orders[0] != orders[1] != orders[2]
    assert list(epoch_keys(5, 3, seed=8)) != keys


def test_real_size_placeholders():
    # (336 / 14)^2 = 576 for LLaVA-1.5, floor(384 / 14)^2 = 27^2 = 729 for Bunny's SigLIP
    llava = Processor(letter_tokenizer(), replace(Config(), image_id=IMAGE))
    assert llava.prompt_ids("Hm?").count(IMAGE) == 576 and llava.prepare(Image.new("RGB", (5, 9))).shape == (
        3,
        336,
        336,
    )
    siglip = replace(CONFIG, vision=VisionConfig(image_size=384, patch=14))
    assert Processor(letter_tokenizer(), siglip, BUNNY).prompt_ids("Hm?").count(IMAGE) == 729
