"""Answers against labels: what `scripts/evaluate.py` measures, and a run of the rows that it answers.

Only the standard library is imported; what ROUGE-L and BLEU are counted with is imported when they are asked for.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from model.data.rows import Row


@dataclass(frozen=True)
class Result:
    """One row and what a checkpoint made of it. loss is the mean over the label's tokens, in nats."""

    img: str
    prompt: str
    label: str
    answer: str
    right: bool
    exact: bool
    rouge_l: float
    loss: float
    tokens: int
    cut: bool = False  # the answer ended because there was no room for more of it
    shortened: bool = False  # the question was asked without its end, or without earlier turns


def without_punctuation(text: str) -> str:
    """Letters, digits and Chinese characters of text, in lower case: what must be equal for an answer to be right."""
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PZCS")


def rouge_l(answer: str, label: str) -> float:
    """Character ROUGE-L (Lin 2004), 0 to 1: F1 of the longest common subsequence; spaces and case don't count."""
    from rapidfuzz.distance import LCSseq

    answer, label = ("".join(text.lower().split()) for text in (answer, label))
    if not answer or not label:
        return float(answer == label)
    return 2 * LCSseq.similarity(answer, label) / (len(answer) + len(label))


def bleu(results: Sequence[Result]) -> float:
    """Corpus BLEU, 0 to 100, of sacrebleu's "zh": Chinese by characters, other scripts by words.

    Where all answers are shorter than four, it is of as many in a row as there are: it would be 0 for right ones too.
    """
    import sacrebleu

    answers, labels = [result.answer for result in results], [result.label for result in results]
    return float(sacrebleu.corpus_bleu(answers, [labels], tokenize="zh", use_effective_order=True).score)


def summary(results: Sequence[Result]) -> dict[str, float]:
    """The measures of all rows together. loss is the mean over all labels' tokens."""
    count, tokens = len(results), sum(result.tokens for result in results)
    return {
        "rows": count,
        "right": sum(result.right for result in results),
        "exact_match": sum(result.exact for result in results) / count,
        "rouge_l": sum(result.rouge_l for result in results) / count,
        "bleu": bleu(results),
        "loss": sum(result.loss * result.tokens for result in results) / max(1, tokens),
        "cut": sum(result.cut for result in results),
        "shortened": sum(result.shortened for result in results),
    }


def summary_line(measures: dict[str, float]) -> str:
    """The measures as they are printed."""
    return (
        f"exact match {measures['exact_match']:.1%}, ROUGE-L {measures['rouge_l']:.3f}, BLEU {measures['bleu']:.1f}, "
        f"loss per token {measures['loss']:.4f}"
    )


def result_of(row: Row, answer: str, loss: float, tokens: int, cut: bool = False, shortened: bool = False) -> Result:
    """What is to be said of one row's answer, and of the loss of its label in all its tokens."""
    right = without_punctuation(answer) == without_punctuation(row.label)
    exact = answer.strip() == row.label.strip()
    similarity = rouge_l(answer, row.label)
    mean_loss = loss / max(1, tokens)
    return Result(
        row.img or "", row.prompt, row.label, answer, right, exact, similarity, mean_loss, tokens, cut, shortened
    )


def worst_first(results: Sequence[Result]) -> list[Result]:
    """The rows whose answers are furthest from their labels first; of equally far ones, the labels least expected."""
    return sorted(results, key=lambda result: (result.right, result.rouge_l, -result.loss))
