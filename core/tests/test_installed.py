"""What installed distributions offer. ``Site`` installs real ones, for other tests too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from micro.installed import GROUPS, Installed

Names = Mapping[str, str]
NONE: Names = {}


class Site:
    """A folder on ``sys.path`` that stands for all that is installed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        others = [entry for entry in sys.path if not list(Path(entry).glob("*.dist-info"))]
        monkeypatch.setattr(sys, "path", [str(folder), *others])

    def install(
        self,
        distribution: str,
        *,
        version: str = "1.0",
        backends: Names = NONE,
        commands: Names = NONE,
        extensions: Names = NONE,
        modules: Names = NONE,
        folder: Path | None = None,
    ) -> None:
        """Install these entry points (name: module) and these modules (name: text)."""
        folder = folder or self.folder
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")
        sections = zip(GROUPS, (backends, commands, extensions), strict=True)
        lines = [f"[{group}]\n{_lines(names)}\n" for group, names in sections if names]
        (info / "entry_points.txt").write_text("".join(lines))
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    def also(self, folder: Path) -> Path:
        """One more folder, at the end of ``sys.path``."""
        folder.mkdir()
        self._monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
        return folder

    def forget(self) -> None:
        """Make the next test import its own modules."""
        for name, module in list(sys.modules.items()):
            if str(self.folder) in str(getattr(module, "__file__", "")):
                del sys.modules[name]


def _lines(names: Names) -> str:
    return "\n".join(f"{name} = {module}" for name, module in names.items())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path, monkeypatch)
    yield site
    site.forget()


def test_nothing_is_offered_where_nothing_is_installed(site: Site) -> None:
    assert Installed().entries == ()


def test_entries_of_every_group_are_found_with_their_distribution(site: Site) -> None:
    site.install(
        "micro-plugin-x",
        version="1.2",
        backends={"x": "micro_plugin_x", "x+tls": "micro_plugin_x"},
        commands={"dump": "micro_plugin_x.commands"},
        extensions={"audit": "micro_plugin_x.audit"},
    )
    installed = Installed()
    assert installed.names("scheme") == ("x", "x+tls")
    assert installed.names("command") == ("dump",)
    assert installed.names("extension") == ("audit",)
    entry = installed.find("command", "dump")
    assert entry is not None
    assert (entry.owner, entry.module) == ("micro-plugin-x 1.2", "micro_plugin_x.commands")


def test_name_is_found_only_as_what_it_is(site: Site) -> None:
    site.install("micro-plugin-x", backends={"x": "micro_plugin_x"})
    assert Installed().find("scheme", "x")
    assert not Installed().find("command", "x")
    assert not Installed().find("scheme", "y")


def test_entry_points_of_other_groups_are_no_plugins(site: Site) -> None:
    site.install("stranger", backends={"x": "stranger"})
    file = site.folder / "stranger-1.0.dist-info" / "entry_points.txt"
    file.write_text(file.read_text().replace("micro.backends", "console_scripts"))
    assert Installed().entries == ()


def test_finding_loads_nothing(site: Site) -> None:
    site.install(
        "micro-plugin-x", backends={"x": "loud"}, modules={"loud": "raise RuntimeError('loaded')"}
    )
    entry = Installed().find("scheme", "x")
    assert entry is not None
    with pytest.raises(RuntimeError, match="loaded"):
        entry.load()


def test_distributions_that_claim_one_name_are_rivals(site: Site) -> None:
    site.install("micro-plugin-a", backends={"x": "a", "a": "a"})
    site.install("micro-plugin-b", backends={"x": "b"}, commands={"a": "b"}, version="2")
    told = {(entry.distribution, entry.name): entry.rivals for entry in Installed().entries}
    assert told == {
        ("micro-plugin-a", "a"): (),
        ("micro-plugin-a", "x"): ("micro-plugin-b 2",),
        ("micro-plugin-b", "a"): (),
        ("micro-plugin-b", "x"): ("micro-plugin-a 1.0",),
    }


@pytest.mark.parametrize("again", ["micro-plugin-x", "micro_plugin_x", "Micro.Plugin-X"])
def test_distribution_that_is_there_twice_is_one_and_the_first_copy_counts(
    site: Site, tmp_path: Path, again: str
) -> None:
    site.install("micro-plugin-x", version="2.0", backends={"x": "micro_plugin_x"})
    second = site.also(tmp_path / "second")
    site.install(again, version="1.0", backends={"x": "micro_plugin_x"}, folder=second)
    (entry,) = Installed().entries
    assert (entry.owner, entry.rivals) == ("micro-plugin-x 2.0", ())


def test_distribution_that_is_half_uninstalled_hides_no_other(site: Site) -> None:
    site.install("micro-plugin-x", backends={"x": "micro_plugin_x"})
    site.install("micro-plugin-y", backends={"y": "micro_plugin_y"})
    (site.folder / "micro_plugin_x-1.0.dist-info" / "METADATA").unlink()
    assert Installed().names("scheme") == ("x", "y")
    entry = Installed().find("scheme", "y")
    assert entry is not None
    assert entry.owner == "micro-plugin-y 1.0"


def test_entry_points_are_read_once(site: Site) -> None:
    installed = Installed()
    assert installed.names("scheme") == ()
    site.install("micro-plugin-x", backends={"x": "micro_plugin_x"})
    assert installed.names("scheme") == ()
    assert Installed().names("scheme") == ("x",)
