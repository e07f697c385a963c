"""What the sections of the config are made of: strict tables, and quantities whose units end here."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bnn_driver import units
from bnn_driver.errors import ConfigError


def _quantity(kind: str) -> BeforeValidator:
    def parse(value: object) -> float:
        try:
            return units.parse_quantity(value, kind)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(parse)


Energy = Annotated[float, _quantity("energy"), Field(gt=0)]
Length = Annotated[float, _quantity("length"), Field(ge=0)]
Force = Annotated[float, _quantity("force"), Field(gt=0)]
Stress = Annotated[float, _quantity("stress"), Field(gt=0)]
Seconds = Annotated[float, _quantity("wall time"), Field(ge=0)]
Femtoseconds = Annotated[float, _quantity("time"), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """One table of the config; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=False)
