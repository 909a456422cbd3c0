"""How a command of ours ends on a terminal."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "error, said",
    [
        ("KeyboardInterrupt", "Interrupted. Its files are whole"),
        ("BrokenPipeError", ""),  # `| head` has its lines
        ("KeyError('x')", "KeyError: 'x'"),  # our own mistake keeps its traceback
    ],
)
def test_ctrl_c_and_a_closed_pipe_are_no_tracebacks(error, said):
    code = f"from external.terminal import set_up_terminal\nset_up_terminal()\nraise {error}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stderr
    assert ("Traceback" in done.stderr) == error.startswith("KeyError")
