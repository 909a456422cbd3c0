"""The house: nine chapters, eight rooms, and which of them may import which."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = ["data", "eval_chair", "generate", "lora", "losses", "model", "pictures", "toy", "train"]
ROOMS = ["bases", "bench", "engine", "evals", "external", "formats", "lab", "pds"]
METHOD = "losses model lora data pictures"

# Who may import whom. A room may always import its own files; what is not listed is not allowed.
MAY_IMPORT = {
    "losses": "",
    "model": "",
    "lora": "",
    "pictures": "",
    "external": "",
    "data": "model pictures",
    "bases": f"{METHOD} external",  # pictures: an exported model answers prompts with pictures before it is kept
    "engine": f"{METHOD} external",
    "formats": f"{METHOD} bases external",
    "generate": f"{METHOD} bases engine external",  # engine: the device, set up as for training
    "eval_chair": f"{METHOD} generate bases evals external",  # evals: the statistics all scorers share
    "evals": f"{METHOD} generate bases engine eval_chair external",  # engine: ranks; eval_chair: by table1
    "toy": f"{METHOD} generate eval_chair evals bases formats external",
    "pds": f"{METHOD} generate eval_chair evals bases formats external",
    "train": f"{METHOD} formats bases engine external toy",
}
MAY_IMPORT |= dict.fromkeys(["lab", "bench"], " ".join(CHAPTERS + ROOMS))


def source_files() -> list[Path]:
    return sorted(ROOT.glob("*.py")) + [file for room in ROOMS for file in sorted((ROOT / room).glob("*.py"))]


def imports_of(source: str) -> set[str]:
    """Dotted names of all imports, those inside functions too; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit(name: str) -> str:
    """The chapter or room that a dotted name belongs to."""
    return name.partition(".")[0]


def wrong_imports(place: str, source: str) -> list[str]:
    """Imports of ours in `source`, a file of chapter or room `place`, that the floors do not allow."""
    allowed = {*MAY_IMPORT[place].split(), place}
    ours = {*CHAPTERS, *ROOMS}
    return sorted(name for name in imports_of(source) if unit(name) in ours and unit(name) not in allowed)


def test_chapters_and_rooms_are_those_of_the_house():
    assert sorted(file.stem for file in ROOT.glob("*.py")) == CHAPTERS
    listed = subprocess.run(["git", "ls-files", "*/__init__.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:  # not in a copy without git
        assert sorted(Path(line).parts[0] for line in listed.stdout.split()) == ROOMS
    for room in ROOMS:
        tree = ast.parse((ROOT / room / "__init__.py").read_text())
        assert len(tree.body) == 1 and ast.get_docstring(tree), f"{room}/__init__.py is one docstring"


@pytest.mark.parametrize("file", source_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    place = file.stem if file.parent == ROOT else file.parent.name
    assert wrong_imports(place, file.read_text()) == []


@pytest.mark.parametrize(
    "place, line",
    [
        ("engine", "def f():\n    import train\n"),
        ("formats", "from evals import stats\n"),
        ("losses", "from data import Batch\n"),
        ("bases", "import torch\nfrom formats.readers import read_pairs\n"),
    ],
)
def test_a_wrong_import_is_seen(place, line):
    assert len(wrong_imports(place, line)) == 1


def test_no_circle():
    """Every import of ours, taken as an arrow between files, can be put in one order."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in source_files()}
    arrows = {}
    for name, file in files.items():
        targets = {target if target in files else target.rpartition(".")[0] for target in imports_of(file.read_text())}
        arrows[name] = targets & files.keys() - {name}
    while ends := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in ends:
            del arrows[name]
    assert not arrows, f"files that import each other: {sorted(arrows)}"


@pytest.mark.parametrize("file", source_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file):
    lines = len(file.read_text().splitlines())
    assert lines <= (600 if file.name == "model.py" else 400), f"{file.name} has {lines} lines"


def test_chapters_together_are_an_afternoon():
    assert sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in CHAPTERS) <= 2800
    most = dict.fromkeys(ROOMS, 12) | {
        "pds": 19,
        "bases": 13,
    }  # pds: eight stages, their judges, hashes
    found = {room: len(list((ROOT / room).glob("*.py"))) - 1 for room in ROOMS}  # without __init__
    assert {room: n for room, n in found.items() if n > most[room]} == {}
