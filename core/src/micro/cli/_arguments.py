"""What the command is told: options that are a service's settings, and completion."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import get_completion_class

from micro.errors import MicroError
from micro.registry import Node, Registry
from micro.service import Service
from micro.settings import SETTINGS, Setting, Settings

F = TypeVar("F", bound=Callable[..., Any])

#: The settings of a service that concern one who only calls, as options.
_OPTIONS = (
    "registry",
    "registry_address",
    "transport",
    "client_request_timeout",
    "client_retries",
    "tls_cert_file",
    "tls_key_file",
    "tls_ca_file",
    "extensions",
    "log_level",
)
LOG_LEVEL = "error"
_ARGUMENTS = "micro.arguments"
_JSON = "micro.json"
#: Seconds that completion may take; a shell shows nothing meanwhile.
_COMPLETION = 1.2
COMPLETION_EPILOG = """\b
Add to the file that the shell reads when it starts:
  bash, ~/.bashrc                    eval "$(micro completion bash)"
  zsh, ~/.zshrc                      eval "$(micro completion zsh)"
  fish, ~/.config/fish/config.fish   micro completion fish | source"""


class Caller(Service):
    """The command's own service: extensions may wrap its calls, but it serves nothing of theirs."""

    def handle(self, handler: object, *, name: str | None = None) -> None: ...


# -- options --------------------------------------------------------------------------------------


def _keep(ctx: click.Context, option: click.Parameter, value: str | tuple[str, ...] | None) -> None:
    values = (value,) if isinstance(value, str) else value or ()
    ctx.meta.setdefault(_ARGUMENTS, []).extend(f"--{option.name}={one}" for one in values)


def _keep_json(
    ctx: click.Context,
    _option: click.Parameter,
    value: bool,  # noqa: FBT001 - click gives it so
) -> None:
    ctx.meta[_JSON] = value or wants_json(ctx)


def _keep_no_color(ctx: click.Context, _option: click.Parameter, value: str) -> None:
    if value:
        ctx.color = False


json_option = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    callback=_keep_json,
    help="for machines: one line of JSON; errors too, on stderr",
)
#: A variable only, https://no-color.org: any text in it turns colours off.
no_color_option = click.option(
    "--no_color",
    hidden=True,
    default="",
    envvar="NO_COLOR",
    expose_value=False,
    callback=_keep_no_color,
)


def service_options(function: F) -> F:
    """The options of _OPTIONS and ``--json``, kept for ``given`` and ``wants_json``.

    The group has them and so has each command, so that they stand before or after its name.
    """
    return setting_options(function, _OPTIONS)


def setting_options(function: F, names: Sequence[str]) -> F:
    """As ``service_options``, of these settings alone."""
    settings = {setting.name: setting for setting in SETTINGS}
    text = f"debug, info, warning or error; default {LOG_LEVEL}"
    settings["log_level"] = Setting("log_level", text)
    function = json_option(function)
    for name in reversed(names):
        keep = click.option(
            f"--{name}",
            metavar="TEXT",
            multiple=settings[name].is_repeated,
            help=settings[name].help,
            expose_value=False,
            callback=_keep,
        )
        function = keep(function)
    return function


def given(ctx: click.Context) -> list[str]:
    """The options of _OPTIONS that were given, as flags; those after the command are last."""
    arguments: list[str] = ctx.meta.get(_ARGUMENTS, [])
    return arguments


def wants_json(ctx: click.Context) -> bool:
    """Whether ``--json`` was given, before the command or after it."""
    return bool(ctx.meta.get(_JSON))


# -- completion -----------------------------------------------------------------------------------


def completion_script(command: click.Command, shell: str) -> str:
    """The script with which ``shell`` asks ``command`` what a word could become."""
    made = get_completion_class(shell)
    assert made is not None
    return made(command, {}, "micro", "_MICRO_COMPLETE").source()


def complete_service(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names of services that begin so."""
    return _beginning(incomplete, _asked(ctx, _names))


def complete_endpoint(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[str]:
    """The names of endpoints of the service, which stands before, that begin so."""

    async def endpoints(registry: Registry) -> set[str]:
        nodes: tuple[Node, ...] = await registry.get(ctx.params["service"])
        return {endpoint.name for node in nodes for endpoint in node.endpoints}

    return _beginning(incomplete, _asked(ctx, endpoints))


async def _names(registry: Registry) -> tuple[str, ...]:
    return await registry.services()


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def _asked(ctx: click.Context, question: Callable[[Registry], Any]) -> Iterable[str]:
    """What the registry answers; nothing when it does not, since a shell is being typed in."""
    logging.disable()
    try:
        return asyncio.run(_ask(Settings(given(ctx)), question))
    except (MicroError, TimeoutError):
        return ()
    finally:
        logging.disable(logging.NOTSET)


async def _ask(settings: Settings, question: Callable[[Registry], Any]) -> Iterable[str]:
    async with Caller("micro").opened(settings) as service, asyncio.timeout(_COMPLETION):
        answer: Iterable[str] = await question(await service.client.registered())
        return answer
