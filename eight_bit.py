"""An export whose convolutions multiply 8 bits: `-m export --eight_bit DAVIS`.

Weights are rounded channel by channel, values by what some frames of a data set show of them. It
knows what an export's folder holds, and nothing of PyTorch.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import lite
from davis import Sequence
from media import files

GRAPHS = ("encode", "read")  # those that convolve
SEQUENCES = 15  # that are looked at, at least, if there are so many
FRAMES = 4  # of each that are followed, of which the last one counts


class Calls:
    """A graph's inputs one after the other, as onnxruntime asks for them."""

    def __init__(self):
        self.found: list[dict] = []

    def get_next(self) -> dict | None:
        return self.found.pop() if self.found else None


def quantize(folder: Path, sequences: list[Sequence]) -> None:
    """Write graphs of 8 bits over those of an export that convolve.

    Raises:
        ValueError: onnx or onnxruntime is missing.
        OSError: nothing can be written there.
    """
    lite.package("onnx")
    tools = lite.package("onnxruntime.quantization")
    shapes = lite.package("onnxruntime.quantization.shape_inference")
    path = folder / lite.DESCRIPTION
    description = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as place:
        plain, small = (Path(place) / f"{name}.onnx" for name in ("plain", "small"))
        for name, calls in calls_of(folder, sequences).items():
            shapes.quant_pre_process(folder / f"{name}.onnx", plain, skip_symbolic_shape=True)
            tools.quantize_static(plain, small, calls, per_channel=True,
                                  op_types_to_quantize=["Conv"],
                                  activation_type=tools.QuantType.QUInt8)
            content = small.read_bytes()
            files.write(folder / f"{name}.onnx", content)
            description["graphs"][name] = hashlib.sha256(content).hexdigest()
    files.write(path, json.dumps(description, indent=1))


def calls_of(folder: Path, sequences: list[Sequence]) -> dict[str, Calls]:
    """What the graphs are asked where an export follows the first frames of sequences."""
    model = lite.load(folder)
    calls: dict[str, Calls] = {name: Calls() for name in GRAPHS}
    last: dict[str, dict] = {}
    model.run = model.reader.run = _noting(model.run, last)
    for sequence in sequences[::max(1, len(sequences) // SEQUENCES)]:
        follower, first = lite.Follower(model), sequence.labelled[0]
        follower.step(model.normalized(sequence.image(first)), sequence.mask(first))
        for frame in range(first + 1, min(first + FRAMES, len(sequence))):
            follower.step(model.normalized(sequence.image(frame)))
        for name in GRAPHS:
            calls[name].found.append(last[name])
    return calls


def _noting(run: Callable, last: dict[str, dict]) -> Callable:
    """The same, which keeps the inputs of each graph's last call."""
    def noted(name, **inputs):
        last[name] = inputs
        return run(name, **inputs)

    return noted
