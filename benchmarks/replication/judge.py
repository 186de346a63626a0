"""How often the judge of attack success is wrong, by a person's labels of answers that run.py kept.

    python benchmarks/replication/run.py ... --answers ANSWERS.jsonl
    python benchmarks/replication/judge.py --answers ANSWERS.jsonl --show              # read, and note the numbers
    python benchmarks/replication/judge.py --answers ANSWERS.jsonl --complied 3 17 42  # those in which it complied

The sample has as many answers that the judge takes for compliance as others, each text once. The answers stay in their
file, outside the repository; benchmarks/results/judge.jsonl gets hashes of their texts, labels and counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from evaluate import complied, wilson

from gradshield_fast.errors import GradShieldError, InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import append, surroundings  # beside this folder, not installed


def sample(path: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Draw answers, half of them those that the judge takes for compliance.

    Args:
        path: what run.py kept.
        count: how many.
        seed: of the draw.

    Returns:
        Prompts and answers.

    Raises:
        InputError: the file is not there, or has fewer of one kind than half of `count`.
    """
    if not path.is_file():
        raise InputError(f"{path.name}: not there; run.py writes it with --answers")
    pairs = {tuple(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()}
    once = sorted({answer: (prompt, answer) for prompt, answer in sorted(pairs)}.values())
    rng = np.random.default_rng(seed)
    drawn: list[tuple[str, str]] = []
    for wanted in (True, False):
        some = [pair for pair in once if complied(pair[1]) is wanted]
        if len(some) < count // 2:
            raise InputError(f"{path.name}: {len(some)} answers that the judge calls {wanted}; --count asks {count}")
        drawn += [some[i] for i in rng.permutation(len(some))[: count // 2]]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def table(pairs: Sequence[tuple[str, str]], labels: Sequence[bool]) -> dict[str, int]:
    """Count agreement.

    Args:
        pairs: prompts and answers.
        labels: whether a person found that the answer complies.

    Returns:
        "both", "judge_alone", "person_alone", "neither".
    """
    names = {(True, True): "both", (True, False): "judge_alone", (False, True): "person_alone"}
    found = [names.get((complied(pair[1]), label), "neither") for pair, label in zip(pairs, labels, strict=True)]
    return {name: found.count(name) for name in (*names.values(), "neither")}


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="file that run.py --answers wrote")
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--show", action="store_true", help="print the sample, and not what the judge says of it")
    chosen.add_argument("--complied", type=int, nargs="*", help="numbers of the answers that do what was asked")
    options = parser.parse_args(argv)
    pairs = sample(options.answers, options.count, options.seed)
    if options.show:
        for number, (prompt, answer) in enumerate(pairs):
            print(f"{number}\t{prompt}\n\t-> {answer!r}")
        return 0
    labels = [number in set(options.complied) for number in range(len(pairs))]
    counts = table(pairs, labels)
    taken, left = counts["both"] + counts["judge_alone"], counts["person_alone"] + counts["neither"]
    rates = {
        "false_alarms": [counts["judge_alone"] / taken, *wilson(counts["judge_alone"], taken)],
        "missed": [counts["person_alone"] / left, *wilson(counts["person_alone"], left)],
    }
    print(counts, {name: [round(x, 3) for x in rate] for name, rate in rates.items()})
    hashes = [hashlib.sha256("\n".join(pair).encode()).hexdigest()[:16] for pair in pairs]
    about = surroundings({"answers": options.answers.name, "count": options.count, "seed": options.seed})
    append("judge", {**about, "counts": counts, "rates": rates, "labels": dict(zip(hashes, labels, strict=True))})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GradShieldError as error:
        sys.exit(f"error: {error}")
