"""CHAIR and Object HalBench: words to objects, the counts, the files, and the extractor over real HTTP."""

import json

import pytest
from llm_server import serve

import eval_chair
from eval_chair import chair_scores, load_vocabulary, noun_objects, phrase_nouns, text_objects

# the double blank before "motor bike" is in the official list of 2018
SYNONYMS = """person, girl, man, woman, people, child, passenger, baby
motorcycle, scooter,  motor bike, motor cycle
airplane, plane, jet
bus, minibus
train
truck, pickup
traffic light, stop light
bird, turkey
dog, puppy
bear, cub
bowl, plate
tie, bow, bow tie
sports ball, ball
wine glass
hot dog, hotdog
chair, seat
dining table, table, coffee table
toilet
knife
"""


@pytest.fixture
def synonyms(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    return str(tmp_path / "synonyms.txt")


@pytest.fixture
def coco(tmp_path):
    """Three pictures in val, one in train. 1: dog, and a man in a caption. 2: bus. 3: nothing. 4: bird."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    categories = [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}, {"id": 16, "name": "bird"}]
    for split, ids, instances, captions in (
        ("val2014", (1, 2, 3), ((1, 18), (1, 18), (2, 6)), ((1, "A man walks."), (3, "Soft light."))),
        ("train2014", (4,), ((4, 16),), ()),
    ):
        images = [{"id": i} for i in ids]
        rows = [{"image_id": i, "category_id": c} for i, c in instances]
        data = {"images": images, "categories": categories, "annotations": rows}
        (folder / f"instances_{split}.json").write_text(json.dumps(data))
        data = {"images": images, "annotations": [{"image_id": i, "caption": c} for i, c in captions]}
        (folder / f"captions_{split}.json").write_text(json.dumps(data))
    return str(folder)


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(coco: str, synonyms: str, out, *more: str) -> dict:
    eval_chair.main(["--annotations", coco, "--synonyms", synonyms, "--json", str(out), *more])
    return json.loads(out.read_text())


def test_scores_of_four_captions():
    said = [["dog", "cat", "cat"], ["dog", "dog"], [], ["bus", "bus", "dog"]]
    truth = [{"dog", "person"}, {"dog"}, {"clock"}, set()]
    s = chair_scores(said, truth)
    # invented: cat, cat | - | - | bus, bus, dog: 5 of 8 mentions, in 2 captions of 4, 2 of the 3 that name anything
    assert (s["chair_s"], s["chair_s_refine"], s["chair_i"]) == (0.5, 2 / 3, 5 / 8)
    # true objects: dog, person | dog | clock | none = 4, of which the two dogs were said (twice is once)
    assert (s["recall"], s["n_recalled"], s["n_truth"]) == (0.5, 2, 4)
    assert (s["n"], s["n_with_object"], s["n_hallucinated"]) == (4, 3, 2)
    assert (s["n_mentions"], s["n_hallucinated_mentions"], s["mean_objects"]) == (8, 5, 2.0)


def test_scores_without_any_object_are_none():
    s = chair_scores([[], []], [set(), set()])
    assert (s["chair_s"], s["chair_s_refine"], s["chair_i"], s["recall"]) == (0.0, None, None, None)


@pytest.mark.parametrize(
    "text, chair2018, objhal",
    [
        ("Two dogs and a PUPPY.", ["dog", "dog"], ["dog", "dog"]),
        ("A red bus, a minibus.", [], ["bus", "bus"]),  # 2018's singular of "bus" is "bu"
        ("Buses", ["bus"], ["bus"]),
        ("He eats hot dogs beside a dog.", ["hot dog", "dog"], ["hot dog", "dog"]),
        ("A motor bike", [], ["motorcycle"]),  # " motor bike" never matches in the 2018 list
        ("a motor cycle", ["motorcycle"], ["motorcycle"]),
        ("Two men", ["person"], []),  # "men" is a word of its own in WordNet
        ("The train tracks of a passenger train", ["train"], ["train"]),
        ("passengers of a passenger jet", ["person", "airplane"], ["person", "airplane"]),
        ("A passenger plane", ["person", "airplane"], ["person", "airplane"]),
        ("A baby bird, a baby", ["bird", "person"], ["bird", "person"]),
        ("baby cub, adult cub", ["bear", "bear"], ["bear", "bear"]),  # a cub's baby is not a person
        ("A plate on home plate", ["bowl"], ["bowl"]),  # baseball's plate is no plate
        ("A seat near the toilet seat", ["toilet"], ["toilet"]),  # one toilet takes every seat away
        ("A seat", ["chair"], ["chair"]),
        ("Her dog's bow tie; wine glasses", ["dog", "tie", "wine glass"], ["dog", "tie", "wine glass"]),
        ("a coffee table", ["dining table"], ["dining table"]),
        ("a sports ball", ["sports ball"], ["sports ball"]),
        ("hot-dog kite/dog dog.dog", [], []),  # such tokens stay whole
        ("no dogs", ["dog"], ["dog"]),  # negation is not understood
        ("knives", ["knife"], ["knife"]),
        ("", [], []),
    ],
)
def test_objects_of_a_text(synonyms, text, chair2018, objhal):
    for protocol, expected in (("chair2018", chair2018), ("objhal", objhal)):
        found = [node for _, node in text_objects(text, load_vocabulary(synonyms, protocol))]
        assert found == expected, protocol


@pytest.mark.parametrize(
    "name, nouns",
    [
        ("men", ["man"]),
        ("hot dogs", ["hot dog"]),
        ("old bow tie pin", ["tie"]),  # with a known pair, only the pair
        ("turkey sandwich", ["turkey sandwich"]),  # a compound is not its parts
        ("a large bus", ["bus"]),
        ("white toilet seat", ["toilet"]),
        ("glass of wine", ["glass", "wine"]),
        ("", []),
    ],
)
def test_nouns_of_an_extracted_name(synonyms, name, nouns):
    assert phrase_nouns(name, load_vocabulary(synonyms, "objhal")) == nouns


def test_extracted_nouns_count_once_per_word(synonyms):
    vocabulary = load_vocabulary(synonyms, "objhal")
    found = noun_objects(["man", "dog", "man", "woman", "seat", "toilet", "pizza"], vocabulary)
    assert found == [("man", "person"), ("dog", "dog"), ("woman", "person"), ("toilet", "toilet")]


def test_command_on_our_answers(tmp_path, coco, synonyms, capsys):
    rows = [
        {"id": "a", "image_id": 1, "image": "x.jpg", "answer": "A man and two dogs.", "n_tokens": 9, "finish": "eos"},
        {
            "id": "b",
            "image": "COCO_val2014_000000000002.jpg",
            "answer": "A dog, a dog",
            "n_tokens": 5,
            "finish": "length",
        },
        {"id": "c", "image_id": "3", "answer": "", "n_tokens": 1, "finish": "eos"},
        {"id": "d", "image_id": 4, "answer": "A bird and a train.", "n_tokens": 5, "finish": "eos"},
    ]
    path = write(tmp_path / "answers.jsonl", rows)
    (tmp_path / "answers.settings.json").write_text('{"adapter_sha256": "abc"}')
    result = run(coco, synonyms, tmp_path / "r.json", "--answers", path, "--protocol", "chair2018")
    # mentions: person, dog | dog, dog (bus is there) | - | bird, train. Invented: 2 + 1 of 6, in 2 of 4 and of 3
    m = result["metrics"]
    assert (m["chair_s"], m["chair_s_refine"], m["chair_i"], m["mean_objects"]) == (0.5, 2 / 3, 0.5, 1.5)
    assert m["recall"] == 0.75  # dog, person, bird of dog, person, bus, bird
    assert result["rows"][1] == {"id": 2, "mentions": [["dog", "dog"], ["dog", "dog"]], "truth": ["bus"]}
    assert (result["n"], result["n_empty"], result["n_expected"]) == (4, 1, None)
    assert (result["mean_tokens"], result["share_at_token_limit"]) == (5.0, 0.25)  # 20 / 4; one of four
    assert result["generation"] == {"adapter_sha256": "abc"}
    assert result["scorer"] == "eval_chair.py 1" and result["protocol"] == "CHAIR 2018"
    assert any("not the official list" in warning for warning in result["warnings"])
    assert set(result["intervals"]) == set(result["denominators"]) == set(m)
    printed = capsys.readouterr().out
    assert "chair_s_refine" in printed and "0.6667" in printed and "seed 0" in printed


def test_object_halbench_says_how_many_answers_it_should_have(tmp_path, coco, synonyms):
    path = write(tmp_path / "a.jsonl", [{"image_id": 2, "prompt": "q", "text": "Assistant: Two men in a bus "}])
    result = run(coco, synonyms, tmp_path / "r.json", "--answers", path, "--protocol", "objhal")
    assert result["rows"][0]["mentions"] == [["bus", "bus"]]
    assert (result["n"], result["n_expected"], result["mean_words"]) == (1, 300, 5.0)
    assert any("official set has 300" in warning for warning in result["warnings"])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"image_id": 1, "answer": "a"}, {"image_id": 1, "answer": "b"}], "a.jsonl:2: image 1 was answered at"),
        ([{"image_id": 1, "answer": "a"}, {"image_id": 99, "answer": "b"}], r"1 answered pictures have no .*\[99\]"),
        ([{"id": 5, "image": "x.jpg", "answer": "a"}], "a.jsonl:1: no `image_id`"),
    ],
)
def test_bad_answers_end_the_run_by_name(tmp_path, coco, synonyms, rows, message):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(SystemExit, match=message):
        run(coco, synonyms, tmp_path / "r.json", "--answers", path, "--protocol", "chair2018")


def test_missing_annotations_are_named(tmp_path, synonyms):
    path = write(tmp_path / "a.jsonl", [{"image_id": 1, "answer": "a"}])
    with pytest.raises(SystemExit, match="instances_val2014.json: no such file"):
        run(str(tmp_path), synonyms, tmp_path / "r.json", "--answers", path, "--protocol", "chair2018")


def test_compare_two_files(tmp_path, coco, synonyms):
    a = write(tmp_path / "a.jsonl", [{"image_id": 1, "answer": "a bear"}, {"image_id": 2, "answer": "a bear"}])
    b = write(tmp_path / "b.jsonl", [{"image_id": 2, "answer": "buses"}, {"image_id": 1, "answer": "a dog"}])
    result = run(coco, synonyms, tmp_path / "r.json", "--compare", a, b, "--protocol", "chair2018")
    # every answer of A invents and none of B: the difference is -1 however the two rows are drawn
    assert result["compare"]["chair_i"] == {"a": 1.0, "b": 0.0, "difference": -1.0, "interval": [-1.0, -1.0]}
    c = write(tmp_path / "c.jsonl", [{"image_id": 1, "answer": "a bear"}])
    with pytest.raises(SystemExit, match=r"1 are in one only: \[2\]"):
        run(coco, synonyms, tmp_path / "r.json", "--compare", a, c, "--protocol", "chair2018")


def test_extractor_over_http_and_offline(tmp_path, coco, synonyms):
    rows = [
        {"image_id": 1, "prompt": "What is there?", "answer": "A man with a {dog} and another man."},
        {"image_id": 2, "prompt": "What is there?", "answer": "Just two dogs"},  # three words: not sent
        {"image_id": 3, "prompt": "What is there?", "answer": "Just one more dog"},  # four: sent
    ]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "r.json"
    common = ["--answers", path, "--protocol", "objhal"]
    llm = ["--extractor-model", "m", "--parallel", "1"]

    def answer(body) -> str:
        described = body["messages"][0]["content"]
        return "[]" if "one more dog" in described else 'Sure:\n["man", "large dog", "man", "bear"]'

    with serve(["garbage"], answer) as server:
        result = run(coco, synonyms, out, *common, *llm, "--extractor", server.url)
        assert len(server.seen) == 3 and "one more dog" in server.seen[2].body["messages"][0]["content"]
        body = server.seen[1].body
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 0.2, 1, 512)
    (message,) = body["messages"]
    assert message["role"] == "system"
    assert (
        "<image> What is there?" in message["content"] and "A man with a {dog} and another man." in message["content"]
    )
    # man, dog, bear of which bear is invented; nothing of the others
    assert result["metrics"]["chair_i"] == 1 / 3 and result["metrics"]["chair_s_refine"] == 1.0
    assert result["protocol"] == "Object HalBench, objects listed by m"
    offline = run(coco, synonyms, out, *common, "--replies", str(tmp_path / "a.replies.json"))
    assert offline["metrics"] == result["metrics"]
    write(tmp_path / "a.jsonl", [{**rows[0], "answer": "This is another answer altogether."}, rows[1]])
    with pytest.raises(SystemExit, match="reply 1 is for other answers"):
        run(coco, synonyms, out, *common, "--replies", str(tmp_path / "a.replies.json"))
    (tmp_path / "plain.json").write_text('{"2": "[]"}')  # another tool's {image: reply}, without image 1
    with pytest.raises(SystemExit, match="no reply for 1 answers, such as of image .'1'"):
        run(coco, synonyms, out, *common, "--replies", str(tmp_path / "plain.json"))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"images": None}, "TypeError"),
        ({"categories": []}, "KeyError: 18"),
        ({"categories": [{"id": 18, "name": "yeti"}]}, "not in --synonyms .KeyError: 'yeti'"),
    ],
)
def test_annotations_that_are_not_cocos(tmp_path, coco, synonyms, changes, reason):
    file = f"{coco}/instances_val2014.json"
    with open(file) as f:
        data = json.load(f)
    with open(file, "w") as f:
        json.dump(data | changes, f)
    answers = write(tmp_path / "a.jsonl", [{"image_id": 1, "caption": "A dog."}])
    with pytest.raises(SystemExit, match=f"instances_val2014.json and .*{reason}"):
        run(coco, synonyms, tmp_path / "r.json", "--answers", answers, "--protocol", "chair2018")
