"""Ours, the server: ``micro.Service`` at a given port; ``--asyncio``: without uvloop."""

import sys
from dataclasses import dataclass
from typing import Any, cast

import micro


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


class Helloworld:
    async def call(self, request: Request) -> Response:
        return Response(message=f"Hello {request.name}")


def main() -> None:
    if "--asyncio" in sys.argv:
        cast("dict[str, Any]", sys.modules)["uvloop"] = None  # as if it were not installed
    service = micro.Service("bench")
    service.handle(Helloworld())
    address = f"--server_address=127.0.0.1:{sys.argv[1]}"
    # Flags, which no MICRO_ variable of whoever runs this can change.
    service.run([address, "--registry=memory", "--transport=http", "--log_level=warning"])


if __name__ == "__main__":
    main()
