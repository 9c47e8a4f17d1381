"""Figures and windows (matplotlib)."""

import os
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path

import numpy as np

from media.files import atomic_path

Panel = tuple[str, np.ndarray]  # a title and an (H, W, 3) or (H, W) picture


def grid(panels: list[Panel], columns: int, window: bool = False):
    """Arrange titled pictures in a matplotlib figure; 2-D ones are probabilities in [0, 1].

    Args:
        panels: titles and pictures, row by row.
        columns: pictures in a row.
        window: create a figure that can be shown. Otherwise it can only be saved, and MPLBACKEND
            is ignored: a notebook's backend may be missing here.
    """
    rows = -(-len(panels) // columns)
    height, width = panels[0][1].shape[:2]
    figure = _figure(window, (5 * columns, 5 * rows * height / width + 0.35 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, panels):
        axis.set_title(title)
        shown = axis.imshow(picture, vmin=0, vmax=1)
        if picture.ndim == 2:
            figure.colorbar(shown, ax=axis, fraction=0.03)
    return figure


def curves(path: str | Path, history: list[dict]) -> None:
    """Write the training loss and the held-out IoU over iterations to a PNG.

    Args:
        history: reports with `iteration`, `loss` (None before the first) and `held_out_iou`
            (None where no sequences are held out).
    """
    figure = _figure(False, (8, 6))
    top, bottom = figure.subplots(2, 1, sharex=True)
    iterations = [report["iteration"] for report in history]
    losses, ious = ([np.nan if report[name] is None else report[name] for report in history]
                    for name in ("loss", "held_out_iou"))
    top.plot(iterations, losses, marker=".")
    top.set_ylabel("training loss")
    bottom.plot(iterations, ious, marker=".", color="tab:green")
    bottom.set_ylabel("IoU on held-out sequences")
    bottom.set_xlabel("iteration")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def show_or_save(panels: list[Panel], columns: int, path: Path | None, default: Path) -> None:
    """Show a `grid` in a window, or save it to `path`; without a display, to `default`.

    Raises:
        OSError: the file can't be written.
        ValueError: matplotlib can't write the format that the suffix of `path` names.
    """
    figure = grid(panels, columns, window=path is None and has_display())
    if path is None and not has_display():
        print("no display, so the figure is saved instead")
        path = default
    if path is None:
        _pyplot().show()
        _pyplot().close(figure)
    else:
        formats = figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in formats:
            raise ValueError(f"{path}: expected an image format, one of {', '.join(formats)}")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=100)
        print(f"saved {path}")


def has_browser() -> bool:
    """Whether a browser window can be opened."""
    with suppress(webbrowser.Error):
        return has_display() and webbrowser.get() is not None
    return False


def has_display() -> bool:
    """Whether a window can be opened."""
    if os.environ.get("MPLBACKEND", "").lower() == "agg":
        return False
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _figure(window: bool, size: tuple[float, float]):
    """Create an empty figure of (width, height) inches."""
    if window:
        return _pyplot().figure(figsize=size, layout="constrained")
    # importing matplotlib fails if the backend that MPLBACKEND names isn't installed
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure  # importing it takes a second
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=size, layout="constrained")


def _pyplot():
    import matplotlib.pyplot as plt
    return plt
