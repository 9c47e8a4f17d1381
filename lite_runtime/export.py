"""Export a checkpoint to ONNX graphs, which `lite.py` runs without PyTorch: `-m export`.

Writes a folder of graphs (see `lite_runtime.graphs`) and a JSON file with the checkpoint's
configuration and the digest of each graph.
"""

import hashlib
import io
import json
import logging
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

import lite
import preprocess
from lite_runtime import graphs, quantize
from lite_runtime.model import NEXT
from media import files
from media.prompts import Prompts
from network.prompt_maps import BOX, CLICKS, MASK
from network.state import Features, State
from tracking.tracker import Tracker
from videomatch import VideoMatch

log = logging.getLogger(__name__)

CONTRACT = "contract.md"  # the table of docs/lite.md
# Shapes of tensors that no graph takes, for the table: ONNX has made-up names for their axes
RETURNED = {"logits (step)": "n, h0, w0", "scores": "n, h, w", "logits (prompt)": "Y/2, X/2"}
OPSET = 18  # version of the ONNX operators; newer ones need a newer onnxruntime
TRACED_SHAPE = 6, 10  # (h, w) of the traced frame: small, to trace quickly; other sizes work, too
# Largest difference allowed between the probabilities of the export and of PyTorch, on noise
TOLERANCE = 0.01
# Mean differences allowed with weights of fewer bits; not the largest one, as single pixels of
# noise change by 0.2. The shipped checkpoint has 0.002 with 16 bits and 0.017 with 8; 4 bits have
# 0.2, and 8 bits with one scale for all channels of a layer 0.09.
MEAN_TOLERANCES = {16: 0.01, 8: 0.04}


@torch.no_grad()
def export(model: VideoMatch, folder: Path, bits: int = 32) -> None:
    """Export a model, and check that the export computes what PyTorch does.

    Args:
        model: with folded BatchNorm, on the CPU.
        folder: to write the graphs and the JSON file to.
        bits: per stored weight: 8, 16 or 32.

    Raises:
        ValueError: the model is not of method "memory", a package is missing, or results of the
            export differ from PyTorch's.
        OSError: the folder is not writable.
    """
    onnx = lite.package("onnx")
    if model.method != "memory":
        raise ValueError("-m export: expected a checkpoint trained for --method memory, "
                         "and no other --method")
    if model.zoom < 1:
        raise ValueError(f"-m export: expected a model with a zoom of at least 1, got {model.zoom}")
    precision, model.precision = model.precision, torch.float32
    try:
        _write(model, folder, bits, onnx)
        most, mean = _differences(model, lite.load(folder))
        log.info("probabilities of the export and PyTorch differ by at most %.1e, on average %.1e",
                 most, mean)
        _check_differences(most, mean, bits)
    except BaseException:
        (folder / lite.DESCRIPTION).unlink(missing_ok=True)  # a wrong export must not be used
        raise
    finally:
        model.precision = precision


def _write(model: VideoMatch, folder: Path, bits: int, onnx) -> None:
    """Write the graphs, the JSON file and the contract."""
    written = {}
    for name, (graph, inputs, outputs) in _graphs(model).items():
        content = _trace(graph, inputs, outputs)
        if bits < 32:
            content = quantize.rounded(content, bits)
        onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
        files.write(folder / f"{name}.onnx", content)
        written[name] = hashlib.sha256(content).hexdigest()
    files.write(folder / lite.DESCRIPTION, json.dumps({
        "format": lite.FORMAT, "weights": model.metadata.get("digest") or model.digest(),
        "config": model.configuration(),
        "network": {"stride": model.encoder.spec.stride, "zoom": model.zoom,
                    "mean": preprocess.IMAGENET_MEAN, "std": preprocess.IMAGENET_STD,
                    "dilation": model.dilation, "widths": model.reader.widths._asdict(),
                    "has_prompts": model.prompts is not None},
        "graphs": written}, indent=1))
    files.write(folder / CONTRACT, contract(folder, list(written)))


def _check_differences(most: float, mean: float, bits: int) -> None:
    """Raise a ValueError if probabilities differ too much from PyTorch's."""
    if bits < 32 and not mean < MEAN_TOLERANCES[bits]:
        raise ValueError(f"-m export: with weights of {bits} bits probabilities differ from "
                         f"PyTorch's by {mean:.2g} on average, expected less than "
                         f"{MEAN_TOLERANCES[bits]}: export these weights with more bits, without "
                         "--eight_bit or --browser")
    if bits == 32 and not most < TOLERANCE:
        raise ValueError(f"-m export: the export's probabilities differ from PyTorch's by {most}, "
                         f"expected less than {TOLERANCE}")


def contract(folder: Path, names: list[str]) -> str:
    """A Markdown table of the tensors of an export: type, shape, the graphs that use and return it.

    Args:
        names: of the graphs.
    """
    onnx = lite.package("onnx")
    users: dict[str, tuple[list[str], list[str]]] = {}  # graphs that take and that return a tensor
    kinds = {}
    for graph in names:
        loaded = onnx.load(folder / f"{graph}.onnx").graph
        for role, values in enumerate((loaded.input, loaded.output)):
            for value in values:
                name, tensor = value.name.removeprefix(NEXT), value.type.tensor_type
                if name == "logits":  # two graphs return some, of different shapes
                    name = f"logits ({graph})"
                users.setdefault(name, ([], []))[role].append(
                    f"{graph}*" if value.name.startswith(NEXT) else graph)
                shape = ", ".join(side.dim_param or str(side.dim_value)
                                  for side in tensor.shape.dim)
                if not role or name in RETURNED:
                    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
                    kinds[name] = f"{kind} | ({RETURNED.get(name, shape)})"
    order = {name: i for i, name in enumerate((*State._fields, *graphs.FIELDS))}
    lines = ["| tensor | type | shape | input of | output of |", "|---|---|---|---|---|"]
    for name in sorted(users, key=lambda name: order.get(name, len(order))):
        lines.append(" | ".join((f"| `{name}`", kinds[name], *(
            ", ".join(listed) or "–" for listed in users[name]))) + " |")
    return "\n".join(lines) + "\n"


def _graphs(model: VideoMatch) -> dict[str, tuple[nn.Module, dict[str, torch.Tensor], list[str]]]:
    """Each graph's module, example inputs to trace it with, and names of its outputs."""
    (h, w), spec = TRACED_SHAPE, model.encoder.spec
    encode = graphs.Encode(model.encoder, model.reader)
    image = torch.rand(2, 3, h * spec.stride, w * spec.stride)
    names = [f"level{i}" for i in range(len(spec.levels))]
    frame, view = (dict(zip((*graphs.FIELDS, *names), encode(x[None]))) for x in image)
    views = frame | {name: torch.cat([frame[name], view[name]]) for name in ("key", "shared")}
    masks = torch.rand(2, 3, h * model.side, w * model.side).softmax(1)
    labels = torch.randint(-1, 3, (2, h, w))
    state = None
    for _ in range(2):  # two reference frames: with one the tracer would fix their number
        state = model.start(state, Features(None, *(views[name] for name in graphs.FIELDS)), masks,
                            labels)
    features = Features(None, *(frame[name] for name in graphs.FIELDS))
    state = model.remember(state, features, masks[0], long=True)
    fields = state._asdict()
    parts = {"encode": (encode, {"image": image[:1]}, [*graphs.FIELDS, *names]),
             "step": (graphs.Graph(model, model.step), fields | frame, ["logits", "scores"])}
    for name, long in (("remember", False), ("remember_long", True)):
        after = model.remember(state, features, masks[0], long)
        changed = tuple(field for field, new, old in zip(State._fields, after, state)
                        if new is not old)
        function = partial(model.remember, long=long)
        parts[name] = (graphs.Graph(model, function, ("probabilities",), changed),
                       fields | {part: frame[part] for part in graphs.FIELDS}
                       | {"probabilities": masks[0]}, [NEXT + field for field in changed])
    parts["start"] = (graphs.Graph(model, model.start, ("masks", "labels"), State._fields),
                      fields | {part: views[part] for part in graphs.FIELDS}
                      | {"masks": masks, "labels": labels}, [NEXT + x for x in State._fields])
    parts["revalue"] = (graphs.Revalue(model.reader), fields,
                        [NEXT + field for field in graphs.Revalue.changed])
    if model.prompts is not None:
        clicks = dict(zip(("points", "negative_points", "fine_points", "fine_negative_points"),
                          (torch.arange(count) for count in (2, 3, 4, 5))))
        prompts = {"prompt_maps": torch.rand(1, BOX + CLICKS + MASK, *frame[names[0]].shape[2:])}
        inputs = {"image": image[:1], "unit": frame["unit"]} | prompts | clicks
        inputs |= {name: frame[name] for name in names}
        segment = graphs.SegmentFromPrompts(model.prompts, spec.finer)
        parts["prompt"] = segment, inputs, ["logits"]
    return parts


def _trace(graph: nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str]) -> bytes:
    """Trace a graph to a serialized ONNX model whose sizes vary as `graphs.AXES` says."""
    axes = {name: {axis: letter + name[5:] if name.startswith("level") else letter for axis, letter
                   in enumerate(graphs.AXES.get(name, "..hw")) if letter != "."}
            for name in inputs}
    content = io.BytesIO()
    with warnings.catch_warnings():  # about sizes that the trace makes constant, as intended
        warnings.simplefilter("ignore")
        torch.onnx.export(graph.eval(), tuple(inputs.values()), content, dynamo=False,
                          opset_version=OPSET, input_names=list(inputs), output_names=outputs,
                          dynamic_axes=axes)
    return content.getvalue()


def _differences(model: VideoMatch, export) -> tuple[float, float]:
    """The largest and the mean absolute difference of probabilities, export against PyTorch.

    Both track two objects through noise, and segment a prompted one; the larger value counts.
    """
    random = torch.Generator().manual_seed(0)
    frames = torch.rand(3, 3, 90, 150, generator=random)
    mask = torch.zeros(90, 150, dtype=torch.uint8)
    mask[20:60, 20:60], mask[30:70, 90:130] = 1, 2
    one, other = Tracker(model), Tracker(export)
    for i, frame in enumerate(frames):
        pair = [tracker.step(image, None if i else mask.numpy()).probabilities
                for tracker, image in ((one, frame), (other, frame.numpy()))]
    differences = [(pair[0] - torch.from_numpy(pair[1])).abs()]
    if model.prompts is not None:
        picture = (255 * frames[0, :, :64, :96].permute(1, 2, 0)).byte().numpy()
        prompts = Prompts([(20, 10, 40, 30)], [(30, 20)], [(80, 50)], mask.numpy()[:64, :96] > 0)
        pair = [torch.from_numpy(network.segment_from_prompts(picture, prompts)).sigmoid()
                for network in (model, export)]
        differences.append((pair[0] - pair[1]).abs())
    return max(x.max().item() for x in differences), max(x.mean().item() for x in differences)
