"""Live sessions on a framesink server: `connect(url).session(query=...)`.

Needs tritonclient, numpy and OpenCV, and nothing else of what framesink needs.
"""

from framesink.client.aio import AsyncClient, AsyncSession, connect_async
from framesink.client.client import Client, connect
from framesink.client.connection import Tls
from framesink.client.errors import (
    ClientError,
    RefusedError,
    ResponseError,
    ServerGoneError,
    ServerUnavailableError,
    SessionLostError,
)
from framesink.client.session import Session
from framesink.client.settings import SessionSettings
from framesink.runtime.events import Event, EventKind

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "Client",
    "ClientError",
    "Event",
    "EventKind",
    "RefusedError",
    "ResponseError",
    "ServerGoneError",
    "ServerUnavailableError",
    "Session",
    "SessionLostError",
    "SessionSettings",
    "Tls",
    "connect",
    "connect_async",
]
