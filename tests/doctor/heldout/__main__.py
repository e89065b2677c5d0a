"""`python -m tests.doctor.heldout [part of a name]`: what the doctor says of the held-out cases, as a table."""

import sys
import time
import warnings
from typing import NamedTuple

import torch

from tests.doctor.heldout import FAULTS, HEALTHY, Held
from tests.doctor.heldout.held import Found


class Row(NamedTuple):
    """What was found of a case, the same with notes of the expected codes, all that was said, and in what time."""

    found: Found
    with_notes: Found
    said: list[str]
    seconds: float


def of(pairs: Found | frozenset[tuple[str, str]]) -> str:
    """Codes and places in a cell; more than three places of a code as their number."""
    places: dict[str, list[str]] = {}
    for code, where in sorted(pairs):
        places.setdefault(code, []).append(f"`{where}`" if where else "the whole")
    return ", ".join(f"{c} {' '.join(w) if len(w) < 4 else f'at {len(w)} layers'}" for c, w in places.items()) or "-"


def verdict(case: Held, found: Found) -> str:
    """Right, or what is missed, found at another place, and said besides."""
    found = found - (case.also - case.expected)
    codes, seen = ({code for code, _ in pairs} for pairs in (case.expected, found))
    elsewhere = {code for code, _ in found ^ case.expected if code in codes & seen}
    words = [
        f"missed {' '.join(sorted(codes - seen))}" if codes - seen else "",
        f"elsewhere {' '.join(sorted(elsewhere))}" if elsewhere else "",
        f"besides {of({pair for pair in found if pair[0] not in codes})}" if seen - codes else "",
    ]
    return "; ".join(word for word in words if word) or "right"


def look(case: Held, is_faulty: bool) -> Row:
    """Make a case, with its fault or without, and examine it."""
    start = time.perf_counter()
    diagnosis = case.examined(is_faulty)
    seconds = time.perf_counter() - start
    said = [f"{f.code} {f.where} {f.severity}: {f.message} {f.evidence}" for f in diagnosis.findings]
    return Row(case.found(diagnosis), case.found(diagnosis, with_notes=True), said, seconds)


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def tables(faults: list[Held], healthy: list[Held], in_full: bool) -> None:
    """Print the tables of these cases, with everything that is said if `in_full`."""
    say("| fault | expected | found | verdict | twin | seconds |\n|---|---|---|---|---|---|")
    verdicts, noted, twins, times = [], [], [], []
    for case in faults:
        row, twin = look(case, True), look(case, False)
        verdicts.append(verdict(case, row.found))
        noted.append(verdict(case, row.with_notes))
        twins.append(twin.found)
        times += [row.seconds, twin.seconds]
        cells = [case.name, of(case.expected), of(row.found), verdicts[-1], of(twin.found), f"{row.seconds:.1f}"]
        say(f"| {' | '.join(cells)} |")
        if in_full:
            say("\n".join(["with the fault:", *row.said, "without:", *twin.said]))
    say("\n| healthy | false alarms | seconds |\n|---|---|---|")
    controls = []
    for case in healthy:
        row = look(case, False)
        controls.append(row.found)
        times.append(row.seconds)
        say("\n".join([f"| {case.name} | {of(row.found)} | {row.seconds:.1f} |", *(row.said if in_full else [])]))
    exact, with_notes = verdicts.count("right"), noted.count("right")
    say("\n| what | number |\n|---|---|")
    say(f"| faults whose codes are all found | {sum('missed' not in v for v in verdicts)} of {len(faults)} |")
    say(f"| faults found at their exact places, and nothing else above a note | {exact} of {len(faults)} |")
    say(f"| the same, where a note at an expected place counts | {with_notes} of {len(faults)} |")
    say(f"| healthy twins with a finding above a note | {sum(map(bool, twins))} of {len(faults)} |")
    say(f"| healthy controls with a finding above a note | {sum(map(bool, controls))} of {len(healthy)} |")
    if times:
        say(f"| seconds for one model, training included, median | {sorted(times)[len(times) // 2]:.1f} |")


def main(part: str) -> None:
    """Both sets, as far as `part` is in the name of a case; with everything that is said if it is not empty."""
    for is_second in (False, True):
        faults, healthy = (
            [case for case in cases if part in case.name and case.is_second == is_second] for cases in (FAULTS, HEALTHY)
        )
        if faults or healthy:
            say(f"\n{'Second' if is_second else 'First'} set\n")
            tables(faults, healthy, in_full=bool(part))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(sys.argv[1] if len(sys.argv) > 1 else "")
