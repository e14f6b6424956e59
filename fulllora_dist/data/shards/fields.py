"""Which members of a WebDataset sample are its image and its label, and which class the label means."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.classes import MAX_CLASSES

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
_NAMED = 8  # members that a message shows


@dataclass(frozen=True)
class Field:
    """One member of a sample: what webdataset yields under `extension`, in lower case. `offset` is that of its data;
    `crc32` is that of an image, `text` the data where it may hold a label."""

    extension: str
    offset: int
    size: int
    crc32: int = 0
    text: bytes = b""


@dataclass(frozen=True)
class FieldNames:
    """Where image and label of a sample are found, and which labels there are.

    Attributes:
        label: field of a .json that holds the label, where there is no .cls.
        image: the member that is the image, as webdataset names it (`jpg`, `input.jpg`); None: the only one of
            `IMAGE_EXTENSIONS`.
        classes: how many; None: as many as the labels say.
        names: of the classes, which a label may be instead of a number.
    """

    label: str = "label"
    image: str | None = None
    classes: int | None = None
    names: tuple[str, ...] | None = None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names or ())}

    def check(self) -> None:
        """Raise UserError for an image that is none."""
        if self.image is not None and last_extension(self.image) not in IMAGE_EXTENSIONS:
            raise UserError(
                f"image_field must end in {', '.join(IMAGE_EXTENSIONS)} (as jpg or input.jpg), got {self.image!r}"
            )

    def images(self, extensions: Collection[str]) -> list[str]:
        """Those that could be the image."""
        return [name for name in ((self.image,) if self.image else IMAGE_EXTENSIONS) if name in extensions]

    def lacking(self, extensions: Collection[str]) -> str | None:
        """What keeps members with these extensions from being a sample; None where nothing does."""
        images = self.images(extensions)
        listed = f"its members are {', '.join(list(extensions)[:_NAMED])}"
        if any("." in name for name in extensions):
            listed += "; a key ends at the first dot of a file name"
        if len(images) != 1:
            taken = self.image or ", ".join(IMAGE_EXTENSIONS)
            others = images or [name for name in extensions if last_extension(name) in IMAGE_EXTENSIONS]
            remedy = f"; --image-field {others[0]} takes that one" if others else ""
            return f"must have one image ({taken}), has {len(images)}: {listed}{remedy}"
        if not any(name in extensions for name in LABEL_EXTENSIONS):
            return f"has no label: neither .cls nor .json; {listed}"
        return None

    def label_of(self, fields: Mapping[str, Field], sample: str) -> int:
        """The class index. UserError, naming the sample, where the label is none."""
        if "cls" in fields:
            label = fields["cls"].text.decode("utf-8-sig", "replace").strip()
        else:
            label = self._json_label(fields["json"].text, sample)
        if (number := self._numbers.get(label)) is not None:
            if re.fullmatch(r"[0-9]+", label) and int(label) != number:
                raise UserError(f"{sample} has label {label}, which is an index and also the name of class {number}")
            return number
        if not re.fullmatch(r"[0-9]+", label):
            among = "; --classes FILE gives class names in label order" if not self.names else ", nor a class name"
            raise UserError(f"{sample} has the label {label[:40]!r}, which is not a class index{among}")
        bound = MAX_CLASSES if self.classes is None else self.classes
        if len(label) > len(str(bound)) + 9 or int(label) >= bound:
            limit = f"there are {bound} classes" if self.classes is not None else f"it must be below {bound}"
            raise UserError(f"{sample} has label {label[:40]}; {limit}")
        return int(label)

    def _json_label(self, data: bytes, sample: str) -> str:
        try:
            holder = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{sample}: its .json cannot be read ({error})") from error
        value = holder.get(self.label) if isinstance(holder, dict) else None
        if value is None:
            raise UserError(
                f"{sample}: its .json has no field {self.label!r}; --label-field names the one that holds the label"
            )
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise UserError(f"{sample} has the label {json.dumps(value)[:40]}, which is not a class index")
        return str(value).strip()


def last_extension(extension: str) -> str:
    """`jpg` of `input.jpg`."""
    return extension.rpartition(".")[2]
