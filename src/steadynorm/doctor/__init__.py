"""Finds the normalization faults of a model, proves each by a measurement, and repairs what can be repaired safely."""

from steadynorm.doctor.diagnosis import Diagnosis, Suppressed
from steadynorm.doctor.examination import examine, examine_recipe
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.doctor.monitor import Monitor, watch
from steadynorm.doctor.repairs import Repair, repair
from steadynorm.doctor.rules import RULES, explain
from steadynorm.doctor.suppression import Suppression, suppress
from steadynorm.doctor.undo import undo_

__all__ = [
    "RULES",
    "Diagnosis",
    "Finding",
    "Fix",
    "Monitor",
    "Repair",
    "Suppressed",
    "Suppression",
    "examine",
    "examine_recipe",
    "explain",
    "repair",
    "suppress",
    "undo_",
    "watch",
]
