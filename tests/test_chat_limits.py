"""Templates that throw or hide turns, rows that are cut, tokenizers that are slow, and options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import CHATML, GEMMA, GPT_OSS, LLAMA2, LLAMA3, QWEN3, SPECIALS, STYLES, toy_tokenizer, untagged
from transformers import ByT5Tokenizer

from gradshield_fast.chat import IGNORE, ChatEncoder
from gradshield_fast.chat_spans import MAX_RENDERS
from gradshield_fast.errors import InputError
from tests.conversations import BYE, PARIS, THANKS, USER, encode, turns


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('Two\\nlines of  advice') }}", "Two lines of advice"),
        ("{{ messages[9]['content'] }}", "failed"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for i in range(10**9) %}x{% endfor %}", "range"),
        ("{{ messages.__class__.__mro__ }}", "failed"),
        ("{% for m in messages %}{{ m['role'] }};{% endfor %}", "leaves out the assistant's turn 1"),
        ("{{ messages[1]['content'] + messages[1]['content'] }}", "repeats the assistant's turn 1"),
        ("{% for m in messages %}{{ m['content'] | length }};{% endfor %}", "leaves out"),
        ("{% macro forever() %}{{ forever() }}{% endmacro %}{{ forever() }}", "recursion"),
    ],
    ids=range(9),
)
def test_a_template_that_throws_or_hides_an_answer_is_a_status(template: str, says: str) -> None:
    encoded = ChatEncoder(toy_tokenizer(), template=template).encode([USER, PARIS])
    assert encoded.status == "template_error"
    assert says in encoded.reason
    assert encoded.reason.isprintable()
    assert (encoded.input_ids, encoded.labels, encoded.response_tokens) == ([], [], 0)


def test_tags_around_nothing_fall_back_on_rendering() -> None:
    template = "{% generation %}{% endgeneration %}" + untagged(CHATML)
    tokenizer = toy_tokenizer(template, eos="<|im_end|>")
    encoded = ChatEncoder(tokenizer).encode([USER, PARIS])
    assert encoded.notes == ("generation_tags_empty",)
    assert turns(encoded, tokenizer) == ["It is Paris.<|im_end|>"]


def test_tags_may_leave_turns_out_on_purpose() -> None:
    template = (
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = toy_tokenizer(template)
    assert turns(ChatEncoder(tokenizer).encode([USER, PARIS, THANKS, BYE]), tokenizer) == ["So long."]


def test_tags_label_what_transformers_labels() -> None:
    tokenizer = toy_tokenizer(CHATML, eos="<|im_end|>", trim_offsets=False)
    messages = [USER, PARIS, THANKS, BYE]
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    encoded = ChatEncoder(tokenizer).encode(messages)
    assert encoded.input_ids == out["input_ids"]
    assert [int(label != IGNORE) for label in encoded.labels] == out["assistant_masks"]


@pytest.mark.parametrize("style", STYLES)
def test_truncation_keeps_the_beginning_and_says_what_it_cost(style: str) -> None:
    whole, _ = encode(style, [USER, PARIS, THANKS, BYE])
    first = next(t for t, label in enumerate(whole.labels) if label != IGNORE)
    for length in range(2, len(whole.input_ids) + 2):
        cut, _ = encode(style, [USER, PARIS, THANKS, BYE], max_length=length)
        assert cut.input_ids == whole.input_ids[:length]
        assert cut.labels == whole.labels[:length]
        if length >= len(whole.input_ids):
            assert cut == whole
        elif length > first:
            assert (cut.status, cut.reason) == (
                "truncated",
                f"cut to the first {length} of {len(whole.input_ids)} tokens",
            )
            assert cut.response_tokens > 0
        else:
            assert cut.status == "no_response_after_truncation"
            assert "max_length" in cut.reason
            assert cut.response_tokens == 0


@pytest.mark.parametrize("filler", ["Sure, it is. ", "a", "漢🙂", " ", "x" * 50 + "\n"], ids=ascii)
@pytest.mark.parametrize("turn", [0, 1], ids=["question", "answer"])
def test_a_huge_row_is_cut_as_if_all_of_it_had_been_tokenised(filler: str, turn: int) -> None:
    messages = [dict(USER), dict(PARIS)]
    messages[turn]["content"] = "It is: " + filler * (60_000 // len(filler)) + "."
    whole, _ = encode("llama3", messages)
    cut, _ = encode("llama3", messages, max_length=40)
    assert len(whole.input_ids) > 600
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:40], whole.labels[:40])
    assert cut.status == ("truncated" if turn else "no_response_after_truncation")
    assert "or more tokens" in cut.reason


def test_the_first_token_is_never_labelled() -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = toy_tokenizer(template)
    encoded = ChatEncoder(tokenizer).encode([PARIS])
    assert encoded.labels == [IGNORE, *encoded.input_ids[1:]]
    assert ChatEncoder(tokenizer).encode([{"role": "assistant", "content": "a"}]).status == "no_response"


def test_rows_without_turns_or_answers_have_a_status() -> None:
    encoder = ChatEncoder(toy_tokenizer(CHATML))
    assert encoder.encode([]).status == "empty"
    assert encoder.encode([USER]).status == "no_response"
    assert ChatEncoder(toy_tokenizer("{% set x = messages %}")).encode([USER, PARIS]).status == "template_error"


@pytest.mark.parametrize("count", [MAX_RENDERS, MAX_RENDERS + 1, 400])
def test_a_conversation_of_many_turns_is_rendered_a_bounded_number_of_times(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = toy_tokenizer(untagged(CHATML), eos="<|im_end|>")
    calls, render = [], tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(1) or render(*a, **k))
    encoded = ChatEncoder(tokenizer).encode([USER, PARIS] * count)
    assert turns(encoded, tokenizer) == ["It is Paris.<|im_end|>"] * count
    assert len(calls) <= MAX_RENDERS + 4


def test_a_text_full_of_private_characters_still_finds_one_to_mark_with() -> None:
    most = {"role": "user", "content": "".join(map(chr, range(0xF0000, 0xF1800)))}
    encoded, tokenizer = encode("chatml", [most, PARIS])
    assert turns(encoded, tokenizer) == ["It is Paris.<|im_end|>"]
    every = {"role": "user", "content": "".join(map(chr, range(0xF0000, 0xF1900)))}
    assert encode("chatml", [every, PARIS])[0].status == "template_error"


def test_a_slow_tokenizer_is_counted_by_its_prefixes() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    encoded = ChatEncoder(tokenizer).encode([USER, PARIS, THANKS, {"role": "assistant", "content": "À bientôt"}])
    assert encoded.status == "ok"
    assert turns(encoded, tokenizer) == ["It is Paris.</s>", "À bientôt</s>"]


def test_a_slow_tokenizer_that_depends_on_what_follows_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(ByT5Tokenizer):
        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return super()._tokenize(text)[::-1]

    encoded = ChatEncoder(Backwards()).encode([USER, PARIS, THANKS, BYE])
    assert encoded.status == "template_error"
    assert "fast version" in encoded.reason


def test_a_template_can_be_given_or_named() -> None:
    tokenizer = toy_tokenizer({"default": untagged(CHATML), "tool_use": untagged(GEMMA)}, bos="<bos>")
    assert ChatEncoder(tokenizer).template_kind == "tokenizer"
    named = ChatEncoder(tokenizer, template="tool_use")
    assert (named.template_kind, named.template) == ("option", untagged(GEMMA))
    assert turns(named.encode([USER, PARIS]), tokenizer) == ["It is Paris.<end_of_turn>"]
    with pytest.raises(InputError, match=r"several chat templates.*one of rag"):
        ChatEncoder(toy_tokenizer({"rag": CHATML}))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"template": "{% if %}"}, "broken"), ({"template": " "}, "empty"), ({"max_length": 1}, "max_length")],
)
def test_options_that_cannot_work_are_errors(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        ChatEncoder(toy_tokenizer(CHATML), **options)
    assert "\n" not in str(caught.value)


def test_the_date_in_a_template_is_pinned() -> None:
    template = "{{ 'Today is ' + strftime_now('%d %b %Y') + strftime_now(\" (%A)\") }}" + untagged(CHATML)
    tokenizer = toy_tokenizer(template, eos="<|im_end|>")
    encoder = ChatEncoder(tokenizer)
    assert tokenizer.decode(encoder.encode([USER, PARIS]).input_ids).startswith("Today is 26 Jul 2024 (Friday)")
    assert encoder.describe()["pinned_date"] == "2024-07-26"


def test_the_description_identifies_the_template() -> None:
    one, two = (ChatEncoder(toy_tokenizer(template), max_length=9).describe() for template in (CHATML, LLAMA3))
    assert one["template_sha256"] != two["template_sha256"]
    assert (one["template_kind"], one["max_length"], one["generation_tags"], one["pinned_date"]) == (
        "tokenizer",
        9,
        True,
        None,
    )


def test_prompt_and_response_are_a_conversation() -> None:
    encoder = ChatEncoder(toy_tokenizer(untagged(LLAMA2), bos="<s>", eos="</s>"))
    assert encoder.encode_prompt_response("Hi", "So long.") == encoder.encode(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So long."}]
    )
    assert encoder.encode_prompt_response("Hi", "So long.", system="Be kind.") == encoder.encode(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "So long."},
        ]
    )


def test_the_toy_templates_differ_only_in_their_tags() -> None:
    tokenizer = toy_tokenizer(bos="<s>", eos="</s>")
    for template in (CHATML, LLAMA3, LLAMA2, GEMMA, QWEN3, GPT_OSS):
        texts = [
            tokenizer.apply_chat_template(
                [USER, PARIS, THANKS], chat_template=t, tokenize=False, add_generation_prompt=True
            )
            for t in (template, untagged(template))
        ]
        assert texts[0] == texts[1]
        assert "generation %" not in untagged(template)
    assert len(set(SPECIALS)) == len(SPECIALS)


@pytest.mark.skipif("GRADSHIELD_SHARED_DATA" not in os.environ, reason="GRADSHIELD_SHARED_DATA names no data folder")
@pytest.mark.parametrize("style", STYLES)
def test_real_rows_are_labelled(style: str) -> None:
    from gradshield_fast.corpus import read_corpus

    template, kinds = STYLES[style]
    tokenizer = toy_tokenizer(untagged(template), **kinds)
    encoder = ChatEncoder(tokenizer)
    for name in ("gsm8k_test_500", "identity_shift_10", "refusals"):
        for row in read_corpus(Path(os.environ["GRADSHIELD_SHARED_DATA"]) / f"{name}.jsonl"):
            assert row.messages is not None
            encoded = encoder.encode(row.messages)
            assert encoded.status == "ok", encoded
            [said] = turns(encoded, tokenizer)
            assert row.messages[-1]["content"].strip() in said
            assert len(said) - len(row.messages[-1]["content"].strip()) < 60
