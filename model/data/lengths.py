"""How many tokens rows take. Whoever asks that asks here.

A turn has two lengths, counted as the flags that bound them count:

    <img> · · · </img> 问 ： question <n> 答 ： gMASK sop answer eop
    '------------------ source -------------------' '-- target --'

A turn within --max_source_length and --max_target_length loses nothing. What `sample_from_row` truncates of longer
ones is counted here without making samples. A text is tokenized only if its characters leave open whether it fits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import chain, cycle, islice
from typing import TypeVar

from model.data.prompt import (
    IMAGE_OPEN,
    LEAST_TARGET_LENGTH,
    TOKENS_AFTER_SOURCE,
    TOKENS_AROUND_LABEL,
    Lengths,
    Tokenizer,
    chat_prompt,
    least_source_length,
    pre_image,
    question_text,
)
from model.data.rows import Row, Rows, row_turns
from model.data.workers import begin_in_processes

PACKED_TOKENS = 2048  # of one sequence with --packing: attention's cost grows with its square
PAD_MULTIPLE = 8  # tokens, to whose multiples batches are padded; half-precision matrix units work in tiles of 8
ROWS_AT_ONCE = 1000  # tokenized together
ROWS_PER_PROCESS = 10_000  # below that, counting is quicker than starting a process
EXAMPLE = 40  # characters of a text that is shown
MANY_BYTES = 0.05  # of a text's characters: an emoji now and then is less
Part = tuple[str, range]  # a file, and some of its rows
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Truncations:
    """How many samples there are, and how many of them lose tokens of the prompt, of the label, or earlier turns.

    Their texts are counted too: characters, and those that become bytes, as `characters_in_bytes` has it.
    """

    samples: int = 0
    prompts: int = 0
    labels: int = 0
    histories: int = 0
    characters: int = field(default=0, compare=False)
    in_bytes: int = field(default=0, compare=False)

    def __add__(self, other: "Truncations") -> "Truncations":
        return Truncations(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


class TokenCounter:
    """Counts the tokens of turns. Equal texts are tokenized once.

    Where at_least is given, every count is at least that. A turn that surely takes no more tokens is not tokenized.
    """

    def __init__(self, tokenizer: Tokenizer, lengths: Lengths) -> None:
        """lengths says what surrounds the texts; its two maxima are not read."""
        self._tokenizer, self._lengths = tokenizer, lengths
        self._image_tokens = pre_image(tokenizer) + lengths.image_length
        frames = [
            chat_prompt(lengths.source_prefix, None, True, english).removeprefix(IMAGE_OPEN)
            for english in (False, True)
        ]
        # A frame adds at most as many tokens as it has characters, if each is one token. Else no text surely fits.
        self._frame_characters = max(map(len, frames)) if all(map(self._has_known_characters, frames)) else 2**31

    def sources(self, turns: Sequence[Row], at_least: int = 0) -> list[int]:
        """Tokens of each turn's picture, history, question and frame, and [gMASK]."""
        around = [TOKENS_AFTER_SOURCE + (self._image_tokens if turn.img else 0) for turn in turns]
        texts: list[str | None] = []
        for turn, tokens in zip(turns, around, strict=True):
            prompt_room = at_least - tokens - self._frame_characters
            fits = not turn.history and self._surely_fits(turn.prompt, prompt_room)
            texts.append(None if fits else question_text(turn, self._lengths, turn.history))
        return self._counts(texts, around, at_least)

    def targets(self, turns: Sequence[Row], at_least: int = 0) -> list[int]:
        """Tokens of each turn's label, and <sop> and <eop>."""
        return self._counts([turn.label for turn in turns], [TOKENS_AROUND_LABEL] * len(turns), at_least)

    def _counts(self, texts: Sequence[str | None], around: Sequence[int], at_least: int) -> list[int]:
        """Tokens of each text and those around it. None stands for a text that takes at_least tokens at most."""
        unsure = (
            text
            for text, tokens in zip(texts, around, strict=True)
            if text is not None and not self._surely_fits(text, at_least - tokens)
        )
        to_count = list(dict.fromkeys(unsure))
        counts = dict(zip(to_count, self._tokenizer.token_counts(to_count), strict=True))
        return [
            at_least if text is None else max(at_least, counts.get(text, 0) + tokens)
            for text, tokens in zip(texts, around, strict=True)
        ]

    def _surely_fits(self, text: str, tokens: int) -> bool:
        # Less, not as many: SentencePiece puts one mark of its own before a text.
        return len(text) < tokens and self._has_known_characters(text)

    def _has_known_characters(self, text: str) -> bool:
        """Whether text has no more tokens than characters, and one mark."""
        return self._tokenizer.known_characters.issuperset(text) and "  " not in text  # several spaces are one token


def turn_lengths(rows: Iterable[Row], tokenizer: Tokenizer, lengths: Lengths) -> Iterator[tuple[int, int]]:
    """Tokens of the source and of the target of every turn, in order, as if nothing were truncated."""
    counter = TokenCounter(tokenizer, lengths)
    for some in _some_at_once(rows):
        turns = _turns(some)
        yield from zip(counter.sources(turns), counter.targets(turns), strict=True)


def count_truncations(rows: Iterable[Row], tokenizer: Tokenizer, lengths: Lengths) -> Truncations:
    """How many samples rows make, and how many of them `lengths` truncate."""
    counter = TokenCounter(tokenizer, lengths)
    longest_source, longest_target = lengths.max_source_length, lengths.max_target_length
    total = Truncations()
    for some in _some_at_once(rows):
        turns = _turns(some)
        sources = counter.sources(turns, longest_source)
        too_long = [turn for turn, tokens in zip(turns, sources, strict=True) if tokens > longest_source]
        # Earlier turns leave first. The prompt is truncated if it is too long without them.
        prompts = counter.sources([turn._replace(history=()) for turn in too_long], longest_source)
        text = "".join(_texts(turns))  # quicker together than one by one
        total += Truncations(
            samples=len(turns),
            prompts=sum(tokens > longest_source for tokens in prompts),
            labels=sum(tokens > longest_target for tokens in counter.targets(turns, longest_target)),
            histories=sum(bool(turn.history) for turn in too_long),
            characters=len(text),
            in_bytes=tokenizer.characters_in_bytes(text),
        )
    return total


def bytes_note(rows: Iterable[Row], tokenizer: Tokenizer, counted: Truncations) -> str | None:
    """What is said, with an example, where a large share of the characters of rows become bytes.

    Args:
        counted: of the same rows, or of these and some that are left out. If it holds few such characters, no row is read.
    """
    if counted.in_bytes <= MANY_BYTES * counted.characters:
        return None
    texts = list(_texts(_turns(rows)))
    whole = "".join(texts)
    in_bytes = tokenizer.characters_in_bytes(whole)
    if in_bytes <= MANY_BYTES * len(whole):
        return None
    # One with at least the share of all, which one must have. Whole numbers compare exactly.
    typical = next(
        text for text in texts if text and tokenizer.characters_in_bytes(text) * len(whole) >= in_bytes * len(text)
    )
    start = next(place for place, character in enumerate(typical) if tokenizer.characters_in_bytes(character))
    example = " ".join(typical[start:].split())[:EXAMPLE]
    return (
        f"{100 * in_bytes / len(whole):.0f} % of the characters have no token, as in “{example}”; each becomes 2 to 4 tokens of "
        "one byte, from which this model learns little."
    )


def needed_lengths(rows: Iterable[Row], tokenizer: Tokenizer, lengths: Lengths) -> tuple[int, int]:
    """The smallest --max_source_length and --max_target_length that truncate nothing of rows.

    Args:
        lengths: says what surrounds the texts; its two maxima are not read.
    """
    counter = TokenCounter(tokenizer, lengths)
    source, target = least_source_length(tokenizer, lengths.image_length), LEAST_TARGET_LENGTH
    for some in _some_at_once(rows):
        source = max(counter.sources(some, source))  # of each row's last turn: it holds the earlier ones
        target = max(counter.targets(_turns(some), target))
    return source, target


def bounded_length(source: int, target: int, lengths: Lengths) -> int:
    """About how many tokens a sample has whose source and target are so long, if not truncated."""
    return min(source, lengths.max_source_length) + min(target, lengths.max_target_length)


def estimated_length(turn: Row, lengths: Lengths) -> int:
    """About how many tokens a turn's sample has, told from its characters: quick enough to sort all samples by it."""
    history = sum(len(question) + len(answer) for question, answer in turn.history)
    source = history + len(turn.prompt) + (lengths.image_length if turn.img else 0)
    return bounded_length(source, len(turn.label), lengths)


def longest_samples(
    files: Mapping[str, Rows], tokenizer: Tokenizer, lengths: Lengths, count: int = 1
) -> tuple[list[int], int]:
    """Tokens of the count longest samples that the rows make, and of the longest target in one, after truncation.

    A batch is padded to its longest sample, so that the largest batch of a run has the longest of all. Samples that are
    fewer come again. Where padding is learned too, all are as long as the lengths allow (`sample_from_row`).
    """
    if not lengths.ignore_pad_token_for_loss:
        padded = lengths.max_source_length + lengths.max_target_length
        return [padded] * count, padded  # all but the question of the shortest

    def of_rows(rows: Iterable[Row]) -> tuple[list[int], int]:
        pairs = list(turn_lengths(rows, tokenizer, lengths))
        target = max((min(target, lengths.max_target_length) for _, target in pairs), default=0)
        return nlargest(count, (bounded_length(*pair, lengths) for pair in pairs)), target

    longest, targets = zip(*_begin(of_rows, files, _parts(files))(), strict=True)
    return list(islice(cycle(nlargest(count, chain(*longest))), count)), max(targets)


def packs(lengths: Sequence[int], capacity: int = PACKED_TOKENS) -> list[list[int]]:
    """Which samples, of so many tokens each, share a row of up to capacity tokens: first fit, the longest first.

    One that is longer has a row of its own.
    """
    rows: list[list[int]] = []
    taken: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, tokens in enumerate(taken) if tokens + lengths[index] <= capacity), len(rows))
        if row == len(rows):
            rows.append([])
            taken.append(0)
        rows[row].append(index)
        taken[row] += lengths[index]
    return rows


def padded(tokens: int) -> int:
    """Tokens of the rows of a batch whose longest has so many."""
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def packed_shape(lengths: Sequence[int]) -> tuple[int, int]:
    """Rows, and tokens of each, of the batch that --packing makes of samples of so many tokens."""
    rows = packs(lengths)
    return len(rows), padded(max(sum(lengths[index] for index in row) for row in rows))


def begin_counting_truncations(
    files: Mapping[str, Rows], tokenizer: Tokenizer, lengths: Lengths
) -> Callable[[], dict[str, Truncations]]:
    """What lengths truncate of each file's rows; returns a function that waits until they are counted.

    Very many rows are counted in processes of their own, while this one does something else.
    """
    parts = _parts(files)
    wait = _begin(lambda rows: count_truncations(rows, tokenizer, lengths), files, parts)

    def truncations() -> dict[str, Truncations]:
        total = dict.fromkeys(files, Truncations())
        for (file, _), found in zip(parts, wait(), strict=True):
            total[file] += found
        return total

    return truncations


def auto_lengths(
    files: Mapping[str, Rows],
    tokenizer: Tokenizer,
    lengths: Lengths,
    source: int | None,
    target: int | None,
    limit: int,
) -> tuple[int, int]:
    """--max_source_length and --max_target_length; one that is None becomes what the rows need.

    If the model can't take both, questions get what the answers leave, but at least half. Where both are given, no row is
    looked at.

    Args:
        limit: tokens that the model takes, source and target together.
    """
    if source is not None and target is not None:
        return source, target
    needed = _begin(lambda rows: needed_lengths(rows, tokenizer, lengths), files, _parts(files))()
    needed_source, needed_target = map(max, zip(*needed, strict=True))
    if source is None:
        source = min(needed_source, limit - target if target is not None else max(limit - needed_target, limit // 2))
    if target is None:
        target = min(needed_target, limit - source)
    return source, target


def _some_at_once(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while some := list(islice(iterator, ROWS_AT_ONCE)):
        yield some


def _turns(rows: Iterable[Row]) -> list[Row]:
    return [turn for row in rows for turn in (row_turns(row) if row.history else (row,))]


def _texts(turns: Sequence[Row]) -> Iterator[str]:
    return chain.from_iterable((turn.prompt, turn.label) for turn in turns)


def _parts(files: Mapping[str, Rows]) -> list[Part]:
    """All rows in parts; each file has at least one."""
    return [
        (file, range(start, min(start + ROWS_PER_PROCESS, len(rows))))
        for file, rows in files.items()
        for start in range(0, max(1, len(rows)), ROWS_PER_PROCESS)
    ]


def _begin(
    task: Callable[[Sequence[Row]], Result], files: Mapping[str, Rows], parts: Sequence[Part]
) -> Callable[[], list[Result]]:
    """Begin task for the rows of every part; returns a function that waits for the results."""

    def of_part(part: Part) -> Result:
        file, some = part
        return task(files[file][some.start : some.stop])

    if sum(len(some) for _, some in parts) < 2 * ROWS_PER_PROCESS:
        return lambda: [of_part(part) for part in parts]
    return begin_in_processes(of_part, parts, "A process that counts tokens")
