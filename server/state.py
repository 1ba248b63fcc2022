"""What the routes share: the collaborators an app is made of, and how a route reaches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.admin import Admin
from server.bridge import Bridge
from server.catalog import Served
from server.config import Config
from server.metrics import Metrics


@dataclass(slots=True)
class Services:
    """The collaborators of an app. `served` is replaced as a whole when adapters change: a request reads it once."""

    config: Config
    bridge: Bridge
    served: Served
    metrics: Metrics
    admin: Admin | None = None


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Shared = Annotated[Services, Depends(_services)]
