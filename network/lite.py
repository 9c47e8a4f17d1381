"""`VideoMatch` without PyTorch, of method "memory": the graphs of an export, run one by one.

The graphs hold everything that is computed with weights (see `network.graphs`); who runs them is
not known here.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import cv2
import numpy as np

from media.prompts import Prompts
from network.evidence import clicked, evidence
from network.state import INTEGERS, Features, State, Widths, blank, without
from network.views import reference

# a graph's name and its inputs by theirs -> its outputs by theirs
Run = Callable[..., dict[str, np.ndarray]]
NEXT = "next_"  # before the name of a field of the state that a graph returns


class LiteVideoMatch:
    """The network of an export; see `VideoMatch`, whose methods of these names do the same.

    Args:
        run: runs the graphs.
        stride: pixels of the network's image on each side of a location.
        zoom: frames are enlarged by this before the encoder, at least 1.
        dilation: of outlier removal, in pixels.
        mean, std: of the colours of images that the encoder is used to, in [0, 1].
        shown: it can be shown objects.
        edges: the first level is of stride 2.
        widths: see `Widths`.
    """

    method = "memory"
    concatenate = staticmethod(np.concatenate)
    inference = nullcontext

    def __init__(self, run: Run, stride: int, zoom: float, dilation: int, mean: list[float],
                 std: list[float], shown: bool, edges: bool, widths: list[int]):
        self.run, self.stride, self.zoom, self.dilation = run, stride, zoom, dilation
        self.mean, self.std = np.float32(mean), np.float32(std)
        self.shown, self.edges, self.widths = shown, edges, Widths(*widths)
        self.side = self.widths.side

    def normalized(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (3, H, W) float32, as the network was trained on."""
        return ((image.astype(np.float32) / 255 - self.mean) / self.std).transpose(2, 0, 1)

    def look(self, image: np.ndarray, prompts: Prompts) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (H/2, W/2) float32, above 0 on the object that is shown in it.

        Raises:
            ValueError: the checkpoint that was exported was not trained for it.
        """
        if not self.shown:
            raise ValueError("expected an export of a checkpoint that can be shown objects by "
                             "boxes and clicks")
        size, image = image.shape[:2], np.ascontiguousarray(self.normalized(image)[None])
        features = self._encoded(image)
        shapes = features.near.shape[1:3], features.levels[int(self.edges)].shape[2:]
        names = "points", "not_points", "fine_points", "fine_not_points"
        clicks = [clicked(points, size, shape) for shape in shapes
                  for points in (prompts.points, prompts.not_points)]
        return self.run("show", image=image, known=evidence(prompts, size, shapes[1])[None],
                        **dict(zip(names, clicks)), **_named(features))["logits"]

    def encode(self, image: np.ndarray, grid: tuple[int, int] | None = None) -> Features:
        """(1, 3, H, W) float32, ImageNet-normalised -> its features, (h, w) of them."""
        grid = grid or [max(1, round(side * self.zoom / self.stride)) for side in image.shape[2:]]
        height, width = (side * self.stride for side in grid)
        large = cv2.resize(np.ascontiguousarray(image[0].transpose(1, 2, 0)), (width, height),
                           interpolation=cv2.INTER_LINEAR)
        return self._encoded(np.ascontiguousarray(large.transpose(2, 0, 1))[None])

    def _encoded(self, image: np.ndarray) -> Features:
        found = self.run("encode", image=image)
        levels = tuple(x for name, x in found.items() if name.startswith("level"))
        return Features(None, levels=levels, **{
            name: x for name, x in found.items() if not name.startswith("level")})

    def refer(self, state: State | None, image: np.ndarray, mask: np.ndarray,
              object_ids: Sequence[int]) -> State:
        features, masks, labels = reference(self, image, mask, object_ids)
        if state is None:
            state = blank(features.near.shape[1:3], len(object_ids), self.widths, _zeros)
        return self._changed("start", state, features, masks=masks, labels=labels)

    def predict(self, state: State, features: Features,
                shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        found = self.run("step", **state._asdict(), **_named(features))
        logits = np.stack([cv2.resize(channel, shape[::-1], interpolation=cv2.INTER_LINEAR)
                           for channel in found["logits"]])
        odds = np.exp(logits - logits.max(0))
        return odds / odds.sum(0), found["scores"]

    def remember(self, state: State, features: Features, probabilities: np.ndarray,
                 long: bool) -> State:
        return self._changed("remember_long" if long else "remember", state, features,
                             probabilities=probabilities)

    def _changed(self, graph: str, state: State, features: Features, **more) -> State:
        """The state after a graph."""
        return _next(state, self.run(graph, **state._asdict(), **_named(features), **more))

    def without(self, state: State, channel: int) -> State:
        state = without(state, channel)
        return _next(state, self.run("revalue", **state._asdict()))

    @staticmethod
    def saved(state: State) -> dict[str, np.ndarray]:
        return state._asdict()

    @staticmethod
    def restored(kept: dict[str, np.ndarray]) -> State:
        return State(**kept)

    @staticmethod
    def array(x: np.ndarray) -> np.ndarray:
        return x


def _next(state: State, found: dict[str, np.ndarray]) -> State:
    """With the fields that a graph returned, which are those that change."""
    return state._replace(**{name.removeprefix(NEXT): x for name, x in found.items()})


def _named(features: Features) -> dict[str, np.ndarray]:
    """The inputs of a graph that features are."""
    named = {name: x for name, x in features._asdict().items()
             if name != "levels" and x is not None}
    return named | {f"level{i}": x for i, x in enumerate(features.levels)}


def _zeros(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.int64 if name in INTEGERS else np.float32)
