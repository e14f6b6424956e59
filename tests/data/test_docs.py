"""docs/data.md: its Python runs, its commands are ones that the tools understand."""

import re
import shlex
from pathlib import Path

import pytest

from fulllora_dist.commands import shards as shard_commands
from fulllora_dist.data.index import Index

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_pipeline_runs_and_yields_the_data(shards: Path) -> None:
    (code,) = blocks("python")
    names: dict = {}
    exec(code.replace("s3://bucket/imagenet/train", str(shards)).replace("batch_size=256", "batch_size=8"), names)
    index = Index.load(shards)
    images = [image for _, image in zip(range(32), names["pipeline"], strict=False)]
    assert sorted(label for _, label in images) == sorted(index.labels.tolist())
    assert {image.mode for image, _ in images} == {"RGB"}
    names["stream"].commit(4)
    assert names["stream"].state_dict()["index_hash"] == index.hash


COMMANDS = [
    line.replace("\\\n", "")
    for block in blocks("bash")
    for line in re.findall(r"^python (?:.*\\\n)*.*", block, re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command: str) -> None:
    _, tool, *arguments = shlex.split(command)
    assert (ROOT / tool).is_file()
    parser = {"make_shards": shard_commands.make_parser, "index_shards": shard_commands.index_parser}[Path(tool).stem]()
    assert parser.parse_args(arguments).workers >= 1


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 5


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_settings_are_settings(block: str) -> None:
    import yaml

    from fulllora_dist.data.settings import DataSettings

    settings = DataSettings.model_validate(yaml.safe_load(block)["data"])
    assert settings.randaugment.magnitude == 9
    assert settings.num_workers == 4
