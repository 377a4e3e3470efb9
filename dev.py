#!/usr/bin/env python3
"""Run a developer task where there is only Python and git: ``python3 dev.py SESSION [ARGS]``.

Makes ``.venv``, installs nox there, and has it run the session of noxfile.py. Without a SESSION it
lists them. Written so that an old Python can parse it and say what it needs.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

NOX = "nox==2026.10.20"
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = str(VENV / "bin" / "python")
NEEDS_VENV = """\
This Python ({0}) can make no virtual environment: it has neither ensurepip nor pip.
On Debian or Ubuntu: sudo apt install python{1}-venv
Elsewhere: install a complete Python 3.11 or later, and run its python3 with dev.py."""


def main(args):
    if sys.version_info < (3, 11):
        sys.exit("micro needs Python 3.11 or later; this is %s." % sys.version.split()[0])
    stamp = VENV / "made-by-dev.txt"
    # The base prefix and not the executable: python3 and .venv/bin/python are the same Python.
    made = "{}\n{}\n{}".format(NOX, sys.version, sys.base_prefix)
    if not stamp.exists() or stamp.read_text() != made:
        make_venv()
        stamp.write_text(made)
    task = ["-s", args[0], "--", *args[1:]] if args else ["--list"]
    nox = [PYTHON, "-m", "nox", "-f", str(ROOT / "noxfile.py"), *task]
    os.execv(nox[0], nox)  # the exit code and the signals are nox's own


def make_venv():
    print("dev.py: installing {} in {}".format(NOX, VENV), flush=True)
    if find_spec("ensurepip"):
        run(sys.executable, "-m", "venv", "--clear", str(VENV))
        pip = [PYTHON, "-m", "pip"]
    elif find_spec("pip"):  # Debian with python3-pip and without python3-venv
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV))
        pip = [sys.executable, "-m", "pip", "--python", PYTHON]
    else:
        sys.exit(NEEDS_VENV.format(sys.executable, "{}.{}".format(*sys.version_info)))
    run(*pip, "install", "--quiet", "--disable-pip-version-check", NOX)


def run(*command):
    code = subprocess.call(command)
    if code:
        sys.exit("dev.py: {} failed ({})".format(" ".join(command), code))


if __name__ == "__main__":
    main(sys.argv[1:])
