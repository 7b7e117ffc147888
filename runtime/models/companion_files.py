"""The small files beside a checkpoint's weights: tokenizer, preprocessing, chat, streaming."""

from pathlib import Path

from framesink.runtime.errors import CheckpointError

PREPROCESSOR_NAME = "preprocessor_config.json"
STREAMING_NAME = "streaming_config.json"
REQUIRED_FILES = ("config.json", "tokenizer.json")
OPTIONAL_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    PREPROCESSOR_NAME,
    "video_preprocessor_config.json",
    STREAMING_NAME,
    "LICENSE",
)


def companion_files(directory: Path) -> list[Path]:
    """The files to copy with a model. Raises CheckpointError if a required one is missing."""
    for name in REQUIRED_FILES:
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} holds no {name}; copy the model's own there.")
    names = (*REQUIRED_FILES, *OPTIONAL_FILES)
    return [directory / name for name in names if (directory / name).is_file()]
