"""`steadynorm doctor`, `explain` and `undo`."""

from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steadynorm.cli.options import (
    BatchSizeOption,
    OutOption,
    RecipeName,
    SeedOption,
    TracebackOption,
    WeightsOption,
    words,
)
from steadynorm.cli.output import CLEAN, FINDINGS, Format, as_json, output, say, worded, working, writing
from steadynorm.cli.usage import format_among
from steadynorm.errors import InputError
from steadynorm.report import Block, Code, Document, Paragraph, ensure_writable, terminal

if TYPE_CHECKING:
    from steadynorm.cli.repaired import Repaired
    from steadynorm.doctor import Diagnosis, Suppression

FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        parser=format_among(list(Format)),
        metavar="FORMAT",
        help="text, json, html, sarif or github; text unless --out ends in .json, .html or .sarif.",
    ),
]
EXTRA_FORMATS = (Format.SARIF, Format.GITHUB)


def doctor(
    recipe: RecipeName,
    weights: WeightsOption = None,
    select: Annotated[str, typer.Option(help="Only these rules, or all that begin so: SN104,SN2.")] = "",
    ignore: Annotated[str, typer.Option(help="All but these rules.")] = "",
    batch_size: BatchSizeOption = 32,
    seed: SeedOption = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look at the model alone: run no data, train nothing.")
    ] = False,
    fix: Annotated[
        Path | None, typer.Option(help="Write the weights, safely repaired, to this .safetensors or .pt file.")
    ] = None,
    unsafe_fixes: Annotated[
        bool, typer.Option("--unsafe-fixes", help="With --fix: also what changes how the model computes or trains.")
    ] = False,
    undo: Annotated[
        Path | None, typer.Option(help="With --fix: a .safetensors file that takes the repair back.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="Show only what is new or worse than in this file.")] = None,
    write_baseline: Annotated[
        Path | None, typer.Option(help="Write what is found to this file, and end with exit code 0.")
    ] = None,
    format: FormatOption = None,
    out: OutOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Find the normalization faults of a model, each proved by a measurement. Exit code 1 if there are any."""
    with worded(traceback):
        from steadynorm import doctor as clinic
        from steadynorm.cli import repaired
        from steadynorm.doctor import suppression
        from steadynorm.recipe import load

        result = output(format, out, f"doctor-{Path(recipe).stem}", EXTRA_FORMATS)
        _ensure_sense(fix, undo, unsafe_fixes, quick)
        if fix is not None:
            repaired.ensure_possible(fix, undo)
        if write_baseline is not None:
            with writing(write_baseline):
                ensure_writable(write_baseline)
        settings = suppression.settings_near(Path(recipe).parent if recipe.endswith(".py") else Path())
        wanted, unwanted = words(select) or settings.select, words(ignore) or settings.ignore
        kept = _suppressions(settings, baseline, write_baseline)
        with working(f"doctor {recipe}") as advance:
            loaded = load(recipe, weights, may_lack_statistics=True, may_hold_more=True)
            model, found = clinic.examine_recipe(
                loaded,
                batch_size=batch_size,
                seed=seed,
                quick=quick,
                select=wanted,
                ignore=unwanted,
                on_progress=advance,
            )
            found = clinic.suppress(found, kept)
        repair = None
        if fix is not None:
            with working(f"repair {recipe}"):
                repair = repaired.repair(
                    model, found, loaded, fix, batch_size=batch_size, unsafe=unsafe_fixes, undo=undo, keep=kept
                )
            say(f"the repaired weights are in {fix}." + (f" {undo} takes the repair back." if undo else ""))
        if write_baseline is not None:
            with writing(write_baseline):
                count = suppression.write_baseline(found, write_baseline)
            say(f"{write_baseline} has what was found, {count} in all; --baseline {write_baseline} shows what is new.")
        _write(result, found, repair)
        is_clean = (repair.after if repair else found).is_clean
        raise typer.Exit(CLEAN if is_clean or write_baseline is not None else FINDINGS)


def _ensure_sense(fix: Path | None, undo: Path | None, unsafe: bool, quick: bool) -> None:
    """Options that only mean something beside others."""
    if fix is None and (undo is not None or unsafe):
        given = "--unsafe-fixes" if unsafe else "--undo"
        raise InputError(f"{given} goes with --fix FILE, which says where the repaired weights are written.")
    if fix is not None and quick:
        raise InputError("--quick runs no data, and --fix needs some: leave one of them out.")


def _suppressions(settings: Any, baseline: Path | None, written: Path | None) -> "tuple[Suppression, ...]":
    """Those of pyproject.toml, and those of the baseline unless it is being written."""
    from steadynorm.doctor import suppression

    file = baseline or settings.baseline
    if file is None or (written is not None and baseline is None):
        return tuple(settings.suppressions)
    return (*settings.suppressions, *suppression.read_baseline(file))


def _write(result: Any, found: "Diagnosis", repair: "Repaired | None") -> None:
    """The result in the format that was asked for; after a repair with what became of it."""
    if result.format in EXTRA_FORMATS:
        last = repair.after if repair else found
        result.write_text(as_json(last.to_sarif()) if result.format is Format.SARIF else last.to_github())
        return
    data = found.to_dict()
    document = found.page() if result.format is Format.HTML else found.document()
    if repair is not None:
        data["repair"] = repair.to_dict()
        document = repair.document(document) if result.format is not Format.HTML else repair.page(found)
    result.write([document], data, document.title)


def explain(
    code: Annotated[str, typer.Argument(metavar="CODE", help="The code of a rule, such as SN104.")],
    traceback: TracebackOption = False,
) -> None:
    """Say why a rule exists, with an example that it finds and one that it does not."""
    with worded(traceback):
        from steadynorm import doctor as clinic

        terminal.show(explanation(clinic.explain(code)), terminal.console())


def explanation(text: str) -> Document:
    """The documentation of a rule as a document: paragraphs flow to the width of the terminal, examples stay."""
    name, advice, *parts = text.strip().split("\n\n")
    blocks: list[Block] = []
    for part in parts:
        head, _, body = part.partition("\n")
        if body.startswith(" "):
            blocks += [Paragraph(head), Code(dedent(body))]
        else:
            blocks.append(Paragraph(" ".join(part.split())))
    return Document(name, " ".join(advice.split()), "note", blocks)


def undo(
    file: Annotated[Path, typer.Argument(metavar="UNDO", help="What doctor --fix … --undo FILE wrote.")],
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="The repaired weights.")],
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of WEIGHTS.")] = None,
    traceback: TracebackOption = False,
) -> None:
    """Take a repair back, bit for bit: the weights become what they were."""
    with worded(traceback):
        from steadynorm.cli import repaired

        count, in_code = repaired.take_back(file, weights, out or weights)
        say(f"{count} tensors are as they were, in {out or weights}.")
        for each in in_code:
            say(f"weights do not hold this; write in the code: {each}.")
