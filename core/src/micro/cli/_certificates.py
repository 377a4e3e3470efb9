"""``micro cert``: an authority for development, and the certificates that it signs."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from micro._x509 import is_spiffe
from micro.cli import _arguments, _output
from micro.errors import ConfigError
from micro.logs import printable
from micro.registry import check_service

if TYPE_CHECKING:
    from micro._signing import Signer

F = TypeVar("F", bound=Callable[..., Any])

#: What the files of the authority are called, before .pem and .key.
_CA = "ca"
_DOMAIN = "micro.internal"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FOLDER = click.Path(file_okay=False, path_type=Path)


def _written_options(days: int) -> Callable[[F], F]:
    """What both commands have; ``days`` is the default."""

    def add(function: F) -> F:
        function = _arguments.json_option(function)
        function = click.option("--force", is_flag=True, help="write over files that are there")(
            function
        )
        return click.option(
            "--days",
            type=click.IntRange(1, 3650),
            default=days,
            help=f"how long it is valid; default {days}",
        )(function)

    return add


@click.group("cert", invoke_without_command=True)
@click.pass_context
def cert_command(ctx: click.Context) -> None:
    """Make certificates of services, for development.

    A service takes them with --tls_cert_file, --tls_key_file and --tls_ca_file. Who has the key of
    the authority can make himself any service: keep it where nobody else reads it.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(_output.Exit.USAGE)


@cert_command.command("ca", epilog="""\b\nExample:\n  micro cert ca certs""")
@click.argument("folder", type=_FOLDER)
@click.option("--domain", default=_DOMAIN, help=f"its trust domain; default {_DOMAIN}")
@_written_options(365)
@click.pass_context
def ca_command(ctx: click.Context, folder: Path, domain: str, days: int, *, force: bool) -> None:
    """Make an authority: in FOLDER its certificate, ca.pem, and its key, ca.key."""
    uri = f"spiffe://{domain}"
    if not is_spiffe(uri) or "/" in domain:
        raise click.UsageError(f"--domain: {domain!r}: write a-z, 0-9 and . - _ only")
    name = f"development of {domain}"[:64]
    signer = _signing().create(name, timedelta(days=days), uris=[uri])
    certificate, key = _write(folder, _CA, (signer.certificate, signer.key), force=force)
    if _arguments.wants_json(ctx):
        _output.show_json({"certificate": str(certificate), "key": str(key)})
        return
    _show(f"made {certificate}, for all services to trust")
    _show(f"made {key}, for nobody else: who has it can make himself any service")


@cert_command.command(
    "new", epilog="""\b\nExample:\n  micro cert new helloworld --ca certs --host node1.example"""
)
@click.argument("service")
@click.option("--ca", "folder", required=True, type=_FOLDER, help="the folder of the authority")
@click.option("--out", type=_FOLDER, help="the folder to write to; default that of the authority")
@click.option("--namespace", default="default", help="the service's namespace; default default")
@click.option(
    "--host",
    "hosts",
    metavar="NAME",
    multiple=True,
    help="a host that it runs on, for who calls it by that; may be repeated",
)
@_written_options(30)
@click.pass_context
def new_command(
    ctx: click.Context,
    service: str,
    folder: Path,
    out: Path | None,
    namespace: str,
    hosts: Sequence[str],
    days: int,
    *,
    force: bool,
) -> None:
    """Make the certificate of SERVICE, and its key: SERVICE.pem and SERVICE.key.

    A service that runs takes those that are made anew, with --force.
    """
    if check_service(service) == _CA:
        raise click.UsageError(f"a service cannot be called {_CA!r} here, as its files could not")
    signer = _signer(folder)
    uri = f"{signer.uris[0]}/ns/{namespace}/svc/{service}"
    if not is_spiffe(uri) or "/" in namespace:
        raise click.UsageError(f"--namespace: {namespace!r}: write A-Z, a-z, 0-9 and . - _ only")
    try:
        names = dict.fromkeys([*_LOOPBACK, *hosts])
        made = signer.issue(service[:64], timedelta(days=days), uris=[uri], hosts=names)
    except ValueError:
        raise click.UsageError(f"--host: {', '.join(hosts)!r}: write names of hosts") from None
    paths = _write(out or folder, service, made, force=force)
    told = {"certificate": str(paths[0]), "key": str(paths[1]), "ca": str(folder / f"{_CA}.pem")}
    if _arguments.wants_json(ctx):
        _output.show_json({**told, "identity": uri})
        return
    _show(f"made {paths[0]} and {paths[1]}, for {uri}; run it with")
    flags = {"cert": told["certificate"], "key": told["key"], "ca": told["ca"]}
    _show("  " + " ".join(f"--tls_{one}_file {shlex.quote(path)}" for one, path in flags.items()))


def _signing() -> type[Signer]:
    try:
        from micro._signing import Signer
    except ImportError as exc:
        raise ConfigError(
            "micro cert needs the package cryptography: pip install cryptography"
        ) from exc
    return Signer


def _signer(folder: Path) -> Signer:
    """The authority that is kept in a folder.

    Raises:
        ConfigError: there is none.
    """
    signing = _signing()
    try:
        pair = [(folder / f"{_CA}{end}").read_bytes() for end in (".pem", ".key")]
        signer = signing.read(*pair)
    except OSError as exc:
        why = f"{exc.filename}: {exc.strerror}; make one with: micro cert ca {folder}"
        raise ConfigError(f"--ca: {why}") from exc
    except (ValueError, TypeError):
        raise ConfigError(
            f"--ca: {folder} has no certificate of `micro cert ca` and its key"
        ) from None
    if len(signer.uris) != 1 or not is_spiffe(signer.uris[0]):
        raise ConfigError(f"--ca: {folder} has an authority that `micro cert ca` did not make")
    return signer


def _write(folder: Path, name: str, pair: tuple[bytes, bytes], *, force: bool) -> tuple[Path, Path]:
    """Write a certificate, and its key for the owner alone; the key first.

    Raises:
        ConfigError: they are there already, or cannot be written.
    """
    paths = (folder / f"{name}.pem", folder / f"{name}.key")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in () if force else paths:
            if path.exists():
                raise ConfigError(f"{path} is there already; write over it with --force")
        _replace(paths[1], pair[1], 0o600)
        _replace(paths[0], pair[0], 0o644)
    except OSError as exc:
        raise ConfigError(f"{exc.filename}: cannot be written: {exc.strerror}") from exc
    return paths


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file so that whoever reads it sees the old one or the new one, whole."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(file, "wb") as opened:
            opened.write(content)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _show(text: str) -> None:
    click.echo(printable(text))
