"""Running `-m segment` again: after a kill, for another cut-out, with other flags; locks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    STATE_OF_EACH_FRAME,
    content,
    draw_frame,
    held,
    kill_when,
    paused_run,
)
from PIL import Image

import main
from cli.segment import clip_fingerprint, load_user_masks, parse_mask_argument
from masks.read import read_mask
from media import files, images
from media.video import open_clip
from outputs.run_folder import RunFolder, read_metadata
from system import version
from tracking import pipeline
from tracking.tracker import Tracker


def alpha(path):
    return np.array(Image.open(path))[..., 3]


@pytest.fixture
def clip(tmp_path):
    """Arguments that segment a clip from masks of two frames; the later mask adds an object.

    With the shipped model, so with short-term and long-term memory.
    """
    for i in range(16):
        image, mask = draw_frame(i % 11, (1, 2))
        images.write_image(tmp_path / "clip" / f"{i:05d}.png", image)
        images.write_mask(tmp_path / f"{i}.png", mask if i > 8 else np.where(mask == 2, 0, mask))

    def arguments(name, *more, masks=("7:7.png", "9:9.png")):
        masks = [mask.replace(":", f":{tmp_path}/") for mask in masks]
        return ["-m", "segment", "--video", str(tmp_path / "clip"), "--mask", *masks, "-c", "cpu",
                "-p", "96", "160", "-j", str(tmp_path / name), *more]

    return arguments


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("last, kept, cutout", [(3, [6, 5, 4], "blur"),
                                                (7, range(7), "transparent"),
                                                (12, range(12), "blur")])
def test_a_killed_run_resumes_in_either_direction(last, kept, cutout, clip, tmp_path, capsys):
    more = ["--cutout", cutout]
    killed = tmp_path / "killed"
    kill_when((killed / "masks" / f"{last:05d}.png").is_file, clip("killed", *more),
              ("-c", STATE_OF_EACH_FRAME, ROOT))
    before = {path: path.stat().st_mtime_ns for path in
              (killed / "masks" / f"{i:05d}.png" for i in kept)}
    assert main.main(clip("killed", *more, "-k", "7")) == 2
    assert "holds results of other flags" in capsys.readouterr().err
    assert main.main(clip("killed", *more)) == 0
    assert main.main(clip("whole", *more)) == 0
    assert content(killed) == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    found = list((killed / "masks").iterdir())
    assert len(found) == 16 and any(2 in read_mask(path) for path in found)


@pytest.mark.slow
def test_a_finished_clip_is_not_segmented_again(clip, tmp_path, capsys, monkeypatch):
    out, step = tmp_path / "out", Tracker.step
    assert main.main(clip("out")) == 0
    assert main.main(clip("whole", "--cutout", "transparent")) == 0
    monkeypatch.setattr(Tracker, "step", lambda *_: pytest.fail("segmented again"))
    before = content(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    capsys.readouterr()
    assert main.main(clip("out")) == 0
    assert "16 frames were already finished" in capsys.readouterr().out
    assert content(out) == before
    for how in ("transparent", "blur", "#00ff00"):
        assert main.main(clip("out", "--cutout", how)) == 0
        assert "already finished" not in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    green, drawn = (out / "cutout.mp4").read_bytes(), content(out)
    for path, data in content(tmp_path / "whole").items():
        if path.parent.name == "cutout":  # edges of the masks, not of their probabilities
            assert (alpha(out / path) >= 128).tolist() == (alpha(tmp_path / "whole" / path)
                                                           >= 128).tolist()
        elif not path.name.endswith(".json"):
            assert drawn[path] == data
    for how in ("transparent", "#00ff00"):  # both exist
        assert main.main(clip("out", "--cutout", how)) == 0
        assert "already finished" in capsys.readouterr().out
    assert main.main(clip("out", "--cutout", "blur")) == 0  # was replaced
    assert (out / "cutout.mp4").read_bytes() != green
    monkeypatch.setattr(Tracker, "step", step)
    (out / "masks" / "00003.png").unlink()
    assert main.main(clip("out")) == 0
    assert {path: data for path, data in content(out).items() if path in before} == {
        path: data if path.name != "clip.finished.json" else content(out)[path]
        for path, data in before.items()}


@pytest.mark.slow
def test_results_of_other_flags_or_data_are_refused(clip, tmp_path, capsys):
    assert main.main(clip("out", "--cutout", "transparent", masks=["7:7.png"])) == 0
    before = content(tmp_path / "out")
    shutil.copytree(tmp_path / "clip", tmp_path / "other")
    for arguments, what in ((clip("out", "-k", "7", masks=["7:7.png"]), "flags"),
                            (clip("out", "--video", str(tmp_path / "other"), masks=["7:7.png"]),
                             "data")):
        assert main.main(arguments) == 2
        assert f"holds results of other {what}" in capsys.readouterr().err
        assert content(tmp_path / "out") == before


@pytest.mark.slow
def test_other_masks_replace_the_results_of_a_clip(clip, tmp_path, caplog):
    """A run ends with this advice: correct a mask and run again."""
    assert main.main(clip("out", "--cutout", "transparent", masks=["7:7.png"])) == 0
    with caplog.at_level("INFO"):
        assert main.main(clip("out")) == 0
    assert "made from other masks" in caplog.text
    assert (json.loads((tmp_path / "out" / "manifest.json").read_text())["versions"]
            .startswith(f"videomatch {version.__version__}, torch"))
    assert main.main(clip("whole")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["transparent", "blur"])
def test_starting_over_removes_earlier_results(first, clip, tmp_path):
    assert main.main(clip("out", "--cutout", first, masks=["7:7.png"])) == 0
    for i in (14, 15):
        (tmp_path / "clip" / f"{i:05d}.png").unlink()
    assert main.main(clip("out", "--overwrite")) == 0
    assert main.main(clip("whole")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    # a mask of the results, put right by hand, is an input that stays
    edited = tmp_path / "out" / "masks" / "00012.png"
    images.write_mask(edited, read_mask(tmp_path / "12.png"))
    again = clip("out", "--overwrite", masks=["7:7.png", "12:out/masks/00012.png"])
    assert main.main(again) == 0
    np.testing.assert_array_equal(read_mask(edited), read_mask(tmp_path / "12.png"))


@pytest.mark.slow
def test_a_refused_mask_leaves_no_metadata(clip, tmp_path, capsys):
    images.write_mask(tmp_path / "small.png", np.ones((9, 8), np.uint8))
    for wrong in ("7:small.png", "99:7.png"):
        assert main.main(clip("out", masks=[wrong])) == 2
    assert main.main(clip("out")) == 0


@pytest.mark.slow
def test_a_broken_state_is_named(clip, tmp_path, capsys):
    state = tmp_path / "out" / ".masks.progress"
    state.parent.mkdir()
    for broken in (b"", b"text", {"index": 3}, {"index": 3, "forwards": True, "state": {}},
                   {"index": 3, "forwards": True, "state": {"memory": {"kind": "Popen"}}}):
        state.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, state)
        assert main.main(clip("out")) == 2
        assert ".masks.progress: not the state of an inter" in capsys.readouterr().err
    assert main.main(clip("out", "--overwrite")) == 0 and not state.exists()


@pytest.mark.slow
def test_a_damaged_manifest_is_refused_and_overwritten_on_request(clip, tmp_path, capsys):
    assert main.main(clip("out", "--cutout", "blur")) == 0
    (tmp_path / "out" / "manifest.json").write_text("[]")
    assert main.main(clip("out")) == 2
    assert "manifest.json: not a manifest" in capsys.readouterr().err
    assert main.main(clip("out", "--overwrite")) == 0 and main.main(clip("whole")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_ctrl_c_after_the_last_frame_is_raised():
    class Kept(pipeline.Sink):
        frames: list = []

        def write(self, frame):
            self.frames.append(frame.index)

    def frames():
        image = np.zeros((4, 5, 3), np.uint8)
        yield from (pipeline.Frame(i, image, None, True, None, image[..., 0]) for i in range(3))
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.drain(frames(), [Kept()])
    finally:
        signal.signal(signal.SIGINT, before)
    assert Kept.frames == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_second_run_does_not_touch_files_of_the_first(clip, tmp_path, capsys):
    """It has the same or other flags and starts in the middle of the first run."""
    out = tmp_path / "out"
    with paused_run(tmp_path, clip("out", "--cutout", "blur")) as first:
        before = content(out)
        box = [word for word in clip("out", masks=()) if word != "--mask"]
        box += ["--box", "8", "6", "20", "16"]
        for second in (clip("out", "--cutout", "blur"), clip("out", "-k", "7"),
                       clip("out", "--overwrite"), clip("out", masks=["9:9.png"]), box,
                       [*box, "--page"]):
            assert main.main(second) == 2
            error = capsys.readouterr().err.splitlines()
            assert f"{out}: another run is writing there (process {first.pid}" in error[-1]
            assert content(out) == before
    assert main.main(clip("whole", "--cutout", "blur")) == 0
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_leaves_no_lock_and_no_unfinished_file(clip, tmp_path):
    out = tmp_path / "out"

    def writes_the_overlay():
        return any(out.glob(".overlay.part*"))

    kill_when(writes_the_overlay, clip("out"))
    assert list(out.glob(".overlay.part*"))
    assert main.main(clip("out")) == 0 and main.main(clip("whole")) == 0
    assert content(out) == content(tmp_path / "whole")


def test_a_folder_is_locked_by_one_run_at_a_time(tmp_path):
    """The lock file outlives each run: two runs must never lock different files of that name."""
    unfinished = tmp_path / ".overlay.part-123.mp4"
    tmp_path.chmod(0o770)  # of a group, all of whom may hold it
    with held(tmp_path) as first:
        assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o660
        number = (tmp_path / ".lock").stat().st_ino
        with pytest.raises(ValueError, match=rf"{tmp_path}: another .*process {first.pid} on "), \
                files.lock_folder(tmp_path):
            pass
        with files.lock_folder(tmp_path / "inner"), files.lock_folder(tmp_path, "vm"):
            pass  # what others hold in it is theirs
        unfinished.touch()
    assert unfinished.exists()
    with files.lock_folder(tmp_path):
        assert (tmp_path / ".lock").stat().st_ino == number and not unfinished.exists()
    assert not list(tmp_path.glob("*.holder"))


def test_a_read_only_folder_is_locked_by_root_and_named_to_others(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir(mode=0o555)
    if os.geteuid():
        with pytest.raises(OSError, match=f"Permission denied.*{folder}"), \
                files.lock_folder(folder):
            pass
    else:
        with held(folder), pytest.raises(ValueError, match="another run"), \
                files.lock_folder(folder):
            pass


def test_a_lock_on_a_name_covers_only_its_files(tmp_path):
    names = (".vm.part-1.pth", ".other.part-1.pth", ".part.pth")
    with held(tmp_path, "other"):
        for name in names:
            (tmp_path / name).touch()
        with files.lock_folder(tmp_path, "vm"):
            assert [(tmp_path / name).exists() for name in names] == [False, True, True]
        with files.lock_folder(tmp_path):
            assert (tmp_path / ".other.part-1.pth").exists()
        with pytest.raises(ValueError, match=r"other: another run.*another file"), \
                files.lock_folder(tmp_path, "other", "another file"):
            pass


def test_files_written_by_two_processes_at_once_are_whole(tmp_path):
    with files.atomic_path(tmp_path / "a.txt") as first:
        first.write_text("first")
        code = ("import sys; sys.path.insert(0, sys.argv[1]); from media import files\n"
                "files.write(sys.argv[2], 'second')")
        subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "a.txt"], check=True)
        assert (tmp_path / "a.txt").read_text() == "second"
    assert (tmp_path / "a.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
def test_the_fingerprint_covers_only_files_of_the_clip(clip, tmp_path, capsys):
    frames = tmp_path / "clip"
    images.write_mask(frames / "mask.png", read_mask(tmp_path / "7.png"))
    again = clip("out", masks=["7:clip/mask.png"])
    assert main.main(again) == 0
    before = clip_fingerprint(open_clip(frames, [frames / "mask.png"]))
    (frames / ".DS_Store").write_bytes(b"Finder")
    (frames / "notes.txt").write_text("frame 9 is blurred")
    (frames / "mask_00007.png").write_bytes((frames / "mask.png").read_bytes())  # as --box makes
    os.utime(frames / "mask.png", (0, 0))
    capsys.readouterr()
    assert main.main(again) == 0 and "already finished" in capsys.readouterr().out
    assert clip_fingerprint(open_clip(frames, [frames / "mask.png"])) == before
    os.utime(frames / "00003.png", (0, 0))
    assert main.main(again) == 2 and "results of other data" in capsys.readouterr().err


def test_resuming_at_another_commit_records_both(tmp_path, caplog):
    made = {"flags": "default", "versions": "videomatch 1.0.0"}
    RunFolder(tmp_path, made | {"commit": "aaa"}).start()
    with caplog.at_level("INFO"):
        for _ in range(2):
            RunFolder(tmp_path, made | {"commit": "bbb"}).start()
    assert caplog.text.count("begun by commit aaa of this toolkit, resumed by bbb") == 1
    assert read_metadata(tmp_path)["commit"] == "aaa then bbb"
    RunFolder(tmp_path, made).start()  # without Git
    assert read_metadata(tmp_path)["commit"] == "aaa then bbb"
    with pytest.raises(ValueError, match="results of other versions"):
        RunFolder(tmp_path, made | {"versions": "videomatch 1.1.0"})


def test_a_mask_file_name_may_contain_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30.png").touch()
    assert parse_mask_argument("12:30.png") == (None, "12:30.png")
    assert parse_mask_argument("12:31.png") == (12, "31.png")
    (tmp_path / "30.png").touch()
    assert parse_mask_argument("12:30.png") == (12, "30.png")


def test_a_mask_stack_starts_at_its_frame(tmp_path):
    frames = [Image.fromarray(draw_frame(i)[0]) for i in range(6)]
    frames[0].save(tmp_path / "clip.tif", save_all=True, append_images=frames[1:])
    masks = [Image.fromarray(draw_frame(i)[1] * (i % 2)) for i in range(4)]
    masks[0].save(tmp_path / "labels.tif", save_all=True, append_images=masks[1:])
    args = Namespace(mask=[f"2:{tmp_path / 'labels.tif'}"], box=[], point=[], mask_frame=None,
                     video=tmp_path / "clip.tif")
    found = load_user_masks(args, open_clip(args.video), tmp_path, None, {})
    assert list(found) == [3, 5]
    for frame, mask in found.items():
        np.testing.assert_array_equal(mask, draw_frame(frame - 2)[1])
