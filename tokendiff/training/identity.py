"""Which run an output_dir holds: this one or another, and whether it is finished."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.checkpoint import FINAL, KIND, STOPPED_EARLY
from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import is_committed, load_manifest, verify
from tokendiff.data.rows import TokenData
from tokendiff.errors import CorruptFileError, InputError

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

# What a run may go on with otherwise than it began. The number of steps between checkpoints is a
# result field where `on_spike: rewind` goes back to them.
_FREE = (
    *("max_train_steps", "checkpointing_steps"),
    *("on_spike", "spike_window", "spike_deviations"),
)


def run_identity(config: "TrainConfig", data: TokenData) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: all that decides the losses but the end
    and what is done about spikes.

    A run may be made longer. Its learning-rate schedule then follows the new end from there on, so
    it is not the run that would have had that length from the start. And a run that stopped at a
    spike may go on with `on_spike: skip`, as the one that was to skip from the start would.
    """
    fields = config.result_fields()
    for name in _FREE:
        fields.pop(name, None)
    return {**fields, "data": data.fingerprint}


def check_same_run(folder: Location, config: "TrainConfig", data: TokenData) -> None:
    """Raise InputError if `folder` is a checkpoint of another run than this config and data
    describe.
    """
    metadata = load_manifest(folder).metadata
    there = metadata["run"]
    here = run_identity(config, data)
    differing = [
        name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)
    ]
    if differing:
        changes = "; ".join(
            f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differing
        )
        raise InputError(
            f"output_dir {folder.parent} holds a run of another configuration ({changes}); "
            "choose another output_dir, or delete that one"
        )
    if metadata["step"] > config.max_train_steps:
        raise InputError(
            f"output_dir {folder.parent} holds a run of {metadata['step']} steps already; "
            f"max_train_steps {config.max_train_steps} is fewer; choose another output_dir"
        )


def finished_run(
    output_dir: Location,
    config: "TrainConfig",
    data: TokenData,
    *,
    warn: Callable[[str], None] = lambda message: None,
) -> Location | None:
    """`final/`, if this very run is finished and every file of it is sound.

    A run that stopped early is finished, however many steps it was to have.
    """
    final = output_dir / FINAL
    if not is_committed(final):
        return None
    try:
        verify(final, kind=KIND)
    except CorruptFileError as error:
        warn(f"{error}; making it again from the newest checkpoint")
        return None
    check_same_run(final, config, data)
    return final if has_all_steps(final, config) else None


def has_all_steps(final: Location, config: "TrainConfig") -> bool:
    """Whether nothing is left to train of the run that made a `final/`; its files are not read.

    Raises:
        CorruptFileError: the manifest is damaged.
    """
    metadata = load_manifest(final).metadata
    return metadata["step"] == config.max_train_steps or STOPPED_EARLY in metadata
