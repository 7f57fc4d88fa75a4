"""image_features_of_one_of_two.py, in which the second process finds no room for its file."""

import os
from typing import NoReturn

import image_features_of_one_of_two

from model.training import feature_store


def full(*_: object) -> NoReturn:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        feature_store.os.posix_fallocate = full
    image_features_of_one_of_two.main()
