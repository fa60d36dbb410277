"""The decoder by hand against the model's own forward: three families, real head layouts, bf16, and what it refuses."""

import copy
import types

import pytest
import torch
from transformers import DynamicCache

import conftest
from conftest import sampler
from data import banned_ids
from decode import decoder, joined, PromptCache
from policy import Policy

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def uneven(family, heads=(4, 2), head_dim=32, dtype=torch.float64):
    """A random model whose biases and norms, which a new model has at 0 and 1, are random too."""
    processor = conftest.build_processor(family)
    model = conftest.build_model(family, processor, heads, head_dim).to(dtype).eval().requires_grad_(False)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.copy_(weight + 0.3 * torch.randn_like(weight))
    return model, processor


def both_ways(model, by_hand, ids, prompt):
    """Logits after each token of `ids` (2, L) but the prompt's, by the model and by hand."""
    wanted = model(input_ids=ids, use_cache=False).logits[:, prompt:]
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    own = by_hand.begin(cache, torch.ones(2, prompt, dtype=torch.long), 1, ids.shape[1])
    got = [by_hand.step(ids[:, i], torch.full((2,), i), own) for i in range(prompt, ids.shape[1])]
    return wanted, torch.stack(got, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads, head_dim", [((4, 4), 16), ((16, 2), 8), ((28, 4), 8), ((12, 2), 8), ((4, 2), 128)])
def test_a_token_is_what_the_models_own_forward_makes_of_it(family, heads, head_dim):
    """In float64, over 40 tokens after a prompt of 3, which is more than the cache had room for at first."""
    model, processor = uneven(family, heads, head_dim)
    by_hand = decoder(copy.deepcopy(model), banned_ids(processor))
    ids = torch.randint(0, 200, (2, 43), generator=torch.Generator().manual_seed(0))
    wanted, got = both_ways(model, by_hand, ids, 3)
    # RoPE's angles and the norms are float32 in both
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * wanted.abs().max().item())
    turned = wanted.roll(1, 1)
    assert (got - turned).abs().max() > 0.1 * wanted.abs().max()  # and a shift by one would be seen


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_strays_no_further_than_the_models_own(family):
    """From the same weights in float32."""
    model, processor = uneven(family, (16, 2), 8, torch.bfloat16)
    by_hand = decoder(copy.deepcopy(model), banned_ids(processor))
    ids = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    wanted, got = both_ways(model, by_hand, ids, 3)
    truth = model.float()(input_ids=ids, use_cache=False).logits[:, 3:]
    own, ours = ((x.float() - truth).square().mean().sqrt() for x in (wanted, got))
    assert 0 < ours < 1.2 * own


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampler_takes_over_new_weights_here_too(family, one_rank):
    """The joined weights have no life of their own: what `sync` copies into a layer's is in them."""
    model, processor = uneven(family, dtype=torch.float32)
    engine = sampler(copy.deepcopy(model), processor, 4)
    assert engine.decoder
    storages = map(torch.Tensor.untyped_storage, engine.model.parameters())
    assert sum({s.data_ptr(): s.nbytes() for s in storages}.values()) == sum(w.nbytes for w in model.parameters())  # no memory twice
    new, _ = uneven(family, dtype=torch.float32)
    for weight in new.parameters():
        weight.mul_(0.7)
    engine.sync(Policy(new, processor).model)
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted, got = both_ways(new, engine.decoder, ids, 3)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def gemma(model):
    """Norms that multiply by 1 + w."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            plain = module.forward
            module.forward = types.MethodType(lambda self, x, f=plain: f(x) + f(x) / self.weight, module)


def scaled(model):
    """Logits are bounded, as Gemma 2's are."""
    head = model.forward

    def forward(**inputs):
        out = head(**inputs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out
    model.forward = forward


def turned(model):
    """Angles run the other way round, so that only queries and keys tell."""
    layer = model.get_decoder().layers[0]
    plain = layer.forward
    layer.forward = lambda x, position_embeddings, **more: plain(
        x, position_embeddings=(position_embeddings[0], -position_embeddings[1].roll(1, -1)), **more)


def parallel(model):
    """A layer whose attention and feed-forward part read the same."""
    layer = model.get_decoder().layers[1]

    def forward(x, **more):
        return x + layer.self_attn(layer.input_layernorm(x), **more)[0] + layer.mlp(layer.post_attention_layernorm(x))
    layer.forward = forward


def sandwich(model):
    """GLM-4's further norm."""
    model.get_decoder().layers[1].post_mlp_layernorm = torch.nn.Identity()


def dynamic(model):
    """Angles that depend on how long a text has become."""
    model.get_decoder().rotary_emb.rope_type = "dynamic"


@pytest.mark.parametrize("change", [scaled, turned, parallel, sandwich, dynamic])
def test_a_model_of_another_form_keeps_its_own_forward(change, one_rank):
    """By its parts' names, or by three tokens computed both ways."""
    model, processor = uneven("qwen2_5_vl", dtype=torch.float32)
    banned = banned_ids(processor)
    assert decoder(copy.deepcopy(model), banned)
    change(model)
    assert decoder(model, banned) is None


def test_what_a_norm_does_is_left_to_the_norm():
    """One that multiplies by 1 + w is called, not imitated."""
    model, processor = uneven("qwen2_5_vl", dtype=torch.float32)
    gemma(model)
    by_hand = decoder(model, banned_ids(processor))
    wanted, got = both_ways(model, by_hand, torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]]), 2)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_scores_are_float32_where_keys_are_bfloat16():
    """Keys of which a bias lifts all scores to 512, where bfloat16 has steps of 2 to 4 nats; they differ by 1."""
    keys = torch.tensor([[[[128.0, 0], [128, 1], [128, 2]]]], dtype=torch.bfloat16)
    values = torch.eye(3, 2)[None, None].bfloat16()
    layer = type("Layer", (), {"keys": keys, "values": values})
    cache = PromptCache(type("Cache", (), {"layers": [layer]}), torch.ones(1, 3, dtype=torch.long), 1)
    cache.length = 1
    own = torch.tensor([[[128.0, 3]]], dtype=torch.bfloat16)
    got = cache.attend(0, torch.tensor([[[4.0, 1]]]).bfloat16(), own, torch.zeros(1, 1, 2).bfloat16(), 1.0)
    want = torch.tensor([0.0, 1, 2, 3]).softmax(0)[:2]  # the values of the first two are the units
    torch.testing.assert_close(got.float()[0], want, rtol=0.01, atol=1e-3)


def test_linear_layers_side_by_side():
    """Two layers of 2 to 1 and 2 to 2; a weight written through either is the other's."""
    first, second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2]]))
        first.bias.fill_(3)
        second.weight.copy_(torch.tensor([[4.0, 5], [6, 7]]))
        second.bias.copy_(torch.tensor([8.0, 9]))
        weight, bias = joined(first, second)
        assert weight.tolist() == [[1, 2], [4, 5], [6, 7]] and bias.tolist() == [3, 8, 9]
        second.weight.copy_(second.weight * 10)
        weight[0] = 0
        assert weight.tolist() == [[0, 0], [40, 50], [60, 70]] and first.weight.tolist() == [[0, 0]]
    first.bias = second.bias = None
    assert joined(first, second)[1] is None
