"""Two published ideas for cheaper attack passes, as methods of docs/results_one_seed.md, which has what they gave.

A plugin (docs/extending.md): `plugins=[tools/experiments/cheaper_passes.py] method=agat_n_fgsm` or `method=yopo`.
Both know timm's plain ViT alone, of which they take blocks apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fulllora_dist.attacks.pgd import attack_mode
from fulllora_dist.attacks.threat import in_box
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods.base import MetricAverager, WeightStep, register_method
from fulllora_dist.methods.free import Free, FreeSettings
from fulllora_dist.methods.n_fgsm import NFGSM, NFGSMSettings


def _blocks(model: Any) -> list[Any]:
    return list(model.backbone.blocks)


# -- attention-guided token dropping -------------------------------------------------------------------------------


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


# -- you only propagate once ---------------------------------------------------------------------------------------


class YOPOSettings(FreeSettings):
    name: Literal["yopo"] = "yopo"  # type: ignore[assignment]
    inner: int = Field(3, ge=1)
    """n: steps of the perturbation through the first block alone, after each full pass."""
    step: float = Field(0.5, gt=0)
    """Step size in units of eps."""


@register_method
class YOPO(Free):
    """One full pass gives the adapter's gradient and the loss' gradient behind the first layers; that one is kept while
    the perturbation moves through them in n steps (Zhang et al., arXiv 1905.00877).

    First layers are the patch embedding and one block: the embedding alone is linear but for its branch, so that steps
    through it would only repeat one direction. The paper sums the weights' gradients of m passes into one update; here
    each pass is an update, as Free's are, since the engine makes one backward pass a micro-batch.
    """

    Settings = YOPOSettings

    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        delta, threat = self._delta_for(batch), self.threat_at(step)
        size = self.step_size(self.settings.step * threat.eps, step)
        for _ in range(self.updates_per_batch):
            means = MetricAverager()
            for micro in engine.accumulate(batch):
                part = delta[micro.slot - batch.slot :][: len(micro)]
                x, y = self.mix(micro, step, engine.classes)
                with _gradient_behind_first_block(engine.attack_view) as behind:
                    logits = engine(in_box(x + part))
                    loss = self.cross_entropy(logits, y)
                    engine.backward(loss)
                means.add(loss, logits, y)
                with attack_mode(engine.attack_view):
                    for _ in range(self.settings.inner):
                        leaf = in_box(x + part).requires_grad_()
                        out = _first_block(engine.attack_view, leaf)
                        (gradient,) = torch.autograd.grad((out * behind[0]).sum(), leaf)
                        part.copy_(threat.project(part + size * threat.steepest(gradient)))
        return means.result()


@contextmanager
def _gradient_behind_first_block(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within, a backward pass appends the gradient by the first block's output."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        output.register_hook(found.append)

    handle = _blocks(model)[0].register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


class _Reached(Exception):
    """Ends a forward pass at the first block."""


def _first_block(model: nn.Module, pixels: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, output: Tensor) -> None:
        kept.append(output)
        raise _Reached

    handle = _blocks(model)[0].register_forward_hook(stop)
    try:
        model(pixels)
    except _Reached:
        pass
    finally:
        handle.remove()
    return kept[0]
