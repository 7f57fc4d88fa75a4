"""ChatGLM-6B's tokenizer over its SentencePiece file: offline, no remote code, with the methods of transformers' own.

    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint_folder))
    tokenizer.decode(tokenizer.encode("你好"))

SentencePiece itself would lose line breaks, tabs and runs of spaces. They become pieces of their own:

    "\\n" ↔ <n>     "\\t" ↔ <|tab|>     2 to 80 spaces ↔ <|blank_2|> … <|blank_80|>

transformers and huggingface_hub are imported only where they are needed: importing either takes longer than all the
checks before training.
"""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from model.errors import InputError, raise_problems
from model.hub import cached_file, hub_file

if TYPE_CHECKING:
    from transformers import BatchEncoding

VOCAB_FILE = "ice_text.model"
CONFIG_FILE = "tokenizer_config.json"
HUB_REPOSITORY = "THUDM/visualglm-6b"  # where the released VisualGLM-6B keeps its tokenizer file
ALSO_CACHED = "THUDM/chatglm-6b"  # whose tokenizer it is: the script of 2023 took it from there

RELEASED_CLASS = "ChatGLMTokenizer"

SPACES = re.compile(" {2,80}")
BLANK = re.compile(r"<\|blank_([2-9]|[1-7]\d|80)\|>")

CHATGLM_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")


class ChatGLMTokenizer:
    """Text ↔ token ids of ChatGLM-6B. A context ends in [gMASK] <sop>, an answer in <eop>.

    Raises:
        InputError: vocab_file isn't a SentencePiece model, or not one of ChatGLM.
    """

    unk_token = "<unk>"
    pad_token = "<pad>"
    bos_token = "<sop>"
    eos_token = "<eop>"
    mask_token = "[MASK]"
    gmask_token = "[gMASK]"
    all_special_tokens = ("<unk>", "<s>", "</s>", "<pad>", *CHATGLM_TOKENS)
    padding_side = "left"  # the answer grows on the right

    def __init__(self, vocab_file: str | os.PathLike[str]):
        self.vocab_file = str(vocab_file)
        self._pieces = _sentencepiece_model(self.vocab_file)
        self._becomes_bytes: dict[str, bool] = {}  # of characters that have been asked for
        missing = [token for token in self.all_special_tokens if self._pieces.id_to_piece(self._id(token)) != token]
        if missing:
            raise InputError(
                f"{self.vocab_file} has no {', '.join(missing)}; the {VOCAB_FILE} of ChatGLM-6B is needed."
            )
        self.unk_token_id = self._id(self.unk_token)
        self.pad_token_id = self._id(self.pad_token)
        self.bos_token_id = self._id(self.bos_token)
        self.eos_token_id = self._id(self.eos_token)
        self.mask_token_id = self._id(self.mask_token)
        self.gmask_token_id = self._id(self.gmask_token)
        self.all_special_ids = [self._id(token) for token in self.all_special_tokens]

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> "ChatGLMTokenizer":
        """Tokenizer from a SentencePiece file, or from a folder that holds one as ice_text.model.

        trust_remote_code is taken as transformers takes it, and changes nothing: no remote code is run.

        Raises:
            InputError: there is none, or it isn't ChatGLM's; or the folder's tokenizer_config.json is of another one.
        """
        path = Path(path)
        if not path.is_dir():
            return cls(path)
        _check_tokenizer_config(path / CONFIG_FILE)
        return cls(path / VOCAB_FILE)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ice_text.model and tokenizer_config.json into folder, which is made if need be.

        The configuration is the released one, so that transformers finds ChatGLM's own class for it.
        """
        self.save_vocabulary(folder)
        text = json.dumps(self._released_config(), indent=2)
        (Path(folder) / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    def save_vocabulary(self, folder: str | os.PathLike[str]) -> None:
        """Write ice_text.model into folder, which is made if it doesn't exist."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / VOCAB_FILE).write_bytes(self._pieces.serialized_model_proto())

    def _released_config(self) -> dict[str, Any]:
        """tokenizer_config.json of ChatGLM-6B. Its code stays in the repository that published it."""
        return {
            "name_or_path": HUB_REPOSITORY,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "end_token": "</s>",
            "gmask_token": self.gmask_token,
            "mask_token": self.mask_token,
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
            "remove_space": False,
            "do_lower_case": False,
            "padding_side": self.padding_side,
            "tokenizer_class": RELEASED_CLASS,
            "num_image_tokens": 0,
            "auto_map": {"AutoTokenizer": [f"{HUB_REPOSITORY}--tokenization_chatglm.{RELEASED_CLASS}", None]},
        }

    @property
    def vocab_size(self) -> int:
        """Number of pieces in the file; the model's own vocabulary may be padded beyond it."""
        return self._pieces.get_piece_size()

    def __len__(self) -> int:
        return self.vocab_size

    def tokenize(self, text: str) -> list[str]:
        """Pieces of text."""
        return self._pieces.encode(_with_blank_pieces(text), out_type=str)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text, followed by [gMASK] <sop> unless add_special_tokens is off."""
        ids = self._pieces.encode(_with_blank_pieces(text))
        return self.build_inputs_with_special_tokens(ids) if add_special_tokens else ids

    def token_counts(self, texts: list[str]) -> list[int]:
        """How many tokens each text has, without special ones. Twice as fast as `encode` for each."""
        return [len(ids) for ids in self._pieces.encode([_with_blank_pieces(text) for text in texts])]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of token ids: an int, a sequence of ints, or a tensor or array int[seq].

        Padding has no text. Nor have ids beyond the file's pieces, with which the model's vocabulary is padded.
        """
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        ids = [ids] if isinstance(ids, int) else ids
        left_out = {self.pad_token_id, *(self.all_special_ids if skip_special_tokens else ())}
        known = [token_id for token_id in ids if 0 <= token_id < self.vocab_size and token_id not in left_out]
        return _with_blanks(self._pieces.decode(known))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """Text of each of several sequences of token ids: a list of them, or a tensor or array int[batch, seq]."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def get_vocab(self) -> dict[str, int]:
        """The id of every piece."""
        return {self._pieces.id_to_piece(token_id): token_id for token_id in range(self.vocab_size)}

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of one token, or ids of several. A token that doesn't exist has the id of <unk>."""
        return self._id(tokens) if isinstance(tokens, str) else [self._id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Token of one id, or tokens of several.

        Raises:
            IndexError: an id is beyond the vocabulary.
        """
        return self._pieces.id_to_piece(ids if isinstance(ids, int) else list(ids))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens `build_inputs_with_special_tokens` adds."""
        return 3 if pair else 2

    def build_inputs_with_special_tokens(self, a: list[int], b: list[int] | None = None) -> list[int]:
        """Context a, and answer b if there is one, as the model reads them: a [gMASK] <sop> (b <eop>)."""
        context = [*a, self.gmask_token_id, self.bos_token_id]
        return context if b is None else [*context, *b, self.eos_token_id]

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> "BatchEncoding":
        """Token ids of one text (int[seq]) or of several (int[batch, seq]) as transformers' BatchEncoding.

        Padding is on the left; `attention_mask` is 0 there and 1 elsewhere. `padding` is True or "longest",
        "max_length", or False; `truncation` cuts each text's end so that it has at most max_length tokens, special
        ones included; `return_tensors` is None, "pt" or "np".

        Raises:
            ValueError: padding to, or truncation at max_length without max_length, or an unknown padding.
        """
        from transformers import BatchEncoding

        if padding not in (False, True, "longest", "max_length"):
            raise ValueError(f"padding is {padding!r}; it is True, False, 'longest' or 'max_length'.")
        if max_length is None and (truncation or padding == "max_length"):
            raise ValueError("padding='max_length' and truncation need max_length.")
        special_length = self.num_special_tokens_to_add() if add_special_tokens else 0
        rows = [self.encode(one, add_special_tokens=False) for one in ([text] if isinstance(text, str) else text)]
        if truncation and max_length is not None:
            rows = [ids[: max(0, max_length - special_length)] for ids in rows]
        if add_special_tokens:
            rows = [self.build_inputs_with_special_tokens(ids) for ids in rows]

        width = 0
        if padding == "max_length" and max_length is not None:
            width = max_length
        elif padding:
            width = max(map(len, rows), default=0)
        input_ids = [[self.pad_token_id] * (width - len(ids)) + ids for ids in rows]
        attention_mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
        if isinstance(text, str) and return_tensors is None:
            return BatchEncoding({"input_ids": input_ids[0], "attention_mask": attention_mask[0]})
        return BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask}, tensor_type=return_tensors)

    @functools.cached_property
    def known_characters(self) -> frozenset[str]:
        """Characters that are one token each.

        A text of them has no more tokens than characters, but for one mark at its beginning, if it has no two spaces in
        a row. A character is looked up as SentencePiece normalises it.
        """
        pieces = self._pieces
        usable = (
            i for i in range(len(pieces)) if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
        )
        known = {piece for piece in map(pieces.id_to_piece, usable) if len(piece) == 1}
        has_space = "▁" in known
        candidates = known | {chr(code) for code in range(0xFF01, 0xFF5F)}  # full width; may be normalised to narrow
        known = {character for character in candidates if pieces.normalize(character).lstrip("▁") in known}
        known |= {" "} if has_space else set()
        known |= {"\n"} if pieces.id_to_piece(self._id("<n>")) == "<n>" else set()
        return frozenset(known)

    def characters_in_bytes(self, text: str) -> int:
        """How many characters of text no token has, so that 2 to 4 bytes of UTF-8 are tokens in their place.

        ASCII isn't counted: it is one byte, so one token.
        """
        unknown = {character for character in set(text) - self.known_characters if not character.isascii()}
        for character in unknown - self._becomes_bytes.keys():
            ids = self._pieces.encode(_with_blank_pieces(character))
            self._becomes_bytes[character] = any(map(self._pieces.is_byte, ids))
        return sum(text.count(character) for character in unknown if self._becomes_bytes[character])

    def _id(self, token: str) -> int:
        return self._pieces.piece_to_id(token)


def find_tokenizer(
    checkpoint_folder: str | os.PathLike[str] | None, option: str | os.PathLike[str] | None = None
) -> Path:
    """Path of the tokenizer's file: the checkpoint folder's own, else --tokenizer (a file or a folder), else the hub's.

    Raises:
        InputError: --tokenizer names nothing, or the file is in none of the three places.
    """
    given = _option_file(Path(option)) if option is not None else None
    if checkpoint_folder is not None:
        own = Path(checkpoint_folder) / VOCAB_FILE
        if own.is_file():
            return own
    if given is not None:
        return given
    try:
        return cached_file(ALSO_CACHED, VOCAB_FILE) or hub_file(HUB_REPOSITORY, VOCAB_FILE)
    except Exception as error:  # no network, no such file, a broken proxy, no package: all have the same remedy
        looked = "" if checkpoint_folder is None else f"in {checkpoint_folder} and "
        raise InputError(
            f"No tokenizer: {VOCAB_FILE} was looked for {looked}on the hub in {HUB_REPOSITORY}"
            f" ({error}); give its path with --tokenizer, or put it into the checkpoint's folder."
        ) from error


def check_special_ids(tokenizer: ChatGLMTokenizer, config: Mapping[str, Any]) -> None:
    """Check that tokenizer and model agree: on the special ids, and that every id has an embedding.

    Args:
        config: the checkpoint's model_config.json.

    Raises:
        InputError: they don't agree; each id that differs is named.
    """
    found = {
        "bos_token_id": tokenizer.bos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "gmask_token_id": tokenizer.gmask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    problems = [
        f"{tokenizer.vocab_file}: {name} is {token_id}, but {config.get(name)} in the checkpoint's model_config.json;"
        " the tokenizer that the checkpoint was trained with is needed."
        for name, token_id in found.items()
        if config.get(name) != token_id
    ]
    vocab_size = config.get("vocab_size")
    if vocab_size is None or vocab_size < tokenizer.vocab_size:
        problems.append(
            f"{tokenizer.vocab_file}: {tokenizer.vocab_size} tokens, but vocab_size is {vocab_size} in the checkpoint's"
            " model_config.json; it has to be at least as many."
        )
    raise_problems(problems)


def _check_tokenizer_config(path: Path) -> None:
    """Do nothing if a tokenizer_config.json, where there is one, describes the ids that SentencePiece gives.

    Raises:
        InputError: it is another class's, or moves the ids.
    """
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); the tokenizer_config.json of ChatGLM-6B is needed.") from None
    needed = {"tokenizer_class": RELEASED_CLASS, "num_image_tokens": 0, "remove_space": False, "do_lower_case": False}
    for key, value in needed.items():
        if isinstance(config, dict) and config.get(key, value) != value:
            raise InputError(f'{path}: "{key}" is {json.dumps(config[key])}; {json.dumps(value)} is needed.')


def _sentencepiece_model(path: str) -> sentencepiece.SentencePieceProcessor:
    try:
        serialized = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the tokenizer's file {VOCAB_FILE} is needed.") from error
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(serialized)  # handed to the constructor, an empty file would pass unread
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} isn't a SentencePiece model; the {VOCAB_FILE} of ChatGLM-6B is needed.") from error
    return pieces


def _option_file(option: Path) -> Path:
    path = option / VOCAB_FILE if option.is_dir() else option
    if not path.is_file():
        raise InputError(f"--tokenizer {option}: no file {path}; give {VOCAB_FILE} or a folder that holds it.")
    return path


def _with_blank_pieces(text: str) -> str:
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return SPACES.sub(lambda spaces: f"<|blank_{len(spaces[0])}|>", text) if "  " in text else text


def _with_blanks(text: str) -> str:
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return BLANK.sub(lambda blank: " " * int(blank[1]), text)
