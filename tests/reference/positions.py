"""M-RoPE positions of a flat token list, recomputed from nothing at every call.

Source: Qwen2-VL's position rule as StreamingVLM applies it (arXiv 2510.09608; its
`streaming_vlm/inference/qwen2_5/pos_emb.py`): text counts up on all three axes, a video grid starts
where the text before it ends, and the text after it continues at the largest position + 1.
"""

from collections.abc import Sequence

GridSize = tuple[int, int, int]
Position = tuple[int, int, int]


def mrope_positions(
    ids: Sequence[int],
    grids: Sequence[GridSize],
    *,
    video_pad: int,
    merge_size: int,
    time_steps: Sequence[float],
) -> list[Position]:
    """Position (t, h, w) of every token.

    `grids` are the patch grids (t, h, w) of the vision blocks in `ids`, in order, `time_steps` how
    far t advances from one step of each grid to the next. Raises ValueError when `ids` and `grids`
    disagree.
    """
    positions: list[Position] = []
    waiting = list(zip(grids, time_steps, strict=True))
    following = 0
    index = 0
    while index < len(ids):
        if ids[index] != video_pad:
            positions.append((following, following, following))
            following += 1
            index += 1
            continue
        (steps, height, width), time_step = waiting.pop(0)
        height, width = height // merge_size, width // merge_size
        block = [
            (following + int(step * time_step), following + row, following + column)
            for step in range(steps)
            for row in range(height)
            for column in range(width)
        ]
        if any(token != video_pad for token in ids[index : index + len(block)]):
            raise ValueError(f"the vision block at {index} is shorter than its grid")
        positions += block
        following = max(max(position) for position in block) + 1
        index += len(block)
    if waiting or len(positions) != len(ids):
        raise ValueError("vision blocks and grids do not match")
    return positions
