"""What the CUDA driver says about the first GPU, without any package but the standard library."""

import ctypes

_COMPUTE_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_COMPUTE_CAPABILITY_MINOR = 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR


def current_sm() -> str | None:
    """The architecture of GPU 0, such as `sm89`; None on a machine without a usable GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    major = ctypes.c_int()
    minor = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    for value, attribute in (
        (major, _COMPUTE_CAPABILITY_MAJOR),
        (minor, _COMPUTE_CAPABILITY_MINOR),
    ):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
    return f"sm{major.value}{minor.value}"
