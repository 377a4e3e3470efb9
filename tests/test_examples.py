"""The examples run as README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_demo_shows_a_call_and_how_to_do_it_by_hand() -> None:
    done = subprocess.run(
        [sys.executable, "examples/demo.py"], cwd=ROOT, text=True, capture_output=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Hello Alice") == 2  # by `micro call`, and over plain HTTP
    assert "By hand" in done.stdout


def test_demo_fails_when_the_service_does(tmp_path: Path) -> None:
    (tmp_path / "demo.py").write_text((ROOT / "examples/demo.py").read_text())
    (tmp_path / "helloworld.py").write_text("raise SystemExit('out of order')")

    done = subprocess.run(
        [sys.executable, "demo.py"], cwd=tmp_path, text=True, capture_output=True, check=False
    )

    assert done.returncode == 1
    assert "out of order" in done.stdout


def test_readme_gives_the_commands_that_the_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "python3 dev.py demo" in readme
    assert "python3 dev.py tests" in readme
    assert "python3 dev.py tests" in (ROOT / ".ci/run").read_text()


def test_readmes_show_the_example() -> None:
    example = (ROOT / "examples/helloworld.py").read_text()
    for readme in (ROOT / "README.md", ROOT / "core/README.md"):
        assert example in readme.read_text(), f"{readme} and examples/helloworld.py differ"
