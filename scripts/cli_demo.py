"""Talk with a VisualGLM about a picture, in the terminal.

python scripts/cli_demo.py --from_pretrained model/tiny
python scripts/cli_demo.py --from_pretrained model/tiny --image fewshot-data/images/train00.png --query 描述这张图片。
torchrun --nproc-per-node 2 scripts/cli_demo.py --from_pretrained visualglm-6b        one model, split between two GPUs

At a terminal lines can be edited, and earlier ones come back with the up key, also those of the last time. Ctrl-D, Ctrl-C
and `stop` leave, the second at any moment.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from model.checkpoints.download import may_be_downloaded
from model.checkpoints.layout import Checkpoint
from model.chinese import LANGUAGE_VARIABLES, UI_LANGUAGES, choose_ui_language
from model.cli.flag_parser import FlagParser
from model.data.images import open_image
from model.data.remote_images import is_url
from model.distributed import done_by_first_process, world_size
from model.errors import InputError, command
from model.inference.flags import (
    CONVERSATION_LENGTH,
    add_checkpoint_flags,
    add_max_length_flag,
    add_number_format_flags,
    add_sampling_flags,
    found_checkpoint,
    loaded,
    max_length_of,
    sampling_of,
    with_compared,
)
from model.inference.keyboard import line_editing, typed_path
from model.inference.sampling import CHINESE_TOKENS
from model.progress import say, show, warn


@dataclass(frozen=True)
class Words:
    """What the demo says, in the user's language."""

    ask_picture: str
    ask: str
    answer: str
    answer_of: str
    hint: str


CHINESE = Words(
    "图片的路径或网址（回车：不用图片；stop：退出）：",
    "问：",
    "答：",
    "答（{name}）：",
    "输入 clear 重新开始，stop 退出。",
)
ENGLISH = Words(
    "Picture, a path or a URL (Enter: none; stop: leave): ",
    "Q: ",
    "A: ",
    "A ({name}): ",
    "clear starts over, stop ends.",
)


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser, default="visualglm-6b")
    add = parser.add_argument
    # fmt: off
    add("--compare", metavar="OTHER", help="a second checkpoint, which answers the same questions after the first")
    add("--image", metavar="PATH_OR_URL", help="ask about this picture once, and leave")
    add("--query", metavar="TEXT", help="ask this once, and leave (default with --image: the prompt below)")
    add("--prompt_zh", default="描述这张图片。", metavar="TEXT", help="first question of a picture (default %(default)s)")
    add("--prompt_en", default="Describe the image.", metavar="TEXT",
        help="the same where English is asked (default %(default)s)")
    add("--english", action="store_true",
        help="ask and answer in English; Chinese tokens are forbidden (default: ask as the checkpoint was trained)")
    add_max_length_flag(parser, "a conversation", CONVERSATION_LENGTH)
    add("--ui_lang", default="auto", choices=UI_LANGUAGES,
        help="language of what the demo itself says, problems included; auto is the language of the answers "
             "(default %(default)s)")
    # fmt: on
    add_sampling_flags(parser, temperature=0.8)
    add_number_format_flags(parser)
    return parser


def choose_language(options: argparse.Namespace, lang: str = "zh") -> None:
    """Say everything in the demo's language, unless --ui_lang or VISUALGLM_UI_LANG asks for another one.

    Args:
        lang: the language that the checkpoint answers in without --english.
    """
    options.lang = "en" if options.english else lang
    language = options.ui_lang
    if language == "auto" and not os.environ.get(LANGUAGE_VARIABLES[0]):
        language = options.lang
    choose_ui_language(language)


def words_of(options: argparse.Namespace) -> Words:
    """What the demo says: in the language of --ui_lang, else in the one that it answers in."""
    if options.ui_lang != "auto":
        return CHINESE if options.ui_lang == "zh" else ENGLISH
    return ENGLISH if options.lang == "en" else CHINESE


def check(options: argparse.Namespace) -> list[Checkpoint]:
    """Check the numbers and the picture, and find the checkpoints, before torch is loaded.

    Raises:
        InputError: one isn't there, or a number is out of bounds.
    """
    options.sampling = sampling_of(options, (CHINESE_TOKENS,) if options.english else ())
    for name in ("image", "query", "prompt_zh", "prompt_en"):
        flag, value = f"--{name}", getattr(options, name)
        if value is not None and not value.strip():
            raise InputError(f"{flag}: it is empty; a value is needed, or no {flag}.")
    if options.image and may_be_downloaded(options.from_pretrained):
        picture_path(options.image)  # in hours it would be told in the language of the checkpoint
    checkpoint = found_checkpoint(options)
    choose_language(options, checkpoint.asked_as.lang)
    if options.image:
        options.image = picture_path(options.image)
    checkpoints = with_compared(checkpoint, options)
    options.max_length = max_length_of(options, checkpoints, CONVERSATION_LENGTH)
    return checkpoints


def picture_path(text: str) -> str:
    """The path or URL of a picture, as it was typed; a file can be opened.

    Raises:
        InputError: there is no such file, or it is no picture.
    """
    path = typed_path(text)
    if not is_url(path):
        try:
            with suppress(PermissionError):  # open_image tells it
                os.lstat(path)
        except (OSError, ValueError):
            raise InputError(f"there is no file {path}; the path or the address of a picture is needed.") from None
        open_image(path)
    return path


def line_typed(prompt: str) -> str:
    """A line from the keyboard of the first process, without the blanks around it, on every process.

    Raises:
        EOFError: there is no more.
    """

    def line() -> str:
        if sys.stdin is None:
            raise EOFError
        return input(prompt)

    return typed(done_by_first_process(line)).strip()


def typed(text: str) -> str:
    """Text as it was typed, also where Python takes the terminal for one without UTF-8; what isn't text is a � there."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Speaker:
    """A loaded checkpoint, the picture that it sees, if any, and what was said about it."""

    def __init__(self, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
        from model.inference.engine import Engine

        self.name, self.options = checkpoint.name, options
        # One person talks with all processes: each has a part of the model.
        self.model, self.tokenizer = loaded(checkpoint, options, model_parallel_size=world_size())
        self.engine = Engine(self.model, self.tokenizer, positions=options.max_length)
        self.image: Any = None  # [1, 3, H, W] on the model's device
        self.history: list[tuple[str, str]] = []
        self.is_cut = False  # whether the last answer has no end

    def look(self, picture: str) -> None:
        """Begin a new conversation about a picture, or about none if it is empty."""
        from model.inference.chat import image_tensor

        self.image, self.history = None, []
        if picture:
            image = done_by_first_process(lambda: image_tensor(picture, self.model).cpu())
            self.image = image.to(self.model.transformer.word_embeddings.weight.device)

    def answer(self, query: str, label: str) -> None:
        """Print the answer after its label while it grows, and add the turn to the conversation."""
        from model.inference.text import new_text

        printed = response = ""
        for response in self._so_far(query, label):
            piece = new_text(response, printed)
            show(piece, "")
            printed += piece
        rest = new_text(response, printed, finished=True) if response.startswith(printed) else f"\n{response}"
        show(rest)
        self.history.append((query, response))

    def _so_far(self, query: str, label: str) -> Iterator[str]:
        """The answer as it grows, once the label is printed: a question that is refused gets none."""
        from model.inference.chat import answer_so_far

        texts = answer_so_far(
            self.image,
            self.model,
            self.tokenizer,
            query,
            self.history,
            max_length=self.options.max_length,
            sampling=self.options.sampling,
            lang="en" if self.options.english else None,
            engine=self.engine,
        )
        show(label, "")
        finished = yield from texts
        self.is_cut = finished == "length"


class Demo:
    """The checkpoints that answer, and a person at the keyboard."""

    def __init__(self, checkpoints: Sequence[Checkpoint], options: argparse.Namespace) -> None:
        import torch

        self.options = options
        self.words = words_of(options)
        self.speakers = [Speaker(checkpoint, options) for checkpoint in checkpoints]
        if options.seed is not None:
            torch.manual_seed(options.seed)  # after loading, which sets SAT's own

    @property
    def first_question(self) -> str:
        """What is asked of a new picture."""
        return self.options.prompt_en if self.options.lang == "en" else self.options.prompt_zh

    def ask_once(self) -> None:
        """Answer --query about --image: the answer alone, or one of each checkpoint after its name."""
        self.look(self.options.image or "")
        query = self.first_question if self.options.query is None else self.options.query
        self.answer(typed(query), "", "{name}: ")
        if self.cut:
            warn(self.cut)

    def look(self, picture: str) -> None:
        """Begin a new conversation about a picture, or about none if it is empty."""
        for speaker in self.speakers:
            speaker.look(picture)

    def answer(self, query: str, label: str, label_of: str) -> None:
        """Print every checkpoint's answer, each after its label."""
        for speaker in self.speakers:
            speaker.answer(query, (label_of if len(self.speakers) > 1 else label).format(name=speaker.name))

    @property
    def cut(self) -> str:
        """What is to be said of answers that have no end; nothing if all have one."""
        if not any(speaker.is_cut for speaker in self.speakers):
            return ""
        return f"The answer was cut off (--max_length {self.options.max_length})."

    def talk(self) -> None:
        """Pictures and questions from the keyboard, until `stop` or the end of input."""
        show(self.words.hint)
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # see `typed`
        with line_editing():
            while self._talk_about_one_picture():
                pass

    def _talk_about_one_picture(self) -> bool:
        """Whether the user wants another picture."""
        picture = line_typed(self.words.ask_picture)
        if picture in ("stop", "clear"):
            return picture == "clear"
        try:
            self.look(picture_path(picture) if picture else "")
        except InputError as problem:
            say(str(problem))
            return True
        query = typed(self.first_question) if picture else ""
        while True:
            query = query or line_typed(self.words.ask)
            if query in ("stop", "clear"):
                return query == "clear"
            try:
                if query:
                    self.answer(query, self.words.answer, self.words.answer_of)
                    if self.cut:
                        say(self.cut)
            except InputError as problem:
                say(str(problem))
                if any(speaker.history for speaker in self.speakers):
                    show(self.words.hint)
            query = ""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; Ctrl-D ends it with a line's end, and `model.errors` lists the statuses that it may end with."""
    with command("cli_demo.py"):
        options = command_line().parse_args(argv)
        choose_language(options)
        demo = Demo(check(options), options)
        try:
            if (options.image, options.query) != (None, None):
                demo.ask_once()
            else:
                demo.talk()
        except EOFError:
            show("")
        except SystemExit:  # a signal: what comes next on the screen begins on a line of its own
            show("")
            raise


if __name__ == "__main__":
    main()
