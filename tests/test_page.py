"""The page without a browser: who is let in, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TOKEN, do, draw_frame, png, truth

import main
from page import session as sessions
from page.server import MOST_JSON, MOST_MASK

FRAMES, SHAPE = 12, (96, 160)


EVERYWHERE = [("GET", "/"), ("GET", "/state/0"), ("GET", "/frame/0"), ("GET", "/thumbnail/0"),
              ("GET", "/mask/0"), ("PUT", "/mask/0"), ("POST", "/do/undo"), ("GET", "/nowhere")]


@pytest.mark.parametrize("method, path", EVERYWHERE)
@pytest.mark.parametrize("headers, status", [
    ({"X-Token": ""}, 403), ({"X-Token": "another"}, 403), ({"X-Token": "ä".encode()}, 403),
    ({"Host": "evil.example"}, 421), ({"Host": "127.0.0.1.evil.example:8000"}, 421),
    ({"Host": ""}, 421), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Origin": "http://127.0.0.1:9"}, 403)])
def test_strangers_are_refused_everywhere(method, path, headers, status, client):
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == status and answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:9", "[::1]:80", "localhost"])
def test_this_machine_is_let_in_through_any_port(host, client):
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert client.get("/state/0", headers=headers).status_code == 200


def test_the_page_asks_for_nothing_from_elsewhere(client):
    answer = client.get("/", params={"token": TOKEN}, headers={"X-Token": ""})
    assert answer.status_code == 200 and "<canvas" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert "http://" not in answer.text and "https://" not in answer.text
    assert answer.headers["referrer-policy"] == "no-referrer"


# what is refused

@pytest.mark.parametrize("path, content, status, message", [
    ("/mask/0", b"no image", 400, "not an image"),
    ("/mask/0", png(np.ones((48, 80), np.uint8)), 400, "80x48 pixels, expected 160x96"),
    ("/mask/0", png(draw_frame(0)[0].repeat(2, 0).repeat(2, 1)), 400, "expected a mask"),
    ("/mask/0", png(np.ones(SHAPE, np.uint8))[:60], 400, "this file"),
    ("/mask/99", png(np.ones(SHAPE, np.uint8)), 400, "no frame 99"),
    ("/mask/0", bytes(MOST_MASK + 1), 413, "bytes at most"),
    ("/mask/0", bytes(100_000_000), 413, "bytes at most")])
def test_what_is_no_mask_of_the_frame_is_refused(path, content, status, message, client):
    answer = client.put(path, content=content)
    assert answer.status_code == status and message in answer.json()["error"]
    assert "BytesIO" not in answer.text
    assert not client.session.work.given


def test_a_body_without_a_length_is_bounded_too(client):
    def endless():
        for _ in range(MOST_MASK // 2**16 + 2):
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
    ("segment", {"frame": 0, "way": "sideways"}, "way: expected one of"),
    ("segment", {"frame": 3, "way": "both"}, "frame 3 has no mask"),
    ("segment", {"frame": "../3", "way": "both"}, "frame: expected"),
    ("change", {"object": 1, "name": "x" * 61}, "name"),
    ("change", {"object": 1, "name": "a\nb"}, "name"),
    ("change", {"object": 1, "hidden": "yes"}, "hidden"),
    ("export", {"cutout": "../../etc"}, "cutout"), ("export", {"cutout": []}, "cutout"),
    ("export", {"cutout": "transparent", "format": "../x"}, "format: expected one of png")])
def test_fields_are_checked(action, fields, message, client):
    do(client, "add")
    answer = do(client, action, **fields)
    assert answer.status_code == 400 and message in answer.json()["error"]
    assert "Traceback" not in answer.text


def test_odd_bodies_and_actions(client):
    for content in (b"[]", b"{", b"\xff", b"[" * 10_000):
        assert client.post("/do/box", content=content).status_code == 400
    assert client.post("/do/box", content=b" " * (MOST_JSON + 1)).status_code == 413
    assert do(client, "__class__").status_code == 404
    assert client.get("/frame/12").status_code == 400
    assert client.get("/frame/../../etc/passwd").status_code == 404


def test_the_page_is_refused_what_it_cannot_do(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sessions.figures, "has_browser", lambda: False)
    for words, message in (
            ([], "--mask, --box, --page: expected one of them"),
            (["--page", "70000"], "--page: expected a port"),
            (["--page", "--overwrite"], "--page: expected no --overwrite")):
        assert main.main(["-m", "segment", "--video", str(clip), *words]) == 2
        assert message in capsys.readouterr().err


def test_a_missing_package_is_named(clip, monkeypatch, capsys):
    monkeypatch.setitem(main.sys.modules, "page.server", None)
    import page
    monkeypatch.delattr(page, "server")
    assert main.main(["-m", "segment", "--video", str(clip), "--page"]) == 2
    assert "--page: expected the package" in capsys.readouterr().err


def test_what_lies_on_disk_is_whole_json(client, tmp_path):
    client.put("/mask/0", content=png(truth(0)))
    kept = json.loads(Path(tmp_path / "out" / "page" / "session.json").read_text())
    assert kept["pending"] == [0] and kept["objects"][0]["id"] == 1
