"""Our tokenizer equals the released one on every golden row, is found where it should be, and says what is wrong."""

import io
import json
import pickle
import random
import shutil

import huggingface_hub
import pytest
import sentencepiece
from conftest import GOLDEN

from model.data.tokenizer import ChatGLMTokenizer, check_special_ids, find_tokenizer
from model.errors import InputError

VOCAB = GOLDEN / "tokenizer/ice_text.model"
EXPECTED = json.loads((GOLDEN / "tokenizer/golden.json").read_text())
CONFIG = json.loads((GOLDEN / "upstream/model_config.json").read_text())
every_row = pytest.mark.parametrize("row", EXPECTED["rows"], ids=[repr(row["text"][:20]) for row in EXPECTED["rows"]])


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*_):
        raise OSError("no network\nno route to host")

    monkeypatch.setattr("model.hub.require_answer", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


# Equal to the released tokenizer


@every_row
def test_ids_of_a_golden_row_are_the_released_ones(tokenizer, row):
    assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"]


@every_row
def test_ids_with_special_tokens_of_a_golden_row_are_the_released_ones(tokenizer, row):
    assert tokenizer.encode(row["text"]) == row["ids_with_special_tokens"]


@every_row
def test_text_of_a_golden_row_is_the_released_one(tokenizer, row):
    assert tokenizer.decode(row["ids"]) == row["decoded"]


@every_row
def test_tokens_of_a_golden_row_are_the_released_ones(tokenizer, row):
    assert tokenizer.tokenize(row["text"]) == tokenizer.convert_ids_to_tokens(row["ids"]) == row["tokens"]


@pytest.mark.parametrize("pair", EXPECTED["pairs"], ids=["image", "question"])
def test_ids_of_a_golden_pair_are_the_released_ones(tokenizer, pair):
    source = tokenizer.encode(pair["source"], add_special_tokens=False)
    target = tokenizer.encode(pair["target"], add_special_tokens=False)
    assert tokenizer.build_inputs_with_special_tokens(source, target) == pair["ids"]


def test_padded_batch_is_the_released_one(tokenizer):
    batch = EXPECTED["left_padded_batch"]
    assert tokenizer(batch["texts"], padding=True)["input_ids"] == batch["input_ids"]


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id"])
def test_special_id_is_the_released_one(tokenizer, name):
    assert getattr(tokenizer, name) == EXPECTED[name]


def test_special_tokens_have_the_released_ids(tokenizer):
    special = EXPECTED["special_ids"]
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(special.values())


def test_vocab_size_is_the_released_one(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer) == EXPECTED["vocab_size"]


# Decoding


def test_decode_leaves_padding_out(tokenizer):
    assert tokenizer.decode([3, 3, 2468, 3124, 2753, 3]) == "你好"


def test_decode_of_a_padded_vocabulary_id_has_no_text(tokenizer):
    assert tokenizer.decode([2468, 3124, 3700, 2753]) == "你好"


def test_decode_when_special_tokens_are_skipped_leaves_them_out(tokenizer):
    assert tokenizer.decode([2468, 3124, 2753, 86, 89, 90], skip_special_tokens=True) == "你好"


def test_decode_when_special_tokens_are_skipped_keeps_line_breaks(tokenizer):
    assert tokenizer.decode([2468, 4, 3124], skip_special_tokens=True) == "\n你"


def test_decode_of_one_id_is_its_text(tokenizer):
    assert tokenizer.decode(3124) == "你"


def test_decode_of_a_tensor_is_its_text(tokenizer):
    import torch

    assert tokenizer.decode(torch.tensor([2468, 3124, 2753])) == "你好"


@pytest.mark.parametrize("blank", ["<|blank_1|>", "<|blank_81|>", "<|blank_800|>"])
def test_decode_of_text_that_only_looks_like_spaces_is_unchanged(tokenizer, blank):
    assert tokenizer.decode(tokenizer.encode(blank, add_special_tokens=False)) == blank


# Batches


def test_call_with_one_text_gives_one_row(tokenizer):
    assert tokenizer("你好")["input_ids"] == [2468, 3124, 2753, 86, 89]


def test_call_with_one_text_and_tensors_gives_a_batch_of_one(tokenizer):
    assert tokenizer("你好", return_tensors="pt")["input_ids"].tolist() == [[2468, 3124, 2753, 86, 89]]


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_call_with_tensors_gives_int64(tokenizer, kind):
    assert str(tokenizer(["你好"], return_tensors=kind)["input_ids"].dtype).endswith("int64")


def test_attention_mask_is_zero_on_the_left_padding(tokenizer):
    assert tokenizer(["你好", "？"], padding=True)["attention_mask"] == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_call_without_padding_leaves_rows_as_they_are(tokenizer):
    assert [len(ids) for ids in tokenizer(["你好", "？"])["input_ids"]] == [5, 4]


def test_call_with_max_length_pads_to_it(tokenizer):
    batch = tokenizer(["你好"], padding="max_length", max_length=7)
    assert batch["input_ids"] == [[3, 3, 2468, 3124, 2753, 86, 89]]


def test_call_with_truncation_keeps_the_special_tokens(tokenizer):
    assert tokenizer("你好你好", truncation=True, max_length=4)["input_ids"] == [2468, 3124, 86, 89]


def test_call_without_special_tokens_gives_plain_ids(tokenizer):
    assert tokenizer("你好", add_special_tokens=False)["input_ids"] == [2468, 3124, 2753]


def test_call_with_truncation_but_no_length_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="need max_length"):
        tokenizer("你好", truncation=True)


# Files


def test_save_pretrained_writes_the_same_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new/ice_text.model").read_bytes() == VOCAB.read_bytes()


def test_from_pretrained_with_a_folder_reads_its_file():
    assert ChatGLMTokenizer.from_pretrained(VOCAB.parent).encode("你好") == [2468, 3124, 2753, 86, 89]


def test_tokenizer_when_pickled_encodes_the_same(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("你好") == [2468, 3124, 2753, 86, 89]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100, VOCAB.read_bytes()[:1000]])
def test_tokenizer_when_the_file_is_no_model_is_an_error(tmp_path, content):
    (tmp_path / "ice_text.model").write_bytes(content)
    with pytest.raises(InputError, match=r"ice_text.model (isn't a SentencePiece model|has no)"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_tokenizer_when_the_model_is_not_chatglms_names_what_it_lacks(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three"] * 9), model_writer=model, vocab_size=12, minloglevel=2
    )
    (tmp_path / "ice_text.model").write_bytes(model.getvalue())
    with pytest.raises(InputError, match=r"ice_text.model has no <pad>, \[MASK\]"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_tokenizer_when_the_file_is_missing_names_it(tmp_path):
    with pytest.raises(InputError, match=r"ice_text.model: No such file"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_find_tokenizer_when_the_checkpoint_has_one_takes_it(tmp_path, no_hub):
    shutil.copy(VOCAB, tmp_path)
    assert find_tokenizer(tmp_path) == tmp_path / "ice_text.model"


def test_find_tokenizer_when_both_have_one_takes_the_checkpoints(tmp_path, no_hub):
    shutil.copy(VOCAB, tmp_path)
    assert find_tokenizer(tmp_path, VOCAB) == tmp_path / "ice_text.model"


@pytest.mark.parametrize("option", [VOCAB, VOCAB.parent])
def test_find_tokenizer_when_the_option_is_given_takes_its_file(tmp_path, option, no_hub):
    assert find_tokenizer(tmp_path, option) == VOCAB


def test_find_tokenizer_when_the_option_names_nothing_is_an_error_even_if_the_checkpoint_has_one(tmp_path):
    shutil.copy(VOCAB, tmp_path)
    with pytest.raises(InputError, match=r"--tokenizer .*nowhere: no file"):
        find_tokenizer(tmp_path, tmp_path / "nowhere")


def test_find_tokenizer_when_neither_has_one_takes_the_hubs(tmp_path, monkeypatch):
    monkeypatch.setattr("model.hub.require_answer", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file: f"{repository}/{file}")
    assert str(find_tokenizer(tmp_path)) == "THUDM/visualglm-6b/ice_text.model"


def test_find_tokenizer_takes_the_one_that_chatglm_has_in_the_cache(tmp_path, monkeypatch):
    kept = {"THUDM/chatglm-6b": str(tmp_path / "kept")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, *_, **__: kept.get(repository))
    assert find_tokenizer(None) == tmp_path / "kept"


def test_find_tokenizer_when_nowhere_says_where_it_looked_and_what_to_do(tmp_path, no_hub):
    with pytest.raises(InputError) as error:
        find_tokenizer(tmp_path)
    assert str(error.value) == (
        f"No tokenizer: ice_text.model was looked for in {tmp_path} and on the hub in THUDM/visualglm-6b (OSError: no network);"
        " give its path with --tokenizer, or put it into the checkpoint's folder."
    )


def test_find_tokenizer_offline_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"THUDM/visualglm-6b \(HF_HUB_OFFLINE is set\); give its path"):
        find_tokenizer(tmp_path)


# Special ids


def test_special_ids_when_they_agree_pass(tokenizer):
    check_special_ids(tokenizer, CONFIG)


@pytest.mark.parametrize("name", ["bos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id"])
def test_special_ids_when_one_differs_name_it(tokenizer, name):
    with pytest.raises(InputError, match=rf"{name} is \d+, but 130004 in the checkpoint's model_config.json"):
        check_special_ids(tokenizer, CONFIG | {name: 130004})


def test_special_ids_when_two_differ_name_both(tokenizer):
    with pytest.raises(InputError) as error:
        check_special_ids(tokenizer, CONFIG | {"bos_token_id": 1, "pad_token_id": 2})
    assert len(str(error.value).splitlines()) == 2


def test_special_ids_when_the_models_vocabulary_is_smaller_are_an_error(tokenizer):
    with pytest.raises(InputError, match="3600 tokens, but vocab_size is 3599"):
        check_special_ids(tokenizer, CONFIG | {"vocab_size": 3599})


def test_text_of_known_characters_has_no_more_tokens_than_characters_and_one_mark(tokenizer):
    known = sorted(tokenizer.known_characters)
    rng = random.Random(0)
    assert len(known) > 1000
    assert {" ", "\n", "，", "？", "a", "的"} <= set(known)
    for character in known:
        assert len(tokenizer.encode(character, add_special_tokens=False)) <= 2, repr(character)
    for _ in range(2000):
        text = "".join(rng.choices(known, k=rng.randrange(1, 40))).replace("  ", "")
        assert len(tokenizer.encode(text, add_special_tokens=False)) <= len(text) + 1, repr(text)


def test_characters_that_take_several_tokens_are_not_known(tokenizer):
    for character in "😀﷽㌖①½":
        assert character not in tokenizer.known_characters, character


# --- for transformers' users ------------------------------------------------------------------------------------------


def test_from_pretrained_takes_transformers_trust_remote_code():
    assert ChatGLMTokenizer.from_pretrained(VOCAB.parent, trust_remote_code=True).encode("你好")[:2] == [2468, 3124]


def test_batch_decode_gives_the_text_of_each_row(tokenizer):
    batch = tokenizer(["你好", "蓝天下的猫"], padding=True, return_tensors="np")["input_ids"]
    assert tokenizer.batch_decode(batch, skip_special_tokens=True) == ["你好", "蓝天下的猫"]
    assert tokenizer.batch_decode([[], [2468]]) == ["", tokenizer.decode(2468)]


def test_get_vocab_has_the_id_of_every_piece(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == len(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(vocabulary.values())) == list(vocabulary)
    assert vocabulary["<sop>"] == tokenizer.bos_token_id


def test_saved_folder_has_the_released_configuration(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ice_text.model", "tokenizer_config.json"]
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "ChatGLMTokenizer"
    assert config["auto_map"] == {"AutoTokenizer": ["THUDM/visualglm-6b--tokenization_chatglm.ChatGLMTokenizer", None]}
    names = ("bos_token", "eos_token", "end_token", "gmask_token", "mask_token", "pad_token", "unk_token")
    assert [config[name] for name in names] == ["<sop>", "<eop>", "</s>", "[gMASK]", "[MASK]", "<pad>", "<unk>"]
    assert (config["num_image_tokens"], config["remove_space"], config["do_lower_case"]) == (0, False, False)


@pytest.mark.slow
def test_transformers_reads_the_saved_configuration(tokenizer, tmp_path):
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    tokenizer.save_pretrained(tmp_path)
    assert get_tokenizer_config(tmp_path)["tokenizer_class"] == "ChatGLMTokenizer"


def test_golden_rows_are_equal_after_saving_and_reading_twice(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "once")
    ChatGLMTokenizer.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    again = ChatGLMTokenizer.from_pretrained(tmp_path / "twice")
    rows = EXPECTED["rows"]
    assert [again.encode(row["text"], add_special_tokens=False) for row in rows] == [row["ids"] for row in rows]
    assert [again.decode(row["ids"]) for row in rows] == [tokenizer.decode(row["ids"]) for row in rows]
    assert (tmp_path / "twice/ice_text.model").read_bytes() == VOCAB.read_bytes()


@pytest.mark.parametrize(("change", "told"), [
    ({"num_image_tokens": 20000}, '"num_image_tokens" is 20000; 0 is needed.'),
    ({"tokenizer_class": "LlamaTokenizer"}, '"tokenizer_class" is "LlamaTokenizer"; "ChatGLMTokenizer" is needed.'),
    ({"do_lower_case": True}, '"do_lower_case" is true; false is needed.'),
])  # fmt: skip
def test_configuration_that_gives_other_ids_is_refused(tokenizer, tmp_path, change, told):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as error:
        ChatGLMTokenizer.from_pretrained(tmp_path)
    assert str(error.value) == f"{path}: {told}"


def test_configuration_of_the_first_release_is_read(tokenizer, tmp_path):
    tokenizer.save_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"name_or_path": "THUDM/chatglm-6b", "tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0}'
    )
    assert ChatGLMTokenizer.from_pretrained(tmp_path).vocab_size == tokenizer.vocab_size
