"""Break the kernels on purpose, one place at a time, and see that the tests notice.

    python tests/mutation/run.py [--only NAME ...] [--list]        make test-mutation

Each mutation of mutations.py is made in a copy of the repository, never here: its text is replaced in its file, the
extension is built again where that is C++, and the tests that should notice run. A mutation is *caught* when a test
fails; one that does not build, or whose tests break otherwise, is an error of this list and not a success. Before the
first mutation the same tests run unbroken, since a red test would catch everything. The table goes to
tests/mutation/RESULTS.md. Ends in 1 where a mutation survived or could not be tried.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("RESULTS.md")
SECONDS = 900


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation.

    Attributes:
        mutation: which.
        verdict: "caught", "survived", or "error".
        detail: the first test that failed, or what went wrong.
        seconds: spent on it.
    """

    mutation: Mutation
    verdict: str
    detail: str
    seconds: float


def copy_repository(target: Path) -> None:
    """Copy what git tracks or would add, and the built extensions.

    Args:
        target: an empty folder.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    names += [str(path.relative_to(ROOT)) for path in (ROOT / "gradshield_fast").glob("_*.so")]
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run(command: list[str], folder: Path, *, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy.

    Args:
        command: what to run.
        folder: the copy.
        interpreted: under Triton's interpreter.

    Returns:
        What it printed, and how it ended.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        # a kernel that hangs where it returned before: its tests fail, and so does their time limit
        return subprocess.CompletedProcess(command, 1, f"FAILED no answer in {SECONDS} s", "")


def build(folder: Path) -> str:
    """Build the C++ extension in the copy.

    Args:
        folder: the copy.

    Returns:
        "" or the compiler's last words.
    """
    done = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"], folder)
    return "" if done.returncode == 0 and list((folder / "gradshield_fast").glob("_native*.so")) else done.stderr[-300:]


def tests(folder: Path, names: tuple[str, ...], *, interpreted: bool) -> subprocess.CompletedProcess[str]:
    """Run tests in the copy, to the first failure.

    Args:
        folder: the copy.
        names: files or node ids.
        interpreted: under Triton's interpreter.

    Returns:
        What pytest printed.
    """
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=mutation"]
    return run([sys.executable, "-m", "pytest", *quiet, *names], folder, interpreted=interpreted)


def attempt(mutation: Mutation, folder: Path) -> Outcome:
    """Make one mutation in the copy, run its tests, and take it back.

    Args:
        mutation: which.
        folder: the copy.

    Returns:
        What became of it.
    """
    begun = time.monotonic()
    path = folder / mutation.file
    original = path.read_text(encoding="utf-8")

    def outcome(verdict: str, detail: str) -> Outcome:
        return Outcome(mutation, verdict, detail, time.monotonic() - begun)

    if original.count(mutation.old) != 1:
        return outcome("error", f"its text stands {original.count(mutation.old)} times in the file, not once")
    path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        if mutation.builds and (failure := build(folder)):
            return outcome("error", f"does not build: {failure}")
        done = tests(folder, mutation.tests, interpreted=mutation.interpreted)
    finally:
        path.write_text(original, encoding="utf-8")
    if done.returncode == 0:
        return outcome("survived", "every test passed")
    failed = re.search(r"^FAILED (.*)$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        return outcome("error", f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-200:]}")
    return outcome("caught", failed[1].split(" - ")[0])


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
        m, by = o.mutation, o.detail.replace("|", "\\|").replace("\n", " ")
        rows[m.name] = f"| {m.name} | `{m.file}` | {m.what} | {o.verdict} | {by} |"
    kept = [rows[m.name] for m in MUTATIONS if m.name in rows]
    caught = sum(" | caught | " in row for row in kept)
    head = [
        "# Kernels broken on purpose",
        "",
        f"`make test-mutation`: {caught} of {len(MUTATIONS)} mutations caught. The test is the first that failed.",
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
        0 where every mutation was caught.
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
        folder = Path(temporary) / "copy"
        copy_repository(folder)
        if any(m.builds for m in chosen) and (failure := build(folder)):
            print(f"the unbroken extension does not build: {failure}")
            return 1
        for interpreted in sorted({m.interpreted for m in chosen}):
            names = sorted({name for m in chosen if m.interpreted == interpreted for name in m.tests})
            unbroken = tests(folder, tuple(names), interpreted=interpreted)
            if unbroken.returncode != 0:
                print(unbroken.stdout[-2000:], "\nthe unbroken kernels fail their tests; nothing was mutated")
                return 1
        dirty = False
        for mutation in chosen:
            if dirty and not mutation.builds and (failure := build(folder)):
                print(f"the unbroken extension does not build any more: {failure}")
                return 1
            outcomes.append(attempt(mutation, folder))
            dirty = mutation.builds
            last = outcomes[-1]
            print(f"{last.verdict:9s} {mutation.name:32s} {last.seconds:6.1f} s  {last.detail}", flush=True)
    before = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    TABLE.write_text(table(outcomes, before), encoding="utf-8")
    return int(any(o.verdict != "caught" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
