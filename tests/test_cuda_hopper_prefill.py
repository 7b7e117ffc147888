"""Attention of many new tokens on Hopper: compiled anywhere, held against float64 on such a GPU."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from reference import triton_device
from reference.attention_run import assert_close, make_run
from reference.paged_contexts import Sizes

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernel is written for Triton 3.6", allow_module_level=True)

from framesink.runtime.executors.cuda.kernels import hopper_prefill, paged_prefill  # noqa: E402
from framesink.runtime.executors.cuda.kernels.attention_parts import Parts, combine  # noqa: E402
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat  # noqa: E402
from framesink.runtime.models.quantization import CacheScheme  # noqa: E402

IS_HOPPER = triton_device.HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128
GROUP = HEADS // KEY_HEADS
LARGE = Sizes(HEADS, KEY_HEADS, HEAD_DIM, page_size=16, sections=(16, 24, 24))
DTYPES = (torch.bfloat16, torch.float16)
# The relative error of products whose left side has three bits of mantissa.
ROUNDED_WEIGHTS = 4e-2


@pytest.mark.parametrize(
    ("element", "value_element"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float8e4nv")],
)
def test_the_compiler_overlaps_products_and_spills_nothing(
    element: str, value_element: str
) -> None:
    script = Path(__file__).parent / "reference" / "compile_hopper_prefill.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, element, value_element],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stdout
    assert "serialized" not in done.stdout


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Random new tokens and gathered contexts, and what comes out in float64."""

    qkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    value_scale: torch.Tensor | None
    starts: torch.Tensor
    longest: int
    counts: torch.Tensor
    expected: torch.Tensor

    @classmethod
    def random(
        cls, lengths: list[int], counts: list[int], dtype: torch.dtype, coded: bool = False
    ) -> "Prompts":
        generator = torch.Generator("cuda").manual_seed(len(lengths))

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        room = -(-(max(counts) + max(lengths)) // 128) * 128
        # What no sequence has is not a number, but for values of a last tile.
        shape = (len(lengths), KEY_HEADS, room, HEAD_DIM)
        keys = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
        values = keys.clone()
        qkv = normal(sum(lengths) + 2, (HEADS + 2 * KEY_HEADS) * HEAD_DIM)
        expected, starts = [], [0]
        for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            rows = count + length
            values[sequence, :, : -(-rows // 128) * 128] = 0
            for tensor in (keys, values):
                tensor[sequence, :, :rows] = normal(KEY_HEADS, rows, HEAD_DIM)
            if coded:
                codes = (values[sequence] * 64.0).to(torch.float8_e4m3fn)
                values[sequence] = codes.to(dtype) / 64.0
            query = qkv[starts[-1] : starts[-1] + length, : HEADS * HEAD_DIM].double()
            starts.append(starts[-1] + length)
            scores = torch.einsum(
                "tkgd,krd->kgtr",
                query.view(length, KEY_HEADS, GROUP, HEAD_DIM) / HEAD_DIM**0.5,
                keys[sequence, :, :rows].double(),
            )
            unseen = torch.ones(length, rows, dtype=torch.bool, device="cuda").triu(count + 1)
            weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
            mixed = torch.einsum("kgtr,krd->tkgd", weights, values[sequence, :, :rows].double())
            expected.append(mixed.flatten(1))
        integers = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (starts, counts))
        first, second = integers
        scale = None
        if coded:
            scale = torch.full((KEY_HEADS,), 1 / 64.0, device="cuda")
            # As `gather_context` lays codes out.
            codes = (values * 64.0).to(torch.float8_e4m3fn).view(torch.uint8)
            codes = codes.unflatten(2, (-1, 2, 4, 2)).permute(0, 1, 6, 2, 4, 3, 5)
            values = codes.flatten(3).contiguous().view(torch.float8_e4m3fn)
        return cls(qkv, keys, values, scale, first, max(lengths), second, torch.cat(expected))

    def attend(self, splits: int | None) -> Parts:
        return hopper_prefill.attend(
            self.qkv,
            self.keys,
            self.values,
            self.starts,
            self.longest,
            self.counts,
            HEADS,
            splits,
            self.value_scale,
        )

    def combined(self, parts: Parts) -> torch.Tensor:
        shape = (len(self.qkv), HEADS * HEAD_DIM)
        out = torch.full(shape, torch.nan, dtype=self.qkv.dtype, device="cuda")
        combine(parts, out, OutputFormat(out.dtype))
        return out[: len(self.expected)].double()


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [None, 2, 5])
@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([1], [0]),
        ([1], [4000]),
        ([9], [5]),
        ([19], [110]),
        ([128], [128]),
        ([500], [0]),
        ([150, 1], [333, 1000]),
        ([0, 5, 0, 64], [7, 300, 9, 640]),
    ],
)
def test_new_tokens_attend_to_contexts_and_to_themselves_in_order(
    lengths: list[int], counts: list[int], splits: int | None, dtype: torch.dtype
) -> None:
    prompts = Prompts.random(lengths, counts, dtype)
    parts = prompts.attend(splits)
    # What the kernel says it has not written, no one may look at.
    nothing = parts.softmax[..., 1] == 0
    parts = Parts(parts.values.masked_fill(nothing[..., None], torch.nan), parts.softmax)
    assert_close(prompts.combined(parts), prompts.expected, dtype)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "counts"), [([1], [0]), ([1], [4000]), ([19], [110]), ([150, 500], [333, 1000])]
)
def test_values_may_be_codes(lengths: list[int], counts: list[int], dtype: torch.dtype) -> None:
    prompts = Prompts.random(lengths, counts, dtype, coded=True)
    result = prompts.combined(prompts.attend(None))
    assert (result - prompts.expected).norm() / prompts.expected.norm() < ROUNDED_WEIGHTS


@on_hopper
def test_a_cuda_graph_gives_the_same_bits() -> None:
    prompts = Prompts.random([700, 30], [1000, 2000], torch.bfloat16)
    first = prompts.combined(prompts.attend(None))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts = prompts.attend(None)
    for _ in range(3):
        parts.softmax.fill_(torch.nan)
        graph.replay()
        assert torch.equal(prompts.combined(parts), first)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", CacheScheme)
def test_prompts_on_pages_go_this_way(
    scheme: CacheScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(paged_prefill, "_attend")
    run, generator = make_run(LARGE, 5, dtype, (400, 1, 130), 8, scheme)
    run.erase_new_rows()
    run.append()
    if scheme is not CacheScheme.UNQUANTIZED:
        run.take_over(run.pool.written)
    result, expected = run.prefill(generator, None), run.reference()
    if scheme is CacheScheme.FP8:
        assert (result - expected).norm() / expected.norm() < ROUNDED_WEIGHTS
    else:
        assert_close(result, expected, dtype)
