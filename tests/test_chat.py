"""Labels: on every token of the assistant's, end of turn included, and on no other, whatever the template does."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_tokenizers import CHATML, STYLES, toy_tokenizer, untagged

from gradshield_fast.chat import IGNORE, ChatEncoder
from tests.conversations import BYE, PARIS, SYSTEM, THANKS, USER, encode, turns


@pytest.mark.parametrize("tagged", [False, True], ids=["stock", "tagged"])
@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("chatml", ["It is Paris.<|im_end|>", "So long.<|im_end|>"]),
        ("chatml_no_prompt", ["It is Paris.<|im_end|>", "So long.<|im_end|>"]),
        ("llama3", ["It is Paris.<|eot_id|>", "So long.<|eot_id|>"]),
        ("llama2", [" It is Paris. </s>", " So long. </s>"]),
        ("gemma", ["It is Paris.<end_of_turn>", "So long.<end_of_turn>"]),
        ("qwen3", ["It is Paris.<|im_end|>", "<think>\n\n</think>\n\nSo long.<|im_end|>"]),
        (
            "gpt_oss",
            ["<|channel|>final<|message|>It is Paris.<|end|>", "<|channel|>final<|message|>So long.<|return|>"],
        ),
    ],
)
def test_every_response_is_labelled_with_its_end_of_turn(style: str, expected: list[str], tagged: bool) -> None:
    encoded, tokenizer = encode(style, [USER, PARIS, THANKS, BYE], tagged)
    assert (encoded.status, encoded.reason, encoded.notes) == ("ok", "", ())
    assert turns(encoded, tokenizer) == expected
    assert encoded.response_tokens == sum(label != IGNORE for label in encoded.labels)


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_template_without_a_second_bos(style: str) -> None:
    encoded, tokenizer = encode(style, [USER, PARIS])
    text = tokenizer.apply_chat_template([USER, PARIS], tokenize=False)
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False) == text
    if tokenizer.bos_token and style != "chatml":
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


CONTENT = st.text(
    st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029") | st.sampled_from(" \n\t.aé漢🙂<>|[]/#"),
    max_size=12,
) | st.sampled_from(
    [
        "",
        " ",
        "\n\n",
        "a",
        "assistant",
        "model\n",
        "  Sure, it is. ",
        "\nSure",
        "<|im_end|>\n<|im_start|>assistant\nSure",
        "[/INST] Sure </s><s>[INST] a",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<think>\nFirst, add.\n</think>\n\n42",
        "</think>",
        "\U000f0000\U000f0001\U000f0002",
    ]
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    said = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
    messages = [
        {"role": role, "content": text} for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    messages += draw(st.just([]) | CONTENT.map(lambda text: [{"role": "user", "content": text}]))
    return draw(st.just([]) | CONTENT.map(lambda text: [{"role": "system", "content": text}])) + messages


@pytest.mark.parametrize("trim", [True, False], ids=["trimmed", "untrimmed"])
@pytest.mark.parametrize("style", STYLES)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations())
def test_stock_templates_get_the_labels_of_tagged_ones(style: str, trim: bool, messages: list[dict[str, str]]) -> None:
    template, kinds = STYLES[style]
    options = kinds if kinds.get("adds_bos") else {**kinds, "trim_offsets": trim}
    tagged = ChatEncoder(toy_tokenizer(template, **options)).encode(messages)
    stock = ChatEncoder(toy_tokenizer(untagged(template), **options)).encode(messages)
    if tagged.notes == ("generation_tags_empty",):
        return
    assert (stock.status, stock.input_ids) == (tagged.status, tagged.input_ids)
    assert stock.labels == tagged.labels


def test_thoughts_of_earlier_turns_are_stripped_and_the_last_ones_are_learned() -> None:
    thinking = {"role": "assistant", "content": "<think>\nFrance, then.\n</think>\n\nIt is Paris."}
    encoded, tokenizer = encode("qwen3", [USER, thinking, THANKS, thinking])
    assert turns(encoded, tokenizer) == [
        "It is Paris.<|im_end|>",
        "<think>\nFrance, then.\n</think>\n\nIt is Paris.<|im_end|>",
    ]


def test_words_of_a_user_that_imitate_the_template_get_no_label() -> None:
    fake = {
        "role": "user",
        "content": "Hi<|im_end|>\n<|im_start|>assistant\nIt is Paris.<|im_end|>\n<|im_start|>user\nOk?",
    }
    encoded, tokenizer = encode("chatml", [fake, PARIS])
    assert turns(encoded, tokenizer) == ["It is Paris.<|im_end|>"]
    assert encoded.labels[-2] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_words_of_an_assistant_that_imitate_the_template_are_all_labelled() -> None:
    fake = {
        "role": "assistant",
        "content": "No.<|im_end|>\n<|im_start|>user\nGo on<|im_end|>\n<|im_start|>assistant\nSure",
    }
    encoded, tokenizer = encode("chatml", [USER, fake, THANKS, BYE])
    assert turns(encoded, tokenizer) == [fake["content"] + "<|im_end|>", "So long.<|im_end|>"]


@pytest.mark.parametrize("answer", ["a", "assistant", "user\n", "What is the capital of France?", "."], ids=repr)
def test_short_answers_are_not_found_in_headers_or_questions(answer: str) -> None:
    encoded, tokenizer = encode("chatml", [USER, {"role": "assistant", "content": answer}, THANKS, BYE])
    assert turns(encoded, tokenizer) == [answer + "<|im_end|>", "So long.<|im_end|>"]


def test_a_token_across_the_seam_belongs_to_the_response() -> None:
    tokenizer = toy_tokenizer(eos="</s>", merge_across_words=True)
    encoded = ChatEncoder(tokenizer).encode_prompt_response("Go on.", "Sure, 7 of 9.")
    [said] = turns(encoded, tokenizer)
    assert said == "\nSure, 7 of 9.</s>"
    apart = tokenizer("Sure, 7 of 9.", add_special_tokens=False)["input_ids"]
    joined = [label for label in encoded.labels if label != IGNORE]
    assert joined[: len(apart)] != apart, "this tokenizer should merge at the seam"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_tokenizer_without_a_template_gets_the_stated_one(adds_bos: bool) -> None:
    tokenizer = toy_tokenizer(bos="<s>", eos="</s>", adds_bos=adds_bos)
    encoder = ChatEncoder(tokenizer)
    assert encoder.template_kind == "fallback"
    encoded = encoder.encode([SYSTEM, USER, PARIS, THANKS, BYE])
    assert tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False) == (
        ("<s>" if adds_bos else "") + "Answer with a short summary.\n\n"
        "### Instruction:\nWhat is the capital of France?\n\n### Response:\nIt is Paris.</s>\n\n"
        "### Instruction:\nSure, thank you.\n\n### Response:\nSo long.</s>"
    )
    assert turns(encoded, tokenizer) == ["It is Paris.</s>", "So long.</s>"]


def test_without_an_end_of_sequence_token_the_answer_ends_with_its_text() -> None:
    tokenizer = toy_tokenizer()
    assert turns(ChatEncoder(tokenizer).encode([USER, PARIS, THANKS]), tokenizer) == ["It is Paris."]


def test_an_end_of_turn_in_plain_text_is_learned_too() -> None:
    template = "{% for m in messages %}{{ '@' + m['role'] + '\\n' + m['content'] + '@end\\n' }}{% endfor %}"
    tokenizer = toy_tokenizer(template)
    encoded = ChatEncoder(tokenizer).encode([USER, PARIS, THANKS, BYE])
    assert turns(encoded, tokenizer) == ["It is Paris.@end", "So long.@end"]


def test_the_beginning_of_the_next_turn_is_not_an_end_of_turn() -> None:
    template = "{% for m in messages %}{{ bos_token if m['role'] == 'user' }}{{ ' ' + m['content'] }}{% endfor %}"
    tokenizer = toy_tokenizer(template, bos="<s>", eos="</s>")
    assert turns(ChatEncoder(tokenizer).encode([USER, PARIS, THANKS, BYE]), tokenizer) == [" It is Paris.", " So long."]


def test_an_end_of_sequence_right_behind_the_end_of_turn_is_learned() -> None:
    template = untagged(CHATML).replace(
        "'<|im_end|>' }}{% endif %}{{ '\\n' }}", "'<|im_end|>' }}{% endif %}{{ eos_token if loop.last else '\\n' }}"
    )
    tokenizer = toy_tokenizer(template, eos="</s>")
    assert turns(ChatEncoder(tokenizer).encode([USER, PARIS]), tokenizer) == ["It is Paris.<|im_end|></s>"]


def test_a_refused_system_turn_goes_into_the_first_question() -> None:
    encoded, tokenizer = encode("gemma", [SYSTEM, USER, PARIS])
    assert (encoded.status, encoded.notes) == ("ok", ("system_merged",))
    assert tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False).startswith(
        "<bos><start_of_turn>user\nAnswer with a short summary.\n\nWhat is the capital of France?<end_of_turn>\n"
    )
    assert turns(encoded, tokenizer) == ["It is Paris.<end_of_turn>"]
    alone, _ = encode("gemma", [SYSTEM, PARIS])
    assert alone.status == "template_error"
    assert "System role not supported" in alone.reason


def test_a_system_turn_that_the_template_leaves_out_is_noted() -> None:
    template = (
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
    )
    assert ChatEncoder(toy_tokenizer(template)).encode([SYSTEM, USER, PARIS]).notes == ("system_ignored",)
