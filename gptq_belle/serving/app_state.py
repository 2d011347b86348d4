"""What the application holds while it lives: nothing before the model is loaded, then the service."""

from dataclasses import dataclass, field

from fastapi import Request

from gptq_belle.serving.api_errors import ApiError
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.service import Service


@dataclass(slots=True)
class AppState:
    """Of one application.

    Attributes:
        metrics: from the beginning.
        service: None while the model is loaded.
        failure: why it could not be loaded.
    """

    metrics: Metrics = field(default_factory=Metrics)
    service: Service | None = None
    failure: BaseException | None = None


def app_state(request: Request) -> AppState:
    """The state of the application that a request came to."""
    state: AppState = request.app.state.server
    return state


def loaded_service(request: Request) -> Service:
    """The service.

    Raises:
        ApiError: 503 while the model is loaded.
    """
    service = app_state(request).service
    if service is None:
        raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "5"})
    return service
