"""A prompt with an answer, of which only the answer's own words are labelled."""

from __future__ import annotations

from typing import Any

from gradshield_fast.chat import IGNORE, ChatEncoder, Encoded
from gradshield_fast.errors import InputError


class AnswerEncoder:
    """Encodes probes by the tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """Prepare the template.

        Args:
            tokenizer: a Hugging Face tokenizer.
        """
        self._encoder, self._tokenizer = ChatEncoder(tokenizer), tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))

    def encode(self, prompt: str, answer: str, where: str) -> Encoded:
        """Label the fewest tokens of the assistant's turn that read as the answer, and cut what comes behind them.

        So neither the end of the turn counts, nor a header or an empty thought that the template puts in front: a
        refusal may go on, and an opening such as "Sure, here is" must.

        Args:
            prompt: the user turn.
            answer: the beginning of the assistant turn.
            where: what to call this probe in an error.

        Returns:
            Tokens up to the answer's last word, and labels of its words.

        Raises:
            InputError: the template or the tokenizer fails, or the answer has no tokens of its own.
        """
        encoded = self._encoder.encode_prompt_response(prompt, answer)
        if not encoded.usable:
            raise InputError(f"{where}: {encoded.reason or encoded.status}")
        ids = encoded.input_ids
        turn = [t for t, label in enumerate(encoded.labels) if label != IGNORE]
        first, last = turn[0], turn[-1] + 1
        if self._reads(ids[first:last], answer):
            while self._reads(ids[first : last - 1], answer):
                last -= 1
            while self._reads(ids[first + 1 : last], answer):
                first += 1
        while last > first and ids[last - 1] in self._special:  # where the tokenizer does not give the text back
            last -= 1
        if first == last:
            raise InputError(f"{where}: its answer has no tokens besides special ones; reword it")
        return Encoded(ids[:last], [IGNORE] * first + ids[first:last], last - first, "ok")

    def start(self, prompt: str, answer: str, where: str) -> list[int]:
        """Encode what comes before an answer: the prompt, and how the template begins the assistant's turn.

        Args:
            prompt: the user turn.
            answer: an answer; where its words would begin, the model's own will.
            where: what to call this probe in an error.

        Returns:
            Token ids.
        """
        encoded = self.encode(prompt, answer, where)
        return encoded.input_ids[: len(encoded.input_ids) - encoded.response_tokens]

    def _reads(self, ids: list[int], answer: str) -> bool:
        return answer.strip() in self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
