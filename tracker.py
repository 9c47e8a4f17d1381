"""One video: the state of it, and the mask of its next frame, by PyTorch.

A `Tracker` has all that is known of a video, its network only weights. It knows neither files nor
clips: images come as tensors, masks leave as arrays, and what becomes of them is not its matter.
What happens from frame to frame is in `follow`.
"""

from collections.abc import Collection

import numpy as np
import torch

from follow import Follower, Step
from masks.validation import check_normalized, id_mask
from network.state import plain, restored

__all__ = ["Step", "Tracker"]


class Tracker(Follower):
    """Follows a video with a `VideoMatch`; its state can be kept and gone on from."""

    @torch.no_grad()
    def step(self, image: torch.Tensor, mask: np.ndarray | None = None,
             shape: tuple[int, int] | None = None, absent: Collection[int] = ()) -> Step:
        """As `Follower.step`; `mask` may also be bool, another integer type or a tensor.

        Raises:
            ValueError: see `Follower.step`, `check_normalized` and `id_mask`.
        """
        check_normalized(image)
        return super().step(image, None if mask is None else id_mask(mask), shape, absent)

    @torch.no_grad()
    def remove(self, object_id: int) -> None:
        """As `Follower.remove`."""
        super().remove(object_id)

    def state(self) -> dict:
        """All but network and settings, as numbers, lists and tensors, for `load_state`."""
        return {"memory": plain(self.memory), "previous": torch.from_numpy(self.previous),
                "shares": list(self.shares.items())}

    def load_state(self, state: dict) -> None:
        """Go on from where a tracker of the same network and settings was.

        Raises:
            KeyError, TypeError: not a state.
        """
        self.memory = restored(state["memory"])
        self.previous, self.shares = state["previous"].numpy(), dict(state["shares"])
