"""Feeds decoders with what coverage suggests, with atheris: run.py [TARGET ...] [--seconds N].

Each target runs in a process of its own, which begins with the corpus. An input that fails is
written to ``tests/fuzz/found`` and shown; ``--save`` keeps in the corpus what goes a way through
our code that nothing in it went.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
FOUND = HERE / "found"

_Step: TypeAlias = tuple[str, int, int]


def main() -> int:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--inside"]:
        fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--save", action="store_true", help="keep what is new in the corpus")
    options = parser.parse_args()
    failed = [
        name for name in options.targets or _names() if not run(name, options.seconds, options.save)
    ]
    print(f"failed: {', '.join(failed)}" if failed else "nothing was found")
    return 1 if failed else 0


def _names() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def run(name: str, seconds: int, save: bool) -> bool:
    """Whether a target held out."""
    print(f"{name}: {seconds} s", flush=True)
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    FOUND.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as new:
        ended = subprocess.run(
            [
                *(sys.executable, __file__, "--inside", name, new, str(corpus)),
                f"-max_total_time={seconds}",
                f"-artifact_prefix={FOUND}/{name}-",
                *("-max_len=4096", "-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1"),
            ],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if save and not ended.returncode:
            keep(name, Path(new))
    lines = ended.stdout.splitlines()
    shown = lines[-60:] if ended.returncode else [one for one in lines if "executed_units" in one]
    print("\n".join(shown), flush=True)
    return not ended.returncode


def keep(name: str, new: Path) -> None:
    """Add to the corpus what takes a step that nothing in it takes, the shortest first."""
    from tests.fuzz.targets import TARGETS

    known: set[_Step] = set()
    for path in (CORPUS / name).iterdir():
        known |= _steps(TARGETS[name], path.read_bytes())
    for path in sorted(new.iterdir(), key=lambda path: path.stat().st_size):
        data = path.read_bytes()
        steps = _steps(TARGETS[name], data)
        if not steps <= known:
            known |= steps
            (CORPUS / name / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def _steps(target: Callable[[bytes], None], data: bytes) -> set[_Step]:
    """From which line to which line of ours it goes."""
    found: set[_Step] = set()

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if "/micro/" not in frame.f_code.co_filename:
            return None
        last = 0

        def lines(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
            nonlocal last
            found.add((frame.f_code.co_filename, last, frame.f_lineno))
            last = frame.f_lineno
            return lines

        return lines

    sys.settrace(trace)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return found


def fuzz(name: str, arguments: list[str]) -> None:
    """Runs until it finds something or its time is over; does not return."""
    atheris: Any = import_module("atheris")  # for CPython 3.11 alone, and untyped

    with atheris.instrument_imports(include=["micro", "json"]):
        from tests.fuzz.targets import TARGETS

    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
