"""open_clip's text side in this project's terms: its tokenizers as tokenizer.json, its text towers as one module.

Letters: N texts, L token positions, D features. Not for serving workers.
"""

from __future__ import annotations

from typing import Any

import tokenizers
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, _clean_canonicalize, _clean_lower, _clean_whitespace
from open_clip.transformer import text_global_pool
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor, nn

from pmgaft.clip.text import Cleaning, Tokenizer
from pmgaft.errors import ModelError

_CLEANINGS: dict[object, Cleaning] = {
    _clean_lower: "lower",
    _clean_whitespace: "whitespace",
    _clean_canonicalize: "canonicalize",
}

# SimpleTokenizer's pattern without the special tokens: a label that spells "<end_of_text>" is text, not a command.
_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def convert_tokenizer(tokenizer: object, context_length: int) -> Tokenizer:
    """An open_clip tokenizer as a `Tokenizer` that gives the same ids.

    One deliberate difference: text such as "<end_of_text>" is tokenized as ordinary characters.
    Raises: ModelError for kinds of tokenizers that cannot be converted.
    """
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None:
        return Tokenizer(_clip_bpe(tokenizer), context_length, _CLEANINGS[tokenizer.clean_fn])
    if isinstance(tokenizer, HFTokenizer) and not tokenizer.tokenizer_mode and not tokenizer.strip_sep_token:
        backend = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
        pad_id = tokenizer.tokenizer.pad_token_id or 0
        return Tokenizer(backend, context_length, _CLEANINGS[tokenizer.clean_fn], pad_id)
    raise ModelError(f"tokenizers of this kind ({type(tokenizer).__name__}) are not supported")


def _clip_bpe(simple: SimpleTokenizer) -> tokenizers.Tokenizer:
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    bpe = tokenizers.Tokenizer(models.BPE(vocab=simple.encoder, merges=merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = (simple.decoder[i] for i in (simple.sot_token_id, simple.eot_token_id))
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, simple.sot_token_id), (end, simple.eot_token_id)]
    )
    return bpe


class TextTower(nn.Module):
    """The text tower of an open_clip model: token ids int64 [N, L], L <= context_length -> unit features [N, D].

    It shares the model's weights and holds nothing of its image tower.
    causal: whether L may be cropped to the longest text, because no token sees what comes after it; where it is False,
    L must be the whole context length.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        owner: Any = model.text if isinstance(getattr(model, "text", None), nn.Module) else model
        plain = hasattr(owner, "token_embedding") and getattr(owner, "cls_emb", None) is None
        if plain and not getattr(owner, "use_pad_mask", False):
            transformer = _Transformer(owner)
            self.causal = transformer.attn_mask is not None and transformer.pool_type in ("argmax", "eos")
            self.tower: nn.Module = transformer
        else:
            self.causal = False
            self.tower = owner

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [N, L] -> unit features [N, D]."""
        return nn.functional.normalize(self.tower(tokens), dim=-1)


class _Transformer(nn.Module):
    """open_clip's native text transformer for any length up to the context: positions and causal mask cropped to L.

    owner: open_clip.CLIP, which keeps the text tower's parts on itself, or open_clip.TextTransformer.
    """

    attn_mask: Tensor | None
    text_projection: nn.Linear | nn.Parameter | None

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.token_embedding = owner.token_embedding
        self.positional_embedding = owner.positional_embedding
        self.transformer = owner.transformer
        self.ln_final = owner.ln_final
        self.text_projection = owner.text_projection
        self.register_buffer("attn_mask", owner.attn_mask, persistent=False)
        self.pool_type = getattr(owner, "text_pool_type", None) or owner.pool_type
        self.end_id = owner.text_eos_id if hasattr(owner, "text_eos_id") else owner.eos_id

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        pooled = self._pooled(x, tokens)
        if self.text_projection is None:
            return pooled
        if isinstance(self.text_projection, nn.Linear):
            return nn.functional.linear(pooled, self.text_projection.weight, self.text_projection.bias)
        return pooled @ self.text_projection

    def _pooled(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[N, L, D] -> [N, D], as open_clip pools, but without an arange: a traced one would name a device for good."""
        if self.pool_type not in ("argmax", "eos"):
            whole: Tensor = text_global_pool(x, tokens, self.pool_type)
            return whole
        end = tokens if self.pool_type == "argmax" else (tokens == self.end_id).int()
        return x.gather(1, end.argmax(dim=-1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
