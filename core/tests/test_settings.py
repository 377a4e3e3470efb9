"""Settings: flags, the environment, and which of them wins."""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from hypothesis import given as property_of
from hypothesis import strategies as st

from micro.backend import NoOptions
from micro.errors import ConfigError
from micro.settings import SETTINGS, Settings, usage

VALUED = [setting.name for setting in SETTINGS if not setting.is_switch]
every_setting = pytest.mark.parametrize("name", VALUED)


def settings(*arguments: str, **environment: str) -> Settings:
    return Settings(arguments, environment)


def variable(name: str) -> str:
    return f"MICRO_{name.upper()}"


# -- which place wins --------------------------------------------------------------------------


@every_setting
def test_code_is_stronger_than_the_default(name: str) -> None:
    given = settings().text(name, "from code", "the default")
    assert (given.text, given.source) == ("from code", "code")


@every_setting
def test_default_is_taken_when_nothing_is_said(name: str) -> None:
    given = settings().text(name, None, "the default")
    assert (given.text, given.source) == ("the default", "default")


@every_setting
def test_environment_is_stronger_than_code(name: str) -> None:
    given = settings(**{variable(name): "from env"}).text(name, "from code")
    assert (given.text, given.source) == ("from env", variable(name))


@every_setting
def test_flag_is_stronger_than_the_environment(name: str) -> None:
    given = settings(f"--{name}", "from flag", **{variable(name): "from env"}).text(name, "code")
    assert (given.text, given.source) == ("from flag", f"--{name}")


@every_setting
def test_last_of_two_flags_wins(name: str) -> None:
    assert settings(f"--{name}=1", f"--{name}", "2").text(name, None).text == "2"


@every_setting
def test_empty_variable_says_nothing(name: str) -> None:
    assert settings(**{variable(name): ""}).text(name, "from code").text == "from code"


def test_environment_of_the_process_is_read_when_none_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MICRO_SERVER_NAME", "from the process")
    assert Settings().text("server_name", "code").text == "from the process"


@pytest.mark.parametrize("environment", [{}, {"MICRO_REGISTRY": "memory"}])
def test_environment_of_the_process_is_not_read_when_one_is_given(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.setenv("MICRO_SERVER_NAME", "from the process")
    assert Settings(environment=environment).text("server_name", "code").text == "code"


@pytest.mark.parametrize(
    ("environment", "colour"), [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)]
)
def test_colour_is_off_when_no_color_is_set(environment: dict[str, str], *, colour: bool) -> None:
    assert Settings(environment=environment).colour is colour


def test_arguments_of_the_process_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program", "--server_name", "from argv", "--nonsense"])
    assert Settings(environment={}).text("server_name", "code").text == "code"


def test_arguments_are_not_changed() -> None:
    arguments = ["--server_name", "x"]
    Settings(arguments, {})
    assert arguments == ["--server_name", "x"]


# -- flags -------------------------------------------------------------------------------------


@every_setting
def test_flag_may_be_written_with_an_equals_sign_or_a_blank(name: str) -> None:
    for arguments in ([f"--{name}", "a=b"], [f"--{name}=a=b"]):
        assert settings(*arguments).text(name, None).text == "a=b"


@pytest.mark.parametrize(
    "flag", ["--register_ttl", "--register-ttl", "--server_metadata", "--server-metadata"]
)
def test_flag_may_have_hyphens_or_underscores(flag: str) -> None:
    name = flag[2:].replace("-", "_")
    assert settings(flag, "x=1").text(name, None).text == "x=1"


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--registri", "--registry"),
        ("--server-nmae", "--server_name"),
        ("--register-tll=5s", "--register_ttl"),
        ("-registry", "--registry"),
        ("registry", "--registry"),
        ("--Registry", "--registry"),
    ],
)
def test_unknown_flag_is_refused_with_the_nearest(flag: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown argument .*; did you mean '{nearest}'"):
        settings(flag)


@pytest.mark.parametrize("word", ["zzzzzzzz", "-", "--", "---registry", "", "=", "--=x"])
def test_word_that_is_no_flag_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="unknown argument"):
        settings(word)


def test_unknown_flag_like_no_other_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(ConfigError) as caught:
        settings("--qqqqqq")
    assert all(f"--{setting.name}" in str(caught.value) for setting in SETTINGS)


@every_setting
@pytest.mark.parametrize("rest", [[], ["--server_insecure"]])
def test_flag_without_its_value_is_refused_with_what_it_is(name: str, rest: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"--{name} needs a value: ") as caught:
        settings(f"--{name}", *rest)
    assert next(s.help for s in SETTINGS if s.name == name) in str(caught.value)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_wanted_wherever_it_stands(flag: str) -> None:
    assert settings("--server_name", "x", flag, "--server_insecure").wants_help
    assert not settings("--server_name", "x").wants_help


def test_value_may_begin_with_one_hyphen() -> None:
    assert settings("--server_version", "-1").text("server_version", None).text == "-1"


@property_of(
    st.lists(st.sampled_from([*(f"--{s.name}" for s in SETTINGS), "x", "--y", "a=b"]) | st.text())
)
def test_any_arguments_are_read_or_a_config_error(arguments: list[str]) -> None:
    with suppress(ConfigError):
        settings(*arguments)


# -- URLs --------------------------------------------------------------------------------------

_RANKS = {"default": -1, "code": 0, "env": 1, "flag": 2}


@pytest.mark.parametrize(
    ("url_from", "address_from"),
    list(itertools.product(_RANKS, [(), ("env",), ("flag",), ("env", "flag")])),
)
def test_address_replaces_hosts_only_from_the_same_or_a_stronger_place(
    url_from: str, address_from: tuple[str, ...]
) -> None:
    arguments: list[str] = []
    environment: dict[str, str] = {}
    written = f"etcd://user:secret@{url_from}:1/prod?timeout=2"
    if url_from == "flag":
        arguments += ["--registry", written]
    if url_from == "env":
        environment["MICRO_REGISTRY"] = written
    if "flag" in address_from:
        arguments += ["--registry_address", "from-flag:2,b:3"]
    if "env" in address_from:
        environment["MICRO_REGISTRY_ADDRESS"] = "from-env:2,b:3"

    code = written if url_from == "code" else None
    default = written if url_from == "default" else "mdns"
    url = settings(*arguments, **environment).url("registry", code, default)

    strongest = max(address_from, key=_RANKS.__getitem__, default=None)
    if strongest is not None and _RANKS[strongest] >= _RANKS[url_from]:
        assert url.hosts == (f"from-{strongest}:2", "b:3")
    else:
        assert url.hosts == (f"{url_from}:1",)
    assert (url.scheme, url.path, url.query) == ("etcd", "prod", (("timeout", "2"),))
    assert (url.username, url.password) == ("user", "secret")


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "source"),
    [
        (["--registry", "!"], {}, None, "--registry"),
        ([], {"MICRO_REGISTRY": "!"}, None, "MICRO_REGISTRY"),
        ([], {}, "!", "code"),
        (["--registry="], {}, "memory", "--registry"),
    ],
)
def test_error_of_a_url_names_where_it_came_from(
    arguments: list[str], environment: dict[str, str], code: str | None, source: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{source}: "):
        settings(*arguments, **environment).url("registry", code, "mdns")


def test_url_has_the_source_it_came_from() -> None:
    given = settings("--registry", "memory", MICRO_TRANSPORT="http")
    assert given.url("registry", None, "mdns").source == "--registry"
    assert given.url("transport", "memory", "http").source == "MICRO_TRANSPORT"


def test_error_of_an_option_names_the_url_and_not_the_address_that_replaced_its_hosts() -> None:
    given = settings(MICRO_REGISTRY="memory://a?timout=1", MICRO_REGISTRY_ADDRESS="b:1")
    url = given.url("registry", None, "mdns")
    with pytest.raises(ConfigError, match=r"MICRO_REGISTRY[:, ]"):
        url.options(NoOptions)


@pytest.mark.parametrize("address", ["a:1,b:2", "a:1, b:2", " a:1 ,b:2,", ",a:1,,b:2"])
def test_addresses_are_separated_by_commas(address: str) -> None:
    given = settings("--registry_address", address)
    assert given.url("registry", "etcd", "mdns").hosts == ("a:1", "b:2")


# -- durations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("5s", 5), ("1m", 60), ("250ms", 0.25), ("5", 5)])
def test_duration_is_read_from_every_place(text: str, value: float) -> None:
    for given in (settings("--register_ttl", text), settings(MICRO_REGISTER_TTL=text)):
        assert given.duration("register_ttl", 7.0, 30.0) == value


@property_of(st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False))
def test_duration_in_code_is_the_number_that_it_is(value: float) -> None:
    assert settings().duration("register_ttl", value, 30.0) == value


@property_of(
    st.integers(1, 10**6), st.sampled_from([("ms", 0.001), ("s", 1), ("m", 60), ("h", 3600)])
)
def test_duration_is_number_times_unit(number: int, unit: tuple[str, float]) -> None:
    got = settings("--register_ttl", f"{number}{unit[0]}").duration("register_ttl", None, 30.0)
    assert got == pytest.approx(number * unit[1])


def test_duration_that_is_not_given_is_the_default() -> None:
    assert settings().duration("register_ttl", None, 30.0) == 30.0


@pytest.mark.parametrize("text", ["0", "0s", "-1", "-5s", "soon", "5d", "nan", "inf"])
def test_duration_that_is_not_more_than_0_is_refused_with_its_source(text: str) -> None:
    for given, source in (
        (settings("--register_ttl", text), "--register_ttl"),
        (settings(MICRO_REGISTER_TTL=text), "MICRO_REGISTER_TTL"),
    ):
        with pytest.raises(ConfigError, match=rf"^{source}: register_ttl: "):
            given.duration("register_ttl", 7.0, 30.0)


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.5, float("nan"), float("inf"), float("-inf")])
def test_duration_in_code_that_is_not_more_than_0_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^code: register_ttl: "):
        settings().duration("register_ttl", value, 30.0)


@pytest.mark.parametrize("arguments", [["--register_ttl="], ["--register_ttl", ""]])
def test_flag_with_an_empty_duration_is_refused_and_not_ignored(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--register_ttl: register_ttl: "):
        settings(*arguments).duration("register_ttl", 7.0, 30.0)


# -- switches ----------------------------------------------------------------------------------


def test_switch_is_off_by_default_and_on_by_its_flag_alone() -> None:
    assert not settings().switch("server_insecure")
    assert settings("--server_insecure").switch("server_insecure")


def test_switch_takes_no_word_after_it() -> None:
    given = settings("--server_insecure", "--server_name", "x")
    assert given.switch("server_insecure")
    with pytest.raises(ConfigError, match="'true'"):
        settings("--server_insecure", "true")


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        ("On", True),
        ("0", False),
        ("false", False),
        ("No", False),
        ("off", False),
    ],
)
def test_switch_takes_yes_and_no_from_every_place(text: str, *, on: bool) -> None:
    assert settings(f"--server_insecure={text}").switch("server_insecure") is on
    assert settings(MICRO_SERVER_INSECURE=text).switch("server_insecure") is on


def test_flag_turns_off_what_the_environment_turned_on() -> None:
    given = settings("--server_insecure=false", MICRO_SERVER_INSECURE="1")
    assert not given.switch("server_insecure")


@pytest.mark.parametrize("text", ["maybe", "2", "yes please"])
def test_switch_that_is_neither_yes_nor_no_is_refused_with_its_source(text: str) -> None:
    text_of_error = "^MICRO_SERVER_INSECURE: server_insecure: write true or false"
    with pytest.raises(ConfigError, match=text_of_error):
        settings(MICRO_SERVER_INSECURE=text).switch("server_insecure")


# -- pairs -------------------------------------------------------------------------------------


def test_repeated_metadata_adds_up() -> None:
    given = settings("--server_metadata", "a=1", "--server-metadata=b=2,c=3")
    assert given.pairs("server_metadata", {}) == {"a": "1", "b": "2", "c": "3"}


def test_stronger_metadata_wins_key_by_key() -> None:
    given = settings("--server_metadata", "c=flag", MICRO_SERVER_METADATA="b=env,c=env")
    code = {"a": "code", "b": "code", "c": "code"}
    assert given.pairs("server_metadata", code) == {"a": "code", "b": "env", "c": "flag"}
    assert code == {"a": "code", "b": "code", "c": "code"}


def test_last_of_two_pairs_for_a_key_wins() -> None:
    given = settings("--server_metadata", "a=1,a=2", "--server_metadata", "a=3")
    assert given.pairs("server_metadata", {}) == {"a": "3"}


def test_value_of_a_pair_may_have_an_equals_sign_or_be_empty() -> None:
    given = settings("--server_metadata", " a = b=c , d=")
    assert given.pairs("server_metadata", {}) == {"a": "b=c", "d": ""}


@pytest.mark.parametrize("text", ["a", "=b", " =b", "a=1,b", "a=1,", ",", ""])
def test_text_that_is_no_pairs_is_refused_with_its_source(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--server_metadata: server_metadata: .*not key=value"):
        settings(f"--server_metadata={text}").pairs("server_metadata", {})


# -- names -------------------------------------------------------------------------------------


def test_names_of_all_places_add_up_in_the_order_of_their_strength() -> None:
    given = settings("--extensions", "d", "--extensions=e,c", MICRO_EXTENSIONS="c,b")
    assert list(given.names("extensions", ("a", "b"))) == ["a", "b", "c", "d", "e"]


def test_name_has_the_weakest_source_that_says_it() -> None:
    given = settings("--extensions=a,b,c", MICRO_EXTENSIONS="a,b")
    sources = {"a": "code", "b": "MICRO_EXTENSIONS", "c": "--extensions"}
    assert given.names("extensions", ["a"]) == sources


@pytest.mark.parametrize("text", [" a , b ", "a,b,", ",a,,b"])
def test_blanks_between_names_say_nothing(text: str) -> None:
    assert list(settings(MICRO_EXTENSIONS=text).names("extensions", ())) == ["a", "b"]


# -- help --------------------------------------------------------------------------------------


def test_usage_has_the_program_and_every_setting_with_its_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["greeter.py"])
    shown = usage()
    assert "greeter.py" in shown
    for setting in SETTINGS:
        assert any(
            setting.help in line and f"--{setting.name} " in line for line in shown.split("\n")
        )


def test_usage_says_how_a_flag_is_named_as_a_variable() -> None:
    assert "MICRO_<FLAG>" in usage()


def test_names_of_settings_are_distinct() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
