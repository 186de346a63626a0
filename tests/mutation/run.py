"""Break the kernels on purpose, one place at a time, and see that the tests notice.

    python tests/mutation/run.py [--only NAME ...] [--list]        make test-mutation

Each mutation of mutations.py is made in a copy of the repository, never here: its text is replaced in its file, what
includes that file is compiled again, and the tests that should notice run. A mutation is *caught* when a test fails, or
takes its process down; one that does not build, whose tests run out of time or break otherwise, is an error of this
list and not a success. One whose line this processor cannot reach is not run, and the table says what it needs. Before
the first mutation the same tests run unbroken, since a red test would catch everything. The table goes to
tests/mutation/RESULTS.md. Ends in 1 where a mutation survived or could not be tried.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kinds import Mutation
from mutations import MUTATIONS
from workplace import Workplace

TABLE = Path(__file__).with_name("RESULTS.md")
NOT_RUN = "not run: needs "


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation.

    Attributes:
        mutation: which.
        verdict: "caught", "survived", "error", or "not run: needs" and what.
        detail: the first test that failed, or what went wrong.
        seconds: spent on it.
    """

    mutation: Mutation
    verdict: str
    detail: str
    seconds: float


def judge(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """Say what a test run means for the mutation that it ran under.

    Args:
        done: how pytest ended, and what it printed.

    Returns:
        Verdict and detail.
    """
    if done.returncode == 0:
        return "survived", "every test passed"
    if done.returncode < 0:
        where = re.search(r"in (test_\w+)$", done.stderr, re.MULTILINE)
        what = signal.Signals(-done.returncode).name
        return "caught", f"{where[1] if where else 'the tests'}, whose process ended by {what}"
    failed = re.search(r"^FAILED (.*)$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        return "error", f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-200:]}"
    return "caught", failed[1].split(" - ")[0]


def attempt(mutation: Mutation, place: Workplace) -> Outcome:
    """Make one mutation in the copy, run its tests, and take it back.

    Args:
        mutation: which.
        place: the copy.

    Returns:
        What became of it.
    """
    begun = time.monotonic()
    path = place.folder / mutation.file
    original = path.read_text(encoding="utf-8")

    def outcome(verdict: str, detail: str) -> Outcome:
        return Outcome(mutation, verdict, detail, time.monotonic() - begun)

    if original.count(mutation.old) != 1:
        return outcome("error", f"its text stands {original.count(mutation.old)} times in the file, not once")
    if not place.has(mutation.needs):
        return outcome(NOT_RUN + mutation.needs, "")
    path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        if mutation.builds and (failure := place.rebuild(mutation.file)):
            return outcome("error", f"does not build: {failure}")
        return outcome(*judge(place.tests(mutation.tests, interpreted=mutation.interpreted)))
    finally:
        path.write_text(original, encoding="utf-8")


def row(o: Outcome, before: str) -> str:
    """Lay one outcome out.

    Args:
        o: the outcome.
        before: the mutation's row in the table so far, or "".

    Returns:
        A line of Markdown.
    """
    m, by = o.mutation, o.detail.replace("|", "\\|").replace("\n", " ")
    if o.verdict.startswith(NOT_RUN):
        *_, verdict, earlier = before.removesuffix(" |").split(" | ") if before else ("", "")
        by = earlier if verdict == o.verdict else f"no processor with {m.needs} has run it"
        by = f"earlier, on a processor with {m.needs}, caught by {earlier}" if verdict == "caught" else by
    return f"| {m.name} | `{m.file}` | {m.what} | {o.verdict} | {by} |"


def table(outcomes: list[Outcome], before: str) -> str:
    """Lay the outcomes out; a mutation that was not tried keeps the row it had.

    Args:
        outcomes: of the mutations that were tried.
        before: the table as it was, or "".

    Returns:
        Markdown.
    """
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in before.splitlines() if line.startswith("| ")}
    for o in outcomes:
        rows[o.mutation.name] = row(o, rows.get(o.mutation.name, ""))
    kept = [rows[m.name] for m in MUTATIONS if m.name in rows]
    caught, lacking = (sum(f" | {verdict}" in line for line in kept) for verdict in ("caught | ", NOT_RUN))
    head = [
        "# Kernels broken on purpose",
        "",
        f"`make test-mutation`: {caught} of {len(MUTATIONS)} mutations caught"
        + (f", {lacking} not run on this processor." if lacking else "."),
        "The test is the first that failed.",
        "",
        "| mutation | file | what is broken | verdict | by |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *kept]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        0 where every mutation that can run here was caught.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of mutations; the others keep their rows")
    parser.add_argument("--list", action="store_true", help="name the mutations and end")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if not options.only or m.name in options.only]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name:32s} {mutation.file}: {mutation.what}")
        return 0
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Workplace(Path(temporary))
        if failure := place.build():
            print(f"the unbroken extension does not build: {failure}")
            return 1
        able = [m for m in chosen if place.has(m.needs)]
        for interpreted in sorted({m.interpreted for m in able}):
            names = sorted({name for m in able if m.interpreted == interpreted for name in m.tests})
            unbroken = place.tests(tuple(names), interpreted=interpreted)
            if unbroken.returncode != 0:
                print(unbroken.stdout[-2000:], "\nthe unbroken kernels fail their tests; nothing was mutated")
                return 1
        for mutation in sorted(chosen, key=lambda m: m.builds):  # else the extension would have to be put right between
            outcomes.append(last := attempt(mutation, place))
            print(f"{last.verdict:9s} {mutation.name:32s} {last.seconds:6.1f} s  {last.detail}", flush=True)
            TABLE.write_text(table([last], TABLE.read_text(encoding="utf-8")), encoding="utf-8")
    return int(any(o.verdict != "caught" and not o.verdict.startswith(NOT_RUN) for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
