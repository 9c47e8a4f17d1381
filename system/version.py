"""The version of this toolkit, which run metadata record."""

import subprocess
from functools import cache
from pathlib import Path

__version__ = "1.0.0"


@cache
def commit() -> str | None:
    """The Git commit of the toolkit's own folder, "-dirty" if a tracked file differs from it.

    None where the folder is not a Git checkout or Git is missing. The folder is named explicitly:
    Git would otherwise take a checkout that merely contains it.
    """
    root = Path(__file__).resolve().parents[1]
    try:
        return subprocess.run(
            ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}",
             "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
