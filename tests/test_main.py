"""The command line: flags, one-line errors, the pipeline from frames to table."""

import json
import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT

import main
from cli import options, setup
from media import images
from system import errors
from videomatch import VideoMatch


@pytest.fixture
def weights(model, tmp_path):
    """A file of (random) ImageNet weights in torchvision's layout."""
    path = tmp_path / "mobilenet.pth"
    state = model.encoder.backbone.state_dict()
    torch.save({f"features.{name}": value for name, value in state.items()}, path)
    return path


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save(tmp_path / "vm.pth", held_out_iou=0.5)
    return tmp_path / "vm.pth"


@pytest.mark.parametrize("line", [
    "-c 0 -m train -t train -s models/vm_resnet.pth -p 416 790 -l 1e-5 -x -en resnet",
    "-c 0 -m eval -t val -u -o models/vm_vgg.pth -j vm_results -v",
])
def test_published_command_lines_parse_and_ask_for_a_gpu(line, davis_2016, model, tmp_path,
                                                           monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    model.save(tmp_path / "models/vm_vgg.pth")
    args = [*line.split(), "-d", str(davis_2016)]
    if "train" in line:
        args += ["--encoder_weights", "none"]
    assert main.main(args) == 2
    assert "-c cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_published_command_lines_run_on_the_cpu(davis_2016, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = "-c cpu -m train -t train -s models/vm_resnet.pth -p 96 160 -l 1e-5 -x -en resnet -i 2"
    assert main.main([*train.split(), "-d", str(davis_2016), "--encoder_weights", "none"]) == 0
    for name in ("vm_resnet.pth", "vm_resnet.jsonl", "vm_resnet.png"):
        assert (tmp_path / "models" / name).is_file()
    evaluation = "-c cpu -m eval -t val -u -o models/vm_resnet.pth -j vm_results -v"
    assert main.main([*evaluation.split(), "-d", str(davis_2016)]) == 0
    assert (tmp_path / "vm_results/dog/00005.png").is_file()
    assert (tmp_path / "vm_results/dog.mp4").is_file()
    assert (tmp_path / "vm_results/global_results-val.csv").is_file()


@pytest.mark.slow
def test_training_flags_are_applied(davis_2016, weights, tmp_path):
    save = tmp_path / "vm.pth"
    assert main.main(["-m", "train", "-d", str(davis_2016), "-s", str(save), "-b", "2", "-e", "2",
                      "-i", "1", "-lf", "balancedbce", "-a", "-u", "-vs", "0.4", "-r", "1",
                      "-p", "64", "96", "--encoder_weights", str(weights), "-uf", "1.5", "-k", "4",
                      "--temperature", "0.1", "-w", "1e-4", "--workers", "0"]) == 0
    model = VideoMatch.load(save)
    assert (model.upsample_factor, model.top_k, model.temperature) == (1.5, 4, 0.1)
    assert len(save.with_suffix(".jsonl").read_text().splitlines()) == 3


def test_a_checkpoint_needs_no_other_flag(davis_2016, model, tmp_path, capsys):
    model.upsample_factor, model.top_k = 1.5, 4
    model.save(tmp_path / "vm.pth")
    assert main.main(["-m", "eval", "-d", str(davis_2016), "-o", str(tmp_path / "vm.pth")]) == 0
    assert "all" in capsys.readouterr().out


def test_matching_flags_override_the_checkpoint(checkpoint):
    args = options.parse(["-m", "eval", "-o", str(checkpoint), "-uf", "4", "-k", "9",
                        "--temperature", "0.2", "--dilation", "7"])
    model = setup.build_model(args)
    assert (model.upsample_factor, model.top_k) == (4, 9)
    assert (model.temperature, model.dilation) == (0.2, 7)


def run(*arguments, cwd):
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True)


@pytest.mark.slow
def test_the_demo_is_evaluated(tmp_path):
    result = run("-m", "eval", "--demo", "-q", "hills", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[1].split()[1]) > 0.8
    assert (tmp_path / "results/demo/hills/00023.png").is_file()
    assert (tmp_path / "results/demo/hills.mp4").is_file()


@pytest.mark.slow
def test_training_runs_on_the_demo(tmp_path, weights):
    result = run("-m", "train", "--demo", "-i", "2", "-p", "96", "160", "--encoder_weights",
                 weights, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/vm_mobilenet.pth").is_file()


@pytest.mark.slow
def test_the_real_command_prints_no_traceback(tmp_path):
    result = run("-d", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "nowhere" in result.stderr


def raised(function):
    with pytest.raises(ValueError) as caught:
        function()
    return caught.value


class Broken(torch.utils.data.Dataset):
    """Data that a loader's worker fails on: by an error of the toolkit, or by a bug."""

    def __init__(self, bug):
        self.bug = bug

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return broken(self.bug)


def broken(bug):
    if bug:
        return np.zeros(3) + np.zeros(4)
    images.check_same_shape("frame.jpg", (4, 5), "mask.png", (6, 7))


def in_a_process(bug):
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(broken, bug).result()


def in_a_thread(bug):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(broken, bug).result()


@pytest.mark.parametrize("run", [
    broken, in_a_thread, in_a_process,
    lambda bug: list(torch.utils.data.DataLoader(Broken(bug), num_workers=1))])
def test_errors_of_the_toolkit_are_one_line_and_bugs_keep_their_traceback(run):
    line = errors.explained(raised(lambda: run(False)))
    assert line.startswith("mask.png: ") and "frame.jpg" in line and "\n" not in line
    assert errors.explained(raised(lambda: run(True))) is None


def test_uncaught_library_errors_count_as_bugs():
    for bug in (lambda: int("x"), lambda: torch.optim.SGD([], lr=1),
                lambda: json.loads("{"), lambda: np.zeros((2, 3)).reshape(4)):
        assert errors.explained(raised(bug)) is None


def test_a_bug_ends_with_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "run_eval", lambda args: broken(True))
    with pytest.raises(ValueError, match="broadcast"):
        main.main(["-m", "eval", "--demo"])


@pytest.mark.slow
def test_help_names_every_published_flag():
    text = run("-h", cwd=ROOT).stdout
    for flag in ("--dataset", "-d", "--year", "-y", "--set", "-t", "--sequences", "-q",
                 "--no-shuffle", "-u", "--mode", "-m", "--cuda_device", "-c", "--model_save", "-s",
                 "--model_load", "-o", "--batch_size", "-b", "--epochs", "-e", "--iters", "-i",
                 "--no-augment", "-a", "--learning_rate", "-l", "--weight_decay", "-w",
                 "--validation_size", "-vs", "--loss_function", "-lf", "--input_image_shape", "-p",
                 "--segmentation_shape", "-g", "--leave_outliers", "-ro", "--fg_thresh", "-fg",
                 "--encoder", "-en", "--upsample_factor", "-uf", "--val_report", "-r",
                 "--visualize", "-v", "--results_dir", "-j", "--logger", "-f",
                 "--loss_visualization", "-x"):
        assert re.search(rf"{flag}[ ,\n]", text), flag
