"""Which spans stay in the context: pure functions of the span list."""

from framesink.runtime.policies.base import Policy, TurnProfile
from framesink.runtime.policies.full_attention import FullAttention
from framesink.runtime.policies.sink_window import SinkWindow
from framesink.runtime.policies.sliding_window import SlidingWindow

__all__ = ["FullAttention", "Policy", "SinkWindow", "SlidingWindow", "TurnProfile"]
