"""Feeds decoders with what coverage suggests, with atheris: run.py [TARGET ...] [--seconds N].

Each target runs in a process of its own, which begins with the corpus. An input that fails is
written to ``tests/fuzz/found`` and shown; ``--save`` keeps in the corpus what reached code that
nothing in it had reached.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
FOUND = HERE / "found"


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
            merge(name, Path(new))
    lines = ended.stdout.splitlines()
    shown = lines[-60:] if ended.returncode else [one for one in lines if "executed_units" in one]
    print("\n".join(shown), flush=True)
    return not ended.returncode


def merge(name: str, new: Path) -> None:
    """Add to the corpus the least that reaches what ``new`` reaches."""
    command = (sys.executable, __file__, "--inside", name, "-merge=1", str(CORPUS / name), str(new))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def fuzz(name: str, arguments: list[str]) -> None:
    """Runs until it finds something or its time is over; does not return."""
    import atheris

    with atheris.instrument_imports(include=["micro", "json"]):
        from tests.fuzz.targets import TARGETS

    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
