"""Finds the normalization faults of a model, proves each by a measurement, and repairs what can be repaired safely."""

from steadynorm.doctor.diagnosis import Diagnosis
from steadynorm.doctor.examination import examine, examine_recipe
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.doctor.repairs import repair
from steadynorm.doctor.rules import RULES, explain

__all__ = ["RULES", "Diagnosis", "Finding", "Fix", "examine", "examine_recipe", "explain", "repair"]
