"""What the page of scripts/web_demo.py says, in English and in Chinese, and which of the two a visitor reads."""

from model.chinese import in_chinese

ENGLISH, CHINESE = "en", "zh"

# Each key has the English text and the Chinese one.
TEXTS = {
    "picture": ("Picture", "图片"),
    "picture_hint": ("Drop a picture here, paste one, or click", "将图片拖到此处、粘贴，或点击上传"),
    "url": ("or its address on the web", "或图片的网址"),
    "fetch": ("Fetch", "获取"),
    "question": ("Question", "问题"),
    "question_hint": (
        "Ask about the picture. Enter sends, Shift+Enter begins a line.",
        "就图片提问。回车发送，Shift+回车换行。",
    ),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "undo": ("Undo", "撤销"),
    "clear": ("New chat", "新对话"),
    "settings": ("Settings", "设置"),
    "language": ("Ask the model in", "提问语言"),
    "language_info": (
        "The words around the question. English also forbids Chinese answers.",
        "问题的格式。选英文时，模型不会用中文回答。",
    ),
    "temperature": ("Temperature", "温度（temperature）"),
    "temperature_info": ("0 always takes the likeliest token", "0：总是取概率最大的 token"),
    "top_p": ("top_p", "top_p"),
    "top_k": ("top_k", "top_k"),
    "max_tokens": ("Longest answer, in tokens", "回答的最大长度（token）"),
    "seed": ("Seed (empty: by chance)", "随机种子（留空则随机）"),
    "examples": (
        "Examples, held out of training: picture, question, right answer",
        "示例（未参与训练的数据）：图片、问题、标准答案",
    ),
    "empty": ("Choose a picture, and ask.", "选一张图片，然后提问。"),
    "first_question": ("Describe the image.", "描述这张图片。"),
    # notes
    "no_question": ("Type a question first.", "请先输入问题。"),
    "no_turn": ("Nothing has been asked yet.", "还没有提过问题。"),
    "new_picture": ("The conversation is about this picture now.", "现在开始谈这张图片。"),
    "no_picture": ("No picture: the model hears only the words.", "没有图片：模型只看到文字。"),
    "fetching": ("Fetching the picture …", "正在获取图片……"),
    "waiting": ("Waiting for a free place; {number} ask before you.", "正在排队，前面还有 {number} 个问题。"),
    "busy": ("Too many are asking now. Try again in a moment.", "现在提问的人太多，请稍后再试。"),
    "failed": ("The model couldn't go on with this answer. Try again.", "模型没能完成这个回答，请重试。"),
    "cut": ("The answer was cut off at its greatest length, or at its time.", "回答达到长度或时间上限，已截断。"),
    "stopped": ("Stopped.", "已停止。"),
    "expected": ("Right answer: {label}", "标准答案：{label}"),
    "no_address": ("Type the address of a picture first.", "请先输入图片的网址。"),
    "not_uploaded": ("Only a picture that was uploaded here is taken.", "只接受在这里上传的图片。"),
}

# What Gradio says in English only: a regular expression, and what stands in place of what it finds.
GRADIO_WORDS = {
    "^(Upload file|File upload)$": "上传文件",
    "^Paste from clipboard$": "从剪贴板粘贴",
    "^Close$": "关闭",
    "^Fullscreen$": "全屏",
    "^Exit fullscreen( mode)?$": "退出全屏",
    "^Remove Image$": "移除图片",
    "^Copy conversation$": "复制对话",
    "^Copied conversation$": "已复制对话",
    "^Reset to default value$": "恢复默认值",
    "^number input for ": "数值：",
    "^range slider for ": "滑块：",
    "^chatbot conversation$": "对话",
    "^user's message: ": "用户：",
    "^bot's message: ": "模型：",
    "^Error *$": "出错了",
    "^Pages: *$": "页：",
    r'^File\(s\) exceed the maximum allowed size of (.*) Mb: "(.*)"$': "“$2”太大，上限为 $1 MB。",
    r"^Invalid file type: (.*)\. Only image/\* allowed\.$": "“$1”不是图片；请选择图片文件。",
}


def texts(language: str) -> dict[str, str]:
    """All texts in a language, "en" or "zh" or a kind of it such as "zh-CN", by their keys."""
    return {key: pair[language.startswith(CHINESE)] for key, pair in TEXTS.items()}


def language_of(accepted: str, ui_language: str = "auto") -> str:
    """The language of a visitor: that of the flag --ui_lang, else what the header Accept-Language asks for first."""
    if ui_language != "auto":
        return ui_language
    return CHINESE if accepted.strip().lower().startswith("zh") else ENGLISH


def sentence(text: str, language: str) -> str:
    """What went wrong, in the visitor's language where there is a translation. Flags are named as the page's fields are."""
    return (in_chinese(text) if language == CHINESE else text).replace("--", "")
