"""StreamingVLM's chat format, token by token.

One turn is one chunk: a user turn with its time, the vision tokens and perhaps a question, then the
model's reply, which ends in ` ...`; silence is a bare ` ...`. Words that leave the window live on
in the `previous text` turn. An instruction that must survive is a pinned user turn between the
system turn and `previous text` (StreamingVLM put it into the first user turn, which is evicted).

Source: mit-han-lab/streaming-vlm `streaming_vlm/inference/inference.py`; arXiv 2510.09608.
"""

from framesink.runtime.tokenizer import Tokenizer

SYSTEM_PROMPT = "You are a helpful assistant."
REPLY_CLOSING = " ..."


class ChatProtocol:
    """Token ids of every fixed piece of the chat format."""

    def __init__(self, tokenizer: Tokenizer, system_prompt: str = SYSTEM_PROMPT) -> None:
        """Raises CheckpointError if the tokenizer lacks one of Qwen's special tokens."""
        self.tokenizer = tokenizer
        self.turn_start = tokenizer.special("<|im_start|>")
        self.turn_end = tokenizer.special("<|im_end|>")
        self.vision_start = tokenizer.special("<|vision_start|>")
        self.vision_end = tokenizer.special("<|vision_end|>")
        self.video_pad = tokenizer.special("<|video_pad|>")
        self.end_of_text = tokenizer.special("<|endoftext|>")

        newline = tokenizer.encode("\n")
        self.system = self._open("system") + tokenizer.encode(system_prompt) + self._close(newline)
        self.previous_text_open = self._open("previous text")
        self.user_open = self._open("user")
        self.reply_open = self._open("assistant")
        self.turn_close = self._close(newline)
        self.reply_closing = tokenizer.encode(REPLY_CLOSING)

    def _open(self, role: str) -> list[int]:
        return [self.turn_start, *self.tokenizer.encode(f"{role}\n")]

    def _close(self, newline: list[int]) -> list[int]:
        return [self.turn_end, *newline]

    def time_text(self, t0: float, t1: float) -> list[int]:
        """The time of a chunk, seconds of video time."""
        return self.tokenizer.encode(f"Time={t0:.1f}-{t1:.1f}s")

    def vision(self, tokens: int) -> list[int]:
        """A vision block: start, `tokens` placeholders for embeddings, end."""
        return [self.vision_start, *[self.video_pad] * tokens, self.vision_end]

    def pinned(self, query: str) -> list[int]:
        """The pinned user turn that holds the session's standing instruction."""
        return [*self.user_open, *self.tokenizer.encode_plain(query), *self.turn_close]

    def question(self, text: str) -> list[int]:
        """A question asked mid-stream: it follows the vision block of its turn."""
        return self.tokenizer.encode_plain(text)

    def previous_words(self, text: str) -> list[int]:
        """Words said before a session was opened, for the body of `previous text`."""
        return self.tokenizer.encode_plain(text)

    @property
    def suppressed_tokens(self) -> frozenset[int]:
        """Tokens a reply must not hold: they would open a turn or a vision block."""
        return frozenset((self.turn_start, self.vision_start, self.vision_end, self.video_pad))

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return frozenset((self.turn_end, self.end_of_text))
