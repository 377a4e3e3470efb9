"""Start helloworld.py, call it from other processes, and say how to do it by hand."""

import os
import re
import shlex
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

PROGRAM = os.path.relpath(Path(__file__).with_name("helloworld.py"))
REQUEST = '{"name": "Alice"}'
#: Seconds that any one step may take.
PATIENCE = 20
BY_HAND = f"""
By hand, in two terminals:
  . {os.path.relpath(sys.prefix)}/bin/activate
  python {PROGRAM}
  micro call helloworld Helloworld.Call '{REQUEST}'"""


def main() -> None:
    show("python", PROGRAM, "&")
    service = subprocess.Popen(
        [sys.executable, PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        address = wait_for_address(service)
        micro("call", "helloworld", "Helloworld.Call", REQUEST, expected="Hello Alice")
        micro("services", expected="helloworld")
        post(f"http://{address}/Helloworld/Call")
    finally:
        show("kill", str(service.pid))
        service.terminate()
        rest, _ = service.communicate(timeout=PATIENCE)
        print(rest, end="")
    if service.returncode:
        sys.exit(f"{PROGRAM} ended with {service.returncode}")
    print(BY_HAND)


def show(*command: str) -> None:
    print("\n$", shlex.join(command).replace("'&'", "&"), flush=True)


def wait_for_address(service: subprocess.Popen[str]) -> str:
    """The address that the service logs once it serves."""
    assert service.stdout is not None
    watchdog = threading.Timer(PATIENCE, service.kill)
    watchdog.start()
    try:
        for line in service.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"127\.0\.0\.1:\d+", line):
                return found[0]
    finally:
        watchdog.cancel()
    sys.exit(f"{PROGRAM} did not say where it serves")


def micro(*args: str, expected: str) -> None:
    """Run the micro command, which finds the service in the registry."""
    show("micro", *args)
    command = [sys.executable, "-m", "micro", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    check(done.stdout, expected)


def post(url: str) -> None:
    """Call it as a program would that knows nothing of micro."""
    name, value = "Content-Type", "application/json"
    show("curl", "-H", f"{name}: {value}", "-d", REQUEST, url)
    request = urllib.request.Request(url, REQUEST.encode(), {name: value})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        check(response.read().decode(), "Hello Alice")


def check(output: str, expected: str) -> None:
    print(output.rstrip())
    if expected not in output:
        sys.exit(f"expected: {expected}")


if __name__ == "__main__":
    main()
