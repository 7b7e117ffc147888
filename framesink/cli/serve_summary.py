"""What `framesink serve` says once it is ready."""

from framesink.serving.contract import LANGUAGE_MODEL, MODELS, STREAMING_VLM
from framesink.serving.supervisor import Supervisor


def describe_server(supervisor: Supervisor) -> str:
    """Addresses, models, limits and executor of a server that is ready, a line each."""
    options, manifest, engine = supervisor.options, supervisor.manifest, supervisor.engine
    security = "no TLS"
    if options.tls_certificate is not None:
        security = "TLS" if options.tls_client_authority is None else "TLS, clients' certificates"
    models = LANGUAGE_MODEL
    if options.serves_ensemble:
        steps = ", ".join(model.name for model in MODELS if model.name != STREAMING_VLM)
        models = f"{LANGUAGE_MODEL}, and {STREAMING_VLM} over {steps}"
    precisions = f"{manifest.language_model.precision}, K/V {manifest.cache_precision}"
    pages = ""
    if engine.num_pages:  # an executor may have a K/V cache of its own
        pages = f", {engine.num_pages} pages of {manifest.page_size} tokens"
    rows = {
        "serving": f"{manifest.model_name} ({precisions}) of {supervisor.bundle_directory}",
        "gRPC": f"{options.address}:{options.grpc_port} ({security})",
        "health": f"http://{options.address}:{options.http_port}/v2/health/ready",
        "metrics": f"http://{options.address}:{options.metrics_port}/metrics",
        "models": models,
        "executor": engine.executor_reason,
        "capacity": engine.capacity,
        "limits": (
            f"{engine.max_sessions} sessions{pages}; idle {options.idle_seconds:g} s, resume "
            f"{options.resume_seconds:g} s"
        ),
    }
    return "\n".join(f"{name:<9}{value}" for name, value in rows.items())
