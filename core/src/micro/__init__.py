"""Micro: a framework for distributed systems.

import micro

service = micro.Service("helloworld")
service.handle(Helloworld())
service.run()
"""

from micro._calls import Stream
from micro.call import Body, Call, Context, Handler, Middleware, Reply, context
from micro.client import Client, using
from micro.contract import endpoint
from micro.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    Closed,
    Code,
    ConfigError,
    DataLoss,
    DeadlineExceeded,
    DecodeError,
    EndpointNotFound,
    FailedPrecondition,
    Gap,
    Internal,
    InvalidArgument,
    MicroError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    ServiceNotFound,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
    Unsupported,
    UnsupportedContentType,
)
from micro.follow import Watch
from micro.plugins import Plugins
from micro.registry import Change, Endpoint, Node, Registry, Snapshot, Value
from micro.retries import Retries
from micro.selector import Selector
from micro.service import Service
from micro.tls import TLS
from micro.transport import Limits, Transport
from micro.url import URL

__all__ = [
    "TLS",
    "URL",
    "Aborted",
    "AlreadyExists",
    "Body",
    "Call",
    "Cancelled",
    "Change",
    "Client",
    "Closed",
    "Code",
    "ConfigError",
    "Context",
    "DataLoss",
    "DeadlineExceeded",
    "DecodeError",
    "Endpoint",
    "EndpointNotFound",
    "FailedPrecondition",
    "Gap",
    "Handler",
    "Internal",
    "InvalidArgument",
    "Limits",
    "MicroError",
    "Middleware",
    "Node",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "Plugins",
    "Registry",
    "Reply",
    "ResourceExhausted",
    "Retries",
    "Selector",
    "Service",
    "ServiceNotFound",
    "Snapshot",
    "Stream",
    "TooLarge",
    "Transport",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "Unsupported",
    "UnsupportedContentType",
    "Value",
    "Watch",
    "context",
    "endpoint",
    "using",
]
