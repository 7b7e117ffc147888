"""Calibration statistics of a transformers model over one prompt with video, taken by hooks."""

from typing import TYPE_CHECKING, Any

from framesink.calibration.collector import StatisticsCollector
from framesink.calibration.fingerprint import checkpoint_fingerprint
from framesink.calibration.statistics import Statistics
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.weights import canonical_name

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration


def video_prompt(model: "Qwen2_5_VLForConditionalGeneration", seed: int = 0) -> dict[str, Any]:
    """Inputs of a forward: some text, two temporal steps of 4 × 4 patches of noise, more text."""
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(seed)
    video = [config.video_token_id] * (2 * 4 * 4 // config.vision_config.spatial_merge_size**2)
    words = torch.randint(20, 300, (24,), generator=generator).tolist()
    vision = [config.vision_start_token_id, *video, config.vision_end_token_id]
    ids = torch.tensor([[*words[:4], *vision, *words[4:]]])
    patch_dim = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    patches = torch.randn(32, patch_dim, generator=generator, dtype=torch.float64)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": patches.to(model.dtype),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": (ids == config.video_token_id).long() * 2,
    }


def observe_model(
    model: "Qwen2_5_VLForConditionalGeneration", checkpoint: Checkpoint, inputs: dict[str, Any]
) -> Statistics:
    """What one forward over `inputs` shows of every linear layer, and of K and V.

    The model attends with transformers' `eager` function.
    """
    import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    collector = StatisticsCollector()
    hooks = []
    stored: dict[int, torch.Tensor] = {}

    def watch(name: str, module: "torch.nn.Module") -> None:
        def before(_: "torch.nn.Module", arguments: tuple["torch.Tensor", ...]) -> None:
            rows = arguments[0]
            collector.linear_input(name, rows.reshape(-1, rows.shape[-1]))

        def after(
            layer: "torch.nn.Linear", _: tuple["torch.Tensor", ...], output: "torch.Tensor"
        ) -> None:
            keys = (output - layer.bias)[0]
            stored[int(name.split(".")[2])] = keys

        hooks.append(module.register_forward_pre_hook(before))
        if name.endswith("k_proj"):
            hooks.append(module.register_forward_hook(after))

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(canonical_name(path), module)

    attend = qwen.eager_attention_forward

    def recording(
        module: "torch.nn.Module",
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        *arguments: Any,
        **options: Any,
    ) -> Any:
        layer = getattr(module, "layer_idx", None)
        if layer is not None:
            rotated = key[0].transpose(0, 1)
            collector.keys(layer, stored[layer].view(rotated.shape), rotated)
            collector.values(layer, value[0].transpose(0, 1))
        return attend(module, query, key, value, *arguments, **options)

    qwen.eager_attention_forward = recording
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        qwen.eager_attention_forward = attend
        for hook in hooks:
            hook.remove()
    return collector.statistics(
        checkpoint=checkpoint_fingerprint(checkpoint), source="a prompt", chunks=1
    )
