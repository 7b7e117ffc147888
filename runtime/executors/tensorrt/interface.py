"""What a plan's inputs, outputs and profiles must be, checked before a plan is loaded.

A plan cannot be asked without a GPU, so all of this is read from the manifest; when it is loaded,
`framesink.runtime.executors.tensorrt.plan` compares it with what TensorRT says.
"""

from collections.abc import Iterator, Mapping, Sequence

from framesink.runtime.bundle import REBUILD_HINT
from framesink.runtime.errors import BundleError
from framesink.runtime.manifest import Manifest, PartName, PlanSpec, TensorSpec
from framesink.runtime.models.vision_segments import window_patches

FP8 = "float8_e4m3fn"
COMPUTE_TYPES = ("float16", "bfloat16", "float32")
# By the type of pages, what new rows may be: FP8 codes are bytes in pages.
ROW_TYPES = {
    "float16": ("float16",),
    "bfloat16": ("bfloat16",),
    "float32": ("float32",),
    "int8": ("int8", FP8),
}
# The profile whose shapes come again and again.
REPEATED_PROFILE = "decode"
PROFILES: Mapping[PartName, tuple[str, ...]] = {
    "language_model": ("prefill", REPEATED_PROFILE),
    "vision_encoder": ("vision",),
}

# Types that a tensor may have, and its shape; a dynamic dimension is None.
Expected = tuple[tuple[str, ...], tuple[int | None, ...]]


def check_plan(manifest: Manifest, part: PartName, plan: PlanSpec) -> None:
    """Raises BundleError unless a plan has the interface of the manifest's model and profiles that
    make sense."""
    for complaint in _complaints(manifest, part, plan):
        raise BundleError(f"{plan.path} does not fit the manifest: {complaint}; {REBUILD_HINT}.")


def _complaints(manifest: Manifest, part: PartName, plan: PlanSpec) -> Iterator[str]:
    if plan.compute_type not in COMPUTE_TYPES:
        yield f"it computes in {plan.compute_type}"
    inputs, outputs = (
        _language_model(manifest, plan)
        if part == "language_model"
        else _vision_encoder(manifest, plan)
    )
    yield from _tensor_complaints("input", plan.inputs, inputs)
    yield from _tensor_complaints("output", plan.outputs, outputs)
    yield from _profile_complaints(part, plan)


def _language_model(
    manifest: Manifest, plan: PlanSpec
) -> tuple[dict[str, Expected], dict[str, Expected]]:
    text, compute = manifest.model.text, (plan.compute_type,)
    half = text.head_dim // 2
    inputs: dict[str, Expected] = {
        "inputs_embeds": (compute, (None, None, text.hidden_size)),
        "mask": (compute, (None, 1, None, None)),
        "block_table": (("int32",), (None, None)),
        "last": (("int32",), (None,)),
    }
    inputs |= {f"{kind}_{rows}": (compute, (None, None, half)) for kind, rows in _TABLES}
    outputs: dict[str, Expected] = {"logits": (compute, (None, text.vocab_size))}
    heads, head_dim = text.num_key_value_heads, text.head_dim
    pages = next((spec.dtype for spec in plan.inputs if "_pages." in spec.name), "")
    for layer in range(text.num_hidden_layers):
        for kind in "kv":
            inputs[f"{kind}_pages.{layer}"] = (
                (pages,) if pages in ROW_TYPES else tuple(ROW_TYPES),
                (None, heads, manifest.page_size, head_dim),
            )
            outputs[f"{kind}_new.{layer}"] = (
                ROW_TYPES.get(pages, ()),
                (None, heads, None, head_dim),
            )
    return inputs, outputs


_TABLES = (("cos", "new"), ("sin", "new"), ("cos", "ctx"), ("sin", "ctx"))


def _vision_encoder(
    manifest: Manifest, plan: PlanSpec
) -> tuple[dict[str, Expected], dict[str, Expected]]:
    config, compute, index = manifest.model.vision, (plan.compute_type,), ("int32",)
    window = window_patches(config)
    inputs: dict[str, Expected] = {"patches": (compute, (None, config.patch_dim))}
    inputs |= dict.fromkeys(("cos", "sin"), (compute, (None, config.head_dim // 2)))
    full = len(set(config.fullatt_block_indexes) & set(range(config.depth)))
    if full < config.depth:
        inputs["window_index"] = (index, (None, window))
        inputs["window_inverse"] = (index, (None,))
        inputs["window_mask"] = (compute, (None, 1, 1, window))
    if full:
        inputs["frame_index"] = (index, (None, None))
        inputs["frame_inverse"] = (index, (None,))
    return inputs, {"embeds": (compute, (None, config.out_hidden_size))}


def _tensor_complaints(
    kind: str, specs: Sequence[TensorSpec], expected: Mapping[str, Expected]
) -> Iterator[str]:
    found = {spec.name: spec for spec in specs}
    for name in sorted(expected.keys() ^ found.keys()):
        yield f"the {kind} {name} is {'missing' if name in expected else 'unknown'}"
    for name, (types, shape) in expected.items():
        spec = found[name]
        sizes = tuple(size if isinstance(size, int) else None for size in spec.shape)
        if spec.dtype not in types or sizes != shape:
            yield f"its {kind} {name} is {spec.dtype} {list(spec.shape)}"


def _profile_complaints(part: PartName, plan: PlanSpec) -> Iterator[str]:
    if tuple(profile.name for profile in plan.profiles) != PROFILES[part]:
        yield f"its profiles are not {' and '.join(PROFILES[part])}"
    for profile in plan.profiles:
        if profile.inputs.keys() != {spec.name for spec in plan.inputs}:
            yield f"the profile {profile.name} is of other inputs"
            return
        for spec in plan.inputs:
            bounds = profile.inputs[spec.name]
            sizes = (bounds.minimum, bounds.optimum, bounds.maximum)
            if any(len(shape) != len(spec.shape) for shape in sizes):
                yield f"the profile {profile.name} gives {spec.name} another number of dimensions"
                return
            for size, low, best, high in zip(spec.shape, *sizes, strict=True):
                fixed = not isinstance(size, int) or low == high == size
                if not (0 < low <= best <= high and fixed):
                    yield f"the profile {profile.name} has no such sizes of {spec.name}"
