"""What files say of themselves, checked: each field has a type, a range and a length, and there are no others.

A file comes from anybody: its metadata are read into these classes before anything uses them, with texts made printable. Sizes
that a network is to have are bounded further by what the file holds (``sizes.within``).
"""

from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..errors import ModelFileError
from ..wording import one_line, printable
from ..writing import as_json

#: Characters of metadata as JSON, levels of what is nested in it, and characters of one text.
MOST_METADATA, MOST_LEVELS, MOST_TEXT = 1 << 20, 16, 1 << 14
#: Characters of the name of a model.
MOST_NAME = 500
#: The largest option of an architecture, count or index.
MOST_SIZE = 1 << 20

Word = Annotated[str, Meta(pattern=r"\A[\w.-]{1,100}\Z")]
Size = Annotated[int, Meta(ge=0, le=MOST_SIZE)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
#: A probability that decides nothing where it is 0 or 1.
Threshold = Annotated[float, Meta(gt=0, lt=1)]
#: ``digits``, or a name of the Hub with the reading options of ``data.datasets``: never a path, nor a builder of the library.
DatasetName = Annotated[
    str,
    Meta(
        pattern=r"\A(digits|[A-Za-z0-9][\w.-]{0,99}/[A-Za-z0-9_][\w.-]{0,99}(\?[^\x00-\x1f\x7f]{1,200})?)\Z",
        max_length=400,
    ),
]
Option = bool | Annotated[int, Meta(ge=-MOST_SIZE, le=MOST_SIZE)] | float | Annotated[str, Meta(max_length=100)] | None
Options = dict[
    Word, Option | Annotated[list[Option | Annotated[list[Option], Meta(max_length=64)]], Meta(max_length=64)]
]
Schema = TypeVar("Schema")


class Fields(Struct, forbid_unknown_fields=True):
    """An object with these fields and no others."""


class ImagesFields(Fields):
    """The data set that images are from; the file itself holds them where nothing is said."""

    dataset: Annotated[str, Meta(max_length=MOST_TEXT)] | UnsetType = UNSET
    split: Word | UnsetType = UNSET
    fingerprint: Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if len({field is UNSET for field in (self.dataset, self.split, self.fingerprint)}) > 1:
            raise ValueError("dataset, split and fingerprint go together")


class DataFields(Fields):
    """The defender's images, and those to score on."""

    clean: ImagesFields
    test: ImagesFields | UnsetType = UNSET


class NormaliseFields(Fields):
    """The normalisation in front of the network."""

    mean: Annotated[list[float], Meta(min_length=1, max_length=64)]
    std: Annotated[list[float], Meta(min_length=1, max_length=64)]


class TriggerFields(Fields):
    """The attack and its parameters, whose types the attack checks."""

    attack: Word
    parameters: dict[Word, Any]


class ModelFields(Fields):
    """An infected model, beside its tensors."""

    format: str
    name: Annotated[str, Meta(max_length=MOST_NAME)]
    architecture: Options
    target: Size | Literal["all-to-all"] | None
    facts: dict[str, Any]
    data: DataFields
    normalise: NormaliseFields | UnsetType = UNSET
    trigger: TriggerFields | UnsetType = UNSET


def checked(metadata: Any, schema: type[Schema], what: str) -> Schema:
    """Metadata of JSON's types as an object of any type that msgspec converts to, with ``plain`` texts.

    Raises:
        ModelFileError: a field is missing, unknown, of another type, or out of its range; ``what`` names the file.
    """
    try:
        names = {field.name for field in fields(schema)} if is_dataclass(schema) else ()
        if names and isinstance(metadata, dict) and (unknown := sorted(metadata.keys() - names)):
            raise ValueError(f"it has no {unknown[0]}")
        return msgspec.convert(plain(metadata), schema)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise ModelFileError(f"{what} is not what such a file must be: {error}") from error


def free(facts: Any, what: str) -> dict[str, Any]:
    """Facts as a file keeps them, and as they are read: JSON of printable texts, whose line ends stay; names are one line.

    Raises:
        ModelFileError: they are none, or too large; ``what`` names the file.
    """
    try:
        return msgspec.json.decode(as_json(plain(facts, lines=True)), type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise ModelFileError(f"the facts of {what} are no JSON that a file keeps: {error}") from error


def plain(value: Any, level: int = 0, lines: bool = False) -> Any:
    """The same value with printable texts, of one line each unless ``lines``.

    Raises:
        ValueError: it is nested too deep, has a text that is too long, or names that differ in control characters alone.
    """
    if level > MOST_LEVELS:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
    if isinstance(value, str):
        if len(value) > MOST_TEXT:
            raise ValueError(f"a text has {len(value):,} characters; {MOST_TEXT:,} is the most")
        return printable(value.replace("\r\n", "\n")) if lines else one_line(value, MOST_TEXT)
    if isinstance(value, list | tuple):
        return [plain(element, level + 1, lines) for element in value]
    if isinstance(value, dict):
        tidy = {plain(key, level + 1): plain(element, level + 1, lines) for key, element in value.items()}
        if len(tidy) < len(value):
            raise ValueError("two of its names differ in control characters alone")
        return tidy
    return value


def fits(value: object, kind: Any) -> bool:
    """Whether msgspec converts the value to that type."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
