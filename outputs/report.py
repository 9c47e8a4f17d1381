"""A results folder to look at: one self-contained HTML file, of one run or of two compared."""

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

FALSE_POSITIVE, FALSE_NEGATIVE, HIT = (230, 60, 40), (40, 110, 255), (60, 190, 90)
PICTURE_WIDTH = 480  # pixels
CURVES = ("#2a78d6", "#d6602a")  # of J and F, or of the two runs


@dataclass
class Run:
    """The masks of some sequences, and their scores.

    Args:
        name: such as the folder's.
        results: the folder with SEQUENCE/FRAME.png.
        scores: of each sequence, by its name.
        measures: how sure its masks are, likewise, where that is known.
    """

    name: str
    results: Path
    scores: dict[str, metrics.SequenceScore]
    measures: dict[str, list[Measures]] = field(default_factory=dict)

    def j_and_f(self, sequence: str) -> np.ndarray:
        """(2, T) J and F of the scored frames, averaged over the objects that are there by then."""
        score = self.scores[sequence]
        frames = max(len(values) for values in score.j.values())
        return np.array([np.nanmean([[np.nan] * (frames - len(one)) + one
                                     for one in values.values()], axis=0)
                         for values in (score.j, score.f)])


def write(path: Path, sequences: list[Sequence], runs: list[Run], facts: dict[str, str]) -> Path:
    """Write the report of one run, or of two runs side by side; returns `path`.

    Args:
        facts: what made it, such as flags and versions.
    """
    title = " against ".join(run.name for run in runs)
    parts = [f"<h1>{html.escape(title)}</h1>", _table(sequences, runs),
             f"<p class=legend>Frames: {_swatch(f'rgb{HIT}', 'found')} "
             f"{_swatch(f'rgb{FALSE_POSITIVE}', 'too much')} "
             f"{_swatch(f'rgb{FALSE_NEGATIVE}', 'missed')}</p>"]
    parts += [_section(sequence, runs) for sequence in sequences]
    return _write(path, title, "".join(parts), facts)


def _write(path: Path, title: str, body: str, facts: dict[str, str]) -> Path:
    items = "".join(f"<dt>{html.escape(k)}<dd>{html.escape(str(v))}" for k, v in facts.items())
    page = (f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
            "<meta name=viewport content='width=device-width, initial-scale=1'>"
            f"<style>{CSS}</style><main>{body}<h2>Made by</h2><dl>{items}</dl></main>"
            f"<script>{SORT}</script></html>")
    files.write(path, page)
    return path


def _table(sequences: list[Sequence], runs: list[Run]) -> str:
    """One row for each sequence: all measures of one run, or J&F of two and who won."""
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
    """Curves over time and frames: worst, middle and best, or where two runs differ most."""
    series = [run.j_and_f(sequence.name) for run in runs]
    if len(runs) == 1:
        labels, lines = ["J", "F"], list(series[0])
        order = series[0].mean(0).argsort()
        chosen = {"worst": order[0], "middle": order[len(order) // 2], "best": order[-1]}
    else:
        labels, lines = [run.name for run in runs], [s.mean(0) for s in series]
        chosen = {"they differ most": np.abs(lines[0] - lines[1]).argmax()}
    frames = {sequence.scored[int(index)]: word for word, index in reversed(chosen.items())}
    codings = [sequence.coding_in(run.results) for run in runs]
    pictures = "".join(_figure(sequence, run, coding, frame, frames[frame], len(runs) > 1)
                       for frame in sorted(frames) for run, coding in zip(runs, codings))
    sure = "".join(_confidence(run.measures[sequence.name], sequence) for run in runs
                   if sequence.name in run.measures)
    return (f"<h2 id='{html.escape(sequence.name)}'>{html.escape(sequence.name)}</h2>"
            f"{_curves(sequence, sequence.scored, lines, labels)}{sure}"
            f"<div class=frames>{pictures}</div>")


def write_clip(path: Path, name: str, clip: Clip, measures: list[Measures],
               facts: dict[str, str]) -> Path:
    """Write the report of a clip without ground truth: how sure each frame is; returns `path`.

    Args:
        measures: of predicted masks.
    """
    body = (f"<h1>{html.escape(name)}</h1>{_confidence(measures, clip)}"
            "<p><a href='overlay.mp4'>overlay.mp4</a>, <a href='confidence.csv'>confidence.csv</a>")
    return _write(path, name, body, facts)


def _confidence(measures: list[Measures], clip: Clip) -> str:
    """A curve for each object, and the frames to review."""
    ids = sorted({one.object_id for one in measures})
    frames = sorted({one.frame for one in measures})
    places = {frame: i for i, frame in enumerate(frames)}
    lines = [np.full(len(frames), np.nan) for _ in ids]
    for one in measures:
        if one.confidence is not None:
            lines[ids.index(one.object_id)][places[one.frame]] = one.confidence
    review = "".join(f"<li>{stretch.text(clip)}" for stretch in frames_to_review(measures))
    drawn = _curves(clip, frames, lines, [f"object {i}" for i in ids], "How sure the masks are",
                    [f"rgb{tuple(PALETTE[i].tolist())}" for i in ids])
    return drawn + (f"<p>To review first:<ol>{review}</ol>" if review else
                    "<p>No frame is in doubt.")


def _curves(clip: Clip, frames: tuple[int, ...] | list[int], lines, labels,
            title: str = "Over time", colours=CURVES) -> str:
    """Lines over the frames of a clip, from 0 to 1, as SVG.

    Args:
        frames: indices of the T frames with values, ascending.
        lines: (T,) values each; NaN interrupts a line.
    """
    width, height, drawn = 640, 160, []
    first, last = (frames[0], frames[-1]) if len(frames) else (0, 0)
    # a frame without values has its place too: sparse ground truth, a mask that a person drew
    places = 30 + (np.array(frames) - first) * ((width - 40) / max(1, last - first))
    for i, line in enumerate(lines):
        points = [None if np.isnan(y) else f"{x:.1f},{height - 20 - (height - 30) * y:.1f}"
                  for x, y in zip(places, line)]
        runs = [list(run) for there, run in groupby(points, bool) if there]
        drawn += [f"<polyline points='{' '.join(run * 2 if len(run) == 1 else run)}' "
                  f"stroke='{colours[i]}'/>" for run in runs]
    ticks = "".join(f"<line x1=30 x2={width - 10} y1={y} y2={y} />"
                    f"<text x=4 y={y + 4}>{value}</text>"
                    for value, y in ((1, 10), (0.5, 75), (0, 140)))
    if len(frames):
        ticks += (f"<text x=30 y={height - 4}>{clip.number(first)}</text><text x={width - 10} "
                  f"y={height - 4} text-anchor=end>{clip.number(last)}</text>")
    names = " ".join(_swatch(colour, html.escape(label)) for colour, label in zip(colours, labels))
    return (f"<p class=legend>{title}: {names}</p><svg viewBox='0 0 {width} {height}' role=img "
            f"aria-label='over time'>{ticks}{''.join(drawn)}</svg>")


def _figure(sequence: Sequence, run: Run, coding: MaskEncoding, frame: int, word: str,
            compared: bool) -> str:
    score = run.j_and_f(sequence.name)[:, sequence.scored.index(frame)].mean()
    whose = f"{html.escape(run.name)}, " if compared else ""
    picture = errors(sequence.image(frame),
                     coding.read(run.results / sequence.name / sequence.mask_name(frame)),
                     sequence.truth(frame))
    caption = f"{whose}frame {sequence.number(frame)}, {word}: J&amp;F {score:.3f}"
    return (f"<figure><img alt='{caption}' src='data:image/jpeg;base64,{_jpeg(picture)}'>"
            f"<figcaption>{caption}</figcaption></figure>")


def errors(image: np.ndarray, mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Colour what was found, what is too much and what was missed.

    Args:
        image, mask, truth: (H, W, 3) uint8 RGB and two (H, W) uint8 of object ids. Where the
            truth is `VOID` nothing is coloured.

    Returns:
        (H, W, 3) uint8 RGB. A pixel of another object than the true one counts as too much.
    """
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    mask, truth = (np.where(truth == VOID, 0, ids) for ids in (mask, truth))
    found, wrong = (mask > 0) & (mask == truth), (mask > 0) & (mask != truth)
    for where, colour, opacity in ((found, HIT, 0.35), (wrong, FALSE_POSITIVE, 0.7),
                                   ((truth > 0) & (mask == 0), FALSE_NEGATIVE, 0.7)):
        grey[where] = (1 - opacity) * grey[where] + opacity * np.array(colour)
    return grey.astype(np.uint8)


def _jpeg(picture: np.ndarray) -> str:
    height = round(len(picture) * PICTURE_WIDTH / picture.shape[1])
    small = cv2.resize(picture, (PICTURE_WIDTH, height), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(data.tobytes()).decode()


def _swatch(colour: str, word: str) -> str:
    return f"<span style='background:{colour}'></span> {word}"


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
