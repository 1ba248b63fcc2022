"""Real clients in environments of their own, against a live server."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.conformance
HERE = Path(__file__).parent


@pytest.mark.parametrize("requirement", ["openai>=2,<3", "openai>=3,<4"])
def test_the_openai_sdk(server: str, requirement: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env/bin/python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
    done = subprocess.run([python, str(HERE / "openai_client.py"), server], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr


def test_the_readmes_snippets_run_as_they_stand(server: str, tmp_path: Path) -> None:
    readme = (HERE.parent.parent / "README.md").read_text()
    snippets = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    assert len(snippets) >= 2
    for snippet in snippets:
        code = snippet.replace("http://127.0.0.1:8000", server)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent.parent)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
