"""HTML report: scores and error images of one run or two, or the confidence of a clip.

The file contains its images, so it can be sent or moved without the folder.
"""

import base64
import html
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np

import metrics
from davis import Sequence
from masks.encoding import VOID, MaskEncoding
from media import files
from media.clip import Clip
from media.drawing import PALETTE
from tracking.confidence import Measures, frames_to_review

# Colours of error images, RGB; red and blue rather than red and green for the two kinds of error,
# which most colour-blind readers can tell apart.
FALSE_POSITIVE, FALSE_NEGATIVE, HIT = (230, 60, 40), (40, 110, 255), (60, 190, 90)
IMAGE_WIDTH = 480  # pixels; wider images make a report of a whole data set slow to open
JPEG_QUALITY = 80
LINE_COLOURS = ("#2a78d6", "#d6602a")  # of J and F, or of the two runs


@dataclass
class Run:
    """Predicted masks of sequences and their scores.

    Args:
        name: shown in the report, such as the folder's name.
        results: folder with SEQUENCE/FRAME.png.
        scores: of each sequence, by its name.
        measures: confidence measures of each sequence, by its name; may lack sequences.
    """

    name: str
    results: Path
    scores: dict[str, metrics.SequenceScore]
    measures: dict[str, list[Measures]] = field(default_factory=dict)

    def j_and_f(self, sequence: str) -> np.ndarray:
        """(2, T) J and F of the T scored frames, averaged over the objects that have appeared."""
        score = self.scores[sequence]
        # An object that appears later has fewer scores; they belong to the last frames.
        frames = max(len(values) for values in score.j.values())
        return np.array([np.nanmean([[np.nan] * (frames - len(of_object)) + of_object
                                     for of_object in values.values()], axis=0)
                         for values in (score.j, score.f)])


def write(path: Path, sequences: list[Sequence], runs: list[Run],
          metadata: dict[str, str]) -> Path:
    """Write the report of one run, or of two runs side by side; returns `path`.

    Args:
        metadata: run metadata, listed at the end.
    """
    title = " against ".join(run.name for run in runs)
    parts = [f"<h1>{html.escape(title)}</h1>", _table(sequences, runs),
             f"<p class=legend>Frames: {_swatch(f'rgb{HIT}', 'correct')} "
             f"{_swatch(f'rgb{FALSE_POSITIVE}', 'false positive')} "
             f"{_swatch(f'rgb{FALSE_NEGATIVE}', 'false negative')}</p>"]
    parts += [_section(sequence, runs) for sequence in sequences]
    return _write(path, title, "".join(parts), metadata)


def _write(path: Path, title: str, body: str, metadata: dict[str, str]) -> Path:
    items = "".join(f"<dt>{html.escape(k)}<dd>{html.escape(str(v))}" for k, v in metadata.items())
    page = (f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
            "<meta name=viewport content='width=device-width, initial-scale=1'>"
            f"<style>{CSS}</style><main>{body}<h2>Run</h2><dl>{items}</dl></main>"
            f"<script>{SORT}</script></html>")
    files.write(path, page)
    return path


def _table(sequences: list[Sequence], runs: list[Run]) -> str:
    """A row per sequence: all measures of one run, or J&F of two runs and the difference."""
    rows = []
    for sequence in sequences:
        means = [metrics.average(list(run.scores[sequence.name].conclude().values()))
                 for run in runs]
        rows.append((sequence.name, _columns(means)))
    if len(runs) == 1:
        heads = list(metrics.MEASURES)
    else:
        heads = [f"J&F {run.name}" for run in runs] + ["difference"]
    mean = np.mean([values for _, values in rows], axis=0).tolist()
    head = "".join(f"<th>{html.escape(h)}" for h in ("sequence", *heads))
    body = "".join(_row(f"<a href='#{html.escape(name)}'>{html.escape(name)}</a>", values,
                        len(runs) > 1) for name, values in rows)
    return (f"<div class=wide><table><thead><tr>{head}<tbody>{body}"
            f"<tfoot>{_row('all', mean, len(runs) > 1)}</table></div>")


def _columns(means: list[dict[str, float]]) -> list[float]:
    if len(means) == 1:
        return [means[0][measure] for measure in metrics.MEASURES]
    first, second = (mean["J&F-Mean"] for mean in means)
    return [first, second, second - first]


def _row(name: str, values: list[float], compared: bool) -> str:
    kinds = [""] * len(values)
    if compared:
        kinds[-1] = " class=won" if values[-1] > 0 else " class=lost" if values[-1] < 0 else ""
    return f"<tr><td>{name}" + "".join(f"<td{kind}>{value:.3f}"
                                       for kind, value in zip(kinds, values))


def _section(sequence: Sequence, runs: list[Run]) -> str:
    """A sequence's curves over time and the error images of some frames.

    The frames are the worst, the median and the best one; of two runs, the one in which their J&F
    differs most.
    """
    series = [run.j_and_f(sequence.name) for run in runs]
    if len(runs) == 1:
        labels, lines = ["J", "F"], list(series[0])
        order = series[0].mean(0).argsort()
        chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    else:
        labels, lines = [run.name for run in runs], [s.mean(0) for s in series]
        chosen = {"largest difference": np.abs(lines[0] - lines[1]).argmax()}
    # Reversed: in a short sequence one frame may be several of these, and "worst" matters most.
    labels_of_frames = {sequence.scored[int(index)]: label
                        for label, index in reversed(chosen.items())}
    codings = [sequence.result_encoding(run.results) for run in runs]
    figures = "".join(_figure(sequence, run, coding, frame, label, len(runs) > 1)
                      for frame, label in sorted(labels_of_frames.items())
                      for run, coding in zip(runs, codings))
    confidence = "".join(_confidence(run.measures[sequence.name], sequence) for run in runs
                         if sequence.name in run.measures)
    return (f"<h2 id='{html.escape(sequence.name)}'>{html.escape(sequence.name)}</h2>"
            f"{_curves(sequence, sequence.scored, lines, labels)}{confidence}"
            f"<div class=frames>{figures}</div>")


def write_clip(path: Path, name: str, clip: Clip, measures: list[Measures],
               metadata: dict[str, str]) -> Path:
    """Write the report of a clip without ground truth, its confidence over time; returns `path`.

    Args:
        name: title of the report, such as the clip's file name.
        measures: confidence measures of the predicted masks.
        metadata: run metadata, listed at the end.
    """
    body = (f"<h1>{html.escape(name)}</h1>{_confidence(measures, clip)}"
            "<p><a href='overlay.mp4'>overlay.mp4</a>, <a href='confidence.csv'>confidence.csv</a>")
    return _write(path, name, body, metadata)


def _confidence(measures: list[Measures], clip: Clip) -> str:
    """A confidence curve for each object, and the frames to review first."""
    ids = sorted({row.object_id for row in measures})
    frames = sorted({row.frame for row in measures})
    columns = {frame: i for i, frame in enumerate(frames)}
    lines = [np.full(len(frames), np.nan) for _ in ids]
    for row in measures:
        if row.confidence is not None:
            lines[ids.index(row.object_id)][columns[row.frame]] = row.confidence
    review = "".join(f"<li>{stretch.text(clip)}" for stretch in frames_to_review(measures))
    curves = _curves(clip, frames, lines, [f"object {i}" for i in ids], "Confidence",
                     [f"rgb{tuple(PALETTE[i].tolist())}" for i in ids])
    return curves + (f"<p>Review first:<ol>{review}</ol>" if review else
                     "<p>No low-confidence frames.")


def _curves(clip: Clip, frames: tuple[int, ...] | list[int], lines: list[np.ndarray],
            labels: list[str], title: str = "Over time",
            colours: tuple[str, ...] | list[str] = LINE_COLOURS) -> str:
    """An SVG chart of values in [0, 1] over a clip's frames, with a legend.

    Args:
        frames: indices of the T frames with values, ascending.
        lines: (T,) values each; NaN interrupts a line.
        labels: a name per line, for the legend.
        colours: a CSS colour per line.
    """
    width, height, polylines = 640, 160, []
    first, last = (frames[0], frames[-1]) if len(frames) else (0, 0)
    # x is the frame, not its position among those with values: ground truth may be sparse, and
    # user masks have no confidence
    xs = 30 + (np.array(frames) - first) * ((width - 40) / max(1, last - first))
    for i, line in enumerate(lines):
        points = [None if np.isnan(y) else f"{x:.1f},{height - 20 - (height - 30) * y:.1f}"
                  for x, y in zip(xs, line)]
        pieces = [list(piece) for has_value, piece in groupby(points, bool) if has_value]
        # a single point is drawn as a line from it to itself, which round line caps make a dot
        polylines += [f"<polyline points='{' '.join(piece * 2 if len(piece) == 1 else piece)}' "
                      f"stroke='{colours[i]}'/>" for piece in pieces]
    ticks = "".join(f"<line x1=30 x2={width - 10} y1={y} y2={y} />"
                    f"<text x=4 y={y + 4}>{value}</text>"
                    for value, y in ((1, 10), (0.5, 75), (0, 140)))
    if len(frames):
        ticks += (f"<text x=30 y={height - 4}>{clip.number(first)}</text><text x={width - 10} "
                  f"y={height - 4} text-anchor=end>{clip.number(last)}</text>")
    names = " ".join(_swatch(colour, html.escape(label)) for colour, label in zip(colours, labels))
    return (f"<p class=legend>{title}: {names}</p><svg viewBox='0 0 {width} {height}' role=img "
            f"aria-label='over time'>{ticks}{''.join(polylines)}</svg>")


def _figure(sequence: Sequence, run: Run, coding: MaskEncoding, frame: int, label: str,
            compared: bool) -> str:
    """The error image of one frame, with a caption.

    Args:
        coding: how the run's mask files are encoded, determined from all of them.
        label: why the frame was chosen.
        compared: the report has two runs, so the caption needs the run's name.
    """
    score = run.j_and_f(sequence.name)[:, sequence.scored.index(frame)].mean()
    prefix = f"{html.escape(run.name)}, " if compared else ""
    image = error_image(sequence.image(frame),
                        coding.read(run.results / sequence.name / sequence.mask_name(frame)),
                        sequence.truth(frame))
    caption = f"{prefix}frame {sequence.number(frame)}, {label}: J&amp;F {score:.3f}"
    return (f"<figure><img alt='{caption}' src='data:image/jpeg;base64,{_jpeg(image)}'>"
            f"<figcaption>{caption}</figcaption></figure>")


def error_image(image: np.ndarray, mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Overlay correct pixels, false positives and false negatives on the frame in grey.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask, truth: (H, W) uint8 object ids. `VOID` pixels of the truth are not coloured.

    Returns:
        (H, W, 3) uint8 RGB. A pixel assigned to the wrong object is a false positive.
    """
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    mask, truth = (np.where(truth == VOID, 0, ids) for ids in (mask, truth))
    correct, wrong = (mask > 0) & (mask == truth), (mask > 0) & (mask != truth)
    # errors are more opaque than correct pixels, so that thin ones are seen
    for where, colour, opacity in ((correct, HIT, 0.35), (wrong, FALSE_POSITIVE, 0.7),
                                   ((truth > 0) & (mask == 0), FALSE_NEGATIVE, 0.7)):
        grey[where] = (1 - opacity) * grey[where] + opacity * np.array(colour)
    return grey.astype(np.uint8)


def _jpeg(image: np.ndarray) -> str:
    """An (H, W, 3) uint8 RGB image as base64-encoded JPEG, `IMAGE_WIDTH` pixels wide."""
    height = round(len(image) * IMAGE_WIDTH / image.shape[1])
    small = cv2.resize(image, (IMAGE_WIDTH, height), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return base64.b64encode(data.tobytes()).decode()


def _swatch(colour: str, label: str) -> str:
    return f"<span style='background:{colour}'></span> {label}"


CSS = """
:root{color-scheme:light dark;--line:#8884}
body{font:16px/1.5 system-ui,sans-serif;margin:0}
main{max-width:62rem;margin:auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .3rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{cursor:pointer;user-select:none}tfoot td{font-weight:600}
.won{color:#1a8a3c}.lost{color:#d03a20}
svg{width:100%;max-width:40rem;display:block}
svg polyline{fill:none;stroke-width:2;stroke-linecap:round;vector-effect:non-scaling-stroke}
svg line{stroke:var(--line)}svg text{font-size:14px;fill:currentColor}
.frames{display:grid;gap:.6rem;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr))}
figure{margin:0}img{width:100%;display:block;border-radius:4px}
figcaption,.legend,dl{font-size:.85rem}
.legend span{display:inline-block;width:.9em;height:.9em;border-radius:2px;margin-left:.8em}
dt{font-weight:600}dd{margin:0 0 .4rem;overflow-wrap:anywhere}
"""

SORT = """
document.querySelectorAll('th').forEach((head, column) => head.onclick = () => {
  const body = head.closest('table').tBodies[0], down = head.dataset.down !== 'yes'
  const value = row => row.cells[column].textContent
  document.querySelectorAll('th').forEach(other => delete other.dataset.down)
  if (down) head.dataset.down = 'yes'
  const sign = down === !column ? 1 : -1  // names from A, figures from the best
  body.append(...[...body.rows].sort((a, b) => sign * (column
    ? value(a) - value(b) : value(a).localeCompare(value(b)))))
})
"""
