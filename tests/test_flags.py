"""Flags by mode: what each takes, what it refuses, what its help shows."""

import argparse
import re
from pathlib import Path

import pytest

from cli import options

MODES = ("train", "eval", "segment", "export")
SEGMENT = "-m segment --video clip.mp4 --mask first.png"


def of(line):
    return options.parse(line.split())


@pytest.mark.parametrize("line, flag, mode, expected", [
    ("-m segment -b 2", "--batch_size", "segment", "train"),
    (f"{SEGMENT} --batch_size 1", "--batch_size", "segment", "train"),  # the default, named
    (f"{SEGMENT} -v", "--visualize", "segment", "eval"),
    (f"{SEGMENT} -d DAVIS", "--dataset", "segment", "train or -m eval"),
    (f"{SEGMENT} --demo", "--demo", "segment", "train or -m eval"),
    (f"{SEGMENT} --resume", "--resume", "segment", "train"),
    ("--video clip.mp4", "--video", "train", "segment"),
    ("--video clip.mp4 --mask a.png", "--video", "train", "segment"),
    ("-j results", "--results_dir", "train", "eval or -m segment"),
    ("-m train --size 480", "--size", "train", "eval or -m segment"),
    ("-m eval -l 1e-3", "--learning_rate", "eval", "train"),
    (f"{SEGMENT} --weight_decay=0.1", "--weight_decay", "segment", "train"),
    (f"{SEGMENT} -lf dice", "--loss_function", "segment", "train"),
    ("-m eval --cutout blur", "--cutout", "eval", "segment"),
    ("-m eval --box 1 2 3 4", "--box", "eval", "segment"),
    ("-m eval -x", "--loss_visualization", "eval", "train"),
    ("--epochs 3 -m eval", "--epochs", "eval", "train"),
])
def test_a_flag_of_another_mode_is_refused(line, flag, mode, expected):
    with pytest.raises(ValueError) as refused:
        of(line)
    assert str(refused.value) == f"{flag}: not a flag of -m {mode}, expected -m {expected}"


def test_each_mode_has_its_own_defaults():
    for mode, words in (("train", ""), ("eval", "-m eval"), ("segment", SEGMENT)):
        args = vars(of(words))
        default = {action.dest: action.default for action in options.build_parser(mode)._actions
                   if action.dest != "help"}
        assert args.keys() == default.keys()
        given = {"mode", "video", "mask"} if "--video" in words else {"mode"}
        assert all(args[name] == default[name] for name in args.keys() - given)
    assert of("").mode == "train" and of("").loss_function == ["dice", "bce"]


def test_flags_that_change_masks_are_marked():
    args = of(f"{SEGMENT} -k 3 --fg_thresh 0.5 -o a.pth -j out --cutout blur -f warn")
    assert options.changed(args, "metadata") == {"top_k": 3}
    assert options.changed(args, "command") == {
        "video": Path("clip.mp4"), "top_k": 3, "model_load": Path("a.pth"), "logger": "warn"}


def help_of(line, capsys):
    """The help text, and the names of the flags in it."""
    with pytest.raises(SystemExit) as end:
        of(line)
    text = capsys.readouterr().out
    assert not end.value.code
    return text, set(re.findall(r"^  (--[\w-]+)", text, re.MULTILINE))


def test_help_shows_all_flags_or_those_of_a_mode(capsys):
    text, everything = help_of("-h", capsys)
    shown = {mode: help_of(f"-m {mode} -h", capsys)[1] for mode in MODES}
    assert everything == set().union(*shown.values())
    assert help_of("-h -m segment", capsys)[1] == help_of("--help --mode segment", capsys)[1] \
        == shown["segment"]
    names = {action.dest for action in options.build_parser(None)._actions} - {
        "help", "no_shuffle", "no_augment"}
    assert everything == {f"--{name}" for name in names} | {"--no-shuffle", "--no-augment"}
    common = {"--mode", "--seed", "--encoder", "--method", "--input_image_shape", "--top_k"}
    for mode, mine, others in (
            ("train", {"--batch_size", "--resume", "--dataset"}, {"--video", "--size"}),
            ("eval", {"--visualize", "--dataset", "--overwrite"}, {"--video", "--resume"}),
            ("segment", {"--video", "--cutout", "--overwrite"}, {"--dataset", "--resume",
                                                                 "--visualize"})):
        assert common | mine <= shown[mode] and not shown[mode] & others


@pytest.mark.parametrize("mode", MODES)
def test_help_shows_only_the_flags_of_the_mode(mode, capsys):
    _, shown = help_of(f"-m {mode} -h", capsys)
    for action in options.build_parser(None)._actions:
        flag = action.option_strings[0]
        if flag in ("-h", "--mode"):
            continue
        values = {None: ["1"], 0: []}.get(action.nargs, ["1"])
        if action.choices:
            values = [list(action.choices)[0]]
        if isinstance(action.nargs, int):
            values = ["16"] * action.nargs
        if flag == "--frames":
            values = ["1:2"]
        try:
            options.parse(["-m", mode, flag, *values])
            refused = False
        except ValueError as error:
            refused = f"not a flag of -m {mode}" in str(error)
        assert refused == (flag not in shown), flag


def test_help_for_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="--mode.*dream"):
        of("-m dream")
    assert isinstance(of("-m eval"), argparse.Namespace)
