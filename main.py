"""Command line of VideoMatch: train, segment and score videos, or cut an object out of a clip.

    python main.py -m eval --demo
    python main.py -m train -d DAVIS -s models/vm.pth
    python main.py -m eval -d DAVIS -t val -o models/vm.pth -j results
    python main.py -m segment --video CLIP.mp4 --page
    python main.py -m export
"""

import argparse
import io
import logging
import os
import sys
from pathlib import Path

import torch

import evaluate
import train
from cli import export, options, segment, setup
from cli.setup import select_device
from davis import for_training, hold_out
from network import precision
from system import distributed, errors
from training import prompt_training as train_prompts
from training.static_images import find_static_images

log = logging.getLogger("videomatch")


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: without the program's name; defaults to `sys.argv[1:]`.

    Returns:
        The exit status: 0; 2 for errors in flags or files, which are printed in one line; 130 for
        Ctrl+C. Bugs raise.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a code page may lack a character
            stream.reconfigure(errors="replace")
    try:
        args = options.parse(argv)
        level = options.LEVELS[args.logger]
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        distributed.start()
        if distributed.rank():
            logging.getLogger().setLevel(max(logging.WARNING, level))
        select_device(args.cuda_device)  # fail before any data is read
        {"train": run_train, "eval": run_eval, "segment": segment.run,
         "export": export.run}[args.mode](args)
        distributed.end()
    except BrokenPipeError:
        # Whoever read the output has closed the pipe, as `| head` does. All files are written, and
        # Python must not fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        log.debug("traceback of the error:", exc_info=True)
        message = errors.explained(error)
        if message is None:
            raise
        print(f"main.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume (training: add --resume)",
              file=sys.stderr)
        return 130
    return 0


def run_train(args: argparse.Namespace) -> None:
    """`-m train`: train the network, or with --prompts the prompt decoder only."""
    static_images = [image for folder in args.stills for image in find_static_images(folder)]
    use_videos = args.dataset or args.demo or not args.stills
    sequences = for_training(setup.load_dataset(args).sequences) if use_videos else []
    training, held_out = (hold_out(sequences, args.validation_size, args.seed) if sequences
                          else ([], []))
    if args.prompts:
        return run_train_prompts(args, training, held_out, static_images)
    torch.manual_seed(args.seed)
    model = setup.build_model(args)
    model.precision = precision.of(args.precision, model.device, model.method, training=True)
    clips_per_step = args.batch_size * distributed.count()
    steps_per_epoch = -(-count_frames(training, static_images) // clips_per_step)
    iterations = args.epochs * (steps_per_epoch if args.iters == -1 else args.iters)
    log.info("%d sequences and %d static images to train on; held out: %s", len(training),
             len(static_images), names_of(held_out))
    train.train(model, training, held_out, setup.training_options(args, model, iterations),
                static_images)


def run_train_prompts(args: argparse.Namespace, training: list, held_out: list,
                      static_images: list) -> None:
    """`-m train --prompts`. Static images are held out too, as there may be no sequence."""
    static_images, held_out_images = train_prompts.split_static_images(
        static_images, args.validation_size, args.seed)
    torch.manual_seed(args.seed)
    model = setup.build_model(args)
    steps_per_epoch = count_frames(training, static_images)
    iterations = args.epochs * (steps_per_epoch if args.iters == -1 else args.iters)
    log.info("%d sequences and %d static images to train on; held out: %s, and %d static images",
             len(training), len(static_images), names_of(held_out), len(held_out_images))
    train_prompts.train_prompts(model, training, static_images, [*held_out, *held_out_images],
                                setup.training_options(args, model, iterations))


def count_frames(sequences: list, static_images: list) -> int:
    """Number of labelled frames, each of which an epoch shows once."""
    return sum(len(source.labelled) for source in (*sequences, *static_images))


def names_of(sequences: list) -> str:
    return ", ".join(sequence.name for sequence in sequences) or "none"


def run_eval(args: argparse.Namespace) -> None:
    """`-m eval`. The demo also writes videos, and always starts over."""
    sequences = setup.load_dataset(args).sequences
    model = setup.load_for_inference(args)
    data = "demo" if args.demo else str((args.dataset or setup.DAVIS).resolve())
    evaluate.evaluate(model, sequences, evaluate.Options(
        results=args.results_dir or (Path("results/demo") if args.demo else None),
        set_name=setup.split_name(args), videos=args.visualize or args.demo,
        metadata=setup.run_metadata(args, model, {"data": data}),
        overwrite=args.overwrite or args.demo, **setup.pipeline_options(args)))


if __name__ == "__main__":
    sys.exit(main())
