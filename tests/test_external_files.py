"""external/files.py: a file is written whole or not at all, and broken JSON is named by its place."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_house import imports_of, source_files

from external import files

ROOT = Path(__file__).parent.parent


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "result.json"
    files.write_json(path, {"a": "é"})
    with pytest.raises(SystemExit, match="result.json: cannot be written .disk full"), files.whole(path) as part:
        part.write_text("half")
        raise OSError("disk full")
    assert path.read_text(encoding="utf-8") == '{\n "a": "é"\n}\n'
    assert os.listdir(path.parent) == ["result.json"]


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    files.write_rows(path, [{"id": 1}])
    code = """
import os, signal, sys
from external import files
with files.whole(sys.argv[1]) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == '{"id": 1}\n'
    files.write_rows(path, [{"id": 2}])  # what the killed run left does not stand in the way
    assert path.read_text() == '{"id": 2}\n' and os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_a_file_is_what_the_umask_says(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        files.write_text(tmp_path / "text", "a")
        with files.whole(tmp_path / "weights") as part:
            save_file({"x": torch.zeros(1)}, part)  # safetensors alone would make it 0600
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("text", "weights")] == [mode, mode]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1', "a.json: broken JSON"),
        ('{"a": 1, "a": 2}', "a key stands twice"),
        ("[" * 200_000, "a.json: broken JSON"),  # deeper than Python can follow
        ("[1]", "a.json: holds a list, expected a dict"),
    ],
)
def test_json_that_is_not_what_it_should_be_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        files.read_json(tmp_path / "a.json", dict)


def test_rows_are_read_back_as_written(tmp_path):
    rows = [{"id": 1, "text": "a\u2028b"}, {"id": 2, "text": ""}]  # \u2028 ends a line for Python, not for JSON
    files.write_rows(tmp_path / "a.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")[:-1]] == rows
    assert [row["text"] for row in files.read_rows(tmp_path / "a.jsonl")] == ["a\u2028b", ""]


def test_a_file_that_the_command_reads_is_no_place_for_its_result(tmp_path):
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(SystemExit, match="r.json: is read by this command"):
        files.check_writable(tmp_path / "x" / ".." / "r.json", [None, str(tmp_path / "r.json")])
    files.check_writable(tmp_path / "other.json", [tmp_path / "r.json"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.json"]


def test_who_has_the_old_file_open_keeps_it(tmp_path):
    """The new file takes the old one's name; it is not written into it."""
    files.write_text(tmp_path / "a", "old and long")
    with open(tmp_path / "a") as reader:
        files.write_text(tmp_path / "a", "new")
        assert reader.read() == "old and long"
    assert (tmp_path / "a").read_text() == "new"


def test_python_without_assertions_is_refused_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-OO", "-c", "import external.files"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("python -O leaves out checks")
    assert done.stderr.count("\n") == 1


def test_every_command_comes_by_that_refusal():
    """By imports: each file that reads its docstring for --help reaches external.files."""
    sources = {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text() for file in source_files()}
    arrows = {name: imports_of(text) for name, text in sources.items()}
    commands = [name for name, text in sources.items() if "__doc__" in text]
    assert len(commands) > 30
    for command in commands:
        reached, left = set(), [command]
        while left:
            name = left.pop()
            if name not in reached:
                reached.add(name)
                left += arrows.get(name, ()) or arrows.get(name.rpartition(".")[0], ())
        assert any(name.startswith("external.files") for name in reached), command


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SystemExit, match=r"a.json: cannot be read \(Permission denied\)"):
        files.read_text(tmp_path / "a.json")


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    (tmp_path / "a.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    with pytest.raises(SystemExit, match="a.json: a pointer of Git LFS, .*git lfs pull"):
        files.read_json(tmp_path / "a.json")


def test_a_pipe_or_a_device_is_no_place_for_a_result(tmp_path):
    """A pipe without a reader is waited for in vain; a file that took /dev/null's name would break the machine."""
    os.mkfifo(tmp_path / "pipe.json")
    for place in (tmp_path / "pipe.json", Path("/dev/null")):
        with pytest.raises(SystemExit, match=f"{place}: cannot be written .it is a pipe or a device"):
            files.check_writable(place)
    with pytest.raises(SystemExit, match="pipe.json: cannot be written .it is a pipe or a device"):
        files.write_text(tmp_path / "pipe.json", "text")
    assert (tmp_path / "pipe.json").is_fifo() and not Path("/dev/null").is_file()
