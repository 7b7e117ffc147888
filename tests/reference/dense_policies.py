"""The policies of the dense reference: plain settings, in turns and tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DenseSinkWindow:
    """StreamingVLM's policy, its windows in turns and its text limits in tokens."""

    vision_turns: int
    reply_turns: int
    sink_text: int
    recent_text: int


@dataclass(frozen=True)
class DenseSlidingWindow:
    """Only the last `turns` turns, the one about to begin among them."""

    turns: int


@dataclass(frozen=True)
class DenseFullAttention:
    """Nothing leaves."""


DensePolicy = DenseSinkWindow | DenseSlidingWindow | DenseFullAttention
