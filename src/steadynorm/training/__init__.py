"""What goes wrong around normalization in a training loop, made right: one file a subject."""

from steadynorm.training.adapt import adapt_, adapted
from steadynorm.training.average import AveragedModel
from steadynorm.training.merge import merge_ranks_, merge_statistics
from steadynorm.training.microbatch import MicroBatches, microbatch
from steadynorm.training.microbatch_pooled import pooled_statistics
from steadynorm.training.recalibrate import recalibrate_
from steadynorm.training.statistics import StatisticsReport

__all__ = [
    "AveragedModel",
    "MicroBatches",
    "StatisticsReport",
    "adapt_",
    "adapted",
    "merge_ranks_",
    "merge_statistics",
    "microbatch",
    "pooled_statistics",
    "recalibrate_",
]
