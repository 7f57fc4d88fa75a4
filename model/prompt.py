"""A JSON row becomes token ids: the question's frame, the image's slots, the labels, and what is cut when too long.

One sample, and the flags that bound it (`·` are image_length pad tokens, replaced by the image inside the model):

    <img> · · · </img> 问 ： question <n> 答 ： gMASK sop answer eop
    '------- < max_source_length ------------' '- max_target_length -'

A row without a picture goes without `<img> · · · </img>`. Earlier turns stand between the picture and the question, as
in `chat`; each of them is a sample of its own too, so that a row with two earlier turns makes three samples.

Only the standard library is imported, so that rows can be checked before torch is loaded.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from model.errors import InputError

IGNORE_INDEX = -100  # torch's cross_entropy default: no loss where a label holds it
LEAST_TARGET_LENGTH = 3  # <sop>, one token of the answer, <eop>

IMAGE_OPEN = "<img>"
IMAGE_CLOSE = "</img>"
CHINESE_TURN = ("问：", "答：")
ENGLISH_TURN = ("Q:", "A:")

_OTHER_NAMES_OF_IMG = ("image", "images", "picture")
LANGUAGES = ("zh", "en")

RowValues = tuple[str | None, str, str, tuple[tuple[str, str], ...], str | None]  # img, prompt, label, history, lang
ROW_NEEDS = 'every row is an object with the texts "prompt" and "label", and "img" unless it has no picture'


class Tokenizer(Protocol):
    """What a sample needs of a tokenizer; `model.tokenizer.ChatGLMTokenizer` is one."""

    pad_token_id: int
    bos_token_id: int

    @property
    def known_characters(self) -> frozenset[str]: ...  # as ChatGLMTokenizer's

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def token_counts(self, texts: list[str]) -> list[int]: ...

    def build_inputs_with_special_tokens(self, a: list[int], b: list[int] | None = None) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file, checked. `where` names it for a person: `fewshot-data/dataset.json row 3`.

    Rows are counted from 1. A row without a picture has no img. history holds the earlier turns as (question, answer),
    oldest first; lang is "zh" or "en" where the row itself says so.
    """

    img: str | None
    prompt: str
    label: str
    where: str
    history: tuple[tuple[str, str], ...] = ()
    lang: str | None = None

    def values(self) -> RowValues:
        """What the row says, without where."""
        return self.img, self.prompt, self.label, self.history, self.lang


@dataclass(frozen=True)
class Lengths:
    """How long a sample may be, in tokens, and what surrounds its texts. The names are those of the flags."""

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
class Sample:
    """One turn as token ids. `pre_image` is the position of the first image slot, 0 without a picture.

    What fits has cut counts of 0.
    """

    input_ids: list[int]
    labels: list[int]
    pre_image: int
    prompt_tokens_cut: int
    label_tokens_cut: int
    turns_cut: int = 0


@dataclass(frozen=True, slots=True)
class Cuts:
    """How many samples there are, and how many of them lose something: prompts, labels and earlier turns."""

    samples: int = 0
    prompts: int = 0
    labels: int = 0
    histories: int = 0

    def __add__(self, other: "Cuts") -> "Cuts":
        return Cuts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


def row_from_json(entry: object, where: str) -> Row:
    """Row from one entry of a data file. Keys beyond those of a row are fine, and so is an empty prompt.

        {"img": path, "prompt": text, "label": text, "history": [[question, answer], …], "lang": "zh" or "en"}

    "img", "history" and "lang" may be absent or null. A row without "img" is one of text only; one that has "image",
    "images" or "picture" in its place is refused, for its pictures would be lost.

    Raises:
        InputError: entry is no object, lacks a key, holds something else than these, or its label is empty.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {_json_kind(entry)} instead of an object; {ROW_NEEDS}.")
    missing = [key for key in ("prompt", "label") if key not in entry]
    if missing:
        raise InputError(f"{where}: no {_quoted(missing)}; {ROW_NEEDS}.")
    img, prompt, label = entry.get("img"), entry["prompt"], entry["label"]
    if img is None and (other_name := next((key for key in _OTHER_NAMES_OF_IMG if key in entry), None)):
        raise InputError(f'{where}: no "img", but "{other_name}"; rename it, or convert the file (convert_data.py).')
    for key, value in (("img", "" if img is None else img), ("prompt", prompt), ("label", label)):
        if not isinstance(value, str):
            raise InputError(f'{where}: "{key}" is {_json_kind(value)}; {ROW_NEEDS}.')
    if not _is_unicode(f"{img}{prompt}{label}"):
        key = next(key for key in ("img", "prompt", "label") if not _is_unicode(str(entry.get(key))))
        raise InputError(f'{where}: "{key}" holds half a character (a lone \\ud800–\\udfff); whole ones are needed.')
    if img is not None and not img.strip():
        raise InputError(f'{where}: "img" is empty; it is the path of a picture, or left out in a row of text only.')
    if not label.strip():
        raise InputError(f'{where}: "label" is empty; it is the answer to learn.')
    lang = entry.get("lang")
    if lang is not None and lang not in LANGUAGES:
        raise InputError(f'{where}: "lang" is {_shown(lang)}; "zh" or "en" is needed.')
    return Row(img, prompt, label, where, _history(entry.get("history"), where), lang)


def plain_values(entry: object) -> RowValues | None:
    """Values of an entry that is a good row of the three released keys and no other; None if it is anything else.

    Five times as fast as `row_from_json`, which tells what the others are: most files are of such rows throughout.
    """
    if not isinstance(entry, dict) or len(entry) != 3:
        return None
    img, prompt, label = entry.get("img"), entry.get("prompt"), entry.get("label")
    if not (isinstance(img, str) and isinstance(prompt, str) and isinstance(label, str)):
        return None
    if not img.strip() or not label.strip() or not _is_unicode(f"{img}{prompt}{label}"):
        return None
    return img, prompt, label, (), None


def row_turns(row: Row) -> list[Row]:
    """What a row teaches, oldest first: each earlier turn as the answer to what came before it, and its own label.

    history [[q1, a1]], prompt q2, label a2   →   q1 → a1   and   q1 a1 q2 → a2
    """
    earlier = [
        replace(row, prompt=question, label=answer, history=row.history[:turn])
        for turn, (question, answer) in enumerate(row.history)
    ]
    return [*earlier, row]


def _turns_of(values: RowValues) -> list[RowValues]:
    img, prompt, label, history, lang = values
    return [turn.values() for turn in row_turns(Row(img, prompt, label, "", history, lang))]


def sample_from_row(row: Row, tokenizer: Tokenizer, lengths: Lengths) -> Sample:
    """Sample of one row's last turn: int[seq] input_ids and labels of equal length, without padding.

    A row that fits gives the released script's tokens. Where it doesn't, its earlier turns leave, the oldest first and
    each as a whole; then the prompt (with its prefix) loses tokens at its end, never the frame nor the image's slots.
    The label loses tokens at its end, and its <eop> with them.

    With `ignore_pad_token_for_loss` off, padding is learned too, so the sample is padded here to the released script's
    length, max_source_length + max_target_length: the mean loss depends on how much padding there is.

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
    # The released script counts one token less than the flag for the source, and two less for the label.
    question_room = lengths.max_source_length - 1 - len(image_ids) - len(image_slots)
    label_room = lengths.max_target_length - 2

    question_ids, turns_cut = _question_ids(row, question_room, tokenizer, lengths)
    prompt_tokens_cut = 0
    if len(question_ids) > question_room:
        least = least_source_length(tokenizer, lengths.image_length)
        if lengths.max_source_length < least:
            raise InputError(
                f"--max_source_length {lengths.max_source_length} leaves no room for a question beside"
                f" {lengths.image_length} image tokens; at least {least} is needed."
            )
        prompt, english = lengths.source_prefix + row.prompt, _is_english(row, lengths)
        frame = _question_frame(tokenizer, row.img is not None, english)
        question_ids, prompt_tokens_cut = _shortened_question(question_ids, prompt, question_room, tokenizer, frame)

    label_ids = tokenizer.encode(row.label, add_special_tokens=False)
    label_tokens_cut = max(0, len(label_ids) - label_room)
    input_ids = tokenizer.build_inputs_with_special_tokens(
        image_ids + image_slots + question_ids, label_ids[:label_room]
    )
    if label_tokens_cut:
        input_ids.pop()  # <eop> after half an answer would teach the model to stop in mid-sentence
    labels = answer_labels(input_ids, tokenizer.bos_token_id)
    if not lengths.ignore_pad_token_for_loss:
        padding_length = lengths.max_source_length + lengths.max_target_length - len(input_ids)
        padding = [tokenizer.pad_token_id] * padding_length
        input_ids, labels = input_ids + padding, labels + padding
    return Sample(input_ids, labels, len(image_ids), prompt_tokens_cut, label_tokens_cut, turns_cut)


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


def count_cuts(rows: Iterable[RowValues], tokenizer: Tokenizer, lengths: Lengths) -> Cuts:
    """How many samples rows make, each given by its values, and what `lengths` cut off from them.

    Only texts are tokenized of which that can't be told from their characters, and a prompt only once.

    Raises:
        InputError: as `sample_from_row`.
    """
    room = lengths.max_source_length - 1
    image_tokens = len(tokenizer.encode(IMAGE_OPEN, add_special_tokens=False)) + lengths.image_length
    # A frame has no more tokens around a prompt than it has characters.
    frame_texts = [
        chat_prompt(lengths.source_prefix, None, True, english).removeprefix(IMAGE_OPEN) for english in (False, True)
    ]
    frame_room = max(map(len, frame_texts)) if all(_is_known(text, tokenizer) for text in frame_texts) else room
    label_room = lengths.max_target_length - 2
    unsure_labels: list[str] = []
    unsure_questions: dict[tuple[str, int], int] = {}  # text and room → how many samples ask it
    samples = prompts = histories = 0
    for values in rows:
        for img, prompt, label, history, lang in _turns_of(values) if values[3] else (values,):
            samples += 1
            if not _surely_fits(label, label_room, tokenizer):
                unsure_labels.append(label)
            question_room = room - (image_tokens if img else 0)
            if history:
                sample = sample_from_row(Row(img, prompt, label, "", history, lang), tokenizer, lengths)
                prompts += sample.prompt_tokens_cut > 0
                histories += sample.turns_cut > 0
            elif not _surely_fits(prompt, question_room - frame_room, tokenizer):
                text = chat_prompt(
                    lengths.source_prefix + prompt, None, img is not None, (lang or lengths.lang) == "en"
                )
                key = text.removeprefix(IMAGE_OPEN), question_room
                unsure_questions[key] = unsure_questions.get(key, 0) + 1
    labels = sum(tokens > label_room for tokens in tokenizer.token_counts(unsure_labels))
    tokens_of_questions = tokenizer.token_counts([text for text, _ in unsure_questions])
    for ((_, question_room), asked), tokens in zip(unsure_questions.items(), tokens_of_questions, strict=True):
        prompts += asked * (tokens > question_room)
    return Cuts(samples, prompts, labels, histories)


def needed_lengths(rows: Iterable[Row], tokenizer: Tokenizer, lengths: Lengths) -> tuple[int, int]:
    """The --max_source_length and --max_target_length that cut nothing of rows, history included.

    Args:
        lengths: what surrounds the texts; its two lengths are not read.
    """
    image_tokens = len(tokenizer.encode(IMAGE_OPEN, add_special_tokens=False)) + lengths.image_length
    source, target = least_source_length(tokenizer, lengths.image_length), LEAST_TARGET_LENGTH
    for row in rows:
        for turn in row_turns(row):
            label_tokens = 0 if _surely_fits(turn.label, target - 2, tokenizer) else len(
                tokenizer.encode(turn.label, add_special_tokens=False)
            )  # fmt: skip
            target = max(target, label_tokens + 2)
        text = _question(row, lengths, row.history)  # of the last turn: the longest, it holds the others
        around = (image_tokens if row.img else 0) + 1
        if not _surely_fits(text, source - around, tokenizer):
            source = max(source, len(tokenizer.encode(text, add_special_tokens=False)) + around)
    return source, target


def least_source_length(tokenizer: Tokenizer, image_length: int) -> int:
    """The smallest --max_source_length, in tokens, that leaves room for one token of prompt."""
    image_ids = tokenizer.encode(IMAGE_OPEN, add_special_tokens=False)
    head, tail = max(
        (_question_frame(tokenizer, True, english) for english in (False, True)), key=lambda f: len(f[0]) + len(f[1])
    )
    prompt_token, uncounted = 1, 1  # uncounted: the source may hold max_source_length - 1 tokens
    return len(image_ids) + image_length + len(head) + prompt_token + len(tail) + uncounted


def chat_prompt(query: str, history: Sequence[tuple[str, str]] | None, has_image: bool, english: bool = False) -> str:
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


def _question(row: Row, lengths: Lengths, history: Sequence[tuple[str, str]]) -> str:
    """What follows the image's slots in training; every question has the prefix, an earlier one too."""
    prefix = lengths.source_prefix
    past = [(prefix + question, answer) for question, answer in history]
    text = chat_prompt(prefix + row.prompt, past, row.img is not None, _is_english(row, lengths))
    return text.removeprefix(IMAGE_OPEN) if row.img else text


def _question_ids(row: Row, room: int, tokenizer: Tokenizer, lengths: Lengths) -> tuple[list[int], int]:
    """Token ids of `_question` with as many of the latest earlier turns as room has place for, and how many left."""
    for turns_cut in range(len(row.history) + 1):
        text = _question(row, lengths, row.history[turns_cut:])
        question_ids = tokenizer.encode(text, add_special_tokens=False)
        if len(question_ids) <= room:
            break
    return question_ids, turns_cut


def _is_english(row: Row, lengths: Lengths) -> bool:
    return (row.lang or lengths.lang) == "en"


def _surely_fits(text: str, tokens: int, tokenizer: Tokenizer) -> bool:
    """Whether text has at most so many tokens, as far as that can be told without tokenizing; false if not."""
    return len(text) < tokens and _is_known(text, tokenizer)  # less: SentencePiece puts one mark of its own before it


def _is_known(text: str, tokenizer: Tokenizer) -> bool:
    return tokenizer.known_characters.issuperset(text) and "  " not in text  # several spaces are a piece by themselves


def _question_frame(tokenizer: Tokenizer, has_image: bool = True, english: bool = False) -> tuple[list[int], list[int]]:
    """Token ids before and after the prompt: `</img>问：` and `<n>答：`, without the tag if there is no image."""
    text = chat_prompt("", None, has_image, english).removeprefix(IMAGE_OPEN)
    frame = tokenizer.encode(text, add_special_tokens=False)
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    tail_start = len(frame) - 1 - frame[::-1].index(newline)
    return frame[:tail_start], frame[tail_start:]


def _shortened_question(
    question_ids: list[int], prompt: str, room: int, tokenizer: Tokenizer, frame: tuple[list[int], list[int]]
) -> tuple[list[int], int]:
    """question_ids cut to room tokens at the prompt's end, and how many tokens that took."""
    head, tail = frame
    if question_ids[-len(tail) :] == tail:
        body = question_ids[: -len(tail)]
    else:  # the prompt's end and the frame melted into one token
        body = head + tokenizer.encode(prompt, add_special_tokens=False)
    kept = body[: room - len(tail)]
    return kept + tail, len(body) - len(kept)


def _history(turns: object, where: str) -> tuple[tuple[str, str], ...]:
    needed = "a list of [question, answer] pairs of texts is needed"
    if turns is None:
        return ()
    if not isinstance(turns, list):
        raise InputError(f'{where}: "history" is {_json_kind(turns)}; {needed}.')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f'{where}: "history" holds {_shown(turn)} as its turn {number}; {needed}.')
        if not all(_is_unicode(text) for text in turn):
            raise InputError(f'{where}: "history" holds half a character in its turn {number}; {needed}.')
        if not turn[1].strip():
            raise InputError(f'{where}: "history" has an empty answer in its turn {number}; it is an answer to learn.')
    return tuple((question, answer) for question, answer in turns)


def _quoted(keys: Sequence[str]) -> str:
    return " and no ".join(f'"{key}"' for key in keys)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    kinds: dict[type, str] = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    """A value as JSON, short enough for one line."""
    text = json.dumps(value)  # ASCII: a line break or half a character would garble the report
    return text if len(text) <= 60 else text[:57] + "…"
