"""A session on one clip: what is given, found, mended and exported, by what a browser sends."""

import json
import shlex
import shutil
import time

import numpy as np
import pytest
from conftest import content, do, held, overlap, png, shown, truth
from PIL import Image

import main
from media import images
from media.masks import read_mask
from media.video import open_clip
from own_video import fingerprint
from page import passes
from page.server import ACTIONS, Fields
from page.work import Found

FRAMES, SHAPE = 12, (96, 160)


def finished(session):
    session.thread.join(60)
    assert session.run["ended"], "still under way"
    return session.run


def state(client, since=0):
    return client.get(f"/state/{since}").json()


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
    assert {path.name for path in out.iterdir()} >= {
        "masks", "overlay.mp4", "cutout", "confidence.csv", "report.html"}
    assert (out / "command.txt").read_text().strip() == run["command"]
    assert main.main(_words(run["command"])) == 0
    for step in range(FRAMES):
        again = read_mask(tmp_path / "out_again" / "masks" / f"{step:05d}.png")
        np.testing.assert_array_equal(read_mask(out / "masks" / f"{step:05d}.png"), again)
        np.testing.assert_array_equal(again, shown(client, step))
    cut = np.array(Image.open(out / "cutout" / "00003.png"))
    np.testing.assert_array_equal(cut[..., 3] >= 128, truth(3) > 0)
    assert not cut[cut[..., 3] == 0].any()


def test_frames_have_their_files_numbers(begin, clip, tmp_path):
    folder = tmp_path / "numbered from 1, with a gap"
    folder.mkdir()
    for step, number in enumerate((1, 2, 3, 20, 21)):
        shutil.copy(clip / f"{step:05d}.png", folder / f"{number:05d}.png")
    session = begin(source=folder)
    assert session.state()["numbers"] == [1, 2, 3, 20, 21]
    assert "numbers" not in session.state(session.version)
    with pytest.raises(ValueError, match="frame 20 has no mask"):
        session.segment_from(3, "both")
    session.edits.give(3, truth(3))
    session.segment_from(3, "forwards")
    finished(session)
    session.edits.change_object(1, name="the square")
    ACTIONS["export"](session, Fields(b'{"coco": true, "yolo": true}'))
    run, out = finished(session), tmp_path / "out"
    assert run["ended"] == "done", run
    words = _words(run["command"])
    assert words[words.index("--mask") + 1] == f"20:{out / 'mask_00020.png'}"
    np.testing.assert_array_equal(read_mask(out / "mask_00020.png"), truth(3))
    assert words[words.index("--export"):][:3] == ["--export", "coco", "yolo"]
    assert (out / "confidence.csv").read_text().splitlines()[1].startswith("21,1,1,")
    coco = json.loads((out / "annotations.json").read_text())
    assert [(one["id"], one["file_name"]) for one in coco["images"]] == [
        (number, f"{number:05d}.png") for number in (1, 2, 3, 20, 21)]
    assert coco["categories"] == [{"id": 1, "name": "the square"}]
    assert [one["image_id"] for one in coco["annotations"]] == [20, 21]
    assert (out / "labels" / "00021.txt").read_text().startswith("0 ")
    assert '0: "the square"' in (out / "data.yaml").read_text()
    begin(tmp_path / "other")
    assert begin(tmp_path / "third").state()["numbers"] is None  # the frames count from 0


def test_what_is_exported_for_editors_is_one_file(client, tmp_path):
    client.put("/mask/0", content=png(truth(0)))
    do(client, "export", cutout="transparent", format="mov")
    run = finished(client.session)
    assert run["ended"] == "done", run
    assert (tmp_path / "out" / "cutout.mov").stat().st_size > 1000
    assert "--cutout transparent --cutout_format mov" in run["command"]
    do(client, "export", cutout="blur", format="mov")  # whose format there is only one of
    assert "--cutout_format" not in finished(client.session)["command"]
    assert (tmp_path / "out" / "cutout.mp4").is_file()
    assert not (tmp_path / "out" / "cutout.mov").exists()  # whose masks may have been others


def test_an_export_leaves_what_another_run_writes_and_what_is_not_of_the_toolkit(client, tmp_path):
    out = tmp_path / "out"
    client.put("/mask/0", content=png(truth(0)))
    (out / "cutout.mov").write_bytes(b"of the other run")
    with held(out) as other:
        before = content(out)
        do(client, "export", cutout="blur")
        run = finished(client.session)
        assert f"another run is writing there (process {other.pid}" in run["error"]
        assert content(out) == before
    (out / "masks").mkdir()
    (out / "masks" / "by hand.png").write_bytes(png(truth(0)))
    do(client, "export")
    assert "holds files that no manifest tells of" in finished(client.session)["error"]
    assert (out / "masks" / "by hand.png").is_file() and (out / "cutout.mov").is_file()


def test_what_concerns_a_mask_is_said_as_a_pass_begins(client):
    mask = truth(0)
    mask[90:92, 5:7] = 2
    client.put("/mask/0", content=png(mask))
    do(client, "segment", frame=0, way="forwards")
    assert "object 2: smaller than a feature cell" in finished(client.session)["concern"]


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
    step = passes.segment.follow
    monkeypatch.setattr(passes.segment, "follow", lambda tracker, index, *rest:
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


def test_a_folder_of_another_clip_or_in_use_is_refused(begin, clip, tmp_path):
    first, other = begin(), tmp_path / "other"
    with pytest.raises(ValueError, match=r"another run is writing there \(process"):
        begin()
    first.close()
    shutil.copytree(clip, other)
    with pytest.raises(ValueError, match="a session on my clip"):
        begin(source=other)
    begin()


def test_a_session_opens_again_though_other_files_lie_among_the_frames_now(begin, clip, tmp_path):
    frames = tmp_path / "frames"
    shutil.copytree(clip, frames)
    first = begin(source=frames, data=fingerprint(open_clip(frames)))
    first.edits.give(3, truth(3))
    first.close()
    (frames / ".DS_Store").write_bytes(b"Finder")
    images.write_mask(frames / "mask_00003.png", truth(3))  # as --box makes
    assert begin(source=frames, data=fingerprint(open_clip(frames))).work.given == {3}


@pytest.mark.parametrize("start, forwards, given, origins, end", [
    (3, True, {3}, {}, 12), (3, False, {3}, {}, -1),
    (3, True, {3, 9}, {}, 9), (3, False, {0, 3}, {}, 0),
    (2, True, {2, 10}, {i: 10 for i in range(3, 10)}, 7),
    (2, True, {2, 10}, {i: 0 for i in range(3, 10)}, 10),
    (8, False, {0, 8}, {i: 0 for i in range(1, 8)}, 3)])
def test_where_a_pass_ends(start, forwards, given, origins, end):
    found = {frame: Found(origin, []) for frame, origin in origins.items()}
    assert passes.end_of_pass(start, forwards, given, found, 12) == end
