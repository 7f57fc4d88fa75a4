"""Some rows that are answered while a run goes on: before its first step, at evaluations (--eval_answers), and at its end.

They are rows of the evaluation, evenly spread over it, without those that are also trained on. Where no other is left, or
nothing is held out, they are rows that are trained on, which is said. The question is the sample's own, cut and framed as
in training; the likeliest token is always taken. An answer may have twice the label's tokens and ANSWER_ROOM more: longer
ones are wrong already, and cost time.

Every process answers every row. They are few, and where processes share a model, none can do without the others. With ZeRO 3
no row is answered: for each token all processes would send each other the whole model.

`answers.json` in the run's folder:

    {"held_out": true, "rows": 8, "before": {"step": 0, <measures>, "results": [<Result>, …]}, "after": {"step": 300, …}}
"""

import argparse
import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from model.checkpoints.whole import json_text, write_whole
from model.cli.flag_checks import NOT_WITH_ZERO_3
from model.cli.options import Options
from model.data.prompt import IGNORE_INDEX, Sample
from model.data.rows import Row
from model.distributed import from_all_processes, from_first_process, is_first_process
from model.errors import InputError
from model.inference.batch import label_losses
from model.inference.engine import Answer, Engine, Question, model_positions
from model.inference.scores import Result, result_of, summary
from model.inference.seen_images import SeenImages
from model.inference.text import answer_text
from model.progress import say, warn, with_progress
from model.sat_compat import model_parallel
from model.training.deepspeed_config import zero_stage
from model.training.records import ANSWERS_FILE
from model.training.run_state import put_back_random_state, random_state
from model.training.verdict import rows_in_words

AT_ONCE = 4  # rows: keys and values of the 6B take half a MiB a token
ANSWER_ROOM = 16  # tokens

Asked = tuple[Row, dict[str, Any]]  # and its sample, as `FewShotDataset` gives it


@dataclass(frozen=True)
class Answered:
    """The rows, answered after so many steps."""

    step: int
    results: list[Result]

    @property
    def measures(self) -> dict[str, float]:
        """As `scripts/evaluate.py` has them."""
        return summary(self.results)

    def to_json(self) -> dict[str, Any]:
        """What `answers.json` has of it; which questions were shortened isn't known of samples."""
        known = [asdict(result) for result in self.results]
        for one in (measures := self.measures, *known):
            del one["shortened"]
        return {"step": self.step, **measures, "results": known}

    @classmethod
    def from_json(cls, values: Any) -> "Answered | None":
        """The opposite; None if it is not of this version."""
        try:
            names = {one.name for one in fields(Result)}
            rows = [Result(**{name: row[name] for name in names if name in row}) for row in values["results"]]
            return cls(int(values["step"]), rows) if rows else None
        except (KeyError, TypeError, ValueError):
            return None


class RowAnswers:
    """The rows of a run that are answered, and their answers before the first step and now."""

    def __init__(
        self, options: Options, tokenizer: Any, goes_on: bool = False, also_trained_on: Collection[str] = ()
    ) -> None:
        """Nothing is answered yet.

        Args:
            goes_on: the run is resumed, and has answered before its first step.
            also_trained_on: rows of --valid-data that are training rows, too; see `model.data.split.Selection`.
        """
        # Without a folder nothing is left of the answers but an evaluation's measures.
        self.number = options.eval_answers or (options.answers if options.save else 0)
        self.in_between = options.eval_answers > 0
        self.tokenizer, self.goes_on = tokenizer, goes_on
        self._also_trained_on = also_trained_on if options.valid_data else ()
        self.batch = min(AT_ONCE, options.eval_batch_size or AT_ONCE)
        self.held_out = False
        self.before: Answered | None = None
        self.latest: Answered | None = None
        self._rows: list[Asked] = []
        self._folder: Path | None = None

    def begin(self, model: Any, args: argparse.Namespace, train: Any, valid: Any) -> None:
        """Choose the rows, and answer them before the first step. A run that goes on has these answers in its folder.

        Args:
            model: DeepSpeed's engine. train, valid: the loaders; the latter may be None.

        Raises:
            InputError: evaluations are to answer rows, and a DeepSpeed file asks for ZeRO 3.
        """
        if not self.number:
            return
        if zero_stage(args.deepspeed_config) == 3:
            if self.in_between:
                raise InputError(f"--eval_answers {self.number}: {NOT_WITH_ZERO_3}")
            say(
                "No rows are answered before and after the run, because of ZeRO 3; scripts/evaluate.py does it afterwards."
            )
            return
        self._folder = Path(args.save) if args.save else None
        found = (train if valid is None else valid).spread(self.number)
        asked = [(row, sample) for row, sample in found if "problem" not in sample]
        new = [(row, sample) for row, sample in asked if row.where not in self._also_trained_on]
        self.held_out, self._rows = valid is not None and bool(new), new or asked
        if self.goes_on:
            self.before = from_first_process(self._kept() if self._folder else None)
        elif self._rows:
            how_not = "" if self.in_between else " (--answers 0: none)"
            say(f"Answering {self.what}, and again at the end{how_not}.")
            self.before = self.ask(model, args)
            self._keep()

    def at_evaluation(self, model: Any, args: argparse.Namespace) -> dict[str, float]:
        """The measures of an evaluation's answers; none without --eval_answers."""
        answered = self.now(model, args) if self.in_between else None
        return {} if answered is None else answered.measures

    def finish(self, model: Any, args: argparse.Namespace) -> None:
        """Answer the rows after the last step, and keep their answers."""
        if self._rows and self.now(model, args) is not None:
            self._keep()

    def now(self, model: Any, args: argparse.Namespace) -> Answered | None:
        """The rows' answers after the steps that are done, asked for once."""
        if self._rows and (self.latest is None or self.latest.step != args.iteration):
            self.latest = self.ask(model, args)
        return self.latest

    @property
    def what(self) -> str:
        """Which rows they are, in words."""
        return rows_in_words(len(self._rows), self._row_count, self.held_out)

    @property
    def _row_count(self) -> int:
        """How many rows of the data files they are: each of their turns may be one here."""
        return len({row.where for row, _ in self._rows})

    def ask(self, model: Any, args: argparse.Namespace) -> Answered | None:
        """The rows' answers; None, with a line, where they can't be had. Nothing of the run is changed."""
        module = getattr(model, "module", model)
        results: list[Result] = []
        problem = None
        with as_it_was(model, module):
            try:
                results = self._results(module, args)
            except (InputError, torch.OutOfMemoryError) as error:
                if isinstance(error, torch.OutOfMemoryError) and model_parallel().ranks > 1:
                    raise  # another process waits for this one's part of a layer
                problem = str(error).splitlines()[0]
        problem = next(filter(None, from_all_processes(problem)), None)  # one without memory keeps no other waiting
        if problem is not None:
            warn(f"{self.what} are not answered: {problem}")
            return None
        return Answered(args.iteration, from_first_process(results))

    def _results(self, module: Any, args: argparse.Namespace) -> list[Result]:
        seen = SeenImages(module)
        questions = [_question(sample, seen, module, args) for _, sample in self._rows]
        positions = max(question.max_length or 0 for question in questions)
        samples = [Sample(one["input_ids"], one["labels"], one["pre_image"], 0, 0) for _, one in self._rows]
        answers = self._answers(Engine(module, self.tokenizer, self.batch, positions), questions)
        losses: list[tuple[float, int]] = []
        for start in range(0, len(samples), self.batch):
            some = slice(start, start + self.batch)
            features = [one.image_features for one in questions[some] if one.image_features is not None]
            losses += label_losses(
                samples[some], None, module, self.tokenizer, torch.cat(features) if features else None
            )
        results = []
        for number, (row, _) in enumerate(self._rows):
            answer = answers[number]
            text = answer_text(answer.ids, self.tokenizer, (row.lang or getattr(args, "lang", "zh")) == "en")
            results.append(result_of(row, text, *losses[number], answer.finished == "length"))
        return results

    def _answers(self, engine: Engine, questions: list[Question]) -> list[Answer]:
        """All answers. It shows how far it is, by the tokens that answers of full length would take."""
        answers = [engine.submit(question) for question in questions]
        longest = max(answer.max_length - answer.length for answer in answers)
        steps = iter(lambda: engine.busy and engine.step(), False)
        most = longest * math.ceil(len(answers) / self.batch)
        for _ in with_progress(steps, most, "Answering, tokens at most"):
            pass
        return answers

    # --- answers.json

    def _kept(self) -> Answered | None:
        """The answers before the first step that the folder has, if they are of these rows."""
        assert self._folder is not None
        kept = read_answers(self._folder).get("before")
        asked = [(row.prompt, row.label) for row, _ in self._rows]
        return kept if kept and [(one.prompt, one.label) for one in kept.results] == asked else None

    def _keep(self) -> None:
        if self._folder is None or not is_first_process():
            return
        known = {"before": self.before, "after": self.latest}
        content = {
            "held_out": self.held_out,
            "rows": self._row_count,
            **{name: one.to_json() for name, one in known.items() if one},
        }
        text = json_text(content, 1) + "\n"
        try:
            write_whole(self._folder / ANSWERS_FILE, lambda file: file.write_text(text, encoding="utf-8"))
        except OSError as error:
            warn(f"{self._folder / ANSWERS_FILE} can't be written ({error.strerror}).")


def read_answers(folder: Path) -> dict[str, Any]:
    """What `answers.json` in a run's folder has: "held_out", "rows", and "before" and "after" as `Answered`; each may be
    missing.
    """
    try:
        content = json.loads((folder / ANSWERS_FILE).read_text(encoding="utf-8"))
        answered = {name: Answered.from_json(content.get(name)) for name in ("before", "after")}
        kept = {"held_out": bool(content.get("held_out")), **{name: one for name, one in answered.items() if one}}
        return kept | ({"rows": content["rows"]} if isinstance(content.get("rows"), int) else {})
    except (OSError, ValueError, AttributeError):
        return {}


@contextmanager
def as_it_was(model: Any, module: Any) -> Iterator[None]:
    """Answer in the block: dropout is off and activations aren't kept; afterwards all is as before, random states too."""
    trains, states, transformer = module.training, random_state(), module.transformer
    keeps = transformer.checkpoint_activations
    model.eval()
    transformer.checkpoint_activations = False
    try:
        yield
    finally:
        transformer.checkpoint_activations = keeps
        model.train(trains)
        put_back_random_state(states)


def _question(sample: dict[str, Any], seen: SeenImages, module: Any, args: argparse.Namespace) -> Question:
    """A sample's context as a question, with its image's features on the model's device."""
    labels: Sequence[int] = sample["labels"]
    first = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
    context = sample["input_ids"][: first + 1]  # <sop> too
    weight = module.transformer.word_embeddings.weight
    features = sample.get("image_features")
    if features is not None:
        features = features.unsqueeze(0).to(weight.device, weight.dtype)
    elif sample.get("image") is not None:
        features = seen.features([sample["image"].unsqueeze(0).to(weight.device)])[0].unsqueeze(0)
    label_tokens = sum(label != IGNORE_INDEX for label in labels)
    room = min(args.max_target_length, 2 * label_tokens + ANSWER_ROOM)
    return Question(
        context,
        sample["pre_image"],
        image_features=features,
        max_length=min(len(context) + room, model_positions(module)),
    )
