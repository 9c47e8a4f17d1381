"""Command line of VideoMatch: train, segment and score videos, or cut an object out of a clip.

    python main.py -m eval --demo
    python main.py -m train -d DAVIS -s models/vm.pth
    python main.py -m eval -d DAVIS -t val -o models/vm.pth -j results
    python main.py -m segment --video CLIP.mp4 --mask FIRST.png -j results
"""

import argparse
import logging
import os
import platform
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

import distributed
import evaluate
import segment
import train
from data import demo
from davis import SETS, YEARS, Davis, for_training, split
from media import annotate, images
from media import masks as mask_files
from media.video import open_clip
from network.encoder import BACKBONES, Encoder
from videomatch import METHODS, SHIPPED, VideoMatch

log = logging.getLogger("videomatch")

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING,
          "fatal": logging.CRITICAL}
TRAINING_SHAPE = (320, 576)
RECENT = 3  # frames
# flags that change no mask, and in the last line those of which `facts` tells the outcome
LEFT_OUT = {"mode", "logger", "set", "sequences", "workers", "results_dir", "visualize",
            "overwrite",
            "dataset", "model_load", "cuda_device", "precision"}
# in the words of PyTorch, of oneDNN and of Python's threads
OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive",
                 "could not create a memory", "can't start new thread")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (-h explains every flag)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description="VideoMatch: matching based video object segmentation.",
        epilog="Try it with nothing but this folder: python main.py -m eval --demo")
    add = parser.add_argument
    add("--mode", "-m", choices=["train", "eval", "segment"], default="train",
        help="train; segment sequences of a data set and score them; or segment a clip of your "
             "own (default: train)")
    add("--logger", "-f", metavar="LEVEL", choices=LEVELS, default="info",
        help="debug, info, warn or fatal; debug also shows where an error came from "
             "(default: info)")
    add("--cuda_device", "-c", metavar="DEVICE", default=None,
        help="id of a CUDA device, or cpu, or mps (default: the best there is)")
    add("--seed", type=int, default=0, metavar="N",
        help="change it to see how much a result owes to chance (default: 0)")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", "-d", metavar="PATH", type=Path, default=Path("./DAVIS"),
        help="the DAVIS folder, 2016 or 2017 archive (default: ./DAVIS)")
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
    add("--workers", metavar="N", type=int, default=2,
        help="processes that read and augment pairs; more when the GPU waits for data, "
             "0 to debug (default: 2)")

    add = parser.add_argument_group("model").add_argument
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
    add("--method", choices=METHODS,
        help="matching: with the reference frame only; paper: with its online update too; memory: "
             "with recent frames and a learned refinement (default: memory where the checkpoint "
             "holds what it needs, as the one in models/ does, and for training; else matching)")
    add("--input_image_shape", "-p", metavar=("H", "W"), nargs=2, type=int,
        help="size at which the network sees frames: smaller for speed and memory (default: "
             "the frame's own size for evaluation, {} {} for training)".format(*TRAINING_SHAPE))

    add = parser.add_argument_group("training").add_argument
    add("--model_save", "-s", metavar="PATH", type=Path,
        help="where the best weights go, with the log (.jsonl) beside them "
             "(default: runs/vm_ENCODER.pth)")
    add("--batch_size", "-b", metavar="N", type=int, default=1,
        help="pairs or clips in a step of each process: more for a steadier gradient if memory "
             "allows (default: 1)")
    add("--epochs", "-e", metavar="N", type=int, default=1, help="passes (default: 1)")
    add("--iters", "-i", metavar="N", type=int, default=-1,
        help="steps in a pass; -1: as many as show each frame once (default: -1)")
    add("--no-augment", "-a", action="store_true",
        help="train on frames as they are, only resized")
    add("--learning_rate", "-l", metavar="RATE", type=float, default=1e-4,
        help="of AdamW for the encoder, ten times as much for the decoder, falling to 0 as a "
             "cosine; lower for larger encoders, or when the loss jumps (default: 1e-4)")
    add("--weight_decay", "-w", metavar="DECAY", type=float, default=0.0,
        help="of AdamW; raise it when held-out IoU falls while the loss does too (default: 0)")
    add("--validation_size", "-vs", metavar="SHARE", type=float, default=0.1,
        help="share of the sequences held out, whole, to choose the best weights; 0 trains on all "
             "and keeps the last weights (default: 0.1)")
    add("--loss_function", "-lf", choices=train.LOSSES, nargs="+", default=["dice", "bce"],
        help="one, or several to add up; balancedbce for small objects (default: dice bce)")
    add("--val_report", "-r", metavar="ITERS", type=int, default=100,
        help="iterations between validations; -1: at the end only (default: 100)")
    add("--patience", metavar="N", type=int, default=10,
        help="stop after this many reports without a better held-out IoU (default: 10)")
    add("--resume", action="store_true",
        help="go on from the last report of the same run, after it was interrupted")
    add("--loss_visualization", "-x", action="store_true",
        help="write the curves of loss and held-out IoU beside the weights (.png)")

    add = parser.add_argument_group("a clip of your own (-m segment)").add_argument
    add("--video", metavar="PATH", type=Path,
        help="a video file, an animated GIF or a folder of frames")
    add("--mask", metavar="[N:]FILE", nargs="+", default=[],
        help="masks of frames, counted from 0: FIRST.png, or 0:a.png 120:b.png; each value or "
             "palette entry is an object")
    add("--mask_frame", metavar="N", type=int, default=0,
        help="which frame the mask or box is of: the clip is segmented forwards and backwards "
             "from it (default: 0)")
    add("--box", metavar=("X", "Y", "W", "H"), nargs=4, type=int,
        help="no mask at hand: look for the object in this box")
    add("--annotate", action="store_true",
        help="no mask at hand: draw a box or paint the mask in a window")
    add("--cutout", metavar="HOW",
        help="also cut the object out: transparent (PNG files), blur (the background, mp4) or a "
             "colour such as #00ff00 (mp4)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--results_dir", "-j", metavar="DIR", type=Path,
        help="write masks and tables there (default: only print the table; for the demo "
             "results/demo)")
    add("--overwrite", action="store_true",
        help="segment again what --results_dir holds already; without it a run that was "
             "interrupted goes on with the sequences that are missing")
    add("--visualize", "-v", action="store_true",
        help="also write a video with the masks laid over the frames, into --results_dir")
    add("--segmentation_shape", "-g", metavar=("H", "W"), nargs=2, type=int,
        help="size at which pixels are decided, before masks get the frame's size: smaller "
             "for speed with large frames (default: the frame's own)")
    add("--leave_outliers", "-ro", action="store_true",
        help="keep what lies far from the object's place in the frame before: for fast "
             "objects and for cuts")
    add("--dilation", metavar="PIXELS", type=int,
        help="how far is far: lower where look-alikes are near, higher for fast objects "
             "(default: the checkpoint's, else 100)")
    add("--finetune", metavar="N", type=int, default=0,
        help="fit the model to each video by N steps on its first frame (at --learning_rate): for "
             "objects unlike any of the training set; on DAVIS it gains nothing (default: 0)")
    add("--precision", choices=PRECISIONS,
        help="of the features and their products; fp32 where a result must repeat exactly "
             "(default: fp16 on a CUDA device, else fp32)")
    add("--fg_thresh", "-fg", metavar="P", type=float, default=0.5,
        help="probability from which a pixel is foreground: higher for fewer false positives "
             "(default: 0.5)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        logging.basicConfig(level=LEVELS[args.logger], format="%(message)s", stream=sys.stderr)
        check(args)
        distributed.start()
        if distributed.rank():
            logging.getLogger().setLevel(max(logging.WARNING, LEVELS[args.logger]))
        {"train": run_train, "eval": run_eval, "segment": run_segment}[args.mode](args)
        distributed.end()
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        log.debug("where the error came from:", exc_info=True)
        if is_out_of_memory(error):
            message = ("out of memory, which a smaller --input_image_shape and --upsample_factor "
                       "need less of, in training a smaller --batch_size too")
        elif isinstance(error, OSError | ValueError):
            message = one_line(error)
        else:
            raise
        print(f"main.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, says so."""
    return error is not None and (
        isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        or any(words in str(error) for words in OUT_OF_MEMORY)
        or is_out_of_memory(error.__cause__))


def one_line(error: Exception) -> str:
    """The message of an error; of one that a loader's worker passed on, its last line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{type(error).__name__}: ")


def check(args: argparse.Namespace) -> None:
    """Refuse values that no run could use, before anything is read."""
    def expect(condition: bool, flag: str, expected: str, value) -> None:
        if not condition:
            raise ValueError(f"{flag}: expected {expected}, got {value}")

    for flag in ("upsample_factor", "temperature"):
        value = getattr(args, flag)
        expect(value is None or 0 < value < float("inf"), f"--{flag}", "a number above 0", value)
    for flag in ("top_k", "batch_size", "epochs", "patience"):
        value = getattr(args, flag)
        expect(value is None or value >= 1, f"--{flag}", "a whole number of at least 1", value)
    for flag in ("iters", "val_report"):
        value = getattr(args, flag)
        expect(value == -1 or value >= 1, f"--{flag}", "-1 or at least 1", value)
    for flag in ("input_image_shape", "segmentation_shape"):
        value = getattr(args, flag)
        expect(value is None or min(value) >= 16, f"--{flag}", "at least 16 16", value)
    for flag in ("weight_decay", "workers", "dilation", "seed", "finetune", "mask_frame"):
        value = getattr(args, flag)
        expect(value is None or value >= 0, f"--{flag}", "at least 0", value)
    expect(args.model_save is None or args.model_save.suffix == ".pth", "--model_save",
           "a file that ends in .pth, with the log and the state beside it", args.model_save)
    expect(args.learning_rate > 0, "--learning_rate", "a number above 0", args.learning_rate)
    expect(0 <= args.fg_thresh < 1, "--fg_thresh", "a probability in [0, 1)", args.fg_thresh)
    expect(not (args.visualize and args.mode == "eval" and not args.results_dir and not args.demo),
           "--visualize", "--results_dir DIR beside it, to write the videos to", "none")

    if args.mode == "segment":
        expect(args.video is not None, "--video", "a video or a folder of frames", "none")
        sources = bool(args.mask) + bool(args.box) + args.annotate
        expect(sources == 1, "--mask, --box, --annotate", "one of them", sources)
        expect(args.cutout in (None, "transparent", "blur")
               or bool(re.fullmatch("#[0-9a-fA-F]{6}", args.cutout)), "--cutout",
               "transparent, blur or a colour such as #00ff00", args.cutout)


def device_of(name: str | None) -> torch.device:
    """The device that --cuda_device names, or the best there is.

    Raises:
        ValueError: there is no such device on this machine.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if torch.backends.mps.is_available():
            return torch.device("mps")
        raise ValueError("--cuda_device mps: this machine has no MPS device, use -c cpu")
    if not name.isdecimal():
        raise ValueError(f"--cuda_device {name}: expected the id of a CUDA device, cpu or mps")
    if int(name) >= torch.cuda.device_count():
        raise ValueError(f"--cuda_device {name}: this machine has {torch.cuda.device_count()} "
                         "CUDA devices, use -c cpu to run on the processor")
    return torch.device("cuda", int(name))


def build_model(args: argparse.Namespace) -> VideoMatch:
    """The model that the flags describe: from a checkpoint, or new on ImageNet weights."""
    name = args.encoder or "mobilenet"
    path = args.model_load
    if path is None and args.mode != "train" and args.encoder_weights is None:
        path = SHIPPED.get(name)
    if path is not None:
        return configure(load_checkpoint(path, args), args)
    encoder = Encoder(name)
    if args.encoder_weights == "none":
        log.warning("encoder %s starts from random weights (--encoder_weights none)", name)
    else:
        with distributed.first_alone():  # which may download them
            encoder.load_imagenet(args.encoder_weights)
    recent = RECENT if args.method in (None, "memory") and args.mode == "train" else 0
    spec = encoder.spec
    return configure(VideoMatch(encoder, spec.factor, spec.top_k, recent=recent, zoom=spec.zoom),
                     args)


def load_checkpoint(path: Path, args: argparse.Namespace) -> VideoMatch:
    if args.encoder_weights is not None:
        raise ValueError(f"--encoder_weights contradicts the checkpoint {path}, which brings "
                         "its own weights: leave one of them out")
    model = VideoMatch.load(path)
    if args.encoder not in (None, model.encoder.name):
        raise ValueError(f"--encoder {args.encoder} contradicts the checkpoint {path}, whose "
                         f"encoder is {model.encoder.name}")
    iou = model.facts.get("held_out_iou")
    log.info("checkpoint %s: encoder %s%s", path, model.encoder.name,
             "" if iou is None else f", held-out IoU {iou:.3f}")
    return model


def configure(model: VideoMatch, args: argparse.Namespace) -> VideoMatch:
    """Set what the flags name, move to the device, and say how the model matches."""
    for name in ("upsample_factor", "top_k", "temperature", "dilation"):
        if getattr(args, name) is not None:
            setattr(model, name, getattr(args, name))
    if args.method == "memory" and not model.recent:
        raise ValueError("--method memory: expected a checkpoint that was trained for it")
    model.method = args.method or model.method
    device = device_of(args.cuda_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    log.info("method %s, encoder %s, upsample factor %g, K %d, temperature %g, on %s", model.method,
             model.encoder.name, model.upsample_factor, model.top_k, model.temperature, device)
    return model.to(device)


def data(args: argparse.Namespace) -> Davis:
    with distributed.first_alone():
        root = demo.make() if args.demo else args.dataset
    year = args.year or ("2017" if args.demo else "2016")
    return Davis(root, year, set_name(args), args.sequences)


def set_name(args: argparse.Namespace) -> str:
    return args.set or ("val" if args.mode == "eval" else "train")


def run_train(args: argparse.Namespace) -> None:
    training, held_out = split(for_training(data(args).sequences), args.validation_size, args.seed)
    torch.manual_seed(args.seed)
    model = build_model(args)
    frames = sum(len(sequence.labelled) for sequence in training)
    each = args.batch_size * distributed.count()
    iterations = args.epochs * (-(-frames // each) if args.iters == -1 else args.iters)
    log.info("%d sequences to train on, held out: %s", len(training),
             ", ".join(sequence.name for sequence in held_out) or "none")
    train.train(model, training, held_out, options_of_training(args, model, iterations))


def options_of_training(args: argparse.Namespace, model: VideoMatch,
                        iterations: int) -> train.Options:
    return train.Options(
        save=args.model_save or Path(f"runs/vm_{model.encoder.name}.pth"),
        shape=tuple(args.input_image_shape or TRAINING_SHAPE), iterations=iterations,
        batch_size=args.batch_size, losses=tuple(args.loss_function),
        learning_rate=args.learning_rate, weight_decay=args.weight_decay,
        augment=not args.no_augment, shuffle=not args.no_shuffle, report=args.val_report,
        patience=args.patience, workers=args.workers, seed=args.seed,
        plot=args.loss_visualization, resume=args.resume)


def run_eval(args: argparse.Namespace) -> None:
    sequences = data(args).sequences
    model = model_in_use(args)
    evaluate.evaluate(model, sequences, evaluate.Options(
        results=args.results_dir or (Path("results/demo") if args.demo else None),
        set_name=set_name(args), videos=args.visualize or args.demo,
        input_shape=args.input_image_shape, segmentation_shape=args.segmentation_shape,
        threshold=args.fg_thresh, remove_outliers=not args.leave_outliers,
        facts=facts(args, model), overwrite=args.overwrite or args.demo,
        adapt=adaptation(args, model)))


def facts(args: argparse.Namespace, model: VideoMatch) -> dict[str, str]:
    """What the results depend on: flags that aren't the default, data, weights, versions."""
    default = parse_args([])
    flags = {name: value for name, value in vars(args).items()
             if value != getattr(default, name) and name not in LEFT_OUT}
    return {"flags": " ".join(f"--{name} {value}" for name, value in flags.items()) or "default",
            "data": "demo" if args.demo else str(args.dataset.resolve()),
            "weights": f"{model.encoder.name}, SHA-256 {model.facts['digest']}",
            "arithmetic": f"{model.precision} on {model.device.type}",
            "versions": f"torch {torch.__version__}, Python {platform.python_version()}"}


def model_in_use(args: argparse.Namespace) -> VideoMatch:
    """A model that won't be trained."""
    torch.manual_seed(args.seed)
    model = build_model(args)
    model.facts["digest"] = model.digest()
    model.encoder.fold_batchnorm()
    model.precision = PRECISIONS[args.precision or
                                 ("fp16" if model.device.type == "cuda" else "fp32")]
    return model


def adaptation(args: argparse.Namespace, model: VideoMatch):
    """What --finetune asks for."""
    if not args.finetune:
        return None
    return partial(train.finetune, options=options_of_training(args, model, args.finetune))


def run_segment(args: argparse.Namespace) -> None:
    clip = open_clip(args.video)
    results = args.results_dir or Path("results") / args.video.stem
    masks = given_masks(args, clip, results)
    model = model_in_use(args)
    count = segment.segment(model, clip, masks, segment.Options(
        results=results, cutout=args.cutout, input_shape=args.input_image_shape,
        segmentation_shape=args.segmentation_shape, threshold=args.fg_thresh,
        remove_outliers=not args.leave_outliers, adapt=adaptation(args, model)))
    print(f"{count} frames: masks, overlay.mp4{' and cut-out' if args.cutout else ''} in {results}")


def given_masks(args: argparse.Namespace, clip, results: Path) -> dict[int, np.ndarray]:
    """The masks that --mask names, or the one that --box or --annotate makes, kept as a file."""
    paths: dict[int, list[Path]] = {}
    for text in args.mask:
        number, colon, name = text.partition(":")
        frame, name = (int(number), name) if colon and number.isdecimal() else (args.mask_frame,
                                                                                text)
        paths.setdefault(frame, []).append(Path(name))
    if paths:
        return mask_files.read_masks(paths)
    image = next(iter(clip.frames(args.mask_frame)), None)
    if image is None:
        raise ValueError(f"--mask_frame {args.mask_frame}: the clip ends before it")
    mask = (annotate.mask_from_box(image, tuple(args.box)) if args.box
            else annotate.Annotator(image).run())
    path = results / f"mask_{args.mask_frame:05d}.png"
    results.mkdir(parents=True, exist_ok=True)
    images.write_mask(path, mask)
    print(f"the mask that this run starts from: {path} (again: --mask {args.mask_frame}:{path})")
    return {args.mask_frame: mask}


if __name__ == "__main__":
    sys.exit(main())
