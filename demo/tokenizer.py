"""Trains and writes the demo model's tokenizer: a small byte-level BPE in Qwen's layout.

The plain vocabulary comes first, Qwen2.5's special tokens at its end. Text is split as Qwen splits
it, every digit alone. `python -m demo.tokenizer` writes it into `demo/model`.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from demo import phrases

MODEL_DIRECTORY = Path(__file__).parent / "model"
VOCABULARY_SIZE = 1024

# Special tokens in the order Qwen2.5 numbers them; the flag says whether decoding leaves them out.
SPECIAL_TOKENS = (
    *(("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True)),
    *(("<|object_ref_start|>", True), ("<|object_ref_end|>", True)),
    *(("<|box_start|>", True), ("<|box_end|>", True)),
    *(("<|quad_start|>", True), ("<|quad_end|>", True)),
    *(("<|vision_start|>", True), ("<|vision_end|>", True), ("<|vision_pad|>", True)),
    *(("<|image_pad|>", True), ("<|video_pad|>", True)),
    *(("<tool_call>", False), ("</tool_call>", False)),
    *(("<|fim_prefix|>", False), ("<|fim_middle|>", False), ("<|fim_suffix|>", False)),
    *(("<|fim_pad|>", False), ("<|repo_name|>", False), ("<|file_sep|>", False)),
)

# How Qwen2's tokenizer splits text before the merges.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5-VL's chat template: it opens with the default system turn if the chat has none.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> Iterator[str]:
    """Everything the world can say, the frame of the chat, and plain English to fill the rest."""
    for colour, shape in product(phrases.COLOURS, phrases.SHAPES):
        for count in range(1, phrases.MAX_COUNT + 1):
            yield phrases.enters(count, colour, shape) + " ..."
            yield phrases.answer_entered(count) + " ..."
        yield phrases.leaves(colour, shape) + " ..."
        yield phrases.bounces(colour, shape) + " ..."
        for new_colour in phrases.COLOURS:
            yield phrases.turns(colour, shape, new_colour) + " ..."
        yield phrases.answer_last(colour, shape)
        asked = (phrases.ask_where(colour, shape), phrases.ask_entered(colour, shape))
        yield from (text for texts in asked for text in texts)
        yield from (*phrases.ask_colour(shape), phrases.answer_colour(colour))
        yield from (*phrases.ask_how_many(), *phrases.ask_last(), *phrases.QUERIES)
        for count in range(len(phrases.NUMBERS)):
            yield phrases.answer_how_many(count)
        yield phrases.answer_entered(0)
        yield from (phrases.answer_where(place) for place in phrases.PLACES)
        yield "system\nYou are a helpful assistant.\nprevious text\nuser\n"
        yield "Time=12.0-13.0s\nassistant\n"
    licence = Path(__file__).parent.parent / "LICENSE"
    yield from licence.read_text(encoding="utf-8").splitlines(keepends=True)


def train_tokenizer() -> Tokenizer:
    """The tokenizer, with `VOCABULARY_SIZE` tokens in all."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(
        [
            AddedToken(content, special=special, normalized=False)
            for content, special in SPECIAL_TOKENS
        ]
    )
    return tokenizer


def write_tokenizer(directory: Path) -> Tokenizer:
    """Train the tokenizer and write it and its configuration into a checkpoint directory."""
    tokenizer = train_tokenizer()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(content)): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }
        for content, special in SPECIAL_TOKENS
    }
    configuration = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [name for name, special in SPECIAL_TOKENS if special][1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer


if __name__ == "__main__":
    write_tokenizer(MODEL_DIRECTORY)
