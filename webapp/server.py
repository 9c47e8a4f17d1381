"""The page: a session on one clip, served to a browser.

It turns requests into calls of a session and checks who asks and what is sent. It knows neither
the network nor what a session does; no path ever comes from a browser. The page itself is
`page.html`, which asks for nothing but what is served here, by relative addresses, so that it also
works behind a proxy that puts a prefix in front of the path.
"""

import asyncio
import base64
import errno
import hashlib
import io
import ipaddress
import json
import re
import secrets
import socket
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import cv2
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from masks.read import read_mask
from media import images
from media.drawing import PALETTE

HTML = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # with any port: a tunnel may have another
MOST_JSON, MOST_MASK = 2**18, 2**24  # bytes of a body
THUMBNAIL = 144  # pixels wide
WAIT = 15.0  # seconds that a browser waits for news at most
LOOK = 0.05  # seconds from one look for news to the next
# Frames are kept for a day by a browser. Their addresses hold the key of one run of the server,
# because another run may serve another clip on the same port.
KEPT = {"Cache-Control": "private, max-age=86400, immutable"}
NEVER = {"Cache-Control": "no-store"}


class Guard:
    """ASGI middleware that answers only the page itself, in a browser that had the token.

    The token is in the address that is opened first. It is exchanged for a cookie, so that it
    doesn't have to stay there. The cookie names no path: by default a browser sends it to
    addresses below the one that set it, whatever prefix a proxy puts in front.

    Args:
        token: accepted in the address of the page, and from scripts as the header X-Token.
        codes: like the token in the address of the page, but each is accepted once.
        key: of this run of the server; a tab that an earlier run served is told to reload.
        hosts: names under which the page is opened; "*" stands for any IP address. Others are
            refused, since a foreign page may have its own name point to this machine (DNS
            rebinding), which it can't do with an address.
        policy: the Content-Security-Policy of every answer.
        ending: whether the server is shutting down.
    """

    def __init__(self, app, token: str, codes: Sequence[str], key: str, hosts: Sequence[str],
                 policy: str, ending: Callable[[], bool]):
        self.app, self.token, self.codes, self.key = app, token, list(codes), key
        self.hosts, self.policy, self.ending = [name.lower() for name in hosts], policy, ending
        # Cookies don't differ by port, so that each run needs a name of its own.
        self.cookie_name, self.cookie = f"videomatch-{key}", secrets.token_urlsafe(24)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        response = self._refusal(request)
        try:
            if response is None:
                await self.app(scope, receive, self._with_headers(request, send))
            else:
                await response(scope, receive, send)
        except asyncio.CancelledError:
            if not self.ending():  # else nobody waits for the answer any more
                raise

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not self._is_known(host):
            name = re.sub(r":\d+$", "", host)
            return JSONResponse({"error": f"this page isn't served under the name {name}: add it "
                                          "to --page_host, after the address"}, 421)
        if self._is_foreign(request, host):
            return JSONResponse({"error": "not asked by the page itself"}, 403)
        if not self._is_allowed(request):
            return JSONResponse({"error": "the token is missing, wrong, or used up: open the "
                                          "address that main.py printed"}, 403)
        if request.query_params.get("session", self.key) != self.key:
            return JSONResponse({"error": "main.py was started again: reload the page"}, 409,
                                headers=NEVER)
        return None

    def _is_known(self, host: str) -> bool:
        name = re.sub(r":\d+$", "", host).lower()
        if name in self.hosts:
            return True
        with suppress(ValueError):
            return "*" in self.hosts and bool(ipaddress.ip_address(name.strip("[]")))
        return False

    def _is_foreign(self, request: Request, host: str) -> bool:
        """Whether another site's page asks, which the browser says in one header or another."""
        site, mode = (request.headers.get(f"sec-fetch-{name}") for name in ("site", "mode"))
        if site in ("cross-site", "same-site"):
            return mode != "navigate"  # a link to the page may be anywhere
        origin = request.headers.get("origin")
        if origin is None or site == "same-origin":
            return False
        try:
            address = urlsplit(origin)
            name = address.hostname or ""
        except ValueError:
            return True
        # A proxy may have put its own name in the header Host.
        forwarded = request.headers.get("x-forwarded-host", "").replace(" ", "").split(",")
        known = (name in self.hosts and name not in LOOPBACK
                 and name != re.sub(r":\d+$", "", host).lower())
        return not address.netloc or not known and address.netloc not in (host, *forwarded)

    def _is_allowed(self, request: Request) -> bool:
        if (_same(request.headers.get("x-token"), self.token)
                or _same(request.cookies.get(self.cookie_name), self.cookie)):
            return True
        given = request.query_params.get("token")
        if request.method != "GET" or request.url.path != "/":
            return False
        for code in self.codes:
            if _same(given, code):
                self.codes.remove(code)
                return True
        return _same(given, self.token)

    def _with_headers(self, request: Request, send):
        headers = [(b"content-security-policy", self.policy.encode()),
                   (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
                   (b"cross-origin-resource-policy", b"same-origin"), (b"x-frame-options", b"DENY")]
        if request.url.path == "/" and "token" in request.query_params:
            headers.append((b"set-cookie", f"{self.cookie_name}={self.cookie}; HttpOnly; "
                                           "SameSite=Strict".encode()))

        async def sending(message):
            if message["type"] == "http.response.start":
                message["headers"] += headers
            await send(message)
        return sending


def _same(given: str | None, expected: str) -> bool:
    """Compare in constant time, so that the time of an answer doesn't help to guess."""
    return given is not None and secrets.compare_digest(given.encode(), expected.encode())


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


def _mark(session, fields: Fields, word: str) -> None:
    on = fields.flag("on")
    session.edits.mark(fields.whole("frame"), fields.whole("object", 1, 254), word,
                       True if on is None else on)


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
    "absent": lambda session, fields: _mark(session, fields, "absent"),
    "gone": lambda session, fields: _mark(session, fields, "gone"),
    "forget": lambda session, fields: session.edits.forget(fields.whole("frame")),
    "undo": lambda session, fields: {"frame": session.edits.undo()},
    "add": lambda session, fields: {"object": session.edits.add_object()},
    "change": lambda session, fields: session.edits.rename_object(
        fields.whole("object", 1, 254), fields.text("name") or ""),
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
            return read_mask(path, user_drawn=True)
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(str(path), "this file")) from None


def application(session, token: str, html: str | None = None, codes: Sequence[str] = (),
                hosts: Sequence[str] = LOOPBACK,
                ending: Callable[[], bool] = lambda: False) -> Starlette:
    """The ASGI application of a session.

    Args:
        session: has shape, version, image, mask, state, edits, and what `ACTIONS` calls.
        token, codes, hosts, ending: see `Guard`.
    """
    key = secrets.token_hex(8)
    html = html or HTML.read_text(encoding="utf-8")
    html = html.replace("<body>", f'<body data-session="{key}" data-palette="{_palette()}">')

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=NEVER)

    async def state(request: Request) -> Response:
        since, end = int(request.path_params["since"]), asyncio.get_running_loop().time() + WAIT
        while session.version == since and asyncio.get_running_loop().time() < end:
            if ending() or await request.is_disconnected():
                break
            await asyncio.sleep(LOOK)
        return JSONResponse(await run_in_threadpool(session.state, since), headers=NEVER)

    def frame(request: Request) -> Response:
        return _picture(request, _jpeg(session.image(request.path_params["frame"])))

    def thumbnail(request: Request) -> Response:
        image = session.thumbnail(request.path_params["frame"])
        size = THUMBNAIL, max(1, round(THUMBNAIL * image.shape[0] / image.shape[1]))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return _picture(request, _jpeg(small, 80))

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

    app = Starlette(routes=[
        Route("/", page), Route("/state/{since:int}", state),
        Route("/frame/{frame:int}", frame), Route("/thumbnail/{frame:int}", thumbnail),
        Route("/mask/{frame:int}", mask), Route("/mask/{frame:int}", bring, methods=["PUT"]),
        Route("/do/{action:str}", act, methods=["POST"]),
    ], exception_handlers={HTTPException: _refuse, ValueError: _refuse, OSError: _refuse})
    app.add_middleware(Guard, token=token, codes=codes, key=key, hosts=hosts,
                       policy=_policy(html), ending=ending)
    return app


def _picture(request: Request, content: bytes) -> Response:
    """A frame, which a browser may keep only if its address says which run it is of."""
    headers = KEPT if "session" in request.query_params else NEVER
    return Response(content, media_type="image/jpeg", headers=headers)


def _refuse(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 400)
    return JSONResponse({"error": getattr(error, "detail", str(error))}, status,
                        headers=NEVER | ({"Connection": "close"} if status == 413 else {}))


def _palette() -> str:
    """The colours of object ids 0 to 255 in masks and overlays, six hexadecimal digits each."""
    return PALETTE.tobytes().hex()


def _policy(html: str) -> str:
    """The Content-Security-Policy that lets this page's own script and style run, nothing else."""
    found = {}
    for kind in ("script", "style"):
        text, = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        found[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{found['script']}'; "
            f"style-src 'sha256-{found['style']}'; img-src 'self' data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def serve(session, port: int = 0, browse: bool = True,
          hosts: Sequence[str] = ("127.0.0.1",)) -> None:
    """Serve a session until Ctrl+C, and open it in a browser.

    Args:
        port: 0 takes a free one.
        hosts: the address to listen on, then further names under which the page is opened, such
            as a proxy's.

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """
    import uvicorn
    token, code = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    with _listening(hosts[0], port) as listening:
        address, port = listening.getsockname()[:2]
        reachable = ipaddress.ip_address(address)
        names = [*LOOPBACK, *hosts[1:]]
        if not reachable.is_loopback:
            names += ["*", socket.gethostname()]
        here = "127.0.0.1" if reachable.is_unspecified else str(reachable)
        root = f"http://{f'[{here}]' if ':' in here else here}:{port}/"
        print(f"{root}?token={token}\nopen it in a browser; Ctrl+C ends, and the same command "
              "continues", flush=True)
        if not reachable.is_loopback:
            print("other machines can open it too, by this machine's name or address and with the "
                  "token; nothing is encrypted on the way", flush=True)
        server = uvicorn.Server(uvicorn.Config(
            application(session, token, None, [code], names, lambda: server.should_exit),
            log_level="warning", timeout_graceful_shutdown=3, server_header=False))
        if browse:  # with a code for once, as other users can see a browser's command line
            with suppress(webbrowser.Error):
                webbrowser.open(f"{root}?token={code}")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that a quick browser waits instead of being refused."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"--page_host {host}: {error.strerror}, expected an address of this machine, "
                      "such as 127.0.0.1, or 0.0.0.0 for all of them") from error
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise OSError(f"--page_host {host}: {error.strerror}, expected an address of this "
                          "machine, such as 127.0.0.1, or 0.0.0.0 for all of them") from error
        raise OSError(f"--page {port}: {error.strerror}, name another port") from error
    return listening
