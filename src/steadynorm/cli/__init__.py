"""The command line: `steadynorm doctor`, `lab`, `explain`, `backends` and `demo`, and for deployment `recalibrate`,
`fold`, `convert`, `export` and `verify`.

Exit codes: 0 clean, 1 findings, 2 misuse (one sentence on standard error), 3 a fault of steadynorm itself,
130 interrupted. Results go to standard output, everything else to standard error.
"""

import sys

try:
    import rich as _rich  # noqa: F401
    import typer as _typer  # noqa: F401
except ImportError:
    sys.stderr.write("steadynorm: the command line needs typer and rich, the extra [cli]: pip install typer rich\n")
    sys.exit(2)

from steadynorm.cli.commands import app, main

__all__ = ["app", "main"]
