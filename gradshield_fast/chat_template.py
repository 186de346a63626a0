"""Which chat template renders a corpus, and what its tokenizer takes for the end of a turn."""

from __future__ import annotations

import datetime
import re
from typing import Any

from gradshield_fast.errors import InputError

# For a tokenizer without a chat template. The turns are separated by a blank line, and an answer ends with <eos>.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '### Response:\\n' }}{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' }}{{ message['content'] }}"
    "{% elif message['role'] == 'tool' %}{{ '### Input:\\n' }}{{ message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)

# Some templates print today's date. A score must not depend on the day it was computed, so they get this one, which
# is the date that Llama 3's own template falls back on.
PINNED_DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"strftime_now\(\s*(?:'([^'\\{}]*)'|\"([^\"\\{}]*)\")\s*\)")


def choose_template(tokenizer: Any, template: str | None) -> tuple[str, str]:
    """Choose the template of a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: Jinja source to use instead of the tokenizer's, or the name of one of the tokenizer's.

    Returns:
        The Jinja source, and "option", "tokenizer" or "fallback".

    Raises:
        InputError: the template is empty, or the tokenizer has several and none was named.
    """
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        if template in own:
            return own[template], "option"
        if template is None and own and "default" not in own:
            raise InputError(
                f"the tokenizer has several chat templates, none the default: name one of {', '.join(own)}"
            )
        own = own.get("default")
    if template is not None:
        if not template.strip():
            raise InputError("the chat template is empty: expected Jinja source")
        return template, "option"
    if own:
        return own, "tokenizer"
    return ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + FALLBACK_TEMPLATE, "fallback"


def pin_date(template: str) -> tuple[str, bool]:
    """Replace today's date in a template by `PINNED_DATE`.

    Args:
        template: Jinja source.

    Returns:
        The source without calls of `strftime_now`, and whether there were any.
    """
    pinned, calls = _TODAY.subn(lambda call: repr(PINNED_DATE.strftime(call[1] or call[2] or "")), template)
    return pinned, calls > 0


def turn_ends(tokenizer: Any) -> list[str]:
    """List the special tokens that can end a turn.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Returns:
        All of them as text, but those for unknown words and for the beginning of a sequence.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    specials = {str(token) for token in tokenizer.all_special_tokens}
    specials.update(str(token.content) for token in added if token.special)
    specials -= {str(getattr(tokenizer, name, None)) for name in ("bos_token", "unk_token")}
    if getattr(tokenizer, "eos_token", None):
        specials.add(str(tokenizer.eos_token))
    return sorted(token for token in specials if token.strip())


def _adds_bos(tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
