"""The sizes of a dense decoder, and how many parameters follow from them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator


class ModelShape(BaseModel):
    """Sizes of a decoder with grouped-query attention and a gated MLP: Llama, Mistral, Qwen 2 and Qwen 3."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    mlp: PositiveInt
    vocabulary: PositiveInt
    tied_embeddings: bool = False
    qkv_bias: bool = False  # Qwen 2 and 2.5
    qk_norm: bool = False  # Qwen 3

    @model_validator(mode="after")
    def _groups_are_whole(self) -> ModelShape:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads can't share {self.kv_heads} KV heads evenly")
        return self

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of one layer: q, k, v and o, gate, up and down, two norms, and what its family adds to them."""
        attention = self.hidden * (2 * self.query_size + 2 * self.kv_size)
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        bias = self.query_size + 2 * self.kv_size if self.qkv_bias else 0
        return attention + 3 * self.hidden * self.mlp + norms + bias

    @property
    def parameters(self) -> int:
        """Of the whole model, as its checkpoint counts them: embedding, layers, last norm, output layer if it has one.

        Source: the `*ForCausalLM` modules of transformers; equal to the published counts of every model in `engines/`.
        """
        embeddings = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden
