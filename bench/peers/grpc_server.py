"""grpc.aio, the server at a given port; ``--uvloop``: on uvloop instead of the stock loop."""

import asyncio
import sys
from importlib import import_module
from typing import Any

from bench.peers.grpc_messages import METHOD, SERVICE, Request, Response

grpc: Any = import_module("grpc")


async def call(request: Any, _context: Any) -> Any:
    return Response(message=f"Hello {request.name}")


async def main(port: str) -> None:
    handler = grpc.unary_unary_rpc_method_handler(
        call,
        request_deserializer=Request.FromString,
        response_serializer=Response.SerializeToString,
    )
    server = grpc.aio.server()
    service = grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop = "--uvloop" in sys.argv
    loop = import_module("uvloop").new_event_loop if uvloop else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main(sys.argv[1]))
