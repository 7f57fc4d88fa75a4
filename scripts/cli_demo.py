"""Talk with a VisualGLM about a picture, in the terminal.

python scripts/cli_demo.py --from_pretrained model/tiny
python scripts/cli_demo.py --from_pretrained model/tiny --image fewshot-data/images/train00.png --query 描述这张图片。
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import answer_length
from model.data.images import is_url, open_image
from model.inference.flags import (
    add_checkpoint_flags,
    add_number_format_flags,
    add_sampling_flags,
    found_checkpoint,
    sampling_of,
)
from model.progress import printable, say

RELEASED_LENGTH = 2048  # tokens of a conversation, in the released demo
CHINESE_TOKENS = slice(63823, 130000)  # of ChatGLM-6B's vocabulary; --english forbids them


@dataclass(frozen=True)
class Words:
    """What the demo says, in the user's language."""

    ask_picture: str
    ask: str
    answer: str
    hint: str


CHINESE = Words(
    "图片的路径或网址（回车：不用图片；stop：退出）：",
    "问：",
    "答：",
    "输入 clear 重新开始，stop 退出。",
)
ENGLISH = Words(
    "Picture, a path or a URL (Enter: none; stop: leave): ",
    "Q: ",
    "A: ",
    "clear starts over, stop ends.",
)


@dataclass
class Conversation:
    """One picture, or none, and what has been said about it."""

    image: Any = None  # [1, 3, H, W] on the model's device
    history: list[tuple[str, str]] = field(default_factory=list)


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser, default="visualglm-6b")
    add = parser.add_argument
    # fmt: off
    add("--image", metavar="PATH_OR_URL", help="ask about this picture once, and leave")
    add("--query", metavar="TEXT", help="ask this once, and leave (default with --image: the prompt below)")
    add("--prompt_zh", default="描述这张图片。", metavar="TEXT", help="first question of a picture (default %(default)s)")
    add("--prompt_en", default="Describe the image.", metavar="TEXT", help="the same with --english (default %(default)s)")
    add("--english", action="store_true", help="ask and answer in English; Chinese tokens are forbidden")
    add("--max_length", type=int, metavar="N",
        help="tokens of a conversation (default 2048, or as many as a smaller model takes)")
    # fmt: on
    add_sampling_flags(parser, temperature=0.8)
    add_number_format_flags(parser)
    return parser


def check(options: argparse.Namespace) -> Checkpoint:
    """Check the numbers and the picture, and find the checkpoint, before torch is loaded.

    Raises:
        InputError: one isn't there, or a number is out of bounds.
    """
    options.sampling = sampling_of(options, (CHINESE_TOKENS,) if options.english else ())
    checkpoint = found_checkpoint(options)
    options.max_length = answer_length(
        checkpoint.config.get("max_sequence_length", RELEASED_LENGTH), options.max_length, RELEASED_LENGTH
    )
    if options.image and not is_url(options.image):
        open_image(options.image)
    return checkpoint


def typed(text: str) -> str:
    """Text as it was typed, also where Python takes the terminal for one without UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Demo:
    """A loaded model and how it is to answer."""

    def __init__(self, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
        import torch

        from model.inference.load import load_for_answering

        self.options = options
        self.words = ENGLISH if options.english else CHINESE
        self.model, self.tokenizer = load_for_answering(
            checkpoint, options.tokenizer, options.base, options.force_base, options.quant, options.dtype
        )
        if options.seed is not None:
            torch.manual_seed(options.seed)  # after loading, which sets SAT's own

    def look(self, picture: str) -> Conversation:
        """A new conversation about a picture, or about none if it is empty."""
        from model.inference.chat import image_tensor

        return Conversation(image_tensor(picture, self.model) if picture else None)

    def answer(self, conversation: Conversation, query: str) -> None:
        """Print the answer while it grows, and add the turn to the conversation."""
        from model.inference.chat import answer_so_far
        from model.inference.text import new_text

        options, printed, response = self.options, "", ""
        for response in answer_so_far(
            conversation.image,
            self.model,
            self.tokenizer,
            query,
            conversation.history,
            max_length=options.max_length,
            sampling=options.sampling,
            english=options.english,
        ):
            piece = new_text(response, printed)
            print(printable(piece), end="", flush=True)
            printed += piece
        say(new_text(response, printed, finished=True) if response.startswith(printed) else f"\n{response}")
        conversation.history.append((query, response))

    def talk(self) -> None:
        """Pictures and questions from the keyboard, until `stop` or the end of input."""
        print(self.words.hint)
        while self._talk_about_one_picture():
            pass

    def _talk_about_one_picture(self) -> bool:
        """Whether the user wants another picture."""
        picture = input(self.words.ask_picture).strip()
        if picture in ("stop", "clear"):
            return picture == "clear"
        try:
            conversation = self.look(picture)
        except InputError as problem:
            say(str(problem))
            return True
        prompt = self.options.prompt_en if self.options.english else self.options.prompt_zh
        query = typed(prompt) if picture else ""
        while True:
            query = query or typed(input(self.words.ask)).strip()
            if query in ("stop", "clear"):
                return query == "clear"
            try:
                if query:
                    print(self.words.answer, end="", flush=True)
                    self.answer(conversation, query)
            except InputError as problem:
                say(str(problem))
            query = ""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; Ctrl-D ends it with a line's end, and `model.errors` lists the statuses that it may end with."""
    with command("cli_demo.py"):
        options = command_line().parse_args(argv)
        try:
            demo = Demo(check(options), options)
            if options.image or options.query:
                prompt = options.prompt_en if options.english else options.prompt_zh
                demo.answer(demo.look(options.image or ""), typed(options.query or prompt))
            else:
                demo.talk()
        except EOFError:
            print()


if __name__ == "__main__":
    main()
