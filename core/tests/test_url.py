"""URLs of backends: what they hold, and what they never tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from micro.errors import ConfigError
from micro.url import URL, seconds, suggestion

SECRET = "s3cr3t"


class Options(msgspec.Struct, frozen=True):
    timeout: float = 5.0
    tls: bool = False
    retries: int = 3
    prefix: str = ""


# -- reading -----------------------------------------------------------------------------------


def test_every_part_is_read() -> None:
    url = URL.parse(
        "etcd://user:secret@a:2379,b:2379/prod/eu?timeout=2&tls=true", source="--registry"
    )
    assert url.scheme == "etcd"
    assert url.hosts == ("a:2379", "b:2379")
    assert url.path == "prod/eu"
    assert url.query == (("timeout", "2"), ("tls", "true"))
    assert (url.username, url.password) == ("user", "secret")
    assert url.source == "--registry"


@pytest.mark.parametrize("word", ["memory", "mdns", "a", "h2c", "redis+tls", "x-y.z"])
def test_bare_word_is_that_scheme_with_its_defaults(word: str) -> None:
    assert URL.parse(word) == URL(scheme=word) == URL.parse(f"{word}://")


def test_hosts_are_kept_in_order() -> None:
    assert URL.parse("etcd://c,a,b").hosts == ("c", "a", "b")


@pytest.mark.parametrize("text", ["x://,a,,b,", "x://a,b"])
def test_empty_hosts_are_left_out(text: str) -> None:
    assert URL.parse(text).hosts == ("a", "b")


def test_ipv6_host_keeps_its_brackets() -> None:
    assert URL.parse("etcd://[::1]:2379,[fe80::1]:1/x").hosts == ("[::1]:2379", "[fe80::1]:1")


@pytest.mark.parametrize("path", ["prod", "prod/", "/prod", "/prod/"])
def test_path_is_without_its_slashes(path: str) -> None:
    assert URL.parse(f"x://a/{path}").path == "prod"


def test_path_without_hosts_is_read() -> None:
    assert URL.parse("memory:///prod") == URL(scheme="memory", path="prod")


def test_encoded_characters_are_read() -> None:
    url = URL.parse("x://us%40er:p%2Fw%3A%3F@a/na%20me?q=%26+b")
    assert (url.username, url.password) == ("us@er", "p/w:?")
    assert (url.path, url.query) == ("na me", (("q", "& b"),))


def test_password_may_have_colons() -> None:
    assert URL.parse("x://u:a:b:c@h").password == "a:b:c"


def test_password_may_have_an_at_sign() -> None:
    url = URL.parse("x://u:p@ss@h")
    assert (url.username, url.password, url.hosts) == ("u", "p@ss", ("h",))


def test_blanks_around_it_are_ignored() -> None:
    assert URL.parse(" memory\n") == URL(scheme="memory")


def test_option_without_a_value_is_empty() -> None:
    assert URL.parse("x://a?flag").query == (("flag", ""),)


def test_bare_word_may_have_options() -> None:
    assert URL.parse("mdns?ttl=5s&a=b") == URL.parse("mdns://?ttl=5s&a=b")
    assert URL.parse("mdns?ttl=5s").query == (("ttl", "5s"),)


def test_source_is_code_by_default() -> None:
    assert URL.parse("memory").source == "code"


@pytest.mark.parametrize(
    "text", ["", "://", "://a", "127.0.0.1:2379", "MEMORY", "9p://a", "a b://c", "x_y", "é"]
)
def test_text_that_is_no_url_is_refused_with_its_source_and_what_to_write(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^MICRO_REGISTRY: .*scheme://host:port"):
        URL.parse(text, source="MICRO_REGISTRY")


@given(st.text())
def test_parse_raises_nothing_but_config_error(text: str) -> None:
    with suppress(ConfigError):
        URL.parse(text)


def test_url_is_frozen() -> None:
    with pytest.raises(AttributeError):
        URL.parse("memory").path = "x"  # type: ignore[misc]


# -- writing -----------------------------------------------------------------------------------

_word = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=8)
_any = st.text(st.characters(codec="utf-8"), max_size=8)
_host = st.from_regex(
    r"[a-z0-9.-]{1,9}(:[0-9]{1,5})?|\[[0-9a-f:]{2,9}\](:[0-9]{1,5})?", fullmatch=True
)


def urls(text: st.SearchStrategy[str]) -> st.SearchStrategy[URL]:
    return st.builds(
        URL,
        scheme=st.from_regex(r"[a-z][a-z0-9+.-]{0,8}", fullmatch=True),
        hosts=st.lists(_host, max_size=3).map(tuple),
        path=text.map(lambda path: path.strip("/")),
        query=st.lists(st.tuples(text.filter(bool), text), max_size=3).map(tuple),
        username=text,
    )


@given(url=urls(_word), has_password=st.booleans())
def test_text_of_a_url_is_read_as_the_same_url(url: URL, *, has_password: bool) -> None:
    with_password = msgspec.structs.replace(url, password=SECRET if has_password else "")
    again = URL.parse(str(with_password))
    assert msgspec.structs.replace(again, password="") == url
    assert bool(again.password) == has_password


@given(url=urls(_any), has_password=st.booleans())
def test_text_of_a_url_with_any_characters_is_read_as_the_same_url(
    *, url: URL, has_password: bool
) -> None:
    with_password = msgspec.structs.replace(url, password=SECRET if has_password else "")
    again = URL.parse(str(with_password))
    assert msgspec.structs.replace(again, password="") == url


@pytest.mark.parametrize(
    "text", ["memory", "etcd://a:1,b:2/prod?timeout=2", "memory://name", "mdns://?a=1"]
)
def test_text_of_a_url_is_what_was_written(text: str) -> None:
    assert str(URL.parse(text)) == repr(URL.parse(text)) == text


# -- the password ------------------------------------------------------------------------------


def told(text: str) -> str:
    """Everything that a user can see of a URL."""
    try:
        url = URL.parse(text, source="--registry")
    except ConfigError as exc:
        return f"{exc} {exc!r}"
    shown = f"{url} {url!r} {url:}"
    try:
        url.options(Options)
    except ConfigError as exc:
        shown += f"{exc} {exc!r}"
    return shown


@pytest.mark.parametrize(
    "text",
    [
        f"etcd://user:{SECRET}@a:2379,b:2379/prod?timeout=2",
        f"etcd://:{SECRET}@a",
        f"etcd://user:{SECRET}@",
        f"etcd://user:{SECRET}@a?timeout=never",
        f"etcd://user:{SECRET}@a?nonsense=1",
        f"etcd://user:p@{SECRET}@a",
        f"etcd://user:p:{SECRET}@a",
        f"etcd://user:p@w/{SECRET}@a",
        f"etcd://user:p@w?{SECRET}@a",
        f"user:{SECRET}@a:2379",
        f"Etcd://user:{SECRET}@a",
        f"etcd:user:{SECRET}@a",
        f"etcd//user:{SECRET}@a",
        f"://user:{SECRET}@a",
        f"user:{SECRET}@a://b",
        f"user:{SECRET}?b@a:2379",
    ],
)
def test_password_is_in_no_text(text: str) -> None:
    assert SECRET not in told(text)


@pytest.mark.parametrize("separator", ["/", "?", "#"])
def test_password_with_a_separator_that_is_not_encoded_is_in_no_text(separator: str) -> None:
    """As in generated passwords: base64 has slashes."""
    assert SECRET not in told(f"etcd://user:pw{separator}{SECRET}@a:2379/prod")


@given(st.from_regex(r"[!-~]{0,4}", fullmatch=True), st.from_regex(r"[!-~]{0,4}", fullmatch=True))
def test_password_with_any_characters_is_in_no_text(before: str, after: str) -> None:
    text = f"etcd://user:{before}{SECRET}{after}@a:2379"
    assume(URL_LIKE.fullmatch(text))
    assert SECRET not in told(text)


URL_LIKE = re.compile(r"etcd://user:[^@]*@a:2379")


# -- options -----------------------------------------------------------------------------------


def test_options_that_are_not_given_have_their_defaults() -> None:
    assert URL.parse("x").options(Options) == Options()


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5.0), ("5s", 5.0), ("1m", 60.0), ("250ms", 0.25), ("1h", 3600.0), ("0.5", 0.5)],
)
def test_float_option_takes_durations(text: str, value: float) -> None:
    assert URL.parse(f"x://a?timeout={text}").options(Options).timeout == value


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False)]
)
def test_boolean_option_takes_true_and_false(text: str, *, value: bool) -> None:
    assert URL.parse(f"x://a?tls={text}").options(Options).tls is value


def test_int_option_takes_a_number() -> None:
    assert URL.parse("x://a?retries=7").options(Options).retries == 7


def test_str_option_is_taken_as_it_is() -> None:
    assert URL.parse("x://a?prefix=5").options(Options).prefix == "5"


@pytest.mark.parametrize("query", ["retries=many", "retries=1.5", "tls=perhaps", "timeout=soon"])
def test_value_that_does_not_fit_is_refused_with_source_scheme_and_option(query: str) -> None:
    name = query.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^--registry: etcd: .*{name}"):
        URL.parse(f"etcd://a?{query}", source="--registry").options(Options)


def test_misspelt_option_is_refused_with_the_nearest() -> None:
    text = re.escape("--registry: etcd: unknown option 'timout'; did you mean 'timeout'?")
    with pytest.raises(ConfigError, match=text):
        URL.parse("etcd://a?timout=1", source="--registry").options(Options)


def test_option_like_no_other_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(ConfigError, match="known are prefix, retries, timeout, tls"):
        URL.parse("etcd://a?zzzzzz=1").options(Options)


def test_option_of_what_takes_none_is_refused_so() -> None:
    class Nothing(msgspec.Struct):
        pass

    with pytest.raises(ConfigError, match="'timeout'; it takes none"):
        URL.parse("memory://a?timeout=1").options(Nothing)


@given(st.lists(st.tuples(st.sampled_from(["timeout", "tls", "retries", "prefix", "x"]), _any)))
def test_options_raise_nothing_but_config_error(query: list[tuple[str, str]]) -> None:
    with suppress(ConfigError):
        URL(scheme="x", query=tuple(query)).options(Options)


# -- durations ---------------------------------------------------------------------------------

_UNITS: dict[str, Callable[[float], float]] = {
    "": lambda number: number,
    "ms": lambda number: number / 1000,
    "s": lambda number: number,
    "m": lambda number: number * 60,
    "h": lambda number: number * 3600,
}


@given(st.decimals(0, 10**6, places=3), st.sampled_from(sorted(_UNITS)))
def test_duration_is_number_times_unit(number: object, unit: str) -> None:
    meant = _UNITS[unit](float(str(number)))
    assert seconds(f"{number}{unit}", "x") == pytest.approx(meant)


@pytest.mark.parametrize(
    "text", ["", "s", "5 s", "-1", "5d", "1e3", "nan", "inf", "0x10", "1_0", "5s5s", "five", "."]
)
def test_text_that_is_no_duration_is_refused_with_what_it_was_for(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--register_ttl: .*write 5s, 1m, 250ms or seconds"):
        seconds(text, "--register_ttl")


@given(st.text(max_size=10))
def test_duration_is_finite_and_not_negative_or_refused(text: str) -> None:
    with suppress(ConfigError):
        assert 0 <= seconds(text, "x") < float("inf")


# -- suggestions -------------------------------------------------------------------------------


def test_suggestion_is_the_nearest_word() -> None:
    assert suggestion("memroy", ("mdns", "memory")) == "; did you mean 'memory'?"


def test_suggestion_without_a_near_word_is_all_of_them_sorted() -> None:
    assert suggestion("zzz", ("mdns", "etcd")) == "; known are etcd, mdns"
