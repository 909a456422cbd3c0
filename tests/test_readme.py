"""What README and docs say exists does: files, functions, links, commands and their flags."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from test_house import CHAPTERS, ROOMS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(r"python (-m \w+\.\w+|\w+\.py)(?= |$)")


def commands(text: str) -> set[str]:
    """Commands of ours in the fenced blocks of a page, one line each, comments and pipes left out."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return {line[found.start() :] for line in lines if (found := OURS.search(line))}


ALL_COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text())})


def test_every_chapter_and_room_is_in_the_readme():
    assert [name for name in CHAPTERS if f"`{name}.py`" not in README] == []
    assert [room for room in ROOMS if f"`{room}/`" not in README] == []


def test_every_pointer_to_code_exists():
    pointers = re.findall(r"`([\w/]+\.py):(\w+)`", "".join(page.read_text() for page in PAGES))
    assert len(pointers) >= 10
    for file, name in pointers:
        source = (ROOT / file).read_text()
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b.* = ", source, re.M), f"{file}:{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        lines = file.read_text().splitlines() if anchor else []
        headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip() for line in lines if line[:1] == "#"]
        assert not anchor or anchor in [heading.replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_fenced_blocks(page):
    """An indented one would not be checked."""
    assert re.findall(r"^    +python .*", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M) == []


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_name_files_and_flags_that_exist(command, capsys):
    """Every flag of a command is one that the command's own --help prints."""
    words = shlex.split(re.split(r" [|>&] ?", command)[0], comments=True)[1:]
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    if name == "bench.trl_peer":  # it imports trl, which no test has
        text = (ROOT / "bench/trl_peer.py").read_text()
    else:
        with pytest.raises(SystemExit) as end:
            importlib.import_module(name).main(["--help"])
        assert end.value.code in (0, None)
        text = capsys.readouterr().out
    known = set(re.findall(r"(?<![\w-])--[\w-]+", text))
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


def test_the_worked_example_is_the_same_everywhere():
    for text in (README, importlib.import_module("losses").__doc__):
        for number in ("0.5544", "0.6444", "0.5981", "1.7969"):
            assert number in text
