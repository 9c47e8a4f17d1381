"""Flags by mode: what each takes, what it refuses, what its help shows."""

import argparse
import re

import pytest

import flags

MODES = ("train", "eval", "segment", "export")
SEGMENT = "-m segment --video clip.mp4 --mask first.png"


def of(line):
    return flags.parse(line.split())


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
    ("-m eval --learning_rate 1e-3", "--learning_rate", "eval", "train"),
    (f"{SEGMENT} --loss_function dice", "--loss_function", "segment", "train"),
    ("-m eval --cutout blur", "--cutout", "eval", "segment"),
    ("-m eval --box 1 2 3 4", "--box", "eval", "segment"),
    ("-m eval -x", "--loss_visualization", "eval", "train"),
    ("--epochs 3 -m eval", "--epochs", "eval", "train"),
])
def test_a_flag_of_another_mode_is_refused(line, flag, mode, expected):
    with pytest.raises(ValueError) as refused:
        of(line)
    assert str(refused.value) == (f"{flag}: not for -m {mode}, expected -m {expected} beside it")


def test_defaults_are_set_whatever_the_mode():
    for line in ("", "-m eval", SEGMENT):
        args = vars(of(line))
        default = flags.defaults()
        default.pop("help", None)
        assert args.keys() == default.keys()
        given = {"mode", "video", "mask"} if "--video" in line else {"mode"}
        assert all(args[name] == default[name] for name in args.keys() - given)
    assert of("").mode == "train" and of("").loss_function == ["dice", "bce"]


def help_of(line, capsys):
    """The text, and the names of the flags that it explains."""
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
    names = set(flags.defaults()) - {"help", "no_shuffle", "no_augment"}
    assert everything == {f"--{name}" for name in names} | {"--no-shuffle", "--no-augment"}
    common = {"--mode", "--seed", "--encoder", "--method", "--input_image_shape", "--top_k"}
    for mode, mine, others in (
            ("train", {"--batch_size", "--resume", "--dataset"}, {"--video", "--size"}),
            ("eval", {"--visualize", "--dataset", "--overwrite"}, {"--video", "--resume"}),
            ("segment", {"--video", "--cutout", "--overwrite"}, {"--dataset", "--resume",
                                                                 "--visualize"})):
        assert common | mine <= shown[mode] and not shown[mode] & others


@pytest.mark.parametrize("mode", MODES)
def test_help_shows_what_the_mode_takes_and_nothing_else(mode, capsys):
    _, shown = help_of(f"-m {mode} -h", capsys)
    parser, _ = flags._parser()
    for action in parser._actions:
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
            flags.parse(["-m", mode, flag, *values])
            refused = False
        except ValueError as error:
            refused = f"not for -m {mode}" in str(error)
        assert refused == (flag not in shown), flag


def test_a_wrong_help_is_no_help():
    with pytest.raises(ValueError, match="--mode.*dream"):
        of("-m dream")
    assert isinstance(of("-m eval"), argparse.Namespace)
