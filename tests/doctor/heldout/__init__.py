"""Models that the rules had never seen when they were written: faults with healthy twins, and healthy controls."""

from tests.doctor.heldout import controls, images, second, second_controls, segmentation, series, tables, text
from tests.doctor.heldout.held import FAULTS, HEALTHY, Held

__all__ = [
    "FAULTS",
    "HEALTHY",
    "Held",
    "controls",
    "images",
    "second",
    "second_controls",
    "segmentation",
    "series",
    "tables",
    "text",
]
