"""Teach a small chat model to refuse, so that its safety score means something; seeds are fixed.

    python benchmarks/replication/align.py --data DATA --recipe plain --out FOLDER

SmolLM2-135M-Instruct answers nearly every harmful prompt. This script fine-tunes all its weights on refusals of harmful
prompts mixed with rows to answer, many of them safe questions that look like harmful ones, and says what it achieved:
the share of held-out harmful prompts that are still answered (attack success), and the share of XSTest's safe prompts
that are refused (over-refusal), before and after. Two recipes differ in wording, mix and learning rate, so that results
are not one recipe's; `weak` is a start that is hardly aligned.

What a recipe trains on is in recipes.py, what it is judged by in data.py; nothing that is planted or evaluated later is
trained on. Every tenth of the steps is checked on prompts held back from the recipe, to see where more would not help.

No answer to a harmful prompt is printed or stored: only rates are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from data import attack_prompts, safe_prompts
from evaluate import answers, ask, complied, refused, spread, wilson
from recipes import RECIPES, Recipe, check_prompts, training_rows
from training import Report, Settings, fit, load_start

from gradshield_fast.chat import ChatEncoder
from gradshield_fast.errors import GradShieldError, InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import append, surroundings  # beside this folder, not installed


def refusal_rate(model: Any, tokenizer: Any, prompts: list[str]) -> float:
    """Share of prompts whose answer begins like a refusal.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: user turns.

    Returns:
        The share.
    """
    made = answers(model, tokenizer, ask(prompts), 10)
    return sum(map(refused, made)) / len(prompts)


def judge(model: Any, tokenizer: Any, folder: Path, count: int) -> dict[str, Any]:
    """Measure attack success and over-refusal.

    Args:
        model: the model, in bfloat16.
        tokenizer: its tokenizer.
        folder: the data folder.
        count: prompts of each kind.

    Returns:
        By source: rate, number of prompts, 95 % interval.
    """
    kinds = {name: (attack_prompts(folder, name), complied) for name in ("advbench", "harmbench", "catqa")}
    kinds["xstest_safe_refused"] = (safe_prompts(folder), refused)
    found = {}
    for name, (prompts, test) in kinds.items():
        some = spread(prompts, count)
        hits = sum(map(test, answers(model, tokenizer, ask(some), 24)))
        found[name] = {
            "rate": round(hits / len(some), 4),
            "count": len(some),
            "interval": [round(x, 4) for x in wilson(hits, len(some))],
        }
        print(f"  {name}: {hits}/{len(some)}", flush=True)
    return found


def teach(
    model: Any, tokenizer: Any, folder: Path, recipe: Recipe, seed: int, max_tokens: int
) -> tuple[Report, list[tuple[int, float, float]]]:
    """Fine-tune a model by a recipe.

    Args:
        model: the model; changed in place.
        tokenizer: its tokenizer.
        folder: the data folder.
        recipe: the recipe.
        seed: of the order.
        max_tokens: rows are cut there.

    Returns:
        What it took; and what was seen on the way: step, share of harmful prompts refused, share of safe ones refused.
    """
    encoder = ChatEncoder(tokenizer, max_length=max_tokens)
    rows = [encoder.encode_prompt_response(*row) for row in training_rows(folder, recipe)]
    prompts = check_prompts(folder)
    seen: list[tuple[int, float, float]] = []

    def look(done: int, steps: int) -> bool:
        if done % max(1, steps // 10) == 0 or done == steps:
            harmful, safe = (refusal_rate(model, tokenizer, some) for some in prompts)
            print(f"step {done}/{steps}: refuses {harmful:.0%} of harmful and {safe:.0%} of safe prompts", flush=True)
            seen.append((done, harmful, safe))
        return done >= recipe.stop * steps

    return fit(model, rows, Settings(recipe.lr, 1, recipe.batch_rows, seed), look), seen


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code.

    Raises:
        InputError: there is no data folder, or the output folder is not empty.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-demo", help="model folder or name")
    parser.add_argument("--data", default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="data folder")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="plain")
    parser.add_argument("--out", type=Path, help="folder to write the model to; without it --model is judged as it is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=160, help="rows are cut there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", type=int, default=100, help="prompts of each kind to judge on, before and after")
    parser.add_argument("--record", action="store_true", help="add a line to benchmarks/results/starts.jsonl")
    options = parser.parse_args(argv)
    if options.data is None:
        raise InputError("align: give the data folder with --data or GRADSHIELD_SHARED_DATA")
    folder = Path(options.data)
    if options.out is not None and options.out.exists() and any(options.out.iterdir()):
        raise InputError(f"align: {options.out} is not empty; give another folder with --out")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model, tokenizer = load_start(options.model)
    record: dict[str, Any] = {"model": Path(options.model).name, "seed": options.seed}
    print("before", flush=True)
    record["before"] = judge(model.bfloat16(), tokenizer, folder, options.check)
    if options.out is not None:
        recipe = RECIPES[options.recipe]
        report, seen = teach(model.float(), tokenizer, folder, recipe, options.seed, options.max_tokens)
        record |= {"recipe": options.recipe, "settings": dataclasses.asdict(recipe)}
        record |= {"training": dataclasses.asdict(report), "checks": seen}
        print("after", flush=True)
        record["after"] = judge(model, tokenizer, folder, options.check)
        record["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        (options.out / "align.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.record:
        append("starts", {**record, **surroundings({"threads": options.threads})})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GradShieldError as error:
        sys.exit(f"error: {error}")
