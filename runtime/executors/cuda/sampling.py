"""Tokens drawn from a distribution, on the GPU, as `framesink.runtime.sampler` draws them.

Probabilities are float32 and sums of them float64, as on the host; only exp and the order in which
sums are rounded differ. So another token is drawn if the random number, or top-p, falls within
about 1e-7 of the border between two tokens.
"""

import torch
from torch import Tensor


def penalised(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores float32 `[n, vocab]` after repetition penalties float32 `[n, 1]`, of the tokens that
    are `seen`, bool `[n, vocab]`."""
    less = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, less, scores)


def draw(scores: Tensor, top_k: Tensor | None, top_p: Tensor | None, fractions: Tensor) -> Tensor:
    """A token, int64 `[n]`, of each row of `scores` float32 `[n, vocab]` (after the temperature):
    the first at which the running sum of probabilities exceeds `fractions` float64 `[n]`, in
    [0, 1), of the whole.

    Tokens are taken from the `top_k` int64 `[n]` likeliest and equals of the last of those, and of
    these from the fewest whose probability exceeds `top_p` float64 `[n]`; 0 and 1 keep all of them.
    None stands for rows that all do.
    """
    weights = (scores - scores.amax(dim=1, keepdim=True)).exp()
    if top_k is not None or top_p is not None:
        weights = _keep(weights, scores, top_k, top_p)
    ends = weights.cumsum(dim=1, dtype=torch.float64)
    total = ends[:, -1:]
    # Rounding must not lead beyond the last token that has a weight.
    target = torch.minimum(fractions[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(ends, target, right=True)[:, 0]


def _keep(weights: Tensor, scores: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """`weights` with zeros for tokens that top-k or top-p leave out; of equals the lower are kept
    by top-p."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    sorted_weights = weights.gather(1, order)
    if top_k is not None:
        limit = torch.where(top_k > 0, top_k, ordered.shape[1]).clamp(max=ordered.shape[1])
        threshold = ordered.gather(1, limit[:, None] - 1)
        sorted_weights = sorted_weights.where(ordered >= threshold, 0.0)
    if top_p is not None:
        ends = sorted_weights.cumsum(dim=1, dtype=torch.float64)
        before = torch.nn.functional.pad(ends[:, :-1], (1, 0))
        total = ends[:, -1:]
        share = top_p[:, None]
        kept = (total - before > (1.0 - share) * total) | (share >= 1.0)
        sorted_weights = sorted_weights.where(kept, 0.0)
    return torch.zeros_like(weights).scatter(1, order, sorted_weights)
