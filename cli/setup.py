"""Build device, model, data set and options from the flags."""

import argparse
import logging
import os
import platform
from pathlib import Path

import torch

import train
from cli import options
from datasets import demo
from davis import Davis
from media import images
from network.encoder import Encoder
from system import distributed, version
from videomatch import SHIPPED, VideoMatch

log = logging.getLogger("videomatch")

DAVIS = Path("DAVIS")  # default of --dataset: where the README's download command puts it


def select_device(name: str | None) -> torch.device:
    """The device of --cuda_device; by default a CUDA device, else MPS, else the CPU.

    Each process of a job gets a CUDA device of its own, by its local rank.

    Raises:
        ValueError: this machine has no such device.
    """
    if name is None:
        if torch.cuda.is_available():
            rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if rank >= count:
                raise ValueError(f"--nproc_per_node: no CUDA device left for process {rank}, "
                                 f"this machine has {count}: expected at most as many "
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
        raise ValueError(f"--cuda_device {name}: expected the index of a CUDA device, cpu or mps")
    if int(name) >= torch.cuda.device_count():
        raise ValueError(f"--cuda_device {name}: this machine has {torch.cuda.device_count()} "
                         "CUDA devices, use -c cpu to run on the processor")
    return torch.device("cuda", int(name))


def build_model(args: argparse.Namespace) -> VideoMatch:
    """Load the model from a checkpoint, or build a new one on ImageNet weights.

    Without -o, training starts from ImageNet weights and the other modes use the shipped
    checkpoint of the encoder.
    """
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
        with distributed.first_alone():  # it may download the weights
            encoder.load_imagenet(args.encoder_weights)
    # Only training can make use of an untrained memory and decoder.
    refined, spec = args.method in (None, "memory") and args.mode == "train", encoder.spec
    return configure(VideoMatch(encoder, spec.factor, spec.top_k, refined=refined, zoom=spec.zoom),
                     args)


def load_checkpoint(path: Path, args: argparse.Namespace) -> VideoMatch:
    """Load a checkpoint; raises a ValueError if --encoder or --encoder_weights contradict it."""
    if args.encoder_weights is not None:
        raise ValueError(f"--encoder_weights contradicts the checkpoint {path}, which has its "
                         "own weights: leave one of them out")
    model = VideoMatch.load(path)
    if args.encoder not in (None, model.encoder.name):
        raise ValueError(f"--encoder {args.encoder} contradicts the checkpoint {path}, whose "
                         f"encoder is {model.encoder.name}")
    iou = model.metadata.get("held_out_iou")
    log.info("checkpoint %s: encoder %s%s", path, model.encoder.name,
             "" if iou is None else f", held-out IoU {iou:.3f}")
    return model


def configure(model: VideoMatch, args: argparse.Namespace) -> VideoMatch:
    """Override the checkpoint's settings by flags, move the model to the device, and log both."""
    for name in ("upsample_factor", "top_k", "temperature", "dilation"):
        if getattr(args, name) is not None:
            setattr(model, name, getattr(args, name))
    if args.method == "memory" and not model.refined:
        raise ValueError("--method memory: expected a checkpoint that was trained for it")
    model.method = args.method or model.method
    device = select_device(args.cuda_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    log.info("method %s, encoder %s, upsample factor %g, K %d, temperature %g, on %s", model.method,
             model.encoder.name, model.upsample_factor, model.top_k, model.temperature, device)
    return model.to(device)


def run_metadata(args: argparse.Namespace, model: VideoMatch,
                 data: dict[str, str]) -> dict[str, str]:
    """Run metadata: everything that changes the masks.

    Results with other metadata are not resumed. So a change of the code that changes masks has to
    show here: by the version, or by a line like "frames".

    Args:
        data: entries about the data, such as {"data": PATH}.
    """
    flags = options.changed(args, "metadata")
    return {"flags": " ".join(f"--{name} {value}" for name, value in flags.items()) or "default",
            **data, "weights": f"{model.encoder.name}, SHA-256 {model.metadata['digest']}",
            # the working size of small frames: saved states of another size can't be resumed
            "frames": f"enlarged {images.ENLARGED} times at most",
            "arithmetic": f"{model.precision} on {model.device.type}",
            "versions": f"videomatch {version.__version__}, torch {torch.__version__}, "
                        f"Python {platform.python_version()}",
            **({"commit": commit} if (commit := version.commit()) else {})}


def load_for_inference(args: argparse.Namespace) -> VideoMatch:
    """Build the model for inference, see `VideoMatch.for_inference`."""
    torch.manual_seed(args.seed)
    return build_model(args).for_inference(args.precision)


def pipeline_options(args: argparse.Namespace) -> dict:
    """Keyword arguments of `pipeline.Options`, and of `evaluate.Options`, which extends it."""
    return {"size": args.size, "input_shape": args.input_image_shape,
            "segmentation_shape": args.segmentation_shape, "threshold": args.fg_thresh,
            "remove_outliers": not args.leave_outliers}


def training_options(args: argparse.Namespace, model: VideoMatch,
                     iterations: int) -> train.Options:
    """Options of both kinds of training.

    Args:
        iterations: total number of optimizer steps.
    """
    return train.Options(
        save=args.model_save or Path(f"runs/vm_{model.encoder.name}.pth"),
        shape=tuple(args.input_image_shape or options.TRAINING_SHAPE), iterations=iterations,
        batch_size=args.batch_size, losses=tuple(args.loss_function),
        learning_rate=args.learning_rate, weight_decay=args.weight_decay,
        augment=not args.no_augment, shuffle=not args.no_shuffle, report=args.val_report,
        patience=args.patience, workers=args.workers, seed=args.seed,
        plot=args.loss_visualization, overwrite=args.overwrite, resume=args.resume)


def load_dataset(args: argparse.Namespace) -> Davis:
    """The sequences of --dataset or of the demo, which is drawn if it is missing."""
    with distributed.first_alone():
        root = demo.make() if args.demo else args.dataset or DAVIS
    year = args.year or ("2017" if args.demo else None)
    return Davis(root, year, split_name(args), args.sequences)


def split_name(args: argparse.Namespace) -> str:
    """The data set's split: --set, by default the one for the mode."""
    return args.set or ("val" if args.mode == "eval" else "train")
