"""The tokenizer of a checkpoint: `tokenizer.json` through the `tokenizers` library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.pre_tokenizers import ByteLevel

from framesink.runtime.errors import CheckpointError


def _byte_of_character() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on,
    in order (GPT-2's `bytes_to_unicode`).
    """
    alphabet = set(ByteLevel.alphabet())
    own = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    others = [byte for byte in range(256) if chr(byte) not in own]
    return own | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_of_character()


class Tokenizer:
    """Text to token ids and back; special tokens in the text are recognised, none are added."""

    def __init__(self, backend: BackendTokenizer) -> None:
        self._backend = backend
        self._plain = BackendTokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._special = {id_: token.content for id_, token in added.items() if token.special}
        self._token_bytes: dict[int, bytes] = {}

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

    def token_bytes(self, token: int) -> bytes:
        """The bytes of UTF-8 a token stands for; none for special and unknown tokens."""
        piece = self._token_bytes.get(token)
        if piece is None:
            content = self._backend.id_to_token(token)
            if content is None or token in self._special:
                piece = b""
            elif all(character in _BYTES for character in content):
                piece = bytes(_BYTES[character] for character in content)
            else:  # an added token is its own text
                piece = content.encode()
            self._token_bytes[token] = piece
        return piece

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """What each special token is written as."""
        return MappingProxyType(self._special)

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
