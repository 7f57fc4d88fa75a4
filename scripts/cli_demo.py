"""Talk with a VisualGLM about a picture, in the terminal.

python scripts/cli_demo.py --from_pretrained model/tiny
python scripts/cli_demo.py --from_pretrained model/tiny --image fewshot-data/images/train00.png --query 描述这张图片。
torchrun --nproc-per-node 2 scripts/cli_demo.py --from_pretrained visualglm-6b        one model, split between two GPUs
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
from model.distributed import done_by_first_process, is_first_process, world_size
from model.hub import at_revision
from model.inference.flags import add_number_format_flags
from model.inference.sampling import Sampling
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
    add = parser.add_argument
    # fmt: off
    add("--from_pretrained", default="visualglm-6b", metavar="CHECKPOINT",
        help="a checkpoint of any kind: a folder, a part of it, a name in $SAT_HOME, or OWNER/NAME of the Hugging Face hub "
             "(default %(default)s)")
    add("--revision", metavar="NAME", help="branch, tag or commit of the hub's checkpoint")
    add("--base", metavar="NAME_OR_FOLDER", help="an adapter's base, if it has been moved")
    add("--force_base", action="store_true", help="take --base although the adapter was trained on other weights")
    add("--tokenizer", metavar="PATH", help="ice_text.model, where the checkpoint has none")
    add("--image", metavar="PATH_OR_URL", help="ask about this picture once, and leave")
    add("--query", metavar="TEXT", help="ask this once, and leave (default with --image: the prompt below)")
    add("--prompt_zh", default="描述这张图片。", metavar="TEXT", help="first question of a picture (default %(default)s)")
    add("--prompt_en", default="Describe the image.", metavar="TEXT", help="the same with --english (default %(default)s)")
    add("--english", action="store_true", help="ask and answer in English; Chinese tokens are forbidden")
    add("--max_length", type=int, metavar="N",
        help="tokens of a conversation (default 2048, or as many as a smaller model takes)")
    add("--top_p", type=float, default=0.4, metavar="P",
        help="sample from the likeliest tokens of this total probability (default %(default)s)")
    add("--top_k", type=int, default=100, metavar="N", help="sample from this many likeliest tokens (default %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="X",
        help="of sampling; 0 always takes the likeliest token (default %(default)s)")
    add("--seed", type=int, metavar="N", help="random seed: the same one gives the same answers")
    # fmt: on
    add_number_format_flags(parser)
    return parser


def check(options: argparse.Namespace) -> Checkpoint:
    """Check the numbers and the picture, and find the checkpoint, before torch is loaded.

    Raises:
        InputError: one isn't there, or a number is out of bounds.
    """
    options.sampling = sampling_of(options)
    checkpoint = Checkpoint.find(at_revision(options.from_pretrained, options.revision))
    options.max_length = answer_length(
        checkpoint.config.get("max_sequence_length", RELEASED_LENGTH), options.max_length, RELEASED_LENGTH
    )
    if options.image and not is_url(options.image):
        open_image(options.image)
    return checkpoint


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How the flags ask for tokens to be chosen.

    Raises:
        InputError: a number is out of bounds.
    """
    if options.top_k < 1:
        raise InputError(f"--top_k {options.top_k}: 1 or more is needed.")
    return Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=1.0 if options.temperature == 0 else 1.2,
        invalid_slices=(CHINESE_TOKENS,) if options.english else (),
    )


def typed(text: str) -> str:
    """Text as it was typed, also where Python takes the terminal for one without UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def ask(question: str) -> str:
    """What the person at the first process answers, on every process."""
    return done_by_first_process(lambda: input(question))


def show(piece: str) -> None:
    """Print a piece of a line, on the first process."""
    if is_first_process():
        print(printable(piece), end="", flush=True)


class Demo:
    """A loaded model and how it is to answer."""

    def __init__(self, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
        import torch

        from model.inference.load import load_for_answering

        self.options = options
        self.words = ENGLISH if options.english else CHINESE
        self.model, self.tokenizer = load_for_answering(
            checkpoint,
            options.tokenizer,
            options.base,
            options.force_base,
            options.quant,
            options.dtype,
            model_parallel_size=world_size(),  # one person talks with all processes: each has a part of the model
        )
        if options.seed is not None:
            torch.manual_seed(options.seed)  # after loading, which sets SAT's own

    def look(self, picture: str) -> Conversation:
        """A new conversation about a picture, or about none if it is empty."""
        from model.inference.chat import image_tensor

        if not picture:
            return Conversation()
        image = done_by_first_process(lambda: image_tensor(picture, self.model).cpu())
        return Conversation(image.to(self.model.transformer.word_embeddings.weight.device))

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
            show(piece)
            printed += piece
        say(new_text(response, printed, finished=True) if response.startswith(printed) else f"\n{response}")
        conversation.history.append((query, response))

    def talk(self) -> None:
        """Pictures and questions from the keyboard, until `stop` or the end of input."""
        say(self.words.hint)
        while self._talk_about_one_picture():
            pass

    def _talk_about_one_picture(self) -> bool:
        """Whether the user wants another picture."""
        picture = ask(self.words.ask_picture).strip()
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
            query = query or typed(ask(self.words.ask)).strip()
            if query in ("stop", "clear"):
                return query == "clear"
            try:
                if query:
                    show(self.words.answer)
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
            say("")


if __name__ == "__main__":
    main()
