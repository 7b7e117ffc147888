"""A bundle of the tiny checkpoint whose K/V is held in codes."""

import shutil
from pathlib import Path

from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import SilentReporter
from framesink.runtime.bundle import Bundle
from framesink.runtime.models.companion_files import companion_files
from framesink.runtime.models.quantization import CacheScheme, LinearScheme
from reference.quantized_checkpoint import write_quantized_checkpoint


def build_coded_bundle(checkpoint: Path, directory: Path, scheme: CacheScheme) -> Bundle:
    """Quantize the cache of `checkpoint` alone, with scales that hold all its keys and values, and
    build it into `directory`."""
    quantized = directory / "checkpoint"
    write_quantized_checkpoint(
        checkpoint, quantized, LinearScheme.UNQUANTIZED, scheme, least_range=4.0
    )
    for file in companion_files(checkpoint):
        shutil.copy(file, quantized)
    options = BuildOptions(
        quantized,
        directory / "bundle",
        plans=False,
        executed_type="float32",
        max_streams=3,
        max_context=4096,
    )
    build_bundle(options, SilentReporter())
    return Bundle.open(directory / "bundle", check="sizes")
