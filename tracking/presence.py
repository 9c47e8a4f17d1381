"""Where a user said that an object is not in the clip's frames. It knows no masks, only ids."""

import re
from dataclasses import dataclass, field

MARK = re.compile(r"(absent|gone)=(\d+(?:,\d+)*)")  # in place of a file name: absent=2, gone=1,3


@dataclass
class Presence:
    """What a user said of objects that are not there, by frame, as ids of objects.

    Args:
        absent: not in this frame; they may be back in the next one.
        gone: neither in this frame nor in later ones, up to the next one whose user mask shows
            them again.
        shown: in the user mask of this frame.
    """

    absent: dict[int, set[int]] = field(default_factory=dict)
    gone: dict[int, set[int]] = field(default_factory=dict)
    shown: dict[int, set[int]] = field(default_factory=dict)

    def gone_at(self, frame: int) -> set[int]:
        """The objects that are gone at a frame."""
        found: set[int] = set()
        if not self.gone:
            return found
        for other in sorted(self.gone.keys() | self.shown.keys()):
            if other > frame:
                break
            found = found - self.shown.get(other, set()) | self.gone.get(other, set())
        return found

    def missing(self, frame: int) -> set[int]:
        """The objects that are not in a frame, for either reason."""
        return self.absent.get(frame, set()) | self.gone_at(frame)

    def intervals(self, object_id: int) -> list[tuple[int, int | None]]:
        """Where an object is gone: first frame, and the first behind the last (None: no end)."""
        found: list[tuple[int, int | None]] = []
        for frame in sorted(self.gone.keys() | self.shown.keys()):
            open_ = bool(found) and found[-1][1] is None
            if object_id in self.gone.get(frame, ()) and not open_:
                found.append((frame, None))
            elif object_id in self.shown.get(frame, ()) and open_:
                found[-1] = found[-1][0], frame
        return found


def parse_mark(text: str) -> tuple[str, set[int]] | None:
    """"absent=2" or "gone=1,3" -> the word and the ids; None of anything else."""
    found = MARK.fullmatch(text)
    return (found[1], set(map(int, found[2].split(",")))) if found else None
