"""The quality gate: how close a quantized bundle must stay to its 16-bit checkpoint."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import OptionError, VerificationError

VERIFICATION_NAME = "verification.json"


@dataclass(frozen=True, slots=True)
class QualityGate:
    """The least share of equal likeliest tokens, and the largest mean KL divergence in nats."""

    top1: float
    kl: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """A gate written as `top1=0.98,kl=0.02`; either may stand alone.

        Raises OptionError for anything else.
        """
        values = {"top1": 0.0, "kl": float("inf")}
        seen = set()
        for part in text.split(","):
            match = re.fullmatch(r"\s*(top1|kl)\s*=\s*(\d+(?:\.\d+)?|\.\d+)\s*", part)
            if match is None or match[1] in seen:
                raise OptionError(
                    f"--gate {text[:64]!r} cannot be read; write it as top1=0.98,kl=0.02."
                )
            seen.add(match[1])
            values[match[1]] = float(match[2])
        if values["top1"] > 1.0:
            raise OptionError(
                f"--gate top1={values['top1']:g} can never be reached; 1 is the most."
            )
        return cls(**values)

    def __str__(self) -> str:
        bounds = [f"top1={self.top1:g}"] if self.top1 > 0.0 else []
        return ",".join([*bounds, f"kl={self.kl:g}"] if self.kl < float("inf") else bounds)


DEFAULT_GATE = QualityGate(top1=0.98, kl=0.02)


class Verification(BaseModel):
    """`verification.json`: what was measured of a bundle against its 16-bit checkpoint.

    `kl` is the mean KL divergence of the next-token distribution in nats, `worst_kl` the largest,
    `top1` the share of tokens whose likeliest candidate is the checkpoint's, over `tokens` tokens
    forced on both in `chunks` streamed chunks of `source`. `reference` is the checkpoint's name,
    `executor` what ran the bundle, `gate` what was asked (None: nothing).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: str
    executor: str
    source: str
    chunks: int
    tokens: int
    kl: float
    worst_kl: float
    top1: float
    gate: str | None = None

    def check(self, gate: QualityGate, *, video_option: str) -> None:
        """Raises VerificationError, with what was measured and asked, where the gate is not
        reached. `video_option` is how other video is given."""
        if not (self.top1 >= gate.top1 and self.kl <= gate.kl):
            raise VerificationError(
                f"The bundle is too far from {self.reference}: top-1 agreement {self.top1:.4f} and "
                f"mean KL {self.kl:.4g} nats over {self.tokens} tokens ({self.source}), asked "
                f"{gate}; give it video of the kind it is for with {video_option}, quantize less, "
                "or ask for less with --gate."
            )

    def write(self, directory: Path) -> None:
        """Write `verification.json` into a bundle's directory."""
        (directory / VERIFICATION_NAME).write_text(self.model_dump_json(indent=2) + "\n")


def read_verification(bundle: Bundle) -> Verification | None:
    """What was measured when the bundle was built, if anything was.

    Raises VerificationError if the file is malformed.
    """
    name = bundle.manifest.verification
    if name is None:
        return None
    path = bundle.path(name)
    try:
        return Verification.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise VerificationError(f"{path} cannot be read; build the bundle again.") from error
