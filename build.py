"""What flags describe, built: the device, the model, the data; options of training and road."""

import argparse
import logging
import os
import platform
from pathlib import Path

import torch

import distributed
import flags
import groups
import train
from data import demo
from davis import Davis
from media import images
from network import precision
from network.encoder import Encoder
from videomatch import SHIPPED, VideoMatch

log = logging.getLogger("videomatch")

# flags that change no mask, and in the last line those of which `facts` tells the outcome
LEFT_OUT = {"mode", "logger", "set", "sequences", "workers", "results_dir", "visualize",
            "overwrite", "video", "mask", "mask_frame", "box", "point", "not_point",
            "page", "cutout", "cutout_format", "export", "export_dir", "eight_bit", "dataset",
            "model_load", "cuda_device", "precision"}


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


def model_of(args: argparse.Namespace) -> VideoMatch:
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
    refined, spec = args.method in (None, "memory") and args.mode == "train", encoder.spec
    return configure(VideoMatch(encoder, spec.factor, spec.top_k, refined=refined, zoom=spec.zoom),
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
    if args.method == "memory" and not model.refined:
        raise ValueError("--method memory: expected a checkpoint that was trained for it")
    model.method = args.method or model.method
    device = device_of(args.cuda_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    log.info("method %s, encoder %s, upsample factor %g, K %d, temperature %g, on %s", model.method,
             model.encoder.name, model.upsample_factor, model.top_k, model.temperature, device)
    return model.to(device)


def facts(args: argparse.Namespace, model: VideoMatch, data: dict[str, str]) -> dict[str, str]:
    """What the results depend on: flags that aren't the default, data, weights, versions."""
    default = flags.defaults()
    given = {name: value for name, value in vars(args).items()
             if value != default[name] and name not in LEFT_OUT}
    return {"flags": " ".join(f"--{name} {value}" for name, value in given.items()) or "default",
            **data, "weights": f"{model.encoder.name}, SHA-256 {model.facts['digest']}",
            "frames": f"enlarged {images.ENLARGED} times at most",  # states of others don't fit
            "arithmetic": f"{model.precision} on {model.device.type}",
            "versions": f"torch {torch.__version__}, Python {platform.python_version()}"}


def model_in_use(args: argparse.Namespace) -> VideoMatch:
    """A model that won't be trained."""
    torch.manual_seed(args.seed)
    model = model_of(args)
    model.facts["digest"] = model.digest()
    model.encoder.fold_batchnorm()
    model.precision = precision.of(args.precision, model.device, model.method)
    return model


def road(args: argparse.Namespace, model: VideoMatch) -> dict:
    """What `segment.Options` takes, which those of an evaluation share."""
    return {"size": args.size, "input_shape": args.input_image_shape,
            "segmentation_shape": args.segmentation_shape, "threshold": args.fg_thresh,
            "remove_outliers": not args.leave_outliers}


def training(args: argparse.Namespace, model: VideoMatch,
                        iterations: int) -> train.Options:
    return train.Options(
        save=args.model_save or Path(f"runs/vm_{model.encoder.name}.pth"),
        shape=tuple(args.input_image_shape or groups.TRAINING_SHAPE), iterations=iterations,
        batch_size=args.batch_size, losses=tuple(args.loss_function),
        learning_rate=args.learning_rate, weight_decay=args.weight_decay,
        augment=not args.no_augment, shuffle=not args.no_shuffle, report=args.val_report,
        patience=args.patience, workers=args.workers, seed=args.seed,
        plot=args.loss_visualization, overwrite=args.overwrite, resume=args.resume)


def data(args: argparse.Namespace) -> Davis:
    with distributed.first_alone():
        root = demo.make() if args.demo else args.dataset
    year = args.year or ("2017" if args.demo else None)
    return Davis(root, year, set_name(args), args.sequences)


def set_name(args: argparse.Namespace) -> str:
    return args.set or ("val" if args.mode == "eval" else "train")
