"""Releases: each distribution of this repository has its own, by a tag ``NAME/vX.Y.Z``.

``prepare`` makes the commit and the tag, and pushes nothing; ``check`` is what the workflow asks
before it publishes a tag; ``stage`` copies what a distribution is built from.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
PARTS = ("major", "minor", "patch")
#: The one form in which a plugin pins what it needs of this repository.
RANGE = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=(\d+(?:\.\d+)*),<(\d+(?:\.\d+)*)")
# ``git@host:path``, and URLs; what stands before an @ may be a secret.
_SCP = re.compile(r"[\w.-]+@([\w.-]+):(.+)")
_REMOTE = re.compile(r"(?:https|ssh)://(?:[^/@]*@)?([\w.-]+)(?::\d+)?/(.+)")


class Refused(Exception):
    """A release that must not be; the text says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A folder, relative to the repository, with a pyproject.toml; its extras' needs are needs."""

    root: Path
    folder: str
    name: str
    version: str
    needs: tuple[str, ...]

    @property
    def pyproject(self) -> Path:
        return self.root / self.folder / "pyproject.toml"

    @property
    def changelog(self) -> Path:
        return self.root / self.folder / "CHANGELOG.md"

    @property
    def tag(self) -> str:
        return f"{self.name}/v{self.version}"

    @classmethod
    def read(cls, root: Path, folder: str) -> Distribution:
        project = tomllib.loads((root / folder / "pyproject.toml").read_text())["project"]
        return cls(
            root=root,
            folder=folder,
            name=project["name"],
            version=project["version"],
            needs=(
                *project.get("dependencies", ()),
                *chain.from_iterable(project.get("optional-dependencies", {}).values()),
            ),
        )


def distributions(root: Path) -> tuple[Distribution, ...]:
    """All that there are, core first."""
    plugins = sorted(path.parent.name for path in root.glob("plugins/*/pyproject.toml"))
    folders = ["core", *(f"plugins/{name}" for name in plugins)]
    return tuple(Distribution.read(root, folder) for folder in folders)


def find(root: Path, name: str) -> Distribution:
    """The distribution of that name.

    Raises:
        Refused: there is none; names those that there are.
    """
    known = distributions(root)
    for distribution in known:
        if distribution.name == name:
            return distribution
    raise Refused(f"no distribution {name!r}; known are {', '.join(d.name for d in known)}")


# -- the next version and its changelog -----------------------------------------------------------


def next_version(current: str, wanted: str, *, first: bool) -> str:
    """The version that ``wanted`` means: X.Y.Z, or the part of ``current`` that is raised.

    With ``first``, the current version is not released yet and stands when nothing is wanted.

    Raises:
        Refused: it is no version, or not above the current one.
    """
    if not wanted and first:
        return current
    if wanted in PARTS:
        place = PARTS.index(wanted)
        numbers = list(_numbers(current))
        return ".".join(map(str, [*numbers[:place], numbers[place] + 1, *[0] * (2 - place)]))
    if not VERSION.fullmatch(wanted):
        raise Refused(f"version {wanted!r}: write X.Y.Z, major, minor or patch; it is {current}")
    if _numbers(wanted) < _numbers(current) or (wanted == current and not first):
        raise Refused(f"version {wanted} is not above {current}, which it has")
    return wanted


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def section(changelog: str, heading: str) -> str | None:
    """What stands under ``## [heading]``, without the empty lines around it."""
    match = re.search(
        rf"^## \[{re.escape(heading)}\].*\n((?:(?!## ).*(?:\n|\Z))*)", changelog, re.MULTILINE
    )
    return match[1].strip() if match else None


def is_dated(changelog: str, version: str) -> bool:
    """Whether the section of that version says when it was released."""
    return bool(
        re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
    )


def is_first(changelog: str, version: str) -> bool:
    """Whether that version is written down and not released yet."""
    return bool(section(changelog, version)) and not is_dated(changelog, version)


def dated(changelog: str, version: str, day: str) -> str:
    """The changelog with ``version`` released: what was Unreleased stands in a section of its own.

    Raises:
        Refused: there is nothing to release, or in two places.
    """
    heading = f"## [{version}] - {day}"
    news = section(changelog, "Unreleased")
    if is_first(changelog, version):
        if news:
            raise Refused(
                f"CHANGELOG.md: [{version}] is not released yet: move there what stands under "
                "Unreleased, or give a higher version"
            )
        return changelog.replace(f"## [{version}]", heading, 1)
    if not news:
        raise Refused("CHANGELOG.md has nothing under Unreleased: there is nothing to release")
    return changelog.replace("## [Unreleased]", f"## [Unreleased]\n\n{heading}", 1)


# -- preparing ------------------------------------------------------------------------------------


def prepare(
    root: Path, name: str, wanted: str, *, build: Sequence[str], dry_run: bool = False
) -> None:
    """Set the version, date the changelog, build and test, commit and tag; push nothing.

    Only these two files of that one distribution change. When building fails they are put back.
    With ``dry_run`` it says what it would do.

    Raises:
        Refused: the tree is not clean and on main, the version does not rise, or another
            distribution of this repository does not take it.
    """
    now = find(root, name)
    changelog = now.changelog.read_text()
    first = is_first(changelog, now.version)
    new = replace(now, version=next_version(now.version, wanted, first=first))
    _check_tree(root, new)
    _check_ranges(root, new)
    edits = {
        now.changelog: dated(changelog, new.version, f"{datetime.now(UTC):%Y-%m-%d}"),
        now.pyproject: _with_version(now.pyproject.read_text(), now.version, new.version),
    }
    if dry_run:
        _show(new, edits, build)
        return
    try:
        for path, text in edits.items():
            path.write_text(text)
        subprocess.run(build, cwd=root, check=True)
        _git(root, "commit", "--quiet", "-m", f"{new.name} {new.version}", "--", *map(str, edits))
    except BaseException as exc:
        _git(root, "checkout", "--quiet", "HEAD", "--", *map(str, edits))
        if isinstance(exc, subprocess.CalledProcessError | OSError):
            raise Refused(f"{shlex.join(build)} failed; the files are as they were") from exc
        raise
    _git(root, "tag", "--annotate", "-m", f"{new.name} {new.version}", new.tag)
    print(f"{new.tag} is made and not pushed. Next:\n{_push(new)}")


def _check_tree(root: Path, new: Distribution) -> None:
    branch = _git(root, "branch", "--show-current")
    if branch != "main":
        raise Refused(f"the branch is {branch or 'none'}: releases are made on main")
    if _git(root, "status", "--porcelain"):
        raise Refused("the tree is not clean: commit what is new, or put it away")
    if _git(root, "tag", "--list", new.tag):
        raise Refused(f"the tag {new.tag} is there already")


def _check_ranges(root: Path, new: Distribution) -> None:
    for other in distributions(root):
        for needed, low, high in ranges(other.needs):
            inside = _numbers(low) <= _numbers(new.version) < _numbers(high)
            if needed == new.name and not inside:
                raise Refused(
                    f"{other.name} needs {needed}>={low},<{high}, which leaves {new.version} out: "
                    f"widen that in {other.folder}/pyproject.toml first, when its tests pass"
                )


def ranges(needs: Sequence[str]) -> tuple[tuple[str, str, str], ...]:
    """Name, lower and upper bound of those requirements that are ranges."""
    found = [RANGE.fullmatch(need.replace(" ", "")) for need in needs]
    return tuple((match[1], match[2], match[3]) for match in found if match)


def _with_version(pyproject: str, old: str, new: str) -> str:
    text, count = re.subn(
        rf'^version = "{re.escape(old)}"$', f'version = "{new}"', pyproject, flags=re.MULTILINE
    )
    if count != 1:
        raise Refused(f'pyproject.toml has {count} lines version = "{old}", not one')
    return text


def _show(new: Distribution, edits: dict[Path, str], build: Sequence[str]) -> None:
    for path, text in edits.items():
        file = str(path.relative_to(new.root))
        before = path.read_text().splitlines(keepends=True)
        after = text.splitlines(keepends=True)
        sys.stdout.writelines(difflib.unified_diff(before, after, file, file, n=1))
    commit = f'git commit -m "{new.name} {new.version}"'
    print(f"then: {shlex.join(build)}, {commit}, git tag {new.tag}\nleft to you: {_push(new)}")


def _push(new: Distribution) -> str:
    return f"git push --atomic origin main {new.tag}"


# -- publishing -----------------------------------------------------------------------------------


def check(root: Path, tag: str, owned: str) -> Distribution:
    """The distribution that ``tag`` may publish.

    ``owned`` lists the names that are ours on the index, with commas or spaces between them. Those
    that it needs of this repository have to be ours too: pip would take them from others.

    Raises:
        Refused: tag, version and changelog do not agree, or a name is not said to be ours.
    """
    name, _, version = tag.removeprefix("refs/tags/").rpartition("/v")
    found = find(root, name)
    if version != found.version:
        raise Refused(f"tag {tag}: the version in {found.folder}/pyproject.toml is {found.version}")
    changelog = found.changelog.read_text()
    if not (section(changelog, version) and is_dated(changelog, version)):
        raise Refused(f"tag {tag}: {found.folder}/CHANGELOG.md has no dated section [{version}]")
    ours = {_normal(distribution.name) for distribution in distributions(root)}
    names = {_normal(name), *(ours.intersection(map(_normal, found.needs)))}
    missing = sorted(names.difference(map(_normal, re.split(r"[\s,]+", owned))))
    if missing:
        raise Refused(
            f"not published: OWNED_DISTRIBUTIONS names no {' and no '.join(missing)}, so on the "
            "index that may be somebody else's. Give what is yours there as the repository's "
            "variable OWNED_DISTRIBUTIONS; publish what is not under another name"
        )
    if not repository(root):
        raise Refused("the remote origin has no public address, which the metadata has to name")
    return found


def _normal(requirement: str) -> str:
    """The name that a requirement begins with, as an index compares it."""
    name = re.match(r"[\w.-]*", requirement)
    return re.sub(r"[-_.]+", "-", name[0].lower()) if name else ""


def repository(root: Path) -> str:
    """Where anybody finds this repository, as its remote ``origin`` says; "" if it says nothing."""
    remote = subprocess.run(
        ["git", "remote", "get-url", "origin"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    address = remote.stdout.strip()
    match = _SCP.fullmatch(address) or _REMOTE.fullmatch(address)
    return f"https://{match[1]}/{match[2].rstrip('/').removesuffix('.git')}" if match else ""


def stage(root: Path, name: str, folder: Path) -> None:
    """Copy what ``name`` is built from to ``folder``, its metadata with the URLs of the repository.

    They stand in no file of the repository, which may move or be forked.
    """
    source = find(root, name)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "dist")
    shutil.copytree(root / source.folder, folder, ignore=ignore)
    home = repository(root)
    if home:
        with (folder / "pyproject.toml").open("a") as pyproject:
            pyproject.write(
                "\n[project.urls]\n"
                f'Source = "{home}/tree/HEAD/{source.folder}"\n'
                f'Changelog = "{home}/blob/HEAD/{source.folder}/CHANGELOG.md"\n'
                f'Issues = "{home}/issues"\n'
            )


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"git {args[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def main(argv: Sequence[str]) -> int:
    """Run one command; what is refused is told on stderr, with status 1."""
    parser = argparse.ArgumentParser(prog="release", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("name")
    preparing.add_argument("version", nargs="?", default="", help="X.Y.Z, major, minor or patch")
    preparing.add_argument("--dry-run", action="store_true")
    preparing.add_argument(
        "--build", default="", help="what builds and tests it: dev.py build NAME"
    )
    checking = commands.add_parser("check")
    checking.add_argument("tag")
    checking.add_argument("--owned", required=True, help="names that are ours on the index")
    staging = commands.add_parser("stage")
    staging.add_argument("name")
    staging.add_argument("folder", type=Path)
    given = parser.parse_args(argv)
    root = given.root.resolve()
    try:
        if given.command == "prepare":
            build = shlex.split(given.build) or [sys.executable, "dev.py", "build", given.name]
            prepare(root, given.name, given.version, build=build, dry_run=given.dry_run)
        elif given.command == "check":
            found = check(root, given.tag, given.owned)
            print(f"name={found.name}\nfolder={found.folder}")
        else:
            stage(root, given.name, given.folder)
    except Refused as exc:
        print(f"release: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
