"""What each process of a run sees, so that processes that see other files or flags can be told apart.

Each process reads its files by itself. On several machines a file may be another one under the same name: the run would
then train on other rows than it says, or from weights that no machine has.

Compared are the flags, the data files, the tokenizer and the --deepspeed_config whole, and places of the weights: reading
all of them takes minutes. Pictures are not compared.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.checkpoints.resume import digest
from model.cli.options import Options, flag_names, shown
from model.cli.preflight import Inputs
from model.errors import raise_problems

# Files of these are compared by what is in them, wherever they lie.
FILES = ("train_data", "valid_data", "test_data", "deepspeed_config")
MAY_DIFFER = {
    *FILES, "from_pretrained", "base", "load", "resume", "tokenizer", "save", "summary_dir", "feature_cache", "local_rank",
    "num_workers", "prefetch_factor", "ui_lang", "check_seconds", "user_set",
}  # fmt: skip
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a file of weights


def seen_by_this_process(options: Options, inputs: Inputs) -> dict[str, str]:
    """What must be the same on every process: by its name, as a person reads it."""
    seen = {flag_names()[name]: shown(value) for name, value in vars(options).items() if name not in MAY_DIFFER}
    for name in FILES:
        given = getattr(options, name) or []
        for number, path in enumerate([given] if isinstance(given, str) else given, 1):
            seen[f"{flag_names()[name]}, file {number}"] = f"{Path(path).stat().st_size} bytes, {digest(path)[:12]}"
    seen["the tokenizer"] = digest(inputs.tokenizer.vocab_file)[:12]
    checkpoint = inputs.checkpoint
    for weights in (checkpoint, checkpoint.base):
        if weights is not None:
            seen[f"the weights {weights.name}"] = " and ".join(map(_sampled, weights.weights_files()))
    return seen


def _sampled(path: Path) -> str:
    """A file's size and a digest of places that are spread over it."""
    size, hashed = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            hashed.update(file.read(SAMPLE_BYTES))
    return f"{size} bytes, {hashed.hexdigest()[:12]}"


def refuse_different(names: Sequence[str], seen: Sequence[Mapping[str, str]]) -> None:
    """Refuse to train where processes see different things.

    Args:
        names: of the processes, for a person. seen: what each of them sees.

    Raises:
        InputError: lists what differs, and which process sees what. Every process raises it.
    """
    problems = []
    for what in dict.fromkeys(key for one in seen for key in one):
        values = [one.get(what, "nothing") for one in seen]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            problems.append(
                f"{what}: {names[0]} sees {values[0]}, {names[other]} sees {values[other]}; the same is needed on all."
            )
    raise_problems(problems)
