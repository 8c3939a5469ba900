"""The service: one route to classify, one to see where heads look, health, metrics, and a page. Everything it takes is bounded."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import anyio
import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import Message

import convit
from convit.serve.classifier import Classifier, Prepared

DECODERS = 2  # images decoded at a time: each may need max_pixels * 3 bytes


class Metrics:
    """What /metrics tells, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("convit_requests", "Requests by route and status.", ["route", "status"], **here)
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
        self.seconds = Histogram("convit_request_seconds", "Time to answer, by route.", ["route"], buckets=seconds, **here)
        self.batches = Histogram("convit_batch_size", "Images per forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64), **here)
        self.in_flight = Gauge("convit_in_flight", "Images being read, waiting or computed.", **here)


def create_app(
    model: Any,
    *,
    max_batch: int = 16,
    max_waiting: int = 64,
    max_upload: int = 10_000_000,
    max_pixels: int = 50_000_000,
    timeout: float = 30.0,
    precision: str = "auto",
) -> FastAPI:
    """An ASGI application that serves a model.

    Args:
        model: A PyTorch ConViT, such as ``convit.engine.pytorch.trained.trained_model`` gives; on CPU its ``convit.optimize`` is used.
        max_batch: Images per forward pass.
        max_waiting: Images that may be in the service at a time; one more is answered with 503.
        max_upload: Bytes of a request; more is answered with 413.
        max_pixels: Of an image, before it is decoded; more is answered with 400.
        timeout: Seconds that a request's body may take to arrive.
        precision: See ``convit.serve.classifier.Classifier``.

    Raises:
        ValueError: The model cannot be served, or a bound is not positive.
    """
    bounds = {"max_batch": max_batch, "max_waiting": max_waiting, "max_upload": max_upload, "max_pixels": max_pixels, "timeout": timeout}
    for name, value in bounds.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    metrics = Metrics()
    classifier = Classifier(model, max_batch, max_pixels, precision, metrics.batches.observe)
    page = resources.files("convit.serve").joinpath("page.html").read_text(encoding="utf-8")
    waiting = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.decoders = CapacityLimiter(DECODERS)
        yield
        classifier.close()

    # no /docs: that page would load its scripts from elsewhere
    app = FastAPI(title="ConViT", version=convit.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.page = page

    @app.middleware("http")
    async def measure(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        response = await answer(request)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")
        metrics.requests.labels(path, str(response.status_code)).inc()
        metrics.seconds.labels(path).observe(time.perf_counter() - began)
        return response

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return JSONResponse({"detail": "the client closed the connection"}, 400)

    @asynccontextmanager
    async def upload(request: Request) -> AsyncIterator[Prepared]:
        """The image of a request, while the block runs one of ``max_waiting``."""
        nonlocal waiting
        if waiting >= max_waiting:
            raise HTTPException(503, f"{waiting} images are waiting already", {"Retry-After": "1"})
        waiting += 1
        metrics.in_flight.set(waiting)
        try:
            try:
                with anyio.fail_after(timeout):
                    data = await _body(request, max_upload)
            except TimeoutError:
                raise HTTPException(408, f"the image did not arrive within {timeout:g} s") from None
            try:
                image = await to_thread.run_sync(classifier.prepare, data, limiter=request.app.state.decoders)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            yield image
        finally:
            waiting -= 1
            metrics.in_flight.set(waiting)

    @app.post("/predict")
    async def predict(request: Request, topk: int = Query(5, ge=1)) -> dict[str, Any]:
        """The most probable classes of an image: its bytes as the body, or as a file of a form."""
        async with upload(request) as image:
            return {"classes": _top(await classifier.probabilities(image), classifier.names, topk)}

    @app.post("/attention")
    async def attention(
        request: Request, topk: int = Query(5, ge=1), query: str = Query("", pattern=r"^(\d{1,4},\d{1,4})?$")
    ) -> dict[str, Any]:
        """The same, and where every head looks from one patch (``query=row,column``; default the middle one)."""
        async with upload(request) as image:
            row, _, column = query.partition(",")
            try:
                looks = await classifier.attention(image, (int(row), int(column)) if query else None)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            return {"classes": _top(await classifier.probabilities(image), classifier.names, topk)} | looks

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the service answers, and what it serves."""
        asked = classifier.preparation
        return {
            "status": "ok",
            "model": model.pretrained_cfg.get("architecture", "convit"),
            "classes": len(classifier.names),
            "image_size": asked.size,
            "device": classifier.device.type,
            "precision": classifier.precision,
            "version": convit.__version__,
        }

    @app.get("/metrics")
    async def metrics_text() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    return app


async def _body(request: Request, limit: int) -> bytes:
    """The image that a request brings, as its body or in a form; never more than ``limit`` bytes are read."""
    declared = request.headers.get("content-length", "")
    too_large = HTTPException(413, f"at most {limit} bytes are taken", {"Connection": "close"})
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise too_large
        return message

    bounded = Request(request.scope, receive)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        data = await bounded.body()
    else:
        async with bounded.form(max_files=1, max_fields=8) as form:
            file = next((value for value in form.values() if isinstance(value, UploadFile)), None)
            data = b"" if file is None else await file.read()
    if not data:
        raise HTTPException(400, "the request has no image: send its bytes as the body, or as a file of a form")
    return data


def _top(probabilities: np.ndarray, names: list[str], topk: int) -> list[dict[str, Any]]:
    order = np.argsort(-probabilities, kind="stable")[:topk]
    return [{"index": int(i), "name": names[i], "probability": float(probabilities[i])} for i in order]
