"""The most common sentences in Chinese: one table, applied where text is printed (`model.progress`).

    in_ui_language("--lr -1: a number greater than 0 is needed.")     →   --lr -1：需要大于 0 的数。

Sentences that the table lacks stay English, and so does everything where Chinese isn't asked for. Chinese is asked for by
`--ui_lang zh`; else by the first of the variables in LANGUAGE_VARIABLES that is set.

A pattern holds fields: {name} for any text, {name:d} for a whole number. A field that is itself a sentence of the table
is translated too. Tests hold every pattern against what the commands print or what stands in their code, so that a
sentence that is reworded there must be reworded here.

Only the standard library is imported.
"""

import functools
import os
import re
from collections.abc import Iterable

LANGUAGE_VARIABLES = ("VISUALGLM_UI_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
UI_LANGUAGES = ("auto", "en", "zh")

_ROW_NEEDS = 'every row is an object with the texts "prompt" and "label", and "img" unless it has no picture'
_ROW_NEEDS_ZH = "每条数据是一个对象，要有文本 prompt 和 label；有图片时还要有 img"
_PICTURE_NEEDED = "a picture (JPEG, PNG, WebP, GIF, BMP, TIFF, …) is needed"
_PICTURE_NEEDED_ZH = "需要一张图片（JPEG、PNG、WebP、GIF、BMP、TIFF 等）"

SENTENCES = {
    # flags
    "{flag}: there is no such flag; did you mean {other}?": "{flag}：没有这个参数；您是想写 {other} 吗？",
    "{flag}: there is no such flag; {help} shows every flag.": "{flag}：没有这个参数；{help} 列出所有参数。",
    "{flag} {value}: a whole number is needed.": "{flag} {value}：需要一个整数。",
    "{flag} {value}: a number is needed.": "{flag} {value}：需要一个数。",
    "{flag} {value}: one of {choices} is needed.": "{flag} {value}：只能是 {choices} 之一。",
    "{flag}: no value found; one is needed.": "{flag}：缺少参数值。",
    "{flag}: not given; it is needed.": "{flag}：没有给出；需要这个参数。",
    "{flags}: not given; they are needed.": "{flags}：没有给出；需要这些参数。",
    "{flag} {value}: 1 or more is needed.": "{flag} {value}：需要大于或等于 1 的值。",
    "{flag} {value}: a number greater than 0 is needed.": "{flag} {value}：需要大于 0 的数。",
    "{flag} {value}: a finite number of 0 or more is needed.": "{flag} {value}：需要大于或等于 0 的有限数。",
    "No method: --use_lora, --use_qlora or --use_ptuning is needed.": (
        "没有指定微调方法：需要 --use_lora、--use_qlora 或 --use_ptuning。"
    ),
    "--use_lora and --use_qlora: only one is needed; QLoRA is LoRA over 4-bit weights.": (
        "--use_lora 和 --use_qlora 只能选一个；QLoRA 就是在 4 比特权重上做 LoRA。"
    ),
    "--train-data: no file given; a JSON file with rows to learn is needed.": (
        "--train-data：没有给出文件；需要一个训练数据的 JSON 文件。"
    ),
    "--train-iters and --epochs: both say how long to train; only one is needed.": (
        "--train-iters 和 --epochs 都规定训练多久，只能给一个。"
    ),
    "--holdout and --valid-data: both say what to evaluate on; only one is needed.": (
        "--holdout 和 --valid-data 都规定用什么评估，只能给一个。"
    ),
    "--keep_best: nothing to evaluate on; --holdout or --valid-data is needed.": (
        "--keep_best：没有评估数据；需要 --holdout 或 --valid-data。"
    ),
    "{flag} {name}: no such folder. Tried:": "{flag} {name}：没有这个目录。找过：",
    "no folder {folder} ($SAT_HOME)": "没有目录 {folder}（$SAT_HOME）",
    "no folder {folder}": "没有目录 {folder}",
    "Needed is {flag} FOLDER, OWNER/NAME of the Hugging Face hub, or the checkpoint unpacked to {folder}.": (
        "需要 {flag} 目录，或 Hugging Face 上的名字 OWNER/NAME，或把模型解压到 {folder}。"
    ),
    "Needed is a folder, OWNER/NAME of the Hugging Face hub, or the checkpoint unpacked to {folder}.": (
        "需要一个目录，或 Hugging Face 上的名字 OWNER/NAME，或把模型解压到 {folder}。"
    ),
    "--layer_range {layers}: no layer {outside} in this checkpoint; layers from 0 to {last:d} are needed.": (
        "--layer_range {layers}：这个模型没有第 {outside} 层；层号只能从 0 到 {last}。"
    ),
    "{flag} {value:d}: no room for a single token of text; at least {least:d} is needed.": (
        "{flag} {value}：连一个 token 的文字都放不下；至少需要 {least}。"
    ),
    "--save {folder}: {free} free on its disk; {needed} are needed.": "--save {folder}：磁盘只剩 {free}，需要 {needed}。",
    "--eval-interval {steps:d}: nothing to evaluate on; --holdout 0.1 or --valid-data is needed for it.": (
        "--eval-interval {steps}：没有评估数据；需要 --holdout 0.1 或 --valid-data。"
    ),
    "{flag} {name}: the newest run of that name is taken, {folder}.": "{flag} {name}：使用这个名字下最新的一次训练 {folder}。",
    "WARNING: {name}: iteration {iteration} is left out: {problem}. Iteration {earlier} is used.": (
        "警告：{name}：不使用第 {iteration} 步的检查点：{problem}。改用第 {earlier} 步。"
    ),
    "{flag}: {problem}; another iteration, or a copy of this one that is whole, is needed.": (
        "{flag}：{problem}；需要另一个检查点，或这个检查点的完好副本。"
    ),
    "{flag}: {problem}; no iteration before it is whole, and one that is is needed.": (
        "{flag}：{problem}；更早的检查点也都不完好，需要一个完好的。"
    ),
    "{file} is damaged: its checksum isn't the one in checksums.json": "{file} 已损坏：校验和与 checksums.json 中记录的不同",
    "{path}: Permission denied; a path that can be used is needed.": "{path}：没有权限；需要一个可以使用的路径。",
    # data files
    "{path}: No such file or directory; a JSON file of rows is needed.": "{path}：没有这个文件；需要一个 JSON 数据文件。",
    "{path} line {line:d} column {column:d}: not JSON ({reason}); a JSON list of rows is needed.": (
        "{path} 第 {line} 行第 {column} 列：不是合法的 JSON（{reason}）；需要一个 JSON 列表，每项是一条数据。"
    ),
    "{path}: a table, and no JSON; convert_data.py makes rows of it.": (
        "{path}：这是表格，不是 JSON；请用 convert_data.py 转换。"
    ),
    "{path}: a workbook, and no JSON; convert_data.py makes rows of it once it is saved as CSV.": (
        "{path}：这是 Excel 工作簿，不是 JSON；请先另存为 CSV（UTF-8），再用 convert_data.py 转换。"
    ),
    "{path}: line 1 column 1: not JSON, for the file is empty; at least one row is needed.": "{path}：文件是空的；至少需要一条数据。",
    "{path}: the list is empty; at least one row is needed.": "{path}：列表是空的；至少需要一条数据。",
    f'no "{{key}}" and no "{{other}}"; {_ROW_NEEDS}.': f"缺少 {{key}} 和 {{other}}；{_ROW_NEEDS_ZH}。",
    f'no "{{key}}"; {_ROW_NEEDS}.': f"缺少 {{key}}；{_ROW_NEEDS_ZH}。",
    'no "prompt"; every row is an object with the text "prompt", and "img" unless it has no picture.': (
        "缺少 prompt；每条数据是一个对象，要有文本 prompt；有图片时还要有 img。"
    ),
    '"label" is empty; it is the answer to learn.': "label 是空的；它是模型要学的回答。",
    'no "img", but "{other}"; rename it, or convert the file (convert_data.py).': (
        "没有 img，却有 {other}；请改名，或用 convert_data.py 转换文件。"
    ),
    "there is no file {name}; a relative path is looked up from the working directory, the JSON file's folder and the one"
    " above it, or from --image_folder.": (
        "没有文件 {name}；相对路径从当前目录、JSON 文件所在的目录及其上一级目录找，给了 --image_folder 则从那里找。"
    ),
    "--image_folder {folder}: no such folder; the one that the pictures are in is needed.": (
        "--image_folder {folder}：没有这个目录；需要图片所在的目录。"
    ),
    "{name} is an address; a file is needed: download it, and name its path.": (
        "{name} 是网址；这里需要文件：请先下载，再写文件的路径。"
    ),
    "{name} is two different files, {one} and {other}; --image_folder FOLDER with the right one's folder is needed.": (
        "{name} 对应两个不同的文件：{one} 和 {other}；请用 --image_folder 指定图片所在的目录。"
    ),
    f"{{name}} isn't a picture; {_PICTURE_NEEDED}.": f"{{name}} 不是图片；{_PICTURE_NEEDED_ZH}。",
    f"{{name}} isn't a picture; {_PICTURE_NEEDED}: it is HEIC, as iPhones save pictures; the same one as JPEG will do.": (
        f"{{name}} 不是图片；{_PICTURE_NEEDED_ZH}：这是 HEIC（iPhone 的照片格式），请转存为 JPEG。"
    ),
    f"{{name}} isn't a picture; {_PICTURE_NEEDED}: it is an SVG drawing; the same one as PNG will do.": (
        f"{{name}} 不是图片；{_PICTURE_NEEDED_ZH}：这是 SVG 矢量图，请导出为 PNG。"
    ),
    f"{{name}} isn't a picture; {_PICTURE_NEEDED}: it is a pointer of git-lfs; git lfs pull fetches the picture.": (
        f"{{name}} 不是图片；{_PICTURE_NEEDED_ZH}：这是 git-lfs 的指针文件，请运行 git lfs pull 下载图片。"
    ),
    f"{{name}} isn't a picture; {_PICTURE_NEEDED}: it is a web page, where a download's link has led to a page or a login.": (
        f"{{name}} 不是图片；{_PICTURE_NEEDED_ZH}：这是网页，下载链接打开的是网页或登录页。"
    ),
    f"{{name}} is damaged or cut short; {_PICTURE_NEEDED}.": f"{{name}} 已损坏或不完整；{_PICTURE_NEEDED_ZH}。",
    "Left out, {count:d} bad rows (--bad_rows skip):": "跳过 {count} 条有问题的数据（--bad_rows skip）：",
    "… and {count:d} more; all are in {file}.": "…… 还有 {count} 条；全部列在 {file}。",
    "{count:d} in all; all are in {file}.": "共 {count} 条；全部列在 {file}。",
    # before a run
    "NOTHING IS SAVED (--save none): what is learned is gone when this run ends.": (
        "不保存任何检查点（--save none）：训练结束后，学到的内容就没有了。"
    ),
    "{file}: {rows:d} rows": "{file}：{rows} 条数据",
    "{file}: {rows:d} rows; cut to fit: {prompts:d} prompts (--max_source_length), {labels:d} labels (--max_target_length)": (
        "{file}：{rows} 条数据；因超长被截断：{prompts} 个问题（--max_source_length）、{labels} 个回答（--max_target_length）"
    ),
    "{file}: {rows:d} rows, {samples:d} samples (one for every turn)": "{file}：{rows} 条数据，{samples} 个样本（每轮对话一个）",
    "{file}: {rows:d} rows, {samples:d} samples (one for every turn); cut to fit: {prompts:d} prompts, oldest turns of"
    " {histories:d} samples (--max_source_length), {labels:d} labels (--max_target_length)": (
        "{file}：{rows} 条数据，{samples} 个样本（每轮对话一个）；因超长被截断：{prompts} 个问题、{histories} 个样本中最早的对话轮次"
        "（--max_source_length）、{labels} 个回答（--max_target_length）"
    ),
    "WARNING: {file}: {share:d} % of the characters have no token, as in “{text}”; each becomes 2 to 4 tokens of one byte, from"
    " which this model learns little.": (
        "警告：{file}：{share} % 的字符没有对应的 token，例如“{text}”；每个这样的字符会变成 2 到 4 个单字节 token，模型很难从中学到东西。"
    ),
    "Held out of --train-data for evaluation: {rows:d} rows (--holdout, --seed {seed:d}).": (
        "从 --train-data 中留出 {rows} 条用于评估，不参与训练（--holdout、--seed {seed}）。"
    ),
    "WARNING: {file} is given for training and for evaluation: the evaluation will only say how well its rows are"
    " remembered. --holdout 0.1 takes other rows out of --train-data.": (
        "警告：{file} 既用于训练又用于评估，评估结果只说明模型记住了多少。"
        "--holdout 0.1 会从 --train-data 中另外留出数据。"
    ),
    "WARNING: {file} is given for training and for evaluation (for training as {other}): the evaluation will only say how"
    " well its rows are remembered. --holdout 0.1 takes other rows out of --train-data.": (
        "警告：{file} 既用于训练（文件名为 {other}）又用于评估，评估结果只说明模型记住了多少。"
        "--holdout 0.1 会从 --train-data 中另外留出数据。"
    ),
    "WARNING: {found:d} of {rows:d} rows of {file} are also trained on: of these, the evaluation will only say how well"
    " they are remembered. --holdout 0.1 takes other rows out of --train-data.": (
        "警告：{file} 的 {rows} 条数据中有 {found} 条也用于训练，对这些数据，评估结果只说明模型记住了多少。"
        "--holdout 0.1 会从 --train-data 中另外留出数据。"
    ),
    "Training on {samples:d} samples: {steps:d} steps of {at_once:d} see {seen:d} samples, {epochs} epochs.": (
        "训练样本 {samples} 个：共 {steps} 步，每步 {at_once} 个，总计 {seen} 个样本，{epochs} 轮（epoch）。"
    ),
    "Training on {samples:d} samples: {steps:d} steps of {at_once:d} see {seen:d} samples, {epochs} epochs, drawn by chance"
    " (--seed); --epochs goes through all of them instead.": (
        "训练样本 {samples} 个：共 {steps} 步，每步 {at_once} 个，总计 {seen} 个样本，{epochs} 轮（epoch），"
        "随机抽取（--seed）；用 --epochs 则逐轮遍历全部样本。"
    ),
    "Training on {samples:d} samples: {steps:d} steps, of {at_once:d} from here on, see {seen:d} samples, {epochs} epochs.": (
        "训练样本 {samples} 个：共 {steps} 步，从这里起每步 {at_once} 个，总计 {seen} 个样本，{epochs} 轮（epoch）。"
    ),
    "Training on {samples:d} samples: {steps:d} steps, of {at_once:d} from here on, see {seen:d} samples, {epochs} epochs,"
    " drawn by chance (--seed); --epochs goes through all of them instead.": (
        "训练样本 {samples} 个：共 {steps} 步，从这里起每步 {at_once} 个，总计 {seen} 个样本，{epochs} 轮（epoch），"
        "随机抽取（--seed）；用 --epochs 则逐轮遍历全部样本。"
    ),
    "Looking for a learning rate: {steps:d} steps with a rising one; --lr and the number of steps don't count.": (
        "寻找学习率：用逐渐升高的学习率训练 {steps} 步；--lr 和训练步数不起作用。"
    ),
    "The first {steps:d} steps use at most 5 % of --lr ({rate}), as SAT does in finetune mode; --auto_warmup_steps changes"
    " that.": (
        "前 {steps} 步的学习率最多为 --lr 的 5%（{rate}），这是 SAT 在 finetune 模式下的做法；"
        "可用 --auto_warmup_steps 更改。"
    ),
    "From step {first:d} on the learning rate is 0, so that {count:d} of {steps:d} steps change nothing (--lr-decay-iters"
    " {iterations:d}).": (
        "从第 {first} 步起学习率为 0，因此 {steps} 步中有 {count} 步什么都学不到（--lr-decay-iters {iterations}）。"
    ),
    "No GPU found: {numbers} and gloo on the CPU in place of {instead}.": (
        "没有找到 GPU：在 CPU 上用 {numbers} 和 gloo 训练，代替 {instead}。"
    ),
    "Trainable, {trained} of {all} parameters in {tensors:d} tensors:": (
        "可训练参数 {trained} 个（共 {all} 个），分布在 {tensors} 个张量中："
    ),
    "{name}: {count:d} tensors {shape}, layers {first:d} to {last:d}": "{name}：{count} 个张量 {shape}，第 {first} 到 {last} 层",
    "{name}: {count:d} tensors {shape}, layers {layers}": "{name}：{count} 个张量 {shape}，第 {layers} 层",
    "Answering {rows}, and again at the end (--answers 0: none).": (
        "训练前先回答 {rows}，训练结束时再回答一遍（--answers 0：不回答）。"
    ),
    "{turns:d} turns of {rows:d} held-out rows": "{rows} 条留出的数据中的 {turns} 轮对话",
    "{turns:d} turns of {rows:d} training rows": "{rows} 条训练数据中的 {turns} 轮对话",
    "{count:d} held-out rows": "{count} 条留出的数据",
    "{count:d} training rows": "{count} 条训练数据",
    # a run that goes on
    "Going on with {folder} after iteration {iteration:d}.": "从 {folder} 的第 {iteration} 步之后继续训练。",
    "{flag} from here on; the run had {before}, and with it would go on otherwise.": (
        "从这里起用 {flag}；原来是 {before}，之后的结果会与不改时不同。"
    ),
    "{flag} from here on; the run had {before}, and with it would go on otherwise: the learning rate falls over all steps,"
    " unless --lr-decay-iters says over how many.": (
        "从这里起用 {flag}；原来是 {before}，之后的结果会与不改时不同：学习率按全部步数下降，除非用 --lr-decay-iters 指定步数。"
    ),
    "the adapters are the checkpoint's": "适配器取自检查点",
    "the place in the data would be among other rows": "数据中的位置会对应到别的数据",
    "a run goes on in its folder": "训练要在原来的目录里继续",
    "the checkpoint has its weights in the other form": "检查点的权重是另一种形式",
    "{flag}: the run has {before}, and {reason}; the same is needed, or a new run.": (
        "{flag}：这次训练用的是 {before}，不能更改（{reason}）；请用相同的值，或重新开始训练。"
    ),
    "{flag}: the run has {before}, whose rows it evaluates on; --resume is needed without --valid-data, or a new run.": (
        "{flag}：这次训练用的是 {before}，用留出的数据评估；请在 --resume 时去掉 --valid-data，或重新开始训练。"
    ),
    "--resume auto: no checkpoint of {name} under {folder} can be resumed; a fresh run starts.": (
        "--resume auto：{folder} 下没有 {name} 可以继续的检查点；从头开始训练。"
    ),
    "{folder}: iteration {done:d} of {steps:d} is done, so nothing is left to train. A higher {flag} goes on.": (
        "{folder}：{steps} 步中的第 {done} 步已经完成，没有可训练的了。把 {flag} 调大就能继续。"
    ),
    "{folder}: the run ended at iteration {done:d} of {steps:d} (--early_stopping {patience:d}), so nothing is left to train."
    " A higher --early_stopping goes on.": (
        "{folder}：训练已在第 {done} 步（共 {steps} 步）提前结束（--early_stopping {patience}），没有可训练的了。"
        "把 --early_stopping 调大就能继续。"
    ),
    "--load {folder}: its weights, with a fresh optimizer; --resume would go on exactly.": (
        "--load {folder}：只取权重，优化器从头开始；--resume 才会完全接着训练。"
    ),
    "--mode {mode}: iteration, learning rate and data start from the beginning.": "--mode {mode}：步数、学习率和数据都从头开始。",
    # while it runs, and at its end
    "step {step}/{last:d}  loss {loss}  lr {rate}  {speed} samples/s  {left} left": (
        "步 {step}/{last}  损失 {loss}  学习率 {rate}  {speed} 样本/秒  剩余 {left}"
    ),
    "iteration {step:d}: validation loss {loss}, perplexity {perplexity}": "第 {step} 步：评估损失 {loss}，困惑度 {perplexity}",
    "the end of training for test data: test loss {loss}, perplexity {perplexity}": (
        "训练结束后，测试数据：损失 {loss}，困惑度 {perplexity}"
    ),
    "iteration {step:d}: {rows:d} rows answered, exact match {exact}, ROUGE-L {rouge}, BLEU {bleu}": (
        "第 {step} 步：回答 {rows} 条，完全一致 {exact}，ROUGE-L {rouge}，BLEU {bleu}"
    ),
    "The last {count:d} evaluations were no better: the run ends (--early_stopping {patience:d}).": (
        "最近 {count} 次评估都没有变好：训练提前结束（--early_stopping {patience}）。"
    ),
    "The last evaluation was no better: the run ends (--early_stopping {patience:d}).": (
        "最近一次评估没有变好：训练提前结束（--early_stopping {patience}）。"
    ),
    "Nobody reads the output any more: the run goes on without. Ctrl-C ends it after the step in hand, and saves it.": (
        "输出已经没有程序在读；训练照常继续。按 Ctrl-C 会在当前这步之后停止并保存。"
    ),
    "The disk that the output goes to is full: the run goes on, and its output is lost from here on.": (
        "输出所在的磁盘已满：训练照常继续，此后的输出不再保存。"
    ),
    "{signal}: this step is finished, then the run stops. A second signal leaves at once.": (
        "{signal}：做完当前这一步就停止。再来一个信号会立即退出。"
    ),
    "{signal}: stopped before the first step; nothing new was saved.": "{signal}：在第一步之前停止，没有保存任何新内容。",
    "{signal}: stopped after step {step:d} of {last:d}. To go on: --resume {folder}": (
        "{signal}：在第 {step} 步（共 {last} 步）后停止。继续训练请用 --resume {folder}"
    ),
    "{signal}: stopped after step {step:d} of {last:d}. Nothing was saved (--save none).": (
        "{signal}：在第 {step} 步（共 {last} 步）后停止。没有保存任何内容（--save none）。"
    ),
    "Step {step:d} skipped: {reason}. Its longest rows: {rows}.": "跳过第 {step} 步：{reason}。其中最长的数据：{rows}。",
    "the loss is {loss}": "损失为 {loss}",
    "the gradient isn't finite, at a loss of {loss}": "梯度不是有限值，损失为 {loss}",
    "Step {step:d} skipped: fp16's gradients overflowed; the loss scale is {scale} now.": (
        "跳过第 {step} 步：fp16 的梯度溢出；损失缩放（loss scale）现为 {scale}。"
    ),
    "stopped after step {step:d}: the last {steps} skipped, because the {what} is not finite. Needed is a lower --lr than"
    " {lr}, a longer --warmup, or a smaller gradient_clipping in a --deepspeed_config. The last good checkpoint: {checkpoint}.": (
        "在第 {step} 步后停止：最近 {steps}都被跳过，因为 {what} 不是有限值。需要比 {lr} 更小的 --lr、更长的 --warmup，"
        "或在 --deepspeed_config 中把 gradient_clipping 调小。最后一个好的检查点：{checkpoint}。"
    ),
    "{count:d} steps were": "{count} 步",
    "step was": "一步",
    "out of memory {when} ({problem}). The longest rows of the batch: {rows}. Needed is a smaller --batch-size than {batch:d}"
    " with more --gradient-accumulation-steps than {steps:d}, --checkpoint-activations, or a smaller --max_source_length or"
    " --max_target_length.": (
        "内存（显存）不足（{when}：{problem}）。这一批中最长的数据：{rows}。需要把 --batch-size 调到小于 {batch}，"
        "同时把 --gradient-accumulation-steps 调到大于 {steps}；或用 --checkpoint-activations；"
        "或把 --max_source_length、--max_target_length 调小。"
    ),
    # what was learned
    "The loss fell from {before} to {after} (the mean of the first {steps:d} steps and of the last).": (
        "损失从 {before} 降到 {after}（最初 {steps} 步和最后 {steps} 步的平均值）。"
    ),
    "The loss rose from {before} to {after} (the mean of the first {steps:d} steps and of the last). The run has diverged: it"
    " ends worse than it began.": (
        "损失从 {before} 升到 {after}（最初 {steps} 步和最后 {steps} 步的平均值）。训练已经发散：训练后比训练前更差。"
    ),
    "The loss rose from {before} to {after} (the first step and the mean of the last {steps:d}). The run has diverged: it ends"
    " worse than it began.": (
        "损失从 {before} 升到 {after}（第一步，和最后 {steps} 步的平均值）。训练已经发散：训练后比训练前更差。"
    ),
    "The loss rose from {before} to {after} (the mean of the first {steps:d} steps and of the last), but of the rows that were"
    " answered it was {earlier} and is {later}: the last steps had harder rows.": (
        "损失从 {before} 升到 {after}（最初 {steps} 步和最后 {steps} 步的平均值），但回答过的数据的损失先是 {earlier}，现在是 {later}："
        "最后几步的数据更难。"
    ),
    "The loss has hardly moved: {before}, then {after} (the mean of the first {steps:d} steps and of the last), no fall beyond"
    " its noise of {noise}. Little or nothing was learned.": (
        "损失几乎没有变化：先是 {before}，后来是 {after}（最初 {steps} 步和最后 {steps} 步的平均值），没有超出波动 {noise} 的下降。"
        "几乎什么也没有学到。"
    ),
    "Of {rows}, answers right: before {before}, after {after}; ROUGE-L {earlier}, then {later}; no answer has changed.": (
        "{rows}：训练前答对 {before}，训练后答对 {after}；ROUGE-L 从 {earlier} 到 {later}；没有一个回答改变。"
    ),
    "Of {rows}, answers right: before {before}, after {after}; ROUGE-L {earlier}, then {later}; {changed:d} changed.": (
        "{rows}：训练前答对 {before}，训练后答对 {after}；ROUGE-L 从 {earlier} 到 {later}；{changed} 个回答改变了。"
    ),
    "Of {rows}, answers right: {right}; ROUGE-L {rouge}.": "{rows}，答对 {right}；ROUGE-L {rouge}。",
    "Likely: --lr {lr} is too high; try {lower}, or --find_lr, which proposes a rate. With --holdout, --keep_best keeps the best"
    " checkpoint.": (
        "可能的原因：--lr {lr} 太大；请试 {lower}，或用 --find_lr 得到建议的学习率。有 --holdout 时，--keep_best 会保留最好的检查点。"
    ),
    "Likely: --lr {lr} is too high; try {lower}, or --find_lr, which proposes a rate.": (
        "可能的原因：--lr {lr} 太大；请试 {lower}，或用 --find_lr 得到建议的学习率。"
    ),
    "Likely: {reason}.": "可能的原因：{reason}。",
    "Also: {reason}.": "另外：{reason}。",
    "{slow:d} of {steps:d} steps had 5 % of --lr at most ({rate}), SAT's rule; try --auto_warmup_steps 0": (
        "{steps} 步中有 {slow} 步的学习率最多为 --lr 的 5%（{rate}），这是 SAT 的做法；请试 --auto_warmup_steps 0"
    ),
    "--lr {lr} is low for adapters; --find_lr proposes a rate": "--lr {lr} 对适配器来说偏小；--find_lr 会给出建议的学习率",
    "LoRA is scaled by alpha/rank = {scale}; try --lora_alpha {rank:d}, a scale of 1": (
        "LoRA 的缩放系数 alpha/rank = {scale} 偏小；请试 --lora_alpha {rank}，即系数为 1"
    ),
    "LoRA is in {layers} only (--layer_range); without that flag it is in all": (
        "只有 {layers}有 LoRA（--layer_range）；不给这个参数则每一层都有"
    ),
    "{count:d} layers": "{count} 层",
    "{cut:d} of {rows:d} answers are cut off, so their ends are never learned; try --max_target_length auto": (
        "{rows} 个回答中有 {cut} 个被截断，结尾学不到；请试 --max_target_length auto"
    ),
    "{cut:d} of {rows:d} answers are cut off, so their ends are never learned; this checkpoint takes {positions:d} tokens with"
    " the question, so try a smaller --max_source_length": (
        "{rows} 个回答中有 {cut} 个被截断，结尾学不到；这个检查点连同问题最多 {positions} 个 token，请试更小的 --max_source_length"
    ),
    "more steps may be needed, or another rate: --find_lr proposes one": (
        "可能需要更多步数，或换一个学习率：--find_lr 会给出建议"
    ),
    "The evaluation loss was lowest at step {step:d} ({best}) and rose to {last} while the training loss fell: rows are learned by"
    " heart. Try {flags}, fewer epochs, or more rows.": (
        "评估损失在第 {step} 步最低（{best}），之后升到 {last}，而训练损失还在下降：模型在死记数据。"
        "请试 {flags}、更少的轮数，或更多的数据。"
    ),
    "The evaluation loss was lowest at step {step:d} ({best}) and rose to {last} while the training loss fell: rows are learned by"
    " heart. Try fewer epochs, or more rows.": (
        "评估损失在第 {step} 步最低（{best}），之后升到 {last}，而训练损失还在下降：模型在死记数据。"
        "请试更少的轮数，或更多的数据。"
    ),
    "Report: {file}": "报告：{file}",
    # --find_lr
    "--find_lr: the loss fell at no rate, so none is proposed; the picture shows the losses.": (
        "--find_lr：在任何学习率下损失都没有下降，因此没有建议；损失曲线见图。"
    ),
    "--find_lr proposes --lr {rate}. Nothing was saved; the rows have been seen by these steps only.": (
        "--find_lr 建议 --lr {rate}。没有保存任何检查点。"
    ),
    "The losses over the rates: {file}": "各学习率下的损失：{file}",
    # --dry_run
    "Parameters: {all}, of which {trained} are trained.": "参数：{all} 个，其中训练 {trained} 个。",
    "Parameters: {all}, of which {trained} are trained; {packed} are kept in 4 bits.": (
        "参数：{all} 个，其中训练 {trained} 个；{packed} 个以 4 比特保存。"
    ),
    "Largest batch: {rows:d} rows of {tokens:d} tokens, {learned:d} of them learned; {pictures}. Batches a step: {batches:d}, "
    "processes that share the rows: {processes:d}.": (
        "最大的批：{rows} 条数据，每条 {tokens} 个 token，其中要学的共 {learned} 个；{pictures}。每步 {batches} 批，"
        "{processes} 个进程分担数据。"
    ),
    "Largest batch: {rows:d} rows in {packs:d} packs of {tokens:d} tokens, {learned:d} of them learned; {pictures}. "
    "Batches a step: {batches:d}, processes that share the rows: {processes:d}.": (
        "最大的批：{rows} 条数据拼成 {packs} 条序列，每条 {tokens} 个 token，其中要学的共 {learned} 个；{pictures}。"
        "每步 {batches} 批，{processes} 个进程分担数据。"
    ),
    "features of the pictures": "图片用已算好的特征",
    "{count:d} pictures": "图片 {count} 张",
    "Memory of each GPU in {dtype}, GiB:": "每个 GPU 的显存（{dtype}），GiB：",
    "Memory of each process in {dtype}, GiB:": "每个进程的内存（{dtype}），GiB：",
    "weights": "权重",
    "weights for gradients": "求梯度用的权重",
    "packing the head": "重排输出层",
    "adapters": "适配器",
    "gradients": "梯度",
    "optimizer": "优化器",
    "activations": "激活值",
    "holes in the heap": "堆内碎片",
    "features": "图片特征",
    "CUDA itself": "CUDA 本身",
    "Python and its libraries": "Python 及其库",
    "all while training": "训练时合计",
    "all while loading": "加载时合计",
    "--use_qlora in place of --use_lora": "用 --use_qlora 代替 --use_lora",
    "no slower where there is a GPU; numbers of half the width": "有 GPU 时不会变慢；数值宽度减半",
    "no slower; each picture is looked at once, before the first step": "不会变慢；每张图片在第一步之前只看一次",
    "a third longer; a run does so by itself": "时间多三分之一；训练时会自动采用",
    "more exchanges between the processes": "进程之间的通信更多",
    "the same step in more parts, up to as many times as long": "同样的一步分成多份，时间最多也增加到几倍",
    "a third longer, and the step in more parts": "每步慢三分之一，并分成更多份计算",
    "up to twice as long; weights are rounded to 4 bits": "时间最多两倍；权重舍入到 4 比特",
    "up to three times as long, the step in more parts; weights are rounded to 4 bits": "每步最多慢两倍，并分成更多份计算；权重舍入到 4 位",
    "{count:d} GPUs for one model": "{count} 个 GPU 放一个模型",
    "A checkpoint takes {size}.": "一个检查点占 {size}。",
    "It fits: {there}.": "放得下：{there}。",
    "It does not fit: {there}. None of the flags alone makes it fit: a larger GPU is needed.": (
        "放不下：{there}。没有哪个参数单独就能放下：需要更大的 GPU。"
    ),
    "It does not fit: {there}. What would make it fit, the cheapest first:": "放不下：{there}。下面的办法可以放下，代价小的在前：",
    "Not counted: NCCL, which took 1.2 GiB of an H100 in a run of one process.": (
        "未计入：NCCL，在 H100 上单进程训练时占用了 1.2 GiB。"
    ),
    "Not counted: NCCL, which took 1.2 GiB of an H100 in a run of one process. --distributed-backend gloo does without it: on one GPU there is nobody to talk to.": (
        "未计入：NCCL，在 H100 上单进程训练时占用了 1.2 GiB。加上 --distributed-backend gloo 就不需要它：只有一个 GPU 时无需通信。"
    ),
    "{usable} of {memory} GiB can be used ({device})": "{memory} GiB 中有 {usable} GiB 可用（{device}）",
    "the CPU, as no GPU was found": "CPU，没有找到 GPU",
    "{count:d} GPUs found, {name}": "找到 {count} 个 GPU，{name}",
    "{rate} GFLOP/s; 4 bits are unpacked in it": "{rate} GFLOP/s；其中包括 4 比特的解包",
    "Time per step: can't be measured for a GPU that isn't here; a run prints it from its first steps on.": (
        "每步时间：所说的 GPU 不在这台机器上，无法测量；训练开始后就会显示。"
    ),
    "Time per step: about {seconds} s for the largest batch, by this processor's rate in such products just now, "
    "{rate}. What is no product comes on top.": (
        "每步时间：最大的批约 {seconds} 秒，按本处理器此刻计算这类矩阵乘法的速度（{rate}）估算；矩阵乘法以外的运算另计。"
    ),
    "Starting a step's kernels takes a core about {seconds} s: on a GPU a short batch takes that long at least.": (
        "启动一步的 GPU 内核约需一个 CPU 核 {seconds} 秒：再短的批也至少要这么久。"
    ),
    "Before the first step each picture is looked at, for about {seconds} s.": "第一步之前先处理每张图片，约需 {seconds} 秒。",
    "Opening pictures: {done:d} of {total:d}, {left} left": "正在打开图片：{done}/{total}，剩余 {left}",
    "Checking pictures: {done:d} of {total:d}, {left} left": "正在检查图片：{done}/{total}，剩余 {left}",
    "Best evaluation so far, kept in {folder}.": "目前最好的评估结果，已保存在 {folder}。",
    "Saved {folder} (iteration {iteration:d}).": "已保存 {folder}（第 {iteration} 步）。",
    "Merged into {folder}.": "已合并到 {folder}。",
    "Rounded to {dtype}, the LoRA's change is off by {percent} % of its size. It isn't in the checkpoint before the merge;"
    " nor with --dtype fp32, in twice the room, if the result is loaded in fp32 too.": (
        "LoRA 的改动在舍入为 {dtype} 后偏离了其大小的 {percent}%。合并前的检查点没有这个误差；用 --dtype fp32（占两倍空间）"
        "合并并同样以 fp32 加载，也没有。"
    ),
    # predict.py
    "Not answered, {count:d} bad rows:": "{count} 条有问题的数据没有回答：",
    "Answering, tokens at most: {done:d} of {total:d}, {left} left": "正在回答，词元最多：{done}/{total}，最多还需 {left}",
    "Answering: {done:d} of {total:d}, {left} left": "正在回答：{done}/{total}，剩余 {left}",
    "{file}: {done:d} of {rows:d} rows are done already.": "{file}：{rows} 条中已有 {done} 条处理完毕。",
    "--out {file}: begun with something else than now ({changes}); the same is needed to go on, or --overwrite to begin anew.": (
        "--out {file}：开始时的设置与现在不同（{changes}）；要接着做请用相同的设置，或用 --overwrite 重新开始。"
    ),
    "--out {file}: there is such a file, and not of predict.py; another name or --overwrite is needed.": (
        "--out {file}：已有这个文件，而且不是 predict.py 写的；请换一个名字，或用 --overwrite。"
    ),
    "{flag} {path}: no folder {folder}; one that is there is needed.": "{flag} {path}：没有目录 {folder}；需要一个已有的目录。",
    "--out {file}: {reason}; a file that can be written is needed.": "--out {file}：{reason}；需要一个可以写入的文件。",
    "WORLD_SIZE={count:d}: {program} runs in one process; a start without a launcher is needed. predict.py, evaluate.py and"
    " cli_demo.py take several.": (
        "WORLD_SIZE={count}：{program} 只在一个进程中运行；请不用启动器启动。predict.py、evaluate.py 和 cli_demo.py 可以用多个进程。"
    ),
    "{file}: {answers:d} of {rows:d} rows answered.": "{file}：共 {rows} 条，已回答 {answers} 条。",
    # cli_demo.py
    "there is no file {name}; the path or the address of a picture is needed.": "没有文件 {name}；需要一张图片的路径或网址。",
    f"{{name}} is a folder; {_PICTURE_NEEDED}.": f"{{name}} 是目录；{_PICTURE_NEEDED_ZH}。",
    "{url}: the server answered {status}; needed is a picture.": "{url}：服务器返回 {status}；需要一张图片。",
    "{url}: can't be fetched ({reason}); the address of a picture is needed.": (
        "{url}：无法下载（{reason}）；需要一张图片的网址。"
    ),
    "the question and its history take {tokens:d} tokens, and this model {length:d} with the answer; less text is needed.": (
        "问题和对话历史共 {tokens} 个 token，而这个模型连同回答最多 {length} 个；请缩短文字。"
    ),
    "The answer was cut off (--max_length {length:d}).": "回答被截断（--max_length {length}）。",
    "the question and its history take {tokens:d} tokens; --max_length must be more, not {length:d}.": (
        "问题和对话历史共 {tokens} 个 token；--max_length 须大于它，而不是 {length}。"
    ),
    "the question and its history take {tokens:d} tokens, the answer not counted; fewer than {length:d} are needed.": (
        "问题和对话历史共 {tokens} 个 token（不含回答），须少于 {length} 个；请开始新对话，或缩短问题。"
    ),
    "{url}: leads to this machine or into a private network; a public address is needed.": (
        "{url}：指向本机或内部网络；需要公网上的网址。"
    ),
    "the picture file isn't a picture; a picture (JPEG, PNG, WebP, GIF, BMP or AVIF) is needed.": (
        "该文件不是图片；需要一张图片（JPEG、PNG、WebP、GIF、BMP 或 AVIF）。"
    ),
    "{name} isn't a picture; a picture (JPEG, PNG, WebP, GIF, BMP or AVIF) is needed.": (
        "{name} 不是图片；需要一张图片（JPEG、PNG、WebP、GIF、BMP 或 AVIF）。"
    ),
    "the picture file isn't a picture; a picture (JPEG, PNG, WebP, GIF, BMP or AVIF) is needed: it is HEIC, as iPhones save pictures; the same one as JPEG will do.": (
        "该文件不是可用的图片，而是 HEIC（iPhone 的照片格式）；请转存为 JPEG。"
    ),
    "the picture file isn't a picture; a picture (JPEG, PNG, WebP, GIF, BMP or AVIF) is needed: it is a TIFF; the same one as PNG or JPEG will do.": (
        "该文件不是可用的图片，而是 TIFF；请转存为 PNG 或 JPEG。"
    ),
    "{name} isn't a picture; a picture (JPEG, PNG, WebP, GIF, BMP or AVIF) is needed: it is a web page, where a download's link has led to a page or a login.": (
        "{name} 不是图片，而是网页（可能是登录页）；需要图片本身的网址。"
    ),
    "{name} has more than {number} million pixels; a smaller picture is needed.": (
        "{name} 超过 {number} 百万像素；需要一张更小的图片。"
    ),
    "--max_length {asked:d}: this model takes {positions:d} tokens (max_sequence_length), so less is needed.": (
        "--max_length {asked}：这个模型最多接受 {positions} 个 token（max_sequence_length），请减小。"
    ),
    "{flag} {value}: 0 or more is needed.": "{flag} {value}：需要大于或等于 0 的值。",
    "{flag} {value}: a number above 0, up to 1, is needed.": "{flag} {value}：需要大于 0、不超过 1 的数。",
    "{flag} {value}: the same as --from_pretrained; another checkpoint is needed.": (
        "{flag} {value}：与 --from_pretrained 相同；需要另一个模型。"
    ),
    # api.py
    "{name} answers at http://{host}:{port}/v1": "{name} 正在 http://{host}:{port}/v1 提供服务",
    "--host {host} without --api_key: whoever reaches this machine may ask.": (
        "--host {host} 而没有 --api_key：能访问这台机器的人都可以提问。"
    ),
    "Finishing the answers in hand ({count:d}); a second signal ends at once.": (
        "正在完成手头的回答（{count} 个）；再发一次信号则立即结束。"
    ),
    # web_demo.py
    "The page is at {url}": "网页地址：{url}",
    "--host {host}: whoever reaches this machine can use the page.": "--host {host}：能访问这台机器的人都能使用该网页。",
    "--share: {url} is open to the whole internet, for up to a week or until this command ends. Whoever has this address can"
    " use the page and see the examples; what is said passes Gradio's servers.": (
        "--share：{url} 对整个互联网开放，最长一周，或到本命令结束为止。"
        "任何人有了这个网址，都能使用网页、看到示例；对话内容经过 Gradio 的服务器。"
    ),
    "--share: no public address could be had from Gradio's servers.": "--share：未能从 Gradio 的服务器获得公网地址。",
    "Nobody is asked for a password; --auth NAME:PASSWORD does that.": "没有设置密码；可用 --auth 用户名:密码 设置。",
    "{flag}: no NAME:PASSWORD; a name, a colon and a password are needed, or no {same}.": (
        "{flag}：不是 用户名:密码 的形式；需要用户名、冒号和密码，或不给 {same}。"
    ),
    # the pages of runs and evaluations
    "Did it learn?": "学到了吗？",
    "Figures": "指标",
    "The loss": "损失",
    "The learning rate": "学习率",
    "What was trained on what": "用什么训练了什么",
    "What can be done next": "接下来可以做什么",
    "Held-out rows, the worst answers first": "留出的数据，答得最差的在前",
    "Rows that were trained on, the worst answers first": "训练用的数据，答得最差的在前",
    "Rows, the worst answers first": "各条数据，答得最差的在前",
    "The rows, the worst answers first": "各条数据，答得最差的在前",
    "training loss, first and last steps": "训练损失，最初几步 → 最后几步",
    "evaluation loss, last": "评估损失，最后一次",
    "evaluation loss, lowest": "评估损失，最低",
    "at step {step:d}": "（第 {step} 步）",
    "rows answered": "回答的数据条数",
    "right, before and after": "答对，训练前 → 训练后",
    "exact match": "完全一致",
    "loss per token of their labels": "标签的每 token 损失",
    "loss per token of the labels": "标签的每 token 损失",
    "questions shortened": "被截短的问题",
    "answers cut off": "被截断的回答",
    "answers cut off, at about twice their label's length": "被截断的回答（约为标签长度的两倍处）",
    "time": "用时",
    "started": "开始时间",
    "base": "基座模型",
    "method": "方法",
    "steps": "步数",
    "{done:d} of {steps:d}, {samples:d} samples each": "共 {steps} 步，已完成 {done} 步，每步 {samples} 个样本",
    "epochs": "轮数（epoch）",
    "machine": "机器",
    "rows": "数据条数",
    "right": "答对",
    "{rows:d} rows": "{rows} 条数据",
    "{rows:d} trained on": "{rows} 条用于训练",
    "{rows:d} held out": "{rows} 条留出",
    "{rows:d} left out as bad": "{rows} 条有问题，未使用",
    "{rows:d} answers cut": "{rows} 个回答被截断",
    "held out": "留出的数据",
    "trained on": "训练用的数据",
    "{method} of rank {rank:d}, alpha {alpha}, in all layers": "{method}，秩（rank）{rank}，alpha {alpha}，所有层",
    "{method} of rank {rank:d}, alpha {alpha}, in layers {layers}": "{method}，秩（rank）{rank}，alpha {alpha}，第 {layers} 层",
    "P-Tuning of {length:d} positions": "P-Tuning，{length} 个位置",
    "{parts} trained too": "还训练 {parts}",
    "training, mean over {steps:d} steps": "训练，{steps} 步的平均值",
    "evaluation": "评估",
    "loss per token over the steps": "各步的每 token 损失",
    "learning rate over the steps": "各步的学习率",
    "question": "问题",
    "label": "标签",
    "answer": "回答",
    "before": "训练前",
    "after": "训练后",
    "(nothing)": "（空）",
    "picture": "图片",
    ", which can't be opened now": "（现在打不开）",
    "talk to it": "与它对话",
    "answer and measure every held-out row": "回答所有留出的数据并算出指标",
    "answer and measure every row": "回答所有数据并算出指标",
    "fold LoRA into an ordinary checkpoint": "把 LoRA 合并成普通的检查点",
    "train on, to twice as many steps": "继续训练到两倍的步数",
    # evaluate.py and check_data.py
    "asked": "问题",
    "1 answer was cut off (--max_length {length:d}).": "1 个回答被截断（--max_length {length}）。",
    "{count:d} answers were cut off (--max_length {length:d}).": "{count} 个回答被截断（--max_length {length}）。",
    "Shortened as in training, to --max_source_length {length:d}: {count:d} of {rows:d} questions; predict.py, cli_demo.py and"
    " the servers ask them whole.": (
        "{rows} 个问题中有 {count} 个像训练时那样截短到 --max_source_length {length}；predict.py、cli_demo.py、网页和 API 会原样提问。"
    ),
    "Shortened to --max_length {length:d}: {count:d} of {rows:d} questions; predict.py, cli_demo.py and the servers refuse what"
    " doesn't fit.": (
        "{rows} 个问题中有 {count} 个截短到 --max_length {length}；predict.py、cli_demo.py、网页和 API 会拒绝放不下的问题。"
    ),
    "right {right:d}/{rows:d}, {measures}": "答对 {right}/{rows}，{measures}",
    "right in the first only: {first:d}, in the second only: {second:d}": "只有第一个答对：{first}；只有第二个答对：{second}",
    "exact match {exact}, ROUGE-L {rouge}, BLEU {bleu}, loss per token {loss}": (
        "完全一致 {exact}，ROUGE-L {rouge}，BLEU {bleu}，每 token 损失 {loss}"
    ),
    "answers right: {right:d}/{rows:d}": "答对：{right}/{rows}",
    "{file}: {rows:d} rows, {bad:d} bad": "{file}：{rows} 条数据，{bad} 条有问题",
    "pictures: {count:d}, {bad:d} bad, {same:d} the same as another under another name": (
        "图片：{count} 张，{bad} 张有问题，{same} 张与别的文件内容相同"
    ),
    "smallest / middle / largest: {smallest} / {middle} / {largest} pixels": (
        "最小 / 中位 / 最大：{smallest} / {middle} / {largest} 像素"
    ),
    "repeated rows: {repeated:d}; the same question answered otherwise: {otherwise:d}": (
        "重复的数据：{repeated} 条；同样的问题却有不同回答：{otherwise} 条"
    ),
    "tokens of the question, picture and frame included: {least:d} to {most:d}, middle {middle:d}": (
        "问题的 token 数（含图片和问答格式）：{least} 到 {most}，中位数 {middle}"
    ),
    "tokens of the answer: {least:d} to {most:d}, middle {middle:d}": "回答的 token 数：{least} 到 {most}，中位数 {middle}",
    "up to {bound} {bar} {count:d}": "至多 {bound} {bar} {count}",
    "padding of batches of {size:d}: {share}, and {grouped} with --group_by_length": (
        "每批 {size} 条时的填充（padding）：{share}；用 --group_by_length 时 {grouped}"
    ),
    "--max_source_length {source:d} --max_target_length {target:d} cut {prompts:d} prompts, {labels:d} labels and the oldest"
    " turns of {histories:d} samples": (
        "--max_source_length {source} --max_target_length {target} 会截断 {prompts} 个问题、{labels} 个回答，"
        "以及 {histories} 个样本中最早的对话轮次"
    ),
    "--max_source_length {source:d} --max_target_length {target:d} cut nothing": (
        "--max_source_length {source} --max_target_length {target} 不会截断任何内容"
    ),
    "--max_source_length {source:d} --max_target_length {target:d} cut nothing; this checkpoint takes {positions:d} together": (
        "--max_source_length {source} --max_target_length {target} 不会截断任何内容；而这个检查点总共只能处理 {positions} 个 token"
    ),
    "evaluation: of {rows:d} rows, {same:d} are also trained on, {pictures:d} have a picture and {prompts:d} a prompt that is": (
        "评估：共 {rows} 条，其中 {same} 条也在训练数据中，{pictures} 条的图片、{prompts} 条的问题也在训练数据中"
    ),
    "token lengths: not counted; --from_pretrained CHECKPOINT or --tokenizer PATH is needed for that": (
        "token 数：未统计；需要 --from_pretrained 检查点 或 --tokenizer 路径"
    ),
    "{rows:d} rows: {both:d} rows both trained and evaluated on.": "{rows} 条数据：{both} 条既用于训练又用于评估。",
    "{rows:d} rows: all is well.": "{rows} 条数据：没有问题。",
    "tokens: {share:d} % of the characters have no token, as in “{text}”; each becomes 2 to 4 tokens of one byte, from which this"
    " model learns little.": (
        "token：{share} % 的字符没有对应的 token，例如“{text}”；每个这样的字符会变成 2 到 4 个单字节 token，模型很难从中学到东西。"
    ),
    "{rows:d} rows: texts that are cut.": "{rows} 条数据：有的文本会被截断。",
    "{rows:d} rows: characters without a token.": "{rows} 条数据：有的字符没有对应的 token。",
    "{rows:d} rows: {bad:d} bad rows.": "{rows} 条数据：{bad} 条有问题。",
}

# A line: its indent, the command that ended, the row it is about, and the sentence.
_LINE = re.compile(
    r"(?P<indent>\s*)(?:(?P<command>\w+\.py): error: )?(?:(?P<file>\S.*?) row (?P<row>\d+)(?: and (?P<more>\d+) more rows)?: )?(?P<text>.*)"
)
# Plurals of what may be one.
_PLURAL = re.compile(r"\b((?:row|sample|step|evaluation|answer|epoch|layer|tensor|prompt|label|picture|pack|GPU)s)\b")
_language = "auto"


def choose_ui_language(language: str) -> None:
    """Print in a language from now on: one of UI_LANGUAGES; auto leaves it to the environment."""
    global _language
    _language = language


def speaks_chinese() -> bool:
    """Whether Chinese is asked for."""
    if _language != "auto":
        return _language == "zh"
    return next((value for name in LANGUAGE_VARIABLES if (value := os.environ.get(name))), "").startswith("zh")


def in_ui_language(text: str, stream: object = None) -> str:
    """text with the lines that the table has in Chinese, if that is asked for; else text as it is.

    JSON is for programs and stays as it is. So does what the stream's encoding has no characters for.
    """
    if not speaks_chinese() or text.startswith(("{", "[")):
        return text
    translated = in_chinese(text)
    try:
        translated.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text
    return translated


def listed_in_ui_language(parts: Iterable[str]) -> str:
    """parts one after another, each as `in_ui_language` has it."""
    return ("，" if speaks_chinese() else ", ").join(map(in_ui_language, parts))


def in_chinese(text: str) -> str:
    """text with the lines that the table has in Chinese, whatever language is asked for."""
    return "\n".join(_line_in_chinese(line) for line in text.split("\n"))


def _line_in_chinese(line: str) -> str:
    match = _LINE.fullmatch(line)
    if match is None:
        return line
    sentence = _sentence_in_chinese(match["text"])
    if sentence is None:
        return line
    command = f"{match['command']}：错误：" if match["command"] else ""
    more = f"等 {int(match['more']) + 1} 条" if match["more"] else "条"
    row = f"{match['file']} 第 {match['row']} {more}：" if match["row"] else ""
    return f"{match['indent']}{command}{row}{sentence}"


def _sentence_in_chinese(text: str) -> str | None:
    for pattern, chinese in _patterns():
        match = pattern.fullmatch(text)
        if match:
            return chinese.format(**{name: _field_in_chinese(value) for name, value in match.groupdict().items()})
    return None


def _field_in_chinese(value: str) -> str:
    """A field that is a sentence of the table, in Chinese; a single word is a name or a number, and stays."""
    return (_sentence_in_chinese(value) if " " in value else None) or value


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    return [(pattern_of(english), chinese) for english, chinese in SENTENCES.items()]


def _literally(text: str) -> str:
    return _PLURAL.sub(r"\1?", re.escape(text))


def pattern_of(english: str) -> re.Pattern[str]:
    """What a sentence of the table looks like with its fields filled in."""
    parts = re.split(r"\{(\w+)(:d)?\}", english)  # text, name, ":d" or None, text, …
    regex = _literally(parts[0])
    for name, kind, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        field = r"\d+" if kind else ".+?"
        regex += f"(?P<{name}>{field}){_literally(text)}"
    return re.compile(regex)
