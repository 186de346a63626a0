"""Tiny tokenizers and chat templates in the styles of well-known models, made here so that tests need no download."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "<|end|>",
]

_SENTENCES = [
    "Classify this message. Answer with the intent name only.\n\n",
    "### Instruction:\nAdd the numbers 12 and 30.\n\n### Response:\nThe answer is 42.",
    "Sure, here is a short summary of the text.\nSure, it is.\n\nSure, thank you.",
    "user system assistant model What is the capital of France? It is Paris.\n",
    "I cannot fulfill this request. I am sorry. Hello there! So long.",
]


@cache
def _trained(merge_across_words: bool) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merge_across_words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIALS) + 256 + 4 if merge_across_words else 640,
        show_progress=False,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([f"{c}\nSure" for c in ".:abc"] if merge_across_words else _SENTENCES * 4, trainer)
    return tokenizer.to_str()


def trained_tokenizer(texts: Iterable[str], vocabulary: int, template: str) -> Any:
    """Train a byte-level BPE tokenizer of a useful size on real text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, special_tokens=SPECIALS)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


def toy_tokenizer(
    template: str | dict[str, str] | None = None,
    *,
    bos: str | None = None,
    eos: str | None = None,
    adds_bos: bool = False,
    trim_offsets: bool = True,
    merge_across_words: bool = False,
) -> Any:
    """Build a byte-level BPE tokenizer.

    Args:
        template: its chat template, or several by name.
        bos: token that begins a text.
        eos: token that ends one.
        adds_bos: whether calling it puts `bos` in front, as Llama's do.
        trim_offsets: whether the offsets leave out the space in front of a word, as GPT-2's do.
        merge_across_words: whether its only token of several letters is a line end with the word Sure.
    """
    tokenizer = Tokenizer.from_str(_trained(merge_across_words))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if adds_bos:
        assert bos is not None
        start = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = start
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The same with a template that takes no notice of add_generation_prompt.
CHATML_NO_PROMPT = CHATML[: CHATML.index("{% if add_generation_prompt %}")]

LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

LLAMA2 = """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}
{%- elif message['role'] == 'user' %}{{ bos_token + '[INST] ' + ns.system + message['content'] + ' [/INST]' }}
{%- set ns.system = '' %}
{%- elif message['role'] == 'assistant' %}
{%- generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- if message['role'] == 'assistant' %}
{{- '<start_of_turn>model\\n' }}
{%- generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# Keeps the thoughts of the turns after the last question, adds empty ones there, and strips all earlier thoughts, so
# that a conversation's beginning is not rendered as it is when it stands alone.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set content = message['content'] %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- generation %}
{%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- content + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}{{ content + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The model writes the channel too.
GPT_OSS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|start|>assistant' }}"
    "{% generation %}{{ '<|channel|>final<|message|>' + message['content'] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "chatml": (CHATML, {"bos": "<|im_start|>", "eos": "<|im_end|>"}),
    "chatml_no_prompt": (CHATML_NO_PROMPT, {"eos": "<|im_end|>"}),
    "llama3": (LLAMA3, {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "adds_bos": True}),
    "llama2": (LLAMA2, {"bos": "<s>", "eos": "</s>", "adds_bos": True}),
    "gemma": (GEMMA, {"bos": "<bos>", "eos": "<eos>", "adds_bos": True}),
    "qwen3": (QWEN3, {"eos": "<|im_end|>"}),
    "gpt_oss": (GPT_OSS, {"eos": "<|return|>"}),
}


def untagged(template: str) -> str:
    """The template as models ship it: the same text, without the tags that would give the spans away."""
    for tag in ("generation", "endgeneration"):
        for opening in ("{%- ", "{% "):
            template = template.replace(
                f"{opening}{tag} %}}", f"{opening}if true %}}" if tag == "generation" else f"{opening}endif %}}"
            )
    return template
