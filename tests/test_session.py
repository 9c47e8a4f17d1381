"""A session on one clip: edits, propagation and export, through the requests of a browser."""

import json
import shlex
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import TOKEN, content, do, draw_frame, held, overlap, png, shown, truth
from PIL import Image
from starlette.testclient import TestClient
from test_video import make, number_of

import main
from cli.segment import clip_fingerprint
from masks.read import read_mask
from media import images
from media.video import open_clip
from webapp import server, store
from webapp import session as sessions
from webapp.server import ACTIONS, Fields, application
from webapp.store import Prediction

FRAMES, SHAPE = 12, (96, 160)


def finished(session):
    session.thread.join(60)
    assert session.run["ended"], "still running"
    return session.run


def state(client, since=0):
    return client.get(f"/state/{since}").json()


def test_box_click_and_stroke_edit_a_mask_and_can_be_undone(client):
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


def uploaded_annotations(client, frame, content):
    """Upload an annotation file and return the frame's mask, (H, W)."""
    answer = client.put(f"/mask/{frame}", content=json.dumps(content).encode())
    assert answer.status_code == 200, answer.text
    return shown(client, frame)


def test_a_labelme_file_becomes_the_mask_with_its_labels_as_objects(client):
    def labelme(*squares):
        return {"imageHeight": 96, "imageWidth": 160, "imageData": None, "shapes": [
            {"label": label, "points": [[x, 10], [x + 20, 30]], "shape_type": "rectangle"}
            for label, x in squares]}

    mask = uploaded_annotations(client, 0, labelme(("cat", 10), ("dog", 50)))
    expected = np.zeros(SHAPE, np.uint8)
    expected[10:30, 10:30], expected[10:30, 50:70] = 1, 2
    np.testing.assert_array_equal(mask, expected)
    assert [(one["id"], one["name"]) for one in state(client)["objects"]] == [
        (1, "cat"), (2, "dog")]
    # in another frame the same label is the same object, and a new one gets an id of its own
    mask = uploaded_annotations(client, 6, labelme(("bird", 10), ("dog", 50)))
    assert mask[20, 20] == 3 and mask[20, 60] == 2
    assert [one["name"] for one in state(client)["objects"]] == ["cat", "dog", "bird"]


def test_a_coco_file_gives_each_frame_its_own_image_as_mask(client):
    client.put("/mask/0", content=png(truth(0)))
    client.put("/mask/5", content=png(truth(5)))
    assert do(client, "rename", object=1, name="square").status_code == 200
    assert do(client, "export", coco=True).status_code == 200
    finished(client.session)
    file = json.loads((client.session.folder / "annotations.json").read_text())
    do(client, "remove_mask", frame=5)
    np.testing.assert_array_equal(uploaded_annotations(client, 5, file), truth(5))
    assert [one["name"] for one in state(client)["objects"]] == ["square"]
    answer = client.put("/mask/7", content=json.dumps(file | {"images": [
        image for image in file["images"] if image["file_name"] != "00007.png"]}).encode())
    assert answer.status_code == 400 and "called 00007" in answer.json()["error"]


def test_objects_are_added_renamed_and_deleted(client):
    mask = truth(0, (1, 2))
    assert client.put("/mask/0", content=png(mask)).status_code == 200
    assert [obj["id"] for obj in state(client)["objects"]] == [1, 2]
    do(client, "rename", object=2, name="the blue one")
    assert state(client)["objects"][1] == {"id": 2, "name": "the blue one", "absent": [],
                                            "gone": []}
    do(client, "delete", object=1)
    np.testing.assert_array_equal(shown(client, 0), np.where(mask == 2, 2, 0))
    assert do(client, "add").json() == {"object": 3}, "numbers are never used twice"
    do(client, "undo")
    np.testing.assert_array_equal(shown(client, 0), mask)
    assert [obj["id"] for obj in state(client)["objects"]] == [1, 2, 3], "what was added stays"


def test_the_state_lists_only_changes(client):
    client.put("/mask/0", content=png(truth(0)))
    first = state(client)
    assert list(first["frames"]) == ["0"] and first["frames"]["0"]["user_mask"]
    client.put("/mask/5", content=png(truth(5)))
    assert list(state(client, first["version"])["frames"]) == ["5"]


@pytest.mark.slow
def test_the_page_predicts_the_masks_of_its_exported_command(
        clip, client, tmp_path, monkeypatch):
    session = client.session
    client.put("/mask/3", content=png(truth(3)))
    do(client, "segment", frame=3, direction="both")
    assert finished(session)["ended"] == "done"
    assert session.run["done"] == session.run["total"] == FRAMES - 1
    corrected = shown(client, 7)
    corrected[:20] = 0
    client.put("/mask/7", content=png(corrected))
    do(client, "segment", frame=7, direction="forward")
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


@pytest.mark.slow
def test_labels_of_an_annotation_file_are_the_objects_names(clip, tmp_path, monkeypatch):
    corners = [[20, 30], [56, 30], [56, 66], [20, 66]]
    (tmp_path / "m.json").write_text(json.dumps({
        "imageHeight": SHAPE[0], "imageWidth": SHAPE[1],
        "shapes": [{"label": "cat", "points": corners, "shape_type": "polygon"}]}))
    opened = []

    def serve(session, *_):
        opened.append(session.state())
        session.editor.rename_object(1, "dog")

    monkeypatch.setattr(server, "serve", serve)
    arguments = ["-m", "segment", "--video", str(clip), "--mask", f"2:{tmp_path / 'm.json'}",
                 "--page", "-c", "cpu", "-j", str(tmp_path / "out")]
    assert main.main(arguments) == 0
    assert [(one["id"], one["name"]) for one in opened[0]["objects"]] == [(1, "cat")]
    assert opened[0]["frames"][2]["user_mask"]
    assert main.main(arguments) == 0  # which takes no name back that was changed since
    assert opened[1]["objects"][0]["name"] == "dog"


def test_the_same_command_resumes_and_keeps_corrections(clip, tmp_path, monkeypatch):
    def corrected(session, *_):
        session.editor.set_mask(0, truth(1))
        session.editor.mark(5, 1, "absent", False)

    def resumed(session, *_):
        masks.append([session.mask(frame) for frame in (0, 3)])
        assert not session.store.presence.absent

    masks = []
    for step in (0, 2, 3):
        images.write_mask(tmp_path / f"{step}.png", truth(step))
    arguments = ["-m", "segment", "--video", str(clip), "--page", "-c", "cpu", "-j",
                 str(tmp_path / "out"), "--mask"]
    first, mark = f"0:{tmp_path / '0.png'}", "5:absent=1"
    for serve, given in ((corrected, (first, mark)), (resumed, (first, mark)),
                         (resumed, (first, f"3:{tmp_path / '3.png'}", mark)),
                         (resumed, (f"0:{tmp_path / '2.png'}",))):
        monkeypatch.setattr(server, "serve", serve)
        assert main.main([*arguments, *given]) == 0
    np.testing.assert_array_equal(masks[0][0], truth(1))
    assert masks[0][1] is None
    np.testing.assert_array_equal(masks[1], [truth(1), truth(3)])  # another mask is read
    np.testing.assert_array_equal(masks[2], [truth(2), truth(3)])


def test_a_prompt_that_finds_nothing_changes_nothing(client):
    client.put("/mask/0", content=png(truth(0)))
    answer = do(client, "box", frame=0, object=1, corners=[[120, 80], [150, 95]])
    assert answer.status_code == 400 and "nothing was found there" in answer.text
    np.testing.assert_array_equal(shown(client, 0), truth(0))
    assert not client.session.store.presence.absent


def test_masks_of_a_deleted_object_do_not_return_with_an_uploaded_one(client):
    for frame in (0, 1):
        client.put(f"/mask/{frame}", content=png(truth(frame)))
    do(client, "delete", object=1)
    client.put("/mask/2", content=png(truth(2)))
    np.testing.assert_array_equal(shown(client, 2), 2 * truth(2))
    assert [one["id"] for one in state(client)["objects"]] == [2] and not shown(client, 1).any()


def test_a_deleted_id_and_a_new_one_in_an_uploaded_mask_stay_apart(client):
    client.put("/mask/0", content=png(truth(0)))
    do(client, "delete", object=1)
    both = truth(1, (1, 2))
    client.put("/mask/1", content=png(both))
    np.testing.assert_array_equal(shown(client, 1), np.where(both == 1, 3, both))


def test_a_colour_means_the_same_in_all_uploaded_masks(client):
    colours = np.array([[0, 0, 0], [200, 30, 90], [10, 240, 120]], np.uint8)
    both, second = truth(0, (1, 2)), np.where(truth(1, (1, 2)) == 2, 2, 0)
    for frame, mask in ((0, both), (1, second)):
        assert client.put(f"/mask/{frame}", content=png(colours[mask])).status_code == 200
    ids = shown(client, 0)[both == 2]
    np.testing.assert_array_equal(shown(client, 1), np.where(second == 2, ids[0], 0))


def test_undo_knows_whether_a_mask_was_used(client, monkeypatch):
    """Masks were predicted from the corrected one, so the earlier one is not used any more."""
    editor, store = client.session.editor, client.session.store
    editor.set_mask(0, truth(0))
    store.mark_propagated(0)
    editor.set_mask(0, truth(1))
    editor.undo()
    assert not store.pending
    editor.set_mask(0, truth(1))
    store.mark_propagated(0)
    editor.undo()
    assert store.pending == {0}


def test_frames_are_numbered_as_their_files(begin, clip, tmp_path):
    folder = tmp_path / "numbered from 1, with a gap"
    folder.mkdir()
    for step, number in enumerate((1, 2, 3, 20, 21)):
        shutil.copy(clip / f"{step:05d}.png", folder / f"{number:05d}.png")
    session = begin(source=folder)
    assert session.state()["numbers"] == [1, 2, 3, 20, 21]
    assert "numbers" not in session.state(session.version)
    with pytest.raises(ValueError, match="frame 20 has no mask"):
        session.segment_from(3, "both")
    session.editor.set_mask(3, truth(3))
    session.segment_from(3, "forward")
    finished(session)
    session.editor.rename_object(1, "the square")
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


def test_a_cutout_for_editors_is_one_file(client, tmp_path):
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


def test_an_export_does_not_touch_files_of_others(client, tmp_path):
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
    assert "holds files, but" in finished(client.session)["error"]
    assert (out / "masks" / "by hand.png").is_file() and (out / "cutout.mov").is_file()


@pytest.mark.slow
def test_a_warning_about_the_mask_is_shown_when_propagation_starts(client):
    mask = truth(0)
    mask[90:92, 5:7] = 2
    client.put("/mask/0", content=png(mask))
    do(client, "segment", frame=0, direction="forward")
    assert "object 2: smaller than" in finished(client.session)["warning"]


def _words(command):
    words = shlex.split(command)
    assert words[:2] == ["python", "main.py"]
    return words[2:]


@pytest.mark.slow
def test_a_correction_propagates_from_a_nearby_state_to_the_next_user_mask(client, monkeypatch):
    session = client.session
    for frame in (0, 10):
        client.put(f"/mask/{frame}", content=png(truth(frame)))
    do(client, "segment", frame=0, direction="forward")
    finished(session)
    do(client, "segment", frame=10, direction="both")
    finished(session)
    assert [session.store.predictions[i].origin for i in range(1, 10)] == 4 * [0] + 5 * [10]
    before = {frame: shown(client, frame) for frame in range(FRAMES)}
    seen = []
    step = sessions.pipeline.segment_frame
    monkeypatch.setattr(sessions.pipeline, "segment_frame", lambda tracker, index, *rest, **more:
                        seen.append(index) or step(tracker, index, *rest, **more))
    client.put("/mask/4", content=png(truth(4)))
    do(client, "segment", frame=4, direction="both")
    assert finished(session)["ended"] == "done"
    changed = [i for i in range(1, 10) if i != 4 and session.store.predictions[i].origin == 4]
    assert changed == [2, 3, 5, 6, 7]
    assert 10 not in seen and 11 not in seen
    for frame in (0, 1, 8, 9, 10, 11):
        np.testing.assert_array_equal(shown(client, frame), before[frame])


@pytest.mark.slow
def test_a_session_opened_again_resumes_from_the_nearest_user_mask(begin, tmp_path):
    whole, parts = begin(tmp_path / "whole"), begin(tmp_path / "parts")
    for one in (whole, parts):
        one.editor.set_mask(0, truth(0))
    whole.segment_from(0, "forward")
    finished(whole)
    parts.segment_from(0, "forward")
    while not parts.store.predictions:
        time.sleep(0.01)
    parts.stop()
    assert finished(parts)["ended"] == "stopped"
    last = max(parts.store.predictions)
    assert last < FRAMES - 1
    parts.close()
    states = tmp_path / "parts" / "page" / "states"
    states.mkdir()
    (states / "0_forwards_00001.pth").write_bytes(b"of an earlier version")
    later = begin(tmp_path / "parts")  # as after a kill
    assert not states.exists()
    assert set(later.store.predictions) == set(range(1, last + 1))
    assert later.store.user_frames == {0}
    later.segment_from(last, "forward")
    finished(later)
    for step in range(FRAMES):
        np.testing.assert_array_equal(later.mask(step), whole.mask(step))


def test_an_empty_user_mask_without_an_earlier_one_is_no_start(begin):
    session = begin()
    session.editor.set_mask(6, truth(6))
    session.editor.set_mask(4, 0 * truth(4))
    session.segment_from(4, "backward")
    assert "contains no object" in finished(session)["error"]


@pytest.mark.slow
def test_without_a_nearby_user_mask_the_predicted_mask_is_a_reference(begin, monkeypatch):
    session, references = begin(), []
    session.editor.set_mask(0, truth(0))
    go(session, 0)
    step = sessions.pipeline.segment_frame
    monkeypatch.setattr(sessions.pipeline, "segment_frame", lambda tracker, index, image, small,
                        mask, *rest, **more: references.append((index, mask is not None)) or step(
                            tracker, index, image, small, mask, *rest, **more))
    session.propagator.states.saved_states.clear()
    go(session, 3)
    assert references[:4] == [(0, True), (1, False), (2, False), (3, False)]
    monkeypatch.setattr(sessions.StateCache, "MAX_DISTANCE", 2)
    session.propagator.states.saved_states.clear()
    references.clear()
    go(session, 3)
    assert references[:3] == [(0, True), (3, True), (4, False)]


def test_only_one_run_is_allowed_at_a_time(client):
    client.put("/mask/0", content=png(truth(0)))
    do(client, "segment", frame=0, direction="both")
    assert "running" in do(client, "export").json()["error"]
    do(client, "stop")
    finished(client.session)


def test_an_empty_mask_means_that_no_object_is_visible(client):
    client.put("/mask/0", content=png(truth(0)))
    client.put("/mask/4", content=png(0 * truth(0)))
    do(client, "segment", frame=4, direction="forward")
    assert finished(client.session)["ended"] == "done"
    assert not shown(client, 4).any() and overlap(shown(client, 5) > 0, truth(5) > 0) > 0.6


# objects that are not there

def two(step):
    return truth(step, (1, 2))


@pytest.fixture
def pair(begin, tmp_path, tmp_path_factory):
    """A session on a clip of two objects with a user mask in frame 0."""
    folder = tmp_path_factory.mktemp("pair")
    for step in range(FRAMES):
        Image.fromarray(draw_frame(step, (1, 2))[0].repeat(2, 0).repeat(2, 1)).save(
            folder / f"{step:05d}.png")
    session = begin(tmp_path / "pair", folder)
    session.editor.set_mask(0, two(0))
    return session


def go(session, start, direction="forward"):
    session.segment_from(start, direction)
    assert finished(session)["ended"] == "done", session.run


def ids(session, *frames):
    return [set(np.unique(session.mask(frame)).tolist()) - {0} for frame in frames]


@pytest.mark.slow
def test_erasing_an_object_marks_it_as_absent(pair):
    go(pair, 0)
    assert ids(pair, 5, 6, 7) == [{1, 2}] * 3
    pair.editor.paint(6, 2, [(0, 64), (159, 64)], 24, True)
    assert pair.store.presence.absent == {6: {2}} and ids(pair, 5, 6, 7) == [{1, 2}, {1}, {1, 2}]
    go(pair, 6)
    assert ids(pair, 6) == [{1}], "a pass leaves it out, too"
    assert overlap(pair.mask(9) == 1, two(9) == 1) > 0.6
    pair.editor.paint(6, 2, [(60, 60), (80, 60)], 5, False)
    assert not pair.store.presence.absent and ids(pair, 6) == [{1, 2}]
    for _ in range(2):
        pair.editor.undo()
    assert not pair.store.presence.absent and pair.store.user_frames == {0}


@pytest.mark.slow
def test_an_object_is_gone_from_a_frame_on_until_a_mask_shows_it(pair, tmp_path):
    go(pair, 0)
    pair.editor.set_mask(9, two(9))
    pair.editor.mark(4, 2, "gone")
    assert 4 not in pair.store.user_frames and 4 in pair.store.pending
    assert ids(pair, 3, 4, 5, 8, 9, 10) == [{1, 2}, {1}, {1}, {1}, {1, 2}, {1, 2}]
    assert pair.state()["objects"][1]["gone"] == [(4, 9)]
    assert {one.object_id for one in pair.measures() if 4 <= one.frame < 9} == {1}
    go(pair, 4)
    assert ids(pair, 4, 5, 8) == [{1}] * 3
    assert {row[1] for row in pair.store.predictions[6].measures} == {1}, "it is not looked for"
    go(pair, 9, "both")  # backwards, too
    assert ids(pair, 3, 4, 8, 9, 10) == [{1, 2}, {1}, {1}, {1, 2}, {1, 2}]
    expected = [pair.mask(frame) for frame in range(FRAMES)]
    pair.export()
    command = _words(finished(pair)["command"])
    assert "4:gone=2" in command
    assert main.main(command) == 0
    for step in (*range(6), 9):
        again = read_mask(tmp_path / "pair_again" / "masks" / f"{step:05d}.png")
        np.testing.assert_array_equal(np.unique(again), np.unique(expected[step]))
    pair.editor.undo()
    assert not pair.store.presence.gone and ids(pair, 4) == [{1}], "until it is segmented again"
    go(pair, 3)
    assert ids(pair, 4, 5) == [{1, 2}] * 2


def test_absence_marks_can_be_undone_and_are_saved(pair, begin, tmp_path):
    client = TestClient(application(pair, TOKEN), base_url="http://127.0.0.1:8000",
                        headers={"X-Token": TOKEN})
    everywhere = state(client)["everywhere"]
    assert do(client, "gone", frame=0, object=2).status_code == 200
    assert state(client)["everywhere"] > everywhere, "masks of other frames are others now"
    assert ids(pair, 0) == [{1}] and pair.store.presence.gone == {0: {2}}
    do(client, "absent", frame=7, object=1)
    assert do(client, "absent", frame=7, object=9).status_code == 400
    assert do(client, "gone", frame=99, object=1).status_code == 400
    pair.close()
    again = begin(tmp_path / "pair", pair.clip.path)
    assert again.store.presence == pair.store.presence
    assert again.store.presence.absent == {7: {1}} and 7 in again.store.pending
    again.editor.mark(7, 1, "absent", False)
    assert not again.store.presence.absent and 7 not in again.store.pending


@pytest.mark.slow
def test_propagation_never_starts_from_a_state_with_an_outdated_mask(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions.StateCache, "INTERVAL", 1)
    one, fresh = begin(tmp_path / "one"), begin(tmp_path / "fresh")
    bad = np.roll(truth(0), 40, 0)
    one.editor.set_mask(0, bad)
    one.editor.set_mask(5, truth(5))
    go(one, 0)
    go(one, 5)
    one.editor.set_mask(0, truth(0))  # states behind frame 5 hold the bad one as a reference, too
    one.editor.set_mask(9, truth(9))
    for frame in (0, 5, 9):
        fresh.editor.set_mask(frame, truth(frame))
    for session in (one, fresh):
        go(session, 9)
    for frame in (10, 11):
        np.testing.assert_array_equal(one.mask(frame), fresh.mask(frame))
    assert one.propagator.states.nearest(8, True, one.store.input_keys()) is None
    one.editor.undo()
    one.editor.undo()  # with the bad mask back, they are what they were made of
    assert one.propagator.states.nearest(8, True, one.store.input_keys())[0] == 8


@pytest.mark.slow
def test_a_failed_frame_does_not_count_as_tracked(begin, tmp_path, monkeypatch):
    whole, one = begin(tmp_path / "whole"), begin(tmp_path / "one")
    for session in (whole, one):
        session.editor.set_mask(0, truth(0))
    go(whole, 0)
    step = sessions.pipeline.segment_frame

    def failing(tracker, index, *rest, **more):
        seen = step(tracker, index, *rest, **more)
        if index == 7:
            raise MemoryError("no room")
        return seen

    monkeypatch.setattr(sessions.pipeline, "segment_frame", failing)
    one.segment_from(0, "forward")
    assert finished(one)["error"] == "no room"
    saved = {frame for _, frame in one.propagator.states.saved_states}
    assert saved == {5}, "the last one that is whole"
    monkeypatch.setattr(sessions.pipeline, "segment_frame", step)
    go(one, 6)
    for frame in range(FRAMES):
        np.testing.assert_array_equal(one.mask(frame), whole.mask(frame))


# long clips

def test_the_cost_of_a_change_does_not_grow_with_the_clip(begin):
    class Untouched(dict):
        def refused(self, *_):
            raise AssertionError("iterated over all frames")
        __iter__ = items = values = keys = refused

    session = begin()
    session.editor.set_mask(0, truth(0))
    for frame in range(1, FRAMES):
        found = Prediction(0, [(frame, 1, True, .9, .1, .1, 1., .9, .4 if frame == 6 else .9)])
        session.store.save_prediction(frame, truth(frame), found)
        session._note_confidences(frame, found)
        session.editor.change(frame)
    version = session.version
    session.store.predictions = Untouched(session.store.predictions)
    session.editor.set_mask(8, truth(8))
    news = session.state(version)
    assert list(news["frames"]) == [8]
    assert [(one["first"], one["last"]) for one in news["review"]] == [(6, 6)]
    session.editor.mark(6, 1, "absent")
    assert not session.state(version)["review"], "the user marked it as absent"


def test_undo_is_bounded_in_bytes(begin, monkeypatch):
    session = begin()
    noise = np.random.default_rng(0).integers(0, 2, SHAPE, np.uint8)
    session.editor.set_mask(0, noise)
    monkeypatch.setattr(store, "UNDO_BYTES", 40_000)
    for i in range(60):
        session.editor.paint(0, 1, [(i, i)], 1, False)
    kept = [size for size, _ in session.editor.undo_stack]
    assert sum(kept) <= 40_000 and 1 < len(kept) < 60
    before = session.mask(0)
    session.editor.paint(0, 1, [(80, 50)], 20, True)
    session.editor.undo()
    np.testing.assert_array_equal(session.mask(0), before)


def test_concurrent_requests_decode_a_clip_once(tmp_path, monkeypatch):
    path = make(tmp_path / "clip.mp4", 48, options={"g": "12"})
    clip, decoded = open_clip(path), []
    read = clip._read
    monkeypatch.setattr(clip, "_read", lambda start: (
        decoded.append(1) or image for image in read(start)))
    pictures = sessions.FrameReader(clip)
    assert [number_of(pictures(frame)) for frame in range(48)] == list(range(48))
    assert len(decoded) == 48, "playback continues from the current frame"
    monkeypatch.setattr(sessions, "CACHE_BYTES", 3 * pictures(0).nbytes)
    pictures = sessions.FrameReader(clip)
    with ThreadPoolExecutor(8) as pool:
        frames = [*range(40, 0, -3), *range(48)]
        assert [number_of(image) for image in pool.map(pictures, frames)] == frames
    assert len(pictures.cache) <= 3 and pictures(48) is None
    pictures.frames, pictures.next = iter([]), 20  # as after an error, while it was decoding
    pictures.cache.clear()
    assert pictures(20) is None and number_of(pictures(20)) == 20


def test_the_length_in_the_header_is_not_trusted(begin, tmp_path):
    path = make(tmp_path / "clip.avi", 20, "mjpeg", "yuvj420p")
    data = bytearray(path.read_bytes())
    for place in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        struct.pack_into("<I", data, place, 5)
    path.write_bytes(data)
    session = begin(source=path)
    assert session.state()["count"] == 20 and number_of(session.image(19)) == 19
    session.count = 25  # as if it declared more than can be decoded
    with pytest.raises(ValueError, match="the clip ends before it"):
        session.image(22)
    assert session.state()["count"] == 20


def test_a_truncated_clip_ends_at_its_last_frame(client):
    session = client.session
    session.count += 3
    client.put("/mask/8", content=png(truth(8)))
    do(client, "segment", frame=8, direction="forward")
    finished(session)
    assert state(client)["count"] == FRAMES


def test_the_session_is_on_disk_and_survives_a_torn_line(begin, tmp_path):
    session = begin()
    session.editor.set_mask(2, truth(2))
    session.editor.rename_object(1, "square")
    session.segment_from(2, "backward")
    finished(session)
    session.close()
    log = tmp_path / "out" / "page" / "found.jsonl"
    log.write_text(log.read_text() + '{"frame": 5, "or')
    again = begin()
    assert again.store.user_frames == {2} and set(again.store.predictions) == {0, 1}
    assert again.store.objects[0].name == "square" and not again.store.pending
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


def test_a_session_reopens_if_other_files_were_added_to_the_folder(begin, clip, tmp_path):
    frames = tmp_path / "frames"
    shutil.copytree(clip, frames)
    first = begin(source=frames, data=clip_fingerprint(open_clip(frames)))
    first.editor.set_mask(3, truth(3))
    first.close()
    (frames / ".DS_Store").write_bytes(b"Finder")
    images.write_mask(frames / "mask_00003.png", truth(3))  # as --box makes
    assert begin(source=frames, data=clip_fingerprint(open_clip(frames))).store.user_frames == {3}


@pytest.mark.parametrize("start, forward, user_frames, origins, end", [
    (3, True, {3}, {}, 12), (3, False, {3}, {}, -1),
    (3, True, {3, 9}, {}, 9), (3, False, {0, 3}, {}, 0),
    (2, True, {2, 10}, {i: 10 for i in range(3, 10)}, 7),
    (2, True, {2, 10}, {i: 0 for i in range(3, 10)}, 10),
    (8, False, {0, 8}, {i: 0 for i in range(1, 8)}, 3)])
def test_propagation_ends_at_the_next_user_mask(start, forward, user_frames, origins, end):
    found = {frame: Prediction(origin, []) for frame, origin in origins.items()}
    assert sessions.propagation_end(start, forward, user_frames, found, 12) == end
