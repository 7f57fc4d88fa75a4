"""Token ids become the text of an answer: whole, or growing while its tokens come."""

import re
from collections.abc import Sequence

from model.data.tokenizer import ChatGLMTokenizer

FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
CHINESE = r"[\u4e00-\u9fff]"
HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that are no character yet
UNSETTLED = HALF_A_CHARACTER + "".join(FULL_WIDTH)  # punctuation that the next character may widen


def answer_text(ids: Sequence[int], tokenizer: ChatGLMTokenizer, english: bool = False) -> str:
    """The answer that token ids spell."""
    return tidied(tokenizer.decode(list(ids)), english)


def tidied(response: str, english: bool = False) -> str:
    """An answer as the released demo shows it, with full-width punctuation beside Chinese characters."""
    response = response.strip().replace("[[训练时间]]", "2023年")
    for half, full in FULL_WIDTH.items():
        if half in response:
            response = re.sub(rf"({CHINESE}){re.escape(half)}", rf"\1{full}", response)
            response = re.sub(rf"{re.escape(half)}({CHINESE})", rf"{full}\1", response)
    return response.split("A:" if english else "答：")[-1].strip()


class GrowingText:
    """The text of an answer's tokens so far. Only new tokens are decoded, together with those of the step before.

    Those are needed because a tokenizer writes no space before the first word that it is given.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, english: bool = False) -> None:
        self.tokenizer, self.english = tokenizer, english
        self.written = ""  # the text of the tokens before `until`, as decoded
        self.since, self.until = 0, 0  # tokens of the step before

    def of(self, ids: Sequence[int], finished: bool = False) -> str:
        """The text of ids, which begin with those of the last call. Half a character waits for its other half.

        When finished it is `answer_text`'s, to the letter.
        """
        if finished:
            return answer_text(ids, self.tokenizer, self.english)
        before = self.tokenizer.decode(list(ids[self.since : self.until]))
        text = self.tokenizer.decode(list(ids[self.since :]))
        if len(text) > len(before) and not text.endswith(HALF_A_CHARACTER):
            self.written += text[len(before) :]
            self.since, self.until = self.until, len(ids)
        return tidied(self.written, self.english)


def new_text(text: str, shown: str, finished: bool = False) -> str:
    """What to show after what is shown already, so that it becomes text; nothing where text took another turn.

    Until text is finished, an end that the next token may change is held back.
    """
    settled = text if finished else text.rstrip(UNSETTLED)
    return settled[len(shown) :] if settled.startswith(shown) else ""
