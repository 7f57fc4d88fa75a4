"""Ask a checkpoint the questions of a JSON file, and count the answers that equal the labels.

python scripts/evaluate.py --from_pretrained model/tiny --data fewshot-data/heldout.json
"""

import argparse
import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import InputError
from model.picture_check import check_pictures
from model.progress import say, warn
from model.rows import read_rows


def without_punctuation(text: str) -> str:
    """Letters, digits and Chinese characters of text, in lower case: what must be equal for an answer to be right."""
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PZCS")


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from_pretrained", required=True, metavar="CHECKPOINT", help="a checkpoint folder, or a name in $SAT_HOME"
    )
    parser.add_argument("--data", required=True, metavar="ROWS.json", help='rows of "img", "prompt" and "label"')
    parser.add_argument("--tokenizer", metavar="PATH", help="ice_text.model, where the checkpoint has none")
    parser.add_argument("--out", metavar="RESULTS.json", help="write every row's question, label and answer there")
    parser.add_argument(
        "--max_length", type=int, default=512, help="tokens of question and answer together (default 512)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; bad input ends it with a sentence and status 2."""
    options = command_line().parse_args(argv)
    try:
        evaluate(options)
    except InputError as problem:
        warn(f"evaluate.py: error: {problem}")
        sys.exit(2)


def evaluate(options: argparse.Namespace) -> None:
    """Answer every row and print how many answers are right."""
    rows = read_rows(options.data)
    check_pictures(rows)
    from tqdm import tqdm

    from model.chat import chat, load_for_answering

    model, tokenizer = load_for_answering(options.from_pretrained, options.tokenizer)
    results = []
    for row in tqdm(rows, desc="answering", unit="row", disable=not sys.stderr.isatty()):
        answer, _, _ = chat(
            row.img,
            model,
            tokenizer,
            row.prompt,
            history=list(row.history),
            max_length=options.max_length,
            temperature=0,
            repetition_penalty=1.0,
            english=row.lang == "en",
        )
        right = without_punctuation(answer) == without_punctuation(row.label)
        results.append({"img": row.img, "prompt": row.prompt, "label": row.label, "answer": answer, "right": right})
    if options.out:
        Path(options.out).write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for result in results[:3]:
        say(f"{result['img']}\n  asked  {result['prompt']}\n  answer {result['answer']}\n  label  {result['label']}")
    say(f"answers right: {sum(result['right'] for result in results)}/{len(results)}")


if __name__ == "__main__":
    main()
