"""`-m export`: write a checkpoint as graphs for `lite.py`."""

import argparse

from cli import setup
from lite_runtime.export import export
from media import files


def run(args: argparse.Namespace) -> None:
    """Export the checkpoint that the flags name."""
    model = setup.load_for_inference(args).cpu().eval()
    with files.lock_folder(args.export_dir, instead="another folder (--export_dir)"):
        export(model, args.export_dir, args.eight_bit)
    size = sum(path.stat().st_size for path in args.export_dir.glob("*.onnx"))
    print(f"{args.export_dir}: {size / 1e6:.1f} MB, for lite.py --model_load {args.export_dir}")
