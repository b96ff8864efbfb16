"""GET /v1/models, /health, /ready and /metrics: what the server is and how it does."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel

from octavo.serve import responses
from octavo.serve.errors import ERRORS, unavailable
from octavo.serve.service import Service, ServiceDep

router = APIRouter()
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format


class Status(BaseModel):
    """One word."""

    status: str


@router.get("/v1/models", tags=["OpenAI"], responses=ERRORS)
async def list_models(service: ServiceDep) -> responses.ModelList:
    """The names that the model answers to."""
    names = service.settings.model_names
    return responses.ModelList(data=[_model(service, name) for name in names])


@router.get("/v1/models/{model:path}", tags=["OpenAI"], responses=ERRORS)
async def retrieve_model(model: str, service: ServiceDep) -> responses.Model:
    """One of them."""
    return _model(service, service.check_model(model))


@router.get("/health", tags=["Operation"], responses=ERRORS)
async def health(service: ServiceDep) -> Status:
    """Whether the server is worth keeping: 500 once its engine has stopped for good."""
    if service.engine is not None:
        service.engine.check_running()
    return Status(status="ok")


@router.get("/ready", tags=["Operation"], responses=ERRORS)
async def ready(service: ServiceDep) -> Status:
    """Whether to send requests here: 503 while the model is loaded, and from SIGTERM on."""
    if service.is_draining:
        raise unavailable("the server is shutting down")
    if service.engine is None:
        raise unavailable("the model is being loaded")
    service.engine.check_running()
    return Status(status="ready")


@router.get("/metrics", tags=["Operation"], response_class=Response, responses=ERRORS)
async def metrics(service: ServiceDep) -> Response:
    """Counters, gauges and histograms for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _model(service: Service, name: str) -> responses.Model:
    return responses.Model(id=name, created=service.created, max_model_len=service.max_model_len)
