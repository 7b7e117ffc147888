"""What TensorRT's parser and builder say while they work, and which of it must stop a build.

TensorRT reports through warnings some things that change results: an input that its parser does
not know is dropped, a weight that does not fit its type is clamped. The list below was read from
the message strings of its ONNX parser and builder libraries.
"""

import re
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]

# Each of these means that the plan computes something else than the graph says.
_WRONG_NUMBERS = (
    r"unused input",
    r"is unused",
    r"ignor(es|ed|ing)\b",
    r"clamp(ed|ing)\b",
    r"default(s|ed|ing) to\b",
    r"will use \w+ instead",
    r"detected NaN",
    r"infinity values",
    r"would overflow",
    r"may cause overflow",
    r"incorrect (results|numbers)",
    r"undefined behavior",
    r"missing (scale|dynamic range)",
    r"requested layer computation precision",
)
_WRONG_NUMBERS_PATTERN = re.compile("|".join(_WRONG_NUMBERS), re.IGNORECASE)

# Of these the pattern above matches some; none of them touches results.
_HARMLESS = (
    r"DLA",
    r"timing cache",
    r"new logger is ignored",
    r"using default stream",
)
_HARMLESS_PATTERN = re.compile("|".join(_HARMLESS), re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BuilderMessage:
    """One message of the builder."""

    severity: Severity
    text: str

    @property
    def means_wrong_numbers(self) -> bool:
        """Whether a plan built in spite of this message could give other results than its graph."""
        if self.severity == "error":
            return True
        if self.severity == "info" or _HARMLESS_PATTERN.search(self.text):
            return False
        return _WRONG_NUMBERS_PATTERN.search(self.text) is not None
