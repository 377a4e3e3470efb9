"""FastAPI with uvicorn, called by aiohttp; ``uvloop``: on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bench.load import GREETING, NAME, Job, Point, load
from bench.peer import main

# By name: peers are not installed where types are checked.
fastapi: Any = import_module("fastapi")
uvicorn: Any = import_module("uvicorn")


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


async def greet(request: Request) -> Response:
    return Response(message=f"Hello {request.name}")


def serve(port: int, options: list[str]) -> None:
    app = fastapi.FastAPI()
    app.add_api_route("/Helloworld/Call", greet, methods=["POST"])
    loop = "uvloop" if "uvloop" in options else "asyncio"
    uvicorn.run(app, host="127.0.0.1", port=port, loop=loop, log_level="warning")


async def call(job: Job) -> Point:
    aiohttp: Any = import_module("aiohttp")
    url = f"http://127.0.0.1:{job.port}/Helloworld/Call"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=5)
    ) as session:

        async def once() -> Any:
            async with session.post(url, json={"name": NAME}) as response:
                return await response.json()

        return await load(job, [once], {"message": GREETING}.__eq__)


if __name__ == "__main__":
    main(serve, call)
