"""The page: a session on one clip in a browser on this machine.

It turns requests into calls of a session and checks who asks and what is sent. It knows neither
the network nor what a session does; no path ever comes from a browser. The page itself is
`page.html`, which asks for nothing but what is served here.
"""

import asyncio
import base64
import hashlib
import io
import json
import re
import secrets
import socket
import webbrowser
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from media import images
from media.masks import read_mask

HTML = Path(__file__).with_name("page.html")
HOSTS = ("127.0.0.1", "localhost", "[::1]")  # with any port: a tunnel may have another
MOST_JSON, MOST_MASK = 2**18, 2**24  # bytes of a body
THUMBNAIL = 144  # pixels wide
WAIT = 15.0  # seconds that a browser waits for news at most
LOOK = 0.05  # seconds from one look for news to the next
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
NEVER = {"Cache-Control": "no-store"}


class Guard:
    """Lets in who has the token and asks this machine by its own name, from its own page.

    The name, because a stranger's page may make a name of its own lead here (DNS rebinding); the
    origin, because it may ask from afar.
    """

    def __init__(self, app, token: str, policy: str):
        self.app, self.token, self.policy = app, token.encode(), policy

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        given = request.headers.get("x-token") or request.query_params.get("token") or ""
        if re.sub(r":\d+$", "", host) not in HOSTS:
            response = JSONResponse({"error": "not the name of this machine"}, 421)
        elif origin not in (None, f"http://{host}"):
            response = JSONResponse({"error": "not from the page itself"}, 403)
        elif not secrets.compare_digest(given.encode(), self.token):
            response = JSONResponse({"error": "the token is missing or wrong: open the address "
                                              "that main.py printed"}, 403)
        else:
            return await self.app(scope, receive, self._with_policy(send))
        await response(scope, receive, send)

    def _with_policy(self, send):
        async def sending(message):
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (b"content-security-policy", self.policy.encode()),
                    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
                    (b"x-frame-options", b"DENY")]
            await send(message)
        return sending


class Fields:
    """What a browser sent, each field checked before it is used.

    Raises:
        ValueError: a field is missing, or not what is expected.
    """

    def __init__(self, body: bytes):
        try:
            self.values = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            self.values = None
        if not isinstance(self.values, dict):
            raise ValueError("expected a JSON object")

    def whole(self, name: str, low: int = 0, high: int = 2**31) -> int:
        return self._whole(name, self.values.get(name), low, high)

    def points(self, name: str, least: int = 1, most: int = 10_000) -> list[tuple[int, int]]:
        """Pairs of whole numbers."""
        value = self.values.get(name)
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(f"{name}: expected {least} to {most} points")
        if not all(isinstance(point, list) and len(point) == 2 for point in value):
            raise ValueError(f"{name}: expected points as [x, y]")
        return [(self._whole(name, x, -2**15, 2**15), self._whole(name, y, -2**15, 2**15))
                for x, y in value]

    def choice(self, name: str, values: tuple) -> str:
        value = self.values.get(name)
        if value not in values:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, values))}")
        return value

    def text(self, name: str, most: int = 60) -> str | None:
        value = self.values.get(name)
        if not (value is None or isinstance(value, str) and value.isprintable()
                and len(value) <= most):
            raise ValueError(f"{name}: expected a text of at most {most} characters")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.values.get(name)
        if value not in (None, True, False):
            raise ValueError(f"{name}: expected true or false")
        return value

    @staticmethod
    def _whole(name: str, value, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name}: expected a whole number from {low} to {high}")
        return value


def _box(session, fields: Fields) -> None:
    (x, y), (u, v) = fields.points("corners", 2, 2)
    height, width = session.shape
    left, right = sorted((min(max(x, 0), width), min(max(u, 0), width)))
    top, bottom = sorted((min(max(y, 0), height), min(max(v, 0), height)))
    if right - left < 2 or bottom - top < 2:
        raise ValueError("the box is too small: drag from one corner to the other")
    session.edits.show(fields.whole("frame"), fields.whole("object", 1, 254),
                       box=(left, top, right - left, bottom - top))


def _point(session, fields: Fields) -> None:
    (x, y), = fields.points("points", 1, 1)
    height, width = session.shape
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError("the point lies outside of the frame")
    session.edits.show(fields.whole("frame"), fields.whole("object", 1, 254), point=(x, y),
                       wanted=not fields.flag("not"))


def _stroke(session, fields: Fields) -> None:
    session.edits.stroke(fields.whole("frame"), fields.whole("object", 1, 254),
                         fields.points("points"), fields.whole("radius", 1, 500),
                         bool(fields.flag("erase")))


def _cutout(fields: Fields) -> str | None:
    value = fields.text("cutout") or None
    if not (value in (None, "transparent", "blur") or re.fullmatch("#[0-9a-fA-F]{6}", value)):
        raise ValueError("cutout: expected transparent, blur or a colour such as #00ff00")
    return value


# what a page may ask for, by the name at the end of the address
ACTIONS = {
    "box": _box,
    "point": _point,
    "stroke": _stroke,
    "forget": lambda session, fields: session.edits.forget(fields.whole("frame")),
    "undo": lambda session, fields: {"frame": session.edits.undo()},
    "add": lambda session, fields: {"object": session.edits.add_object()},
    "change": lambda session, fields: session.edits.change_object(
        fields.whole("object", 1, 254), fields.text("name"), fields.flag("hidden")),
    "delete": lambda session, fields: session.edits.delete_object(fields.whole("object", 1, 254)),
    "segment": lambda session, fields: session.segment_from(
        fields.whole("frame"), fields.choice("way", ("forwards", "backwards", "both"))),
    "stop": lambda session, fields: session.stop(),
    "export": lambda session, fields: session.export(
        _cutout(fields), fields.choice("format", ("png", "mov", "webm", None)) or "png",
        [name for name in ("coco", "yolo") if fields.flag(name)]),
}


async def _body(request: Request, most: int) -> bytes:
    """All of it, unless there is more than `most`, of which nothing is kept."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > most:
        raise HTTPException(413, f"expected {most} bytes at most")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise HTTPException(413, f"expected {most} bytes at most")
    return bytes(content)


def _png(mask: np.ndarray) -> bytes:
    return cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _read_mask(content: bytes, shape: tuple[int, int]) -> np.ndarray:
    """A mask that a browser sent; raises a ValueError that says what is wrong with it."""
    try:
        image = Image.open(io.BytesIO(content))  # its header, before anything is unpacked
        size, kind = image.size, str(image.format).lower()
    except Exception:
        raise ValueError("this is not an image file that holds a mask") from None
    images.check_same_shape("the clip", shape, "this file", size[::-1])
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder, f"mask.{kind}")
            path.write_bytes(content)
            return read_mask(path, own=True)
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(str(path), "this file")) from None


def application(session, token: str, html: str | None = None) -> Starlette:
    """The ASGI application of a session.

    Args:
        session: has shape, version, image, mask, state, edits, and what `ACTIONS` calls.
        token: who doesn't send it is refused.
    """
    html = html or HTML.read_text(encoding="utf-8")

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=NEVER)

    async def state(request: Request) -> Response:
        since, end = int(request.path_params["since"]), asyncio.get_running_loop().time() + WAIT
        while session.version == since and asyncio.get_running_loop().time() < end:
            if await request.is_disconnected():
                break
            await asyncio.sleep(LOOK)
        return JSONResponse(await run_in_threadpool(session.state, since), headers=NEVER)

    def frame(request: Request) -> Response:
        image = session.image(request.path_params["frame"])
        return Response(_jpeg(image), media_type="image/jpeg", headers=FOREVER)

    def thumbnail(request: Request) -> Response:
        image = session.image(request.path_params["frame"])
        size = THUMBNAIL, max(1, round(THUMBNAIL * image.shape[0] / image.shape[1]))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return Response(_jpeg(small, 80), media_type="image/jpeg", headers=FOREVER)

    def mask(request: Request) -> Response:
        found = session.mask(request.path_params["frame"])
        if found is None:
            found = np.zeros(session.shape, np.uint8)
        return Response(_png(found), media_type="image/png", headers=NEVER)

    async def bring(request: Request) -> Response:
        content = await _body(request, MOST_MASK)
        found = await run_in_threadpool(_read_mask, content, session.shape)
        await run_in_threadpool(session.edits.give, request.path_params["frame"], found)
        return JSONResponse({})

    async def act(request: Request) -> Response:
        action = ACTIONS.get(request.path_params["action"])
        if action is None:
            raise HTTPException(404, "no such action")
        fields = Fields(await _body(request, MOST_JSON))
        return JSONResponse(await run_in_threadpool(action, session, fields) or {})

    def refuse(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 400)
        return JSONResponse({"error": getattr(error, "detail", str(error))}, status,
                            headers={"Connection": "close"} if status == 413 else None)

    app = Starlette(routes=[
        Route("/", page), Route("/state/{since:int}", state),
        Route("/frame/{frame:int}", frame), Route("/thumbnail/{frame:int}", thumbnail),
        Route("/mask/{frame:int}", mask), Route("/mask/{frame:int}", bring, methods=["PUT"]),
        Route("/do/{action:str}", act, methods=["POST"]),
    ], exception_handlers={HTTPException: refuse, ValueError: refuse, OSError: refuse})
    app.add_middleware(Guard, token=token, policy=_policy(html))
    return app


def _policy(html: str) -> str:
    """The Content-Security-Policy that lets this page's own script and style run, nothing else."""
    found = {}
    for kind in ("script", "style"):
        text, = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        found[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{found['script']}'; "
            f"style-src 'sha256-{found['style']}'; img-src 'self' data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def serve(session, port: int = 0, browse: bool = True) -> None:
    """Serve a session on the loopback address until Ctrl+C, and open it in a browser.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    import uvicorn
    token = secrets.token_urlsafe(24)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"--page {port}: {error.strerror}, name another port") from error
        listening.listen()  # so that who is quick waits instead of being refused
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"
        print(f"{address}\nopen it in a browser on this machine; Ctrl+C ends, and the same command "
              "goes on", flush=True)
        if browse:
            with suppress(webbrowser.Error):
                webbrowser.open(address)
        server = uvicorn.Server(uvicorn.Config(
            application(session, token), log_level="warning", timeout_graceful_shutdown=1,
            server_header=False))
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
