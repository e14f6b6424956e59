"""The whole path on handwritten digits, offline, on two CPU ranks: `make demo`, about three minutes.

    python tools/demo.py [--output runs/demo]

Digits of scikit-learn -> shards -> a small ViT trained on them -> FullLoRA with N-FGSM -> accuracy under attack before
and after -> an image -> a version in MLflow's registry, which the gate makes @champion. The two trainings are
configs/demo_backbone.yaml and configs/demo.yaml under DeepSpeed. The last line of stdout is one JSON object; progress
goes to stderr.
"""

from pathlib import Path

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.parser import Parser


def main() -> None:
    """Run the demo."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder, made anew (default: runs/demo)")
    output = parser.parse_args().output.absolute()
    from demo_steps import run  # --help need not wait for torch

    run(output)


if __name__ == "__main__":
    run_entry(main)
