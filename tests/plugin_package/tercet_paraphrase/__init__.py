"""A loss, an objective and a sampler for Tercet, in a package of their own."""

from tercet_paraphrase.loss import SigmoidLoss
from tercet_paraphrase.objective import LabeledParaphrase
from tercet_paraphrase.sampler import LabelRunSampler

__all__ = ["LabelRunSampler", "LabeledParaphrase", "SigmoidLoss"]
