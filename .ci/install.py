"""Installs with pip what pyproject.toml lists: `python .ci/install.py` for the core, `python .ci/install.py EXTRA ...`
for extras too. Give it the Python of a virtual environment; pip's own settings and variables hold."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """The core's requirements, then those of the extras; an extra may name others, as "nanomdpo[plot,pds]"."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    found = list(project["dependencies"])
    for extra in extras:
        if extra not in known:
            raise SystemExit(f"{extra}: pyproject.toml has no such extra; choose from {', '.join(known)}")
        for requirement in known[extra]:
            others = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
            found += requirements(others[1].split(",")) if others else [requirement]
    return list(dict.fromkeys(found))  # each once


if __name__ == "__main__":
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    raise SystemExit(subprocess.call([*pip, *requirements(sys.argv[1:])]))
