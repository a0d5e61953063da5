"""Where output goes when a path is relative; a URI is never."""

import os
from pathlib import Path

from tokendiff.artifacts.locations import Location, is_uri, local_path, location
from tokendiff.errors import InputError

# Ray sets it in a submitted job, whose working directory is a temporary upload folder.
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
ROOT_VARIABLE = "TOKENDIFF_ROOT"
RUNS = "runs"  # of a pipeline's folder: a folder for each run


def output_path(path: str) -> Location:
    """An absolute path for output, or a URI.

    A relative one is taken from TOKENDIFF_ROOT if that is set, which may be a URI too, else from
    the working directory; in a submitted job, whose working directory is deleted with it, from
    ~/tokendiff.
    """
    if is_uri(path):
        return location(path)
    expanded = local_path(path)
    if expanded.is_absolute():
        return expanded
    if root := os.environ.get(ROOT_VARIABLE):
        place = location(root)
        return (place.resolve() if isinstance(place, Path) else place) / expanded
    if os.environ.get(_SUBMITTED):
        return Path.home() / "tokendiff" / expanded
    return Path.cwd() / expanded


def model_path(name: str) -> str:
    """A model's name as workers, who have another working directory, find it: the absolute path of
    a folder that is there; any other name is one of the hub, or a URI.
    """
    if is_uri(name):
        return name
    for place in (Path.cwd() / local_path(name), output_path(name)):
        if place.is_dir():
            return str(place)
    return name


def input_path(path: str, *, what: str) -> str:
    """An absolute path of something that is there.

    A relative one is looked for in the working directory, and then where output of that name goes.

    A URI stays as it is.

    Raises:
        InputError: it is in neither place.
    """
    if is_uri(path):
        return path
    places = [Path.cwd() / local_path(path), output_path(path)]
    for place in places:
        if place.exists():
            return str(place)
    looked = " and ".join(dict.fromkeys(map(str, places)))
    raise InputError(f"{what} {path}: no such folder (looked for {looked})")
