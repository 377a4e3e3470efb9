"""grpc.aio, the client, on one channel; ``--uvloop``: on uvloop instead of the stock loop."""

import asyncio
import sys
from importlib import import_module
from typing import Any

from bench.load import NAME, Job, job, load
from bench.peers.grpc_messages import METHOD, SERVICE, Request, Response

grpc: Any = import_module("grpc")
#: Ours has a deadline on every call, of as many seconds.
DEADLINE = 5.0


async def main(job: Job) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{job.port}") as channel:
        method = channel.unary_unary(
            f"/{SERVICE}/{METHOD}",
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )

        async def call() -> str:
            reply = await method(Request(name=NAME), timeout=DEADLINE)
            return str(reply.message)

        await load(job, call)


if __name__ == "__main__":
    uvloop = "--uvloop" in sys.argv
    loop = import_module("uvloop").new_event_loop if uvloop else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main(job()))
