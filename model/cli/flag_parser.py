"""argparse's parser, which tells what is wrong with a command line in a sentence: for every command.

    evaluate.py --batch_size 2     →     evaluate.py: error: --batch_size: there is no such flag; did you mean --batch-size?

Only the standard library is imported.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from model.progress import warn

# argparse's own messages and what we say in their place.
_SENTENCES = (
    (r"argument (\S+): invalid int value: '(.*)'", r"\1 \2: a whole number is needed."),
    (r"argument (\S+): invalid (?:float|_rows_or_share) value: '(.*)'", r"\1 \2: a number is needed."),
    (r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", r"\1 \2: one of \3 is needed."),
    (r"argument (\S+): expected one argument", r"\1: no value found; one is needed."),
    (r"argument (\S+): expected at least one argument", r"\1: no value found; one or more are needed."),
    (r"argument (\S+): ignored explicit argument '(.*)'", r"\1=\2: it takes no value; \1 alone is needed."),
    (r"ambiguous option: (\S+) could match (.*)", r"\1: it could be any of \2; the whole flag is needed."),
    (r"the following arguments are required: ([^,]*)", r"\1: not given; it is needed."),
    (r"the following arguments are required: (.*)", r"\1: not given; they are needed."),
    (r"argument (\S+): (.*)", r"\1: \2."),
)


class FlagParser(argparse.ArgumentParser):
    """argparse's parser, except that it tells an error in one sentence of ours and leaves the usage out."""

    def __init__(
        self,
        *,
        help_with_every_flag: str = "--help",
        foreign_flags: Mapping[str, str] | None = None,
        **of_argparse: Any,
    ) -> None:
        super().__init__(**of_argparse)
        self._help_with_every_flag = help_with_every_flag
        self._words: Sequence[str] = ()
        self._own_flags = {_spelling(foreign): own for foreign, own in (foreign_flags or {}).items()}

    def error(self, message: str) -> NoReturn:
        """Print message on standard error, from rank 0 only, and exit with status 2.

        A misspelt flag is told before one that is missing: most often it is the same one.
        """
        if message.startswith("the following arguments are required"):
            words = self._words[: self._words.index("--")] if "--" in self._words else self._words
            self._refuse([word for word in words if word.startswith("--") and not self._is_known(word)])
        warn(f"{self.prog}: error: {_sentence(message)}")
        sys.exit(2)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's."""
        self._words = sys.argv[1:] if args is None else list(args)
        found, unknown = self.parse_known_args(self._words, namespace)
        self._refuse(unknown)
        return found

    def _is_known(self, word: str) -> bool:
        """Whether argparse finds the flag, or takes the word for none, as it does with one that has a blank."""
        flag = word.split("=")[0]
        return " " in word or any(known.startswith(flag) for known in self._option_string_actions)

    def _refuse(self, words: Sequence[str]) -> None:
        """Say what is wrong with words that no flag takes, a sentence for each that looks like a flag."""
        unknown_flags = [word.split("=")[0] for word in words if word.startswith("-")]
        if unknown_flags:
            self.error("\n".join(map(self.unknown_flag, unknown_flags)))
        if words and self._get_positional_actions():
            self.error(f'"{words[0]}": one word too many; it is needed without, or after a flag that takes it.')
        if words:
            self.error(f'"{words[0]}": it follows no flag that takes it; a flag is needed before it.')

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """As argparse's: which flags begin so. Two names of one flag are no two flags."""
        return list({id(found[0]): found for found in super()._get_option_tuples(option_string)}.values())

    def unknown_flag(self, flag: str) -> str:
        """That there is no such flag, and which one may be meant."""
        return f"{flag}: there is no such flag; {self._did_you_mean(flag)}"

    def _did_you_mean(self, flag: str) -> str:
        by_spelling = {_spelling(known): known for known in self._option_string_actions}
        if own := self._own_flags.get(_spelling(flag)):
            return f"did you mean {own}?"
        close = difflib.get_close_matches(_spelling(flag), by_spelling, n=1, cutoff=0.7)
        return f"did you mean {by_spelling[close[0]]}?" if close else f"{self._help_with_every_flag} shows every flag."


def _sentence(message: str) -> str:
    for pattern, sentence in _SENTENCES:
        match = re.fullmatch(pattern, message, re.DOTALL)
        if match:
            return match.expand(sentence)
    return message


def _spelling(flag: str) -> str:
    """A flag without what people mix up: SAT's flags have dashes, the script's underscores."""
    return flag.lower().lstrip("-").replace("_", "-")
