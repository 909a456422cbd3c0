"""Which answers are candidates and which pair they give: by hand; and the release's faults, that must not come back."""

import pytest

from pds.candidates import Rules, bare, by_question, choose, refused_for, without_echo

QUESTION = "How do the bold strokes add depth?"
LONG = "The strokes are thick and cast small shadows."


def answer(responder: str, text: str | None, score: float | None = 0.1, **more) -> dict:
    row = {"id": "art-1", "prompt": f"<image> {QUESTION}", "responder": responder, "finish": "eos", "score": score}
    return row | ({"error": "HTTP 500"} if text is None else {"answer": text}) | more


# ---- the answer, as it is exported ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [
        (f"{QUESTION}  {LONG}", LONG),  # as the release stores every answer
        (f"{QUESTION.upper()}\n\n{LONG}", LONG),
        (f"<image> How do  the bold strokes\nadd depth? {LONG}", LONG),
        (QUESTION, ""),
        (LONG, LONG),
        (f"  {LONG}\n", LONG),
        (
            "How do the bold strokes look? Thick.",
            "How do the bold strokes look? Thick.",
        ),  # begins like it, but is not it
        (f"{LONG} {QUESTION}", f"{LONG} {QUESTION}"),  # the release cuts the question out anywhere
        ("first\n\nsecond\r\nthird", "first\n\nsecond\r\nthird"),
        ("", ""),
    ],
)
def test_a_repeated_question_goes_and_nothing_else(text, wanted):
    assert without_echo(f"<image> {QUESTION}", text) == wanted


def test_the_placeholder_is_no_text():
    assert bare("<image> What?") == bare("What? <image>") == "What?"


# ---- candidates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, reason",
    [
        (answer("a", None), "failed"),
        (answer("a", LONG, None), "failed"),  # the judge could not read it
        (answer("a", LONG, float("nan")), "failed"),
        (answer("a", ""), "empty"),
        (answer("a", " \n\t "), "empty"),
        (answer("a", QUESTION), "empty"),  # nothing but the question
        (answer("a", "сну"), "short"),
        (answer("a", "two words"), "short"),
        (answer("a", "just three words"), None),
        (answer("a", LONG, finish="length"), "cut"),
        (answer("a", "I'm sorry, but I can't see the image."), "refusal"),
        (answer("a", "I\u2019m sorry, but I can\u2019t see the image."), "refusal"),
        (answer("a", "As an AI language model I see nothing."), "refusal"),
        (answer("a", "I am sure that the strokes are thick."), None),
    ],
)
def test_why_an_answer_is_no_candidate(row, reason):
    assert refused_for(row, Rules()) == reason


def test_min_words_is_a_rule():
    assert refused_for(answer("a", "two words"), Rules(min_words=2)) is None


# ---- the pair ------------------------------------------------------------------------------------------------------


def sides(answers, rules=None):
    choice = choose(answers, rules or Rules())
    return (
        choice.chosen and choice.chosen["responder"],
        choice.rejected and choice.rejected["responder"],
        choice.dropped,
    )


def test_best_and_worst_make_the_pair_whatever_the_order():
    rows = [answer("a", LONG, 0.12), answer("b", LONG + " So.", 0.19), answer("c", "There is some paint.", 0.10)]
    assert sides(rows) == sides(rows[::-1]) == ("b", "c", None)


def test_equals_are_decided_by_name():
    rows = [answer(name, f"{LONG} {name}", score) for name, score in (("d", 0.1), ("b", 0.2), ("c", 0.1), ("a", 0.2))]
    assert sides(rows) == ("a", "c", None)


@pytest.mark.parametrize(
    "rows, dropped",
    [
        ([answer("a", LONG), answer("b", "")], "too few"),
        ([answer("a", LONG), answer("b", None)], "too few"),
        (
            [answer("a", LONG), answer("b", LONG + " So.")],
            "tie",
        ),  # the release: index(max) = index(min), one answer twice
        ([answer("a", LONG, 0.2), answer("b", f"  {LONG.upper()} ", 0.1)], "identical"),
        ([answer("a", LONG, 0.2), answer("b", f"{QUESTION} {LONG}", 0.1)], "identical"),
    ],
)
def test_no_pair(rows, dropped):
    assert sides(rows) == (None, None, dropped)


def test_the_margin_is_a_rule():
    rows = [answer("a", LONG, 0.135), answer("b", LONG + " So.", 0.12)]
    assert sides(rows, Rules(min_margin=0.02)) == (None, None, "margin")
    assert sides(rows, Rules(min_margin=0.01)) == ("a", "b", None)


def test_an_empty_answer_never_becomes_rejected():
    """The release gives a failed call the text "" and lets the judge score it: the lowest score wins "rejected"."""
    rows = [answer("a", "", -1.0), answer("b", LONG, 0.2), answer("c", LONG + " So.", 0.1), answer("d", None)]
    choice = choose(rows, Rules())
    assert (choice.chosen["responder"], choice.rejected["responder"]) == ("b", "c")
    assert choice.refused == {"a": "empty", "d": "failed"}


def test_answers_are_joined_by_id():
    rows = [answer("a", LONG) | {"id": 1}, answer("b", LONG) | {"id": "x"}, answer("b", LONG) | {"id": "1"}]
    assert {key: [row["responder"] for row in own] for key, own in by_question(rows).items()} == {
        "1": ["a", "b"],
        "x": ["b"],
    }
