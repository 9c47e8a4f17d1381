"""The page's server without a browser: access checks and refused requests."""

import errno
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from conftest import TOKEN, do, draw_frame, png, truth
from PIL import Image
from starlette.testclient import TestClient

import main
from media import images
from webapp import server
from webapp import session as sessions
from webapp.server import MAX_JSON, MAX_MASK

FRAMES, SHAPE = 12, (96, 160)


def labelme(size, *squares):
    """A labelme file for an image of `size` (width, height); squares are (label, x, y)."""
    return json.dumps({"imageWidth": size[0], "imageHeight": size[1], "shapes": [
        {"label": label, "points": [[x, y], [x + 20, y + 20]], "shape_type": "rectangle"}
        for label, x, y in squares]}).encode()


EVERYWHERE = [("GET", "/"), ("GET", "/state/0"), ("GET", "/frame/0"), ("GET", "/thumbnail/0"),
              ("GET", "/mask/0"), ("PUT", "/mask/0"), ("POST", "/do/undo"), ("GET", "/nowhere")]


@pytest.mark.parametrize("method, path", EVERYWHERE)
@pytest.mark.parametrize("headers, status", [
    ({"X-Token": ""}, 403), ({"X-Token": "another"}, 403), ({"X-Token": "ä".encode()}, 403),
    ({"Host": "evil.example"}, 421), ({"Host": "127.0.0.1.evil.example:8000"}, 421),
    ({"Host": ""}, 421), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Origin": "http://127.0.0.1:9"}, 403)])
def test_every_address_rejects_requests_from_elsewhere(method, path, headers, status, client):
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == status and answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:9", "[::1]:80", "localhost"])
def test_this_machine_is_accepted_on_any_port(host, client):
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert client.get("/state/0", headers=headers).status_code == 200


def test_the_page_loads_nothing_from_other_sites(client):
    answer = client.get("/", params={"token": TOKEN}, headers={"X-Token": ""})
    assert answer.status_code == 200 and "<canvas" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert "http://" not in answer.text and "https://" not in answer.text
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_token_is_exchanged_for_a_cookie(client):
    del client.headers["X-Token"]
    assert client.get("/state/0").status_code == 403
    answer = client.get("/", params={"token": TOKEN})
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    # without a path a browser takes that of the page, as it sees it through a proxy
    assert "path" not in cookie.lower()
    assert client.get("/state/0").status_code == 200
    name, value = re.match("([^=]+)=([^;]+)", cookie).groups()
    client.cookies.clear()
    for wrong in (f"{name}=x", f"x={value}", f"{name}={TOKEN}"):
        assert client.get("/state/0", headers={"Cookie": wrong}).status_code == 403


def test_the_token_in_an_address_opens_only_the_page(client):
    del client.headers["X-Token"]
    for path in ("/state/0", "/frame/0", "/mask/0"):
        assert client.get(path, params={"token": TOKEN}).status_code == 403
    assert client.post("/", params={"token": TOKEN}).status_code == 403


def test_only_images_of_this_run_are_cached(client):
    session = re.search('data-session="(.+?)"', client.get("/").text)[1]
    for path in ("/", "/state/0", "/frame/0", "/thumbnail/0", "/mask/0", "/frame/99"):
        assert client.get(path).headers["cache-control"] == "no-store"
        kept = client.get(path, params={"session": session}).headers["cache-control"]
        assert ("max-age" in kept) == (path in ("/frame/0", "/thumbnail/0"))
        stale = client.get(path, params={"session": "of an earlier run"})
        assert stale.status_code == 409 and stale.headers["cache-control"] == "no-store"
    assert client.post("/do/add", params={"session": "x"}).status_code == 409
    again = TestClient(server.application(client.session, TOKEN), base_url="http://127.0.0.1:8000",
                       headers={"X-Token": TOKEN})
    assert session not in again.get("/").text, "each run has a key of its own"


def test_the_page_has_the_colours_of_exported_masks(client, tmp_path):
    page = client.get("/").text
    palette = bytes.fromhex(re.search('data-palette="(.+?)"', page)[1])
    images.write_mask(tmp_path / "mask.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    shown = np.frombuffer(palette, np.uint8).reshape(16, 16, 3)
    np.testing.assert_array_equal(shown, Image.open(tmp_path / "mask.png").convert("RGB"))


# where it is reached

def guarded(client, *hosts):
    return TestClient(server.application(client.session, TOKEN, hosts=[*server.LOOPBACK, *hosts]),
                      headers={"X-Token": TOKEN})


@pytest.mark.parametrize("hosts, host, status", [
    ((), "192.168.1.5:8000", 421), (("*",), "192.168.1.5:8000", 200), (("*",), "[fe80::1]:9", 200),
    (("*",), "evil.example", 421), (("*",), "192.168.1.5.evil.example", 421), (("*",), "", 421),
    (("Hub.example",), "hub.EXAMPLE:443", 200), (("hub.example",), "x.hub.example", 421)])
def test_a_host_name_is_accepted_if_it_was_passed(hosts, host, status, client):
    answer = guarded(client, *hosts).get("/state/0", headers={"Host": host})
    assert answer.status_code == status
    assert status == 200 or "--page_host" in answer.json()["error"]


@pytest.mark.parametrize("headers, status", [
    # a proxy passes the name on, which it was asked by over https
    ({"Host": "hub.example", "Origin": "https://hub.example"}, 200),
    ({"Host": "127.0.0.1:8123", "Origin": "https://hub.example"}, 200),  # it puts in its own
    ({"Host": "127.0.0.1:8123", "Origin": "https://other.example"}, 403),
    ({"Host": "127.0.0.1:8123", "Origin": "http://a:90", "X-Forwarded-Host": "b, a:90"}, 200),
    ({"Host": "127.0.0.1:8123", "Origin": "http://a:91", "X-Forwarded-Host": "a:90"}, 403),
    ({"Host": "127.0.0.1:8123", "Origin": "https://a", "Sec-Fetch-Site": "same-origin"}, 200),
    ({"Host": "hub.example:1", "Origin": "http://hub.example:2"}, 403),  # another port's page
    ({"Host": "127.0.0.1:8123", "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
    ({"Host": "127.0.0.1:8123", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}, 403),
    ({"Host": "127.0.0.1:8123", "Origin": "http://[::1"}, 403),
    ({"Host": "127.0.0.1:8123", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
     200)])
def test_other_sites_are_refused_behind_a_proxy(headers, status, client):
    assert guarded(client, "hub.example").post("/do/stop", headers=headers | {
        "Content-Length": "2"}, content=b"{}").status_code == status


def served(client, monkeypatch, capsys, *hosts, port=0):
    """What `serve` prints, the address that it opens in a browser, and the application."""
    opened, served = [], []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(
        (self.config.app, sockets[0].getsockname())))
    server.serve(client.session, port, hosts=hosts or ["127.0.0.1"])
    (app, name), = served
    return capsys.readouterr().out, opened[0], TestClient(app), name


def test_the_browser_is_opened_with_a_one_time_code(client, monkeypatch, capsys):
    out, opened, browser, _ = served(client, monkeypatch, capsys)
    printed = out.split()[0]
    assert opened != printed and opened.split("?")[0] == printed.split("?")[0]
    assert browser.get(opened).status_code == 200
    assert browser.get(opened.split("?")[0]).status_code == 200, "the cookie stays"
    browser.cookies.clear()
    assert browser.get(opened).status_code == 403, "other users may have seen it in a list"
    for _ in range(2):
        browser.cookies.clear()
        assert browser.get(printed).status_code == 200


@pytest.mark.parametrize("host, listens, shown", [
    ("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("localhost", None, None),
    ("0.0.0.0", "0.0.0.0", "127.0.0.1")])
def test_the_server_listens_on_the_given_address(host, listens, shown, client, monkeypatch, capsys):
    out, _, browser, name = served(client, monkeypatch, capsys, host)
    assert listens in (None, name[0]) and (shown or "") in out.split()[0]
    assert ("not encrypted" in out) == (host == "0.0.0.0")
    token = out.split()[0].split("token=")[1]
    elsewhere = {"X-Token": token, "Host": "192.0.2.7:8123"}
    assert browser.get("/state/0", headers=elsewhere).status_code == (
        200 if host == "0.0.0.0" else 421)


def test_an_unavailable_address_is_named(client):
    with pytest.raises(OSError, match="--page_host 192.0.2.1.*expected an address of this machine"):
        server.serve(client.session, hosts=["192.0.2.1"])  # of no machine, RFC 5737
    with pytest.raises(OSError, match="--page_host no name: "):
        server.serve(client.session, hosts=["no name"])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError) as refused:
        server.serve(client.session, taken.getsockname()[1])
    assert str(refused.value).startswith("--page ")
    assert refused.value.__cause__.errno == errno.EADDRINUSE


# what is refused

@pytest.mark.parametrize("path, content, status, message", [
    ("/mask/0", b"no image", 400, "not an image"),
    ("/mask/0", png(np.ones((48, 80), np.uint8)), 400, "80x48 pixels, expected 160x96"),
    ("/mask/0", png(draw_frame(0)[0].repeat(2, 0).repeat(2, 1)), 400, "expected a mask"),
    ("/mask/0", png(np.ones(SHAPE, np.uint8))[:60], 400, "this file"),
    ("/mask/0", b'{"shapes"', 400, "this file: expected a file of labelme"),
    ("/mask/0", labelme([80, 48], ("a", 0, 0)), 400, "80x48 pixels, expected 160x96"),
    ("/mask/0", labelme([10**6, 10**6], ("a", 0, 0)), 400, "expected 160x96"),
    ("/mask/99", png(np.ones(SHAPE, np.uint8)), 400, "no frame 99"),
    ("/mask/0", bytes(MAX_MASK + 1), 413, "at most 64 MB"),
    ("/mask/0", bytes(100_000_000), 413, "at most 64 MB")])
def test_an_upload_that_is_no_mask_of_the_frame_is_refused(path, content, status, message, client):
    answer = client.put(path, content=content)
    assert answer.status_code == status and message in answer.json()["error"]
    assert "BytesIO" not in answer.text
    assert not client.session.store.user_frames


def test_a_body_without_a_length_is_limited_too(client):
    def endless():
        for _ in range(MAX_MASK // 2**16 + 2):
            yield bytes(2**16)
    assert client.put("/mask/0", content=endless()).status_code == 413


@pytest.mark.parametrize("action, fields, message", [
    ("box", {}, "corners: expected"), ("box", {"corners": [[1, 2], [3]]}, "corners"),
    ("box", {"corners": [[1, 2], [2, 3]], "frame": 0, "object": 1}, "too small"),
    ("box", {"corners": [[1, 2], [50, 30]], "frame": -1, "object": 1}, "frame: expected"),
    ("box", {"corners": [[1, 2], [50, 30]], "frame": 0, "object": 9}, "no object 9"),
    ("box", {"corners": [[1, 2], [50, 30]], "frame": 12, "object": 1}, "no frame 12"),
    ("point", {"points": [[400, 2]], "frame": 0, "object": 1}, "outside"),
    ("point", {"points": [[1, True]], "frame": 0, "object": 1}, "points"),
    ("stroke", {"points": [[1, 2]], "frame": 0, "object": 1, "radius": 1e9}, "radius"),
    ("segment", {"frame": 0, "direction": "sideways"}, "direction: expected one of"),
    ("segment", {"frame": 3, "direction": "both"}, "frame 3 has no mask"),
    ("segment", {"frame": "../3", "direction": "both"}, "frame: expected"),
    ("rename", {"object": 1, "name": "x" * 61}, "name"),
    ("rename", {"object": 1, "name": "a\nb"}, "name"),
    ("absent", {"frame": 0, "object": 1, "on": "yes"}, "on: expected true or false"),
    ("gone", {"frame": 12, "object": 1}, "no frame 12"),
    ("gone", {"frame": 0, "object": 9}, "no object 9"),
    ("export", {"cutout": "../../etc"}, "cutout"), ("export", {"cutout": []}, "cutout"),
    ("export", {"cutout": "transparent", "format": "../x"}, "format: expected one of png")])
def test_request_fields_are_checked(action, fields, message, client):
    do(client, "add")
    answer = do(client, action, **fields)
    assert answer.status_code == 400 and message in answer.json()["error"]
    assert "Traceback" not in answer.text


def test_malformed_bodies_and_unknown_actions_are_refused(client):
    for content in (b"[]", b"{", b"\xff", b"[" * 10_000):
        assert client.post("/do/box", content=content).status_code == 400
    assert client.post("/do/box", content=b" " * (MAX_JSON + 1)).status_code == 413
    assert do(client, "__class__").status_code == 404
    assert client.get("/frame/12").status_code == 400
    assert client.get("/frame/../../etc/passwd").status_code == 404


def test_flags_that_do_not_fit_the_page_are_refused(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sessions.figures, "has_browser", lambda: False)
    for words, message in (
            ([], "--mask, --box, --page: expected one of them"),
            (["--page", "70000"], "--page: expected a port"),
            (["--page_host", "0.0.0.0", "--mask", "x.png"], "--page_host: expected --page"),
            (["--page", "--overwrite"], "--page: expected another --results_dir")):
        assert main.main(["-m", "segment", "--video", str(clip), *words]) == 2
        assert message in capsys.readouterr().err


def test_a_missing_package_is_named(clip, monkeypatch, capsys):
    monkeypatch.setitem(main.sys.modules, "webapp.server", None)
    import webapp
    monkeypatch.delattr(webapp, "server")
    assert main.main(["-m", "segment", "--video", str(clip), "--page"]) == 2
    assert "--page: expected the package" in capsys.readouterr().err


def test_the_session_file_is_complete_json(client, tmp_path):
    client.put("/mask/0", content=png(truth(0)))
    kept = json.loads(Path(tmp_path / "out" / "page" / "session.json").read_text())
    assert kept["pending"] == [0] and kept["objects"][0]["id"] == 1
