"""FastAPI with uvicorn at a given port; ``--asyncio``: without uvloop."""

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

fastapi: Any = import_module("fastapi")
uvicorn: Any = import_module("uvicorn")


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


async def call(request: Request) -> Response:
    return Response(message=f"Hello {request.name}")


def main() -> None:
    app = fastapi.FastAPI()
    app.add_api_route("/Helloworld/Call", call, methods=["POST"])
    loop = "asyncio" if "--asyncio" in sys.argv else "uvloop"
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), loop=loop, log_level="warning")


if __name__ == "__main__":
    main()
