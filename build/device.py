"""Where torch runs the model."""

from importlib.util import find_spec

from framesink.runtime.errors import BuildError, OptionError

INSTALL_HINT = "pip install 'framesink[calibration]'"


def check_device(device: str) -> None:
    """Raise BuildError if torch is missing, OptionError for a device that it cannot use."""
    if find_spec("torch") is None:
        raise BuildError(f"Calibrating a checkpoint needs torch; install it with {INSTALL_HINT}.")
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(f"torch cannot use --device {device}: {reason}") from error
