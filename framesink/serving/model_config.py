"""The configuration of every served model, made from the bundle and the options."""

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from framesink.runtime.manifest import Manifest
from framesink.serving import contract
from framesink.serving.options import PARAMETER, ModelContext

# Refused sessions keep their slot until the idle limit, and no free slot means waiting: so there
# are far more of them than sessions. 65,536 cost the server 45 MB.
SEQUENCE_SLOTS = 65_536
# The language model ends idle sessions, and says so. Triton counts from a sequence's last request,
# also while that is being answered, and says only that it does not know the sequence: so its own
# limit comes later.
IDLE_FACTOR = 2
IDLE_EXTRA_SECONDS = 60

_CONTROLS = {
    "START": triton.ModelSequenceBatching.Control.CONTROL_SEQUENCE_START,
    "END": triton.ModelSequenceBatching.Control.CONTROL_SEQUENCE_END,
}
# What the ensemble's steps take and give.
_STEPS = {
    contract.PREPROCESS: (contract.CHUNK_INPUTS, contract.PREPROCESSED),
    contract.VISION_ENCODER: ((contract.PATCHES, contract.GRID), (contract.EMBEDDINGS,)),
    contract.LANGUAGE_MODEL: (
        (*contract.ENCODED, contract.QUESTION),
        contract.EVENT_OUTPUTS,
    ),
    contract.POSTPROCESS: (contract.EVENT_OUTPUTS, contract.EVENT_OUTPUTS),
}


def model_configs(
    manifest: Manifest, context: ModelContext, *, gpu: bool
) -> dict[str, triton.ModelConfig]:
    """The configuration of each model to serve, by its name.

    With `gpu` the language model runs on the first GPU; everything else is on the CPU.
    """
    names = [model.name for model in contract.MODELS]
    if not context.options.serves_ensemble:
        names = [contract.LANGUAGE_MODEL]
    sizes = {
        contract.PATCH_DIM: manifest.preprocess.patch_dim,
        contract.HIDDEN: manifest.model.text.hidden_size,
    }
    return {
        name: _ensemble()
        if name == contract.STREAMING_VLM
        else _python_model(contract.model(name), sizes, context, gpu=gpu)
        for name in names
    }


def config_text(config: triton.ModelConfig) -> str:
    """A configuration as Triton reads it from `config.pbtxt`."""
    text: str = text_format.MessageToString(config)
    return text


def _base(model: contract.Model) -> triton.ModelConfig:
    config = triton.ModelConfig(name=model.name)
    for tensor in model.inputs:
        config.input.add(
            name=tensor.name,
            data_type=_data_type(tensor),
            dims=tensor.wire_dims,
            optional=tensor.optional,
        )
    for tensor in model.outputs:
        config.output.add(name=tensor.name, data_type=_data_type(tensor), dims=tensor.wire_dims)
    return config


def _data_type(tensor: contract.Tensor) -> "triton.DataType.ValueType":
    name = "STRING" if tensor.wire_type == "BYTES" else tensor.wire_type
    return triton.DataType.Value(f"TYPE_{name}")


def _python_model(
    model: contract.Model, sizes: dict[str, int], context: ModelContext, *, gpu: bool
) -> triton.ModelConfig:
    """`sizes` are the bundle's, of dimensions the contract names; packed shapes must have them."""
    config = _base(model)
    config.backend = "python"
    named = {size for tensor in (*model.inputs, *model.outputs) for size in tensor.shape}
    for name, size in sizes.items():
        if name in named:
            config.parameters[name].string_value = str(size)
    config.parameters[PARAMETER].string_value = context.model_dump_json()
    group = config.instance_group.add(count=1)
    group.kind = triton.ModelInstanceGroup.KIND_CPU
    if model.decoupled:
        if gpu:
            group.kind = triton.ModelInstanceGroup.KIND_GPU
            group.gpus.append(0)
        config.model_transaction_policy.decoupled = True
        _batch_sequences(config.sequence_batching, context.options.idle_seconds)
    return config


def _batch_sequences(batching: triton.ModelSequenceBatching, idle_seconds: float) -> None:
    triton_seconds = IDLE_FACTOR * idle_seconds + IDLE_EXTRA_SECONDS
    batching.max_sequence_idle_microseconds = round(triton_seconds * 1e6)
    batching.oldest.max_candidate_sequences = SEQUENCE_SLOTS
    for name, kind in _CONTROLS.items():
        control = batching.control_input.add(name=name).control.add(kind=kind)
        control.int32_false_true.extend([0, 1])
    batching.control_input.add(name="CORRELATION_ID").control.add(
        kind=triton.ModelSequenceBatching.Control.CONTROL_SEQUENCE_CORRID,
        data_type=triton.DataType.TYPE_UINT64,
    )


def _ensemble() -> triton.ModelConfig:
    """Each step reads what the request or a step before it named so."""
    model = contract.model(contract.STREAMING_VLM)
    config = _base(model)
    config.platform = "ensemble"
    known = {tensor.name: tensor.name for tensor in model.inputs}
    for name, (inputs, outputs) in _STEPS.items():
        step = config.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        for tensor in inputs:
            step.input_map[tensor.name] = known[tensor.name]
        for tensor in outputs:
            last = name == contract.POSTPROCESS
            known[tensor.name] = tensor.name if last else f"{name}.{tensor.name}"
            step.output_map[tensor.name] = known[tensor.name]
    return config
