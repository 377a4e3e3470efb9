"""Make a plugin, complete but for what only its author can write: ``new_plugin.py NAME``.

What the repository has for it (environments of tox, checks, coverage, builds) follows from the
folder in plugins/. Its tests fail where a method is not written, and say what that has to promise.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

TEMPLATES = Path(__file__).parent / "new_plugin"
NEXT = """\
made plugins/{name}. Next:
  1. name the client library in plugins/{name}/pyproject.toml
  2. python3 dev.py tests plugins/{name}    # each failure says what is to be written
  3. python3 dev.py docs                    # its row in the tables
  4. add it to _KNOWN in core/src/micro/plugins.py, for those who have not installed it"""


class Refused(Exception):
    """A plugin that cannot be made; the text says why."""


def make(root: Path, name: str) -> Path:
    """The folder of the new plugin.

    Raises:
        Refused: the name is not one lower-case label, or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]{0,15}", name):
        raise Refused(f"{name!r}: write one label of a-z and 0-9, 16 at most, for the scheme")
    folder = root / "plugins" / name
    if folder.exists():
        raise Refused(f"plugins/{name} is there already")
    if (root / f"core/src/micro/backends/{name}.py").exists():
        raise Refused(f"{name}: the core has this scheme")
    values = _values(root, name)
    for template in sorted(TEMPLATES.rglob("*.in")):
        path = folder / str(template.relative_to(TEMPLATES)).replace("NAME", name)
        path = path.with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(r"@(\w+)@", lambda found: values[found[1]], template.read_text()))
    shutil.copy(root / "LICENSE", folder / "LICENSE")
    return folder


def _values(root: Path, name: str) -> dict[str, str]:
    """What the templates name; what holds of the core is taken from there."""
    core = tomllib.loads((root / "core/pyproject.toml").read_text())["project"]
    return {
        "NAME": name,
        "Name": name.capitalize(),
        "CORE": _range(core["version"]),
        "PYTHON": core["requires-python"],
        "CLASSIFIERS": "\n".join(f'    "{line}",' for line in core["classifiers"]),
        "MSGSPEC": next(need for need in core["dependencies"] if need.startswith("msgspec")),
    }


def _range(version: str) -> str:
    """From this version of the core up to the next one that may break what stands on it."""
    major, minor, _ = map(int, version.split("."))
    return f">={major}.{minor},<{major + 1}" if major else f">=0.{minor},<0.{minor + 1}"


def main(argv: Sequence[str]) -> int:
    """Make one plugin; what is refused is told on stderr, with status 1."""
    parser = argparse.ArgumentParser(prog="new_plugin", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("name")
    given = parser.parse_args(argv)
    try:
        make(given.root, given.name)
    except Refused as exc:
        print(f"new_plugin: {exc}", file=sys.stderr)
        return 1
    print(NEXT.format(name=given.name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
