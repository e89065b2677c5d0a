"""What goes wrong around normalization in a training loop, made right: one file a subject."""

from steadynorm.training.adapt import adapt_, adapted
from steadynorm.training.average import AveragedModel
from steadynorm.training.freeze import freeze_, unfreeze_
from steadynorm.training.merge import merge_ranks_, merge_statistics
from steadynorm.training.microbatch import MicroBatches, microbatch
from steadynorm.training.microbatch_pooled import pooled_statistics
from steadynorm.training.param_groups import param_groups
from steadynorm.training.recalibrate import recalibrate_
from steadynorm.training.statistics import StatisticsReport
from steadynorm.training.transaction import transaction

__all__ = [
    "AveragedModel",
    "MicroBatches",
    "StatisticsReport",
    "adapt_",
    "adapted",
    "freeze_",
    "merge_ranks_",
    "merge_statistics",
    "microbatch",
    "param_groups",
    "pooled_statistics",
    "recalibrate_",
    "transaction",
    "unfreeze_",
]
