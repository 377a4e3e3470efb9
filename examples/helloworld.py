# helloworld.py
from dataclasses import dataclass

import micro


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


class Helloworld:
    async def call(self, request: Request) -> Response:
        """Greet a person."""
        return Response(message=f"Hello {request.name}")


service = micro.Service("helloworld")
service.handle(Helloworld())

if __name__ == "__main__":
    service.run()  # flags and environment, serve, register, drain on SIGTERM
