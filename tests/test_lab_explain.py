"""The page: its words, its numbers, what it draws, and that no text of the data can change it; also in a browser."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import pictures
import train
from lab import explain, explain_html, one_pair
from lab.explain_words import Word, response_words, split_words

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = {
    "id": '"><img src=x onerror=alert(1)>',
    "prompt": "</p></main><script>alert('q')</script> \u202eright to left &amp; \"quoted\" \x1b[31m?",
    "chosen": "<script>document.title='owned'</script> 👩‍👩‍👧 'one' \u2067שלום עולם\u2069 العربية \x1b]0;x\x07 -->",
    "rejected": "<style>*{display:none}</style><!-- \u200f 中文 http://example.com/x.png \u0000",
}


@pytest.fixture(scope="module")
def run(tiny_base, pairs_file, tmp_path_factory):
    """A trained adapter, and a data file whose second row is hostile."""
    folder = tmp_path_factory.mktemp("explain")
    rows = json.loads(pairs_file.read_text())
    rows = [row | {"image": str(pairs_file.parent / row["image"])} for row in rows]
    rows[1] |= HOSTILE
    (folder / "pairs.json").write_text(json.dumps(rows))
    train.main(
        ["--base", str(tiny_base), "--data", str(folder / "pairs.json"), "--image-root", str(pairs_file.parent)]
        + ["--out", str(folder / "run"), "--workers", "0", "--epochs", "2", "--batch", "2", "--lr", "3e-3"]
        + ["--lora-r", "4", "--lora-alpha", "8"]
    )
    return folder / "run"


def page_of(run, out, *flags) -> str:
    explain.main(["--adapter", str(run), "--out", str(out), *map(str, flags)])
    return out.read_text(encoding="utf-8")


def numbers_of(run, row) -> one_pair.Numbers:
    found = one_pair.open_pairs(one_pair.pair_parser("").parse_args(["--adapter", str(run), "--row", str(row)]))
    return one_pair.pair_numbers(found.model, found.data[found.keys[0]], found.settings)


# ---- words ---------------------------------------------------------------------------------------------------------


def texts(words: list[Word]) -> list[str]:
    return [word.text for word in words]


def test_tokens_become_words_by_where_they_stand():
    words = split_words("Two do-gs.  No", [(0, 3), (3, 6), (6, 7), (7, 9), (9, 10), (10, 11), (11, 14)])
    assert words == [Word("Two", 0, 1), Word(" do-gs", 1, 4), Word(".", 4, 5), Word("  No", 5, 7)]
    assert words[1].sum(torch.tensor([1.0, 0.5, 0.25, 0.125, 8, 8, 8])) == 0.875  # 0.5 + 0.25 + 0.125


def test_a_token_over_the_end_of_a_word_joins_both():
    assert split_words("a</s>. b", [(0, 1), (1, 4), (4, 6), (6, 8)]) == [Word("a</s>.", 0, 3), Word(" b", 3, 4)]


def test_words_of_chinese_and_trailing_blanks():
    assert texts(split_words("中文 ok ", [(0, 1), (1, 2), (2, 5), (5, 6)])) == ["中", "文", " ok", " "]


def processor_of(tiny_base):
    from bases.checkpoint import read_config
    from bases.tokenizer import load_processor

    return load_processor(tiny_base, read_config(tiny_base))


@pytest.mark.parametrize(
    "response, wanted",
    [
        ("A red square, 😀.", ["A", " red", " square", ",", " 😀", ".", ""]),
        ("👩‍👩‍👧 é\n\nTwo", ["👩‍👩‍👧", " é", "\n\nTwo", ""]),
        ("Yes", ["Yes", ""]),
    ],
)
def test_every_token_of_a_response_is_in_one_word(tiny_base, response, wanted):
    """Byte tokens, the dummy blank and EOS included."""
    processor = processor_of(tiny_base)
    ids = processor.response_ids(response)
    words = response_words(processor, response, ids)
    assert texts(words) == wanted
    assert [i for word in words for i in range(word.first, word.end)] == list(range(len(ids)))
    assert all(word.end > word.first for word in words)


def test_the_blank_that_bunny_was_tuned_with_is_part_of_the_first_word(tiny_base):
    processor = processor_of(tiny_base)
    processor.template = replace(processor.template, response_blank=True)
    words = response_words(processor, "Two dogs.", processor.response_ids("Two dogs."))
    assert texts(words) == [" Two", " dogs", ".", ""]


def test_a_cut_response_ends_where_its_ids_do(tiny_base):
    processor = processor_of(tiny_base)
    ids = processor.response_ids("Two dogs.", room=4)
    words = response_words(processor, "Two dogs.", ids)
    assert words[-1].end == 4 and "Two dogs.".startswith("".join(texts(words)))
    assert len("".join(texts(words))) < len("Two dogs.")


# ---- pieces --------------------------------------------------------------------------------------------------------


def test_formulas_in_letters_and_indices():
    assert explain_html.maths("-log sigma(r(m_w, q) - delta)") == (
        '<span class="maths">−log σ(<i>r</i>(<i>m</i><sub>w</sub>, <i>q</i>) − δ)</span>'
    )
    assert explain_html.maths("log pi_theta") == '<span class="maths">log π<sub>θ</sub></span>'


def test_text_is_escaped_and_what_steers_is_spelt_out():
    assert explain_html.shown("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert explain_html.shown("a\x1b[0m\u202eb\x00\u200f\ufeff") == r"a\x1b[0m\u202eb\x00\u200f\ufeff"
    assert explain_html.shown("tab\tline\nno-break\u00a0ذ 👩‍👩‍👧") == "tab\tline\nno-break\u00a0ذ 👩‍👩‍👧"


def test_numbers_never_show_minus_zero():
    assert [explain_html.signed(x) for x in (0.5, -0.25, -0.00001)] == ["+0.5000", "−0.2500", "0.0000"]
    assert explain_html.plain(0.5) == "0.5000"


def test_colour_grows_with_the_value_and_its_side_says_the_sign():
    words = [Word("up", 0, 1), Word(" down", 1, 3), Word("", 3, 4)]
    columns = {"reward": torch.tensor([0.5, -0.5, -0.5, 0.0]), "other": torch.tensor([1.0, 2, 3, 4])}
    html = explain_html.coloured(words, columns, largest=explain_html.largest_of(words, columns["reward"]))
    assert explain_html.FULL == 0.72
    assert '<span class="word up" style="--a:0.360;' in html  # 0.72 * 0.5 / 1
    assert ' <span class="word down" style="--a:0.720;' in html  # the sum of two tokens, -1, is the largest
    assert "reward   −1.0000&#10;other    +5.0000&#10;2 tokens" in html
    assert '<span class="word eos down" style="--a:0.000;' in html and ">END<" in html


def test_a_finding_says_rise_fall_or_neither():
    assert explain.finding(0.5, "rose", "fell", "nats") == (
        '<li class="yes">The better answer rose <span class="soft">(+0.5000 nats)</span></li>'
    )
    assert '"no">The better answer fell <span class="soft">(−0.2500' in explain.finding(-0.25, "rose", "fell", "nats")
    assert '"even">not yet: the better answer rose' in explain.finding(1e-6, "rose", "fell", "nats")


def test_crop_is_drawn_where_it_was_cut():
    """60 x 40 is padded to 60 x 60, ten rows above and below: top 4 becomes 14 of 60. 40 x 60 has ten at each side."""
    wide = explain_html.kept_frame((6, 4, 30, 12), (60, 40), pictures.ImageSpec())
    assert 'style="left:10.00%;top:23.33%;width:50.00%;height:20.00%"' in wide  # 6, 14, 30, 12 of 60
    tall = explain_html.kept_frame((6, 4, 30, 12), (40, 60), pictures.ImageSpec())
    assert 'style="left:26.67%;top:6.67%;width:50.00%;height:20.00%"' in tall  # 16, 4, 30, 12 of 60


@pytest.mark.parametrize("strategy", ["crop", "crop20-50", "crop:0.3-0.3"])
def test_the_box_is_the_one_m_l_was_cut_with(run, strategy):
    found = one_pair.open_pairs(one_pair.pair_parser("").parse_args(["--adapter", str(run), "--row", "3"]))
    data = found.data
    data.strategy = strategy
    example = data[1, 2]
    image = pictures.open_image(example.pair.image)
    left, top, width, height = explain.kept_box(example, data, image.size)
    cut = pictures.levels(image.crop((left, top, left + width, top + height)), example.spec)
    assert torch.equal(cut, example.image_rejected)
    data.strategy = "same"
    assert explain.kept_box(example, data, image.size) is None


# ---- the page ------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Elements of a page: how many of each, whether they close, what they point to, the text."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.counts, self.targets, self.text = [], {}, [], ""
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.targets += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")], attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def test_page_shows_what_one_pair_says(run, tmp_path):
    html = page_of(run, tmp_path / "page.html", "--row", 1)
    numbers = numbers_of(run, 1)
    text = re.sub(r"\s+", " ", Outline(html).text)
    shown = [explain_html.signed(triple.reward) for triple in numbers.triples]
    shown += [explain_html.plain(float(triple.policy.sum())) for triple in numbers.triples]
    shown += [explain_html.plain(float(triple.reference.sum())) for triple in numbers.triples]
    shown += [f"= {explain_html.plain(term.value)}" for term in numbers.terms]
    assert [number for number in shown if number not in text] == []
    assert f"= {explain_html.plain(numbers.loss)}" in text
    owed = [numbers.chosen.policy - numbers.image_rejected.policy]
    owed.append(numbers.chosen.reference - numbers.image_rejected.reference)
    for values in owed:
        assert f") = {explain_html.signed(float(values.sum()))}" in text  # the sum stands beside its equation
    margin = explain_html.signed(numbers.chosen.reward - numbers.image_rejected.reward)
    assert f") = {margin}." in text and "is what LCoPO wants to grow" in text
    assert "before and after mDPO" in text and "A red square on a green field." in text


def test_the_words_rewards_add_up_to_the_reward(run, tmp_path):
    html = page_of(run, tmp_path / "page.html", "--row", 1)
    answers = re.findall(r'<p class="answer".*?</p>', html, re.S)
    assert len(answers) == 4  # y_w and y_l by reward, y_w before and after by what it owes
    for answer, triple in zip(answers, (numbers_of(run, 1).chosen, numbers_of(run, 1).rejected), strict=False):
        parts = [float(x.replace("−", "-")) for x in re.findall(r'data-numbers="reward +([+−]?[\d.]+)&', answer)]
        assert len(parts) >= 3
        assert sum(parts) == pytest.approx(triple.reward, abs=5e-5 * len(parts))  # each word is rounded


def test_page_is_one_file_without_scripts(run, tmp_path):
    html = page_of(run, tmp_path / "page.html", "--row", 1, 2)
    outline = Outline(html)
    assert outline.counts.keys().isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    assert outline.counts["style"] == 1 and "url(" not in html and "@import" not in html
    assert {target.split(":")[0].split("-")[0] for target in outline.targets} == {"data", "#row"}
    assert "default-src 'none'; img-src data:" in html and "prefers-color-scheme: dark" in html


def test_pictures_are_those_the_model_sees(run, tmp_path):
    """Decoded again from the page, pixel for pixel: m_w, then m_l."""
    import base64
    import io

    html = page_of(run, tmp_path / "page.html", "--row", 1)
    example = numbers_of(run, 1).example
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    for text, levels in zip(found, (example.image, example.image_rejected), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(text)))
        assert torch.equal(torch.tensor(list(image.get_flattened_data())).T.reshape(3, 28, 28), levels.long())


def test_several_rows_make_a_list(run, tmp_path):
    html = page_of(run, tmp_path / "page.html", "--row", 3, 1, 3)
    assert re.findall(r'href="(#row-\d)"', html) == ["#row-3", "#row-1"]
    assert re.findall(r'<article id="(row-\d)">', html) == ["row-3", "row-1"]
    assert "<nav>" not in page_of(run, tmp_path / "one.html", "--row", 3)


def test_hostile_texts_are_texts(run, tmp_path):
    html = page_of(run, tmp_path / "page.html", "--row", 2)
    counts = Outline(html).counts
    assert {tag: counts.get(tag, 0) for tag in ("script", "img", "style", "main")} == dict(
        script=0, img=2, style=1, main=1
    )
    assert not set(html) & set("\x1b\x07\x00\u202e\u2067\u2069\u200f")
    assert "&lt;script&gt;alert(&#x27;q&#x27;)&lt;/script&gt;" in html and r"\u202eright to left &amp;amp;" in html


def run_of(run, folder, **changed):
    """A copy of the run that recorded other settings."""
    shutil.copytree(run / "epoch-1", folder)
    settings = json.loads((run / "args.json").read_text()) | {"terms": ["dpo"], "rejected_image": None}
    (folder / "args.json").write_text(json.dumps(settings | changed))
    return folder


def test_page_of_a_dpo_run_says_what_its_loss_does_not_ask_for(run, tmp_path):
    html = page_of(run_of(run, tmp_path / "dpo", recipe="dpo"), tmp_path / "page.html", "--row", 1)
    assert "before and after DPO</h1>" in html and "owes the picture" in html
    assert "is which nothing" not in html and "nothing in this run's loss asks for it" in html


def test_page_before_training_and_of_a_run_without_pictures(run, tiny_base, pairs_file, tmp_path):
    explain.main(["--base", str(tiny_base), "--data", str(pairs_file), "--row", "1", "--out", str(tmp_path / "a.html")])
    html = (tmp_path / "a.html").read_text()
    assert "One preference pair, before training" in html and html.count("not yet: ") == 3
    folder = run_of(run, tmp_path / "no-image", recipe="dpo-no-image")
    html = page_of(folder, tmp_path / "b.html", "--row", 1)
    assert "leaves the picture out" in html and "<img" not in html and "owes the picture" not in html


@pytest.mark.parametrize("name", ["", "page.png", "pairs.jsonl"])
def test_only_a_page_is_written(run, tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        explain.main(["--adapter", str(run), "--row", "1", "--out", str(tmp_path / name)])
    assert "must be the name of a .html or .htm file" in capsys.readouterr().err


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield started
        started.close()


def visit(browser, file, **context):
    """The page, opened from the disk, and what went wrong: console messages, errors, dialogs, requests."""
    page = browser.new_page(**context)
    seen = []
    page.on("console", lambda message: seen.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: seen.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(file.as_uri())
    return page, [what for what in seen if what != file.as_uri()]


@pytest.mark.slow
@pytest.mark.parametrize("scheme, ground", [("light", "rgb(250, 249, 246)"), ("dark", "rgb(20, 22, 26)")])
@pytest.mark.parametrize("width", [390, 1180])
def test_browser_shows_it_quietly_in_light_and_dark(run, tmp_path, browser, scheme, ground, width):
    file = tmp_path / "page.html"
    page_of(run, file, "--row", 1, 2, 3)
    page, seen = visit(browser, file, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert seen == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll to the right
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth === 28)")
    page.hover("#row-1 .word >> nth=1")
    tip = page.evaluate("getComputedStyle(document.querySelectorAll('#row-1 .word')[1], '::after').content")
    assert "reward" in tip and "log π_θ" in tip and "token" in tip
    page.close()


@pytest.mark.slow
def test_browser_reads_hostile_texts_as_texts(run, pairs_file, tmp_path, browser):
    """The same row with hostile and with tame texts: the same page, but for its words."""
    outlines = []
    for data in (run.parent / "pairs.json", pairs_file):
        page_of(run, tmp_path / "page.html", "--row", 2, "--data", data, "--image-root", pairs_file.parent)
        page, seen = visit(browser, tmp_path / "page.html", viewport={"width": 1180, "height": 800})
        assert seen == [] and page.title() == "One preference pair, before and after mDPO"
        outlines.append(page.evaluate(OUTLINE))
        if data != pairs_file:
            assert page.text_content(".question") == as_read(HOSTILE["prompt"])
        page.close()
    assert len(outlines[0]) > 80
    assert outlines[0] == outlines[1]


OUTLINE = """[...document.querySelectorAll('body *')]
    .filter(e => !e.closest('.facts, .answer, table, details, .verdict, .maths'))
    .map(e => [e.tagName, e.className, getComputedStyle(e).display, Math.round(e.getBoundingClientRect().x)])"""


def as_read(text: str) -> str:
    """What a reader should see of a text with these two characters that steer."""
    return text.replace("\u202e", r"\u202e").replace("\x1b", r"\x1b")


@pytest.mark.slow
def test_browser_prints_black_on_white_also_where_the_screen_is_dark(run, tmp_path, browser):
    file = tmp_path / "page.html"
    page_of(run, file, "--row", 1)
    page, seen = visit(browser, file, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert len(page.pdf()) > 10_000 and seen == []
    page.close()
