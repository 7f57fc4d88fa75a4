"""Train a small VisualGLM from nothing, in about twenty minutes of one core's time.

    python scripts/dev/build_tiny.py
    python scripts/dev/build_tiny.py --out model/tiny --seed 1
    python scripts/dev/build_tiny.py --out tiny-try --steps 100

It learns from drawn scenes (`scenes.py`) and what can be said of them in Chinese and English (`scene_talk.py`). What
`make_fewshot_data.py` teaches is kept from it. Each part is taught by itself, and what it makes of the pictures is kept
for the next: the tokenizer, the vision tower, the Q-Former, the language model. The result has the layout of the 6B's checkpoint:

    model_config.json  latest  1/mp_rank_00_model_states.pt  ice_text.model

Shapes: batch = samples, seq = tokens of the longest one, hidden = the language model's width.
"""

import argparse
import io
import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file: the project's root is not on the path

from model.errors import command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import sentencepiece
import torch
from tqdm import tqdm

from model.blip2 import BLIP2
from model.data.image_processor import BlipImageEvalProcessor
from model.data.prompt import IGNORE_INDEX, answer_labels, context_ids
from model.data.tokenizer import VOCAB_FILE, ChatGLMTokenizer
from model.masks import next_labels, supervised_positions
from model.progress import duration, say
from model.sat_compat import quieten
from model.visualglm import VisualGLMModel
from scripts.dev.make_fewshot_data import QUESTION
from scripts.dev.scene_talk import SMALL_TALK, Turn, random_turn
from scripts.dev.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    crowded_scene,
    draw,
    random_scene,
)

STEPS = 4000  # of the language model
TOWER_STEPS = 1000  # of the vision tower alone, before; fewer if fewer are asked for
QFORMER_STEPS = 400  # of the Q-Former alone, likewise
POOL = 12288  # drawn scenes, each asked about several times; half as many crowded ones
BATCH = 16
TOWER_BATCH = 32
QFORMER_BATCH = 64
VISION_RATE = 1.5e-3
LANGUAGE_RATE = 1.5e-3
PATCHES_FROM = 500  # pictures; what patches vary in is measured on them
KEEP_EVERY = 500  # steps; the model is written so often
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # of the steps
WAVES = (torch.sin, torch.cos)
CORPUS_LINES = 20000
PIECES = 896  # the tokenizer's; the model's vocabulary is the same, a multiple of 64
FRESH_SCENES = 1000  # for the report at the end

TAUGHT_WORDS = (QUESTION.removesuffix("？"), "这张图片的背景")


def model_config(tokenizer: ChatGLMTokenizer) -> dict[str, Any]:
    """What `model_config.json` holds. As in the 6B's, dropout is left to SAT in the language model (0.1)."""
    image_length, vit_hidden, image_size, patch_size = 32, 128, 112, 14
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return {
        "model_class": "VisualGLMModel",
        "tokenizer_type": "outer_tokenizer",
        "num_layers": 6,
        "hidden_size": 160,
        "num_attention_heads": 4,  # model parallelism splits heads, widths and vocabulary into 2 or 4 parts
        "vocab_size": -(-tokenizer.vocab_size // 64) * 64,
        "layernorm_order": "post",
        "model_parallel_size": 1,
        "max_sequence_length": 512,
        "use_bias": True,
        "inner_hidden_size": 640,
        "image_length": image_length,
        "eva_args": {
            "num_layers": 3,
            "hidden_size": vit_hidden,
            "num_attention_heads": 4,
            "vocab_size": 1,
            "layernorm_order": "pre",
            "model_parallel_size": 1,
            "max_sequence_length": (image_size // patch_size) ** 2 + 1,
            "inner_hidden_size": 4 * vit_hidden,
            "use_final_layernorm": False,
            "layernorm_epsilon": 1e-06,
            **no_dropout,
            "image_size": [image_size, image_size],
            "pre_len": 1,
            "post_len": 0,
            "in_channels": 3,
            "num_classes": 0,
            "patch_size": patch_size,
        },
        "qformer_args": {
            "num_layers": 2,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "vocab_size": image_length,
            "layernorm_order": "post",
            "model_parallel_size": 1,
            "max_sequence_length": 0,
            "is_decoder": [True, False],
            "cross_attn_hidden_size": vit_hidden,
            "layernorm_epsilon": 1e-12,
            **no_dropout,
        },
        "bos_token_id": tokenizer.bos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "gmask_token_id": tokenizer.gmask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


# --- what is said -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talk:
    """A conversation about one scene of the pool, or about none. The last turn's answer is the one to learn."""

    scene_index: int | None
    turns: tuple[Turn, ...]


def random_talk(scenes: Sequence[Scene], random: Random) -> Talk:
    """One question about a scene drawn by lot, one time in eight after another question about it."""
    index = random.randrange(len(scenes))
    turns = 2 if random.random() < 1 / 8 else 1
    return Talk(index, tuple(random_turn(scenes[index], random) for _ in range(turns)))


def corpus(lines: int, random: Random) -> list[str]:
    """Texts to make the tokenizer from: questions and answers in the frame that the model reads them in.

    Raises:
        ValueError: a text has the words that the fine-tuning is to teach.
    """
    turns = SMALL_TALK * 20 + [random_turn(random_scene(random), random) for _ in range(lines)]
    texts = [text for turn in turns for text in (f"</img>问：{turn.question}", f"答：{turn.answer}", turn.answer)]
    check_untaught(texts)
    return [*texts, *["<img>", "Q:", "A:"] * (lines // 20)]


def check_untaught(texts: Sequence[str]) -> None:
    """Refuse texts with the question or the sentence that the fine-tuning is to teach.

    Raises:
        ValueError: a text has them.
    """
    for text in texts:
        for words in TAUGHT_WORDS:
            if words in text:
                raise ValueError(f"{text!r} has {words!r}, which the small model must never see.")


def train_tokenizer(texts: Sequence[str], file: Path) -> ChatGLMTokenizer:
    """A SentencePiece tokenizer in ChatGLM-6B's layout, written to file; what it doesn't know it spells in bytes."""
    blanks = [f"<|blank_{length}|>" for length in range(2, 81)]
    specials = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    # Chinese has no spaces: pieces end at the commonest words, else whole templates would become one piece.
    words = re.compile(
        "(这张|这幅画|图片|一[个颗朵]?|[的了是有在和里上下前后以为也还，。！？：、吗着这]|</?img>|问|答)"
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words.sub("\u241f\\1\u241f", text) for text in texts),
        model_writer=model,  # given a path instead, the file would hold it
        pretokenization_delimiter="\u241f",
        model_type="bpe",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="<pad>",
        user_defined_symbols=["<n>", "<|tab|>", *blanks, *specials],
        num_threads=1,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())
    return ChatGLMTokenizer(file)


# --- pictures and batches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Scenes and their pictures as the model reads them, float16[scenes, 3, H, W], or features of them,
    float16[scenes, positions, width]."""

    scenes: list[Scene]
    images: torch.Tensor


def picture_values(scene: Scene, image_size: int) -> Any:
    """The scene's picture as numpy's float16[3, H, W], which travels between processes without a file of its own."""
    return BlipImageEvalProcessor(image_size)(draw(scene)).half().numpy()


def drawn_pool(scenes: list[Scene], image_size: int) -> Pool:
    """Draw all scenes, on every core. To be called before torch has threads, which a forked process would miss."""
    pictures = torch.empty(len(scenes), 3, image_size, image_size, dtype=torch.float16)
    cores = torch.get_num_threads()
    with multiprocessing.get_context("fork").Pool(cores, torch.set_num_threads, (1,)) as workers:
        drawn = workers.imap(partial(picture_values, image_size=image_size), scenes, chunksize=16)
        for index, values in enumerate(tqdm(drawn, "pictures", len(scenes), unit=" pictures")):
            pictures[index] = torch.from_numpy(values)
    return Pool(scenes, pictures)


def example(talk: Talk, pool: Pool, tokenizer: ChatGLMTokenizer, image_length: int, english: bool) -> dict[str, Any]:
    """One conversation in the frame that chat and fine-tuning use: input_ids and labels list[int], image float32[3, H, W]
    or its features (empty without a scene), pre_image int."""
    *past, last = talk.turns
    history = [(turn.question, turn.answer) for turn in past]
    has_image = talk.scene_index is not None
    context, pre_image = context_ids(last.question, history, has_image, tokenizer, image_length, english)
    input_ids = [*context, *tokenizer.encode(last.answer, add_special_tokens=False), tokenizer.eos_token_id]
    return {
        "input_ids": input_ids,
        "labels": answer_labels(input_ids, tokenizer.bos_token_id),
        "image": torch.empty(0) if talk.scene_index is None else pool.images[talk.scene_index].float(),
        "pre_image": pre_image,
    }


def collated(examples: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """One batch, all with a picture or all without, padded on the right: int64[batch, seq], float32[batch, 3, H, W]."""

    def padded(name: str, padding: int) -> torch.Tensor:
        rows = [torch.tensor(one[name]) for one in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

    return {
        "input_ids": padded("input_ids", pad_id),
        "labels": padded("labels", IGNORE_INDEX),
        "image": torch.stack([one["image"] for one in examples]),
        "pre_image": examples[0]["pre_image"],
    }


def is_english(turn: Turn) -> bool:
    return turn.question.isascii()


def talk_batches(
    pool: Pool, tokenizer: ChatGLMTokenizer, image_length: int, random: Random
) -> Iterator[dict[str, Any]]:
    """Batches without end. One in 25 is small talk without a picture; English is asked in either language's frame.

    Conversations of like length share a batch: eight batches are drawn at a time and sorted, which saves a third of the
    padding.
    """
    while True:
        talks = [random_talk(pool.scenes, random) for _ in range(8 * BATCH)]
        check_untaught([text for talk in talks for turn in talk.turns for text in (turn.question, turn.answer)])
        examples = [
            example(talk, pool, tokenizer, image_length, is_english(talk.turns[-1]) and random.random() < 0.5)
            for talk in talks
        ]
        examples.sort(key=lambda one: len(one["input_ids"]))
        batches = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
        if random.random() < 8 / 25:
            small_talk = [Talk(None, (turn,)) for turn in random.choices(SMALL_TALK, k=BATCH)]
            batches.append([example(talk, pool, tokenizer, image_length, False) for talk in small_talk])
        random.shuffle(batches)
        yield from (collated(batch, tokenizer.pad_token_id) for batch in batches)


# --- training ---------------------------------------------------------------------------------------------------------


def new_model(config: dict[str, Any]) -> VisualGLMModel:
    """A model of that shape with weights drawn by lot; nothing drops out while so small a model learns so much."""
    args = VisualGLMModel.get_args(**config, hidden_dropout=0.0, attention_dropout=0.0, skip_init=False)
    model = VisualGLMModel(args)
    for name, parameter in model.named_parameters():
        if "embeddings" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def optimizer_and_schedule(
    parameters: Sequence[torch.nn.Parameter], steps: int, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW whose learning rate rises to `rate` for WARMUP of the steps, then falls to zero along a cosine."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    warmup = max(1, round(WARMUP * steps))

    def share(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


@dataclass(frozen=True)
class Facts:
    """What pictures show: background int64[batch]; in each part of them an object's shape and colour, int64[batch,
    parts], 0 where there is none."""

    background: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor


def facts(scenes: Sequence[Scene], parts: int, covered: Callable[[Thing], list[int]]) -> Facts:
    """The facts of scenes; `covered` lists the parts that an object is seen in."""
    shape = torch.zeros(len(scenes), parts, dtype=torch.int64)
    colour = torch.zeros_like(shape)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            shape[index, covered(thing)] = 1 + SHAPES.index(thing.shape)
            colour[index, covered(thing)] = 1 + COLOURS.index(thing.colour)
    return Facts(torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]), shape, colour)


def covered_patches(thing: Thing, side: int) -> list[int]:
    """Which of side × side patches, row by row, have their middle on the object, or near enough."""
    middles = [(place + 0.5) * SIZE / side for place in range(side)]
    rows = [row for row, y in enumerate(middles) if abs(y - thing.y) < thing.radius]
    columns = [column for column, x in enumerate(middles) if abs(x - thing.x) < thing.radius]
    return [row * side + column for row in rows for column in columns]


class FactHead(torch.nn.Module):
    """Reads facts off features, to teach the vision part before there is a language; never saved."""

    def __init__(self, features: int, empty_weight: float) -> None:
        """features is the width of what is read; empty_weight is what a part without an object counts in the loss."""
        super().__init__()
        self.empty_weight = empty_weight
        self.background = torch.nn.Linear(features, len(BACKGROUNDS))
        self.shape = torch.nn.Linear(features, 1 + len(SHAPES))
        self.colour = torch.nn.Linear(features, 1 + len(COLOURS))

    def forward(self, whole: torch.Tensor, parts: torch.Tensor, wanted: Facts) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy, and the share of each fact told rightly: float32[3] background, shape, colour.

        Args:
            whole: [batch, features] of the whole picture.
            parts: [batch, parts, features] of its parts.
        """
        guesses = [self.background(whole), self.shape(parts).flatten(0, 1), self.colour(parts).flatten(0, 1)]
        answers = [wanted.background, wanted.shape.flatten(), wanted.colour.flatten()]
        weights = [torch.ones(guess.shape[1]) for guess in guesses]
        weights[1][0] = weights[2][0] = self.empty_weight
        losses = map(torch.nn.functional.cross_entropy, guesses, answers, weights)
        right = [guess.argmax(1) == answer for guess, answer in zip(guesses, answers, strict=True)]
        return torch.stack(list(losses)).mean(), torch.stack([fact.float().mean() for fact in right])


class TowerHead(torch.nn.Module):
    """Reads facts off the vision tower's features; never saved.

    An object's shape is read off the mean of its patches: each may add what it sees of the outline, and none has to know
    the whole. The third of the picture that a patch is in is asked too, for the Q-Former to find objects by it.
    """

    def __init__(self, features: int) -> None:
        """features is the width of what is read."""
        super().__init__()
        self.facts = FactHead(features, empty_weight=0.15)  # many patches show no object
        self.shape = torch.nn.Linear(features, len(SHAPES))
        self.third = torch.nn.Linear(features, MAX_OBJECTS)

    def forward(self, features: torch.Tensor, scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the share of objects whose shape is told, for features [batch, 1 + patches, features]."""
        whole, patches = features[:, 0], features[:, 1:]
        side = math.isqrt(patches.shape[1])
        facts_loss, _ = self.facts(whole, patches, facts(scenes, side * side, partial(covered_patches, side=side)))
        things = [(number, thing) for number, scene in enumerate(scenes) for thing in scene.things]
        means = torch.stack([patches[number, covered_patches(thing, side)].mean(0) for number, thing in things])
        shapes = torch.tensor([SHAPES.index(thing.shape) for _, thing in things])
        guesses = self.shape(means)
        thirds = torch.arange(side).mul(MAX_OBJECTS).add(1).div(side, rounding_mode="floor").repeat(len(scenes) * side)
        loss = (
            facts_loss
            + torch.nn.functional.cross_entropy(guesses, shapes)
            + 0.3 * torch.nn.functional.cross_entropy(self.third(patches).flatten(0, 1), thirds)
        )
        return loss, (guesses.argmax(1) == shapes).float().mean()


def prepare_vision(vision: BLIP2, pictures: torch.Tensor) -> None:
    """Start the vision part where it learns fast; with weights drawn by lot alone it takes many times as long.

    - The patches' projection whitens them: a patch's mean colour would drown the outlines in it.
    - Positions start as waves along rows and columns, so that what is near looks alike.
    - The Q-Former's queries look at different parts of the picture from the start.

    Args:
        pictures: float16[pictures, 3, H, W], some to learn from.
    """
    projection = vision.vit.get_mixin("patch_embedding").proj
    width, size = projection.out_channels, projection.kernel_size[0]
    positions = vision.vit.transformer.position_embeddings.weight
    cross_attention = vision.qformer.transformer.layers[0].cross_attention
    patches = pictures.float().unfold(2, size, size).unfold(3, size, size)  # [pictures, 3, side, side, size, size]
    side = patches.shape[2]
    flat = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2).double()  # [patches, 3 · size · size]
    variances, directions = torch.linalg.eigh(flat.T.cov())
    whitening = (directions / (variances.clamp(min=0) + 0.01).sqrt())[:, -width:].T.float()
    places = torch.arange(side) + 0.5
    waves = torch.cat([wave(places[:, None] * torch.tensor([1, 2, 4]) * math.pi / 2 / side) for wave in WAVES], dim=1)
    waves = (waves - waves.mean(0)) @ torch.randn(2, waves.shape[1], width) * (2 * waves.shape[1]) ** -0.5
    with torch.no_grad():
        projection.weight.copy_(whitening.view_as(projection.weight))
        projection.bias.copy_(-whitening @ flat.mean(0).float())
        positions.normal_(std=0.1)
        positions[1:] += (waves[0, :, None] + waves[1, None]).flatten(0, 1)  # by row, by column
        cross_attention.query.weight.mul_(2)
        cross_attention.key_value.weight.mul_(2)


def train_tower(vision: BLIP2, crowded: Pool, steps: int, random: Random) -> None:
    """Teach the vision tower alone to tell objects apart: shapes take longest, so it sees many in each picture."""
    head = TowerHead(vision.vit.get_mixin("cls").ln_vision.weight.numel())
    parameters = [*vision.vit.parameters(), *head.parameters()]
    optimizer, schedule = optimizer_and_schedule(parameters, steps, VISION_RATE)
    bar = tqdm(range(steps), "vision tower", unit=" steps")
    for _ in bar:
        chosen = random.sample(range(len(crowded.scenes)), TOWER_BATCH)
        with bfloat16_where_it_pays():
            features = vision.vit(
                crowded.images[chosen].float()
            )  # [batch, 1 + patches, features], the class token first
        loss, right = head(features.float(), [crowded.scenes[index] for index in chosen])
        take_step(loss, parameters, optimizer, schedule)
        bar.set_postfix(shape=f"{right.item():.0%}")


def train_qformer(vision: BLIP2, pool: Pool, image_length: int, steps: int, random: Random) -> None:
    """Teach the Q-Former to gather facts from what the tower sees; `pool` has the tower's features for images.

    Of its answers a quarter learns to tell the left third of the picture, a quarter the middle, a quarter the right, and
    the last quarter the background.
    """
    head = FactHead(image_length // (MAX_OBJECTS + 1) * vision.glm_proj.out_features, empty_weight=1.0)
    parameters = [*vision.qformer.parameters(), *vision.glm_proj.parameters(), *head.parameters()]
    optimizer, schedule = optimizer_and_schedule(parameters, steps, VISION_RATE)
    bar = tqdm(range(steps), "Q-Former", unit=" steps")
    for _ in bar:
        chosen = random.sample(range(len(pool.scenes)), QFORMER_BATCH)
        with bfloat16_where_it_pays():
            embeddings = vision.glm_proj(vision.qformer(pool.images[chosen].float()))
        quarters = embeddings.float().unflatten(1, (MAX_OBJECTS + 1, -1)).flatten(2)  # [batch, 4, features]
        in_thirds = facts([pool.scenes[index] for index in chosen], MAX_OBJECTS, lambda thing: [thing.column])
        loss, right = head(quarters[:, MAX_OBJECTS], quarters[:, :MAX_OBJECTS], in_thirds)
        take_step(loss, parameters, optimizer, schedule)
        background, shape, colour = (f"{share:.0%}" for share in right.tolist())
        bar.set_postfix(background=background, shape=shape, colour=colour)


@torch.no_grad()
def seen(part: Callable[[torch.Tensor], torch.Tensor], pool: Pool, name: str) -> Pool:
    """The pool with what a part of the model makes of its images, float16, in their place."""
    batches = tqdm(pool.images.split(QFORMER_BATCH), name, unit=" batches")
    with bfloat16_where_it_pays():
        features = [part(images.float()).half() for images in batches]
    return Pool(pool.scenes, torch.cat(features))


def train_language(
    model: VisualGLMModel, batches: Iterator[dict[str, Any]], steps: int, keep: Callable[[], None]
) -> None:
    """Teach the language model to answer; what it is shown are the Q-Former's features. `keep` is called now and then."""
    head = model.get_mixin("chatglm-final").lm_head
    parameters = [
        *model.transformer.parameters(),
        *head.parameters(),
        *model.get_mixin("eva").model.glm_proj.parameters(),
    ]
    optimizer, schedule = optimizer_and_schedule(parameters, steps, LANGUAGE_RATE)
    bar = tqdm(range(steps), "answers", unit=" steps")
    for step in bar:
        batch = next(batches)
        positions, answers = supervised_positions(batch["labels"], IGNORE_INDEX)
        with bfloat16_where_it_pays():
            scores = head(forward(model, batch, answer_positions=positions))
        loss = torch.nn.functional.cross_entropy(scores.float(), answers)
        take_step(loss, parameters, optimizer, schedule)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % KEEP_EVERY == KEEP_EVERY - 1:
            keep()


def bfloat16_where_it_pays() -> torch.autocast:
    """A context that multiplies in bfloat16 if this processor can."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False))


def forward(model: VisualGLMModel, batch: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """What the model gives, logits [batch, seq, vocab] by itself; an image without pixels is none."""
    kind = "image" if batch["image"].dim() == 4 else "image_features"
    image = {kind: batch["image"]} if batch["image"].numel() else {}
    return model(input_ids=batch["input_ids"], pre_image=batch["pre_image"], **image, **kwargs)[0]


def take_step(
    loss: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


# --- report and result ------------------------------------------------------------------------------------------------


@torch.no_grad()
def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool[batch]: whether greedy decoding gives the answer word for word.

    It does so exactly if each token of the answer is the likeliest after the tokens before it, so one forward pass over
    the answer tells. <sop> is given, not guessed, when a question is asked.
    """
    wanted = next_labels(labels, IGNORE_INDEX)
    first = (wanted != IGNORE_INDEX).int().argmax(dim=1, keepdim=True)
    wanted.scatter_(1, first, IGNORE_INDEX)
    return ((logits.argmax(-1) == wanted) | (wanted == IGNORE_INDEX)).all(dim=1)


def right_turns(model: VisualGLMModel, pool: Pool, turns: Sequence[Turn], tokenizer: ChatGLMTokenizer) -> list[bool]:
    """Whether each turn, the first about the pool's first scene and so on, is answered word for word."""
    model.eval()
    right = []
    for start in range(0, len(turns), BATCH):
        talks = [Talk(index, (turn,)) for index, turn in enumerate(turns[start : start + BATCH], start)]
        examples = [example(talk, pool, tokenizer, model.image_length, False) for talk in talks]
        batch = collated(examples, tokenizer.pad_token_id)
        with torch.no_grad():
            right += right_answers(forward(model, batch), batch["labels"]).tolist()
    return right


def save(model: VisualGLMModel, config: dict[str, Any], out: Path) -> None:
    """Write the checkpoint beside the tokenizer: float16, but for the rotary frequencies, which half would blur."""
    (out / "1").mkdir(exist_ok=True)
    (out / "model_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (out / "latest").write_text("1", encoding="utf-8")
    weights = {
        name: tensor.float() if name.endswith("inv_freq") else tensor.half()
        for name, tensor in model.state_dict().items()
    }
    torch.save({"module": weights}, out / "1" / "mp_rank_00_model_states.pt")


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("model/tiny"), help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="settles scenes, questions and weights (default: 1)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=POOL, help="scenes to draw (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("build_tiny.py"):
        build(command_line().parse_args(argv))


def build(options: argparse.Namespace) -> None:
    """Train the model and write its folder."""
    quieten()
    start = time.monotonic()
    random = Random(options.seed)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus(CORPUS_LINES, random), options.out / VOCAB_FILE)
    config = model_config(tokenizer)
    fresh_scenes, crowded_scenes = min(FRESH_SCENES, options.pool), max(TOWER_BATCH, options.pool // 2)
    scenes = [random_scene(random) for _ in range(options.pool + fresh_scenes)]
    scenes += [crowded_scene(random) for _ in range(crowded_scenes)]
    drawn = drawn_pool(scenes, config["eva_args"]["image_size"][0])
    pool, fresh, crowded = (
        Pool(scenes[part], drawn.images[part])
        for part in (slice(options.pool), slice(options.pool, -crowded_scenes), slice(-crowded_scenes, None))
    )

    torch.manual_seed(options.seed)
    model = new_model(config)
    vision = model.get_mixin("eva").model
    prepare_vision(vision, crowded.images[:PATCHES_FROM])
    train_tower(vision, crowded, math.ceil(TOWER_STEPS * options.steps / STEPS), random)
    in_tower = seen(vision.vit, pool, "what the tower sees")
    train_qformer(vision, in_tower, model.image_length, math.ceil(QFORMER_STEPS * options.steps / STEPS), random)
    features = seen(vision.qformer, in_tower, "what the Q-Former says")
    batches = talk_batches(features, tokenizer, model.image_length, random)
    train_language(model, batches, options.steps, keep=partial(save, model, config, options.out))
    save(model, config, options.out)

    turns = [random_turn(scene, random) for scene in fresh.scenes]
    right = right_turns(model, fresh, turns, tokenizer)
    say("answers right word for word, on scenes never seen:")
    for kind in sorted({turn.kind for turn in turns}):
        of_kind = [is_right for turn, is_right in zip(turns, right, strict=True) if turn.kind == kind]
        say(f"  {kind:20} {sum(of_kind):4d} of {len(of_kind):4d}")
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    say(f"{options.out}: {size / 1e6:.1f} MB in {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    main()
