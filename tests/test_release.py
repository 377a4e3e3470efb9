"""A distribution is released on its own, and nothing is published that is not ours."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RELEASE = ROOT / "tools/release.py"
PROVENANCE = ROOT / "tools/provenance.py"
ORIGIN = "https://forge.example/owner/micro.git"

NOBODY = {
    **os.environ,
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{
        f"GIT_{role}_{what}": "nobody@example.org"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    },
}

PROJECT = """\
[project]
name = "{name}"
version = "{version}"
dependencies = [{needs}]

[tool.other]
version = "{version}-not-this-one"
"""
CORE_CHANGELOG = """\
# Changelog

## [Unreleased]

## [0.1.0]

### Added

- All of it.
"""
SAMPLE_CHANGELOG = """\
# Changelog

## [Unreleased]

### Fixed

- What was wrong.

## [1.2.3] - 2026-01-31

### Added

- What was new.
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with a core that was never released and a plugin that was."""
    tree = tmp_path / "tree"
    for folder, name, version, needs, changelog in (
        ("core", "micro-core", "0.1.0", "", CORE_CHANGELOG),
        (
            "plugins/sample",
            "micro-plugin-sample",
            "1.2.3",
            '"micro-core>=0.1,<0.2"',
            SAMPLE_CHANGELOG,
        ),
    ):
        (tree / folder).mkdir(parents=True)
        text = PROJECT.format(name=name, version=version, needs=needs)
        (tree / folder / "pyproject.toml").write_text(text)
        (tree / folder / "CHANGELOG.md").write_text(changelog)
    git(tree, "init", "--quiet", "--initial-branch=main")
    git(tree, "remote", "add", "origin", ORIGIN)
    commit(tree)
    return tree


def git(tree: Path, *args: str) -> str:
    """What git says."""
    done = subprocess.run(
        ["git", *args], cwd=tree, env=NOBODY, text=True, capture_output=True, check=True
    )
    return done.stdout.strip()


def commit(tree: Path) -> None:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "What was done")


def release(tree: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the tool on that tree."""
    command = [sys.executable, str(RELEASE), "--root", str(tree), *args]
    return subprocess.run(command, env=NOBODY, text=True, capture_output=True, check=False)


def prepare(tree: Path, *args: str, build: str = "true") -> subprocess.CompletedProcess[str]:
    """Prepare a release, with something quick in the place of building."""
    return release(tree, "prepare", "--build", build, *args)


def version(tree: Path, folder: str) -> str:
    table = tomllib.loads((tree / folder / "pyproject.toml").read_text())
    found: str = table["project"]["version"]
    return found


def state(tree: Path) -> tuple[str, ...]:
    """All that a release could change."""
    return git(tree, "rev-parse", "HEAD"), git(tree, "tag"), git(tree, "status", "--porcelain")


# -- preparing a release --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("patch", "1.2.4"), ("minor", "1.3.0"), ("major", "2.0.0"), ("1.2.10", "1.2.10")],
)
def test_the_version_rises_as_asked(tree: Path, wanted: str, expected: str) -> None:
    done = prepare(tree, "micro-plugin-sample", wanted)

    assert done.returncode == 0, done.stderr
    assert version(tree, "plugins/sample") == expected
    assert git(tree, "tag") == f"micro-plugin-sample/v{expected}"


def test_unreleased_lines_move_to_a_dated_section(tree: Path) -> None:
    assert prepare(tree, "micro-plugin-sample", "patch").returncode == 0

    changelog = (tree / "plugins/sample/CHANGELOG.md").read_text()
    heading = re.search(r"^## \[1\.2\.4\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert heading
    assert changelog.replace(f"{heading[0]}\n\n", "") == SAMPLE_CHANGELOG


def test_a_version_that_was_never_released_is_dated_and_kept(tree: Path) -> None:
    done = prepare(tree, "micro-core")

    assert done.returncode == 0, done.stderr
    assert version(tree, "core") == "0.1.0"
    assert git(tree, "tag") == "micro-core/v0.1.0"
    assert "## [0.1.0] - 20" in (tree / "core/CHANGELOG.md").read_text()


def test_a_release_is_one_commit_of_two_files_with_an_annotated_tag(tree: Path) -> None:
    before = git(tree, "rev-parse", "HEAD")

    assert prepare(tree, "micro-plugin-sample", "minor").returncode == 0

    assert git(tree, "rev-parse", "HEAD~1") == before
    assert git(tree, "log", "-1", "--format=%s") == "micro-plugin-sample 1.3.0"
    assert git(tree, "show", "--format=", "--name-only").split() == [
        "plugins/sample/CHANGELOG.md",
        "plugins/sample/pyproject.toml",
    ]
    assert git(tree, "diff", "HEAD~1", "--numstat", "--", "plugins/sample/pyproject.toml")[0] == "1"
    tag = "micro-plugin-sample/v1.3.0"
    assert git(tree, "cat-file", "-t", tag) == "tag"
    assert git(tree, "rev-parse", f"{tag}^{{}}") == git(tree, "rev-parse", "HEAD")
    assert git(tree, "status", "--porcelain") == ""


def test_a_release_pushes_nothing_and_says_how(tree: Path, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "elsewhere")
    git(tree, "remote", "set-url", "origin", str(tmp_path / "elsewhere"))

    done = prepare(tree, "micro-plugin-sample", "patch")

    assert "git push --atomic origin main micro-plugin-sample/v1.2.4" in done.stdout
    assert git(tmp_path / "elsewhere", "for-each-ref") == ""


def test_what_is_built_has_the_new_version(tree: Path) -> None:
    build = f"grep -q 1.2.4 {tree}/plugins/sample/pyproject.toml {tree}/plugins/sample/CHANGELOG.md"

    assert prepare(tree, "micro-plugin-sample", "patch", build=build).returncode == 0


@pytest.mark.parametrize("build", ["false", "no-such-program"])
def test_after_a_build_that_fails_all_is_as_before(tree: Path, build: str) -> None:
    before = state(tree)

    done = prepare(tree, "micro-plugin-sample", "patch", build=build)

    assert done.returncode == 1
    assert f"{build} failed; the files are as they were" in done.stderr
    assert state(tree) == before


def test_a_dry_run_shows_what_would_change_and_changes_nothing(tree: Path) -> None:
    before = state(tree)

    done = prepare(tree, "micro-plugin-sample", "minor", "--dry-run", build="touch built")

    assert done.returncode == 0, done.stderr
    assert '+version = "1.3.0"' in done.stdout
    assert "+## [1.3.0] - 20" in done.stdout
    assert "git tag micro-plugin-sample/v1.3.0" in done.stdout
    assert state(tree) == before


def dirty(tree: Path) -> None:
    (tree / "new").touch()


def on_a_branch(tree: Path) -> None:
    git(tree, "switch", "--quiet", "--create", "feature")


def tagged(tree: Path) -> None:
    git(tree, "tag", "micro-plugin-sample/v1.2.4")


def nothing_new(tree: Path) -> None:
    path = tree / "plugins/sample/CHANGELOG.md"
    path.write_text(path.read_text().replace("### Fixed\n\n- What was wrong.\n\n", ""))
    commit(tree)


def something_new_in_core(tree: Path) -> None:
    path = tree / "core/CHANGELOG.md"
    path.write_text(path.read_text().replace("[Unreleased]\n", "[Unreleased]\n\n- A way.\n"))
    commit(tree)


def as_it_is(tree: Path) -> None:
    assert (tree / "core").exists()


@pytest.mark.parametrize(
    ("change", "asked", "told"),
    [
        (dirty, "micro-plugin-sample patch", "the tree is not clean"),
        (on_a_branch, "micro-plugin-sample patch", "releases are made on main"),
        (tagged, "micro-plugin-sample patch", "is there already"),
        (nothing_new, "micro-plugin-sample patch", "nothing under Unreleased"),
        (as_it_is, "micro-plugin-sample 1.2.3", "is not above 1.2.3"),
        (as_it_is, "micro-plugin-sample 1.2.2", "is not above 1.2.3"),
        (as_it_is, "micro-plugin-sample 1.3", "write X.Y.Z"),
        (as_it_is, "micro-plugin-sample", "write X.Y.Z"),
        (as_it_is, "micro-plugin-etc minor", "known are micro-core, micro-plugin-sample"),
        (as_it_is, "micro-core patch", "nothing under Unreleased"),
        (as_it_is, "micro-core 0.1.1", "nothing under Unreleased"),
        (something_new_in_core, "micro-core", "[0.1.0] is not released yet"),
        (something_new_in_core, "micro-core 0.1.0", "[0.1.0] is not released yet"),
    ],
)
def test_a_release_is_refused(
    tree: Path, change: Callable[[Path], None], asked: str, told: str
) -> None:
    change(tree)
    before = state(tree)

    done = prepare(tree, *asked.split())

    assert done.returncode == 1
    assert told in done.stderr
    assert state(tree) == before


def test_a_core_that_a_plugin_does_not_take_is_refused(tree: Path) -> None:
    something_new_in_core(tree)

    done = prepare(tree, "micro-core", "minor")

    assert done.returncode == 1
    assert "micro-plugin-sample needs micro-core>=0.1,<0.2, which leaves 0.2.0 out" in done.stderr
    assert prepare(tree, "micro-core", "patch").returncode == 0


# -- before a tag is published --------------------------------------------------------------------


@pytest.fixture
def tag(tree: Path) -> str:
    """The tag of a release that was prepared."""
    assert prepare(tree, "micro-plugin-sample", "patch").returncode == 0
    return "micro-plugin-sample/v1.2.4"


@pytest.mark.parametrize(
    "owned",
    [
        "micro-core micro-plugin-sample",
        "other, micro-plugin-sample,micro-core",
        "Micro_Core\nmicro.plugin.sample",
    ],
)
def test_a_tag_of_ours_may_be_published(tree: Path, tag: str, owned: str) -> None:
    done = release(tree, "check", tag, "--owned", owned)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "name=micro-plugin-sample\nfolder=plugins/sample\n"


@pytest.mark.parametrize(
    ("owned", "missing"),
    [
        ("", "no micro-core and no micro-plugin-sample"),
        ("micro-plugin", "no micro-core and no micro-plugin-sample"),
        ("micro-core", "no micro-plugin-sample"),
        ("micro-plugin-sample", "no micro-core"),
    ],
)
def test_nothing_is_published_while_a_name_may_be_of_others(
    tree: Path, tag: str, owned: str, missing: str
) -> None:
    done = release(tree, "check", tag, "--owned", owned)

    assert done.returncode == 1
    assert f"not published: OWNED_DISTRIBUTIONS names {missing}, so" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('version = "1.2.4"', 'version = "1.2.5"', "is 1.2.5"),
        ("## [1.2.4] - ", "## [1.2.5] - ", "no dated section [1.2.4]"),
        ("## [1.2.4] - ", "## [1.2.4] by ", "no dated section [1.2.4]"),
        ("### Fixed\n\n- What was wrong.\n", "", "no dated section [1.2.4]"),
    ],
)
def test_tag_version_and_changelog_have_to_agree(
    tree: Path, tag: str, old: str, new: str, told: str
) -> None:
    for path in (tree / "plugins/sample").glob("*.*"):
        path.write_text(path.read_text().replace(old, new))

    done = release(tree, "check", tag, "--owned", "micro-core micro-plugin-sample")

    assert done.returncode == 1
    assert told in done.stderr


@pytest.mark.parametrize(
    "tag", ["v1.2.3", "micro-plugin-other/v1.2.3", "micro-plugin-sample/1.2.3"]
)
def test_a_tag_that_names_no_distribution_is_refused(tree: Path, tag: str) -> None:
    done = release(tree, "check", tag, "--owned", "micro-core micro-plugin-sample")

    assert done.returncode == 1
    assert "no distribution" in done.stderr


def test_nothing_is_published_without_an_address(tree: Path, tag: str) -> None:
    git(tree, "remote", "remove", "origin")

    done = release(tree, "check", tag, "--owned", "micro-core micro-plugin-sample")

    assert done.returncode == 1
    assert "has no public address" in done.stderr


def test_the_workflow_publishes_only_what_was_checked() -> None:
    jobs = (ROOT / ".github/workflows/release.yml").read_text().partition("\njobs:\n")[2]
    build, publish = re.split(r"^  publish:\n", jobs, flags=re.MULTILINE)

    refusal = build.index('tools/release.py check "$TAG" --owned "$OWNED"')
    assert "OWNED: ${{ vars.OWNED_DISTRIBUTIONS }}" in build[:refusal]
    assert refusal < build.index('dev.py build "$NAME"') < build.index("upload-artifact")
    assert "path: dist/${{ steps.check.outputs.folder }}\n" in build
    assert "continue-on-error" not in jobs
    assert "if:" not in jobs
    assert "    needs: build\n" in publish
    assert "pypa/gh-action-pypi-publish" not in build
    assert "pypa/gh-action-pypi-publish" in publish


def test_only_the_job_that_publishes_may_ask_for_a_token() -> None:
    workflow = (ROOT / ".github/workflows/release.yml").read_text()

    assert "secrets." not in workflow
    assert workflow.count("id-token: write") == 1
    assert workflow.index("\n  publish:\n") < workflow.index("id-token: write")
    assert "\npermissions:\n  contents: read\n" in workflow
    assert 'tags: ["*/v*"]' in workflow


# -- what is built --------------------------------------------------------------------------------


def staged(tree: Path, to: Path) -> dict[str, str]:
    """The URLs in the metadata of what would be built."""
    done = release(tree, "stage", "micro-plugin-sample", str(to))
    assert done.returncode == 0, done.stderr
    table = tomllib.loads((to / "pyproject.toml").read_text())
    urls: dict[str, str] = table["project"].get("urls", {})
    return urls


@pytest.mark.parametrize(
    "origin",
    [
        "https://forge.example/owner/micro",
        "https://forge.example/owner/micro.git",
        "https://name:secret@forge.example/owner/micro.git",
        "git@forge.example:owner/micro.git",
        "ssh://git@forge.example:2222/owner/micro.git",
    ],
)
def test_what_is_built_names_the_repository_it_is_built_in(
    tree: Path, tmp_path: Path, origin: str
) -> None:
    git(tree, "remote", "set-url", "origin", origin)

    assert staged(tree, tmp_path / "staged") == {
        "Source": "https://forge.example/owner/micro/tree/HEAD/plugins/sample",
        "Changelog": "https://forge.example/owner/micro/blob/HEAD/plugins/sample/CHANGELOG.md",
        "Issues": "https://forge.example/owner/micro/issues",
    }


@pytest.mark.parametrize("origin", ["/srv/git/micro.git", "../micro", "file:///srv/git/micro.git"])
def test_where_the_repository_has_no_public_address_none_is_invented(
    tree: Path, tmp_path: Path, origin: str
) -> None:
    git(tree, "remote", "set-url", "origin", origin)

    assert staged(tree, tmp_path / "staged") == {}


def test_staging_leaves_the_tree_alone(tree: Path, tmp_path: Path) -> None:
    before = state(tree)

    staged(tree, tmp_path / "staged")

    assert state(tree) == before


# -- what is installed ----------------------------------------------------------------------------


def installed(site: Path, name: str, direct_url: object = None) -> None:
    """Have a folder look as if a distribution were installed there."""
    info = site / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 9.9\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(json.dumps(direct_url))


def provenance(site: Path, *wheels: Path) -> subprocess.CompletedProcess[str]:
    """Run the check in an interpreter that has just what is in the folder, and pip."""
    return subprocess.run(
        [sys.executable, "-S", PROVENANCE, *wheels],
        env={**os.environ, "PYTHONPATH": str(site)},
        text=True,
        capture_output=True,
        check=False,
    )


def built(path: Path) -> tuple[Path, dict[str, object]]:
    """A wheel, and what an installer notes of it."""
    path.write_bytes(path.name.encode())
    shown = subprocess.run(["sha256sum", path], text=True, capture_output=True, check=True).stdout
    hashes = {"sha256": shlex.split(shown)[0]}
    return path, {"url": path.as_uri(), "archive_info": {"hashes": hashes}}


def test_what_was_built_here_is_installed(tmp_path: Path) -> None:
    core, noted = built(tmp_path / "micro_core.whl")
    installed(tmp_path / "site", "micro-core", noted)
    installed(tmp_path / "site", "microdot")

    done = provenance(tmp_path / "site", core)

    assert done.returncode == 0, done.stderr


def test_a_name_of_ours_from_an_index_is_found_out(tmp_path: Path) -> None:
    core, noted = built(tmp_path / "micro_core.whl")
    plugin, noted_too = built(tmp_path / "micro_plugin_sample.whl")
    installed(tmp_path / "site", "micro-core")
    installed(tmp_path / "site", "Micro_Plugin_Sample", noted_too)
    assert noted != noted_too

    done = provenance(tmp_path / "site", core, plugin)

    assert done.returncode == 1
    assert "micro-core 9.9 is not what was built here; from an index" in done.stderr
    assert "micro_core.whl is not installed" in done.stderr
    assert "sample" not in done.stderr


def test_another_wheel_of_that_name_is_found_out(tmp_path: Path) -> None:
    core, _ = built(tmp_path / "micro_core.whl")
    _, noted = built(tmp_path / "another.whl")
    installed(tmp_path / "site", "micro-core", noted)

    done = provenance(tmp_path / "site", core)

    assert done.returncode == 1
    assert f"micro-core 9.9 is not what was built here; from {noted['url']}" in done.stderr


def test_without_a_wheel_nothing_is_proven(tmp_path: Path) -> None:
    assert provenance(tmp_path).returncode == 1


def test_the_build_proves_where_each_wheel_was_installed_from() -> None:
    source = (ROOT / "noxfile.py").read_text().partition("def try_out(")[2]
    last_install = source.rindex('run("pip", "install"')
    assert last_install < source.index("tools/provenance.py") < source.index('run("pytest"')
