"""What the README says exists does, and the size budget holds."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FILES = sorted(p.name for p in ROOT.glob("*.py"))
CORE = ("losses.py", "data.py", "model.py", "lora.py", "weights.py", "train.py")


def lines(name: str) -> int:
    return len((ROOT / name).read_text().splitlines())


def commands() -> list[str]:
    """Lines of fenced blocks in README and docs that run a script of ours."""
    text = README + "".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md")))
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    found = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line for line in found if re.match(r"python \w+\.py", line)})


def test_every_file_is_in_the_readme():
    missing = [name for name in FILES if f"`{name}`" not in README]
    assert not missing and len(FILES) <= 24


def test_size_budget():
    assert sum(map(lines, CORE)) <= 2000
    assert sum(map(lines, FILES)) <= 6000
    assert {name: lines(name) for name in FILES if lines(name) > (600 if name == "model.py" else 400)} == {}


def test_every_pointer_in_the_equation_table_exists():
    pointers = re.findall(r"`(\w+)\.py:(\w+)`", README)
    assert len(pointers) >= 10
    for module, name in pointers:
        source = (ROOT / f"{module}.py").read_text()
        assert re.search(rf"^\s*def {name}\(|^{name} = ", source, re.M), f"{module}.py:{name}"


def test_links_in_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((docs/[^)#]+)", README):
        assert (ROOT / target).is_file(), target
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
                for line in (ROOT / "docs/results.md").read_text().splitlines() if line.startswith("#")}  # fmt: skip
    for anchor in re.findall(r"docs/results\.md#([\w-]+)", README):
        assert anchor in headings, anchor


@pytest.mark.parametrize("command", commands())
def test_commands_name_files_and_flags_that_exist(command):
    """Every flag of a command is one its script's source defines."""
    _, script, *words = shlex.split(command, comments=True)
    assert (ROOT / script).is_file(), script
    sources = (
        [script] + {"data.py": ["inspect_data.py"]}.get(script, []) + ["eval_common.py"] * script.startswith("eval_")
    )
    text = "".join((ROOT / s).read_text() for s in sources)
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0].replace("--no-", "--")
            assert f'"{flag}"' in text or f'"{word}"' in text, f"{script} has no {flag}"


def test_imports_point_one_way():
    """losses, lora and model import none of ours, and only tests and the bench import train."""
    ours = {name.removesuffix(".py") for name in FILES}
    for name in FILES:
        imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / name).read_text(), re.M)) & ours
        if name in ("losses.py", "lora.py", "model.py"):
            assert not imported, f"{name} imports {imported}"
        assert "train" not in imported or name == "bench.py", name


def test_the_worked_example_is_the_same_everywhere():
    for text in (README, importlib.import_module("losses").__doc__):
        for number in ("0.5544", "0.6444", "0.5981", "1.7969"):
            assert number in text
