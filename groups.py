"""The flags, group by group, each next to the check of what it is given."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import annotations
import lite
import train
from davis import SETS, YEARS
from network.encoder import BACKBONES
from videomatch import METHODS

MODES = ("train", "eval", "segment", "export")
LEVELS = ("debug", "info", "warn", "fatal")
PRECISIONS = ("fp32", "bf16", "fp16")
TRAINING_SHAPE = (320, 576)
UNSET = object()  # a flag that the command line doesn't name


def span(text: str) -> tuple[int | None, int | None]:
    """What --frames takes, A:B, A: or :B."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match or not (match[1] or match[2]):
        raise argparse.ArgumentTypeError(f"expected A:B, frames from A to before B, got {text}")
    start, stop = (int(number) if number else None for number in match.groups())
    if stop is not None and stop <= (start or 0):
        raise argparse.ArgumentTypeError(f"expected a later frame behind the colon, got {text}")
    return start, stop


class Again(argparse.Action):
    """Each time that the flag is named, one list more; argparse's own can't begin with `UNSET`."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is UNSET else before), values])


def expect(condition: bool, flag: str, expected: str, value) -> None:
    if not condition:
        raise ValueError(f"{flag}: expected {expected}, got {value}")


def positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        expect(value is None or 0 < value < float("inf"), f"--{name}", "a number above 0", value)


def at_least(least: int, args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        expected = "a whole number of at least 1" if least else "at least 0"
        expect(value is None or value >= least, f"--{name}", expected, value)


def shape(args: argparse.Namespace, name: str) -> None:
    value = getattr(args, name)
    expect(value is None or min(value) >= 16, f"--{name}", "at least 16 16", value)


def general(add) -> Callable:
    add("--mode", "-m", choices=MODES, default="train",
        help="train; segment sequences of a data set and score them; segment a clip of your own; "
             "or export a checkpoint for lite.py (default: train); -m MODE -h shows the flags of "
             "one mode")
    add("--logger", "-f", metavar="LEVEL", choices=LEVELS, default="info",
        help="debug, info, warn or fatal; debug also shows where an error came from "
             "(default: info)")
    add("--cuda_device", "-c", metavar="DEVICE", default=None,
        help="id of a CUDA device, or cpu, or mps (default: the best there is)")
    add("--seed", type=int, default=0, metavar="N",
        help="change it to see how much a result owes to chance (default: 0)")
    add("--overwrite", action="store_true",
        help="start over where --results_dir or --model_save holds an earlier run; without it an "
             "interrupted evaluation or clip goes on where it stopped, and a training is refused")

    def check(args) -> None:
        at_least(0, args, "seed")
        expect(args.seed < 2**63, "--seed", "a number below 2 to the power of 63", args.seed)

    return check


def data(add) -> Callable:
    add("--dataset", "-d", metavar="PATH", type=Path, default=Path("./DAVIS"),
        help="DAVIS (2016 or 2017 archive), YouTube-VOS and its like, or a folder of your own, see "
             "docs/training.md (default: ./DAVIS)")
    add("--demo", action="store_true",
        help="a small data set that the toolkit draws itself: to try things without DAVIS")
    add("--year", "-y", choices=YEARS, default=None,
        help="2016: one object in a sequence; 2017: many; all: both lists, many "
             "(default: 2016, for the demo 2017)")
    add("--set", "-t", metavar="NAME", default=None,
        help=f"which sequences: {', '.join(SETS)}, or another list or folder of the data set "
             "(default: train for training, val for evaluation)")
    add("--sequences", "-q", metavar="NAME", nargs="+",
        help="only these: to look at a few, or to leave some out")
    add("--no-shuffle", "-u", action="store_true",
        help="train on the frames in order: to compare runs (evaluation never shuffles)")
    return lambda args: None


def model(add) -> Callable:
    add("--model_load", "-o", metavar="PATH", type=Path,
        help="checkpoint to evaluate or to train on from; it brings its configuration "
             "(default: for evaluation the one in models/, for training ImageNet weights)")
    add("--encoder", "-en", choices=BACKBONES, default=None,
        help="mobilenet for a CPU, vgg or resnet with a GPU (default: the checkpoint's, "
             "else mobilenet)")
    add("--encoder_weights", metavar="PATH",
        help="file of ImageNet weights in torchvision's layout where they can't be downloaded; "
             "none: random weights")
    add("--upsample_factor", "-uf", metavar="FACTOR", type=float,
        help="enlarge features by this much: higher for finer masks and small objects, lower "
             "for speed (default: the checkpoint's, else 2 for mobilenet, 1 for vgg and resnet)")
    add("--top_k", "-k", metavar="K", type=int,
        help="best similarities averaged: lower for small objects, higher against noise "
             "(default: the checkpoint's, else 5 for mobilenet, 20 for vgg and resnet)")
    add("--temperature", metavar="T", type=float,
        help="of the softmax over scores: lower for more decided probabilities "
             "(default: the checkpoint's, else 0.05)")
    add("--dilation", metavar="PIXELS", type=int,
        help="how far from its last place an object may be found, where frames have the size that "
             "--size gives them: lower where look-alikes are near, higher for fast objects "
             "(default: the checkpoint's, else 100)")
    add("--method", choices=METHODS,
        help="matching: with the reference frame only; paper: with its online update too; memory: "
             "with recent frames and a learned refinement (default: memory where the checkpoint "
             "holds what it needs, as the one in models/ does, and for training; else matching)")
    add("--precision", choices=PRECISIONS,
        help="of the network and its products; fp32 where a result must repeat exactly on another "
             "machine (default: fp16 on a CUDA device, but for training; bf16 for --method memory "
             "on a CPU that multiplies it itself; else fp32)")
    add("--input_image_shape", "-p", metavar=("H", "W"), nargs=2, type=int,
        help="size at which the network sees frames: smaller for speed and memory (default: "
             "as --size says for evaluation, {} {} for training)".format(*TRAINING_SHAPE))

    def check(args) -> None:
        positive(args, "upsample_factor", "temperature")
        at_least(1, args, "top_k")
        at_least(0, args, "dilation")
        shape(args, "input_image_shape")
        expect(args.mode != "train" or args.precision != "fp16", "--precision",
               "fp32 or bf16 to train with", args.precision)

    return check


def fitting(add) -> Callable:
    add("--learning_rate", "-l", metavar="RATE", type=float, default=1e-4,
        help="of AdamW for the encoder, ten times as much for the decoder, falling to 0 as a "
             "cosine; lower for larger encoders, or when the loss jumps (default: 1e-4)")
    add("--weight_decay", "-w", metavar="DECAY", type=float, default=0.0,
        help="of AdamW; raise it when held-out IoU falls while the loss does too (default: 0)")
    add("--loss_function", "-lf", choices=train.LOSSES, nargs="+", default=["dice", "bce"],
        help="one, or several to add up; balancedbce for small objects (default: dice bce)")

    def check(args) -> None:
        positive(args, "learning_rate")
        at_least(0, args, "weight_decay")

    return check


def training(add) -> Callable:
    add("--model_save", "-s", metavar="PATH", type=Path,
        help="where the best weights go, with the log (.jsonl) beside them "
             "(default: runs/vm_ENCODER.pth)")
    add("--prompts", action="store_true",
        help="train the part that is shown objects by boxes and clicks (-m segment --box, --point) "
             "and leave the rest of the checkpoint as it is")
    add("--stills", metavar="DIR", type=Path, nargs="+", default=[],
        help="folders with images/ and masks/ of still images to make clips of; without -d or "
             "--demo beside it, of them alone")
    add("--workers", metavar="N", type=int, default=2,
        help="processes that read and augment pairs; more when the GPU waits for data, "
             "0 to debug (default: 2)")
    add("--batch_size", "-b", metavar="N", type=int, default=1,
        help="pairs or clips in a step of each process: more for a steadier gradient if memory "
             "allows (default: 1)")
    add("--epochs", "-e", metavar="N", type=int, default=1, help="passes (default: 1)")
    add("--iters", "-i", metavar="N", type=int, default=-1,
        help="steps in a pass; -1: as many as show each frame once (default: -1)")
    add("--no-augment", "-a", action="store_true",
        help="train on frames as they are, only resized")
    add("--validation_size", "-vs", metavar="SHARE", type=float, default=0.1,
        help="share of the sequences held out, whole, to choose the best weights; 0 trains on all "
             "and keeps the last weights (default: 0.1)")
    add("--val_report", "-r", metavar="ITERS", type=int, default=100,
        help="iterations between validations; -1: at the end only (default: 100)")
    add("--patience", metavar="N", type=int, default=10,
        help="stop after this many reports without a better held-out IoU (default: 10)")
    add("--resume", action="store_true",
        help="go on from the last report of the same run, after it was interrupted")
    add("--loss_visualization", "-x", action="store_true",
        help="write the curves of loss and held-out IoU beside the weights (.png)")

    def check(args) -> None:
        at_least(1, args, "batch_size", "epochs", "patience")
        at_least(0, args, "workers")
        for name in ("iters", "val_report"):
            value = getattr(args, name)
            expect(value == -1 or value >= 1, f"--{name}", "-1 or at least 1", value)
        expect(args.model_save is None or args.model_save.suffix == ".pth", "--model_save",
               "a file that ends in .pth, with the log and the state beside it", args.model_save)

    return check


def clip(add) -> Callable:
    add("--video", metavar="PATH", type=Path,
        help="a video file, an animation (GIF, APNG, WebP) or a folder of frames")
    add("--mask", metavar="[N:]FILE", nargs="+", default=[],
        help="masks of frames, counted from 0 or as files in a folder are numbered: FIRST.png, "
             "or 0:a.png 120:b.png; each value or flat colour is an object; several files of a "
             "frame are joined")
    add("--mask_frame", metavar="N", type=int,
        help="which frame the mask or box is of: the clip is segmented forwards and backwards "
             "from it (default: the first)")
    add("--box", metavar=("X", "Y", "W", "H"), nargs=4, type=int, action=Again, default=[],
        help="no mask at hand: the object is in this box; once for each object")
    add("--point", metavar="X Y", nargs="+", type=int, action=Again, default=[],
        help="no mask at hand: these pixels are on the object; the second --point is of the "
             "second object, as the second --box is")
    add("--not_point", metavar="X Y", nargs="+", type=int, action=Again, default=[],
        help="these pixels are not on it; the second --not_point is of the second object")
    add("--page", "--annotate", metavar="PORT", nargs="?", type=int, const=0,
        help="show the clip in a browser: draw masks, segment, mend, export; a PORT of your own "
             "for a tunnel, see docs/own_video.md (default: where nothing else shows the object)")
    add("--frames", metavar="A:B", type=span, default=(None, None),
        help="only frames A to before B, as --mask counts them; A: and :B leave one end open")
    add("--cutout", metavar="HOW",
        help="also cut the object out: transparent, blur (the background, mp4) or a colour such "
             "as #00ff00 (mp4)")
    add("--cutout_format", metavar="FORM", choices=("png", "mov", "webm"), default="png",
        help="of --cutout transparent: png, a folder of pictures; mov, ProRes 4444 for editors; "
             "webm, VP9 for web pages (default: png)")
    add("--export", metavar="FORMAT", choices=annotations.FORMATS, nargs="+", default=[],
        help="also write the masks as other tools read them: coco (annotations.json, run "
             "lengths), yolo (labels/, polygons), both with track ids")

    def check(args) -> None:
        expect(args.video is not None, "--video", "a video or a folder of frames", "none")
        shown = bool(args.box or args.point)
        expect(not (args.mask and shown), "--mask, --box, --point", "one of them", "both")
        expect(args.page is None or 0 <= args.page < 2**16, "--page", "a port below 65536",
               args.page)
        expect(args.page is None or not args.overwrite, "--page",
               "no --overwrite beside it, but another --results_dir", args.overwrite)
        expect(args.frames == (None, None) or args.page is None and (args.mask or shown),
               "--frames", "no --page beside it", args.frames)
        for name in ("point", "not_point"):
            for values in getattr(args, name):
                expect(len(values) % 2 == 0, f"--{name}", "pairs of numbers, X Y", values)
        expect(shown or not args.not_point, "--mask, --box, --point", "something of the object "
               "beside --not_point", "none")
        expect(len(args.not_point) <= max(len(args.box), len(args.point)), "--not_point",
               "a --box or --point of the same object", "none")
        at_least(0, args, "mask_frame")
        expect(args.cutout in (None, "transparent", "blur")
               or bool(re.fullmatch("#[0-9a-fA-F]{6}", args.cutout)), "--cutout",
               "transparent, blur or a colour such as #00ff00", args.cutout)
        expect(args.cutout_format == "png" or args.cutout == "transparent", "--cutout_format",
               "--cutout transparent beside it", args.cutout)

    return check


def results(add) -> Callable:
    add("--size", metavar="PIXELS", type=int, default=480,
        help="short side at which the network sees frames, smaller ones enlarged up to twice; "
             "masks get the frame's size back: higher for small objects in large frames, lower "
             "for speed; 0: the frame's own (default: 480)")
    add("--results_dir", "-j", metavar="DIR", type=Path,
        help="write masks and tables there (default: for a clip results/NAME, for the demo "
             "results/demo, else only print the table)")
    add("--segmentation_shape", "-g", metavar=("H", "W"), nargs=2, type=int,
        help="size at which pixels are decided, before masks get the frame's size: smaller "
             "for speed with large frames (default: the frame's own)")
    add("--leave_outliers", "-ro", action="store_true",
        help="keep what lies far from the object's place in the frame before: for fast "
             "objects and for cuts")
    add("--fg_thresh", "-fg", metavar="P", type=float, default=0.5,
        help="probability from which a pixel is foreground: higher for fewer false positives "
             "(default: 0.5)")

    def check(args) -> None:
        shape(args, "segmentation_shape")
        expect(args.size == 0 or args.size >= 16, "--size", "0 or at least 16", args.size)
        expect(0 <= args.fg_thresh < 1, "--fg_thresh", "a probability in [0, 1)", args.fg_thresh)

    return check


def table(add) -> Callable:
    add("--visualize", "-v", action="store_true",
        help="also write a video with the masks laid over the frames, into --results_dir")

    def check(args) -> None:
        expect(not (args.visualize and not args.results_dir and not args.demo), "--visualize",
               "--results_dir DIR beside it, to write the videos to", "none")

    return check


def export(add) -> Callable:
    add("--export_dir", metavar="DIR", type=Path, default=lite.DEFAULT,
        help="where the graphs go that lite.py runs without PyTorch (default: models/lite)")
    add("--eight_bit", action="store_true",
        help="weights of 8 bits, for a folder of a third of the size (it is as fast)")

    def check(args) -> None:
        expect(args.precision in (None, "fp32"), "--precision", "fp32 to export", args.precision)
        expect(args.input_image_shape is None, "--input_image_shape", "none: exported graphs take "
               "frames of any size", args.input_image_shape)

    return check


@dataclass(frozen=True)
class Group:
    title: str
    modes: tuple[str, ...]
    flags: Callable  # adds them to a parser, and returns the check of their values


GROUPS = (Group("general", MODES, general),
          Group("data (train, eval)", ("train", "eval"), data),
          Group("model", MODES, model),
          Group("training (train)", ("train",), training),
          Group("fitting (train)", ("train",), fitting),
          Group("a clip of your own (segment)", ("segment",), clip),
          Group("results (eval, segment)", ("eval", "segment"), results),
          Group("evaluation (eval)", ("eval",), table),
          Group("export (export)", ("export",), export))
