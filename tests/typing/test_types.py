"""The public functions as a type checker sees them."""

import ast
import subprocess
import sys
from pathlib import Path

import scgen

SESSION = Path(__file__).parent / "session.py"
ROOT = Path(scgen.__file__).parents[1]


def test_a_type_checker_accepts_what_users_write(tmp_path):
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent"]
    command += ["--warn-unused-ignores", f"--cache-dir={tmp_path}", str(SESSION)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "Success: no issues found in 1 source file\n", done.stdout + done.stderr


def test_type_checkers_see_all_public_names():
    (seen,) = (
        node
        for node in ast.parse(Path(scgen.__file__).read_text()).body
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
    )
    names = {alias.asname for node in seen.body for alias in node.names}
    assert names == {*scgen.__all__, "plots"}
