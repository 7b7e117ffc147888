"""The tokenizer of a checkpoint: `tokenizer.json` through the `tokenizers` library."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as BackendTokenizer

from framesink.runtime.errors import CheckpointError


class Tokenizer:
    """Text to token ids and back; special tokens in the text are recognised, none are added."""

    def __init__(self, backend: BackendTokenizer) -> None:
        self._backend = backend
        self._plain = BackendTokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer":
        """Read `tokenizer.json` of a checkpoint or bundle. Raises CheckpointError if unusable."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{directory} holds no tokenizer.json; copy the model's own there."
            )
        try:
            return cls(BackendTokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}).") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` from outside, in which special tokens are ordinary characters.

        Text of a user must not be able to open or close a turn of the protocol.
        """
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; broken UTF-8 becomes U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def special(self, content: str) -> int:
        """Id of a special token. Raises CheckpointError if the vocabulary has none of that name."""
        token: int | None = self._backend.token_to_id(content)
        if token is None:
            raise CheckpointError(
                f"The tokenizer has no token {content}; it does not belong to a Qwen2.5-VL model."
            )
        return token

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ones included."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size
