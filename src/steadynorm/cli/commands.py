"""The commands. Each loads what it needs when it runs, so that `--help` does not wait for torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import steadynorm
from steadynorm.cli import deployment, examining
from steadynorm.cli.options import FormatOption, OutOption, RecipeName, TracebackOption, words
from steadynorm.cli.output import CLEAN, FINDINGS, Format, output, worded, working, writing
from steadynorm.cli.usage import Group, positive, whole
from steadynorm.errors import InputError
from steadynorm.report import Document, Table, ensure_writable, terminal

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


app.command()(examining.doctor)


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


app.command()(examining.explain)
app.command()(examining.undo)
for _verb in deployment.VERBS:
    app.command()(_verb)


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
            terminal.show(diagnosis.document(), console)
            documents.append(diagnosis.page())
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


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers of a list with commas.

    Raises:
        InputError: something in it is none.
    """
    wrong = [word for word in words(text) if not word.isdecimal()]
    if wrong or not words(text):
        raise InputError(f"{option} got {text!r}: expected whole numbers with commas between them, such as 2,4,8.")
    return tuple(map(int, words(text)))
