"""Where output goes when a path is relative."""

import os
from pathlib import Path

# Ray sets it in a submitted job, whose working directory is a temporary upload folder.
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
ROOT_VARIABLE = "TOKENDIFF_ROOT"


def output_path(path: str) -> Path:
    """An absolute path for output.

    A relative one is taken from TOKENDIFF_ROOT if that is set, else from the working directory; in
    a submitted job, whose working directory is deleted with it, from ~/tokendiff.
    """
    expanded = Path(path).expanduser()
    if expanded.is_absolute():
        return expanded
    if root := os.environ.get(ROOT_VARIABLE):
        return Path(root).expanduser().resolve() / expanded
    if os.environ.get(_SUBMITTED):
        return Path.home() / "tokendiff" / expanded
    return Path.cwd() / expanded
