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
import export
import train
from cli import options, segment, setup
from cli.setup import select_device
from davis import for_training, hold_out
from network import precision
from system import distributed, errors
from training import prompt_training as train_prompts
from training.static_images import StaticImages

log = logging.getLogger("videomatch")

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING,
          "fatal": logging.CRITICAL}
# in the words of PyTorch, of oneDNN and of Python's threads
OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive",
                 "could not create a memory", "can't start new thread")
# in those of PyTorch's loader and of the system
SHARED_MEMORY = ("DataLoader worker", "shared memory", "/dev/shm", "Shared memory")


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a code page may lack what a file's name has
            stream.reconfigure(errors="replace")
    try:
        args = options.parse(argv)
        logging.basicConfig(level=LEVELS[args.logger], format="%(message)s", stream=sys.stderr)
        distributed.start()
        if distributed.rank():
            logging.getLogger().setLevel(max(logging.WARNING, LEVELS[args.logger]))
        select_device(args.cuda_device)  # what isn't there is told before anything is read
        {"train": run_train, "eval": run_eval, "segment": segment.run,
         "export": export.run}[args.mode](args)
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
        return errors.explained(error)
    text = errors.last_line(error)
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


def run_train(args: argparse.Namespace) -> None:
    stills = [still for folder in args.stills for still in StaticImages(folder)]
    with_videos = args.dataset or args.demo or not args.stills
    sequences = for_training(setup.load_dataset(args).sequences) if with_videos else []
    training, held_out = (hold_out(sequences, args.validation_size, args.seed) if sequences
                          else ([], []))
    if args.prompts:
        return run_train_prompts(args, training, held_out, stills)
    torch.manual_seed(args.seed)
    model = setup.build_model(args)
    model.precision = precision.of(args.precision, model.device, model.method, training=True)
    frames = sum(len(source.labelled) for source in (*training, *stills))
    each = args.batch_size * distributed.count()
    iterations = args.epochs * (-(-frames // each) if args.iters == -1 else args.iters)
    log.info("%d sequences and %d still images to train on, held out: %s", len(training),
             len(stills), ", ".join(s.name for s in held_out) or "none")
    train.train(model, training, held_out, setup.training_options(args, model, iterations), stills)


def run_train_prompts(args: argparse.Namespace, training: list, held_out: list,
                      stills: list) -> None:
    stills, apart = train_prompts.split_static_images(stills, args.validation_size, args.seed)
    torch.manual_seed(args.seed)
    model = setup.build_model(args)
    frames = sum(len(source.labelled) for source in (*training, *stills))
    iterations = args.epochs * (frames if args.iters == -1 else args.iters)
    log.info("%d sequences and %d still images to train on, held out: %s, and %d still images",
             len(training), len(stills),
             ", ".join(sequence.name for sequence in held_out) or "none", len(apart))
    train_prompts.train_prompts(model, training, stills, [*held_out, *apart],
                                setup.training_options(args, model, iterations))


def run_eval(args: argparse.Namespace) -> None:
    sequences = setup.load_dataset(args).sequences
    model = setup.load_for_inference(args)
    source = "demo" if args.demo else str((args.dataset or setup.DAVIS).resolve())
    evaluate.evaluate(model, sequences, evaluate.Options(
        results=args.results_dir or (Path("results/demo") if args.demo else None),
        set_name=setup.split_name(args), videos=args.visualize or args.demo,
        facts=setup.run_metadata(args, model, {"data": source}),
        overwrite=args.overwrite or args.demo, **setup.pipeline_options(args)))


if __name__ == "__main__":
    sys.exit(main())
