"""Talk with a VisualGLM about a picture, on a page in the browser.

python scripts/web_demo.py --from_pretrained model/tiny
python scripts/web_demo.py --from_pretrained model/tiny --compare checkpoints/MyModel      before and after, side by side

The page is for this machine alone unless --host or --share says otherwise. A picture is uploaded, dropped, pasted, or named by
its address. Rows that the checkpoint's run held out of training are shown as examples. SIGTERM and Ctrl-C end it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from model.checkpoints.layout import Checkpoint
from model.chinese import UI_LANGUAGES, choose_ui_language
from model.cli.flag_parser import FlagParser
from model.errors import InputError, command, raise_problems
from model.inference.flags import (
    CONVERSATION_LENGTH,
    add_checkpoint_flags,
    add_number_format_flags,
    add_sampling_flags,
    add_serving_flags,
    found_checkpoint,
    image_limits,
    loaded,
    max_length_of,
    refuse_launcher,
    sampling_of,
    secret_of,
    serving_problems,
    with_compared,
)
from model.progress import say, warn
from model.training.records import HELD_OUT_FILE

AUTH_VARIABLE = "VISUALGLM_WEB_AUTH"
BODY_SECONDS = 60.0  # in which an upload, or the picture of an address, has to be there
# Of the environment's, for a proxy; others, such as GRADIO_ALLOWED_PATHS, open doors.
KEPT_SETTINGS = ("GRADIO_ROOT_PATH",)


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser, default="visualglm-6b")
    add_serving_flags(parser, port=7860, queue=16, seconds=300.0, protected_by="--auth")
    add = parser.add_argument
    # fmt: off
    add("--compare", metavar="OTHER", help="a second checkpoint, which answers the same questions beside the first")
    add("--share", action="store_true",
        help="also open a public https address, by way of Gradio's servers, for up to a week or until the command ends: "
             "whoever has it can use the page and see the examples, and what is said passes those servers. Gradio "
             "downloads a program for it once. --auth is advised")
    add("--auth", metavar="NAME:PASSWORD",
        help=f"visitors have to log in (default: ${AUTH_VARIABLE}, which other users of the machine can't see)")
    add("--ui_lang", default="auto", choices=UI_LANGUAGES,
        help="language of the page and of the terminal; auto is each browser's own, and the locale's (default %(default)s)")
    add("--english", action="store_true",
        help="ask in English at first (default: as the checkpoint was trained; a base in the page's language)")
    add("--examples", type=int, default=12, metavar="N",
        help="show so many rows that the run held out of training, with their pictures (default %(default)s)")
    # fmt: on
    add_sampling_flags(parser, temperature=0.8)
    add_number_format_flags(parser)
    return parser


def check(options: argparse.Namespace) -> list[Checkpoint]:
    """Check the flags, and find the checkpoints, before torch is loaded.

    Raises:
        InputError: one isn't there, or a number is out of bounds.
    """
    refuse_launcher("web_demo.py")
    problems = serving_problems(options, not_negative=("examples",))
    source, options.auth = secret_of("--auth", options.auth, AUTH_VARIABLE)
    if options.auth is not None and not all(options.auth.partition(":")):
        problems.append(f"{source}: no NAME:PASSWORD; a name, a colon and a password are needed, or no {source}.")
    raise_problems(problems)
    options.sampling = replace(sampling_of(options), seed=options.seed)
    checkpoints = with_compared(found_checkpoint(options), options)
    options.max_length = max_length_of(options, checkpoints, CONVERSATION_LENGTH)
    return checkpoints


@contextmanager
def gradio_settings() -> Iterator[None]:
    """Let Gradio tell nobody that it runs, and keep uploads in a folder that is gone afterwards. Before it is imported."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("GRADIO_") and name not in KEPT_SETTINGS:
            del os.environ[name]
    try:
        with tempfile.TemporaryDirectory(prefix="visualglm-", ignore_cleanup_errors=True) as folder:
            os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
            os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)  # else it counts all events anew after each
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def speakers(checkpoints: Sequence[Checkpoint], options: argparse.Namespace, stack: ExitStack) -> Iterator[Any]:
    """The checkpoints' models, loaded, each with an engine that runs until the stack is left."""
    from model.inference.engine import Engine
    from model.inference.serving import Service, computed_apart
    from model.inference.talk import Speaker

    short = [Path(checkpoint.name).name or checkpoint.folder.resolve().name for checkpoint in checkpoints]
    names = short if len(set(short)) == len(short) else [checkpoint.name for checkpoint in checkpoints]
    for name, checkpoint in zip(names, checkpoints, strict=True):
        model, tokenizer = computed_apart(loaded, checkpoint, options)
        service = Service(Engine(model, tokenizer, options.rows, options.max_length), options.queue)
        yield Speaker(name, stack.enter_context(service), model, tokenizer)


def first_language(checkpoints: Sequence[Checkpoint], options: argparse.Namespace) -> bool | None:
    """Whether questions are asked in English at first; None where each visitor's language decides."""
    tuned = [checkpoint.asked_as for checkpoint in checkpoints if "finetuning" in checkpoint.config]
    if options.english or not tuned:
        return options.english or None
    return all(asked_as.is_english() for asked_as in tuned)


def serve(options: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> None:
    """Load the models, and show the page until a signal comes."""
    missing = [name for name in ("gradio", "pydantic") if not find_spec(name)]
    if missing:
        raise InputError(f"{missing[0]} isn't installed; needed is pip install -r requirements-web.txt")
    from model.inference.talk import held_out_rows
    from model.inference.web_guard import listening

    files = [checkpoint.folder / HELD_OUT_FILE for checkpoint in checkpoints]
    with ExitStack() as stack:  # the first to be left is what takes least time: a signal gives it a second in all
        found = stack.enter_context(listening(options.host, options.port))
        speaking = list(speakers(checkpoints, options, stack))
        stack.enter_context(gradio_settings())
        from model.inference.web_page import Page, Settings, closed, launched

        settings = Settings(
            sampling=options.sampling,
            english=first_language(checkpoints, options),
            max_length=options.max_length,
            seconds=options.seconds,
            limits=image_limits(options, BODY_SECONDS),
            ui_language=options.ui_lang,
            rows=[row for file in files for row in held_out_rows(file, options.examples)][: options.examples],
        )
        page = Page(speaking, settings)
        port = found.getsockname()[1]
        found.close()  # Gradio opens it again
        stack.callback(closed, page)
        address = launched(page, options.host, port, options.auth, options.share)
        tell(address, options)
        while True:
            time.sleep(3600)  # a signal ends it


def tell(addresses: Sequence[str], options: argparse.Namespace) -> None:
    """Say where the page is, and who can use it."""
    here, *public = addresses
    is_open = bool(public)
    if not options.host.startswith("127.") and options.host not in ("::1", "localhost"):
        is_open = True
        warn(f"--host {options.host}: whoever reaches this machine can use the page.")
    if public:
        warn(
            f"--share: {public[0]} is open to the whole internet, for up to a week or until this command ends. Whoever has "
            "this address can use the page and see the examples; what is said passes Gradio's servers."
        )
    elif options.share:
        warn("--share: no public address could be had from Gradio's servers.")
    if is_open and not options.auth:
        warn("Nobody is asked for a password; --auth NAME:PASSWORD does that.")
    say(f"The page is at {here}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("web_demo.py"):
        options = command_line().parse_args(argv)
        choose_ui_language(options.ui_lang)
        serve(options, check(options))


if __name__ == "__main__":
    main()
