"""Which checkpoint a calibration belongs to."""

import hashlib

import numpy as np

from framesink.runtime.models.checkpoint import Checkpoint

_SAMPLE_BYTES = 65_536


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) over sizes, names, types, shapes, and the first bytes of every tensor.

    Any training step changes it; reading it touches a small part of the files.
    """
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for name in sorted(checkpoint.names()):
        info = checkpoint.info(name)
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        flat = checkpoint.read(name).reshape(-1)
        sample = np.ascontiguousarray(flat[: _SAMPLE_BYTES // flat.itemsize])
        digest.update(sample.view(np.uint8).data)
    return digest.hexdigest()
