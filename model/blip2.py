"""The vision part: an EVA vision transformer, a Q-Former with a fixed number of queries, and a projection.

    image float32[batch, 3, H, W] → EVAViT [batch, 1 + patches, vit hidden]
                                  → QFormer [batch, queries, qformer hidden] → glm_proj [batch, queries, hidden]

Every size comes from the checkpoint's `model_config.json` (`eva_args`, `qformer_args`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from model.attention import FusedAttentionMixin
from model.data.image_processor import BlipImageEvalProcessor  # noqa: F401  (where scripts of 2023 import it from)
from model.sat_compat import import_sat, model_parallel

import_sat()

from sat.model import BaseMixin, BaseModel, ViTModel  # noqa: E402  (sat can be imported only after import_sat)
from sat.model.official.vit_model import ViTProperty  # noqa: E402


def with_gradient_of_one(logits: torch.Tensor) -> torch.Tensor:
    """logits, of whose gradient each model-parallel process hands on its share.

    The vision part is whole on each, with the same gradient. SAT's transformer adds them up all the same.
    """
    ranks = model_parallel().ranks
    if ranks > 1 and logits.requires_grad:
        logits.register_hook(lambda gradient: gradient / ranks)
    return logits


class FinalLayerNormMixin(BaseMixin):
    """A layer norm of every position, in place of ViT's class head."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # torch's own eps, not the vision tower's 1e-6: the checkpoint was trained and released with it.
        self.ln_vision = torch.nn.LayerNorm(hidden_size)

    def final_forward(self, logits: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.ln_vision(with_gradient_of_one(logits))


class EVAViT(ViTModel):
    """EVA ViT-g: SAT's ViT with a final layer norm in place of the class head."""

    def __init__(self, args: Any, transformer: torch.nn.Module | None = None, **kwargs: Any) -> None:
        args.num_classes = 1  # released configs say 0, of which torch warns; the head is deleted in the next lines
        super().__init__(args, transformer=transformer, **kwargs)
        self.del_mixin("cls")
        self.add_mixin("cls", FinalLayerNormMixin(args.hidden_size))
        self.add_mixin("fused-attention", FusedAttentionMixin())

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Features [batch, pre_len + patches, hidden] of image [batch, 3, H, W]."""
        class_token = image.new_zeros((image.shape[0], 1), dtype=torch.long)
        everything_visible = image.new_ones((1, 1))
        return super().forward(
            input_ids=class_token, position_ids=None, attention_mask=everything_visible, image=image
        )[0]

    def set_image_size(self, edge: int) -> None:
        """Take images of edge × edge pixels from now on, edge being a multiple of the patch size.

        SAT interpolates the patches' position embeddings bicubically, without aligned corners, in float32 whatever the
        weights' dtype.
        """
        old = self.transformer.property
        if tuple(old.image_size) != (edge, edge):
            new = ViTProperty((edge, edge), old.patch_size, old.pre_len, old.post_len)
            self.get_mixin("pos_embedding").reinit(self, property=new)


class QFormer(BaseModel):
    """A BERT whose words are learned queries. Every other layer attends to the vision tower's output."""

    def __init__(self, args: Any, transformer: torch.nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(args, transformer=transformer, activation_func=torch.nn.functional.gelu, **kwargs)
        del self.transformer.position_embeddings
        self.query_length = args.vocab_size
        self.add_mixin("fused-attention", FusedAttentionMixin())

    def position_embedding_forward(self, position_ids: None, **_: Any) -> None:
        """The queries have no order."""
        return None

    def final_forward(self, logits: torch.Tensor, **_: Any) -> torch.Tensor:
        return with_gradient_of_one(logits)

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """The queries' hidden states [batch, queries, hidden] after attending to features [batch, positions, vit hidden]."""
        queries = torch.arange(self.query_length, device=features.device).expand(features.shape[0], -1)
        everything_visible = features.new_ones((1, 1))
        return super().forward(
            input_ids=queries,
            position_ids=None,
            attention_mask=everything_visible,
            encoder_outputs=features,
            cross_attention_mask=everything_visible,
        )[0]


class BLIP2(torch.nn.Module):
    """An image becomes a fixed number of embeddings of the language model's width."""

    def __init__(self, eva_args: Mapping[str, Any], qformer_args: Mapping[str, Any], hidden_size: int, **kwargs: Any):
        """Build the three parts; kwargs (such as params_dtype) go to both SAT models.

        hidden_size is the language model's. The released script hard-coded it, and the Q-Former's, as 4096 and 768.
        """
        super().__init__()
        self.config = {"vit": eva_args, "qformer": qformer_args}
        self.vit = EVAViT(EVAViT.get_args(**eva_args), **kwargs)
        self.qformer = QFormer(QFormer.get_args(**qformer_args), **kwargs)
        self.glm_proj = torch.nn.Linear(qformer_args["hidden_size"], hidden_size)
        self.is_away = False

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """The Q-Former's output [batch, queries, width] for image [batch, 3, H, W]; see `has_fixed_features`."""
        return self.qformer(self.vit(image))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embeddings [batch, image_length, hidden] of image [batch, 3, H, W]."""
        return self.glm_proj(self.features(image))

    def send_away(self, is_kept: bool) -> None:
        """Move ViT and Q-Former to host memory, or forget their weights. Moving the model leaves them where they are."""
        self.is_away = True
        for part in (self.vit, self.qformer):
            part.cpu() if is_kept else part.to("meta")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if not self.is_away:
            return super()._apply(fn, recurse)
        self.glm_proj._apply(fn)
        return self

    def is_trained(self) -> bool:
        """Whether any weight here is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def has_fixed_features(self) -> bool:
        """Whether the `features` of an image stay the same throughout training, and so can be kept."""
        return not any(p.requires_grad for part in (self.vit, self.qformer) for p in part.parameters())
