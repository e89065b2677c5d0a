"""What goes wrong around normalization in a training loop, made right: one file a subject."""

from steadynorm.training.recalibrate import recalibrate_
from steadynorm.training.statistics import StatisticsReport

__all__ = ["StatisticsReport", "recalibrate_"]
