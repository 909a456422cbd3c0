"""pyproject.toml is the one list of packages: what the code imports is on it, and installed in the right company."""

import ast
import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest
from test_house import CHAPTERS, ROOMS, ROOT, imports_of, source_files, unit

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTION = {"PIL": "pillow", "open_clip": "open_clip_torch"}  # where it is not named as its module
BROUGHT = {  # by packages that are on the list
    "huggingface_hub": "tokenizers",
    "filelock": "tokenizers",
    "httpx2": "openai",
    "torchvision": "open_clip_torch",
}
NOT_ON_WINDOWS = {"fcntl", "grp", "pwd", "resource", "termios"}
ELSEWHERE = {"spacy"}  # in an environment of its own (evals/similarity.py)


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("install", ROOT / ".ci" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(requirements: list[str]) -> set[str]:
    return {requirement.partition(">=")[0] for requirement in requirements}


def packages(modules: set[str]) -> set[str]:
    """The listed packages behind imported names that are neither ours nor Python's."""
    tests = {"tests"} | {file.stem for file in (ROOT / "tests").glob("*.py")}
    outside = {unit(name) for name in modules} - {*CHAPTERS, *ROOMS, *tests} - sys.stdlib_module_names
    return {BROUGHT.get(name) or DISTRIBUTION.get(name, name) for name in outside}


def imported_at_once(file: Path) -> set[str]:
    """Names a file imports as soon as it is imported itself."""
    top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports_of("\n".join(ast.unparse(node) for node in top))


def test_an_extra_brings_the_core_and_the_extras_it_names(install):
    assert names(install.requirements([])) == {"torch", "safetensors", "tokenizers", "pillow", "numpy", "tqdm"}
    pds = install.requirements(["pds"])
    assert "matplotlib" in names(pds)  # pds -> plot
    assert len(pds) == len(set(pds))
    assert names(install.requirements(["dev"])) >= {"openai", "diffusers", "pytest"}  # dev -> pds
    with pytest.raises(SystemExit, match="plots: .*no such extra; choose from plot, "):
        install.requirements(["plots"])


def test_every_package_that_is_imported_is_on_the_list(install):
    everything = names(install.requirements(list(PROJECT["optional-dependencies"])))
    files = [*source_files(), *(ROOT / "tests").glob("*.py")]
    used = set().union(*(packages(imports_of(file.read_text())) for file in files))
    assert used - everything - ELSEWHERE == set()


def test_the_chapters_and_the_rooms_import_nothing_optional_before_it_is_asked_for(install):
    """`uv run train.py --base toy` has the core alone."""
    core = names(install.requirements([]))
    for file in source_files():
        if file.parent.name != "bench":  # its extra has what our speed is measured against
            assert packages(imported_at_once(file)) - core == set(), file


def test_training_imports_nothing_that_windows_has_not():
    for file in source_files():
        if file.parent.name not in ("bench", "pds"):
            assert imported_at_once(file) & NOT_ON_WINDOWS == set(), file
