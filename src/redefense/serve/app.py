"""The routes: Open Inference Protocol v2, picture uploads, metrics and a page to try it."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from typing import Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import redefense
from redefense.errors import ConfigError
from redefense.serve.batcher import Batcher, Late, Overloaded
from redefense.serve.description import (
    EXTENSIONS,
    VERSION,
    configuration,
    index,
    metadata,
    output_types,
    read_index_filter,
    statistics,
)
from redefense.serve.draws import Draw, Floats, network_of
from redefense.serve.engine import CONFIDENCE, Answers, Engine, label_and_word
from redefense.serve.guard import Bodies, Guard, OwnNames
from redefense.serve.images import FORMATS, read_image
from redefense.serve.model import Model
from redefense.serve.observe import Metrics
from redefense.serve.protocol import BINARY_HEADER, Question, read_question, write_answers
from redefense.serve.settings import Settings

_HELD_BODIES = 16  # maximum-size bodies held at a time
_DECODERS = 4  # a small file may hold a picture of `max_pixels`, at thirteen bytes each
_PAGE: Final = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


class Service:
    """A model behind HTTP. Its methods are the routes' handlers.

    Attributes:
        model: the current model.
        leaving: set before the server stops: readiness turns false, and connections close after
            their next response; further requests are still answered.
    """

    def __init__(self, model: Model, settings: Settings, draw: Draw) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.leaving = False
        self._engine = Engine(model, settings, draw)
        self._batcher = Batcher(self._engine, settings, self.metrics.batch)
        self.metrics.waiting.set_function(lambda: self._batcher.waiting)
        # a separate pool: a request past its deadline still occupies its thread
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="pictures")
        limit = settings.body_limit(model.pixels)
        self._bodies = Bodies(limit=limit, total=_HELD_BODIES * limit, seconds=settings.deadline)

    @property
    def model(self) -> Model:
        return self._engine.model

    def use(self, model: Model, draw: Draw) -> None:
        """Use another version of the model from the next batch on.

        Raises:
            ConfigError: if its inputs or classes differ.
        """
        # clients have read these once and keep them
        for what in ("name", "shape", "classes"):
            was, now = getattr(self.model, what), getattr(model, what)
            if was != now:
                raise ConfigError(
                    f"a server's next bundle must have the {what} of the one before, {was}, "
                    f"got {now}: start another server for it"
                )
        self._engine.use(model, draw)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._batcher.start()
        try:
            yield
        finally:
            self._batcher.close()
            self._decoders.shutdown(cancel_futures=True)

    async def server_metadata(self, request: Request) -> Response:
        about = {"name": "redefense", "version": redefense.__version__}
        return JSONResponse({**about, "extensions": list(EXTENSIONS)})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"ready": not self.leaving}, 503 if self.leaving else 200)

    async def model_metadata(self, request: Request) -> Response:
        self._check_names(request)
        return JSONResponse(metadata(self.model, self.settings))

    async def model_ready(self, request: Request) -> Response:
        self._check_names(request)
        answer = {"name": self.model.name, "ready": not self.leaving}
        return JSONResponse(answer, 503 if self.leaving else 200)

    async def model_config(self, request: Request) -> Response:
        self._check_names(request)
        return JSONResponse(configuration(self.model, self.settings))

    async def model_statistics(self, request: Request) -> Response:
        if "name" in request.path_params:
            self._check_names(request)
        return JSONResponse(statistics(self.model, self.metrics))

    async def repository_index(self, request: Request) -> Response:
        async with self._bodies.read(request) as body:
            ready = read_index_filter(body)
        models = index(self.model, leaving=self.leaving)
        return JSONResponse([model for model in models if not (ready and self.leaving)])

    async def infer(self, request: Request) -> Response:
        """Tensors in, tensors out; also a picture, as one image."""
        self._check_names(request)
        if _media_type(request).startswith(("image/", "multipart/")):
            images = await self._picture(request)
            wanted = dict.fromkeys(output_types(self.settings, len(self.model.classes)), False)
            question = Question(images=images, wanted=wanted)
        else:
            async with self._bodies.read(request) as body:
                length = request.headers.get(BINARY_HEADER)
                question = read_question(body, length, self.model, self.settings)
        answers = await self._answer(question.images, request)
        content, json_length = write_answers(answers, question, self.model, self.settings)
        if json_length is None:
            return Response(content, media_type="application/json")
        headers = {BINARY_HEADER: str(json_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def classify(self, request: Request) -> Response:
        """A picture in, a small object out."""
        self._check_names(request)
        answers = await self._answer(await self._picture(request), request)
        return JSONResponse(self._in_words(answers))

    async def members(self, request: Request) -> Response:
        """The outputs of every member for a picture; on research servers only."""
        images = await self._picture(request)
        scores = (await run_in_threadpool(self._engine.all_members, images))[:, 0]
        label, word = label_and_word(scores)
        answers = _known(Answers(label=label, confidence=word, scores=scores))
        rows = [self._in_words(answers.part(m, m + 1)) for m in range(len(scores))]
        return JSONResponse({"members": rows})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        name, media_type = _PAGE[request.url.path]
        content = resources.files("redefense.serve").joinpath(name).read_bytes()
        return Response(content, media_type=media_type)

    async def about(self, request: Request) -> Response:
        """The data of the page."""
        return JSONResponse(
            {
                "name": self.model.name,
                "classes": list(self.model.classes),
                "shape": list(self.model.shape),
                "num_members": self.model.num_members,
                "policy": self.settings.policy,
                "mode": self.settings.mode,
                "research": self.settings.research,
            }
        )

    def _check_names(self, request: Request) -> None:
        if request.path_params["name"] != self.model.name:
            raise HTTPException(404, f"unknown model; this server has the model {self.model.name}")
        if request.path_params.get("version", VERSION) != VERSION:
            raise HTTPException(404, f"unknown version; this server has version {VERSION}")

    async def _picture(self, request: Request) -> Floats:
        if (kind := _media_type(request)) not in FORMATS:
            raise HTTPException(415, f"send a picture as {' or '.join(FORMATS)}, got {kind[:40]}")
        async with self._bodies.read(request) as body:
            limit, deadline = self.settings.max_pixels, self.settings.deadline
            try:
                async with asyncio.timeout(deadline):
                    return await asyncio.get_running_loop().run_in_executor(
                        self._decoders, read_image, body, self.model.shape, limit
                    )
            except TimeoutError:
                raise HTTPException(504, str(Late(deadline))) from None

    async def _answer(self, images: Floats, request: Request) -> Answers:
        try:
            answers = await self._batcher.submit(images, self._client(request))
        except Overloaded as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise HTTPException(429, str(error), headers) from None
        except Late as error:
            raise HTTPException(504, str(error)) from None
        return _known(answers)

    def _client(self, request: Request) -> str:
        name = self.settings.client_header
        values = [] if name is None else request.headers.getlist(name)
        if len(values) > 1:  # one may be set by the client in addition to that of the proxy
            raise HTTPException(400, f"{name} may occur only once, got {len(values)}")
        if values:
            return f"header {values[0]}"
        return f"address {network_of(request.client.host if request.client else '')}"

    def _in_words(self, answers: Answers) -> dict[str, object]:
        (label,), (word,) = answers.label, answers.confidence
        result: dict[str, object] = {
            "label": self.model.classes[label],
            "class_id": int(label),
            "confidence": CONFIDENCE[word],
        }
        if answers.scores is not None:
            result["scores"] = answers.scores[0].tolist()
        if answers.member is not None:
            result["member"] = int(answers.member[0])
        return result


def _known(answers: Answers) -> Answers:
    """Answers, all with a class.

    Raises:
        HTTPException: if logits of one of the images are NaN.
    """
    if (answers.label < 0).any():
        raise HTTPException(500, "the model returned values that are not finite for these images")
    return answers


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _explain(request: Request, error: Exception) -> Response:
    # starlette calls it for HTTP errors only
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else "internal error"
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse({"error": detail}, status, headers=headers)


def create_service(model: Model, settings: Settings, draw: Draw) -> tuple[Starlette, Service]:
    """The application of a model, and its state."""
    service = Service(model, settings, draw)
    model_routes = ["/v2/models/{name}", "/v2/models/{name}/versions/{version}"]
    routes = [
        *[Route(path, service.page) for path in _PAGE],
        Route("/v2", service.server_metadata),
        Route("/v2/health/live", service.live),
        Route("/v2/health/ready", service.ready),
        Route("/v2/models/stats", service.model_statistics),  # of all; before a model of this name
        *[Route(path, service.model_metadata) for path in model_routes],
        *[Route(f"{path}/ready", service.model_ready) for path in model_routes],
        *[Route(f"{path}/config", service.model_config) for path in model_routes],
        *[Route(f"{path}/stats", service.model_statistics) for path in model_routes],
        Route("/v2/repository/index", service.repository_index, methods=["POST"]),
        *[Route(f"{path}/infer", service.infer, methods=["POST"]) for path in model_routes],
        *[Route(f"{path}/classify", service.classify, methods=["POST"]) for path in model_routes],
        Route("/metrics", service.show_metrics),
        Route("/about.json", service.about),
    ]
    if settings.research:
        routes.append(Route("/research/members", service.members, methods=["POST"]))
    guard = Middleware(Guard, metrics=service.metrics, leaving=lambda: service.leaving)
    app = Starlette(
        routes=routes,
        middleware=[guard, Middleware(OwnNames)] if settings.research else [guard],
        exception_handlers={HTTPException: _explain},
        lifespan=service.lifespan,
    )
    return app, service
