"""evals/table1.py: the whole table of a tiny base through real files and two endpoints on this machine."""

import base64
import io
import json

import pytest
from llm_server import serve
from PIL import Image

from evals import amber, answers, table1
from lab import report

EOS = 2


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 10, 10)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
    """Two questions of Object HalBench, two of AMBER and MMHal's 96, where the command looks for them."""
    folder = tmp_path / "data"

    def put(path: str, content) -> None:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    picture = base64.b64encode(jpeg()).decode()
    rows = [{"image_id": i, "question": "What is it?", "image": picture} for i in (1, 2)]
    put(table1.OBJHAL, "\n".join(map(json.dumps, rows)).encode())
    put("objhal/synonyms_refine.txt", b"dog, puppy\ncat\n")
    images = [{"id": 1}, {"id": 2}]
    instances = [{"image_id": 1, "category_id": 1}]
    categories = [{"id": 1, "name": "dog"}]
    coco = {"images": images, "annotations": instances, "categories": categories}
    put("coco/annotations/instances_val2014.json", coco)
    put("coco/annotations/captions_val2014.json", {"images": images, "annotations": []})
    put(table1.AMBER_QUERIES, [{"id": i, "image": "AMBER_1.jpg", "query": "Describe this image."} for i in (1, 2)])
    put("AMBER/data/annotations.json", [{"id": i, "type": "generative", "truth": ["dog"], "hallu": []} for i in (1, 2)])
    put("AMBER/data/relation.json", {"dog": [], "cat": []})
    put("AMBER/data/safe_words.txt", b"")
    put("AMBER/image/AMBER_1.jpg", jpeg())
    for part in amber.TAGGER_PARTS:
        put(f"tagger/averaged_perceptron_tagger_eng.{part}.json", {})
    one = {"image_src": "https://x/1.jpg", "image_content": ["Dog"], "gt_answer": "A dog", "question_type": "other"}
    put(table1.MMHAL, [one | {"question": f"Question {i}?"} for i in range(96)])
    put("mmhal/images/1.jpg", jpeg())
    put("mmhal/eval_gpt_mmhal.py", b'prompt = "{} {} {} {}"\n')
    return folder


@pytest.fixture
def quick(monkeypatch, tiny_base):
    """Every answer is the same five words; AMBER's tagger takes every word for a noun. Counts the answers."""
    made = []

    def answer(model, prompts, *rest):
        made.extend(prompts)
        return [[70, EOS]] * len(prompts)

    monkeypatch.setattr(answers, "generate", answer)
    monkeypatch.setattr("data.Processor.decode", lambda self, ids: "a dog and a cat")
    monkeypatch.setattr(amber, "load_tagger", lambda folder: amber.every_word)
    monkeypatch.setattr(amber, "has_nltk", lambda: True)
    monkeypatch.setattr("os.fsync", lambda _: None)  # 200 waits for the disk
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return made


def test_the_table_by_one_command_and_again(data, quick, tiny_base, tmp_path, capsys, monkeypatch):
    loaded, load_model = [], answers.load_model
    monkeypatch.setattr(answers, "load_model", lambda args: loaded.append(args) or load_model(args))
    argv = ["--base", str(tiny_base), "--data", str(data), "--out", str(tmp_path / "run")]
    with serve(answer=lambda body: '["dog", "cat"]' if body.get("top_p") else "Rating: 5") as server:
        argv += ["--extractor", server.url, "--extractor-model", "m", "--judge", server.url, "--judge-model", "m"]
        table1.main(argv)
        first = capsys.readouterr().out
        assert len(server.seen) == 2 + 96 and len(quick) == 2 + 2 + 96 and len(loaded) == 1
        table1.main(argv)  # nothing is asked, made or loaded again
        assert len(server.seen) == 2 + 96 and len(quick) == 2 + 2 + 96 and len(loaded) == 1
    assert "amber-generative: 1004 of 1004 answers to go, the log will say how long" in first
    assert "amber: no" in first and "equal words only, not comparable" in first
    assert "amber-generative: 1002 of 1004 answers to go, about " in capsys.readouterr().out
    run = tmp_path / "run"
    found = {name: json.loads((run / f"eval_{name}.json").read_text()) for name in ("chair", "amber", "mmhal")}
    # picture 1 has a dog, picture 2 nothing: dog, cat | dog, cat -> 3 of 4 mentions are invented, in both answers
    assert found["chair"]["metrics"]["chair_i"] == 0.75 and found["chair"]["metrics"]["chair_s_refine"] == 1.0
    assert found["chair"]["generation"]["decoding"]["beams"] == 3
    assert found["amber"]["metrics"]["chair"] == 50.0 and found["mmhal"]["metrics"]["score"] == 5.0
    [row] = [line for line in report.table([run]).splitlines() if line.startswith(f"| {run}")]
    assert row.count("(") == 8  # every number of a toy set is marked


def test_what_is_missing_is_said_before_anything_starts(data, quick, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "Source", None)
    (data / "objhal/synonyms_refine.txt").unlink()
    (data / "mmhal/images/1.jpg").unlink()
    (data / "mmhal/images").rmdir()
    argv = ["--base", str(tiny_base), "--data", str(data), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        table1.main(argv)
    text = str(end.value)
    assert f"objhal: {data}/objhal/synonyms_refine.txt\n      from eval/data of github.com/RLHF-V/RLHF-V" in text
    assert "mmhal/images\n      from test_data.zip" in text and "mmhal: --judge URL" in text
    assert "amber" not in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--extractor", "localhost:8000/v1", "--extractor-model", "m"], "must start with http"),
        (["--out", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_what_would_fail_late_ends_at_once(data, quick, tiny_base, tmp_path, monkeypatch, more, reason):
    monkeypatch.setattr(answers, "Source", None)
    argv = ["--base", str(tiny_base), "--data", str(data), "--out", str(tmp_path / "run"), "--parts", "objhal", *more]
    with pytest.raises(SystemExit, match=reason):
        table1.main(argv)


@pytest.mark.parametrize("more", [[], ["--out", "o", "--judge", "http://x"], ["--out", "o", "--parts", "vqa"]])
def test_flags_that_do_not_go_together(more):
    with pytest.raises(SystemExit) as end:
        table1.main(["--base", "x", "--data", "d", *more])
    assert end.value.code == 2
