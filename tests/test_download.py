"""Downloads from a server on this machine that cuts connections and serves bad archives."""

import hashlib
import io
import re
import struct
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

import davis
from datasets import download


def archive(extra=()):
    """A DAVIS archive with two sequences, larger frames and additional members."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(buffer, "w") as file:
        for size in ("480p", "1080p"):
            for name in ("ant", "bee"):
                for i in range(4):
                    frame = rng.integers(0, 255, (48, 80, 3), dtype=np.uint8)
                    mask = np.eye(48, 80, dtype=np.uint8)
                    for kind, picture, suffix in (("JPEGImages", frame, "jpg"),
                                                  ("Annotations", mask, "png")):
                        data = cv2.imencode(f".{suffix}", picture)[1].tobytes()
                        file.writestr(f"DAVIS/{kind}/{size}/{name}/{i:05d}.{suffix}", data)
        file.writestr("DAVIS/ImageSets/480p/train.txt", "ant\nbee\n")
        for name, data in extra:
            file.writestr(name, data)
    return buffer.getvalue()


class Server:
    """Serves one file; every response breaks off after `cut` bytes."""

    def __init__(self, data, cut=None, ranges=True):
        self.data, self.ranges_asked = data, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.ranges_asked.append(asked)
                start = int(re.search(r"\d+", asked)[0]) if asked and ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start:][:cut])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/DAVIS-data.zip"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(data, sha256=None, **options):
        servers.append(Server(data, **options))
        monkeypatch.setattr(download, "ARCHIVES",
                            {"2016": download.Archive(servers[-1].url, sha256)})
        return servers[-1]

    monkeypatch.setattr(download, "WAIT", 0.0)
    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def test_a_broken_connection_is_resumed(serve, tmp_path, monkeypatch, capsys):
    data = archive()
    server = serve(data, hashlib.sha256(data).hexdigest(), cut=len(data) // 3 + 1)
    monkeypatch.setattr(sys, "argv", ["davis.py", "--download", str(tmp_path / "d")])
    assert davis.main() == 0
    third = len(data) // 3 + 1
    assert server.ranges_asked == [None, f"bytes={third}-", f"bytes={2 * third}-"]
    assert [s.name for s in davis.Davis(tmp_path / "d").sequences] == ["ant", "bee"]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        ".lock", "Annotations", "ImageSets", "JPEGImages"]
    assert not list((tmp_path / "d").rglob("1080p"))
    with pytest.raises(SystemExit, match="2"):
        davis.main()
    assert "holds a data set" in capsys.readouterr().err


def test_the_next_call_resumes_the_download(serve, tmp_path):
    data = archive()
    (tmp_path / "DAVIS-data.zip.part").write_bytes(data[:1000])
    server = serve(data)
    download.download(tmp_path, "2016")
    assert server.ranges_asked == ["bytes=1000-"]
    assert len(davis.Davis(tmp_path)) == 2


def test_a_server_without_ranges_sends_the_whole_file(serve, tmp_path):
    (tmp_path / "DAVIS-data.zip.part").write_bytes(b"something else")
    serve(archive(), ranges=False)
    download.download(tmp_path, "2016")
    assert len(davis.Davis(tmp_path)) == 2


def test_a_server_that_sends_nothing_ends_the_download(serve, tmp_path):
    server = serve(archive(), cut=0)
    with pytest.raises(OSError, match="broke 5 times"):
        download.download(tmp_path, "2016")
    assert len(server.ranges_asked) == 5


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "DAVIS/../../evil", "..\\evil",
                                  "C:/evil"])
def test_archives_cannot_write_outside_the_folder(name, serve, tmp_path):
    serve(archive([(name, "x")]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="outside"):
        download.download(tmp_path / "d", "2016")
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "d", tmp_path / "d" / ".lock"]


def broken(data):
    """Change one byte of a stored frame."""
    at = data.index(b"\xff\xd8\xff") + 300
    return data[:at] + struct.pack("B", data[at] ^ 255) + data[at + 1:]


@pytest.mark.parametrize("data, sha256, words", [
    (archive(), "0" * 64, "expected 0000"), (b"<html>moved</html>", None, "not a ZIP archive"),
    (broken(archive()), None, "damaged archive"), (archive()[:-30], None, "ZIP|damaged")])
def test_a_wrong_archive_is_refused(data, sha256, words, serve, tmp_path):
    serve(data, sha256)
    with pytest.raises(ValueError, match=words):
        download.download(tmp_path, "2016")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
