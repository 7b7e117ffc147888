"""A session's spans as one prompt: text with a placeholder per video, and the videos."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.kv.span import Span, SpanKind
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """One chunk's frames, uint8 RGB `[T, H, W, 3]` of the model's size, `fps` of them per second of
    video time. They become `tokens` tokens of the language model."""

    pixels: UInt8Array
    fps: float
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """`text` holds one placeholder per video, in order; `ids` are its tokens."""

    text: str
    ids: tuple[int, ...]
    videos: tuple[Video, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the language model, those of the videos among them."""
        return len(self.ids) + sum(video.tokens - 1 for video in self.videos)


class PromptWriter:
    """Writes prompts. What users and the model said cannot open a turn or a vision block in them:
    where it spells a special token, a space is put into it."""

    def __init__(self, protocol: ChatProtocol) -> None:
        self._tokenizer: Tokenizer = protocol.tokenizer
        self._video_pad = protocol.video_pad
        contents = sorted(self._tokenizer.special_tokens.values(), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, contents)))

    def write(self, spans: Iterable[Span], videos: Mapping[int, Video]) -> Prompt:
        """The prompt of `spans`; `videos` are those of its vision spans, by turn."""
        pieces: list[str] = []
        plain = bytearray()
        shown: list[Video] = []
        for span in spans:
            tokens = span.tokens.tolist()
            if span.kind is SpanKind.VISION:
                shown.append(videos[span.turn])
                tokens = [tokens[0], self._video_pad, tokens[-1]]
            for token in tokens:
                special = self._tokenizer.special_tokens.get(token)
                if special is None:
                    plain += self._tokenizer.token_bytes(token)
                else:
                    pieces += (self._as_plain_text(plain), special)
                    plain.clear()
        pieces.append(self._as_plain_text(plain))
        text = "".join(pieces)
        return Prompt(text, tuple(self._tokenizer.encode(text)), tuple(shown))

    def _as_plain_text(self, data: bytes | bytearray) -> str:
        # A policy cuts between tokens, perhaps inside a character: what is left of it is no text.
        text = data.decode(errors="ignore")
        return self._spelled.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def common_prefix(before: Prompt, said: Sequence[int], after: Prompt, video_pad: int) -> int:
    """How many tokens of `after` begin it as they began `before` and the reply `said` to it.

    So many a prefix cache can serve, whole blocks of them. Videos are the same if they are one
    object. `video_pad` is the placeholder's token.
    """
    videos = zip(before.videos, after.videos, strict=False)
    tokens = 0
    for old, new in zip((*before.ids, *said), after.ids, strict=False):
        if old != new:
            return tokens
        if new == video_pad:
            pair = next(videos, None)
            if pair is None or pair[0] is not pair[1]:
                return tokens
            tokens += pair[1].tokens
        else:
            tokens += 1
    return tokens
