"""A network kept in a file that needs no flags to be loaded; which network, it does not know."""

import hashlib
import io
from pathlib import Path
from typing import Self

import torch
from torch import nn

from media import files


class Checkpointed(nn.Module):
    """A network that can be built again from its configuration.

    Attributes:
        facts: numbers and texts kept beside the weights, such as `held_out_iou`.
    """

    def __init__(self):
        super().__init__()
        self.facts: dict = {}

    def configuration(self) -> dict:
        """What it takes, beside the weights, to build the network again."""
        raise NotImplementedError

    @classmethod
    def configured(cls, config: dict) -> Self:
        """A network of a `configuration`; raises a ValueError where that can't be."""
        raise NotImplementedError

    def save(self, path: str | Path, **facts) -> None:
        """Write weights, configuration and facts."""
        save(path, {"config": self.configuration(), "facts": facts, "model": self.state_dict()})

    def digest(self) -> str:
        """SHA-256 of weights and configuration, in hexadecimal: equal for equal networks only."""
        found = hashlib.sha256(repr(self.configuration()).encode())
        for name, tensor in self.state_dict().items():
            found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Build what `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a checkpoint of this toolkit, or one that it can't read any more.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected a checkpoint written by "
                                    "--model_save")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            model = cls.configured(checkpoint["config"])
            try:
                model.load_state_dict(checkpoint["model"])
            except RuntimeError as error:  # names or sizes, which may be hundreds
                raise ValueError("of another version, whose weights are others: train again, or "
                                 "take the one in models/") from error
            model.facts = dict(checkpoint["facts"])
            for name, tensor in model.state_dict().items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} holds values that are not finite")
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ValueError(f"{path}: not a checkpoint that this version reads "
                             f"({reason})") from error
        return model


def save(path: str | Path, content: dict) -> None:
    """Write what `torch.save` writes, whole or not at all, even after a power cut.

    Raises:
        OSError: as `files.write`.
    """
    buffer = io.BytesIO()  # on a full disk torch.save itself raises a RuntimeError
    torch.save(content, buffer)
    files.write(path, buffer.getvalue(), durable=True)
