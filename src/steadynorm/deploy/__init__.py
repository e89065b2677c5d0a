"""From a trained model to one that is run: every step is exact within a tolerance, or says why it is not done."""

from steadynorm.convert.change import Change as Change
from steadynorm.deploy.artefact import load as load
from steadynorm.deploy.difference import OutputDifference as OutputDifference
from steadynorm.deploy.difference import default_tolerance as default_tolerance
from steadynorm.deploy.export import export as export
from steadynorm.deploy.exported import Exported as Exported
from steadynorm.deploy.fold import Difference as Difference
from steadynorm.deploy.fold import Folded as Folded
from steadynorm.deploy.fold import fold as fold
from steadynorm.deploy.quantize import Quantized as Quantized
from steadynorm.deploy.quantize import quantize as quantize
from steadynorm.deploy.unfold import unfold as unfold
from steadynorm.deploy.verify import Comparison as Comparison
from steadynorm.deploy.verify import verify as verify

__all__ = [
    "Change",
    "Comparison",
    "Difference",
    "Exported",
    "Folded",
    "OutputDifference",
    "Quantized",
    "default_tolerance",
    "export",
    "fold",
    "load",
    "quantize",
    "unfold",
    "verify",
]
