"""Prove that what an environment has of this project is what was built here.

    PYTHON tools/provenance.py WHEEL ...

run by the Python of that environment. On the public index ``micro-core`` belongs to others: an
installer that looked there would find something else under our name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from hashlib import sha256
from importlib.metadata import Distribution, distributions
from pathlib import Path


def complaints(wheels: Iterable[Path]) -> Iterator[str]:
    """What is installed under our names without being one of ``wheels``, and which is missing."""
    missing = {sha256(wheel.read_bytes()).hexdigest(): wheel.name for wheel in wheels}
    ours = set(missing)
    for distribution in distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        if name == "micro" or name.startswith("micro-"):
            digest, origin = _origin(distribution)
            missing.pop(digest, None)
            if digest not in ours:
                yield f"{name} {distribution.version} is not what was built here; from {origin}"
    yield from (f"{name} is not installed" for name in missing.values())


def _origin(distribution: Distribution) -> tuple[str, str]:
    """The digest of the file it was installed from, and its URL; an index leaves neither."""
    text = distribution.read_text("direct_url.json")
    origin = json.loads(text) if text else {}
    digest = origin.get("archive_info", {}).get("hashes", {}).get("sha256", "")
    return digest, origin.get("url", "an index")


if __name__ == "__main__":
    found = list(complaints(map(Path, sys.argv[1:])))
    for complaint in found:
        print(f"provenance: {complaint}", file=sys.stderr)
    sys.exit(bool(found) or len(sys.argv) < 2)
