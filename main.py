"""Command line of VideoMatch: train, segment and score videos, or cut an object out of a clip.

    python main.py -m eval --demo
    python main.py -m train -d DAVIS -s models/vm.pth
    python main.py -m eval -d DAVIS -t val -o models/vm.pth -j results
    python main.py -m segment --video CLIP.mp4 --mask FIRST.png -j results
"""

import argparse
import io
import logging
import os
import platform
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch

import annotations
import distributed
import evaluate
import flags
import report
import segment
import sinks
import train
from annotations import FORMATS
from confidence import Confidence, unsure
from data import demo
from davis import Davis, for_training, split
from manifest import Manifest, free_folder, keep_apart, stamp
from media import annotate, images
from media.background import progress
from media.masks import read_masks, tell_concern
from media.video import open_clip
from network.encoder import Encoder
from videomatch import SHIPPED, VideoMatch

log = logging.getLogger("videomatch")

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING,
          "fatal": logging.CRITICAL}
RECENT = 3  # frames
CLIP = "clip"  # what the manifest calls the one video of -m segment
# flags that change no mask, and in the last line those of which `facts` tells the outcome
LEFT_OUT = {"mode", "logger", "set", "sequences", "workers", "results_dir", "visualize",
            "overwrite", "video", "mask", "mask_frame", "box", "annotate", "cutout", "export",
            "dataset", "model_load", "cuda_device", "precision"}
# in the words of PyTorch, of oneDNN and of Python's threads
OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive",
                 "could not create a memory", "can't start new thread")
# in those of PyTorch's loader and of the system
SHARED_MEMORY = ("DataLoader worker", "shared memory", "/dev/shm", "Shared memory")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a code page may lack what a file's name has
            stream.reconfigure(errors="replace")
    try:
        args = flags.parse(argv)
        logging.basicConfig(level=LEVELS[args.logger], format="%(message)s", stream=sys.stderr)
        distributed.start()
        if distributed.rank():
            logging.getLogger().setLevel(max(logging.WARNING, LEVELS[args.logger]))
        {"train": run_train, "eval": run_eval, "segment": run_segment}[args.mode](args)
        distributed.end()
    except BrokenPipeError:  # nobody reads what is printed; every file was written before
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        log.debug("where the error came from:", exc_info=True)
        message = explained(error)
        if message is None:
            raise
        print(f"main.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on (a training with --resume)", file=sys.stderr)
        return 130
    return 0


def explained(error: Exception) -> str | None:
    """One line for what a user can mend; None for an error of ours."""
    if is_out_of_memory(error):
        return ("out of memory, which a smaller --size or --input_image_shape, and "
                "--upsample_factor need less of, in training a smaller --batch_size too")
    if isinstance(error, OSError | ValueError):
        return one_line(error)
    text = one_line(error)
    if any(words in str(error) for words in SHARED_MEMORY):
        return (f"too little shared memory for the processes that read ({text}): --workers 0, or "
                "for Docker --shm-size 1g")
    if isinstance(error, NotImplementedError):
        return (f"the device lacks an operation ({text}): -c cpu, or PYTORCH_ENABLE_MPS_FALLBACK=1 "
                "in the environment")
    return None


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


def device_of(name: str | None) -> torch.device:
    """The device that --cuda_device names, or the best there is.

    Raises:
        ValueError: there is no such device on this machine.
    """
    if name is None:
        if torch.cuda.is_available():
            rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if rank >= count:
                raise ValueError(f"--nproc_per_node: process {rank} finds no CUDA device of its "
                                 f"own, this machine has {count}: expected at most as many "
                                 "processes, or -c cpu")
            return torch.device("cuda", rank)
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
    year = args.year or ("2017" if args.demo else None)
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
        shape=tuple(args.input_image_shape or flags.TRAINING_SHAPE), iterations=iterations,
        batch_size=args.batch_size, losses=tuple(args.loss_function),
        learning_rate=args.learning_rate, weight_decay=args.weight_decay,
        augment=not args.no_augment, shuffle=not args.no_shuffle, report=args.val_report,
        patience=args.patience, workers=args.workers, seed=args.seed,
        plot=args.loss_visualization, overwrite=args.overwrite, resume=args.resume)


def run_eval(args: argparse.Namespace) -> None:
    sequences = data(args).sequences
    model = model_in_use(args)
    evaluate.evaluate(model, sequences, evaluate.Options(
        results=args.results_dir or (Path("results/demo") if args.demo else None),
        set_name=set_name(args), videos=args.visualize or args.demo,
        facts=facts(args, model, {"data": "demo" if args.demo else str(args.dataset.resolve())}),
        overwrite=args.overwrite or args.demo, **of_the_road(args, model)))


def facts(args: argparse.Namespace, model: VideoMatch, data: dict[str, str]) -> dict[str, str]:
    """What the results depend on: flags that aren't the default, data, weights, versions."""
    default = flags.defaults()
    given = {name: value for name, value in vars(args).items()
             if value != default[name] and name not in LEFT_OUT}
    return {"flags": " ".join(f"--{name} {value}" for name, value in given.items()) or "default",
            **data, "weights": f"{model.encoder.name}, SHA-256 {model.facts['digest']}",
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


def of_the_road(args: argparse.Namespace, model: VideoMatch) -> dict:
    """What `segment.Options` takes, which those of an evaluation share."""
    adapt = None
    if args.finetune:
        adapt = partial(train.finetune, options=options_of_training(args, model, args.finetune))
    return {"size": args.size, "input_shape": args.input_image_shape,
            "segmentation_shape": args.segmentation_shape, "threshold": args.fg_thresh,
            "remove_outliers": not args.leave_outliers, "adapt": adapt}


def run_segment(args: argparse.Namespace) -> None:
    clip = open_clip(args.video)
    source = args.video.resolve()
    sources = sorted(source.iterdir()) if source.is_dir() else [source]
    data = f"{source} ({stamp(path for path in sources if path.is_file())})"
    results = args.results_dir or free_folder(source.stem, data)
    keep_apart([results / name for name in ("masks", "overlay.mp4", "cutout", "cutout.mp4")],
               [args.video])
    masks = given_masks(args, clip, results)
    model = model_in_use(args)
    options, first = segment.Options(**of_the_road(args, model)), masks[min(masks)]
    tell_concern(first, segment.cell(model, first.shape, options))
    ours = (results / "manifest.json").is_file()
    with Manifest(results, facts(args, model, {
            "data": data,
            "masks": ", ".join(f"frame {frame}: CRC {zlib.crc32(mask.tobytes()):08x}"
                               for frame, mask in sorted(masks.items()))}),
            args.overwrite) as manifest:
        if args.overwrite and ours:
            sinks.clear(results, {Path(name).resolve() for text in args.mask
                                  for name in (text, text.partition(":")[2])})
        kept = segment.Progress(results / "masks", clip)
        before = manifest.entries.get(CLIP)
        if before and not all(kept.path_of(i).is_file() for i in range(before["frames"])):
            before = None
        drawn = before["drawn"] if before else {}
        wanted = {"overlay.mp4": None, **{name: None for name in args.export}}
        if args.cutout:
            wanted[sinks.cutout_name(args.cutout)] = args.cutout
        there = all(drawn.get(name, "") == how and ((results / name).exists() or name in FORMATS)
                    for name, how in wanted.items())
        if before and there:
            print(f"{before['frames']} frames were finished before, in {results} (--overwrite "
                  "starts over)")
            return
        kept = kept.all() if before else kept.load(model)
        frames = segment.track(model, clip, masks, options, kept)
        bar = progress(frames, desc="frames", total=clip.count or None, unit="frame")
        sure = Confidence(results / "confidence.csv", kept.index is not None)
        count = segment.drain(bar, [
            *sinks.of_a_clip(results, clip, args.cutout), sure,
            *annotations.of_a_clip(results, clip, args.export)], kept,
            lambda _: manifest.begin([results / "masks", results / "cutout"]))
        report.write_clip(results / "report.html", source.name, sure.measures, manifest.made_by)
        manifest.finish(CLIP, {"frames": count, "drawn": drawn | wanted})
    outputs = "masks, overlay.mp4" + (" and cut-out" if args.cutout else "")
    print(f"{count} frames: {outputs} in {results}, to look at: report.html")
    if looks := unsure(sure.measures):
        first = min(masks)
        print(f"look at {' and '.join(map(str, looks[:3]))}; mend one mask and run again with "
              f"--mask {first}:FIRST.png {looks[0].first}:MENDED.png")


def given_masks(args: argparse.Namespace, clip, results: Path) -> dict[int, np.ndarray]:
    """The masks that --mask names, or the one that --box or --annotate makes, kept as a file."""
    paths: dict[int, list[Path]] = {}
    for text in args.mask:
        number, colon, name = text.partition(":")
        frame, name = (int(number), name) if colon and number.isdecimal() else (args.mask_frame,
                                                                                text)
        paths.setdefault(frame, []).append(Path(name))
    if paths:
        return read_masks(paths)
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
