"""docs/go-micro.md: it tells what the tests of the fleet found, all of it and no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.interop.columns import REGISTRIES, VERSIONS, Column
from tests.interop.test_fleet import TestFleet as Fleet

from micro.testing._promises import promises

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "go-micro.md").read_text()

each_version = pytest.mark.parametrize("version", VERSIONS)


def block(version: str) -> str:
    """What a run has written of a version."""
    found = re.search(rf"<!-- fleet: {re.escape(version)} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def rows(version: str) -> list[list[str]]:
    """The cells of its table, with the head and without the line below that."""
    lines = [line for line in block(version).splitlines() if line.startswith("| ")]
    head, _, *body = [line.strip("| ").split(" | ") for line in lines]
    return [head, *body]


@each_version
def test_table_has_every_test_and_every_registry_and_no_others(version: str) -> None:
    head, *body = rows(version)
    assert [test for test, *_ in body] == [name.replace("_", " ") for name in promises(Fleet)]
    assert head == ["promise", *(f"`{registry}`" for registry in sorted(REGISTRIES))]


@each_version
def test_every_promise_is_kept_or_the_page_says_why_it_cannot_be(version: str) -> None:
    (_, *registries), *body = rows(version)
    for _, *cells in body:
        for registry, cell in zip(registries, cells, strict=True):
            why = Column(registry.strip("`"), version).cannot
            if why:
                assert f"{cell} {why}\n" in block(version)
            else:
                assert cell == "yes"


@each_version
def test_page_names_the_modules_that_were_run(version: str) -> None:
    text = (ROOT / "tests/interop" / version.partition(".")[0] / "go.mod").read_text()
    needed = re.findall(r"^\t(\S*micro\S*) (v\S+)$", text, re.MULTILINE)
    assert any(number == version for _, number in needed)
    section = PAGE.partition(f"<!-- fleet: {version} -->")[0].rpartition("### ")[2]
    for module, number in needed:
        name = module.rpartition("registry/")[2]
        assert re.search(rf"`{re.escape(name)}`\s{re.escape(number)}", section), module
