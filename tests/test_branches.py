"""Model code that makes another mask for some attention implementations is refused."""

import pytest
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLAttention

import kvcomp
from kvcomp.hf.branches import masks_by_name
from kvcomp.testing.models import tiny_model


class Sparse(LlamaAttention):
    """Attends to every second token, if the implementation takes masks."""

    def forward(self, hidden_states, attention_mask=None, **given):
        if self.config._attn_implementation in ("eager", "sdpa"):
            attention_mask = attention_mask * 2
        return super().forward(hidden_states, attention_mask=attention_mask, **given)


class ByVariable(LlamaAttention):
    def forward(self, hidden_states, attention_mask=None, **given):
        masked = self.config._attn_implementation == "eager"
        attention_mask = attention_mask * 2 if masked else attention_mask
        return super().forward(hidden_states, attention_mask=attention_mask, **given)


class ByHelper(LlamaAttention):
    def sparse_mask(self, mask):
        if getattr(self.config, "_attn_implementation") != "sdpa":  # noqa: B009
            return mask * 2
        return mask


class Heir(Sparse):
    pass


class Harmless(LlamaAttention):
    def forward(self, hidden_states, attention_mask=None, **given):
        if self.config._attn_implementation == "eager":
            hidden_states = hidden_states + 0
        return super().forward(hidden_states, attention_mask=attention_mask, **given)


@pytest.mark.parametrize("kind", [Sparse, ByVariable, ByHelper, Heir])
def test_another_mask_is_refused(kind):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.__class__ = kind
    with pytest.raises(ValueError, match=r"another attention mask .*\w+\.(forward|sparse_mask)"):
        kvcomp.patch(model, kvcomp.Full())
    assert model.config._attn_implementation != "kvcomp"


def test_other_branches_are_not():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.__class__ = Harmless
    with kvcomp.patch(model, kvcomp.Full()):
        pass


def test_classes_of_transformers():
    def found(kind):
        model = tiny_model("llama")
        model.model.layers[0].self_attn.__class__ = kind
        return masks_by_name(model.model)

    assert found(MiniMaxM3VLAttention) == "MiniMaxM3VLAttention.forward"
    assert found(GPT2Attention) is None, "it asks for the name, and makes no mask"


def test_float64_is_refused():
    model = tiny_model("llama").double()
    with pytest.raises(ValueError, match="in float64, which no kernel attends in"):
        kvcomp.patch(model, kvcomp.Full())
    with kvcomp.patch(model.float(), kvcomp.Full()):
        pass
