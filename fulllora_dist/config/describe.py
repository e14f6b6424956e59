"""All settings as text."""

from pydantic import BaseModel

from fulllora_dist.config.schema import Config
from fulllora_dist.core.settings import section_of
from fulllora_dist.methods.settings import METHOD_SETTINGS, MethodSettings


def describe_settings() -> str:
    """All settings with type, default and meaning, for `--help-settings`."""
    lines: list[str] = []

    def describe(model: type[BaseModel], prefix: str) -> None:
        for key, field in model.model_fields.items():
            if key == "name" and issubclass(model, MethodSettings):
                continue  # shown in the heading
            section = section_of(field.annotation)
            one = section is field.annotation
            if section is not None and not issubclass(section, MethodSettings) and one:
                describe(section, f"{prefix}{key}.")
                continue
            default = "required" if field.is_required() else f"default {field.default!r}"
            meaning = " ".join((field.description or "").split())
            lines.append(f"  {prefix}{key} ({default})\n      {meaning}")
            if section is not None and not one:
                describe(section, f"{prefix}{key}[].")

    describe(Config, "")
    for name, settings in METHOD_SETTINGS.items():
        lines.append(f"method: {name}")
        describe(settings, "  method.")
    return "\n".join(lines)
