"""The web server of a session: checks requests and turns them into calls of the session.

The page, `page.html`, requests only what is served here, by relative addresses, so that it also
works behind a proxy that puts a prefix in front of the path. No file path comes from a browser.
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
from html import escape
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

from masks import annotation_files
from masks.encoding import MaskEncoding
from media import images
from media.drawing import PALETTE
from webapp.store import encode_mask

HTML = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # with any port: a tunnel may have another
# Bytes of a request body, which is held in memory: long strokes fit, and as masks also COCO files,
# which hold the annotations of a whole clip. A proxy needs the same limit (docs/own_video.md).
MAX_JSON, MAX_MASK = 2**18, 2**26
MAX_TEXT = 60  # characters, of names
THUMBNAIL_WIDTH = 144  # pixels
# Seconds that a request for changes waits at most. Proxies often close requests after 30 or 60.
MAX_WAIT = 15.0
POLL_INTERVAL = 0.02  # seconds between checks for changes: below what users notice
# Browsers cache frames for a day. Their addresses contain the key of one run of the server, because
# another run may serve another clip on the same port.
CACHED = {"Cache-Control": "private, max-age=86400, immutable"}
NOT_CACHED = {"Cache-Control": "no-store"}


class Guard:
    """ASGI middleware that rejects requests without the token, and requests from other sites.

    The token is in the address that is opened first. It is exchanged for a cookie, so that the
    address bar needn't show it. The cookie has no path: by default a browser sends it to addresses
    below the one that set it, with any prefix that a proxy puts in front.

    Args:
        token: accepted in the address of the page, and from scripts as the header X-Token.
        codes: accepted like the token in the address of the page, but once each.
        key: identifies this run of the server; a tab of an earlier run gets an error that asks to
            reload it.
        hosts: names under which the page may be opened; "*" stands for any IP address. Others are
            rejected, because another site could have its own name resolve to this machine (DNS
            rebinding); it can't do that with an IP address.
        policy: the Content-Security-Policy of every response.
        ending: whether the server is shutting down.
    """

    def __init__(self, app, token: str, codes: Sequence[str], key: str, hosts: Sequence[str],
                 policy: str, ending: Callable[[], bool]):
        self.app, self.token, self.codes, self.key = app, token, list(codes), key
        self.hosts, self.policy, self.ending = [name.lower() for name in hosts], policy, ending
        # Browsers share cookies between ports, so each run needs its own cookie name.
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
            if not self.ending():  # on shutdown, cancelled requests are expected
                raise

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not self._is_known_host(host):
            name = re.sub(r":\d+$", "", host)
            return JSONResponse({"error": f"this page isn't served under the name {name}: add it "
                                          "to --page_host, after the address"}, 421)
        if self._is_cross_site(request, host):
            return JSONResponse({"error": "the request comes from another site"}, 403)
        if not self._is_allowed(request):
            return JSONResponse({"error": "the token is missing, wrong, or used up: open the "
                                          "address that main.py printed"}, 403)
        if request.query_params.get("session", self.key) != self.key:
            return JSONResponse({"error": "main.py was started again: reload the page"}, 409,
                                headers=NOT_CACHED)
        return None

    def _is_known_host(self, host: str) -> bool:
        name = re.sub(r":\d+$", "", host).lower()
        if name in self.hosts:
            return True
        with suppress(ValueError):
            return "*" in self.hosts and bool(ipaddress.ip_address(name.strip("[]")))
        return False

    def _is_cross_site(self, request: Request, host: str) -> bool:
        """Whether the request comes from another site, by Sec-Fetch-Site or Origin."""
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
        # A proxy may have replaced the header Host by its own name.
        forwarded = request.headers.get("x-forwarded-host", "").replace(" ", "").split(",")
        known = (name in self.hosts and name not in LOOPBACK
                 and name != re.sub(r":\d+$", "", host).lower())
        return not address.netloc or not known and address.netloc not in (host, *forwarded)

    def _is_allowed(self, request: Request) -> bool:
        if (_equal(request.headers.get("x-token"), self.token)
                or _equal(request.cookies.get(self.cookie_name), self.cookie)):
            return True
        token = request.query_params.get("token")
        if request.method != "GET" or request.url.path != "/":
            return False
        for code in self.codes:
            if _equal(token, code):
                self.codes.remove(code)
                return True
        return _equal(token, self.token)

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


def _equal(value: str | None, expected: str) -> bool:
    """Compare in constant time, so that response times don't help to guess the token."""
    return value is not None and secrets.compare_digest(value.encode(), expected.encode())


class Fields:
    """The JSON object of a request, with checks of each field.

    Raises:
        ValueError: it is not a JSON object; by methods, a field is missing or invalid.
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

    def points(self, name: str, low: int = 1, limit: int = 10_000) -> list[tuple[int, int]]:
        """A list of `low` to `limit` points, x and y in pixels; may lie outside the frame."""
        value = self.values.get(name)
        if not isinstance(value, list) or not low <= len(value) <= limit:
            raise ValueError(f"{name}: expected {low} to {limit} points")
        if not all(isinstance(point, list) and len(point) == 2 for point in value):
            raise ValueError(f"{name}: expected points as [x, y]")
        return [(self._whole(name, x, -2**15, 2**15), self._whole(name, y, -2**15, 2**15))
                for x, y in value]

    def choice(self, name: str, values: tuple) -> str:
        value = self.values.get(name)
        if value not in values:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, values))}")
        return value

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if not (value is None or isinstance(value, str) and value.isprintable()
                and len(value) <= MAX_TEXT):
            raise ValueError(f"{name}: expected one line of at most {MAX_TEXT} printable "
                             "characters")
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
    session.editor.add_prompt(fields.whole("frame"), fields.whole("object", 1, 254),
                              box=(left, top, right - left, bottom - top))


def _point(session, fields: Fields) -> None:
    (x, y), = fields.points("points", 1, 1)
    height, width = session.shape
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError("the point lies outside of the frame")
    session.editor.add_prompt(fields.whole("frame"), fields.whole("object", 1, 254), point=(x, y),
                              positive=not fields.flag("not"))


def _stroke(session, fields: Fields) -> None:
    session.editor.paint(fields.whole("frame"), fields.whole("object", 1, 254),
                         fields.points("points"), fields.whole("radius", 1, 2000),
                         bool(fields.flag("erase")))


def _mark(session, fields: Fields, word: str) -> None:
    on = fields.flag("on")
    session.editor.mark(fields.whole("frame"), fields.whole("object", 1, 254), word,
                       True if on is None else on)


def _cutout(fields: Fields) -> str | None:
    value = fields.text("cutout") or None
    if not (value in (None, "transparent", "blur") or re.fullmatch("#[0-9a-fA-F]{6}", value)):
        raise ValueError("cutout: expected transparent, blur or a colour such as #00ff00")
    return value


# functions of the session that the page may call, by the last part of the address
ACTIONS = {
    "box": _box,
    "point": _point,
    "stroke": _stroke,
    "absent": lambda session, fields: _mark(session, fields, "absent"),
    "gone": lambda session, fields: _mark(session, fields, "gone"),
    "remove_mask": lambda session, fields: session.editor.remove_mask(fields.whole("frame")),
    "undo": lambda session, fields: {"frame": session.editor.undo()},
    "add": lambda session, fields: {"object": session.editor.add_object()},
    "rename": lambda session, fields: session.editor.rename_object(
        fields.whole("object", 1, 254), fields.text("name") or ""),
    "delete": lambda session, fields: session.editor.delete_object(fields.whole("object", 1, 254)),
    "segment": lambda session, fields: session.segment_from(
        fields.whole("frame"), fields.choice("direction", ("forward", "backward", "both"))),
    "stop": lambda session, fields: session.stop(),
    "export": lambda session, fields: session.export(
        _cutout(fields), fields.choice("format", ("png", "mov", "webm", None)) or "png",
        [name for name in ("coco", "yolo") if fields.flag(name)]),
}


# of a live clip, in which there is no way back
LIVE_ACTIONS = {name: ACTIONS[name] for name in ("box", "point", "add", "rename", "delete", "stop")
                } | {"hold": lambda session, fields: session.hold(fields.whole("frame"))}


async def _body(request: Request, limit: int) -> bytes:
    """Read a request's body; reject one of more than `limit` bytes without storing it."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise HTTPException(413, f"too large: expected at most {limit / 2**20:g} MB")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > limit:
            raise HTTPException(413, f"too large: expected at most {limit / 2**20:g} MB")
    return bytes(content)


def _jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _upload_mask(session, frame: int, content: bytes) -> None:
    """Make an uploaded file the user mask of a frame: an image, or a labelme or COCO file.

    Raises:
        ValueError: it is no mask of the clip's size, or there is no such frame; the message is for
            the page.
    """
    session.image(frame)  # fails for a frame that does not exist, before the file is read
    # A label that is an object's name means that object; new objects get ids that were never used.
    names = dict.fromkeys(range(1, session.store.next_id)) | {
        obj.id: obj.name for obj in session.store.objects}
    is_json = content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
    if is_json:
        kind = "json"
    else:
        try:
            # reads only the header: an image of another size is rejected before it is decompressed
            shape = images.image_shape(io.BytesIO(content), "a mask")
            kind = str(Image.open(io.BytesIO(content)).format).lower()
        except Exception:
            raise ValueError("this is not an image file, nor one of labelme or COCO (JSON)"
                             ) from None
        if shape != session.clip.stored:
            images.check_same_shape("the clip", session.shape, "this file", shape)
    with TemporaryDirectory() as folder:
        path = Path(folder, f"mask.{kind}")
        path.write_bytes(content)
        try:
            mask = (annotation_files.read(path, session.clip.frame_name(frame), names=names,
                                          shape=session.shape) if is_json
                    else session.clip.fit(MaskEncoding.detect(
                        [path], user_drawn=True, assigned=session.store.colours).read(path)))
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(str(path), "this file")) from None
    session.editor.set_mask(frame, mask, names)


def application(session, token: str, html: str | None = None, codes: Sequence[str] = (),
                hosts: Sequence[str] = LOOPBACK,
                ending: Callable[[], bool] = lambda: False) -> Starlette:
    """The ASGI application of a session.

    Args:
        session: a `Session` or a `LiveSession`.
        token, codes, hosts, ending: see `Guard`.
    """
    key = secrets.token_hex(8)
    html = html or HTML.read_text(encoding="utf-8")
    name = session.clip.name if session.live else session.clip.path.name
    html = html.replace("<title>", f"<title>{escape(name)} – ")
    html = html.replace("<body>", f'<body data-session="{key}" data-palette="{_palette()}">')

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=NOT_CACHED)

    async def state(request: Request) -> Response:
        since, end = int(request.path_params["since"]), asyncio.get_running_loop().time() + MAX_WAIT
        while session.version == since and asyncio.get_running_loop().time() < end:
            if ending() or await request.is_disconnected():
                break
            await asyncio.sleep(POLL_INTERVAL)
        return JSONResponse(await run_in_threadpool(session.state, since), headers=NOT_CACHED)

    def frame(request: Request) -> Response:
        picture = _jpeg(session.image(request.path_params["frame"]))
        if session.live:  # never asked for again
            return Response(picture, media_type="image/jpeg", headers=NOT_CACHED)
        return _picture(request, picture)

    def thumbnail(request: Request) -> Response:
        image = session.thumbnail(request.path_params["frame"])
        size = THUMBNAIL_WIDTH, max(1, round(THUMBNAIL_WIDTH * image.shape[0] / image.shape[1]))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return _picture(request, _jpeg(small, 80))

    def mask(request: Request) -> Response:
        values = session.mask(request.path_params["frame"])
        if values is None:
            values = np.zeros(session.shape, np.uint8)
        return Response(encode_mask(values), media_type="image/png", headers=NOT_CACHED)

    async def upload_mask(request: Request) -> Response:
        content = await _body(request, MAX_MASK)
        await run_in_threadpool(_upload_mask, session, request.path_params["frame"], content)
        return JSONResponse({})

    async def act(request: Request) -> Response:
        action = (LIVE_ACTIONS if session.live else ACTIONS).get(request.path_params["action"])
        if action is None:
            raise HTTPException(404, "no such action")
        fields = Fields(await _body(request, MAX_JSON))
        return JSONResponse(await run_in_threadpool(action, session, fields) or {})

    routes = [Route("/", page), Route("/state/{since:int}", state),
              Route("/frame/{frame:int}", frame), Route("/mask/{frame:int}", mask),
              Route("/do/{action:str}", act, methods=["POST"])]
    if not session.live:
        routes += [Route("/thumbnail/{frame:int}", thumbnail),
                   Route("/mask/{frame:int}", upload_mask, methods=["PUT"])]
    app = Starlette(routes=routes, exception_handlers={
        HTTPException: _refuse, ValueError: _refuse, OSError: _refuse})
    app.add_middleware(Guard, token=token, codes=codes, key=key, hosts=hosts,
                       policy=_policy(html), ending=ending)
    return app


def _picture(request: Request, content: bytes) -> Response:
    """A JPEG response; cached only if its address contains the key of the server's run."""
    headers = CACHED if "session" in request.query_params else NOT_CACHED
    return Response(content, media_type="image/jpeg", headers=headers)


def _refuse(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 400)
    return JSONResponse({"error": getattr(error, "detail", str(error))}, status,
                        headers=NOT_CACHED | ({"Connection": "close"} if status == 413 else {}))


def _palette() -> str:
    """The colours of object ids 0 to 255 in masks and overlays, six hexadecimal digits each."""
    return PALETTE.tobytes().hex()


def _policy(html: str) -> str:
    """The Content-Security-Policy that allows only this page's own script and style."""
    hashes = {}
    for kind in ("script", "style"):
        text, = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        hashes[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
            f"style-src 'sha256-{hashes['style']}'; img-src 'self' data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def serve(session, port: int = 0, browse: bool = True,
          hosts: Sequence[str] = ("127.0.0.1",)) -> None:
    """Serve a session until Ctrl+C or the end of a live clip, and open it in a browser.

    Args:
        port: 0 takes a free one.
        hosts: the address to listen on, then further names under which the page is opened, such
            as a proxy's.

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """
    import uvicorn
    token, code = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    with _listen(hosts[0], port) as listening:
        address, port = listening.getsockname()[:2]
        reachable = ipaddress.ip_address(address)
        names = [*LOOPBACK, *hosts[1:]]
        if not reachable.is_loopback:
            names += ["*", socket.gethostname()]
        here = "127.0.0.1" if reachable.is_unspecified else str(reachable)
        root = f"http://{f'[{here}]' if ':' in here else here}:{port}/"
        print(f"{root}?token={token}\nopen it in a browser; Ctrl+C ends the session"
              + ("" if session.live else ", and the same command resumes it"), flush=True)
        if not reachable.is_loopback:
            print("other machines can open it too, by this machine's name or address and with the "
                  "token; the connection is not encrypted", flush=True)

        async def end_with_the_clip() -> None:
            server.should_exit |= session.live and session.ended

        server = uvicorn.Server(uvicorn.Config(
            application(session, token, None, [code], names, lambda: server.should_exit),
            log_level="warning", timeout_graceful_shutdown=3, server_header=False,
            callback_notify=end_with_the_clip, timeout_notify=1))
        if browse:  # with a one-time code: other users can see a browser's command line
            with suppress(webbrowser.Error):
                webbrowser.open(f"{root}?token={code}")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """Open a listening socket, so that a browser that is faster than the server can connect."""
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
