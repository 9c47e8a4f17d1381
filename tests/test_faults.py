"""Killed and repeated runs, second runs, full disks, little memory."""

import json
import os
import resource
import shutil
import subprocess
import sys

import cv2
import pytest
import torch
from conftest import (
    ROOT,
    STATE_OF_EACH_FRAME,
    content,
    held,
    kill_when,
    paused_run,
    write_list,
    write_sequence,
)
from torchvision import models

import main
from network import checkpoint
from videomatch import VideoMatch


@pytest.fixture
def training(davis_2016, tmp_path):
    """Arguments of a short training, and a function that returns its final state."""
    torch.manual_seed(0)
    weights = tmp_path / "mobilenet.pth"
    torch.save(models.mobilenet_v2().state_dict(), weights)

    def arguments(name, *more):
        return ["-m", "train", "-d", str(davis_2016), "-s", str(tmp_path / name / "vm.pth"),
                "--encoder_weights", str(weights), "-b", "2", "-i", "9", "-r", "3",
                "-p", "64", "96", "-c", "cpu", *more]

    return arguments


def state_of(tmp_path, name):
    return torch.load(tmp_path / name / "vm.state", weights_only=True)


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_weights(training, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main.main(training("whole")) == 0
    reports = tmp_path / "killed" / "vm.jsonl"

    def has_two_reports():
        return reports.is_file() and len(reports.read_text().splitlines()) >= 2

    kill_when(has_two_reports, training("killed"))
    assert main.main(training("killed", "--resume", "--workers", "0")) == 0
    torch.set_num_threads(threads)
    whole, resumed = (state_of(tmp_path, name) for name in ("whole", "killed"))
    for part in ("model", "optimizer"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    for part in ("schedule", "best", "stale"):
        assert resumed[part] == whole[part]
    lines = [[json.loads(line) | {"seconds": 0} for line in
              (tmp_path / name / "vm.jsonl").read_text().splitlines()]
             for name in ("whole", "killed")]
    assert lines[0] == lines[1] and [line["iteration"] for line in lines[0]] == [0, 3, 6, 9]
    best = [torch.load(tmp_path / name / "vm.pth", weights_only=True) for name in
            ("whole", "killed")]
    torch.testing.assert_close(best[1]["model"], best[0]["model"], rtol=0, atol=0)


@pytest.mark.slow
def test_a_second_training_does_not_touch_files_of_the_first(training, tmp_path, capsys):
    folder = tmp_path / "run"
    with paused_run(tmp_path, training("run")) as first:
        before = content(folder)
        assert {path.suffix for path in before} >= {".jsonl", ".pth", ".state"}
        for more in ((), ("--overwrite",), ("--resume",), ("-l", "3e-4")):
            assert main.main(training("run", *more)) == 2
            assert (f"{folder / 'vm'}: another run is writing there (process {first.pid}"
                    in capsys.readouterr().err)
            assert content(folder) == before
    reports = (folder / "vm.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in reports] == [0, 3, 6, 9]


def test_a_state_is_synced_before_it_replaces_the_last_one(tmp_path, monkeypatch):
    path, flushed = tmp_path / "vm.state", []

    def fsync(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(path, {"iteration": 3})
    assert flushed == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@pytest.mark.slow
def test_resume_without_a_state_starts_from_scratch(training, tmp_path):
    assert main.main(training("new", "--resume", "-i", "1")) == 0
    assert len(state_of(tmp_path, "new")["history"]) == 2


@pytest.mark.slow
def test_resume_with_other_flags_is_refused(training, tmp_path, capsys):
    assert main.main(training("run", "-i", "1")) == 0
    before = (tmp_path / "run" / "vm.state").read_bytes()
    assert main.main(training("run", "-i", "1", "--resume", "-l", "3e-4")) == 2
    assert "learning_rate (0.0001, now 0.0003)" in capsys.readouterr().err
    (tmp_path / "run" / "vm.state").write_bytes(before[:1000])
    assert main.main(training("run", "-i", "1", "--resume")) == 2
    assert "vm.state: not the state of a training run" in capsys.readouterr().err


@pytest.mark.slow
def test_resuming_a_finished_training_changes_nothing(training, tmp_path):
    assert main.main(training("run", "-i", "2")) == 0
    before = (tmp_path / "run" / "vm.pth").read_bytes()
    assert main.main(training("run", "-i", "2", "--resume")) == 0
    assert (tmp_path / "run" / "vm.pth").read_bytes() == before


@pytest.fixture
def evaluation(tmp_path, model):
    """Arguments that evaluate three sequences into a folder."""
    for name in ("ant", "bee", "cat"):
        write_sequence(tmp_path / "davis", name, frames=12)
    write_list(tmp_path / "davis", "2016", "val", ["ant", "bee", "cat"])
    model.save(tmp_path / "vm.pth")
    return lambda name, *more: ["-m", "eval", "-d", str(tmp_path / "davis"), "-c", "cpu", "-o",
                                str(tmp_path / "vm.pth"), "-j", str(tmp_path / name), *more]


@pytest.mark.slow
def test_a_killed_evaluation_resumes_with_the_missing_sequences(evaluation, tmp_path, capsys):
    assert main.main(evaluation("whole")) == 0
    table = capsys.readouterr().out.split("frames in")[0]
    kill_when((tmp_path / "killed" / "ant.finished.json").is_file, evaluation("killed"))
    finished = [path.name.split(".")[0] for path in (tmp_path / "killed").glob("*.finished.json")
                if not path.name.startswith(".")]
    assert 0 < len(finished) < 3
    before = {path: path.stat().st_mtime_ns for name in finished
              for path in (tmp_path / "killed" / name).iterdir()}
    capsys.readouterr()
    assert main.main(evaluation("killed")) == 0
    assert capsys.readouterr().out.split("frames in")[0] == table
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_killed_within_a_sequence_resumes_there(evaluation, tmp_path, capsys):
    assert main.main(evaluation("whole", "-v")) == 0
    table = capsys.readouterr().out.split("frames in")[0]
    killed = tmp_path / "killed"
    kill_when((killed / "bee" / "00004.png").is_file, evaluation("killed", "-v"),
              ("-c", STATE_OF_EACH_FRAME, ROOT))
    before = {path: path.stat().st_mtime_ns for path in
              (*(killed / "ant").iterdir(), *(killed / "bee" / f"{i:05d}.png" for i in range(4)))}
    assert main.main(evaluation("killed", "-v")) == 0
    assert capsys.readouterr().out.split("frames in")[0] == table
    assert content(killed) == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_second_evaluation_does_not_touch_files_of_the_first(evaluation, tmp_path, capsys):
    out = tmp_path / "out"
    with paused_run(tmp_path, evaluation("out", "-v")) as first:
        before = content(out)
        for more in ((), ("-v",), ("-k", "7"), ("--overwrite",), ("-q", "cat")):
            assert main.main(evaluation("out", *more)) == 2
            assert (f"{out}: another run is writing there (process {first.pid}"
                    in capsys.readouterr().err)
            assert content(out) == before
    assert main.main(evaluation("whole", "-v")) == 0
    assert content(out) == content(tmp_path / "whole")


def test_an_export_folder_is_locked_by_one_run(tmp_path, capsys):
    with held(tmp_path):
        assert main.main(["-m", "export", "--export_dir", str(tmp_path), "-c", "cpu"]) == 2
    assert "another run is writing there" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.slow
def test_results_of_other_data_or_flags_are_not_mixed(evaluation, tmp_path, capsys):
    assert main.main(evaluation("out", "-q", "ant")) == 0
    before = content(tmp_path / "out")
    assert main.main(evaluation("out", "-k", "7")) == 2
    assert "holds results of other flags" in capsys.readouterr().err
    assert content(tmp_path / "out") == before
    model = VideoMatch.load(tmp_path / "vm.pth")
    next(model.parameters()).data += 0.1
    model.save(tmp_path / "other.pth")
    assert main.main(evaluation("out", "-o", str(tmp_path / "other.pth"))) == 2
    assert "holds results of other weights" in capsys.readouterr().err
    shutil.copytree(tmp_path / "davis", tmp_path / "another")
    for flags, what in ((["-d", str(tmp_path / "another")], "data"),
                        (["--precision", "bf16"], "arithmetic")):
        assert main.main(evaluation("out", *flags)) == 2
        assert f"holds results of other {what}" in capsys.readouterr().err
    assert main.main(evaluation("out", "--precision", "fp32")) == 0
    assert main.main(evaluation("out", "-k", "7", "--overwrite")) == 0
    assert main.main(evaluation("out", "-k", "7", "-q", "ant")) == 0


@pytest.mark.slow
def test_a_deleted_mask_or_video_is_written_again(evaluation, tmp_path):
    assert main.main(evaluation("out")) == 0
    before = content(tmp_path / "out")
    (tmp_path / "out" / "bee" / "00003.png").unlink()
    assert main.main(evaluation("out")) == 0
    assert content(tmp_path / "out") == before
    assert main.main(evaluation("out", "-v")) == 0
    assert (tmp_path / "out" / "cat.mp4").is_file()


@pytest.mark.slow
def test_starting_over_removes_videos_of_earlier_masks(evaluation, tmp_path):
    assert main.main(evaluation("out", "-v", "-k", "7")) == 0
    assert main.main(evaluation("out", "--overwrite")) == 0
    assert main.main(evaluation("whole")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_broken_manifest_is_named(evaluation, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("[]")
    assert main.main(evaluation("out")) == 2
    assert "manifest.json: not a manifest" in capsys.readouterr().err


def on_a_full_disk(arguments, limit):
    """Run main.py with a file size limit of `limit` bytes, which acts like a full disk."""
    return subprocess.run(
        [sys.executable, ROOT / "main.py", *arguments], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


@pytest.mark.slow
@pytest.mark.parametrize("flags, limit, missing, masks", [
    ((), 500, "ant/00000.png", 0), ((), 9000, "report", 36), (("-v",), 4000, "ant.mp4", 12)])
def test_a_full_disk_keeps_finished_results(flags, limit, missing, masks, evaluation, tmp_path):
    result = on_a_full_disk(evaluation("out", *flags), limit)
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.returncode == 2 and len(errors) == 1 and missing in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert not any(".part" in name or name.startswith(("report", "ant.mp4")) for name in names)
    assert any(name.endswith(".finished.json") for name in names) == (masks == 36)
    found = list((tmp_path / "out").rglob("*.png"))
    assert len(found) == masks and all(cv2.imread(str(mask)) is not None for mask in found)
    assert main.main(evaluation("out", *flags)) == 0  # with enough space again
    assert main.main(evaluation("whole", *flags)) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_keeps_the_weights_so_far(training, tmp_path):
    assert main.main(training("run", "-i", "3")) == 0
    before = content(tmp_path / "run")
    size = (tmp_path / "run" / "vm.pth").stat().st_size
    result = on_a_full_disk(training("run", "-i", "3", "--seed", "1", "--overwrite"), size // 2)
    assert result.returncode == 2 and "vm." in result.stderr and "Traceback" not in result.stderr
    after = content(tmp_path / "run")
    assert all(after[path] == before[path] for path in before if path.suffix != ".jsonl")
    assert after.keys() == before.keys()


SHORT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main.main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("megabytes", [20, 120, 2000])
def test_little_memory_suffices_or_gives_one_line(megabytes, evaluation, tmp_path, capsys):
    """`megabytes` of address space are left after the imports."""
    result = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, ROOT, str(megabytes), *evaluation("short")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "Traceback" not in result.stderr, result.stderr
    if megabytes > 1000:
        assert result.returncode == 0
    if result.returncode == 0:
        assert main.main(evaluation("whole")) == 0
        assert content(tmp_path / "short") == content(tmp_path / "whole")
    else:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        assert result.returncode == 2 and len(errors) == 1, result.stderr
        assert "memory" in errors[0]
