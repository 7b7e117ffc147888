"""Video sources, capture, and cutting into chunks."""

from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.dropping import DropPolicy
from framesink.runtime.video.source import VideoSource, open_source

__all__ = ["Chunk", "ChunkStream", "DropPolicy", "VideoSource", "open_source"]
