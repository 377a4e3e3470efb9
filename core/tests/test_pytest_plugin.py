"""The fixtures and the reports of the pytest plugin, seen from projects that use it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

NOT_THERE = "/nowhere/etcd"
WHY = (
    f"etcd is not available: no {NOT_THERE}: "
    "install it, or `export MICRO_TEST_ETCD_BIN=/path/to/it`"
)
NOT_OURS = (
    "etcd of its own is not available: "
    "MICRO_TEST_ETCD names one that tests may not kill: `unset MICRO_TEST_ETCD`"
)

# Importing hypothesis would take most of the time.
INI = """
[pytest]
addopts = -p no:hypothesispytest
filterwarnings = error
asyncio_default_fixture_loop_scope = function
"""

#: In one process, and spread over two: what tests tell has to reach the one that reports.
everywhere = pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["alone", "xdist"])


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with the plugin, on a machine without etcd."""
    pytester.makeini(INI)
    pytester.makeconftest('pytest_plugins = ["micro.testing.pytest_plugin"]')
    monkeypatch.setenv("MICRO_TEST_ETCD_BIN", NOT_THERE)
    for variable in ("MICRO_TEST_ETCD", "MICRO_TEST_REQUIRE"):
        monkeypatch.delenv(variable, raising=False)
    return pytester


# -- servers --------------------------------------------------------------------------------------

NEEDS_ETCD = """
    import pytest

    def test_kills(etcd):
        etcd.kill()

    @pytest.mark.parametrize("number", range(3))
    def test_uses(etcd_url, number):
        assert etcd_url.startswith("etcd://")

    def test_needs_nothing():
        pass

    def test_is_skipped_anyway():
        pytest.skip("for another reason")
"""


@everywhere
def test_last_lines_say_what_was_not_available(
    project: pytest.Pytester, processes: tuple[str, ...]
) -> None:
    project.makepyfile(NEEDS_ETCD)
    result = project.runpytest_subprocess(*processes)
    result.assert_outcomes(passed=1, skipped=5)
    assert result.outlines[-2:] == [f"4 skipped: {WHY}", "5 skipped in all"]


@everywhere
def test_what_is_required_and_not_available_is_a_failure(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, processes: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MICRO_TEST_REQUIRE", "all")
    project.makepyfile(NEEDS_ETCD)
    result = project.runpytest_subprocess(*processes)
    result.assert_outcomes(passed=1, skipped=1, errors=4)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.outlines[-2:] == [f"4 failed: {WHY}", "1 skipped in all"]


@pytest.mark.parametrize(
    ("names", "outcome"), [("redis,etcd", {"errors": 1}), ("redis", {"skipped": 1})]
)
def test_required_are_those_that_are_named(
    project: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    outcome: dict[str, int],
) -> None:
    monkeypatch.setenv("MICRO_TEST_REQUIRE", names)
    project.makepyfile(NEEDS_ETCD)
    project.runpytest_subprocess("-k", "kills").assert_outcomes(deselected=5, **outcome)


@everywhere
def test_running_server_is_used_and_not_killed(
    project: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    processes: tuple[str, ...],
) -> None:
    monkeypatch.setenv("MICRO_TEST_ETCD", "etcd://user:secret@a:1,b:2/base/?timeout=2")
    monkeypatch.setenv("MICRO_TEST_REQUIRE", "all")
    project.makepyfile(
        """
        import re

        def test_kills(etcd):
            etcd.kill()

        def test_uses(etcd_url):
            assert re.fullmatch(
                r"etcd://user:secret@a:1,b:2/base/test-[0-9a-f]{12}\\?timeout=2", etcd_url
            )
        """
    )
    result = project.runpytest_subprocess(*processes)
    result.assert_outcomes(passed=1, skipped=1)
    assert result.outlines[-2:] == [f"1 skipped: {NOT_OURS}", "1 skipped in all"]


def test_nothing_is_said_where_all_was_available(project: pytest.Pytester) -> None:
    project.makepyfile(NEEDS_ETCD)
    result = project.runpytest_subprocess("-k", "needs_nothing or anyway")
    result.assert_outcomes(passed=1, skipped=1, deselected=4)
    assert "=" in result.outlines[-1]


def test_etcd_url_is_of_a_server_that_answers_and_of_one_test(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, etcd_binary: Path
) -> None:
    monkeypatch.setenv("MICRO_TEST_ETCD_BIN", str(etcd_binary))
    project.makepyfile(
        """
        import pytest

        urls = set()

        @pytest.mark.parametrize("end", ["kill", "stop", "pause"])
        def test_url(etcd, etcd_url, end):
            assert etcd.answers()
            assert etcd_url.startswith(f"{etcd.url}/")
            urls.add(etcd_url)
            getattr(etcd, end)()

        def test_all_differ(etcd, etcd_url):
            assert etcd.answers()
            assert len(urls) == 3
            print(f"pid={etcd.pid}")
        """
    )
    result = project.runpytest_subprocess("-s")
    result.assert_outcomes(passed=4)
    (line,) = [line for line in result.outlines if "pid=" in line]
    assert not Path("/proc", line.partition("pid=")[2]).exists()


def test_server_of_a_third_party_is_reported_too(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import pytest
        from micro.testing import NotAvailable, available
        from micro.testing.environment import program

        pytest_plugins = ["micro.testing.pytest_plugin"]

        @pytest.fixture(scope="session")
        def redis_binary():
            return available("redis", lambda: program("redis", "redis-server-of-nobody"))
        """
    )
    project.makepyfile("def test_redis(redis_binary): pass")
    result = project.runpytest_subprocess()
    result.assert_outcomes(skipped=1)
    assert result.outlines[-2] == (
        "1 skipped: redis is not available: no redis-server-of-nobody: "
        "install it, or `export MICRO_TEST_REDIS_BIN=/path/to/it`"
    )


# -- conformance ----------------------------------------------------------------------------------


SUITES = """
    import pytest

    from micro.backends.http import HTTPTransport
    from micro.backends.memory import MemoryRegistry, MemoryTransport
    from micro.testing import RegistrySuite, TransportSuite

    class TestRegistry(RegistrySuite):
        backend = MemoryRegistry

        def test_sample_passes(self, request):
            request.node.user_properties.append(("micro.features", "history ttl=0.01"))

        @pytest.mark.parametrize("text", ["a::b", "c"])
        def test_sample_fails(self, text):
            assert False

        @pytest.fixture
        def broken(self):
            yield
            assert False

        def test_sample_passes_and_cannot_be_torn_down(self, broken):
            pass

        def test_sample_is_skipped(self):
            pytest.skip()

    class TestTransport(TransportSuite):
        backend = MemoryTransport

        def test_sample_passes(self):
            pass

    class TestTheSameAgain(TestTransport):
        pass

    class TestHTTP(TransportSuite):
        backend = HTTPTransport

        def test_sample_is_skipped(self):
            pytest.skip()

    class TestOther:
        backend = MemoryRegistry

        def test_sample_passes(self):
            pass
"""


@everywhere
def test_table_shows_what_suites_found(
    project: pytest.Pytester, processes: tuple[str, ...]
) -> None:
    project.makepyfile(SUITES)
    result = project.runpytest_subprocess("-k", "sample", *processes)
    start = next(n for n, line in enumerate(result.outlines) if " conformance " in line)
    assert result.outlines[start + 1 : start + 5] == [
        "backend           passed  skipped  failed  features",
        "http transport         0        1       0",
        "memory registry        1        1       3  history ttl=0.01",
        "memory transport       2        0       0",
    ]


@everywhere
def test_file_that_cannot_be_collected_is_an_error_like_any(
    project: pytest.Pytester, processes: tuple[str, ...]
) -> None:
    project.makepyfile("raise ZeroDivisionError")
    result = project.runpytest_subprocess(*processes)
    result.assert_outcomes(errors=2 if processes else 1)  # one in each process
    assert "AttributeError" not in result.stdout.str() + result.stderr.str()


def test_no_table_without_suites(project: pytest.Pytester) -> None:
    project.makepyfile("def test_it(): pass")
    assert "conformance" not in project.runpytest_subprocess().stdout.str()


# -- the table of promises ------------------------------------------------------------------------

PAGE = """\
before
<!-- conformance: registry -->
| promise | `old` |
<!-- end -->
<!-- conformance: transport -->
kept
<!-- end -->
after
"""

SUITE = """
    import pytest
    from micro.backends.memory import MemoryRegistry
    from micro.testing import RegistrySuite

    class TestOne(RegistrySuite):
        backend = MemoryRegistry

        @pytest.fixture
        def url(self):
            return "memory://suite"

        async def test_get_unknown(self):
            raise ValueError
"""


@everywhere
def test_conformance_option_writes_which_promise_is_kept(
    project: pytest.Pytester, processes: tuple[str, ...]
) -> None:
    page = project.path / "page.md"
    page.write_text(PAGE)
    project.makepyfile(SUITE)
    chosen = "get_unknown or close_idempotent or init_bad_address or names_distinct"
    project.runpytest_subprocess(*processes, "--conformance", "page.md", "-k", chosen)
    told = page.read_text()
    assert told.startswith("before\n<!-- conformance: registry -->\n| promise | `memory` |\n")
    for row in (
        "| get unknown | **no** |",
        "| close idempotent | yes |",
        "| names distinct | yes |",
        "| init bad address | 1) |",
        "| two watchers | not run |",
        "\n1) no server",
    ):
        assert f"{row}\n" in told
    assert told.endswith("<!-- conformance: transport -->\nkept\n<!-- end -->\nafter\n")
