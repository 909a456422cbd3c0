"""The shared runner: resumed, refused, sharded, killed; with a stage that squares a number."""

import ast
import json
import os
import random
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pds import runner


def square(rows: list[dict]) -> list[dict]:
    return [
        row | {"square": row["n"] ** 2} if row["n"] >= 0 else runner.failed(row, "a negative\n number") for row in rows
    ]


def stage(argv: list, work=square, settings=None, loads=None) -> runner.Result:
    """A stage of its own: {id, n} -> + {square}, or an error below 0."""
    p = runner.stage_parser("A stage.", "rows")
    args = p.parse_args([str(word) for word in argv])
    runner.check_flags(p, args)
    inputs = runner.read_inputs(args.input, {"n": int})

    def load() -> runner.Work:
        if loads is not None:
            loads.append(1)
        return runner.Work(work, 1000)

    result = runner.run(args, inputs, settings or {"stage": "square", "dtype": "float32"}, {"square", "error"}, load)
    runner.report(args, result)
    return result


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def numbers(tmp_path):
    """IN with 20 rows, and OUT."""
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": f"a-{i}", "n": i}) + "\n" for i in range(20)))
    return file, tmp_path / "out.jsonl"


SQUARES = {f"a-{i}": i * i for i in range(20)}


def squares(out: Path) -> dict:
    rows = read(out)
    assert len({row["id"] for row in rows}) == len(rows), "a row is there twice"
    return {row["id"]: row["square"] for row in rows}


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_a_run_and_its_last_line(numbers, capsys):
    file, out = numbers
    stage([file, "--out", out, "--batch", 3])
    assert squares(out) == SQUARES
    assert capsys.readouterr().out == f"{out}: 20 done (20 rows new), 0 failed\n"
    assert json.loads((out.parent / "out.settings.json").read_text()) == {"stage": "square", "dtype": "float32"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_file_cut_anywhere_is_completed(numbers, seed, capsys):
    """Cut at a random byte, as a power failure leaves it: the torn line goes, its row and the rest are done."""
    file, out = numbers
    stage([file, "--out", out])
    data = out.read_bytes()
    cut = random.Random(seed).randrange(1, len(data))
    out.write_bytes(data[:cut])
    done = []

    def noting(rows):
        done.extend(row["id"] for row in rows)
        return square(rows)

    capsys.readouterr()
    stage([file, "--out", out], noting)
    assert squares(out) == SQUARES
    assert len(done) == 20 - data[:cut].count(b"\n")
    torn = cut - data[:cut].rfind(b"\n") - 1
    assert (f"the last line was cut off ({torn} bytes)" in capsys.readouterr().out) == (torn > 0)


def test_killed_between_batches_nothing_is_lost_and_nothing_is_done_twice(numbers):
    """SIGKILL in the middle of a batch, three times over: what was synced stays."""
    file, out = numbers
    for moment in (3, 5, 2):
        child = os.fork()
        if child == 0:
            calls = []

            def killed(rows, calls=calls, moment=moment):
                calls.append(1)
                if len(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return square(rows)

            stage([file, "--out", out, "--batch", 2], killed)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(read(out)) == 2 * (2 + 4 + 1)
    stage([file, "--out", out, "--batch", 2])
    assert squares(out) == SQUARES


def test_each_batch_is_synced_before_the_next(numbers, monkeypatch):
    file, out = numbers
    synced, real = [], os.fsync
    monkeypatch.setattr(runner.os, "fsync", lambda fd: (synced.append(len(read(out))), real(fd)))
    seen = []

    def noting(rows):
        seen.append(synced[-1] if synced else 0)
        return square(rows)

    stage([file, "--out", out, "--batch", 8], noting)
    assert [n for n in seen] == [0, 8, 16]


def test_nothing_left_needs_no_model(numbers):
    file, out = numbers
    loads = []
    stage([file, "--out", out], loads=loads)
    stage([file, "--out", out], loads=loads)
    assert loads == [1]


def test_other_settings_are_refused_and_every_one_is_named(numbers):
    file, out = numbers
    stage([file, "--out", out])
    before = out.read_bytes()
    with pytest.raises(SystemExit) as error:
        stage([file, "--out", out], settings={"stage": "square", "dtype": "bfloat16", "seed": 1})
    assert "dtype: 'float32' then, 'bfloat16' now" in str(error.value) and "seed: None then, 1 now" in str(error.value)
    assert "stage" not in str(error.value)
    assert out.read_bytes() == before


def test_rows_without_settings_are_not_trusted(numbers):
    file, out = numbers
    stage([file, "--out", out])
    (out.parent / "out.settings.json").unlink()
    with pytest.raises(SystemExit, match="nobody knows how they were made"):
        stage([file, "--out", out])


def test_other_rows_are_refused(numbers):
    file, out = numbers
    stage([file, "--out", out])
    file.write_text(file.read_text().replace('"n": 7', '"n": 70'))
    with pytest.raises(SystemExit, match=r"out.jsonl:8: a-7 had another n"):
        stage([file, "--out", out])
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "a-7" not in line))
    with pytest.raises(SystemExit, match=r"out.jsonl:8: a-7 is not in the input"):
        stage([file, "--out", out])


# ---- shards, limits, failures --------------------------------------------------------------------------------------


def test_three_shards_joined_are_one_run(numbers):
    file, out = numbers
    parts = [out.with_name(f"part-{i}.jsonl") for i in range(3)]
    for i, part in enumerate(parts):
        stage([file, "--out", part, "--shard-index", i, "--shard-count", 3])
    assert all(0 < len(read(part)) < 20 for part in parts)
    out.write_bytes(b"".join(part.read_bytes() for part in parts))  # cat
    assert squares(out) == SQUARES
    (out.parent / "out.settings.json").write_bytes((out.parent / "part-0.settings.json").read_bytes())
    assert stage([file, "--out", out]).new == 0


def test_candidates_of_one_prompt_share_a_shard():
    rows = [{"id": f"art-{i}/g{g}", "prompt_id": f"art-{i}"} for i in range(9) for g in (5, 7)]
    shards = [[row["prompt_id"] for row in rows if runner.in_shard(row, i, 3)] for i in range(3)]
    assert sum(map(len, shards)) == 18 and not set(shards[0]) & set(shards[1]) | set(shards[1]) & set(shards[2])


def test_limit_takes_the_first_rows(numbers):
    file, out = numbers
    stage([file, "--out", out, "--limit", 4])
    assert sorted(squares(out)) == ["a-0", "a-1", "a-2", "a-3"]
    stage([file, "--out", out])
    assert squares(out) == SQUARES


def test_failed_rows_stay_and_are_tried_again_when_asked(numbers, capsys):
    file, out = numbers
    file.write_text('{"id": "a", "n": 2}\n{"id": "b", "n": -1}\n{"id": "c", "error": "lost before"}\n')
    with pytest.raises(SystemExit) as status:
        stage([file, "--out", out])
    assert status.value.code == 1
    assert {row["id"]: row.get("error") for row in read(out)} == {
        "a": None,
        "b": "a negative number",
        "c": "lost before",
    }
    assert "1 done (3 rows new), 1 failed, 1 had failed before" in capsys.readouterr().out

    def mended(rows):
        assert [row["id"] for row in rows] == ["b"]
        return [row | {"square": 1} for row in rows]

    with pytest.raises(SystemExit):  # without the flag it stays as it is
        stage([file, "--out", out], mended)
    stage([file, "--out", out, "--retry-failed"], mended)  # a row that failed in an earlier stage is no failure here
    assert {row["id"]: row.get("square") for row in read(out)} == {"a": 4, "b": 1, "c": None}


def test_a_batch_is_halved_when_the_gpu_is_full(numbers, capsys):
    file, out = numbers
    sizes = []

    def small(rows):
        sizes.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError
        return square(rows)

    stage([file, "--out", out, "--batch", 16], small)
    assert sizes == [16, 8, 4, 4, 4, 4, 4]
    assert squares(out) == SQUARES and "batches of 4" in capsys.readouterr().out


def test_a_row_that_never_fits_is_an_error_row(numbers):
    file, out = numbers

    def full(rows):
        raise torch.OutOfMemoryError

    with pytest.raises(SystemExit):
        stage([file, "--out", out, "--limit", 2], full)
    assert [row["error"][:17] for row in read(out)] == ["out of GPU memory"] * 2


def test_the_batch_follows_the_free_memory(monkeypatch):
    assert runner.batch_size(3, 1) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.batch_size(None, 1) == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10_000, 20_000))
    assert runner.batch_size(None, 1000) == 5  # half of 10,000
    assert runner.batch_size(None, 9000) == 1 and runner.batch_size(None, 1) == 256


# ---- disk ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_tears_nothing(numbers):
    """The file may not grow above 150 bytes: half a batch was written, and is gone when the run has ended."""
    file, out = numbers
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
        try:
            stage([file, "--out", out, "--batch", 3])
        except SystemExit as error:
            os._exit(7 if "what was done before is complete" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    rows = read(out)  # every line is whole
    assert len(rows) == 3 and out.read_bytes().endswith(b"}\n")
    stage([file, "--out", out])
    assert squares(out) == SQUARES


def test_two_processes_never_write_one_file(numbers):
    file, out = numbers
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with runner.Log(out):
            os.write(ready[1], b"x")
            os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(SystemExit, match="another process is writing it"):
        stage([file, "--out", out])
    os.write(release[1], b"x")
    os.waitpid(child, 0)
    stage([file, "--out", out])


# ---- what goes in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"id": "a", "n": 1}\n{"id": "a", "n": 2}\n', r"in.jsonl:2: a was there before, at .*in.jsonl:1"),
        ('{"id": "a", "n": 1}\n\n{"n": 2}\n', r"in.jsonl:3: no `id`"),
        ('{"id": true, "n": 1}\n', r"in.jsonl:1: no `id`"),
        ('{"id": "a"}\n', r"in.jsonl:1: id a has no `n`"),
        ('{"id": "a", "n": "1"}\n', r"in.jsonl:1: id a: `n` is \"1\", which is of the wrong kind"),
        ("", r"in.jsonl: no rows"),
        ('{"id": "a", "n": 1}\n{"id": ', r"in.jsonl:2: broken JSON"),
        (b'{"id": "a", "n": 1}\n{"id": "\xff", "n": 1}\n', r"in.jsonl:2: not UTF-8"),
        ('{"id": "a", "n": 1, "t": "half \\ud83d"}\n', r"in.jsonl:1: half of a surrogate pair"),
    ],
)
def test_bad_input_is_named_by_file_and_line_before_anything_is_loaded(numbers, text, message):
    file, out = numbers
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    loads = []
    with pytest.raises(SystemExit, match=message):
        stage([file, "--out", out], loads=loads)
    assert not loads and not out.exists()


def test_answers_are_found_by_id_and_responder(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": "a", "responder": "x", "n": 1}\n{"id": "a", "responder": "y", "n": 2}\n')
    stage([file, "--out", tmp_path / "out.jsonl"])
    assert [row["square"] for row in read(tmp_path / "out.jsonl")] == [1, 4]
    file.write_text('{"id": "a", "responder": "x", "n": 1}\n{"id": "a", "responder": "x", "n": 2}\n')
    with pytest.raises(SystemExit, match="in.jsonl:2: a of x was there before"):
        stage([file, "--out", tmp_path / "out2.jsonl"])


def test_line_ends_inside_a_text_survive(tmp_path):
    file, texts = tmp_path / "in.jsonl", ["one\ntwo", "one\r\ntwo\rthree", "a\u2028b\x85c"]
    file.write_text(
        "".join(json.dumps({"id": str(i), "n": i, "t": t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)),
        newline="",
    )
    out = tmp_path / "out.jsonl"
    stage([file, "--out", out])
    assert [row["t"] for row in runner.read_inputs(out, {})] == texts
    assert stage([file, "--out", out]).new == 0


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--shard-index", "2", "--shard-count", "2"], ["--limit", "-1"]])
def test_flags_out_of_range_are_refused(numbers, flags, capsys):
    file, out = numbers
    with pytest.raises(SystemExit) as error:
        stage([file, "--out", out, *flags])
    assert error.value.code == 2 and "error: " in capsys.readouterr().err


def test_the_core_and_the_room_import_without_the_extra():
    """No file imports a package of the extra `pds` before a stage asks for it."""
    root = Path(runner.__file__).parent.parent
    extra = {"open_clip", "transformers", "diffusers", "accelerate", "matplotlib"}
    for file in [*root.glob("*.py"), *root.glob("pds/*.py")]:
        for node in ast.parse(file.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not extra & {name.split(".")[0] for name in names}, f"{file}: {names}"


def test_a_missing_package_is_a_sentence():
    with pytest.raises(SystemExit, match="no_such_package is not installed.*python .ci/install.py pds"):
        runner.optional("no_such_package")


def test_a_retry_of_some_rows_keeps_the_others(tmp_path):
    """--limit with --retry-failed: the failed rows behind the limit stay, and a row whose input was mended is done."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"id": key, "n": -1}) + "\n" for key in "abc"))
    with pytest.raises(SystemExit):
        stage([file, "--out", out])
    file.write_text("".join(json.dumps({"id": key, "n": n}) + "\n" for key, n in (("a", 3), ("b", -1), ("c", -1))))
    stage([file, "--out", out, "--retry-failed", "--limit", 1])
    assert {row["id"]: row.get("square", "failed") for row in read(out)} == {"a": 9, "b": "failed", "c": "failed"}


def test_progress_is_told_what_is_left(numbers, monkeypatch):
    file, out = numbers
    stage([file, "--out", out, "--limit", 5])
    told = []

    class Bar(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            told.append(n)

    monkeypatch.setattr(runner, "progress", lambda what, total, done: told.append((total, done)) or Bar())
    stage([file, "--out", out, "--batch", 10])
    assert told == [(20, 5), 10, 5]
