"""`VideoMatch` with method "memory", without PyTorch: runs the graphs of an export.

The graphs compute everything that involves weights (see `lite_runtime.graphs`). Arrays are NumPy's.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import cv2
import numpy as np
from PIL import Image

from media.prompts import Prompts
from network.prompt_maps import clicked_locations, prompt_maps
from network.state import INTEGERS, Features, State, Widths, blank, without
from network.views import reference

# Runs a graph: its name, and its inputs by name -> its outputs by name
Run = Callable[..., dict[str, np.ndarray]]
NEXT = "next_"  # prefix of outputs that are fields of the next state; ONNX names must differ


class LiteVideoMatch:
    """The network of an export, with the methods of `VideoMatch` that a tracker calls.

    All arguments but `run` are entries of the export's description.

    Args:
        run: runs a graph.
        stride: pixels along each side of a location, in the enlarged frame.
        zoom: enlargement of frames before the encoder, at least 1.
        dilation: outlier removal keeps pixels within this distance, in pixels, of the object's
            previous mask.
        mean, std: of the RGB channels, in [0, 1], to normalise images.
        has_prompts: whether the export has a prompt decoder.
        widths: see `Widths`.
    """

    method = "memory"
    concatenate = staticmethod(np.concatenate)
    inference = nullcontext

    def __init__(self, run: Run, stride: int, zoom: float, dilation: int, mean: list[float],
                 std: list[float], has_prompts: bool, widths: dict[str, int]):
        self.run, self.stride, self.zoom, self.dilation = run, stride, zoom, dilation
        self.mean, self.std = np.float32(mean), np.float32(std)
        self.has_prompts, self.widths = has_prompts, Widths(**widths)
        self.side = self.widths.side

    def normalized(self, image: np.ndarray) -> np.ndarray:
        """Normalise an image: (H, W, 3) uint8 RGB -> (3, H, W) float32."""
        return ((image.astype(np.float32) / 255 - self.mean) / self.std).transpose(2, 0, 1)

    def segment_from_prompts(self, image: np.ndarray, prompts: Prompts) -> np.ndarray:
        """Segment the prompted object: (H, W, 3) uint8 RGB -> (H/2, W/2) float32 logits.

        Raises:
            ValueError: the exported checkpoint has no prompt decoder.
        """
        if not self.has_prompts:
            raise ValueError("this export has no prompt decoder, expected one of a checkpoint that "
                             "takes boxes and clicks")
        size, image = image.shape[:2], np.ascontiguousarray(self.normalized(image)[None])
        features = self._encoded(image)
        shapes = features.local_key.shape[1:3], features.levels[0].shape[2:]
        # at the coarse level, then at the finest one, as in `PromptDecoder.decode`
        names = "points", "negative_points", "fine_points", "fine_negative_points"
        clicks = [clicked_locations(points, size, shape) for shape in shapes
                  for points in (prompts.points, prompts.negative_points)]
        maps = prompt_maps(prompts, size, shapes[1])[None]
        return self.run("prompt", image=image, prompt_maps=maps,
                        **dict(zip(names, clicks)), **_named(features))["logits"]

    def encode(self, image: np.ndarray, grid: tuple[int, int] | None = None) -> Features:
        """Compute the features of an image.

        Args:
            image: (1, 3, H, W) float32, ImageNet-normalised.
            grid: size (h, w) of the feature map; defaults to the image's size * zoom / stride.
        """
        grid = grid or [max(1, round(side * self.zoom / self.stride)) for side in image.shape[2:]]
        height, width = (side * self.stride for side in grid)
        large = cv2.resize(np.ascontiguousarray(image[0].transpose(1, 2, 0)), (width, height),
                           interpolation=cv2.INTER_LINEAR)
        return self._encoded(np.ascontiguousarray(large.transpose(2, 0, 1))[None])

    def _encoded(self, image: np.ndarray) -> Features:
        """Run the encoder on an image whose sides are multiples of the stride."""
        outputs = self.run("encode", image=image)
        levels = tuple(x for name, x in outputs.items() if name.startswith("level"))
        return Features(None, levels=levels, **{
            name: x for name, x in outputs.items() if not name.startswith("level")})

    def add_reference(self, state: State | None, image: np.ndarray, mask: np.ndarray,
              object_ids: Sequence[int]) -> State:
        """Add a reference frame; arguments as for `VideoMatch.add_reference`.

        Raises:
            ValueError: the frame has another size than the first reference frame.
        """
        features, masks, labels = reference(self, image, mask, object_ids)
        if state is None:
            state = blank(features.local_key.shape[1:3], len(object_ids), self.widths, _zeros)
        state.check_size(features)
        return self._changed("start", state, features, masks=masks, labels=labels)

    def predict(self, state: State, features: Features, shape: tuple[int, int]) -> np.ndarray:
        """Predict the (N+1, H, W) probabilities of a frame; `shape` is (H, W).

        Raises:
            ValueError: the frame has another size than the reference frame.
        """
        state.check_size(features)
        logits = self.run("step", **state._asdict(), **_named(features))["logits"]
        # by Pillow, whose bicubic kernel is that of PyTorch; OpenCV's overshoots more
        logits = np.stack([np.zeros(shape, np.float32), *(
            Image.fromarray(channel).resize(shape[::-1], Image.Resampling.BICUBIC)
            for channel in logits[1:])])
        odds = np.exp(logits - logits.max(0))
        return odds / odds.sum(0)

    def remember(self, state: State, features: Features, probabilities: np.ndarray,
                 long: bool) -> State:
        """Return the state after a frame with its (N+1, H, W) probabilities.

        The frame enters the short-term memory and, if `long`, also the long-term memory.
        """
        return self._changed("remember_long" if long else "remember", state, features,
                             probabilities=probabilities)

    def _changed(self, graph: str, state: State, features: Features, **more) -> State:
        """Run a graph on a state and a frame; returns the next state."""
        return _next(state, self.run(graph, **state._asdict(), **_named(features), **more))

    def without(self, state: State, channel: int) -> State:
        """Return a state without one object; `channel` is its channel in the probabilities."""
        state = without(state, channel)
        return _next(state, self.run("revalue", **state._asdict()))

    @staticmethod
    def serialize(state: State) -> dict[str, np.ndarray]:
        """Convert a state to a dict of arrays."""
        return state._asdict()

    @staticmethod
    def deserialize(plain: dict[str, np.ndarray]) -> State:
        """Convert the output of `serialize` back; TypeError if malformed."""
        return State(**plain)

    @staticmethod
    def array(x: np.ndarray) -> np.ndarray:
        """Return the array: with PyTorch this copies it to the network's device."""
        return x


def _next(state: State, outputs: dict[str, np.ndarray]) -> State:
    """Replace the fields of a state that a graph returned."""
    return state._replace(**{name.removeprefix(NEXT): x for name, x in outputs.items()})


def _named(features: Features) -> dict[str, np.ndarray]:
    """Return features as inputs of a graph, by name."""
    named = {name: x for name, x in features._asdict().items()
             if name != "levels" and x is not None}
    return named | {f"level{i}": x for i, x in enumerate(features.levels)}


def _zeros(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return zeros for a field of the state, see `blank`."""
    return np.zeros(shape, np.int64 if name in INTEGERS else np.float32)
