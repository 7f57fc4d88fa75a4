"""A user's own training script, in the manner of 2023: it subclasses the model and calls SAT by itself.

script_of_2023.py CHECKPOINT FLAG …

The first line after this text is the one that today's packages ask for; the rest is as it ran then.
"""

from model.training import sat_loop; sat_loop.stay_adapted()  # noqa: E702, I001  # fmt: skip

import argparse
import json
import sys

import torch
from PIL import Image
from sat import get_args, get_tokenizer, mpu
from sat.training.deepspeed_training import training_main
from torch.utils.data import Dataset

from finetune_visualglm import FineTuneVisualGLMModel
from model.blip2 import BlipImageEvalProcessor


class MyModel(FineTuneVisualGLMModel):
    @classmethod
    def add_model_specific_args(cls, parser):
        parser.add_argument_group("mine").add_argument("--my_flag", type=int, default=7)
        return super().add_model_specific_args(parser)


def get_batch(data_iterator, args, timers):
    timers("data loader").start()
    data = next(data_iterator) if data_iterator is not None else None
    timers("data loader").stop()
    integers = mpu.broadcast_data(["input_ids", "labels"], data, torch.int64)
    pictures = mpu.broadcast_data(["image"], data, torch.float32)
    image = pictures["image"].half() if args.fp16 else pictures["image"]
    return integers["input_ids"], integers["labels"], image, data["pre_image"]


def forward_step(data_iterator, model, args, timers):
    timers("batch generator").start()
    tokens, labels, image, pre_image = get_batch(data_iterator, args, timers)
    timers("batch generator").stop()
    logits = model(input_ids=tokens, image=image, pre_image=pre_image)[0].float()
    loss = torch.nn.functional.cross_entropy(logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten())
    return loss, {"loss": loss}


class Rows(Dataset):
    def __init__(self, path, processor, tokenizer, args):
        self.samples = []
        for row in json.load(open(path, encoding="utf-8")):  # noqa: SIM115
            image = processor(Image.open(row["img"]).convert("RGB"))
            start = tokenizer.encode("<img>", add_special_tokens=False)
            question = tokenizer.encode(f"</img>问：{row['prompt']}\n答：", add_special_tokens=False)
            source = start + [tokenizer.pad_token_id] * args.image_length + question
            answer = tokenizer.encode(row["label"], add_special_tokens=False)
            ids = tokenizer.build_inputs_with_special_tokens(source, answer)
            context = ids.index(tokenizer.bos_token_id)
            padding = args.max_source_length + args.max_target_length - len(ids)
            self.samples.append({
                "input_ids": ids + [tokenizer.pad_token_id] * padding,
                "labels": [-100] * context + ids[context:] + [-100] * padding,
                "image": image,
                "pre_image": len(start),
            })  # fmt: skip

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def create_dataset_function(path, args):
    return Rows(path, BlipImageEvalProcessor(224), get_tokenizer(args), args)


def data_collator(examples):
    return {
        "input_ids": torch.tensor([example["input_ids"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
        "image": torch.stack([example["image"] for example in examples]),
        "pre_image": examples[0]["pre_image"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--max_source_length", type=int)
    parser.add_argument("--max_target_length", type=int)
    parser = MyModel.add_model_specific_args(parser)
    known, others = parser.parse_known_args(sys.argv[2:])
    args = argparse.Namespace(**vars(get_args(others)), **vars(known))
    args.device = "cpu"
    model, args = MyModel.from_pretrained(sys.argv[1], args)
    if torch.cuda.is_available():
        model = model.to("cuda")
        args.device = "cuda"
    training_main(
        args, model_cls=model, forward_step_function=forward_step, create_dataset_function=create_dataset_function,
        collate_fn=data_collator,
    )  # fmt: skip
