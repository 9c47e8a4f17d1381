"""Objects that the user marked as absent from a frame, or as gone from a frame on."""

import re
from dataclasses import dataclass, field

MARK = re.compile(r"(absent|gone)=(\d+(?:,\d+)*)")  # in place of a file name: absent=2, gone=1,3


@dataclass
class Presence:
    """Which objects the user marked as absent or gone; each argument maps frames to object ids.

    Args:
        absent: not in this frame, but possibly in the next one.
        gone: neither in this frame nor in later ones, until a user mask contains them again.
        in_user_mask: contained in the user mask of this frame.
    """

    absent: dict[int, set[int]] = field(default_factory=dict)
    gone: dict[int, set[int]] = field(default_factory=dict)
    in_user_mask: dict[int, set[int]] = field(default_factory=dict)

    def gone_at(self, frame: int) -> set[int]:
        """Ids of the objects that are gone at a frame."""
        gone: set[int] = set()
        if not self.gone:
            return gone
        for other in sorted(self.gone.keys() | self.in_user_mask.keys()):
            if other > frame:
                break
            gone = gone - self.in_user_mask.get(other, set()) | self.gone.get(other, set())
        return gone

    def missing(self, frame: int) -> set[int]:
        """Ids of the objects that are not in a frame, whether absent or gone."""
        return self.absent.get(frame, set()) | self.gone_at(frame)

    def intervals(self, object_id: int) -> list[tuple[int, int | None]]:
        """Ranges [first, stop) of frames in which an object is gone.

        `stop` is None in the last range if the object doesn't come back.
        """
        ranges: list[tuple[int, int | None]] = []
        for frame in sorted(self.gone.keys() | self.in_user_mask.keys()):
            is_gone = bool(ranges) and ranges[-1][1] is None
            if object_id in self.gone.get(frame, ()) and not is_gone:
                ranges.append((frame, None))
            elif object_id in self.in_user_mask.get(frame, ()) and is_gone:
                ranges[-1] = ranges[-1][0], frame
        return ranges


def parse_mark(text: str) -> tuple[str, set[int]] | None:
    """Parse a mark: "gone=1,3" gives ("gone", {1, 3}); None if the text is not a mark."""
    match = MARK.fullmatch(text)
    return (match[1], set(map(int, match[2].split(",")))) if match else None
