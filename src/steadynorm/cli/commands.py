"""The commands. Each loads what it needs when it runs, so that `--help` does not wait for torch."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Annotated

import typer

import steadynorm
from steadynorm.cli.output import CLEAN, FINDINGS, Format, output, say, worded, working, writing
from steadynorm.cli.usage import Group, format_named, positive, whole
from steadynorm.errors import InputError
from steadynorm.report import Block, Code, Document, Paragraph, Table, ensure_writable, terminal

if TYPE_CHECKING:
    from steadynorm.lab import Study

app = typer.Typer(
    name="steadynorm",
    cls=Group,
    help="Find and repair the normalization faults of a PyTorch model, and see how it depends on the batch size.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The grid of `demo`: where batch norm is at its weakest, in about two minutes on two cores that do nothing else.
DEMO_BATCH_SIZES = (2, 4, 8, 16, 32)
DEMO_NORMS = ("batch", "group", "layer", "none")
DEMO_SEEDS = 3
DEMO_STEPS = 80

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (digits), a .py file or a module.")]
FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        parser=format_named,
        metavar="FORMAT",
        help="text, json or html; text unless --out ends in .json or .html.",
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the result to this file.")]
TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show the whole traceback of an error.")]
SeedOption = Annotated[int, typer.Option(parser=whole(0), metavar="NUMBER", help="Of the training and of the data.")]


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="steadynorm")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"steadynorm {steadynorm.__version__}")
        raise typer.Exit(CLEAN)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def doctor(
    recipe: RecipeName,
    weights: Annotated[Path | None, typer.Option(help="A .safetensors or .pt file for the recipe's model.")] = None,
    select: Annotated[str, typer.Option(help="Only these rules, or all that begin so: SN104,SN2.")] = "",
    ignore: Annotated[str, typer.Option(help="All but these rules.")] = "",
    batch_size: Annotated[int, typer.Option(parser=whole(1), metavar="NUMBER", help="Samples per batch.")] = 32,
    seed: SeedOption = 0,
    fix: Annotated[
        Path | None, typer.Option(help="Write the weights, safely repaired, to this .safetensors or .pt file.")
    ] = None,
    format: FormatOption = None,
    out: OutOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Find the normalization faults of a model, each proved by a measurement. Exit code 1 if there are any."""
    with worded(traceback):
        from steadynorm import doctor as clinic
        from steadynorm.cli import repaired
        from steadynorm.recipe import load

        result = output(format, out, f"doctor-{Path(recipe).stem}")
        if fix is not None:
            repaired.ensure_possible(fix)
        wanted, unwanted = words(select), words(ignore)
        with working(f"doctor {recipe}") as advance:
            loaded = load(recipe, weights)
            model, diagnosis = clinic.examine_recipe(
                loaded, batch_size=batch_size, seed=seed, select=wanted, ignore=unwanted, on_progress=advance
            )
            document, data = diagnosis.document(), diagnosis.to_dict()
        if fix is not None:
            with working(f"repair {recipe}"):
                repair = repaired.repair(
                    model, diagnosis, loaded, fix, batch_size=batch_size, select=wanted, ignore=unwanted
                )
            document, data, diagnosis = repair.document(document), {**data, "repair": repair.to_dict()}, repair.after
            say(f"the repaired weights are in {fix}.")
        result.write([document], data, document.title)
        raise typer.Exit(CLEAN if diagnosis.is_clean else FINDINGS)


@app.command()
def lab(
    recipe: RecipeName,
    batch_sizes: Annotated[str, typer.Option(help="Whole numbers with commas between them.")] = "2,4,8,16,32,64",
    norms: Annotated[str, typer.Option(help="Any of batch, group, layer, none.")] = "batch,group,layer,none",
    seeds: Annotated[
        int, typer.Option(parser=whole(1), metavar="NUMBER", help="How many times each cell is trained.")
    ] = 3,
    steps: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="NUMBER", help="Training steps at batch size 32.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(parser=positive, metavar="NUMBER", help="Learning rate at batch size 32; else the recipe's."),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Where finished cells are kept.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(parser=whole(1), metavar="NUMBER", help="Processes; without it one per core, up to four."),
    ] = None,
    format: FormatOption = None,
    out: OutOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Train a model over batch sizes and norms, and say from which batch size on which norm serves it.

    Cells are stored as they finish: stopped and started again, the same command skips those.
    """
    kept = store or Path("reports") / f"lab-{Path(recipe).stem}.jsonl"
    with worded(traceback, f"Finished cells are in {kept}: the same command goes on from there."):
        sizes = numbers(batch_sizes, "--batch-sizes")
        result = output(format, out, f"lab-{Path(recipe).stem}")
        with writing(kept):
            ensure_writable(kept)
        study = run_lab(
            recipe,
            batch_sizes=sizes,
            norms=words(norms),
            seeds=seeds,
            store=kept,
            steps=steps,
            lr=lr,
            workers=workers,
        )
        document = study.document()
        result.write([document], study.to_dict(), document.title)
        raise typer.Exit(FINDINGS if document.status == "error" else CLEAN)


def run_lab(
    recipe: str,
    *,
    batch_sizes: Sequence[int],
    norms: Sequence[str],
    seeds: int,
    store: Path,
    steps: int | None = None,
    lr: float | None = None,
    workers: int | None = None,
) -> "Study":
    """Run the lab under a progress bar with its own estimate of the time left: small batches take longer."""
    from steadynorm import lab as laboratory
    from steadynorm.lab.trials import DEFAULT_STEPS
    from steadynorm.recipe import load

    with working(f"lab {recipe}", "cells") as advance:
        return laboratory.run(
            load(recipe),
            batch_sizes=batch_sizes,
            norms=norms,
            seeds=seeds,
            store=store,
            steps=steps or DEFAULT_STEPS,
            lr=lr,
            workers=workers,
            on_progress=lambda at: advance(at.done, at.total, at.seconds_left),
        )


@app.command()
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


@app.command()
def backends() -> None:
    """Show which kernels can run here, for which tensors, and why not."""
    from steadynorm.kernels import status

    rows = [(line.name, "yes" if line.is_available else "no", line.reason) for line in status()]
    verdict = "The first kernel that takes a tensor is used."
    table = Table("", ("kernel", "runs here", "takes, or why not"), rows)
    terminal.show(Document("Kernels", verdict, "ok", (table,)), terminal.console())


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("demo"),
    traceback: TracebackOption = False,
) -> None:
    """Run the doctor and the lab on real data that comes along, and write one HTML report."""
    store = folder / "lab-digits.jsonl"
    with worded(traceback, f"Finished cells are in {store}: the same command goes on from there."):
        from steadynorm import doctor as clinic
        from steadynorm.recipe import load

        result = output(Format.HTML, folder / "report.html", "demo")
        console, documents = terminal.console(), []
        for name in ("digits", "digits_faulty"):
            with working(f"doctor {name}") as advance:
                _, diagnosis = clinic.examine_recipe(load(name), on_progress=advance)
            documents.append(diagnosis.document())
            terminal.show(documents[-1], console)
        study = run_lab(
            "digits",
            batch_sizes=DEMO_BATCH_SIZES,
            norms=DEMO_NORMS,
            seeds=DEMO_SEEDS,
            store=store,
            steps=DEMO_STEPS,
        )
        documents.append(study.document())
        terminal.show(documents[-1], console)
        result.write(documents, {}, "steadynorm on handwritten digits")


def words(text: str) -> tuple[str, ...]:
    """The words of a list with commas; spaces do not matter."""
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers of a list with commas.

    Raises:
        InputError: something in it is none.
    """
    wrong = [word for word in words(text) if not word.isdecimal()]
    if wrong or not words(text):
        raise InputError(f"{option} got {text!r}: expected whole numbers with commas between them, such as 2,4,8.")
    return tuple(map(int, words(text)))
