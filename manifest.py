"""What a results folder holds: what made it, and the scores of the sequences that are finished.

`manifest.json` tells what made it. The scores of a sequence lie in `NAME.scores.json`, so that
several processes may work into one folder.
"""

import json
from contextlib import suppress
from pathlib import Path

import distributed
from davis import Sequence
from media import files
from metrics import SequenceScore

SCORES = ".scores.json"


class Manifest:
    """The record of a results folder, kept up to date after each sequence.

    Args:
        folder: None keeps nothing on disk.
        made_by: flags, versions and weights, all that changes the results.
        overwrite: forget what was finished before.

    Raises:
        ValueError: the folder's results were made by something else.
    """

    def __init__(self, folder: Path | None, made_by: dict[str, str], overwrite: bool = False):
        self.folder, self.made_by = folder, made_by
        self.sequences: dict[str, dict] = {}
        if folder is None:
            return
        path = folder / "manifest.json"
        if overwrite:
            for old in (*folder.glob(f"*{SCORES}"), path):
                old.unlink(missing_ok=True)
        elif path.is_file():
            self._compare(_read(path), made_by)
            self.sequences = {old.name.removesuffix(SCORES): _read(old)
                              for old in folder.glob(f"*{SCORES}")}

    def _compare(self, before: dict[str, str], now: dict[str, str]) -> None:
        for name in sorted({*before, *now}):
            old, new = before.get(name, "none"), now.get(name, "none")
            if old != new:
                raise ValueError(f"{self.folder}: holds results of other {name} ({old!r}, now "
                                 f"{new!r}): name another folder, or start over (--overwrite)")

    def finished(self, sequence: Sequence, video: bool) -> bool:
        """Whether the scores are known, and every mask is there, and the video if wanted."""
        return (sequence.name in self.sequences
                and all((self.folder / sequence.name / sequence.mask_name(frame)).is_file()
                        for frame in sequence.wanted)
                and (not video or (self.folder / f"{sequence.name}.mp4").is_file()))

    def finish(self, sequence: Sequence, score: SequenceScore, seconds: float) -> None:
        entry = {"seconds": seconds, "j": score.j, "f": score.f}
        self.sequences[sequence.name] = entry
        if self.folder:
            files.write(self.folder / "manifest.json", json.dumps(self.made_by, indent=1))
            files.write(self.folder / f"{sequence.name}{SCORES}", json.dumps(entry))

    def share(self) -> None:
        """Learn what the other processes of the job finished."""
        for sequences in distributed.gather(self.sequences):
            self.sequences |= sequences

    def score(self, sequence: Sequence) -> SequenceScore:
        entry = self.sequences[sequence.name]
        score = SequenceScore([])
        score.j, score.f = ({int(i): values for i, values in entry[key].items()} for key in "jf")
        return score

    def seconds(self, sequences: list[Sequence]) -> float:
        """How long these sequences took."""
        return sum(self.sequences[sequence.name]["seconds"] for sequence in sequences)


def _read(path: Path) -> dict:
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    raise ValueError(f"{path}: not a manifest of this toolkit (--overwrite starts over)")
