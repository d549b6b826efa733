"""A model that is in no registry: a SOURCE, or a series of checkpoints, that was named on the command line."""

from typing import Any

from deadbench.runners.jobs.job import Overrides, SourceError
from deadbench.suite.checkpoints.series import Series
from deadbench.suite.errors import CheckpointError, one_source
from deadbench.suite.inputs.specs import MODALITIES
from deadbench.suite.registry.entries import Model
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_url

_SOUND_KEYS = ("num_mel_bins", "input_feat_per_channel", "sampling_rate", "feat_extract_norm")


def own_model(named: str | Series, overrides: Overrides) -> Model:
    """The model that `named` is, its modality told by the input or the configuration.

    Raises:
        SourceError: it cannot be opened.
    """
    series = named if isinstance(named, Series) else None
    source = named.source if isinstance(named, Series) else named
    try:
        with one_source(source):
            checkpoint = overrides.opened(source, series.names[0] if series else None)
            config = checkpoint.config()
    except CheckpointError as error:
        raise SourceError(f"{error} (and no model of that id is in the registry)") from error
    told = MODALITIES.get(overrides.input.partition(":")[0], ()) if overrides.input else ()
    modality = told[0] if len(told) == 1 else _main_modality(config)
    if series is not None:
        return Model.model_construct(id=shown_place(series.name), source=source, modality=modality)
    revision = None if "@" in source else checkpoint.revision
    return Model.model_construct(
        id=shown_place(source), source=source, revision=None if is_url(source) else revision, modality=modality
    )


def _main_modality(config: dict[str, Any]) -> str:
    """What a model without a registry entry takes first, by its configuration: text wherever there is a text tower."""
    if any(key in config for key in ("text_config", "llm_config", "thinker_config")):
        return "text"
    if any(key in config for key in _SOUND_KEYS):
        return "audio"
    pictures = any(key in config for key in ("image_size", "num_channels", "patch_size", "backbone_config"))
    # A vocabulary alone may be that of the visual tokens which a picture is turned into.
    reads_text = "vocab_size" in config and ("max_position_embeddings" in config or "image_size" not in config)
    return "image" if pictures and not reads_text else "text"
