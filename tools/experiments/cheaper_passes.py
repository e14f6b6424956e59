"""A published idea for cheaper passes, attention-guided token dropping; docs/results_one_seed.md has what it gave.

A plugin (docs/extending.md): `plugins=[tools/experiments/cheaper_passes.py] method=agat_n_fgsm`. It knows timm's plain
ViT alone, of which it takes blocks apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fulllora_dist.data.batch import Batch
from fulllora_dist.methods.base import WeightStep, register_method
from fulllora_dist.methods.n_fgsm import NFGSM, NFGSMSettings


def _blocks(model: Any) -> list[Any]:
    return list(model.backbone.blocks)


class AGATSettings(NFGSMSettings):
    name: Literal["agat_n_fgsm"] = "agat_n_fgsm"  # type: ignore[assignment]
    keep: float = Field(0.7, gt=0, le=1)
    """Share of the patch tokens that continue at each of the blocks in `at`."""
    at: tuple[int, ...] = (3, 6, 9)
    """Blocks (from 0) before which tokens are dropped."""


@register_method
class AGAT(NFGSM):
    """N-FGSM whose passes, the weight step's included, drop the patch tokens that get least attention (Wu et al.,
    "Towards efficient adversarial training on vision transformers", arXiv 2207.10498)."""

    Settings = AGATSettings

    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        with dropping(engine.attack_view, self.settings.keep, self.settings.at):
            return super().step(engine, batch, step)


@contextmanager
def dropping(model: nn.Module, keep: float, at: tuple[int, ...]) -> Iterator[None]:
    """Within, `keep` of the patch tokens pass each of the blocks `at` and those behind it; class tokens always do."""
    blocks, prefix = _blocks(model), model.backbone.num_prefix_tokens  # type: ignore[union-attr]

    def drop(block: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        (tokens,) = args
        attention = _attention_received(block, tokens.detach())[:, prefix:]
        count = max(1, round(keep * attention.shape[1]))
        kept = attention.topk(count, dim=1).indices.sort(dim=1).values + prefix
        first = torch.arange(prefix, device=tokens.device).expand(len(tokens), prefix)
        index = torch.cat([first, kept], dim=1)[:, :, None].expand(-1, -1, tokens.shape[2])
        return (tokens.gather(1, index),)

    handles = [blocks[i].register_forward_pre_hook(drop) for i in at]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _attention_received(block: Any, tokens: Tensor) -> Tensor:
    """[B, N]: how much each token of [B, N, C] is looked at in `block`, over all heads and queries."""
    attn = block.attn
    q, k, _ = (
        attn.qkv(block.norm1(tokens)).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    scores = (attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)
    return scores.float().softmax(dim=-1).sum(dim=(1, 2))
