"""How tiles of attention are dealt out to the multiprocessors of a GPU.

A block of rows, new tokens' heads of one K/V head, goes with every tile of keys of its context and
new tokens. The tiles of all blocks, heads and sequences, one after another, are cut into one share
for every program (stream-K, arXiv 2301.03598), so that all end at once and few blocks are cut.

`work` is what every function here takes: `starts` and `counts` as in `hopper_prefill.attend`, how
many sequences there are, and the most parts that a block may be cut into.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Rows (tokens · heads of one K/V head) of a block, and keys of a tile.
BLOCK_ROWS = gl.constexpr(128)
TILE_KEYS = gl.constexpr(128)


@gluon.jit
def _size(work, sequence, GROUP: gl.constexpr):
    """Blocks of rows of a sequence, and tiles of its context and new tokens."""
    starts, counts, _, _ = work
    length = gl.load(starts + sequence + 1) - gl.load(starts + sequence)
    blocks = gl.cdiv(length * GROUP, BLOCK_ROWS)
    return blocks, gl.cdiv(gl.load(counts + sequence) + length, TILE_KEYS)


@gluon.jit
def own_share(work, GROUP: gl.constexpr, KEY_HEADS: gl.constexpr):
    """Where this program's tiles begin and end among those of all blocks, heads and sequences, and
    how many a program has: such that no block is cut into more than `splits` parts."""
    _, _, batch, splits = work
    total = 0
    longest = 0
    for sequence in range(batch):
        blocks, tiles = _size(work, sequence, GROUP)
        total += blocks * tiles * KEY_HEADS
        longest = gl.maximum(longest, gl.where(blocks > 0, tiles, 0))
    share = gl.maximum(gl.cdiv(total, gl.num_programs(0)), gl.cdiv(longest, splits - 1))
    begin = gl.program_id(0) * share
    return begin, gl.minimum(begin + share, total), share


@gluon.jit
def next_segment(work, at, end, share, GROUP: gl.constexpr, KEY_HEADS: gl.constexpr):
    """Tiles of one block that this program takes on from `at`: sequence, K/V head and block; the
    first tile and how many; the part of the block that they are, and where the parts end that this
    program writes; and what comes after."""
    starts, counts, batch, splits = work
    sequence = 0
    begin = 0
    passed = 0
    for other in range(batch):
        blocks, tiles = _size(work, other, GROUP)
        size = blocks * tiles * KEY_HEADS
        reached = (at >= passed) & (size > 0)
        sequence = gl.where(reached, other, sequence)
        begin = gl.where(reached, passed, begin)
        passed += size
    blocks, tiles = _size(work, sequence, GROUP)
    index = (at - begin) // tiles
    head = index // blocks
    block = index % blocks
    begin += index * tiles
    first = at - begin
    amount = gl.minimum(tiles - first, end - at)
    part = gl.program_id(0) - begin // share
    # The last part of a block marks the ones that there are not.
    parts_end = gl.where(first + amount == tiles, splits, part + 1)
    # What the block's last row does not see is left out, but for one tile, which is masked.
    length = gl.load(starts + sequence + 1) - gl.load(starts + sequence)
    seen = gl.load(counts + sequence) + gl.minimum(length, gl.cdiv((block + 1) * BLOCK_ROWS, GROUP))
    seen_amount = gl.maximum(gl.minimum(amount, gl.cdiv(seen, TILE_KEYS) - first), 1)
    return sequence, head, block, first, seen_amount, part, parts_end, at + amount
