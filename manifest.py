"""What a results folder holds: what made it, and the scores of the sequences that are finished."""

import json
from pathlib import Path

import files
from davis import Sequence
from metrics import SequenceScore


class Manifest:
    """The file `manifest.json` of a results folder, kept up to date after each sequence.

    Args:
        folder: None keeps nothing on disk.
        made_by: flags, versions and weights, all that changes the results.
        overwrite: forget what was finished before.

    Raises:
        ValueError: the folder's results were made by something else.
    """

    def __init__(self, folder: Path | None, made_by: dict[str, str], overwrite: bool = False):
        self.folder, self.made_by = folder, made_by
        self.path = folder and folder / "manifest.json"
        self.sequences: dict[str, dict] = {}
        if self.path and self.path.is_file() and not overwrite:
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            before, self.sequences = dict(content["made_by"]), dict(content["sequences"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not a manifest of this toolkit (--overwrite starts "
                             "over)") from error
        for name in sorted({*before, *self.made_by}):
            old, new = before.get(name, "none"), self.made_by.get(name, "none")
            if old != new:
                raise ValueError(f"{self.folder}: holds results of other {name} ({old!r}, now "
                                 f"{new!r}): name another folder, or start over (--overwrite)")

    def finished(self, sequence: Sequence, video: bool) -> bool:
        """Whether the scores are known, and every mask is there, and the video if wanted."""
        return (sequence.name in self.sequences
                and all((self.folder / sequence.name / mask.name).is_file()
                        for mask in sequence.masks)
                and (not video or (self.folder / f"{sequence.name}.mp4").is_file()))

    def finish(self, sequence: Sequence, score: SequenceScore, seconds: float) -> None:
        self.sequences[sequence.name] = {"seconds": seconds, "j": score.j, "f": score.f}
        if self.path:
            content = {"made_by": self.made_by, "sequences": self.sequences}
            files.write(self.path, json.dumps(content, indent=1))

    def score(self, sequence: Sequence) -> SequenceScore:
        entry = self.sequences[sequence.name]
        score = SequenceScore([])
        score.j, score.f = ({int(i): values for i, values in entry[key].items()} for key in "jf")
        return score

    def seconds(self, sequences: list[Sequence]) -> float:
        """How long these sequences took."""
        return sum(self.sequences[sequence.name]["seconds"] for sequence in sequences)
