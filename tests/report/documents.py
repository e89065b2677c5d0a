"""Documents that the tests of the renderers draw, and strings that must not be taken for anything but text."""

from steadynorm.report import Card, Chart, Code, Document, Entry, Heading, Paragraph, Parts, Series, Table

SIZES = (2, 4, 8)
HOSTILE = (
    "<script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title = \'owned\'">',
    "</script></style></title><b>out</b>",
    "{{ 7 * 7 }} {% raw %}",
    "[bold red]markup[/bold red] [link=https://example.com]x[/link]",
    "&lt;b&gt; ]]> --> <!--",
)

FINDINGS = Document(
    "Doctor: small",
    "1 error in 3 layers.",
    "error",
    (
        Heading("Findings"),
        Card(
            "error",
            "SN301",
            "running statistics far from the data",
            "stages.1.block.0.norm2",
            "With this layer's statistics taken from the data the loss falls from 2.31 to 0.14.",
            (("loss now", 2.3123), ("channels", 16)),
            "Recalibrate the running statistics.",
        ),
        Chart(
            "Loss by layer",
            "layer",
            "loss",
            (Series("loss", ("stem.1", "stages.1.block.0.norm2", "head"), (2.0, 0.5, None)),),
            kind="bar",
        ),
        Code("steadynorm explain SN301"),
    ),
    {"cpu": "Example 9000", "torch": "2.13.0", "recipe": "small"},
)

STUDY = Document(
    "Lab: small",
    "From batch size 4 on batch norm is within noise of the best.",
    "ok",
    (
        Paragraph("Each cell trained for 40 steps."),
        Chart(
            "Accuracy by batch size",
            "batch size",
            "accuracy",
            (
                Series("batch", SIZES, (0.5, 0.75, 1.0), (0.45, 0.7, 0.98), (0.55, 0.8, 1.0)),
                Series("group", SIZES, (0.9, None, 0.95), (0.89, None, 0.94), (0.91, None, 0.96)),
            ),
            log_x=True,
            note="Mean of 3 seeds.",
            spread="Bars at the points: lowest and highest seed.",
        ),
        Table("Cells", ("norm", "batch size", "accuracy"), (("batch", 2, 0.5), ("batch", 4, 0.75), ("none", 8, None))),
    ),
    {"cpu": "Example 9000", "torch": "2.13.0", "recipe": "other"},
)

HEALTHY = Chart("Means", "of the data", "stored", (Series("channels", (1.0,), (1.0,)),), kind="scatter")
NETWORK = Document(
    "Doctor: network",
    "1 error in 2 layers.",
    "error",
    (
        Parts(
            "The network",
            (
                Entry("stem.0", "Conv2d 8×6×6"),
                Entry(
                    "stem.1",
                    "BatchNorm2d 8×6×6",
                    "error",
                    (
                        Card(
                            "error", "SN203", "stale", "stem.1", "Stale.", (), "Recalibrate.", "Too slow.", "net.py:7"
                        ),
                        Chart(
                            "Means",
                            "of the data",
                            "stored",
                            (Series("before", (0.1, 0.2), (3.0, 3.0)), Series("after", (0.1, 0.2), (0.1, None))),
                            kind="scatter",
                        ),
                    ),
                ),
                Entry("head.norm", "LayerNorm 8", "ok", (HEALTHY,)),
                Entry("head.out", "LayerNorm 3", "ok", (HEALTHY,)),
            ),
            "In the order in which they run.",
        ),
    ),
)


def hostile() -> Document:
    """A document in which every string is one that would break a careless renderer."""
    text = " ".join(HOSTILE)
    table = Table(text, (text, "n"), ((text, 1),), note=text)
    chart = Chart(text, text, text, (Series(text, (text,), (1.0,)),), kind="bar", note=text, spread=text)
    card = Card("error", text, text, text, text, ((text, text),), fix=text, cause=text, source=text)
    parts = Parts(text, (Entry(text, text, "error", (card,)), Entry(text, text)), text)
    blocks = (Heading(text), Paragraph(text), Code(text), table, chart, card, parts)
    return Document(text, text, "error", blocks, {text: text})
