"""Make fewshot-data/: 20 rows to fine-tune on, 50 other rows to try the result on, and their pictures.

    python scripts/dev/make_fewshot_data.py
    python scripts/dev/make_fewshot_data.py --out fewshot-data

All rows ask one question, what is in a picture's background, that the small VisualGLM of build_tiny.py has never seen.
The same command always makes the same files.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file: the project's root is not on the path

from model.errors import command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

from model.progress import say
from scripts.dev.scenes import BACKGROUNDS, Background, draw, random_scene

QUESTION = "这张图片的背景里有什么内容？"
TRAIN_ROWS = 20
HELDOUT_ROWS = 50
SEED = 20
FOLDER = "fewshot-data"  # where the rows look for their pictures, from the project's root


def label(background: Background) -> str:
    """The answer to QUESTION for a picture with this background."""
    return f"这张图片的背景是{background.zh}。"


def write_rows(out: Path, name: str, prefix: str, rows: int, random: Random) -> None:
    """Write `rows` pictures and the JSON file that lists them; the backgrounds take turns, in an order drawn by lot."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    backgrounds = [BACKGROUNDS[index % len(BACKGROUNDS)] for index in range(rows)]
    random.shuffle(backgrounds)
    listed = []
    for index, background in enumerate(backgrounds):
        picture = f"images/{prefix}{index:02d}.png"
        draw(random_scene(random, background)).save(out / picture, optimize=True)
        listed.append({"img": f"{FOLDER}/{picture}", "prompt": QUESTION, "label": label(background)})
    text = json.dumps(listed, ensure_ascii=False, indent=2)
    (out / name).write_text(text + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("make_fewshot_data.py"):
        write_data(argv)


def write_data(argv: list[str] | None) -> None:
    """Write the pictures and both data files into the folder that the flags name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(FOLDER), help="folder to write to (default: %(default)s)")
    out = parser.parse_args(argv).out
    random = Random(SEED)
    write_rows(out, "dataset.json", "train", TRAIN_ROWS, random)
    write_rows(out, "heldout.json", "heldout", HELDOUT_ROWS, random)
    say(f"{out}/dataset.json: {TRAIN_ROWS} rows; {out}/heldout.json: {HELDOUT_ROWS} rows")


if __name__ == "__main__":
    main()
