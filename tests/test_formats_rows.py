"""Files -> rows: the line that is wrong, odd rows that stop nothing, what a file looks like that is not read."""

import json
import os

import pytest
from format_rows import Y_L, Y_W, Q, write

from formats import check
from formats.readers import read_pairs


def row(**changes) -> dict:
    return {"image": "a.png", "prompt": Q, "chosen": Y_W, "rejected": Y_L} | changes


GOOD = json.dumps(row())


def problems_of(folder, text: str) -> list:
    (folder / "d.jsonl").write_text(text)
    return read_pairs(folder / "d.jsonl")[1]


def test_broken_json_is_named_with_its_own_line(tmp_path):
    half = GOOD[:20]  # {"image": "a.png", "
    (problem,) = problems_of(tmp_path, f"{GOOD}\n\n{GOOD}\n{half}\n{GOOD}\n")
    # blank lines count as lines: the third row stands in line 4; the open quote is character 20
    assert (problem.row, problem.where, problem.reason) == (3, f"{tmp_path}/d.jsonl:4", "broken row")
    assert problem.detail == "column 20: Unterminated string starting at"


@pytest.mark.parametrize("line", ["[" * 200_000 + "]" * 200_000, "[1]", "7", "null", '{"a": 1' + "0" * 5000 + "}"])
def test_one_odd_line_stops_nothing(line, tmp_path):
    (problem,) = problems_of(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n")
    assert problem.where.endswith("d.jsonl:2") and len(problem.detail) < 250


def test_the_line_of_a_row_after_blank_lines(tmp_path):
    (problem,) = problems_of(tmp_path, f"\n{GOOD}\n\n{json.dumps(row(image=7))}\n")
    assert (problem.row, problem.where) == (2, f"{tmp_path}/d.jsonl:4")


def test_the_first_row_is_named_where_its_columns_tell_no_format(tmp_path):
    with pytest.raises(SystemExit, match=r"d\.jsonl:2: unknown columns. Found: none"):
        problems_of(tmp_path, f"\n{{}}\n{GOOD}\n")


def test_a_column_that_a_row_lacks_is_named(tmp_path):
    (problem,) = problems_of(tmp_path, f'{GOOD}\n{{"image": "a.png", "chosen": "a", "rejected": "b"}}\n')
    assert problem.detail == "it lacks 'prompt'"


def test_one_odd_row_of_a_list_stops_nothing(tmp_path):
    (tmp_path / "d.json").write_text(f"[{GOOD}, {GOOD}, 7]")
    pairs, (problem,) = read_pairs(tmp_path / "d.json")
    assert len(pairs) == 2
    assert (problem.where, problem.detail) == (
        f"{tmp_path}/d.json:3",
        "it is of type int, wanted an object with named columns",
    )


def test_a_list_called_jsonl(tmp_path):
    with pytest.raises(SystemExit, match="d.jsonl: one list of rows, .* name it .json"):
        problems_of(tmp_path, json.dumps([row(), row()], indent=1))


def test_parquet_with_a_column_twice(tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = {"image": "a.png", "prompt": Q, "chosen": Y_W, "rejected": Y_L}
    table = pyarrow.table([[text] for text in (*columns.values(), "another")], names=[*columns, "chosen"])
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(SystemExit, match="several columns are called chosen"):
        read_pairs(tmp_path / "d.parquet")


def test_shards_that_the_names_promise_and_that_are_not_there(tmp_path):
    for i in (0, 2):
        write(tmp_path, [row()], f"train-{i:05d}-of-00003.parquet")
    with pytest.raises(SystemExit, match="train-00001-of-00003.parquet is not there; is the download complete?"):
        read_pairs(tmp_path)
    write(tmp_path, [row()], "train-00001-of-00003.parquet")
    assert len(read_pairs(tmp_path)[0]) == 3


def test_hidden_files_are_no_rows_and_several_files_are_said(tmp_path, capsys):
    write(tmp_path, [row()], "a.parquet")
    write(tmp_path, [row()], "b.parquet")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write(tmp_path / ".ipynb_checkpoints", [row()], "a-checkpoint.parquet")
    (tmp_path / "._a.parquet").write_bytes(b"macOS")
    assert len(read_pairs(tmp_path)[0]) == 2
    assert "reading 2 files as one set: a.parquet, b.parquet" in capsys.readouterr().out


def test_shards_are_named(tmp_path):
    write(tmp_path, [row(), row(chosen="")], "train-0.parquet")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", [row(), row(image="../x.png")], "train-1.parquet")
    pairs, problems = read_pairs(tmp_path)
    (problem,) = problems
    assert problem.where == f"{tmp_path}/more/train-1.parquet:2"
    assert {p.where for p in pairs} == {
        f"{tmp_path}/{place}" for place in ("train-0.parquet:1", "train-0.parquet:2", "more/train-1.parquet:1")
    }


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("d.csv", "image,prompt\na,b", "d.csv: a .csv file; .json, .jsonl and .parquet are read"),
        ("d.jsonl.gz", "\x1f", "d.jsonl.gz: a packed file; unpack it first"),
        ("d.json", GOOD + "\n" + GOOD, "one JSON value a line? Then name it .jsonl"),
        ("d.json", '{"data": []}', "expected a list of rows, this is one object with the keys data"),
        ("d.json", "[" * 200_000, "not readable as .json: nested too deeply"),
    ],
)
def test_files_that_are_not_read_say_what_they_look_like(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as e:
        read_pairs(tmp_path / name)
    assert words in str(e.value)


def test_capitals_and_ndjson_are_read(tmp_path):
    for name in ("A.JSONL", "b.ndjson"):
        (tmp_path / name).write_text(GOOD + "\n")
        assert len(read_pairs(tmp_path / name)[0]) == 1


def test_a_folder_of_arrow_files_says_how_to_write_parquet(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").touch()
    with pytest.raises(SystemExit, match="to_parquet"):
        read_pairs(tmp_path)


def test_a_pipe_is_no_data_file(tmp_path):
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(SystemExit, match="no such file"):  # opened, it would be waited for
        read_pairs(tmp_path / "d.jsonl")


def test_half_a_file_of_utf8_names_the_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(GOOD.encode() + b'\n{"a": "\xff"}\n')
    with pytest.raises(SystemExit, match="d.jsonl:2: not UTF-8"):
        read_pairs(tmp_path / "d.jsonl")


ESCAPES = "\x1b[2J\x1b]0;title\x07\u202e\x9b31m"


def test_control_characters_never_reach_the_terminal(tmp_path, tiny_base, capsys):
    rows = [
        row(id=f"a{ESCAPES}", image=f"{ESCAPES}.png", **{f"col{ESCAPES}": 1}),
        row(id=f"b{ESCAPES}", image=f"../{ESCAPES}.png"),
        row(id=f"c{ESCAPES}", chosen=[{"role": ESCAPES, "content": "x"}]),
        row(id=f"a{ESCAPES}", prompt=f"What{ESCAPES}?"),
    ]
    data = write(tmp_path, rows, "d.jsonl")
    with pytest.raises(SystemExit):
        check.main([str(data), "--base", str(tiny_base)])
    with pytest.raises(SystemExit) as e:
        read_pairs(write(tmp_path, [{f"other{ESCAPES}": 1}], "e.jsonl"))
    printed = capsys.readouterr().out + str(e.value)
    assert not any(c in printed for c in "\x1b\x07\u202e\x9b")
    assert r"a\x1b[2J\x1b]0;title\x07\u202e\x9b31m" in printed
