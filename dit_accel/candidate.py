"""One way to run an attention head, of which a plan gives one to each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit_accel.kernels import PRECISIONS
from dit_accel.patterns import family_named


@dataclass(frozen=True)
class Candidate:
    """One way to run a head: a pattern family, its density and options, a precision, and what its remainder weighs.

    With `remainder` the key blocks that the family leaves out still contribute, each through its mean key and value:
    True or 1 with the weight of all its tokens, another number that many times as much. A mean has less weight than
    its tokens where they are alike but for their size, and more than they deserve where few of them matter, so heads
    differ in what is best. Precisions are those of `dit_accel.kernels.block_sparse_attention`.

    Raises:
        ValueError: an unknown family, option or precision, a density the family cannot have, a remainder of nothing or
            with a negative weight.
    """

    family: str
    density: float
    options: tuple[tuple[str, str | int | float], ...] = ()
    precision: str = "native"
    remainder: float = 0.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        family = family_named(self.family)
        family.check_density(self.density)
        family.with_defaults(dict(self.options))
        if not isinstance(self.remainder, bool | int | float) or not 0 <= self.remainder < math.inf:
            raise ValueError(
                f"remainder: expected true, false or a number from 0, the weight of the means, got {self.remainder!r}"
            )
        object.__setattr__(self, "remainder", float(self.remainder))
        if self.remainder and family.density == 1.0:
            raise ValueError(
                f"remainder: expected false, since family {self.family!r} leaves nothing out, got {self.remainder:g}"
            )
        if self.remainder and self.features:
            raise ValueError(
                f"remainder: expected false beside option 'features' of family {self.family!r}, by which what is left "
                f"out contributes already, got {self.remainder:g}"
            )

    def with_means(self) -> Candidate:
        """The candidate whose left-out blocks contribute through their means, in place of random features."""
        options = tuple(option for option in self.options if option[0] != "features")
        return replace(self, options=options, remainder=True)

    @property
    def features(self) -> tuple[int, int] | None:
        """Number and seed of the random features by which what is left out contributes, see `add_low_rank`."""
        options = family_named(self.family).with_defaults(dict(self.options))
        features = int(options.get("features", 0))
        return (features, int(options["seed"])) if features else None

    @property
    def is_dense(self) -> bool:
        """Whether a layer of such heads runs on the model's own attention."""
        return self.family == "dense" and self.precision == "native"

    @property
    def label(self) -> str:
        """Name that tells candidates apart, such as `window@0.30` or `bands@0.25 order=space`."""
        short = f"{self.density:.2f}"
        density = short if float(short) == self.density else repr(self.density)
        parts = [f"{self.family}@{density}", *(f"{name}={value}" for name, value in self.options)]
        if self.precision != "native":
            parts.append(self.precision)
        if self.remainder:
            parts.append("remainder" if self.remainder == 1 else f"remainder={self.remainder:g}")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as JSON values."""
        return {
            "family": self.family,
            "density": self.density,
            "options": dict(self.options),
            "precision": self.precision,
            # As it is written by hand, and was before it could be a number.
            "remainder": bool(self.remainder) if self.remainder in (0, 1) else self.remainder,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Candidate:
        """Build a candidate from what `to_dict` gave.

        Raises:
            ValueError: a missing or unknown key or a value that makes no candidate.
        """
        keys = {"family", "density", "options", "precision", "remainder"}
        if set(values) != keys:
            raise ValueError(f"expected the keys {sorted(keys)}, got {sorted(values)}")
        options = tuple(sorted(values["options"].items()))
        return cls(values["family"], values["density"], options, values["precision"], values["remainder"])
