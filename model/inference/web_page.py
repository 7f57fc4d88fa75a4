"""The page of scripts/web_demo.py, in Gradio: where things stand, and what happens when they are used.

    page = Page(speakers, settings)
    here, *public = launched(page, host, port, auth=None, share=False)
    closed(page)

What a visitor says is in a `Talk`, which stays here. Of what a browser sends, only texts, numbers and uploaded files are taken.
"""

import html
import io
import json
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils, tunneling
from PIL import Image
from starlette.middleware import Middleware

from model.data.images import open_image
from model.data.remote_images import LARGEST_DOWNLOAD, Limits, downloaded, opened
from model.data.rows import Row
from model.errors import InputError
from model.inference.flags import sampling_of
from model.inference.load import image_size
from model.inference.page import escaped
from model.inference.page_texts import CHINESE, ENGLISH, GRADIO_WORDS, language_of, sentence, texts
from model.inference.sampling import CHINESE_TOKENS, Sampling
from model.inference.serving import BusyError, FailedError
from model.inference.talk import Speaker, Talk, Turn, Wish
from model.inference.web_guard import Guard, OnlyPaths, listening

# What a browser needs of Gradio's routes. Others fetch addresses for whoever asks, or tell what the page doesn't show.
API = "/gradio_api"
PATHS = (
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/assets/", "/static/", "/login",
    "/login/", "/logout", f"{API}/login_check", f"{API}/queue/join", f"{API}/queue/data", f"{API}/cancel",
    f"{API}/upload", f"{API}/upload_progress", f"{API}/heartbeat/", f"{API}/file=/", f"{API}/startup-events",
)  # fmt: skip
STYLE = (
    "#note{min-height:1.6em}#note p{margin:0}#fetch{align-self:end}#examples td{overflow-wrap:anywhere}"
    "@media(max-width:600px){.chat{height:38vh!important}}"
)
# With text on them or behind it, Gradio's own colours have less than the 4.5:1 that WCAG 2.2 (1.4.3) asks for.
COLOURS = {
    "body_text_color_subdued": "*neutral_500", "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_700", "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700", "button_primary_background_fill_hover_dark": "*primary_800",
    "button_cancel_background_fill": "#b91c1c", "button_cancel_background_fill_hover": "#991b1b",
}  # fmt: skip
# Gradio's picture takes what its paste button finds, and on https or this machine only; notes are to be read aloud; where of
# two buttons one takes the other's place, it takes the keyboard's focus too.
SCRIPT = """() => {
    document.querySelector("#note").setAttribute("aria-live", "polite");
    document.addEventListener("paste", event => {
        const picture = [...event.clipboardData.files].find(file => file.type.startsWith("image/"));
        const field = document.querySelector("#picture input[type=file]");
        if (!picture || !field) return;
        event.preventDefault();
        const files = new DataTransfer();
        files.items.add(picture);
        field.files = files.files;
        field.dispatchEvent(new Event("change", {bubbles: true}));
    });

    const replaced = {send: "stop", stop: "send"}, seen = id => document.getElementById(id)?.checkVisibility();
    let used = null;
    const use = event => { used = event.target.id };
    for (const kind of ["focusin", "pointerdown"]) document.addEventListener(kind, use);
    const spoken = WORDS[navigator.language.startsWith("zh") ? "zh" : "en"], words = Object.entries(spoken.words)
        .map(([found, word]) => [new RegExp(found), word]);
    const said = text => words.reduce((text, [found, word]) => text.replace(found, word), text);
    const mend = () => {
        if (used in replaced && !seen(used) && seen(replaced[used])) document.getElementById(replaced[used]).focus();
        for (const image of document.querySelectorAll("img[alt='']")) image.alt = spoken.picture;
        for (const found of document.querySelectorAll("[aria-label]"))
            for (const name of ["aria-label", "title"]) {
                const text = found.getAttribute(name), word = text && said(text);
                if (word != text) found.setAttribute(name, word);
            }
        for (const {firstChild: text} of document.querySelectorAll(".toast-title, .toast-message-text, .paginate"))
            if (text?.data && said(text.data) != text.data) text.data = said(text.data);
    };
    mend();
    new MutationObserver(mend).observe(document.body, {
        subtree: true, childList: true, attributes: true, attributeFilter: ["aria-label", "class", "style"],
    });
}"""
PLACES = 64  # requests that send something, at once
PICTURES_AT_ONCE = 4  # that are fetched or opened
FORM = 2**18  # bytes of an upload beside its picture
EXAMPLE_EDGE = 1024  # pixels; larger pictures of held-out rows are shrunk
CONVERSATIONS = 500  # that are kept; each has its picture, 0.6 MB, and the oldest goes
SECONDS_KEPT = 3600  # of files of pictures
SECONDS_BETWEEN_LOOKS = 0.05  # at an answer that grows
HEIGHT = "clamp(300px, 55vh, 640px)"  # of a conversation


@dataclass(frozen=True)
class Settings:
    """What the flags say. english is None where each visitor's own language decides; max_length is in tokens."""

    sampling: Sampling
    english: bool | None
    max_length: int
    seconds: float
    limits: Limits
    ui_language: str  # one of UI_LANGUAGES
    rows: Sequence[Row] = ()  # examples


class Page:
    """One page for all visitors."""

    def __init__(self, speakers: Sequence[Speaker], settings: Settings) -> None:
        self.speakers, self.settings = speakers, settings
        self.i18n = gr.I18n(**{language: texts(language) for language in (ENGLISH, "zh-CN", "zh-TW")})
        self.examples = [example for row in settings.rows if (example := self.example(row))]
        self.blocks = self.built()

    # --- where things stand -------------------------------------------------------------------------------------------

    def text(self, key: str) -> Any:
        """A text in the language of --ui_lang, or in that of the browser."""
        language = self.settings.ui_language
        return self.i18n(key) if language == "auto" else texts(language)[key]

    @property
    def words(self) -> dict[str, dict[str, Any]]:
        """What the browser puts in place of what Gradio has in English only, by the browser's language."""
        languages = {asked: language_of(asked, self.settings.ui_language) for asked in (ENGLISH, CHINESE)}
        return {
            asked: {"picture": texts(read)["picture"], "words": GRADIO_WORDS if read == CHINESE else {}}
            for asked, read in languages.items()
        }

    def built(self) -> gr.Blocks:
        """The page."""
        name = " / ".join(speaker.name for speaker in self.speakers)
        with gr.Blocks(
            analytics_enabled=False, title=f"VisualGLM: {name}", delete_cache=(SECONDS_KEPT // 4, SECONDS_KEPT)
        ) as blocks:
            self.talk = gr.State(Talk())
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    self.picture_column()
                with gr.Column(scale=5, min_width=320):
                    self.talk_column()
            if self.examples:
                self.example_table()
            self.connect(blocks)
        return blocks

    def picture_column(self) -> None:
        """The picture, and how answers are drawn."""
        sampling = self.settings.sampling
        self.picture = gr.Image(
            label=self.text("picture"), placeholder=self.text("picture_hint"), sources=["upload", "clipboard"],
            type="filepath", image_mode=None, height=260, buttons=["fullscreen"], elem_id="picture",
        )  # fmt: skip
        with gr.Row():
            self.url = gr.Textbox(label=self.text("url"), placeholder="https://", scale=4, min_width=160, elem_id="url")
            self.fetch = gr.Button(self.text("fetch"), scale=1, min_width=70, elem_id="fetch")
        with gr.Accordion(self.text("settings"), open=False, elem_id="settings"):
            self.language = gr.Radio(
                [("中文", CHINESE), ("English", ENGLISH)], value=ENGLISH if self.settings.english else CHINESE,
                label=self.text("language"), info=self.text("language_info"),
            )  # fmt: skip
            self.temperature = gr.Slider(
                0, max(2, sampling.temperature), sampling.temperature, step=0.01,
                label=self.text("temperature"), info=self.text("temperature_info"),
            )  # fmt: skip
            least = min(0.05, sampling.top_p)
            self.top_p = gr.Slider(least, 1, sampling.top_p, step=0.01, label=self.text("top_p"))
            self.top_k = gr.Slider(1, max(200, sampling.top_k), sampling.top_k, step=1, label=self.text("top_k"))
            most = self.settings.max_length
            self.max_tokens = gr.Slider(1, most, most, step=1, label=self.text("max_tokens"))
            self.seed = gr.Textbox("" if sampling.seed is None else str(sampling.seed), label=self.text("seed"))

    def talk_column(self) -> None:
        """The conversation, one column for each model, and what is typed."""
        with gr.Row():
            self.chats = [
                gr.Chatbot(
                    label=speaker.name, placeholder=self.text("empty"), render_markdown=False, latex_delimiters=[],
                    buttons=["copy_all"], height=HEIGHT, min_width=280, elem_id=f"chat{number}", elem_classes=["chat"],
                    feedback_options=[],
                )
                for number, speaker in enumerate(self.speakers)
            ]  # fmt: skip
        self.note = gr.HTML("", elem_id="note", padding=False)
        self.box = gr.Textbox(
            label=self.text("question"),
            placeholder=self.text("question_hint"),
            lines=1,
            max_lines=6,
            elem_id="question",
        )
        with gr.Row():
            self.send = gr.Button(self.text("send"), variant="primary", min_width=90, elem_id="send")
            self.stop = gr.Button(self.text("stop"), variant="stop", min_width=90, visible=False, elem_id="stop")
            self.retry = gr.Button(self.text("retry"), min_width=90, elem_id="retry")
            self.undo = gr.Button(self.text("undo"), min_width=90, elem_id="undo")
            self.clear = gr.Button(self.text("clear"), min_width=90, elem_id="clear")

    def example_table(self) -> None:
        """Held-out rows; one that is chosen is ready to be asked."""
        shown = [[str(path), row.prompt, row.label] for path, row in self.examples]
        columns = [gr.Image(visible=False, type="filepath"), gr.Textbox(visible=False), gr.Textbox(visible=False)]
        self.table = gr.Dataset(
            components=columns, samples=shown, type="index", label=self.text("examples"), samples_per_page=6,
            layout="table", elem_id="examples",
        )  # fmt: skip

    # --- what happens -------------------------------------------------------------------------------------------------

    def connect(self, blocks: gr.Blocks) -> None:
        """Say which use of what calls which method."""
        shown = [*self.chats, self.note, self.box, self.send, self.stop]
        how = [self.language, self.temperature, self.top_p, self.top_k, self.max_tokens, self.seed]
        plain: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        many = plain | {"concurrency_limit": None}  # the services count them
        gr.on([self.send.click, self.box.submit], self.ask, [self.talk, self.box, *how], shown, **many)
        self.retry.click(self.ask_again, [self.talk, *how], shown, **many)
        # Gradio's own way to cancel loses what follows it, now and then: an answer is asked to end instead.
        self.stop.click(self.stopped, [self.talk], None, **plain)
        self.undo.click(self.undone, [self.talk], shown, **plain)
        gr.on([self.clear.click, *(chat.clear for chat in self.chats)], self.cleared, [self.talk], shown, **plain)
        with_picture = [self.picture, *shown]
        uploads = [self.picture.upload, self.picture.clear]
        gr.on(uploads, self.look, [self.talk, self.picture], with_picture, preprocess=False, **plain)
        self.picture.change(self.emptied, [self.talk, self.picture], shown, preprocess=False, **plain)
        gr.on([self.fetch.click, self.url.submit], self.fetched, [self.talk, self.url], with_picture, **plain)
        if self.examples:
            self.table.click(self.chosen, [self.talk, self.table], [self.language, *with_picture], **plain)
        blocks.load(self.welcome, None, [self.talk, self.language, self.box], **plain)

    def shown(self, talk: Talk, note: str = "", question: Any = None, busy: bool = False) -> list[Any]:
        """What the conversation's parts show: chats, note, box, send, stop. Without a question the box keeps its text."""
        chats = [messages(talk, number) for number in range(len(self.speakers))]
        box = gr.skip() if question is None else question
        return [*chats, said(note), box, gr.update(visible=not busy), gr.update(visible=busy)]

    def noted(self, note: str) -> list[Any]:
        """A note, and nothing else that changes."""
        return [*[gr.skip()] * len(self.chats), said(note), *[gr.skip()] * 3]

    def reads(self, request: gr.Request) -> str:
        """The visitor's language."""
        return language_of(request.headers.get("accept-language", ""), self.settings.ui_language)

    def welcome(self, request: gr.Request) -> list[Any]:
        """A conversation, which Gradio forgets an hour after its page; the language to ask in, and a first question."""
        english = self.settings.english
        language = self.reads(request) if english is None else ENGLISH if english else CHINESE
        return [Talk(), language, texts(language)["first_question"]]

    async def ask(
        self, talk: Talk, question: str, language: str, temperature: float, top_p: float, top_k: float,
        max_tokens: float, seed: str, request: gr.Request,
    ) -> AsyncGenerator[list[Any], None]:  # fmt: skip
        """Answer a question, word for word."""
        how = (language, temperature, top_p, top_k, max_tokens, seed)
        question = question.encode("utf-8", "replace").decode().strip()  # half a character can't be shown again
        async with aclosing(self.answering(talk, question, how, self.reads(request))) as answering:
            async for shown in answering:
                yield shown

    async def ask_again(
        self, talk: Talk, language: str, temperature: float, top_p: float, top_k: float,
        max_tokens: float, seed: str, request: gr.Request,
    ) -> AsyncGenerator[list[Any], None]:  # fmt: skip
        """Answer the last question once more, in place of the answer that it has."""
        if not talk.turns:
            yield self.shown(talk, texts(self.reads(request))["no_turn"])
            return
        talk.stop()
        how, last = (language, temperature, top_p, top_k, max_tokens, seed), talk.turns.pop()
        async with aclosing(self.answering(talk, last.question, how, self.reads(request), last)) as answering:
            async for shown in answering:
                yield shown

    async def answering(
        self, talk: Talk, question: str, how: tuple[Any, ...], language: str, before: Turn | None = None
    ) -> AsyncGenerator[list[Any], None]:
        """What is shown while a question is answered; if it can't be, the turn before it is back."""
        words = texts(language)
        try:
            if not question:
                raise InputError(words["no_question"])
            wish = self.wish(*how)
            waits = max(speaker.service.before_a_new_one for speaker in self.speakers)
            async with aclosing(talk.asked(question, self.speakers, wish)) as growing:
                shown_at = 0.0
                typed: str | None = ""
                async for turn in growing:
                    if time.monotonic() - shown_at < SECONDS_BETWEEN_LOOKS:
                        continue  # a browser that is behind would show a stop late
                    shown_at = time.monotonic()
                    has_begun = all(turn.answers) or not waits
                    note = "" if has_begun else words["waiting"].format(number=waits)
                    yield self.shown(talk, note, typed, busy=True)
                    typed = None  # meanwhile the next question may be typed
            yield self.shown(talk, self.last_note(talk, words))
        except (InputError, BusyError, FailedError) as problem:
            if before is not None:
                talk.turns.append(before)
            told = {BusyError: words["busy"], FailedError: words["failed"]}.get(type(problem), str(problem))
            yield self.shown(talk, sentence(told, language), question)

    def last_note(self, talk: Talk, words: dict[str, str]) -> str:
        """What is to be said of the last answer: how it ended, and the right one if there is one."""
        if not talk.turns:
            return ""  # it was undone meanwhile
        turn, notes = talk.turns[-1], []
        if turn.is_stopped or "length" in turn.finished:
            notes.append(words["stopped" if turn.is_stopped else "cut"])
        if turn.question in talk.right_answers:
            notes.append(words["expected"].format(label=talk.right_answers[turn.question]))
        return " ".join(notes)

    def wish(self, language: str, temperature: float, top_p: float, top_k: float, max_tokens: float, seed: str) -> Wish:
        """How the page's fields ask for an answer.

        Raises:
            InputError: a number is out of bounds, or no number.
        """
        english = language == ENGLISH
        try:
            number = int(seed) % 2**63 if seed.strip() else None
        except ValueError:
            raise InputError(f"--seed {seed[:20]}: a whole number is needed.") from None
        chosen = Namespace(temperature=temperature, top_p=top_p, top_k=int(top_k))
        sampling = sampling_of(chosen, (CHINESE_TOKENS,) if english else ())
        return Wish(
            replace(sampling, seed=number), english, self.settings.max_length, int(max_tokens), self.settings.seconds
        )

    def stopped(self, talk: Talk) -> None:
        """The answer in hand ends where it is."""
        talk.stop()

    def undone(self, talk: Talk, request: gr.Request) -> list[Any]:
        """The last question is typed again, and not asked."""
        if not talk.turns:
            return self.shown(talk, texts(self.reads(request))["no_turn"])
        talk.stop()
        return self.shown(talk, "", talk.turns.pop().question)

    def cleared(self, talk: Talk) -> list[Any]:
        """A new conversation about the same picture."""
        talk.stop()
        talk.turns.clear()
        return self.shown(talk)

    def look(self, talk: Talk, upload: dict[str, Any] | None, request: gr.Request) -> list[Any]:
        """A new conversation about an uploaded picture, or about none."""
        words = texts(self.reads(request))
        try:
            with talk.changing():  # Gradio has seen to it that the path is an upload's
                talk.look(Path(upload["path"]).read_bytes() if upload else None, self.speakers, self.settings.limits)
        except (InputError, KeyError, OSError, TypeError) as problem:
            told = str(problem) if isinstance(problem, InputError) else words["not_uploaded"]
            return [None, *self.shown(talk, sentence(told, self.reads(request)))]
        return [gr.skip(), *self.shown(talk, words["new_picture" if upload else "no_picture"])]

    def emptied(self, talk: Talk, upload: dict[str, Any] | None, request: gr.Request) -> list[Any]:
        """A new conversation about none, if the box has none: Gradio empties it for a file that it refuses, and tells no more."""
        if upload or not talk.images:
            return [gr.skip()] * len(self.shown(talk))
        return self.look(talk, None, request)[1:]

    def fetched(self, talk: Talk, url: str, request: gr.Request) -> Iterator[list[Any]]:
        """A new conversation about the picture of an address."""
        words, limits = texts(self.reads(request)), self.settings.limits
        if not url.strip():
            yield [gr.skip(), *self.noted(words["no_address"])]
            return
        yield [gr.skip(), *self.noted(words["fetching"])]
        try:
            with talk.changing():
                content = downloaded(url.strip(), limits).getvalue()
                opened(content, EXAMPLE_EDGE, limits)  # what is no picture leaves the conversation as it is
                talk.look(content, self.speakers, limits)
        except InputError as problem:
            yield [gr.skip(), *self.noted(sentence(str(problem), self.reads(request)))]
        else:
            yield [kept(content), *self.shown(talk, words["new_picture"])]

    def chosen(self, talk: Talk, number: int, request: gr.Request) -> list[Any]:
        """A new conversation about an example."""
        path, row = self.examples[number]
        with talk.changing():
            talk.look(path.read_bytes(), self.speakers, replace(self.settings.limits, most_bytes=LARGEST_DOWNLOAD))
        talk.right_answers = {row.prompt: row.label}
        note = texts(self.reads(request))["expected"].format(label=row.label)
        language = gr.skip() if row.lang is None else row.lang
        return [language, str(path), *self.shown(talk, note, row.prompt)]

    def example(self, row: Row) -> tuple[Path, Row] | None:
        """A held-out row, and its picture as a browser shows it; None for one that can't be opened, or of text only."""
        try:
            picture = open_image(row.img or "", max(image_size(speaker.model) for speaker in self.speakers))
        except InputError:
            return None
        picture.thumbnail((EXAMPLE_EDGE, EXAMPLE_EDGE))
        content = io.BytesIO()
        picture.save(content, "PNG")  # without what else the file tells, as the place where it was taken
        return Path(kept(content.getvalue())), row


def launched(page: Page, host: str, port: int, auth: str | None, share: bool) -> list[str]:
    """The page's address, and the public one if that was asked for and could be had. Threads serve it from now on.

    Args:
        auth: NAME:PASSWORD, or None.

    Raises:
        InputError: another program listens at the port by now.
    """
    # Gradio would fetch what a made-up upload names, however large it is.
    processing_utils.async_ssrf_protected_download = refused_download
    most, seconds = page.settings.limits.bytes, page.settings.limits.seconds
    guard = Middleware(Guard, key=None, places=PLACES, most_bytes=most + FORM, seconds=seconds)
    name, _, password = (auth or "").partition(":")
    page.blocks.queue(max_size=PLACES, default_concurrency_limit=PICTURES_AT_ONCE)
    try:
        page.blocks.launch(
            state_session_capacity=CONVERSATIONS, server_name=host, server_port=port, share=share, auth=(name, password) if auth else None,
            quiet=True, prevent_thread_lock=True, inline=False, ssr_mode=False, run_history=False, enable_monitoring=False,
            mcp_server=False, pwa=False, allowed_paths=[], max_file_size=most, footer_links=[], i18n=page.i18n,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(**COLOURS),
            css=STYLE, js=SCRIPT.replace("WORDS", json.dumps(page.words)),
            app_kwargs={"middleware": [Middleware(OnlyPaths, paths=PATHS), guard]},
        )  # fmt: skip
    except OSError:
        listening(host, port).close()  # says so
        raise
    return [page.blocks.local_url or "", *filter(None, [page.blocks.share_url])]


def closed(page: Page) -> None:
    """End the page's public address, and its server soon: Gradio waits some seconds for visitors."""
    for tunnel in tunneling.CURRENT_TUNNELS:
        tunnel.kill()
    threading.Thread(target=page.blocks.close, args=(False,), daemon=True).start()


def messages(talk: Talk, number: int) -> list[dict[str, str]]:
    """The conversation with a speaker, as Gradio shows it."""
    return [
        {"role": role, "content": html.escape(text, quote=False)}  # Gradio would take it for HTML
        for turn in talk.turns
        for role, text in (("user", turn.question), ("assistant", turn.answers[number] or "…"))
    ]


def said(note: str) -> str:
    """A note as HTML."""
    return f"<p>{escaped(note)}</p>"


def kept(content: bytes) -> str:
    """The path of a new file of a picture, where Gradio keeps uploads."""
    kind = (Image.open(io.BytesIO(content)).format or "png").lower()
    folder = tempfile.mkdtemp(dir=gr.utils.get_upload_folder())
    path = Path(folder, f"picture.{kind}")
    path.write_bytes(content)
    return str(path)


async def refused_download(url: str, cache_dir: str) -> str:
    """In place of Gradio's.

    Raises:
        Error: always.
    """
    raise gr.Error("an address isn't an upload.", print_exception=False)
