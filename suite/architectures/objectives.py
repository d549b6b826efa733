"""What a published model is for, by the name of its class; torch is not needed for that."""

from collections.abc import Mapping
from typing import Any

OBJECTIVES = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForPreTraining": "pretraining",
    "ForConditionalGeneration": "conditional",
    "ForImageClassification": "classification",
    "ForSequenceClassification": "classification",
    "ForMaskedImageModeling": "masked",
    "ForCTC": "ctc",
    "SentenceTransformer": "contrastive",
    "CLIPModel": "contrastive",
}


def objective(config: Mapping[str, Any]) -> str | None:
    """What the published model class is trained for, as its name in config.json's `architectures` says; else None."""
    for name in stated_architectures(config.get("architectures")):
        for ending, meaning in OBJECTIVES.items():
            if name.endswith(ending):
                return meaning
    return None


def stated_architectures(architectures: Any) -> list[str]:
    """The class names in what a configuration has under `architectures`, whatever that is."""
    listed = architectures if isinstance(architectures, (list, tuple)) else []
    return [name for name in listed if isinstance(name, str) and name.isidentifier()]
