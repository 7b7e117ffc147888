"""SinkWindow streaming of many videos at once in torch: for training and for quick evaluation.

The same retained tokens, order and positions as `framesink.runtime.policies.SinkWindow`: rows are
computed once, in their own turn; replies that leave the window move to `previous text` with the
rows they have; keys are rotated for contiguous positions at every chunk.
"""

from dataclasses import dataclass

import torch

from demo import forward
from demo.forward import GRID, VISION_TOKENS, Sizes, Weights
from demo.turns import (
    EMPTY,
    OPENING_SLOTS,
    PART,
    PREFIX_SLOTS,
    REPLY_SLOTS,
    SLOTS,
)


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
    """A turn in the window: its ids `[B, SLOTS]`, its rows `[B, 2·layers·kv_heads, SLOTS,
    head_dim]` (keys before RoPE, then values)."""

    rows: torch.Tensor
    ids: torch.Tensor


@dataclass(slots=True)
class State:
    """All that a batch of sessions keeps.

    `turns` are the last `Window.turns - 1`, oldest first; a turn without tokens (ids all empty) has
    not happened. `text_rows` holds `previous text`, left-aligned, `text_count` `[B]` tokens of it.
    """

    turns: list[Turn]
    text_rows: torch.Tensor
    text_count: torch.Tensor


class Streamer:
    """Steps a batch of sessions chunk by chunk."""

    def __init__(self, sizes: Sizes, window: Window, device: torch.device) -> None:
        self.sizes, self.window, self.device = sizes, window, device
        self.row_heads = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads

    def empty_state(self, batch: int, dtype: torch.dtype) -> State:
        """Sessions in which nothing has happened yet."""
        head_dim = self.sizes.head_dim

        def rows(length: int) -> torch.Tensor:
            return torch.zeros(
                batch, self.row_heads, length, head_dim, device=self.device, dtype=dtype
            )

        no_ids = torch.full((batch, SLOTS), EMPTY, device=self.device, dtype=torch.long)
        turns = [Turn(rows(SLOTS), no_ids) for _ in range(self.window.turns - 1)]
        count = torch.zeros(batch, device=self.device, dtype=torch.long)
        return State(turns, rows(self.window.text), count)

    def restart(self, state: State, fresh: torch.Tensor) -> State:
        """Forget the sessions marked in `fresh` bool `[B]`; detach the rest from its gradient."""
        turns = [
            Turn(turn.rows.detach(), turn.ids.masked_fill(fresh[:, None], EMPTY))
            for turn in state.turns
        ]
        return State(turns, state.text_rows.detach(), state.text_count.masked_fill(fresh, 0))

    def prefix(self, weights: Weights, ids: torch.Tensor) -> Turn:
        """Compute the first rows of sessions from ids `[B, PREFIX_SLOTS]`."""
        valid = ids != EMPTY
        places = (valid.long().cumsum(1) - 1)[:, None].expand(-1, 3, -1)
        hidden = forward.embed(weights, ids)
        cos, sin = forward.rotary(self.sizes, places, hidden.dtype)
        bias = _bias(valid[:, None] & _causal(PREFIX_SLOTS, self.device), hidden.dtype)
        _, rows = forward.language_model(weights, self.sizes, hidden, cos, sin, bias, None)
        return Turn(rows, ids)

    def context(self, prefix: Turn, state: State) -> "Retained":
        """What the next turn attends to, with the positions it has then."""
        opening = prefix.ids[:, :OPENING_SLOTS] != EMPTY
        length = opening.sum(1)
        places = [(opening.long().cumsum(1) - 1)[:, None].expand(-1, 3, -1)]
        valid = [opening]
        rows = [prefix.rows[:, :, :OPENING_SLOTS]]
        if self.window.text:
            slots = torch.arange(self.window.text, device=self.device)
            places.append((length[:, None] + slots)[:, None].expand(-1, 3, -1))
            valid.append(slots < state.text_count[:, None])
            rows.append(state.text_rows)
            length = length + state.text_count
        closing = torch.arange(PREFIX_SLOTS - OPENING_SLOTS, device=self.device)
        places.append((length[:, None] + closing)[:, None].expand(-1, 3, -1))
        valid.append(torch.ones_like(opening[:, : len(closing)]))
        rows.append(prefix.rows[:, :, OPENING_SLOTS:])
        length = length + len(closing)
        for index, turn in enumerate(state.turns):
            ids = turn.ids
            if index == 0:
                # The close of a turn that has left the window leaves with it.
                ids = ids.clone()
                ids[:, PART["tail"]] = EMPTY
            turn_places, turn_length = turn_positions(ids)
            places.append(length[:, None, None] + turn_places)
            valid.append(ids != EMPTY)
            rows.append(turn.rows)
            length = length + turn_length
        joined = torch.cat(rows, dim=2)
        cos, sin = forward.rotary(self.sizes, torch.cat(places, dim=2), joined.dtype)
        rotated = forward.rotate_context(joined, cos, sin)
        return Retained(rotated, torch.cat(valid, dim=1), length)

    def turn(
        self, weights: Weights, retained: "Retained", ids: torch.Tensor, vision: torch.Tensor
    ) -> tuple[torch.Tensor, Turn]:
        """Run one turn: ids `[B, SLOTS]`, embeddings `[B, 16, hidden]`.

        Returns the hidden states of the reply slots `[B, REPLY_LENGTH, hidden]`, and the turn.
        """
        valid = ids != EMPTY
        places, _ = turn_positions(ids)
        start = PART["vision"].start + 1
        text = forward.embed(weights, ids)
        hidden = torch.cat(
            (text[:, :start], vision.to(text.dtype), text[:, start + VISION_TOKENS :]), dim=1
        )
        cos, sin = forward.rotary(self.sizes, retained.length[:, None, None] + places, hidden.dtype)
        new = valid[:, None] & _causal(SLOTS, self.device)
        seen = torch.cat((retained.valid[:, None].expand(-1, SLOTS, -1), new), dim=2)
        hidden, rows = forward.language_model(
            weights, self.sizes, hidden, cos, sin, _bias(seen, hidden.dtype), retained.rows
        )
        return hidden[:, REPLY_SLOTS], Turn(rows, ids)

    def advance(self, state: State, turn: Turn) -> State:
        """The state after a turn: the oldest turn leaves, its words move to `previous text`."""
        turns = [*state.turns, turn]
        if not self.window.text:
            return State(turns[1:], state.text_rows, state.text_count)
        words = turns[0].ids[:, PART["words"]]
        moved = (words != EMPTY).sum(1)
        total = state.text_count + moved
        excess = (total - self.window.text).clamp(min=0)
        slots = torch.arange(self.window.text, device=self.device)[None]
        # Slot s takes token s, or, behind the sink, the token `excess` further on.
        source = slots + torch.where(slots >= self.window.sink_text, excess[:, None], 0)
        from_words = (source - state.text_count[:, None]).clamp(0, words.shape[1] - 1)
        index = torch.where(
            source < state.text_count[:, None],
            source.clamp(max=self.window.text - 1),
            self.window.text + from_words,
        )
        pool = torch.cat((state.text_rows, turns[0].rows[:, :, PART["words"]]), dim=2)
        rows = pool.gather(2, index[:, None, :, None].expand(-1, pool.shape[1], -1, pool.shape[3]))
        return State(turns[1:], rows, total - excess)

    def generate(
        self,
        weights: Weights,
        retained: "Retained",
        prompt: torch.Tensor,
        vision: torch.Tensor,
        closing: int,
    ) -> Turn:
        """Answer greedily: prompt ids `[B, SLOTS]` without a reply to a whole turn.

        A reply ends at its closing, or when its slots are full.
        """
        ids = prompt.clone()
        words = PART["words"]
        open_replies = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        for index in range(words.stop - words.start + 1):
            hidden, turn = self.turn(weights, retained, ids, vision)
            token = forward.logits(weights, self.sizes, hidden[:, index]).argmax(-1)
            open_replies &= token != closing
            if index == words.stop - words.start or not open_replies.any():
                break
            ids[open_replies, words.start + index] = token[open_replies]
        ids[:, PART["closing"]] = closing
        _, turn = self.turn(weights, retained, ids, vision)
        return turn


@dataclass(slots=True)
class Retained:
    """The context of a turn: rows with rotated keys, which of them count `[B, m]`, and the
    position `[B]` at which the turn begins."""

    rows: forward.Context
    valid: torch.Tensor
    length: torch.Tensor


def turn_positions(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M-RoPE places `[B, 3, SLOTS]` of a turn's tokens from its start, and its length `[B]`."""
    advance = (ids != EMPTY).long()
    first = PART["vision"].start + 1
    block = slice(first, first + VISION_TOKENS)
    # The block as a whole advances by its longest side; inside, h and w count from its start.
    occupied = advance[:, block.stop - 1].clone()
    advance[:, block] = 0
    advance[:, block.stop - 1] = occupied * GRID
    ends = advance.cumsum(1)
    places = (ends - advance)[:, None].repeat(1, 3, 1)
    steps = torch.arange(VISION_TOKENS, device=ids.device)
    start = places[:, 0, first][:, None]
    places[:, 0, block] = start
    places[:, 1, block] = start + steps // GRID
    places[:, 2, block] = start + steps % GRID
    return places, ends[:, -1]


def _causal(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]


def _bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token is seen, a large negative number elsewhere; an empty slot sees itself."""
    return torch.zeros(seen.shape, device=seen.device, dtype=dtype).masked_fill(~seen, -1e4)
