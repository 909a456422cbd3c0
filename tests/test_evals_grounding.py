"""d', AUC and CHAIR_i at one coverage, by hand; the page marks what is not in the picture."""

import numpy as np
import pytest
from PIL import Image

from evals import caption_page, grounding

TRUTH = np.array([[True, False]])  # one scene: object 0 is there, object 1 is not
BOTH = np.array([[True, True]])


@pytest.mark.parametrize(
    "votes, expected",
    [
        # hit (1 + .5) / 2 = .75, false alarm (0 + .5) / 2 = .25; z(.75) = .67449 = -z(.25)
        ([[1, 0]], 1.34898),
        ([[1, 1]], 0.0),  # .75 and .75: it names everything
        ([[0, 1]], -1.34898),
        ([[0, 0]], 0.0),  # silence is no grounding
    ],
)
def test_d_prime_by_hand(votes, expected):
    assert grounding.d_prime(np.array(votes), TRUTH, BOTH, samples=1) == pytest.approx(expected, abs=1e-4)


def test_d_prime_counts_every_sample_and_only_what_is_asked():
    truth = np.array([[True, False, False]])
    asked = np.array([[True, True, False]])
    # hit (3 + .5) / (4 + 1) = .7, false alarm (1 + .5) / 5 = .3; z(.7) = .52440
    assert grounding.d_prime(np.array([[3, 1, 4]]), truth, asked, samples=4) == pytest.approx(1.04880, abs=1e-4)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    # .9 beats both; .5 beats .1 and ties with .5: 3.5 of 4
    assert grounding.auc([0.9, 0.5], [0.5, 0.1]) == 0.875
    assert grounding.auc([0.09, 0.05], [0.05, 0.01]) == 0.875  # a tenth of everything: no threshold


def test_chair_i_at_a_coverage():
    truth = np.array([[True, True, False, False]])
    votes = np.array([[2, 1, 1, 0]])
    # t = 2: object 0 is said: coverage .5, CHAIR_i 0. t = 1: 0, 1 and 2: coverage 1, CHAIR_i 1/3. In the middle: 1/6
    assert grounding.chair_i_at_coverage(0.75, votes, truth, samples=2) == pytest.approx(1 / 6)
    assert grounding.chair_i_at_coverage(0.5, votes, truth, samples=2) == 0.0
    assert grounding.chair_i_at_coverage(0.25, votes, truth, samples=2) == 0.0  # the strictest t covers more
    # nobody says anything: everything is said at t = 0, half of it invented
    silent = np.zeros((1, 4), dtype=int)
    assert grounding.chair_i_at_coverage(1.0, silent, truth, samples=2) == 0.5


def test_the_page_marks_invented_words_and_no_others(tmp_path, monkeypatch):
    marked, written = [], []
    mark, write = caption_page.mark, caption_page.write
    monkeypatch.setattr(caption_page, "mark", lambda *a: marked.append(a[3]) or mark(*a))
    monkeypatch.setattr(caption_page, "write", lambda *a: written.append(a[3]) or write(*a))
    long = "a kitchen with " + "a cup, " * 40 + "a plate."
    rows = [
        caption_page.Shown(Image.new("RGB", (48, 48)), {"cup": (8, 8)}, {"base": "a cup, a plate.", "mDPO": long})
    ] * 2
    caption_page.draw_page(tmp_path / "page.png", "Title.", rows, ["cup", "plate"])
    # each row is laid out once to be measured and once on the page; the title shows what a mark looks like
    assert marked == ["plate"] * 4 + ["invented"] + ["plate"] * 4
    assert "cup, " in written and not any(text.startswith("plate") for text in written)
    page = Image.open(tmp_path / "page.png")
    assert page.width == 2000 and page.height > 2 * (caption_page.PICTURE + 2 * caption_page.MARGIN)  # the long text
