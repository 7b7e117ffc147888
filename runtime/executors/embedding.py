"""The token embedding on the host: a token's row is looked up there and sent where it is needed."""

from framesink.runtime.arrays import AnyArray
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BundleError
from framesink.runtime.models.safetensors import read_header, read_tensor


def find_embedding(bundle: Bundle) -> AnyArray:
    """The token embedding `[vocab, hidden]`, memory-mapped from the bundle's weights.

    Raises BundleError if it is not among them.
    """
    name = bundle.manifest.embedding_tensor
    for file in bundle.manifest.weights:
        tensors = read_header(bundle.path(file))
        if name in tensors:
            return read_tensor(tensors[name])
    raise BundleError(
        f"The bundle {bundle.directory} has no token embedding {name}; build it again."
    )
