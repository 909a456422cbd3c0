"""Table 4, Figure 4 and Figure 6 by hand on tiny data; and that pictures of them are drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pds import analyse
from tests.test_pds_export import TEXTS, ranked
from tests.test_pds_rank_images import SCALES, candidate, write


def prompts(**orders) -> list[dict]:
    """Rows whose scorers a, b rank the four scales in the order given, best first."""
    rows = []
    for prompt, own in orders.items():
        for guidance in SCALES:
            scores = {name: -float(order.index(guidance)) for name, order in zip("ab", own, strict=True)}
            rows.append(candidate(prompt.replace("_", "-"), guidance, scores))
    return rows


ROWS = prompts(
    art_1=[(5, 7, 9, 11), (5, 9, 7, 11)],  # common among the best 1, 2, 3: 1, 1, 3
    art_2=[(7, 5, 11, 9), (5, 7, 9, 11)],  # 0, 2, 2
    school_1=[(7, 9, 11, 5), (11, 5, 9, 7)],  # 0, 0, 2
)


def test_overlap_by_hand():
    """Means of |common| / k: 1/3, (1 + 2 + 0) / 2 / 3 = 1/2, (3 + 2 + 2) / 3 / 3 = 7/9. "Sets equal" would be 1/3."""
    found = analyse.analyse_scores(ROWS)
    assert found["overlap"] == {"a & b": {"top1": 33.3333, "top2": 50.0, "top3": 77.7778}}
    assert found["chance"] == {"a & b": {"top1": 25.0, "top2": 50.0, "top3": 75.0}}


def test_chance_of_three_scorers():
    rows = [row | {"scores": row["scores"] | {"c": 0.1 * i}} for i, row in enumerate(ROWS)]
    assert analyse.analyse_scores(rows)["chance"]["a & b & c"] == {"top1": 6.25, "top2": 25.0, "top3": 56.25}


def test_guidance_share_by_hand():
    """Best by a: art 5 and 7, school 7. Shares of a topic sum to 100."""
    assert analyse.analyse_scores(ROWS)["guidance_share"] == {
        "art": {"n": 2, "5": 50.0, "7": 50.0, "9": 0.0, "11": 0.0},
        "school": {"n": 1, "5": 0.0, "7": 100.0, "9": 0.0, "11": 0.0},
    }


def test_incomplete_prompts_are_left_out_and_named():
    rows = [*ROWS, *(candidate("art-8", g, {"a": 1.0, "b": 2.0}) for g in SCALES[:3])]
    rows += [candidate("art-9", g, {"a": 1.0, "b": None if g == 9 else 2.0}) for g in SCALES]
    found = analyse.analyse_scores(rows)
    assert found["left_out"] == {"art-8": "3 of 4 candidates", "art-9": "no b score for art-9/g9"}
    assert found["prompts"] == 3 and found["overlap"]["a & b"]["top1"] == 33.3333


def test_similarity_by_hand():
    """u1 = (1, 0), u2 = (0, 1), u3 = (0.6, 0.8): cosines 0, 0.6, 0.8; mean 1.4 / 3, median 0.6."""
    found = analyse.similarity(torch.tensor([[1, 0], [0, 1], [0.6, 0.8]], dtype=torch.float64))
    assert found["pairs"] == 3 and found["mean"] == pytest.approx(1.4 / 3)
    # quantile 0.25 lies half way from 0 to 0.6, 0.75 half way from 0.6 to 0.8
    assert [found["quantiles"][q] for q in ("0.25", "0.5", "0.75")] == pytest.approx([0.3, 0.6, 0.7])
    # bins of 0.05 from -1: 0 is in number 20, 0.6 in 32, 0.8 in 36
    assert {i: n for i, n in enumerate(found["histogram"]) if n} == {20: 1, 32: 1, 36: 1}


def test_similarity_of_many_is_that_of_few(monkeypatch):
    """Over blocks and bins: as exact as a bin of 0.0005."""
    vectors = torch.nn.functional.normalize(
        torch.randn(2300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    exact = analyse.similarity(vectors)
    monkeypatch.setattr(analyse, "EXACT_UP_TO", 0)
    counted = analyse.similarity(vectors.to_sparse())
    assert counted["mean"] == pytest.approx(exact["mean"]) and counted["histogram"] == exact["histogram"]
    assert list(counted["quantiles"].values()) == pytest.approx(list(exact["quantiles"].values()), abs=6e-4)
    all_cosines = (vectors @ vectors.T)[np.triu_indices(2300, 1)]
    assert exact["mean"] == pytest.approx(all_cosines.mean().item())
    assert sum(exact["histogram"]) == exact["pairs"] == 2300 * 2299 // 2


def test_tf_idf_by_hand():
    """Texts "a b" and "a": a is in both, weight ln(3/3) + 1 = 1; b in one, ln(3/2) + 1 = 1.405465.

    Cosine of (1, 1.405465) and (1, 0): 1 / sqrt(1 + 1.975332) = 0.579739.
    """
    vectors = analyse.tf_idf(["A, b!", "a"]).to_dense()
    assert (vectors[0] @ vectors[1]).item() == pytest.approx(0.579739, abs=1e-6)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_who_wins_by_hand():
    rows = ranked("art-1", 0.1, 0.3, 0.2) + ranked("art-2", 0.3, 0.2, 0.1) + ranked("art-3", 0.5, 0.5, 0.5)
    rows += ranked("art-4", 0.1, 0.2, 0.3, texts=("", TEXTS[1], TEXTS[2]))
    found = analyse.analyse_answers(rows, analyse.tf_idf)
    assert found["responders"] == {
        "a": {"chosen": 1, "rejected": 1, "no candidate": {"empty": 1}},
        "b": {"chosen": 1, "rejected": 1, "no candidate": {}},
        "c": {"chosen": 1, "rejected": 1, "no candidate": {}},
    }
    assert found["dropped"] == {"tie": 1} and found["scores"]["n"] == 12
    assert found["similarity"]["responses"]["texts"] == 11 and found["similarity"]["responses"]["left_out"] == 1
    assert found["similarity"]["prompts"]["pairs"] == 6  # four questions


@pytest.fixture
def files_of(tmp_path):
    for row in ROWS:
        Image.new("RGB", (60, 40), (30 * int(row["guidance"]) % 255, 90, 10)).save(tmp_path / row["image"])
    return write(tmp_path / "scores.jsonl", ROWS), write(tmp_path / "ranked.jsonl", ranked("art-1", 0.1, 0.3, 0.2))


def test_the_command_writes_numbers_figures_and_the_sheet(files_of, tmp_path, capsys):
    figures, sheet = tmp_path / "figures", tmp_path / "sheet.png"
    analyse.main(
        [
            *map(str, files_of),
            "--json",
            str(tmp_path / "a.json"),
            "--figures",
            str(figures),
            "--sheet",
            str(sheet),
            "--rows",
            "2",
        ]
    )
    out = capsys.readouterr().out
    assert "a & b" in out and "paper: RM & CLIP" in out and "36.80" in out
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["images"]["overlap"]["a & b"]["top1"] == 33.3333
    assert stored["paper"]["overlap"]["RM & CLIP"]["top3"] == 79.13
    names = {
        "figure4-guidance.png",
        "figure6-similarity.png",
        "responders.png",
        "scores-answers-judge.png",
        "scores-images-a.png",
        "scores-images-b.png",
    }
    assert {file.name for file in figures.iterdir()} == names
    assert all(Image.open(figures / name).size == (1050, 600) for name in names)


def test_the_sheet_frames_the_winner(files_of, tmp_path):
    """Two prompts, four columns; green around art-1's first picture (guidance 5) and art-2's second, nowhere else."""
    sheet = tmp_path / "sheet.png"
    analyse.main([str(files_of[0]), "--sheet", str(sheet), "--rows", "2"])
    page = Image.open(sheet).convert("RGB")
    # columns are 224 + 2 * 6 + 8 = 244 wide from 8 on, rows 224 + 12 + 20 * 4 + 8 = 324 high; a title of 20 above
    corners = {
        (line, column): page.getpixel((8 + 244 * column + 2, 8 + 324 * line + 20 + 2))
        for line in range(2)
        for column in range(4)
    }
    green = [place for place, colour in corners.items() if colour == (34, 139, 34)]
    assert green == [(0, 0), (1, 1)]


def test_another_file_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="neither rows of rank_images"):
        analyse.main([str(write(tmp_path / "x.jsonl", [{"id": "a", "caption": "b"}]))])


def test_the_text_tower_of_a_clip_is_an_embedder(files_of, tiny_judges, tmp_path):
    analyse.main([str(files_of[1]), "--embed", str(tiny_judges / "clip"), "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())["answers"]
    assert found["embedder"].endswith("clip") and -1 <= found["similarity"]["responses"]["mean"] <= 1
