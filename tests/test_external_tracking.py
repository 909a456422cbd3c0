"""--track: what W&B refuses is said in a sentence, what is not installed before anything is loaded."""

import argparse
import sys
import types

import pytest

from external import tracking


def test_a_run_that_wandb_refuses_ends_in_a_sentence(tmp_path, monkeypatch):
    class Error(Exception):
        """As wandb.Error, for a machine without a key."""

    def init(**settings):
        raise Error("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=Error))
    with pytest.raises(SystemExit, match="--track wandb: api_key not configured.*WANDB_MODE=offline"):
        tracking.tracker("wandb", tmp_path, {})


@pytest.mark.parametrize(
    "kind, message", [("mlflow", "choose from wandb, tensorboard"), ("wandb", "pip install wandb")]
)
def test_what_cannot_be_sent_to_is_told_by_the_flag(monkeypatch, kind, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        tracking.installed(kind)
