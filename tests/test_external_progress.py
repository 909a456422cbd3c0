"""external/progress.py: what a log without a terminal says."""

import time

from external import progress as module
from external.progress import clock, progress


def test_a_log_gets_a_line_a_minute_even_while_one_step_runs(monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS", 0.05)
    with progress(what="answers", total=30, done=10) as bar:
        bar.update(10)
        bar.start -= 240  # ten in four minutes: the last ten take four more
        time.sleep(0.18)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and set(lines) == {"answers: 20 of 30, 4:00 gone, 4:00 left"}
    time.sleep(0.1)
    assert capsys.readouterr().err == ""  # it stops with the work


def test_work_that_broke_off_falls_silent(monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS", 0.02)
    bar = progress(what="mdpo, steps", total=3)
    bar.write("a line")
    assert capsys.readouterr().out == "a line\n"
    time.sleep(0.1)
    assert "mdpo, steps: 0 of 3" in capsys.readouterr().err
    del bar  # never closed
    time.sleep(0.05)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_an_iterable_is_counted_and_quick_work_is_silent(capsys):
    bar = progress([1, 2, 3], "pictures")
    assert list(bar) == [1, 2, 3] and bar.n == 3 and bar.total == 3
    assert bar.line() == "pictures: 3 of 3, 0:00 gone, 0:00 left"
    assert progress(iter([1]), "rows").line() == "rows: 0, 0:00 gone"
    assert capsys.readouterr().err == ""


def test_clock():
    assert [clock(5), clock(65), clock(3661)] == ["0:05", "1:05", "1:01:01"]


def test_without_a_standard_error(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)  # as after 2>&-
    assert list(progress([1, 2], "pictures")) == [1, 2]
