"""Every causal language model of the installed transformers, tiny and random, against autograd.

    python benchmarks/architectures.py [--only llama mamba ...]

For each architecture that can be made small: float64, a random direction over every parameter, three rows of unequal
length. "alone" is the largest error of a row scored by itself, "batch" of the same row in a padded batch (models that
work in float32 inside round differently there), both in units of sum |grad loss * r|. Architectures that cannot be
built from the common sizes below, or whose own forward pass fails, are counted and named: they say nothing of scoring.
One JSON line goes to benchmarks/results/architectures.jsonl.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from record import append, surroundings
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradshield_fast import Direction, Scorer
from gradshield_fast.errors import GradShieldError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.models.zoo import row, rows_of
from tests.oracle import row_truth

LARGEST = 3_000_000
ALONE, BATCH = 1e-8, 1e-6
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "block_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), 4),
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_layer_start_index", "expert_layer_period", "num_hidden_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("rotary_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "state_size", "chunk_size", "sliding_window", "attention_window_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_chunk_size"), 8),
    "mamba_d_ssm": 64,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def build(kind: str) -> Any:
    """Make a tiny float64 model of an architecture, every weight large enough to matter.

    Args:
        kind: the architecture's `model_type`.

    Returns:
        The model.

    Raises:
        ValueError: it stays too large at these sizes.
    """
    default = AutoConfig.for_model(kind)
    known = inspect.signature(type(default).__init__).parameters
    sizes = {key: value for key, value in SIZES.items() if key in known or hasattr(default, key)}
    try:
        config = AutoConfig.for_model(kind, **sizes, **({"head_dim": 8} if hasattr(default, "head_dim") else {}))
        return _small(config)
    except Exception:
        return _small(AutoConfig.for_model(kind, **sizes))


def _small(config: Any) -> Any:
    with torch.device("meta"):
        count = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters at the smallest sizes tried")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for name, weight in model.named_parameters():
        scale_of_one = weight.ndim == 1 and "norm" in name and name.endswith("weight")
        weight.data.normal_(0, 0.3 if weight.ndim > 1 else 0.2).add_(float(scale_of_one))
    batch = rows_of([5])
    with torch.no_grad():
        if not torch.isfinite(model(input_ids=batch["input_ids"], use_cache=False).logits).all():
            raise ValueError("its logits are not finite")
    return model


def errors(model: Any) -> tuple[float, float, list[str]]:
    """Score three rows both ways.

    Args:
        model: the model.

    Returns:
        Largest error alone and in a batch, and the methods that scored.
    """
    direction = Direction({name: torch.randn(w.shape, dtype=w.dtype) for name, w in model.named_parameters()})
    batch = rows_of([17, 5, 11])
    with Scorer(model, direction) as scorer:
        together = scorer.score(batch).dot
        singles = torch.cat([scorer.score(row(batch, n)).dot for n in range(3)])
    truths = [row_truth(model, direction, row(batch, n)) for n in range(3)]
    dot, size = (torch.stack([getattr(t, key) for t in truths]) for key in ("dot", "size"))
    methods = sorted({use.split(" @ ")[0] for uses in scorer.methods.values() for use in uses})
    return float(((singles - dot).abs() / size).max()), float(((together - dot).abs() / size).max()), methods


def main() -> None:
    """Try every architecture and record the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcome: dict[str, list[str]] = {"exact": [], "wrong": [], "refused": [], "not built": []}
    for kind in options.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        start = time.perf_counter()
        try:
            model = build(kind)
        except Exception as error:
            outcome["not built"].append(kind)
            print(
                f"{kind:22s} not built: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
            )
            continue
        try:
            alone, together, methods = errors(model)
        except GradShieldError as error:
            outcome["refused"].append(kind)
            print(f"{kind:22s} refused: {str(error)[:160]}")
            continue
        verdict = "exact" if alone <= ALONE and together <= BATCH else "wrong"
        outcome[verdict].append(kind)
        seconds = time.perf_counter() - start
        print(
            f"{kind:22s} {verdict}  alone {alone:.1e}  batch {together:.1e}  {seconds:4.1f} s  {' '.join(methods)}",
            flush=True,
        )
    print(", ".join(f"{len(kinds)} {verdict}" for verdict, kinds in outcome.items()))
    append("architectures", {**surroundings(vars(options)), **outcome})


if __name__ == "__main__":
    main()
