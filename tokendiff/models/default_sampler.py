"""The sampler of a model for which the user names none."""

from tokendiff.artifacts.model_folders import local_model, revision_of
from tokendiff.errors import input_errors
from tokendiff.models.families import family_of, type_of


def default_sampler(model_id: str) -> str:
    """The sampler of the model's family (`Family.sampler`), read from its config.json alone.

    Args:
        model_id: a folder, a URI or a hub name.

    Raises:
        InputError: the config cannot be opened.
    """
    from transformers import PreTrainedConfig

    remedy = "give a folder that holds its config.json, a hub name, or a checkpoint_path"
    with input_errors(f"model_id {model_id!r} cannot be opened", remedy):
        fields, _ = PreTrainedConfig.get_config_dict(local_model(model_id), **revision_of(model_id))
        return family_of(type_of(fields)).sampler
