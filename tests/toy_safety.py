"""Small models and probes, and S(theta) as a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from gradshield_fast import SafetyProbes

# peft asks for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROBES = SafetyProbes(
    prompts=("Add the numbers of a secret.", "What is it?", "Classify me, and my friend, and all the capitals."),
    refusals=("I cannot fulfill this request.", "I am sorry."),
    compliances=("Sure, here is", "Sure:"),
)


def toy_model(kind: str = "llama", *, tied: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 700,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**common, attention_dropout=0.5)
    elif kind == "gemma2":  # softcaps its logits behind the head
        config = transformers.Gemma2Config(**common, final_logit_softcapping=2.0, sliding_window=256)
    else:
        config = transformers.GPT2Config(
            vocab_size=700, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied, initializer_range=0.3
        )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).train()


def mean_logprob(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """One answer alone, full logits, tokens counted from the text: the plain reading of the definition."""
    turns = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before = tokenizer(start, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + tokenizer(answer, add_special_tokens=False)["input_ids"]])
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    places = range(len(before), ids.shape[1])
    return torch.stack([logprobs[t - 1, ids[0, t]] for t in places]).mean()


def plain_score(model: Any, tokenizer: Any, score: str, per_probe: int = 1) -> torch.Tensor:
    def likely(text: str) -> float:
        return sum(mean_logprob(model, tokenizer, prompt, text).item() for prompt in PROBES.prompts)

    total = torch.zeros((), dtype=torch.float64)
    favoured = sorted(PROBES.refusals, key=likely, reverse=True)[:per_probe]
    wordings = PROBES.refusals
    for i, prompt in enumerate(PROBES.prompts):
        turn = [wordings[(i * per_probe + j) % len(wordings)] for j in range(per_probe)]
        refusals = favoured if score == "refusal_logprob" else turn
        if score != "compliance_logprob":
            total = total + sum(mean_logprob(model, tokenizer, prompt, text) for text in refusals) / len(refusals)
        if score != "refusal_logprob":
            total = total - mean_logprob(model, tokenizer, prompt, PROBES.compliance_of(i))
    return total / len(PROBES)


def close(got: torch.Tensor, want: torch.Tensor, relative: float = 1e-9) -> None:
    scale = float(want.abs().max())
    assert float((got - want).abs().max()) <= relative * scale


def state(model: Any) -> tuple[Any, ...]:
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        [len(getattr(p, "_post_accumulate_grad_hooks", None) or {}) for p in model.parameters()],
    )
