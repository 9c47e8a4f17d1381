"""`-m export`: write a checkpoint as graphs for `lite.py`, or as a page for browsers."""

import argparse

from cli import setup
from lite_runtime import browser
from lite_runtime.export import export
from media import files
from videomatch import VideoMatch


def run(args: argparse.Namespace) -> None:
    """Export the checkpoint that the flags name."""
    model = setup.load_for_inference(args).cpu().eval()
    if args.browser:
        build_page(args, model)
        return
    with files.lock_folder(args.export_dir, instead="another folder (--export_dir)"):
        export(model, args.export_dir, 8 if args.eight_bit else 32)
    size = sum(path.stat().st_size for path in args.export_dir.glob("*.onnx"))
    print(f"{args.export_dir}: {size / 1e6:.1f} MB, for lite.py --model_load {args.export_dir}")


def build_page(args: argparse.Namespace, model: VideoMatch) -> None:
    """Write the folder of --browser, and print how large its parts are and how to serve it."""
    with files.lock_folder(args.browser, instead="another folder (--browser)"):
        sizes = browser.build(model, args.browser, 8 if args.eight_bit else 16)
    for name, size in sizes.items():
        print(f"{name}: {size / 1e6:.1f} MB")
    print(f"to open it: python -m http.server --bind 127.0.0.1 --directory {args.browser}, then "
          "http://127.0.0.1:8000")
