"""`python -m tests.doctor.heldout [part of a name]`: what the doctor says of the held-out cases, as a table."""

import sys
import time
import traceback
import warnings

import torch

from tests.doctor.heldout import FAULTS, HEALTHY, Held

Found = set[tuple[str, str]]


def of(pairs: Found | frozenset[tuple[str, str]]) -> str:
    """Codes and places in a cell; more than three places of a code as their number."""
    places: dict[str, list[str]] = {}
    for code, where in sorted(pairs):
        places.setdefault(code, []).append(f"`{where}`" if where else "the whole")
    return ", ".join(f"{c} {' '.join(w) if len(w) < 4 else f'at {len(w)} layers'}" for c, w in places.items()) or "-"


def verdict(case: Held, found: Found) -> str:
    """Right, or what is missed, found at another place, and said besides."""
    codes = {code for code, _ in case.expected}
    missed = codes - {code for code, _ in found}
    elsewhere = {code for code, _ in (found - case.also) ^ case.expected if code in codes - missed}
    elsewhere = {
        c
        for c in elsewhere
        if {p for p in case.expected if p[0] == c} - found
        or {p for p in found - case.also - case.expected if p[0] == c}
    }
    extra = {pair for pair in found - case.also if pair[0] not in codes}
    words = [f"missed {' '.join(sorted(missed))}" if missed else "", f"elsewhere {' '.join(sorted(elsewhere))}"]
    words = [words[0], words[1] if elsewhere else "", f"besides {of(extra)}" if extra else ""]
    return "; ".join(word for word in words if word) or "right"


def look(case: Held, is_faulty: bool) -> tuple[Found, float, list[str]]:
    """What is found, in how many seconds, training included; an exception of the doctor is a finding of its own."""
    start = time.perf_counter()
    try:
        diagnosis = case.examined(is_faulty)
    except Exception as error:
        traceback.print_exc()
        return {(type(error).__name__, str(error)[:80])}, time.perf_counter() - start, []
    said = [f"{f.code} {f.where} {f.severity}: {f.message} {f.evidence}" for f in diagnosis.findings]
    return case.found(diagnosis), time.perf_counter() - start, said


def main() -> None:
    """Print the tables of the cases whose names hold the argument, with everything that is said if there is one."""
    torch.set_num_threads(1)
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    faults, healthy = ([case for case in cases if part in case.name] for cases in (FAULTS, HEALTHY))
    out = sys.stdout
    out.write("| fault | expected | found | verdict | twin | seconds |\n|---|---|---|---|---|---|\n")
    recalled = exact = alarmed = 0
    times = []
    for case in faults:
        found, seconds, said = look(case, True)
        alarms, twin_seconds, twin_said = look(case, False)
        word = verdict(case, found)
        recalled += "missed" not in word
        exact += word == "right"
        alarmed += bool(alarms)
        times += [seconds, twin_seconds]
        cells = [case.name, of(case.expected), of(found), word, of(alarms), f"{seconds:.1f}"]
        out.write(f"| {' | '.join(cells)} |\n")
        out.flush()
        if part:
            out.write("\n".join(["faulty:", *said, "twin:", *twin_said]) + "\n")
    out.write("\n| healthy | false alarms | seconds |\n|---|---|---|\n")
    cried = 0
    for case in healthy:
        found, seconds, said = look(case, False)
        cried += bool(found)
        times.append(seconds)
        out.write(f"| {case.name} | {of(found)} | {seconds:.1f} |\n")
        out.flush()
        if part:
            out.write("\n".join(said) + "\n")
    out.write(f"\n| what | number |\n|---|---|\n| faults whose codes are all found | {recalled} of {len(faults)} |\n")
    out.write(f"| faults found at their exact places, and nothing else above a note | {exact} of {len(faults)} |\n")
    out.write(f"| healthy twins with a finding above a note | {alarmed} of {len(faults)} |\n")
    out.write(f"| healthy controls with a finding above a note | {cried} of {len(healthy)} |\n")
    if times:
        out.write(f"| seconds for one model, training included, median | {sorted(times)[len(times) // 2]:.1f} |\n")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
