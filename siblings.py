"""What the G answers to one prompt share, computed once. Optional: else each has its own.

A trainer that gives each answer a copy of its prompt computes a VLM's long prompts G times. Here an
update lays a micro-batch out as one row, each prompt once and all answers after it, blind to each
other; a frozen vision tower computes an image once a run; and a sampler keeps one attention cache
of a prompt for all its answers (decode.py). What comes out is what `collate` and a plain sampler
give, to rounding; train_grpo.py --plain does the same without.
"""

import functools
import math
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import Sample
from decode import decoder, siblings_apart, siblings_together
from policy import collate, image_inputs, language_weights, padded, split_rows
from utils import device, print0

FLASH = "_scaled_dot_product_flash_attention_for_cpu"  # PyTorch's own, which promises it to nobody


class Sharing:
    """What a policy or a sampler asks for; a model and its copies have one of these together."""

    def __init__(self, model, processor, megabytes=1024):
        self.processor = processor
        self.can_branch = share_prefixes(model)  # whether the family can
        self.vision = None  # where it trains, its features are never the same twice
        if megabytes and vision_is_frozen(model) and hasattr(model.base_model, "get_rope_index"):
            self.vision = VisionCache(processor, megabytes)

    def collate(self, samples):
        """`collate` without the pixels of images that are known: see `remembered`."""
        return collate(samples, self.processor, self.vision and self.vision.inputs)

    def batch(self, samples, model):
        """A micro-batch as the policy computes it."""
        return pack(samples, self, model) if self.can_branch else self.collate(samples)

    def split(self, samples, budget):
        """Samples in micro-batches of at most `budget` tokens, in the form of `batch`."""
        return split_groups(samples, budget) if self.can_branch else split_rows(samples, budget)

    def decoder(self, model, banned):
        """How a sampler's `model` computes a token of all answers; None: by its own forward."""
        return decoder(model, banned) if self.can_branch else None

    @contextmanager
    def remembered(self, base, images):
        """Within, `base.forward` takes from the cache the features of what `collate` left out."""
        features = self.vision.features(base, images)
        base.get_image_features = lambda *_, **__: features  # hides the class's method
        try:
            yield
        finally:
            del base.get_image_features


def vision_is_frozen(model):
    language = language_weights(model)
    return not any(p.requires_grad for p in model.parameters() if p not in language)


def split_groups(samples, budget):
    """Lists of samples that `pack` makes at most `budget` tokens of: a prompt counts once.

    A group of answers to one prompt is cut only if it is above the budget by itself.
    """
    groups = {}
    for s in sorted(samples, key=Sample.length):
        groups.setdefault(s.id, []).append(s)
    parts, tokens = [], 0
    for group in sorted(groups.values(), key=lambda group: group[-1].length()):
        prompt = len(group[0].prompt_ids)
        if not parts or tokens + prompt + sum(len(s.completion_ids) for s in group) > budget:
            parts.append([])
            tokens = 0
        tokens += prompt
        for s in group:
            tokens += len(s.completion_ids)
            if tokens > budget and parts[-1]:
                parts.append([])
                tokens = s.length()
            parts[-1].append(s)
    return parts


# ---------------------------------------------------------------------------------------------
# An update: a prompt once and all its answers after it, P + G C tokens instead of G (P + C)


def share_prefixes(model):
    """Let `model` take packed rows; False where its family cannot, or tells nobody its positions.

    Only the language model's attention is replaced, the vision tower keeps its own.
    """
    text = model.config.get_text_config()
    kinds = {*(getattr(text, "layer_types", None) or ["full_attention"])}
    bounds = [getattr(text, name, None) for name in (
        "sliding_window", "attention_chunk_size", "use_bidirectional_attention")]
    # a recurrent layer would carry its state from one branch into the next, one with a window or
    # chunks would see beyond them, and one that looks at images both ways would not
    full = kinds == {"full_attention"} and not any(bounds)
    if not full or not hasattr(model.base_model, "get_rope_index"):
        print0("This family cannot branch a prompt (full attention with known positions can): "
               "every completion is computed with its own copy of it, as with --plain.")
        return False
    if device().type == "cpu" and not hasattr(torch.ops.aten, FLASH):
        print0("This build of PyTorch has no flash attention for CPUs: every completion is "
               "computed with its own copy of its prompt, as with --plain.")
        return False
    model.set_attn_implementation({"text_config": "branches"})
    return True


def pack(samples, sharing, model, flex=None):
    """What `collate` returns, with `inputs` that hold each distinct prompt once, in a single row.

    A completion's positions continue its prompt's, which an image makes fewer than its tokens
    (M-RoPE). `flex` attention is the default on CUDA alone.
    """
    assert sharing.can_branch, "this family cannot branch a prompt, as `share_prefixes` found"
    groups, place = {}, []  # prompt id to the samples that answer it; where a sample is among them
    for s in samples:
        siblings = groups.setdefault(s.id, [])
        place.append(len(siblings))
        siblings.append(s)
        assert s.prompt_ids == siblings[0].prompt_ids, f"two prompts have the id {s.id}"
    firsts = [replace(siblings[0], completion_ids=[]) for siblings in groups.values()]
    batch = sharing.collate(firsts)
    inputs = batch["inputs"]
    ids = inputs.pop("input_ids")  # (P, L)
    held = inputs.pop("attention_mask")
    positions, _ = model.base_model.get_rope_index(
        ids, inputs.pop("mm_token_type_ids"), inputs.get("image_grid_thw"), attention_mask=held)
    held = held.bool()  # (P, L), positions are (3, P, L)
    completions = padded([s.completion_ids for s in samples], 0)
    mask = padded([[True] * len(s.completion_ids) for s in samples], False)  # (N, C), as above

    # the row holds prompts in the order of `groups`, completions in the order of `samples`
    number = {name: i for i, name in enumerate(groups)}
    group = torch.tensor([number[s.id] for s in samples], device=ids.device)  # (N,)
    place = torch.tensor(place, device=ids.device)  # (N,)
    (P, L), C, n = ids.shape, mask.shape[1], max(map(len, groups.values()))
    step = torch.arange(C, device=ids.device)
    inputs["input_ids"] = torch.cat([ids[held], completions[mask]])[None]  # (1, T)
    after = positions.amax((0, 2))[group] + 1
    after = (after[:, None] + step)[mask].expand(3, -1)
    inputs["position_ids"] = torch.cat([positions[:, held], after], 1)[:, None]  # (3, 1, T)
    corner = P * L + (group * n + place) * C
    slots = torch.cat([held.flatten().nonzero().squeeze(1), (corner[:, None] + step)[mask]])
    bias = None
    if not held.all():
        bias = torch.zeros(P, L, device=ids.device).masked_fill(~held, -math.inf)[:, None, None]
    tokens = sum(len(s.prompt_ids) for s in firsts)
    inputs["branches"] = Branches((P, L, n, C), slots, tokens, bias)
    if ids.is_cuda if flex is None else flex:
        inputs["branches"].mask_blocks()
    lengths = mask.sum(1)
    start = tokens + lengths.cumsum(0) - lengths  # (N,), of each completion in the row
    predictors = start[:, None] + step - 1
    predictors[:, 0] = held.sum(1).cumsum(0)[group] - 1  # the last token of the prompt
    return {"inputs": inputs, "images": batch["images"], "completion_ids": completions,
            "mask": mask, "predictors": predictors}


@dataclass
class Branches:
    """Who sees whom in a packed row, which is all prompts, end to end, and then all completions.

    On a CPU attention is computed on rectangles: prompts (P, L) and completions (P, n, C), with n
    the most completions that a prompt has here. `slots` (T,) says where in the two, laid end to
    end, each token of the row stands. `block_mask` is the same relation for flex attention.
    """

    shape: tuple[int, int, int, int]  # P, L, n, C
    slots: torch.Tensor
    tokens: int  # of prompts
    bias: torch.Tensor | None  # (P, 1, 1, L), -inf on the padding of prompts; None: there is none
    block_mask: BlockMask | None = None

    def mask_blocks(self):
        """The relation token by token, for flex attention."""
        P, L, n, C = self.shape
        branch = (self.slots - P * L) // C  # (T,), below 0 in prompts
        family = torch.where(branch < 0, self.slots // L, branch // n)

        def sees(_, head, q, k):  # what came before, of the prompt or of one's own completion
            related = (branch[k] < 0) | (branch[q] == branch[k])
            return (family[q] == family[k]) & related & (q >= k)

        T = len(self.slots)
        self.block_mask = create_block_mask(sees, None, None, T, T, device=self.slots.device)

    def attend(self, module, query, key, value, scaling):
        """Attention over the row: query (1, heads, T, D) to (1, T, heads, D)."""
        key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        if self.block_mask is not None:
            flex = compiled_flex_attention() if query.is_cuda else flex_attention
            out = flex(query, key, value, block_mask=self.block_mask, scale=scaling)
            return out.transpose(1, 2)
        bias = None if self.bias is None else self.bias.to(query.dtype)
        parts = self.shape, self.slots, self.tokens, bias
        return RowAttention.apply(query, key, value, *parts, scaling)


class RowAttention(torch.autograd.Function):
    """Attention over a packed row on a CPU, without a copy of a prompt's keys for each completion.

    Prompts attend to themselves; completions to their prompt, where n siblings are one long row,
    and to themselves: three flash attentions, of which a completion's two are weighed by their
    shares of the common normaliser. Backward, flash attention's own is exact for each part once it
    is given the common output and normaliser (FlashAttention, arXiv 2205.14135, appendix B.2; ring
    attention does the same).
    """

    @staticmethod
    def forward(ctx, query, key, value, shape, slots, tokens, bias, scale):
        """(1, h, T, D) each to (1, T, h, D); shape to bias are those of `Branches`."""
        flash = getattr(torch.ops.aten, FLASH)
        (q, own_q), (k, own_k), (v, own_v) = (
            rectangles(x.transpose(1, 2), shape, slots) for x in (query, key, value))
        # a prompt is an ordinary row: causal, with its padding on the right, where nobody looks
        prompts, normaliser = flash(q, k, v, is_causal=True, scale=scale)
        P, _, n, _ = shape
        first, total = flash(siblings_together(own_q, P), k, v, attn_mask=bias, scale=scale)
        rest, own_total = flash(own_q, own_k, own_v, is_causal=True, scale=scale)
        first, total = siblings_apart(first, n), siblings_apart(total, n)  # totals are logarithms
        common = torch.logaddexp(total, own_total)  # (P * n, h, C)
        out = (first * (total - common).exp()[..., None].to(first.dtype)
               + rest * (own_total - common).exp()[..., None].to(first.dtype))
        ctx.save_for_backward(q, k, v, prompts, normaliser, own_q, own_k, own_v, out, common, slots)
        ctx.shape, ctx.tokens, ctx.bias, ctx.scale = shape, tokens, bias, scale
        return row(prompts, out, slots, tokens)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, prompts, normaliser, own_q, own_k, own_v, out, common, slots = ctx.saved_tensors
        flash = getattr(torch.ops.aten, f"{FLASH}_backward")
        grad, own_grad = rectangles(grad, ctx.shape, slots)
        P, _, n, _ = ctx.shape
        asked = flash(*(siblings_together(x, P) for x in (own_grad, own_q)), k, v,
                      siblings_together(out, P), siblings_together(common, P), 0.0, False,
                      attn_mask=ctx.bias, scale=ctx.scale)
        own = flash(own_grad, own_q, own_k, own_v, out, common, 0.0, True, scale=ctx.scale)
        first = flash(grad, q, k, v, prompts, normaliser, 0.0, True, scale=ctx.scale)
        grads = ((first[0], siblings_apart(asked[0], n) + own[0]),
                 (first[1] + asked[1], own[1]), (first[2] + asked[2], own[2]))
        return *(row(*x, slots, ctx.tokens).transpose(1, 2) for x in grads), *[None] * 5


def rectangles(x, shape, slots):
    """(1, T, h, D) to prompts (P, h, L, D) and completions (P * n, h, C, D)."""
    P, L, n, C = shape
    both = x.new_empty(P * (L + n * C), *x.shape[2:])
    if len(slots) < len(both):
        both.zero_()  # what nobody fills
    prompts, rest = both.index_copy_(0, slots, x[0]).split([P * L, P * n * C])
    return (prompts.unflatten(0, (P, L)).transpose(1, 2),
            rest.unflatten(0, (P * n, C)).transpose(1, 2))


def row(prompts, rest, slots, tokens):
    """And back."""
    prompts, rest = (x.transpose(1, 2).flatten(0, 1) for x in (prompts, rest))
    first, own = slots[:tokens], slots[tokens:] - len(prompts)
    return torch.cat([prompts.index_select(0, first), rest.index_select(0, own)])[None]


def branch_attention(module, query, key, value, attention_mask, branches=None, **kwargs):
    """Attention as transformers calls it, where `branches` knows who sees whom.

    A batch without is an ordinary one, and goes to SDPA.
    """
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return branches.attend(module, query, key, value, kwargs["scaling"]), None


@functools.cache
def compiled_flex_attention():
    """Flex attention as one kernel; uncompiled, it would hold every score at once."""
    return torch.compile(flex_attention)


AttentionInterface.register("branches", branch_attention)
AttentionMaskInterface.register("branches", sdpa_mask)  # for ordinary batches


# ---------------------------------------------------------------------------------------------
# Frozen vision: an image once a run


class VisionCache:
    """What a frozen vision tower and connector make of an image, for every later pass over it.

    Each image is computed alone, so that its features depend on nothing else in the batch. At most
    `megabytes` of host memory are held; the image that was asked for longest ago goes first.
    """

    def __init__(self, processor, megabytes):
        self.processor = processor
        self.limit, self.held = megabytes * 2**20, 0  # bytes
        self.kept = OrderedDict()  # image source to (grid, [features, those of deeper layers ...])
        self.joined = False  # whether base.forward wants those of deeper layers for all images

    def inputs(self, image):
        """What `image_inputs` gives, without pixels: `features` looks for them where it must."""
        known = self.kept.get(image)
        grid = known[0] if known else image_inputs(self.processor, image)["image_grid_thw"]
        return {"pixel_values": torch.empty(0), "image_grid_thw": grid}

    def features(self, base, images):
        """The features of `images`, in the form in which `base.forward` asks for them."""
        found = [[f.to(device()) for f in self.computed(base, image)[1]] for image in images]
        first, *deeper = zip(*found)
        if self.joined:
            deeper = [torch.cat(layer) for layer in deeper]
        return SimpleNamespace(pooler_output=first, deepstack_features=deeper)

    @torch.inference_mode(False)  # a sampler asks within it, and what is kept is for training too
    @torch.no_grad()
    def computed(self, base, image):
        """(grid, features) of an image, computed if it is not known."""
        if image not in self.kept:
            pixels = image_inputs(self.processor, image)
            grid = pixels["image_grid_thw"]
            out = type(base).get_image_features(
                base, pixels["pixel_values"].to(device()), grid.to(device()), return_dict=True)
            deeper = getattr(out, "deepstack_features", ())
            self.joined = any(torch.is_tensor(layer) for layer in deeper)  # transformers 5.17
            deeper = deeper if self.joined else [layer[0] for layer in deeper]
            self.kept[image] = grid, [f.cpu() for f in (out.pooler_output[0], *deeper)]
            self.held += sum(f.nbytes for f in self.kept[image][1])
        self.kept.move_to_end(image)
        entry = self.kept[image]
        while self.held > self.limit:
            self.held -= sum(f.nbytes for f in self.kept.popitem(last=False)[1][1])
        return entry
