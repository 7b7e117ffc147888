"""SinkWindow streaming of many videos at once in torch: for training and for quick evaluation.

The same retained tokens, order and positions as `framesink.runtime.policies.SinkWindow`: rows are
computed once, in their own turn; replies that leave the window move to `previous text` with the
rows they have; keys are rotated for contiguous positions at every chunk.
"""

from dataclasses import dataclass

import torch

from demo import forward
from demo.forward import GRID, VISION_TOKENS, Sizes, Weights
from demo.turns import EMPTY, OPENING_SLOTS, PART, PREFIX_SLOTS, REPLY_SLOTS, SLOTS


@dataclass(frozen=True, slots=True)
class Window:
    """What stays: turns (the current one included), and tokens of `previous text`.

    With `sink_text` and `recent_text` 0 this is a plain sliding window without old text.
    """

    turns: int = 8
    sink_text: int = 128
    recent_text: int = 256

    @property
    def text(self) -> int:
        """Tokens of `previous text` at most."""
        return self.sink_text + self.recent_text


@dataclass(slots=True)
class Turn:
    """Tokens with their rows: ids `[B, n]`, rows `[B, 2·layers·kv_heads, n, head_dim]` (keys
    before RoPE, then values)."""

    ids: torch.Tensor
    rows: torch.Tensor


@dataclass(slots=True)
class State:
    """What a batch of sessions keeps between turns.

    `ids` `[B, turns, SLOTS]` and `rows` `[B, row heads, turns · SLOTS, head_dim]` are the last
    `Window.turns - 1` turns, oldest first; a turn that has not happened is empty. `text_rows` is
    `previous text`, left-aligned, `text_count` `[B]` tokens of it.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    text_rows: torch.Tensor
    text_count: torch.Tensor


@dataclass(slots=True)
class Retained:
    """The context of a turn: rows with rotated keys, which of them count `[B, m]`, and the
    position `[B]` at which the turn begins."""

    rows: forward.Context
    valid: torch.Tensor
    length: torch.Tensor


class Streamer:
    """Steps a batch of sessions chunk by chunk."""

    def __init__(self, sizes: Sizes, window: Window, device: torch.device) -> None:
        self.sizes, self.window, self.device = sizes, window, device

    def empty_state(self, batch: int, dtype: torch.dtype) -> State:
        """Sessions in which nothing has happened yet."""
        heads = 2 * self.sizes.num_hidden_layers * self.sizes.num_key_value_heads

        def rows(length: int) -> torch.Tensor:
            shape = (batch, heads, length, self.sizes.head_dim)
            return torch.zeros(shape, device=self.device, dtype=dtype)

        turns = self.window.turns - 1
        ids = torch.full((batch, turns, SLOTS), EMPTY, device=self.device)
        count = torch.zeros(batch, device=self.device, dtype=torch.long)
        return State(ids, rows(turns * SLOTS), rows(self.window.text), count)

    def prefix(self, weights: Weights, ids: torch.Tensor) -> Turn:
        """Compute the first rows of sessions from ids `[B, PREFIX_SLOTS]`."""
        valid = ids != EMPTY
        hidden = forward.embed(weights, ids)
        cos, sin = forward.rotary(self.sizes, text_places(valid), hidden.dtype)
        seen = attention_bias(valid[:, None] & causal(PREFIX_SLOTS, self.device), hidden.dtype)
        _, rows = forward.language_model(weights, self.sizes, hidden, cos, sin, seen, None)
        return Turn(ids, rows)

    def context(self, prefix: Turn, state: State) -> Retained:
        """What the next turn attends to, with the positions it has then."""
        opening = prefix.ids[:, :OPENING_SLOTS] != EMPTY
        length = opening.sum(1)
        places = [text_places(opening), text_range(length, self.window.text)]
        slots = torch.arange(self.window.text, device=self.device)
        valid = [opening, slots < state.text_count[:, None]]
        length = length + state.text_count
        closing = PREFIX_SLOTS - OPENING_SLOTS
        places.append(text_range(length, closing))
        valid.append(torch.ones_like(opening[:, :closing]))
        length = length + closing
        ids = state.ids.clone()
        # The close of a turn that has left the window leaves with it.
        ids[:, 0, PART["tail"]] = EMPTY
        turn_places, ends = turn_positions(ids)
        places.append(length[:, None, None] + turn_places.flatten(2))
        valid.append((ids != EMPTY).flatten(1))
        opening_rows, closing_rows = prefix.rows.split([OPENING_SLOTS, closing], dim=2)
        rows = torch.cat((opening_rows, state.text_rows, closing_rows, state.rows), dim=2)
        cos, sin = forward.rotary(self.sizes, torch.cat(places, dim=2), rows.dtype)
        rotated = forward.rotate_context(rows, cos, sin)
        return Retained(rotated, torch.cat(valid, dim=1), length + ends[:, -1])

    def turn(
        self, weights: Weights, retained: Retained, ids: torch.Tensor, vision: torch.Tensor
    ) -> tuple[torch.Tensor, Turn]:
        """Run one turn: ids `[B, SLOTS]`, embeddings `[B, 16, hidden]`.

        Returns the hidden states of the reply slots `[B, REPLY_LENGTH, hidden]`, and the turn.
        """
        places, _ = turn_positions(ids[:, None])
        hidden = embed_turns(weights, ids[:, None], vision[:, None])
        positions = retained.length[:, None, None] + places[:, :, 0]
        cos, sin = forward.rotary(self.sizes, positions, hidden.dtype)
        new = (ids != EMPTY)[:, None] & causal(SLOTS, self.device)
        seen = torch.cat((retained.valid[:, None].expand(-1, SLOTS, -1), new), dim=2)
        bias = attention_bias(seen, hidden.dtype)
        hidden, rows = forward.language_model(
            weights, self.sizes, hidden, cos, sin, bias, retained.rows
        )
        return hidden[:, REPLY_SLOTS], Turn(ids, rows)

    def advance(self, state: State, turns: Turn) -> State:
        """The state after new turns (ids `[B, k · SLOTS]`): as many old ones leave the window."""
        count = turns.ids.shape[1] // SLOTS
        ids = torch.cat((state.ids, turns.ids.unflatten(1, (count, SLOTS))), dim=1)
        rows = torch.cat((state.rows, turns.rows), dim=2)
        inside = rows[:, :, count * SLOTS :].contiguous()
        kept = State(ids[:, count:], inside, state.text_rows, state.text_count)
        if not self.window.text:
            return kept
        words = ids[:, :count, PART["words"]].flatten(1) != EMPTY
        left = rows.unflatten(2, (-1, SLOTS))[:, :, :count, PART["words"]].flatten(2, 3)
        # Empty slots go last, the order of the others stays.
        order = (~words).to(torch.int8).argsort(dim=1, stable=True)
        total = state.text_count + words.sum(1)
        excess = (total - self.window.text).clamp(min=0)
        slots = torch.arange(self.window.text, device=self.device)[None]
        # Slot s takes token s, or, behind the sink, the token `excess` further on.
        source = slots + torch.where(slots >= self.window.sink_text, excess[:, None], 0)
        moved = (source - state.text_count[:, None]).clamp(0, words.shape[1] - 1)
        index = torch.where(
            source < state.text_count[:, None],
            source.clamp(max=self.window.text - 1),
            self.window.text + order.gather(1, moved),
        )
        pool = torch.cat((state.text_rows, left), dim=2)
        shape = (-1, pool.shape[1], -1, pool.shape[3])
        kept.text_rows = pool.gather(2, index[:, None, :, None].expand(shape))
        kept.text_count = total - excess
        return kept

    def generate(
        self,
        weights: Weights,
        retained: Retained,
        prompt: torch.Tensor,
        vision: torch.Tensor,
        closing: int,
    ) -> Turn:
        """Answer greedily: prompt ids `[B, SLOTS]` without a reply to a whole turn.

        A reply ends at its closing, or when its slots are full.
        """
        ids = prompt.clone()
        words = PART["words"]
        unfinished = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        for index, slot in enumerate(range(words.start, words.stop)):
            hidden, _ = self.turn(weights, retained, ids, vision)
            token = forward.logits(weights, self.sizes, hidden[:, index]).argmax(-1)
            unfinished &= token != closing
            if not unfinished.any():
                break
            ids[unfinished, slot] = token[unfinished]
        ids[:, PART["closing"]] = closing
        return self.turn(weights, retained, ids, vision)[1]


def embed_turns(weights: Weights, ids: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """Embeddings `[B, k · SLOTS, hidden]` of turns `[B, k, SLOTS]` and vision `[B, k, 16, ·]`."""
    text = forward.embed(weights, ids)
    start = PART["vision"].start + 1
    before, _, after = text.split([start, VISION_TOKENS, SLOTS - start - VISION_TOKENS], dim=2)
    return torch.cat((before, vision.to(text.dtype), after), dim=2).flatten(1, 2)


def turn_positions(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M-RoPE places `[B, 3, k, SLOTS]` of consecutive turns `[B, k, SLOTS]`, counted from the first
    one's start, and where each turn ends `[B, k]`."""
    advance = (ids != EMPTY).long()
    first = PART["vision"].start + 1
    block = slice(first, first + VISION_TOKENS)
    # The block as a whole advances by its longest side; inside, h and w count from its start.
    occupied = advance[..., block.stop - 1].clone()
    advance[..., block] = 0
    advance[..., block.stop - 1] = occupied * GRID
    ends = advance.flatten(1).cumsum(1).view_as(advance)
    places = (ends - advance)[:, None].repeat(1, 3, 1, 1)
    steps = torch.arange(VISION_TOKENS, device=ids.device)
    start = places[:, 0, :, first][..., None]
    places[:, 0, :, block] = start
    places[:, 1, :, block] = start + steps // GRID
    places[:, 2, :, block] = start + steps % GRID
    return places, ends[..., -1]


def text_places(valid: torch.Tensor) -> torch.Tensor:
    """Places `[B, 3, n]` of text of which `valid` `[B, n]` tokens are there."""
    return (valid.long().cumsum(1) - 1)[:, None].expand(-1, 3, -1)


def text_range(start: torch.Tensor, length: int) -> torch.Tensor:
    """Positions `[B, 3, length]` of text from `start` `[B]` on."""
    steps = torch.arange(length, device=start.device)
    return (start[:, None] + steps)[:, None].expand(-1, 3, -1)


def causal(length: int, device: torch.device) -> torch.Tensor:
    """Which of `length` tokens each one sees `[1, length, length]`."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]


def attention_bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token is seen, a large negative number elsewhere."""
    return torch.zeros(seen.shape, device=seen.device, dtype=dtype).masked_fill(~seen, -1e4)
