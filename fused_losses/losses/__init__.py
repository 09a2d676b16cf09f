"""One module for each kind of loss. preference: pairs."""

from .common import LossOutput
from .distillation import distillation_loss
from .preference import LOSSES, dpo_loss, preference_loss

__all__ = ["LOSSES", "LossOutput", "distillation_loss", "dpo_loss", "preference_loss"]
