"""The page without a browser: who is let in, what is refused, and what a session does."""

import io
import json
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_frame
from PIL import Image
from starlette.testclient import TestClient

import main
import passes
import session as sessions
from media import images
from media.annotate import Prompts, mask_from_prompts
from media.page import MOST_JSON, MOST_MASK, application
from media.video import open_clip
from media.work import Found
from segment import Options
from videomatch import SHIPPED, VideoMatch

FRAMES, SHAPE = 12, (96, 160)
TOKEN = "a token"


def truth(step, ids=(1,)):
    return draw_frame(step, ids)[1].repeat(2, 0).repeat(2, 1)


def overlap(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of 12 frames of 160x96: a bright square that moves right."""
    folder = tmp_path_factory.mktemp("my clip")
    for step in range(FRAMES):
        images.write_image(folder / f"{step:05d}.png",
                           draw_frame(step)[0].repeat(2, 0).repeat(2, 1))
    return folder


@pytest.fixture(scope="module")
def shipped():
    model = VideoMatch.load(SHIPPED["mobilenet"]).eval()
    model.encoder.fold_batchnorm()
    return model


@pytest.fixture
def begin(clip, shipped, tmp_path):
    """Starts the session in the test's folder, again as often as it is called."""
    begun = []

    def start(folder=tmp_path / "out", source=clip):
        begun.append(sessions.Session(
            shipped, open_clip(source), folder, Options(), mask_from_prompts,
            {"data": str(source)}, ["python", "main.py", "-m", "segment", "--video", str(source)]))
        return begun[-1]

    yield start
    for one in begun:
        one.close()


@pytest.fixture
def client(begin):
    one = begin()
    client = TestClient(application(one, TOKEN), base_url="http://127.0.0.1:8000",
                        headers={"X-Token": TOKEN}, raise_server_exceptions=False)
    client.session = one
    return client


def finished(session):
    session.thread.join(60)
    assert session.run["ended"], "still under way"
    return session.run


def state(client, since=0):
    return client.get(f"/state/{since}").json()


def do(client, action, **fields):
    return client.post(f"/do/{action}", json=fields)


def png(mask, mode=None):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def shown(client, frame):
    answer = client.get(f"/mask/{frame}")
    return np.array(Image.open(io.BytesIO(answer.content)))


# who is let in

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
    ("/mask/0", png(draw_frame(0)[0].repeat(2, 0).repeat(2, 1)), 400, "expected a grey"),
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
    ("export", {"cutout": "../../etc"}, "cutout"), ("export", {"cutout": []}, "cutout")])
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


# what a session does

def test_a_box_a_click_a_stroke_and_back(client):
    number = do(client, "add").json()["object"]
    assert do(client, "box", frame=0, object=number, corners=[[8, 6], [66, 52]]).status_code == 200
    assert overlap(shown(client, 0) > 0, truth(0) > 0) > 0.8
    boxed = shown(client, 0)
    do(client, "stroke", frame=0, object=number, points=[[120, 80], [150, 80]], radius=5,
       erase=False)
    assert shown(client, 0)[80, 135] == number and shown(client, 0)[70, 135] == 0
    do(client, "stroke", frame=0, object=number, points=[[120, 80]], radius=6, erase=True)
    assert shown(client, 0)[80, 120] == 0 and shown(client, 0)[80, 140] == number
    do(client, "point", frame=0, object=number, points=[[140, 80]], **{"not": True})
    assert shown(client, 0)[80, 140] == 0
    for _ in range(3):
        assert do(client, "undo").json() == {"frame": 0}
    np.testing.assert_array_equal(shown(client, 0), boxed)
    do(client, "undo")
    assert not shown(client, 0).any() and do(client, "undo").json() == {"frame": None}


def test_objects_come_and_go(client):
    mask = truth(0, (1, 2))
    assert client.put("/mask/0", content=png(mask)).status_code == 200
    assert [thing["id"] for thing in state(client)["objects"]] == [1, 2]
    do(client, "change", object=2, name="the blue one", hidden=True)
    assert state(client)["objects"][1] == {"id": 2, "name": "the blue one", "hidden": True}
    do(client, "delete", object=1)
    np.testing.assert_array_equal(shown(client, 0), np.where(mask == 2, 2, 0))
    assert do(client, "add").json() == {"object": 3}, "numbers are never used twice"
    do(client, "undo")
    np.testing.assert_array_equal(shown(client, 0), mask)


def test_the_news_are_what_changed(client):
    client.put("/mask/0", content=png(truth(0)))
    first = state(client)
    assert list(first["frames"]) == ["0"] and first["frames"]["0"]["given"]
    client.put("/mask/5", content=png(truth(5)))
    assert list(state(client, first["version"])["frames"]) == ["5"]


def test_segmenting_gives_the_command_lines_masks_and_the_export_says_how(
        clip, client, tmp_path, monkeypatch):
    session = client.session
    client.put("/mask/3", content=png(truth(3)))
    do(client, "segment", frame=3, way="both")
    assert finished(session)["ended"] == "done"
    assert session.run["done"] == session.run["total"] == FRAMES - 1
    mended = shown(client, 7)
    mended[:20] = 0
    client.put("/mask/7", content=png(mended))
    do(client, "segment", frame=7, way="forwards")
    finished(session)
    do(client, "export", cutout="transparent")
    run = finished(session)
    out = tmp_path / "out"
    assert run["ended"] == "done", run
    assert {"masks", "overlay.mp4", "cutout"} <= {path.name for path in out.iterdir()}
    assert (out / "command.txt").read_text().strip() == run["command"]
    assert main.main(_words(run["command"])) == 0
    for step in range(FRAMES):
        again = images.read_mask(tmp_path / "out_again" / "masks" / f"{step:05d}.png")
        np.testing.assert_array_equal(images.read_mask(out / "masks" / f"{step:05d}.png"), again)
        np.testing.assert_array_equal(again, shown(client, step))
    cut = np.array(Image.open(out / "cutout" / "00003.png"))
    np.testing.assert_array_equal(cut[..., 3] > 0, truth(3) > 0)


def _words(command):
    words = shlex.split(command)
    assert words[:2] == ["python", "main.py"]
    return words[2:]


def test_a_correction_is_done_from_a_state_near_it_up_to_the_next_given(client, monkeypatch):
    session = client.session
    for frame in (0, 10):
        client.put(f"/mask/{frame}", content=png(truth(frame)))
    do(client, "segment", frame=0, way="forwards")
    finished(session)
    do(client, "segment", frame=10, way="both")
    finished(session)
    assert [session.work.found[i].origin for i in range(1, 10)] == 4 * [0] + 5 * [10]
    before = {frame: shown(client, frame) for frame in range(FRAMES)}
    seen = []
    step = passes.segment.take_step
    monkeypatch.setattr(passes.segment, "take_step", lambda tracker, index, *rest:
                        seen.append(index) or step(tracker, index, *rest))
    client.put("/mask/4", content=png(truth(4)))
    do(client, "segment", frame=4, way="both")
    assert finished(session)["ended"] == "done"
    changed = [i for i in range(1, 10) if i != 4 and session.work.found[i].origin == 4]
    assert changed == [2, 3, 5, 6, 7]
    assert 10 not in seen and 11 not in seen
    for frame in (0, 1, 8, 9, 10, 11):
        np.testing.assert_array_equal(shown(client, frame), before[frame])


def test_a_pass_from_a_kept_state_gives_the_same_masks_as_one_from_the_first_frame(begin, tmp_path):
    whole, parts = begin(tmp_path / "whole"), begin(tmp_path / "parts")
    for one in (whole, parts):
        one.edits.give(0, truth(0))
    whole.segment_from(0, "forwards")
    finished(whole)
    parts.segment_from(0, "forwards")
    while not parts.work.found:
        time.sleep(0.01)
    parts.stop()
    assert finished(parts)["ended"] == "stopped"
    last = max(parts.work.found)
    assert last < FRAMES - 1
    parts.close()
    later = begin(tmp_path / "parts")  # as after a kill
    assert set(later.work.found) == set(range(1, last + 1)) and later.work.given == {0}
    later.segment_from(last, "forwards")
    finished(later)
    for step in range(FRAMES):
        np.testing.assert_array_equal(later.mask(step), whole.mask(step))


def test_only_one_thing_at_a_time(client):
    client.put("/mask/0", content=png(truth(0)))
    do(client, "segment", frame=0, way="both")
    assert "under way" in do(client, "export").json()["error"]
    do(client, "stop")
    finished(client.session)


def test_a_mask_may_say_that_nothing_is_there(client):
    client.put("/mask/0", content=png(truth(0)))
    client.put("/mask/4", content=png(0 * truth(0)))
    do(client, "segment", frame=4, way="forwards")
    assert finished(client.session)["ended"] == "done"
    assert not shown(client, 4).any() and overlap(shown(client, 5) > 0, truth(5) > 0) > 0.6


def test_a_clip_that_ends_early(client):
    session = client.session
    session.count += 3
    client.put("/mask/8", content=png(truth(8)))
    do(client, "segment", frame=8, way="forwards")
    finished(session)
    assert state(client)["count"] == FRAMES


def test_all_lies_on_disk_and_a_torn_line_is_no_harm(begin, tmp_path):
    session = begin()
    session.edits.give(2, truth(2))
    session.edits.change_object(1, name="square")
    session.segment_from(2, "backwards")
    finished(session)
    session.close()
    log = tmp_path / "out" / "page" / "found.jsonl"
    log.write_text(log.read_text() + '{"frame": 5, "or')
    again = begin()
    assert again.work.given == {2} and set(again.work.found) == {0, 1}
    assert again.work.objects[0].name == "square" and not again.work.pending
    np.testing.assert_array_equal(again.mask(2), truth(2))


def test_another_clips_folder_is_refused(begin, clip, tmp_path):
    begin()
    other = tmp_path / "other"
    shutil.copytree(clip, other)
    with pytest.raises(ValueError, match="a session on my clip"):
        begin(source=other)


@pytest.mark.parametrize("start, forwards, given, origins, end", [
    (3, True, {3}, {}, 12), (3, False, {3}, {}, -1),
    (3, True, {3, 9}, {}, 9), (3, False, {0, 3}, {}, 0),
    (2, True, {2, 10}, {i: 10 for i in range(3, 10)}, 7),
    (2, True, {2, 10}, {i: 0 for i in range(3, 10)}, 10),
    (8, False, {0, 8}, {i: 0 for i in range(1, 8)}, 3)])
def test_where_a_pass_ends(start, forwards, given, origins, end):
    found = {frame: Found({}, origin) for frame, origin in origins.items()}
    assert passes.end_of_pass(start, forwards, given, found, 12) == end


def test_the_least_sure_stretches_come_worst_first():
    sure = [0.97] * 30
    sure[5:8], sure[20:23] = [0.7, 0.6, 0.72], [0.5, 0.4, 0.45]
    found = {i: Found({1: value, 2: 0.99}, 0) for i, value in enumerate(sure)}
    stretches = sessions.unsure_stretches(found, {12})
    assert [(s["first"], s["last"], s["object"], s["worst"]) for s in stretches] == [
        (20, 22, 1, 21), (5, 7, 1, 6)]
    assert not sessions.unsure_stretches({i: Found({1: 0.95}, 0) for i in range(9)}, set())


def test_sureness_is_the_expected_j(shipped):
    probability = np.array([[0.9, 0.8, 0.1, 0.0]])
    step = passes.Step(np.array([[1, 1, 0, 0]], np.uint8),
                       passes.torch.from_numpy(np.stack([1 - probability, probability])), (1,))
    assert passes.sureness(step)[1] == pytest.approx(1.7 / 2.1)
    gone = passes.Step(np.zeros((1, 4), np.uint8),
                       passes.torch.from_numpy(np.stack([1 - probability, probability / 2])), (1,))
    assert passes.sureness(gone)[1] == pytest.approx(0.55)


def test_clicks_alone_make_a_mask():
    image, mask = draw_frame(0)
    found = mask_from_prompts(image, Prompts(points=[(18, 14)]))
    assert overlap(found, mask > 0) > 0.6


def test_the_page_is_refused_what_it_cannot_do(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "can_browse", lambda: False)
    for words, message in (
            ([], "--mask, --box, --page: expected one of them"),
            (["--page", "70000"], "--page: expected a port"),
            (["--page", "--finetune", "3"], "--page: expected no --finetune"),
            (["--page", "--overwrite"], "--page: expected no --overwrite")):
        assert main.main(["-m", "segment", "--video", str(clip), *words]) == 2
        assert message in capsys.readouterr().err


def test_a_missing_package_is_named(clip, monkeypatch, capsys):
    monkeypatch.setitem(main.sys.modules, "media.page", None)
    import media
    monkeypatch.delattr(media, "page")
    assert main.main(["-m", "segment", "--video", str(clip), "--page"]) == 2
    assert "--page: expected the package" in capsys.readouterr().err


def test_what_lies_on_disk_is_whole_json(client, tmp_path):
    client.put("/mask/0", content=png(truth(0)))
    kept = json.loads(Path(tmp_path / "out" / "page" / "session.json").read_text())
    assert kept["pending"] == [0] and kept["objects"][0]["id"] == 1
