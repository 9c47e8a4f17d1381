"""The toolkit's version and Git commit, for run metadata."""

import subprocess
from functools import cache
from pathlib import Path

__version__ = "1.0.0"


@cache
def commit() -> str | None:
    """The Git commit of this checkout, followed by "-dirty" if a tracked file was changed.

    None if the toolkit's folder is not a Git checkout, or Git is missing or takes over 10 s. The
    folder is passed explicitly, as Git would otherwise use a checkout that contains it.
    """
    root = Path(__file__).resolve().parents[1]
    try:
        return subprocess.run(
            ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}",
             "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
