"""A token of every answer through the decoder, by hand. Optional, as siblings.py is, which uses it.

What a sampler computes anew for each token is written out here: the attention cache of a prompt is
held once for all its answers, what is multiplied with the same is one product, and the angles of a
position are computed once. What comes out is what the model's own forward gives, to rounding; that
is tried on three tokens before the first answer, and a family of another form keeps its own.
"""

import torch
from torch.nn.functional import linear
from transformers import DynamicCache

PARTS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "input_layernorm",
         "post_attention_layernorm", "self_attn", "mlp", ""}  # of a layer of the Llama form
MORE = {"self_attn.q_norm", "self_attn.k_norm", "self_attn.rotary_emb"}  # that it may have


@torch.no_grad()
def decoder(model, banned):
    """A `Decoder` of a sampler's model; None where the model is of another form."""
    text = model.get_decoder()
    parts = [{name for name, _ in layer.named_modules()} for layer in text.layers]
    rope = getattr(getattr(text, "rotary_emb", None), "rope_type", "none")
    # two kinds of angles depend on how long a text has become
    if rope in ("none", "dynamic", "longrope") or any(p - MORE != PARTS for p in parts):
        return None
    tokens = torch.tensor([sorted({*range(len(banned) + 3)} - {*banned})[:3]], device=model.device)
    try:
        known, found = DynamicCache(config=model.config), Decoder(model)
        wanted = model(input_ids=tokens, use_cache=False).logits[:, -1]
        model(input_ids=tokens[:, :-1], past_key_values=known, use_cache=True)
        cache = found.begin(known, torch.ones_like(tokens[:, :-1]), 1, 3)
        logits = found.step(tokens[:, -1], torch.tensor([2], device=model.device), cache)
    except Exception:  # whatever a family's own code raises; the rehearsal will say it
        return None
    most = wanted.abs().max() * torch.finfo(wanted.dtype).eps ** 0.5
    return found if (logits - wanted).abs().max() <= most else None


class Decoder:
    """One new token a row, with the weights of a sampler's `model`, which are nobody else's."""

    def __init__(self, model):
        self.model, self.text = model, model.get_decoder()
        self.layers = [Layer(layer) for layer in self.text.layers]

    def begin(self, cache, attention, n, count):
        """The cache of n answers to each prompt, and the angles (1, D) of `count` positions."""
        positions = torch.arange(count, device=attention.device)[None]
        # text has one position for all axes of an image: of three equal tables (transformers 5.17)
        self.angles = [x.flatten(0, -3)[0][:, None]
                       for x in self.text.rotary_emb(self.text.embed_tokens.weight[:1], positions)]
        return PromptCache(cache, attention, n)

    def step(self, tokens, positions, cache):
        """Tokens and their positions, (R,) each, to the next logits (R, V)."""
        cos, sin = (x[positions] for x in self.angles)
        x = self.text.embed_tokens(tokens)  # (R, H)
        cache.length += 1
        for i, layer in enumerate(self.layers):
            x = layer.finish(x, cache.attend(i, *layer.project(x, cos, sin), layer.scaling))
        return self.model.get_output_embeddings()(self.text.norm(x))


class Layer:
    """A decoder layer of the Llama form."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        self.out, self.down, self.act = attention.o_proj, mlp.down_proj, mlp.act_fn
        self.D, self.scaling = attention.head_dim, attention.scaling
        self.heads, self.h = (len(x.weight) // self.D for x in (attention.q_proj, attention.k_proj))
        self.norms = [getattr(attention, f"{x}_norm", None) for x in "qk"]  # Qwen3 has them

    def project(self, x, cos, sin):
        """Hidden states (R, H) to queries (R, heads, D), keys and values (R, h, D)."""
        x = linear(self.before(x), *self.qkv).unflatten(-1, (-1, self.D))
        x, value = x.split([self.heads + self.h, self.h], 1)
        if self.norms[0]:
            both = zip(self.norms, x.split([self.heads, self.h], 1))
            x = torch.cat([norm(part) for norm, part in both], 1)
        a, b = x.chunk(2, -1)
        x = x * cos + torch.cat([-b, a], -1) * sin  # RoPE
        return *x.split([self.heads, self.h], 1), value

    def finish(self, x, mixed):
        """Hidden states, and what attention made of the values, to those of the next layer."""
        x = x + self.out(mixed)
        gate, up = linear(self.between(x), *self.gate_up).chunk(2, -1)
        return x + self.down(self.act(gate) * up)


def joined(*layers):
    """The weight and the bias of linear layers side by side; from now on, theirs are views of it.

    So a sampler that takes over new weights has them here too, and they take no memory twice.
    """
    both = []
    for parts in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if parts[0] is None:
            both.append(None)
            continue
        both.append(torch.cat([part.data for part in parts]))
        for part, view in zip(parts, both[-1].split([len(part) for part in parts])):
            part.data = view
    return both


class PromptCache:
    """The attention cache of n answers to each prompt: a prompt's part once, each answer's own.

    R rows are alive, `prompt` (R,) says whose answers they are. A layer's prompt part is (P, h, L,
    D), filled by the prefill; an answer's own, (R, h, T, D), has room for tokens to come, where the
    library's cache copies all of it for every token.
    """

    def __init__(self, cache, attention, n):
        # HAZARD: scores need float32, as attention kernels have them. Large key biases lift a row's
        # together, and bfloat16 of large numbers has steps of whole nats
        exact = torch.promote_types(cache.layers[0].keys.dtype, torch.float32)
        self.prompts = [(x.keys.mT.contiguous().to(exact), x.values) for x in cache.layers]
        self.own = [[x.new_empty(len(x) * n, x.shape[1], 32, x.shape[3]) for x in (v, v)]
                    for _, v in self.prompts]
        self.length = 0  # own tokens, the one that is being computed included
        self.bias = None  # of padding, (P, 1, 1, L)
        if not attention.all():
            bias = torch.zeros_like(attention, dtype=self.prompts[0][1].dtype)
            self.bias = bias.masked_fill(attention == 0, -torch.inf)[:, None, None]
        self.keep(torch.arange(len(attention), device=attention.device).repeat_interleave(n))

    def keep(self, prompt):
        """Lay the live rows out as a table (P, m), so that a prompt is multiplied once for all."""
        P, rows = len(self.prompts[0][1]), torch.arange(len(prompt), device=prompt.device)
        counts = prompt.bincount(minlength=P)
        place = rows - (counts.cumsum(0) - counts)[prompt]
        self.prompt, self.m = prompt, int(counts.max())
        self.full = P * self.m == len(prompt)  # then the rows are the table
        self.slot = prompt * self.m + place  # of each row in the table, laid end to end
        self.table = prompt.new_zeros(P * self.m)
        self.table[self.slot] = rows

    def reorder_cache(self, rows):
        """Forget all rows but these; named as in transformers' caches."""
        self.own = [[x[rows] for x in pair] for pair in self.own]
        self.keep(self.prompt[rows])

    def by_prompt(self, x):
        """(R, h, g, ...) as the table has it, (P, h, m * g, ...)."""
        x = x if self.full else x[self.table]
        return siblings_together(x, len(x) // self.m)

    def by_row(self, x):
        """And back."""
        x = siblings_apart(x, self.m)
        return x if self.full else x[self.slot]

    def attend(self, layer, query, key, value, scaling):
        """One token a row: query (R, heads, D), key and value (R, h, D) to (R, heads * D)."""
        own, T = self.own[layer], self.length
        for i, new in enumerate((key, value)):
            if own[i].shape[2] < T:
                own[i] = torch.cat([own[i], torch.empty_like(own[i])], 2)
            own[i][:, :, T - 1] = new
        keys, values = (x[:, :, :T] for x in own)
        first_keys, first_values = self.prompts[layer]
        R, heads, D = query.shape
        query = query.to(first_keys.dtype) * scaling
        query = query.reshape(R, keys.shape[1], -1, D)  # (R, h, g, D): g share a key
        first = self.by_prompt(query) @ first_keys  # (P, h, m * g, L)
        if self.bias is not None:
            first = first + self.bias
        # one softmax over both parts, (R, h, g, L + T)
        scores = torch.cat([self.by_row(first), query @ keys.mT.to(query.dtype)], 3)
        first, rest = scores.softmax(3).to(values.dtype).split([first.shape[3], T], 3)
        first = self.by_row(self.by_prompt(first) @ first_values)
        return (first + rest @ values).reshape(R, heads * D)  # strided where all ask one prompt


def siblings_together(x, P):
    """(P * n, h, C, ...) to (P, h, n * C, ...)."""
    return x.unflatten(0, (P, -1)).transpose(1, 2).flatten(2, 3)


def siblings_apart(x, n):
    """(P, h, n * C, ...) to (P * n, h, C, ...)."""
    return x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)
