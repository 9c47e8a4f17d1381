"""Save and load networks as self-describing checkpoints, which need no flags to be loaded."""

import hashlib
import io
from pathlib import Path
from typing import Self

import torch
from torch import nn

from media import files


class Checkpointed(nn.Module):
    """Base class of networks that a checkpoint can rebuild from its configuration.

    Attributes:
        metadata: what is saved with the weights, such as `held_out_iou`; numbers and strings.
        is_loaded: whether the weights come from a checkpoint.
    """

    def __init__(self):
        super().__init__()
        self.metadata: dict = {}
        self.is_loaded = False

    def configuration(self) -> dict:
        """The arguments, besides the weights, that rebuild the network: plain values only."""
        raise NotImplementedError

    @classmethod
    def configured(cls, config: dict) -> Self:
        """Build a network from its `configuration`; raises a ValueError if that is invalid."""
        raise NotImplementedError

    @classmethod
    def upgrade(cls, config: dict, weights: dict) -> None:
        """Convert the contents of an earlier version's checkpoint, in place."""

    def save(self, path: str | Path, **metadata) -> None:
        """Write weights, configuration and metadata to a checkpoint."""
        save(path, {"config": self.configuration(), "facts": metadata, "model": self.state_dict()})

    def digest(self) -> str:
        """Hexadecimal SHA-256 of weights and configuration, which identifies the network."""
        digest = hashlib.sha256(repr(self.configuration()).encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a checkpoint that `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a checkpoint, one of an incompatible version, or one whose weights are
                not finite (a training that diverged).
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected a checkpoint written by "
                                    "--model_save")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            # in place: a copy of the weights would lack PyTorch's metadata, without which some of
            # them may be missing
            cls.upgrade(checkpoint["config"], checkpoint["model"])
            model = cls.configured(checkpoint["config"])
            try:
                model.load_state_dict(checkpoint["model"])
            except RuntimeError as error:  # its message lists every parameter, hundreds of lines
                raise ValueError("of another version, whose weights differ: train again, or "
                                 "use the one in models/") from error
            model.metadata, model.is_loaded = dict(checkpoint["facts"]), True
            for name, tensor in model.state_dict().items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} holds values that are not finite")
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ValueError(f"{path}: not a checkpoint that this version reads "
                             f"({reason})") from error
        return model


def save(path: str | Path, content: dict) -> None:
    """`torch.save`, but atomic and durable: after a power cut the file is the old or the new one.

    Raises:
        OSError: see `files.write`.
    """
    buffer = io.BytesIO()  # torch.save to a full disk raises a RuntimeError, not an OSError
    torch.save(content, buffer)
    files.write(path, buffer.getvalue(), durable=True)
