"""A row becomes token ids: the question's frame, the image's slots, the labels, and what is truncated.

One sample, and the flags that bound it (`·` are image_length pad tokens, replaced by the image inside the model):

    <img> · · · </img> 问 ： question <n> 答 ： gMASK sop answer eop
    '------------- max_source_length -------------' '- max_target_length -'

A row without a picture has no `<img> · · · </img>`. Earlier turns stand between the picture and the question, as in
`chat`. Each of them is a sample of its own too: a row with two earlier turns makes three samples.

How long samples are is counted in `model.data.lengths`. Only the standard library is imported, so that rows can be
checked before torch is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from model.data.rows import Row
from model.errors import InputError

IGNORE_INDEX = -100  # torch's cross_entropy default: no loss where a label holds it
TOKENS_AFTER_SOURCE = 1  # [gMASK]: the released script gives the source max_source_length - 1 tokens before it
TOKENS_AROUND_LABEL = 2  # <sop> and <eop>
LEAST_TARGET_LENGTH = TOKENS_AROUND_LABEL + 1

IMAGE_OPEN = "<img>"
IMAGE_CLOSE = "</img>"
CHINESE_TURN = ("问：", "答：")
ENGLISH_TURN = ("Q:", "A:")


class Tokenizer(Protocol):
    """What a sample needs of a tokenizer; `model.data.tokenizer.ChatGLMTokenizer` is one."""

    pad_token_id: int
    bos_token_id: int

    @property
    def known_characters(self) -> frozenset[str]: ...  # as ChatGLMTokenizer's

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def token_counts(self, texts: list[str]) -> list[int]: ...

    def characters_in_bytes(self, text: str) -> int: ...

    def build_inputs_with_special_tokens(self, a: list[int], b: list[int] | None = None) -> list[int]: ...


@dataclass(frozen=True)
class Lengths:
    """How long a sample may be, in tokens, and what surrounds its texts. The fields are named after the flags."""

    image_length: int
    max_source_length: int
    max_target_length: int
    source_prefix: str = ""
    ignore_pad_token_for_loss: bool = True
    lang: str = "zh"  # of rows that don't say

    @classmethod
    def from_args(cls, args: Any) -> "Lengths":
        """Lengths from any object with the flags as attributes; the last three may be absent."""
        return cls(
            image_length=args.image_length,
            max_source_length=args.max_source_length,
            max_target_length=args.max_target_length,
            source_prefix=getattr(args, "source_prefix", None) or "",
            ignore_pad_token_for_loss=getattr(args, "ignore_pad_token_for_loss", True),
            lang=getattr(args, "lang", None) or "zh",
        )


@dataclass(frozen=True)
class AskedAs:
    """How questions stood before the model when it was trained, and so how it is to be asked.

    It is written into every checkpoint, and stays there when LoRA is merged. A base has the released script's frame.
    """

    lang: str = "zh"  # of rows that don't say
    source_prefix: str = ""  # before every question
    max_source_length: int | None = None  # tokens; None where nothing is known to have been cut
    max_target_length: int | None = None

    @classmethod
    def from_options(cls, options: Any) -> "AskedAs":
        """That of a run, from any object with its flags as attributes; those that are absent have their defaults."""
        return cls.from_json(vars(options))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "AskedAs":
        """What a checkpoint's config has under "finetuning" and "asked_as"; what it lacks is as in a base."""
        return cls(
            record.get("lang") or cls.lang,
            record.get("source_prefix") or cls.source_prefix,
            record.get("max_source_length"),
            record.get("max_target_length"),
        )

    def is_english(self, lang: str | None = None) -> bool:
        """Whether a question stands in the English frame: by its own language, else by the one of training."""
        return (lang or self.lang) == "en"

    def lengths(self, image_length: int, longest: int) -> Lengths:
        """What shortens a row as it did in training. longest, in tokens, holds where nothing is known."""
        return Lengths(
            image_length,
            self.max_source_length or longest,
            self.max_target_length or longest,
            self.source_prefix,
            lang=self.lang,
        )


@dataclass(frozen=True)
class Sample:
    """One turn as token ids, and how much of it was truncated: 0 of what fits.

    `pre_image` is the position of the first image slot, 0 without a picture.
    """

    input_ids: list[int]
    labels: list[int]
    pre_image: int
    truncated_prompt_tokens: int
    truncated_label_tokens: int
    dropped_turns: int = 0


def sample_from_row(row: Row, tokenizer: Tokenizer, lengths: Lengths) -> Sample:
    """Sample of one row's last turn: int[seq] input_ids and labels of equal length, without padding.

    A row that fits gives the released script's tokens. If the source is too long, whole earlier turns are dropped, the
    oldest first. If that is not enough, the end of the prompt is truncated. The frame and the image's slots stay.
    A label that is too long loses its end, and <eop> with it.

    With `ignore_pad_token_for_loss` off, padding is learned too, and the mean loss depends on how much of it there is.
    The sample is then padded here to the released script's length, max_source_length + max_target_length.

    Raises:
        InputError: the lengths leave no room for one token of the prompt, or of the label.
    """
    if lengths.max_target_length < LEAST_TARGET_LENGTH:
        raise InputError(
            f"--max_target_length {lengths.max_target_length} leaves no room for an answer;"
            f" at least {LEAST_TARGET_LENGTH} is needed."
        )
    image_ids = tokenizer.encode(IMAGE_OPEN, add_special_tokens=False) if row.img else []
    image_slots = [tokenizer.pad_token_id] * (lengths.image_length if row.img else 0)
    question_room = lengths.max_source_length - TOKENS_AFTER_SOURCE - len(image_ids) - len(image_slots)
    label_room = lengths.max_target_length - TOKENS_AROUND_LABEL

    question_ids, dropped_turns = _question_ids(row, question_room, tokenizer, lengths)
    truncated_prompt_tokens = 0
    if len(question_ids) > question_room:
        least = least_source_length(tokenizer, lengths.image_length)
        if lengths.max_source_length < least:
            raise InputError(
                f"--max_source_length {lengths.max_source_length} leaves no room for a question beside"
                f" {lengths.image_length} image tokens; at least {least} is needed."
            )
        prompt, english = lengths.source_prefix + row.prompt, _is_english(row, lengths)
        frame = _question_frame(tokenizer, row.img is not None, english)
        question_ids, truncated_prompt_tokens = _shortened_question(
            question_ids, prompt, question_room, tokenizer, frame
        )

    label_ids = tokenizer.encode(row.label, add_special_tokens=False)
    truncated_label_tokens = max(0, len(label_ids) - label_room)
    input_ids = tokenizer.build_inputs_with_special_tokens(
        image_ids + image_slots + question_ids, label_ids[:label_room]
    )
    if truncated_label_tokens:
        input_ids.pop()  # <eop> after half an answer would teach the model to stop in mid-sentence
    labels = answer_labels(input_ids, tokenizer.bos_token_id)
    if not lengths.ignore_pad_token_for_loss:
        padding_length = lengths.max_source_length + lengths.max_target_length - len(input_ids)
        padding = [tokenizer.pad_token_id] * padding_length
        input_ids, labels = input_ids + padding, labels + padding
    return Sample(input_ids, labels, len(image_ids), truncated_prompt_tokens, truncated_label_tokens, dropped_turns)


def answer_labels(input_ids: list[int], bos_id: int) -> list[int]:
    """Labels for one sample: the context is ignored, the answer is learned.

        input_ids   <img> · · </img> question gMASK sop a  b  eop
        labels        -   - -   -       -       -   sop a  b  eop

    sop itself is learned too: released losses include it. The first sop counts, as it does in the model's own mask.

    Raises:
        ValueError: bos_id is not in input_ids.
    """
    context_length = input_ids.index(bos_id)
    return [IGNORE_INDEX] * context_length + input_ids[context_length:]


def least_source_length(tokenizer: Tokenizer, image_length: int) -> int:
    """The smallest --max_source_length, in tokens, that leaves room for one token of prompt."""
    frames = (_question_frame(tokenizer, True, english) for english in (False, True))
    longest_frame = max(len(head) + len(tail) for head, tail in frames)
    one_prompt_token = 1
    return pre_image(tokenizer) + image_length + longest_frame + one_prompt_token + TOKENS_AFTER_SOURCE


def pre_image(tokenizer: Tokenizer) -> int:
    """Position of the first image slot: how many tokens `<img>` takes."""
    return len(tokenizer.encode(IMAGE_OPEN, add_special_tokens=False))


def chat_prompt(query: str, history: Sequence[tuple[str, str]] | None, has_image: bool, english: bool) -> str:
    """The text of a conversation up to where the answer begins.

        <img></img>问：question\\n答：answer\\n问：query\\n答：
        '- image -''------- history ---------'

    history holds the past turns as (question, answer), oldest first.
    """
    ask, answer = ENGLISH_TURN if english else CHINESE_TURN
    image = IMAGE_OPEN + IMAGE_CLOSE if has_image else ""
    past = "".join(f"{ask}{old_query}\n{answer}{old_answer}\n" for old_query, old_answer in history or ())
    return f"{image}{past}{ask}{query}\n{answer}"


def context_ids(
    query: str,
    history: Sequence[tuple[str, str]] | None,
    has_image: bool,
    tokenizer: Tokenizer,
    image_length: int,
    english: bool = False,
) -> tuple[list[int], int]:
    """Token ids of a conversation, ending in [gMASK] <sop>, and the position of the first image slot (0 if no image).

    One Chinese question about an image gives what training gives before the answer.
    """
    text = chat_prompt(query, history, has_image, english)
    if not has_image:
        return tokenizer.build_inputs_with_special_tokens(tokenizer.encode(text, add_special_tokens=False)), 0
    image_ids = tokenizer.encode(IMAGE_OPEN, add_special_tokens=False)
    image_slots = [tokenizer.pad_token_id] * image_length
    question_ids = tokenizer.encode(text.removeprefix(IMAGE_OPEN), add_special_tokens=False)
    return tokenizer.build_inputs_with_special_tokens(image_ids + image_slots + question_ids), len(image_ids)


def least_conversation_length(tokenizer: Tokenizer, asked_as: AskedAs) -> int:
    """The smallest --max_length, in tokens, with which a question of one letter, without a picture, has a token of an answer."""
    langs = ("zh", "en") if asked_as == AskedAs() else (asked_as.lang,)  # a base is asked in either frame
    question = asked_as.source_prefix + "a"
    contexts = (context_ids(question, None, False, tokenizer, 0, asked_as.is_english(lang))[0] for lang in langs)
    one_answer_token = 1
    return min(map(len, contexts)) + one_answer_token


def question_text(row: Row, lengths: Lengths, history: Sequence[tuple[str, str]]) -> str:
    """What follows the image's slots in training. The prefix stands before every question, also before earlier ones."""
    prefix = lengths.source_prefix
    past = [(prefix + question, answer) for question, answer in history]
    text = chat_prompt(prefix + row.prompt, past, row.img is not None, _is_english(row, lengths))
    return text.removeprefix(IMAGE_OPEN) if row.img else text


def _question_ids(row: Row, room: int, tokenizer: Tokenizer, lengths: Lengths) -> tuple[list[int], int]:
    """Token ids of `question_text` with the latest earlier turns that fit into room, and how many were dropped."""
    for dropped_turns in range(len(row.history) + 1):
        text = question_text(row, lengths, row.history[dropped_turns:])
        question_ids = tokenizer.encode(text, add_special_tokens=False)
        if len(question_ids) <= room:
            break
    return question_ids, dropped_turns


def _is_english(row: Row, lengths: Lengths) -> bool:
    return (row.lang or lengths.lang) == "en"


def _question_frame(tokenizer: Tokenizer, has_image: bool, english: bool) -> tuple[list[int], list[int]]:
    """Token ids before and after the prompt: `</img>问：` and `<n>答：`, without the tag if there is no image."""
    text = chat_prompt("", None, has_image, english).removeprefix(IMAGE_OPEN)
    frame = tokenizer.encode(text, add_special_tokens=False)
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    tail_start = len(frame) - 1 - frame[::-1].index(newline)
    return frame[:tail_start], frame[tail_start:]


def _shortened_question(
    question_ids: list[int], prompt: str, room: int, tokenizer: Tokenizer, frame: tuple[list[int], list[int]]
) -> tuple[list[int], int]:
    """question_ids with the prompt's end truncated so that room tokens are left, and how many tokens that took."""
    head, tail = frame
    if question_ids[-len(tail) :] == tail:
        body = question_ids[: -len(tail)]
    else:  # the prompt's end and the frame's beginning are one token
        body = head + tokenizer.encode(prompt, add_special_tokens=False)
    kept = body[: room - len(tail)]
    return kept + tail, len(body) - len(kept)
