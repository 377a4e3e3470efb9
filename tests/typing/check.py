"""Hold mypy and pyright to the marks in clients.py: ``# E: mypy[arg-type] pyright[...]``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

CLIENTS = Path(__file__).with_name("clients.py")
ROOT = Path(__file__).parents[2]

#: Line, checker, and the checker's name of the error.
Error = tuple[int, str, str]


def main() -> int:
    marked, found = marks(CLIENTS.read_text()), mypy() | pyright()
    for line, checker, rule in sorted(marked ^ found):
        what = "marked, not found" if (line, checker, rule) in marked else "found, not marked"
        print(f"{CLIENTS.relative_to(ROOT)}:{line}: {checker}[{rule}] {what}")
    print(f"{len(marked & found)} of {len(marked)} marked errors found, {len(found - marked)} more")
    return int(marked != found)


def marks(text: str) -> set[Error]:
    """The errors that comments ask for."""
    return {
        (number, checker, rule)
        for number, line in enumerate(text.splitlines(), 1)
        for checker, rule in re.findall(r"(\w+)\[([\w-]+)\]", line.partition("# E: ")[2])
    }


def mypy() -> set[Error]:
    """The errors that mypy finds."""
    reports = map(json.loads, run("mypy", "--output", "json", str(CLIENTS)).splitlines())
    return {
        (r["line"], "mypy", r["code"])
        for r in reports
        if r["severity"] == "error" and r["file"].endswith(CLIENTS.name)
    }


def pyright() -> set[Error]:
    """The errors that pyright finds; its own project, since the root's leaves the file out."""
    arguments = ("--outputjson", "-p", str(CLIENTS.parent), "--pythonpath", sys.executable)
    reports = json.loads(run("pyright", *arguments))
    return {
        (r["range"]["start"]["line"] + 1, "pyright", r["rule"])
        for r in reports["generalDiagnostics"]
        if r["severity"] == "error"
    }


def run(*command: str) -> str:
    """What a checker prints."""
    full = (sys.executable, "-m", *command)
    done = subprocess.run(full, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode > 1:  # 1 means that it found errors, more that it could not look
        sys.exit(f"{command[0]}: {done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
