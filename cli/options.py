"""The command line of main.py: the flags of each mode, and the checks of their values."""

import argparse
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lite
import train
from davis import SETS, YEARS
from media.live import is_live
from network import precision
from network.encoder import BACKBONES
from outputs import annotations
from videomatch import METHODS

MODES = ("train", "eval", "segment", "export")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING,
          "fatal": logging.CRITICAL}
# DAVIS' aspect ratio at 2/3 of its 480p: a step of two clips takes a second on two cores and 2 GB.
# A larger size helps small objects, in proportion to its cost.
TRAINING_SHAPE = (320, 576)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command line, with the defaults of its mode, checked.

    Args:
        argv: without the program's name; defaults to `sys.argv[1:]`.

    Raises:
        ValueError: an unknown flag, a flag of another mode, or a value that no run could use.
    """
    mode, wants_help = _mode(argv)
    parser = build_parser(None if wants_help and mode is None else mode or MODES[0])
    args, unknown = parser.parse_known_args(argv)
    for text in unknown:
        raise ValueError(_explained(text, args.mode))
    for group in _groups_of(args.mode):
        group.check(args)
    return args


def build_parser(mode: str | None) -> argparse.ArgumentParser:
    """A parser of one mode's flags, or (None) of all, for `-h` without a mode."""
    # No abbreviations: with -m export, --export (of -m segment) would be taken for --export_dir.
    parser = _Parser(allow_abbrev=False,
                     description="VideoMatch: matching-based video object segmentation.",
                     epilog="To try it, nothing else is needed: python main.py -m eval --demo")
    for group in _groups_of(mode):
        section = parser.add_argument_group(group.title)

        def add(*names: str, metadata: bool = True, command: bool = True, section=section,
                **settings) -> None:
            action = section.add_argument(*names, **settings)
            action.metadata, action.command = metadata, command  # see `changed`

        group.add_flags(add)
    return parser


def changed(args: argparse.Namespace, mark: str) -> dict[str, object]:
    """The flags that differ from their default, by name.

    Args:
        mark: "metadata": only flags that change masks, which run metadata have to record.
            "command": only flags that a page's `command.txt` has to repeat.
    """
    return {action.dest: getattr(args, action.dest) for action in build_parser(args.mode)._actions
            if getattr(action, mark, False) and getattr(args, action.dest) != action.default}


@dataclass(frozen=True)
class Group:
    """Flags that belong together.

    Args:
        add_flags: gets a function that takes what `add_argument` takes, plus `metadata` and
            `command` (see `changed`; both True by default).
        check: raises a ValueError for values that contradict each other or no run could use.
    """

    title: str
    modes: tuple[str, ...]
    add_flags: Callable[[Callable], None]
    check: Callable[[argparse.Namespace], None] = lambda args: None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (-h explains every flag)")


def _mode(argv: list[str] | None) -> tuple[str | None, bool]:
    """The mode that a command line names, None if none or an unknown one; whether it has -h."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--mode", "-m")
    first.add_argument("--help", "-h", action="store_true")
    try:
        parsed = first.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # -m without a value: the whole parser reports it
        return None, False
    return parsed.mode if parsed.mode in MODES else None, parsed.help


def _groups_of(mode: str | None) -> list[Group]:
    return [group for group in GROUPS if mode is None or mode in group.modes]


def _explained(text: str, mode: str) -> str:
    """Why an argument of the command line was not recognized."""
    name = text.partition("=")[0]
    for action in build_parser(None)._actions:
        if name in action.option_strings:
            modes = [m for m in MODES
                     if name in build_parser(m)._option_string_actions]
            return (f"{action.option_strings[0]}: not a flag of -m {mode}, expected "
                    f"-m {' or -m '.join(modes)}")
    return f"unrecognized argument: {text} (-h explains every flag)"


# Types and checks

def positive(text: str) -> float:
    value = _number(float, text)
    return _expect_type(value, 0 < value < float("inf"), "a number above 0")


def at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = _number(int, text)
        return _expect_type(value, value >= least, f"a whole number of at least {least}")
    return whole


def side(text: str) -> int:
    """A side of a frame. Below 16 pixels the coarsest feature map would have no location."""
    value = _number(int, text)
    return _expect_type(value, value >= 16, "at least 16")


def source(text: str) -> str | Path:
    """What --video takes: a camera or a URL, as it is, or a path."""
    return text if is_live(text) else Path(text)


def frame_range(text: str) -> tuple[int | None, int | None]:
    """What --frames takes: A:B, A: or :B."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match or not (match[1] or match[2]):
        raise argparse.ArgumentTypeError("expected A:B, frames from A up to, but not including, "
                                         f"B, got {text}")
    start, stop = (int(number) if number else None for number in match.groups())
    if stop is not None and stop <= (start or 0):
        raise argparse.ArgumentTypeError(f"expected a later frame after the colon, got {text}")
    return start, stop


def require(condition: bool, flag: str, expected: str, value) -> None:
    if not condition:
        raise ValueError(f"{flag}: expected {expected}, got {value}")


def _number(kind: type, text: str):
    try:
        return kind(text)
    except ValueError:
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {name}, got {text}") from None


def _expect_type(value, condition: bool, expected: str):
    if not condition:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {value}")
    return value


# The groups, in the order in which -h shows them

def _general(add) -> None:
    add("--mode", "-m", choices=MODES, default="train", metadata=False, command=False,
        help="train; eval: segment the sequences of a data set and score them; segment: segment "
             "your own clip; export: write a checkpoint as graphs for lite.py (default: train); "
             "-m MODE -h shows the flags of one mode")
    add("--logger", "-f", metavar="LEVEL", choices=LEVELS, default="info", metadata=False,
        help="debug, info, warn or fatal; debug also shows tracebacks of errors (default: info)")
    add("--cuda_device", "-c", metavar="DEVICE", default=None, metadata=False,
        help="index of a CUDA device, or cpu, or mps (default: the best available)")
    add("--seed", type=at_least(0), default=0, metavar="N",
        help="random seed; change it to see the spread between runs (default: 0)")
    add("--overwrite", action="store_true", metadata=False, command=False,
        help="start over where --results_dir or --model_save holds an earlier run; without it an "
             "interrupted evaluation or clip resumes where it stopped, and training is refused")


def _check_general(args) -> None:
    require(args.seed < 2**63, "--seed", "a number below 2 to the power of 63", args.seed)


def _data(add) -> None:
    add("--dataset", "-d", metavar="PATH", type=Path, metadata=False,
        help="DAVIS (2016 or 2017 archive), YouTube-VOS and similar, or your own folder, see "
             "docs/training.md (default: ./DAVIS)")
    add("--demo", action="store_true",
        help="a small data set that the toolkit draws itself: to try things without DAVIS")
    add("--year", "-y", choices=YEARS, default=None,
        help="2016: one object per sequence; 2017: several; all: both lists, several (default: "
             "2016 where the data set has that list, else 2017; for the demo 2017)")
    add("--set", "-t", metavar="NAME", default=None, metadata=False,
        help=f"which sequences: {', '.join(SETS)}, or another list or folder of the data set "
             "(default: train for training, val for evaluation)")
    add("--sequences", "-q", metavar="NAME", nargs="+", metadata=False,
        help="only these sequences: to look at a few, or to leave some out")
    add("--no-shuffle", "-u", action="store_true",
        help="train on the frames in order: to compare runs (evaluation never shuffles)")


def _model(add) -> None:
    add("--model_load", "-o", metavar="PATH", type=Path, metadata=False,
        help="checkpoint to evaluate, or to start training from; it brings its configuration "
             "(default: the one in models/; for training ImageNet weights)")
    add("--encoder", "-en", choices=BACKBONES, default=None,
        help="mobilenet for a CPU, vgg or resnet with a GPU (default: the checkpoint's, "
             "else mobilenet)")
    add("--encoder_weights", metavar="PATH",
        help="file of ImageNet weights in torchvision's layout, where they can't be downloaded; "
             "none: random weights")
    add("--upsample_factor", "-uf", metavar="FACTOR", type=positive,
        help="upsample feature maps by this factor: higher for finer masks and small objects, "
             "lower for speed (default: the checkpoint's, else 2 for mobilenet, 1 for vgg and "
             "resnet; not used by --method memory)")
    add("--top_k", "-k", metavar="K", type=at_least(1),
        help="number of highest similarities averaged: lower for small objects, higher against "
             "noise (default: the checkpoint's, else 5 for mobilenet, 20 for vgg and resnet)")
    add("--temperature", metavar="T", type=positive,
        help="temperature of the softmax over scores: lower for probabilities closer to 0 and 1 "
             "(default: the checkpoint's, else 0.05)")
    add("--dilation", metavar="PIXELS", type=at_least(0),
        help="outlier removal keeps what is within this distance of the object's previous mask, "
             "at the size that --size gives frames: lower where look-alikes are near, higher for "
             "fast objects (default: the checkpoint's, else 100)")
    add("--method", choices=METHODS,
        help="matching: soft matching with the reference frame; paper: plus the online update; "
             "memory: a learned memory of past frames (default: memory for training and where the "
             "checkpoint was trained for it, as the one in models/; else matching)")
    add("--precision", choices=precision.NAMES, metadata=False,
        help="data type of the network's computations; fp32 if another machine must reproduce a "
             "result (default: fp16 on a CUDA device except for training; bf16 for --method memory "
             "on a CPU with bfloat16 instructions; else fp32)")
    add("--input_image_shape", "-p", metavar=("H", "W"), nargs=2, type=side,
        help="size at which the network sees frames: smaller for speed and memory (default: "
             "as --size says; for training {} {})".format(*TRAINING_SHAPE))


def _check_model(args) -> None:
    require(args.mode != "train" or args.precision != "fp16", "--precision",
            "fp32 or bf16 to train with", args.precision)


def _training(add) -> None:
    add("--model_save", "-s", metavar="PATH", type=Path,
        help="where the best weights go, with the log (.jsonl) next to them "
             "(default: runs/vm_ENCODER.pth)")
    add("--prompts", action="store_true",
        help="train the prompt decoder, for boxes and points (-m segment --box, --point), and "
             "leave the rest of the checkpoint unchanged")
    add("--stills", metavar="DIR", type=Path, nargs="+", default=[],
        help="folders with images/ and masks/ of static images to make clips from; without -d or "
             "--demo, train on them alone")
    add("--learning_rate", "-l", metavar="RATE", type=positive, default=1e-4,
        help="AdamW learning rate of the encoder, ten times as much for the decoder, with cosine "
             "decay; lower it for larger encoders, or if the loss diverges (default: 1e-4)")
    add("--weight_decay", "-w", metavar="DECAY", type=float, default=0.0,
        help="AdamW weight decay; raise it if held-out IoU falls although the loss falls too "
             "(default: 0)")
    add("--loss_function", "-lf", choices=train.LOSSES, nargs="+", default=["dice", "bce"],
        help="loss, or several whose sum is minimised; balancedbce for small objects "
             "(default: dice bce)")
    add("--workers", metavar="N", type=at_least(0), default=2,
        help="processes that read and augment clips: more if a GPU waits for data, 0 to debug "
             "(default: 2)")
    add("--batch_size", "-b", metavar="N", type=at_least(1), default=1,
        help="clips per step and process: more for a steadier gradient if memory allows "
             "(default: 1)")
    add("--epochs", "-e", metavar="N", type=at_least(1), default=1,
        help="number of epochs (default: 1)")
    add("--iters", "-i", metavar="N", type=int, default=-1,
        help="steps per epoch; -1: as many as show each frame once (default: -1)")
    add("--no-augment", "-a", action="store_true",
        help="no augmentation, only resizing: to measure what augmentation contributes")
    add("--validation_size", "-vs", metavar="SHARE", type=float, default=0.1,
        help="share of the sequences held out, whole, to select the best weights; 0 trains on all "
             "and keeps the last weights (default: 0.1)")
    add("--val_report", "-r", metavar="ITERS", type=int, default=100,
        help="steps between validations; -1: only at the end (default: 100)")
    add("--patience", metavar="N", type=at_least(1), default=10,
        help="stop after this many validations without a better held-out IoU (default: 10)")
    add("--resume", action="store_true",
        help="resume an interrupted run from its last validation")
    add("--loss_visualization", "-x", action="store_true",
        help="write curves of loss and held-out IoU next to the weights (.png)")


def _check_training(args) -> None:
    require(args.weight_decay >= 0, "--weight_decay", "at least 0", args.weight_decay)
    require(0 <= args.validation_size < 1, "--validation_size", "a share in [0, 1)",
            args.validation_size)
    for name in ("iters", "val_report"):
        value = getattr(args, name)
        require(value == -1 or value >= 1, f"--{name}", "-1 or at least 1", value)
    require(args.model_save is None or args.model_save.suffix == ".pth", "--model_save",
            "a file that ends in .pth, with the log and the state next to it", args.model_save)


def _clip(add) -> None:
    add("--video", metavar="PATH", type=source, metadata=False,
        help="a video file, an animation (GIF, APNG, WebP, multi-page TIFF) or a folder of frames; "
             "camera:0 or the URL of a stream (rtsp, http, udp, tcp, ...) is tracked live, see "
             "docs/live.md")
    add("--seconds", metavar="S", type=positive, metadata=False,
        help="stop a live --video after this time (default: at Ctrl+C or the stream's end)")
    add("--mask", metavar="[N:]FILE", nargs="+", default=[], metadata=False, command=False,
        help="masks of frames, numbered from 0 or as the files in a folder are: FIRST.png, or "
             "0:a.png 120:b.png; each value or flat colour is an object; several files of one "
             "frame are joined; labelme and COCO JSON files are read too. N:absent=2 says that "
             "object 2 is not in frame N, N:gone=2 that it is gone from there on")
    add("--mask_frame", metavar="N", type=at_least(0), metadata=False, command=False,
        help="frame that --mask, --box or --point is for; the clip is segmented forward and "
             "backward from it (default: the first)")
    add("--box", metavar=("X", "Y", "W", "H"), nargs=4, type=int, action="append", default=[],
        metadata=False, command=False,
        help="instead of a mask, a box around the object; repeat the flag for each object")
    add("--point", metavar="X Y", nargs="+", type=int, action="append", default=[],
        metadata=False, command=False,
        help="instead of a mask, positive points, on the object, as X Y pairs; repeat the flag "
             "for each object, in the order of the boxes")
    add("--negative_point", "--not_point", metavar="X Y", nargs="+", type=int, action="append",
        default=[], metadata=False, command=False,
        help="negative points, which are not on the object; repeat the flag for each object")
    add("--page", "--annotate", metavar="PORT", nargs="?", type=int, const=0, metadata=False,
        command=False,
        help="open the clip in a browser: draw masks, segment, correct, export; a fixed PORT for "
             "a tunnel, see docs/own_video.md (default if there is no mask, box or point)")
    add("--page_host", metavar="ADDRESS", nargs="+", metadata=False, command=False,
        help="address that --page listens on, 0.0.0.0 in a container or to let other machines in; "
             "then the host names of proxies in front of it, if any (default: 127.0.0.1)")
    add("--frames", metavar="A:B", type=frame_range, default=(None, None),
        help="only frames from A up to, but not including, B, numbered as for --mask; A: and :B "
             "leave one end open")
    add("--cutout", metavar="HOW", metadata=False, command=False,
        help="also write the object cut out, HOW being the background: transparent, blur (the "
             "frame's own, blurred; mp4) or a colour such as #00ff00 (mp4)")
    add("--cutout_format", metavar="FORMAT", choices=("png", "mov", "webm"), default="png",
        metadata=False, command=False,
        help="file format for --cutout transparent: png, a folder of images; mov, ProRes 4444 for "
             "editors; webm, VP9 for web pages (default: png)")
    add("--export", metavar="FORMAT", choices=annotations.FORMATS, nargs="+", default=[],
        metadata=False,
        help="also write the masks for other tools: coco (annotations.json, run lengths), yolo "
             "(labels/, polygons), both with track ids")


def _check_clip(args) -> None:
    prompted = bool(args.box or args.point)
    require(args.video is not None, "--video", "a video or a folder of frames", "none")
    require(not (args.mask and prompted), "--mask, --box, --point", "one of them", "both")
    require(args.page is None or 0 <= args.page < 2**16, "--page", "a port below 65536",
            args.page)
    require(args.page is None or not args.overwrite, "--page",
            "another --results_dir instead of --overwrite", args.overwrite)
    require(args.page_host is None or args.page is not None, "--page_host", "--page with it",
            "none")
    require(args.frames == (None, None) or args.page is None and (args.mask or prompted),
            "--frames", "no --page with it", args.frames)
    _check_live(args)
    for name in ("point", "negative_point"):
        for values in getattr(args, name):
            require(len(values) % 2 == 0, f"--{name}", "pairs of numbers, X Y", values)
    require(prompted or not args.negative_point, "--negative_point",
            "a --box or --point of the same object with it", "none")
    require(len(args.negative_point) <= max(len(args.box), len(args.point)), "--negative_point",
            "a --box or --point of the same object", "none")
    require(args.cutout in (None, "transparent", "blur")
            or bool(re.fullmatch("#[0-9a-fA-F]{6}", args.cutout)), "--cutout",
            "transparent, blur or a colour such as #00ff00", args.cutout)
    require(args.cutout_format == "png" or args.cutout == "transparent", "--cutout_format",
            "--cutout transparent with it", args.cutout)


def _check_live(args) -> None:
    require(is_live(args.video) or args.seconds is None, "--seconds",
            "a camera or a stream as --video with it", args.video)
    if not is_live(args.video):
        return
    for name in ("mask_frame", "export"):
        require(not getattr(args, name), f"--{name}", "no live --video with it", args.video)
    require(args.frames == (None, None), "--frames", "--seconds for a live --video", args.video)
    require(args.page is None or not (args.mask or args.box or args.point), "--page",
            "no mask, box or point with it for a live --video", args.video)


def _results(add) -> None:
    add("--size", metavar="PIXELS", type=int, default=480,
        help="short side at which the network sees frames (small frames are enlarged by at most a "
             "factor of 2); masks keep the frame's size: higher for small objects in large frames, "
             "lower for speed; 0: the frame's own size (default: 480)")
    add("--results_dir", "-j", metavar="DIR", type=Path, metadata=False, command=False,
        help="write masks and tables there (default: results/NAME for a clip, results/demo for "
             "the demo, else only print the table)")
    add("--segmentation_shape", "-g", metavar=("H", "W"), nargs=2, type=side,
        help="size at which each pixel is assigned to an object, before masks are resized to the "
             "frame: smaller for speed with large frames (default: the frame's own size)")
    add("--leave_outliers", "-ro", action="store_true",
        help="no outlier removal: for fast objects and for cuts")
    add("--fg_thresh", "-fg", metavar="P", type=float, default=0.5,
        help="probability above which a pixel is foreground: higher for fewer false positives "
             "(default: 0.5)")


def _check_results(args) -> None:
    require(args.size == 0 or args.size >= 16, "--size", "0 or at least 16", args.size)
    require(0 <= args.fg_thresh < 1, "--fg_thresh", "a probability in [0, 1)", args.fg_thresh)


def _evaluation(add) -> None:
    add("--visualize", "-v", action="store_true", metadata=False,
        help="also write a video of each sequence with its masks overlaid, into --results_dir")


def _check_evaluation(args) -> None:
    require(not args.visualize or args.results_dir or args.demo, "--visualize",
            "--results_dir DIR with it, to write the videos to", "none")


def _export(add) -> None:
    add("--export_dir", metavar="DIR", type=Path, default=lite.DEFAULT, metadata=False,
        help="folder for the graphs that lite.py runs without PyTorch (default: models/lite)")
    add("--browser", metavar="DIR", type=Path, metadata=False,
        help="write a static page that tracks objects in a browser instead of graphs for lite.py, "
             "with 16-bit weights; needs onnxruntime-web from npm (docs/browser.md)")
    add("--eight_bit", action="store_true", metadata=False,
        help="store weights in 8 bits: a third of the size, at the same speed")


def _check_export(args) -> None:
    require(args.precision in (None, "fp32"), "--precision", "fp32 to export", args.precision)
    require(args.input_image_shape is None, "--input_image_shape",
            "none: exported graphs take frames of any size", args.input_image_shape)


GROUPS = (Group("general", MODES, _general, _check_general),
          Group("data (train, eval)", ("train", "eval"), _data),
          Group("model", MODES, _model, _check_model),
          Group("training (train)", ("train",), _training, _check_training),
          Group("your own clip (segment)", ("segment",), _clip, _check_clip),
          Group("results (eval, segment)", ("eval", "segment"), _results, _check_results),
          Group("evaluation (eval)", ("eval",), _evaluation, _check_evaluation),
          Group("export (export)", ("export",), _export, _check_export))
