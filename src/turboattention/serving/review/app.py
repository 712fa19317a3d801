"""The web application: one page, three calls. It reads no file after its start and tells nobody a result."""

from collections.abc import Awaitable, Callable, Collection
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from turboattention.errors import InvalidInputError
from turboattention.serving.review.pairs import PairFile
from turboattention.serving.review.store import CHOICES, LONGEST_NAME, Store, StoreError

LONGEST_BODY = 4096  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # browsers that do not know frame-ancestors
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_PAGE = {"/": ("review.html", "text/html"), "/review.js": ("review.js", "text/javascript"),
         "/review.css": ("review.css", "text/css")}  # fmt: skip


class Rater(BaseModel):
    """Who judges."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rater: Annotated[str, Field(max_length=4 * LONGEST_NAME)]


class Judged(Rater):
    """position: of the pair in the rater's order, as it was shown."""

    position: Annotated[int, Field(ge=0, lt=2**31)]
    choice: str


def refusal(request: Request, hosts: Collection[str]) -> str | None:
    """Why a request may not come in, None where it may.

    hosts: names and ports under which this server may be asked. Another name is a page of somebody else whose address
    points here (DNS rebinding). What changes data must come from our own page: browsers send its origin.
    """
    host = request.headers.get("host", "").lower()
    if host not in hosts:
        return "this server does not go by that name; see --allow-host"
    origin = request.headers.get("origin")
    changes = request.method not in ("GET", "HEAD")
    if (changes or origin is not None) and origin != f"http://{host}":
        return "asked from another site"
    # A link on another page may lead here; nothing else of that page may ask. The page itself holds no answers.
    followed = request.headers.get("sec-fetch-mode") == "navigate" and not changes
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed:
        return "asked from another site"
    return None


def create_app(store: Store, file: PairFile, hosts: Collection[str]) -> FastAPI:
    """hosts: see `refusal`; with their ports, in lower case."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    folder = files("turboattention.serving.review") / "page"
    contents = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in _PAGE.items()}

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        reason = refusal(request, hosts)
        if reason is not None:
            response: Response = _error(403, reason)
        elif not request.headers.get("content-length", "0").isdigit() or "transfer-encoding" in request.headers:
            response = _error(411, "a body without its length")
        elif int(request.headers.get("content-length", "0")) > LONGEST_BODY:
            response = _error(413, f"more than {LONGEST_BODY} bytes")
        else:
            response = await go_on(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(InvalidInputError)
    async def mistaken(request: Request, error: InvalidInputError) -> Response:
        return _error(503 if isinstance(error, StoreError) else 422, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return _error(
            422, "expected " + "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        )

    def static(path: str) -> Callable[[], Response]:
        content, kind = contents[path]
        return lambda: Response(content, media_type=f"{kind}; charset=utf-8")

    for path in _PAGE:
        app.get(path)(static(path))

    def shown(rater: str) -> dict[str, Any]:
        place = store.place(rater)
        pair = None if place.pair is None else file.pairs[place.pair]
        texts = {}
        if pair is not None:
            sides = [pair.candidate, pair.baseline] if place.candidate_left else [pair.baseline, pair.candidate]
            texts = {"prompt": pair.prompt, "left": sides[0], "right": sides[1]}
        return {"position": place.position, "total": place.total, "pair": texts or None, "choices": CHOICES}

    # Plain functions: FastAPI runs them in threads, so that a locked file stops nobody else.
    @app.post("/api/next")
    def following(body: Rater) -> dict[str, Any]:
        return shown(body.rater)

    @app.post("/api/judge")
    def judge(body: Judged) -> dict[str, Any]:
        store.judge(body.rater, body.position, body.choice)
        return shown(body.rater)

    @app.post("/api/undo")
    def undo(body: Rater) -> dict[str, Any]:
        store.undo(body.rater)
        return shown(body.rater)

    return app


def _error(status: int, message: str) -> JSONResponse:
    whole = message.encode("utf-8", "replace").decode()  # what was sent may hold halves of characters
    return JSONResponse({"error": whole}, status)
