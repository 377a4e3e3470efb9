"""Every Python snippet of the documentation runs, and its tables tell what is."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import CodeType, ModuleType

import pytest

import micro
from micro.settings import SETTINGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "core" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[CodeType]:
    """The Python blocks of a page, each with the line numbers of the page."""
    text = page.read_text()
    blocks = []
    for match in _BLOCK.finditer(text):
        shifted = "\n" * text.count("\n", 0, match.start(1)) + match[1]
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        blocks.append(compile(shifted, str(page), "exec", flags, dont_inherit=True))
    return blocks


@asynccontextmanager
async def running(module: ModuleType, code: CodeType) -> AsyncIterator[None]:
    """The page's own service, for a snippet that calls it from a service of its own."""
    service = getattr(module, "service", None)
    if isinstance(service, micro.Service) and "web" in code.co_consts:
        async with service:
            yield
    else:
        yield


@pytest.mark.asyncio
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
async def test_every_snippet_runs(page: Path) -> None:
    module = ModuleType(f"page_{page.stem}")
    sys.modules[module.__name__] = module
    for code in snippets(page):
        async with running(module, code):
            result = eval(code, vars(module))
            if inspect.iscoroutine(result):
                await result


def test_there_are_snippets_to_run() -> None:
    assert sum(len(snippets(page)) for page in PAGES) >= 6


def test_settings_page_has_every_setting_and_no_other() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert re.findall(r"^\| `--(\w+)`", page, re.MULTILINE) == [one.name for one in SETTINGS]
    assert re.findall(r"`MICRO_(\w+)`", page) == [one.name.upper() for one in SETTINGS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
