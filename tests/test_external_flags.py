"""Flags that are out of range are refused with the range; those inside are taken."""

import argparse

import pytest

from external import flags


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (flags.whole(1), "3", 3),
        (flags.whole(-5), "-5", -5),
        (flags.number(0.0), "0", 0.0),
        (flags.number(0.0, above=True), "1e-5", 1e-5),
        (flags.number(0.0, 1.0), "1", 1.0),
        (flags.names_of(("dpo", "copo")), "copo,dpo", ("copo", "dpo")),
    ],
)
def test_taken(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    "kind, text, said",
    [
        (flags.whole(1), "0", "a whole number of at least 1"),
        (flags.whole(1), "1.5", "a whole number"),
        (flags.whole(1, 4), "5", "from 1 to 4"),
        (flags.number(0.0), "-1", "a number of at least 0"),
        (flags.number(0.0), "nan", "a number of at least 0"),
        (flags.number(0.0), "inf", "a number of at least 0"),
        (flags.number(0.0, above=True), "0", "a number above 0"),
        (flags.number(0.0, 1.0), "1.1", "from 0 to 1"),
        (flags.names_of(("dpo", "copo")), "dpo,kto", "unknown kto; choose from dpo, copo"),
    ],
)
def test_refused(kind, text, said):
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        kind(text)
