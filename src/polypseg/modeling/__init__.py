"""The model classes. The other files here are copied to the Hub as they are: they import no sibling package."""

from transformers import AutoConfig, AutoModelForSemanticSegmentation

from .configuration_polypseg import PolypSegConfig
from .modeling_polypseg import PolypSegForSemanticSegmentation, soft_dice_loss

AutoConfig.register(PolypSegConfig.model_type, PolypSegConfig)
AutoModelForSemanticSegmentation.register(PolypSegConfig, PolypSegForSemanticSegmentation)

__all__ = ["PolypSegConfig", "PolypSegForSemanticSegmentation", "soft_dice_loss"]
