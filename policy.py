"""The policy: pixels and tokens in, log-probabilities out, the same for old, new and reference.

A policy is a transformers model, whatever its family, behind one forward. What textbooks have and
this leaves out: adapters for each family, and shifted labels, since a loss is made of
log-probabilities, by the trainers. What answers to one prompt share is computed for each of them;
siblings.py, where it is given as `sharing`, computes it once.
"""

import copy
import functools
import json
import os
import re
from contextlib import nullcontext
from math import isfinite

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, GenerationConfig,
    PreTrainedTokenizerBase)
from transformers.processing_utils import TextKwargs
from transformers.utils import logging as transformers_logging

import utils
from data import BARE, INSTRUCTION, Sample, banned_ids, tokenise
from pictures import open_image
from sources import ask_hub
from utils import UserError, device, first_line, rank, world_size

HEAD_NUMBERS = 2**27  # of [completion tokens, vocabulary], that exist at one time

transformers_logging.disable_progress_bar()
for name in ("modeling_utils", "processing_utils"):
    transformers_logging.get_logger(f"transformers.{name}").addFilter(
        # what `load_model` says in a sentence; what SmolVLM's processor brings about at each prompt
        lambda record: not re.search("LOAD REPORT|seem corrupted|^Kwargs passed to",
                                     record.getMessage()))


# ---------------------------------------------------------------------------------------------
# Loading: somebody's checkpoint, with no default of its files that would change what is trained


def load_pretrained(loader, path, **kwargs):
    """`loader.from_pretrained(path)`, its failure told in one sentence."""
    name, path = str(path), utils.find(path)
    if not os.path.isdir(path):  # a typing mistake must not wait for a network
        hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
        if not hub_id or os.path.exists(name.partition("/")[0]):
            raise UserError(f"--model {name}: no such folder; give one, or a hub id like "
                            "Qwen/NAME.")
        ask_hub(name, "model", "config.json")
    if not (path / "config.json").exists() and (path / "args.json").exists():
        newest = utils.latest_checkpoint(path)
        raise UserError(f"--model {name} is a run folder; give "
                        f"{newest or 'another, it has no checkpoint yet'}.")
    check_files(path)
    try:
        return loader.from_pretrained(path, **kwargs)
    except Exception as error:  # whatever a file of somebody else's makes of transformers
        raise UserError(f"--model {path}: cannot be loaded ({type(error).__name__}: "
                        f"{first_line(error)}); give a folder or hub id of an instruction-tuned "
                        "vision-language model with its processor files.")


def check_files(folder):
    """UserError with the name of a checkpoint's file that is torn, empty, or no JSON object."""
    from safetensors import SafetensorError, safe_open

    json_files = r".*(config|tokenizer|template|index|map|tokens|vocab)\.json"
    for path in sorted(folder.glob("*")):
        try:
            if re.fullmatch(r"model.*\.safetensors", path.name):
                safe_open(path, "pt")  # compares the length with what the header says
            elif re.fullmatch(json_files, path.name):
                json.loads(path.read_text("utf-8")).keys()
        except (OSError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
            raise UserError(f"--model {folder}: its file {path.name} is torn or not what its name "
                            f"says ({error}); copy or download it again.")


class TextProcessor:
    """A tokenizer in the place of a processor, for a model that reads text alone."""

    image_processor = image_token = image_token_id = None
    image_token_ids = video_token_ids = ()

    def __init__(self, tokenizer):
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template
        self.model_input_names = tokenizer.model_input_names
        self.save_pretrained = tokenizer.save_pretrained

    def __call__(self, text, images=None, **words):
        return self.tokenizer(text, **words)

    def apply_chat_template(self, conversation, **words):
        """A prompt's text: the templates of these models want a message's text in one piece."""
        if any(part["type"] == "image" for message in conversation for part in message["content"]):
            raise ValueError("its files have no image processor, and the row has a picture")
        whole = [m | {"content": "".join(p["text"] for p in m["content"])} for m in conversation]
        return self.tokenizer.apply_chat_template(whole, **words)


def load_processor(path, min_pixels=0, max_pixels=0):
    """The checkpoint's processor: tokenizer, chat template and, but for text, image processor.

    Bounds on an image's pixels that are given hold for samplers and checkpoints too.
    """
    processor = load_pretrained(AutoProcessor, path)
    if isinstance(processor, PreTrainedTokenizerBase):
        processor = TextProcessor(processor)
    if not getattr(processor, "chat_template", None) or not hasattr(processor, "image_processor"):
        raise UserError(f"--model {path}: its processor has no chat template or takes no images; "
                        "give an instruction-tuned model of vision and language, or of text.")
    if min_pixels or max_pixels:
        bound_pixels(processor, path, min_pixels, max_pixels)
    # what a trainer left in the tokenizer's files would be defaults of each call of the processor
    tokenizer = processor.tokenizer
    for kwargs in (TextKwargs, getattr(processor.image_processor, "valid_kwargs", TextKwargs)):
        for name in kwargs.__annotations__:
            tokenizer.init_kwargs.pop(name, None)
    tokenizer.split_special_tokens = tokenizer.clean_up_tokenization_spaces = False
    try:
        tokenise(tokenizer, INSTRUCTION)
    except Exception as error:  # whatever a field of its files makes of transformers
        raise UserError(f"--model {path}: its tokenizer fails ({first_line(error)}); correct "
                        "tokenizer_config.json, or give another model.")
    return processor


def bound_pixels(processor, path, least, most):
    """Set the least and the most pixels of an image, 0: as it was; the new bound moves the old."""
    images, size = processor.image_processor, pixel_bounds(processor).get("size")
    if not size:
        raise UserError(f"--min_pixels, --max_pixels: --model {path} gives its images another size "
                        "than by their pixels; leave the flags out.")
    token = (images.patch_size * images.merge_size) ** 2
    if 0 < most < max(least, token):
        raise UserError(f"--max_pixels {most} must be at least --min_pixels {least}, and {token}, "
                        f"which are one token of --model {path}.")
    images.size = {"shortest_edge": least or min(size["shortest_edge"], most),
                   "longest_edge": most or max(size["longest_edge"], least)}


def pixel_bounds(processor):
    """`{"size": {...}}` as image processors take it where it bounds an image's pixels, or {}."""
    images = processor.image_processor
    size = dict(images.size) if hasattr(images, "merge_size") else {}
    return {"size": size} if size.keys() >= {"shortest_edge", "longest_edge"} else {}


def load_model(path, dtype=None):
    """The checkpoint's model on the host, and never a random one.

    Weights are in `dtype`; by default as the files have them, whatever config.json says: then they
    are the files' own pages, which all ranks of a machine have in common. UserError where weights
    and config.json do not fit each other, or a weight is no number.
    """
    config = load_pretrained(AutoConfig, path)
    for part in filter(None, (config, *(getattr(config, name) for name in config.sub_configs))):
        part.dtype = None
    loader = AutoModelForImageTextToText if config.sub_configs else AutoModelForCausalLM
    model, info = load_pretrained(
        loader, path, config=config, dtype=dtype or "auto",
        attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True)
    weights = [*model.named_parameters()]
    wrong = {"missing": info["missing_keys"], "without a place": info["unexpected_keys"],
             "of another shape": [name for name, *_ in info["mismatched_keys"]],
             "quantised": [name for name, w in weights if w.dtype.itemsize < 2],
             "not finite": [name for name, w in weights if w.numel()
                            and not all(map(isfinite, w.detach().aminmax()))]}
    said = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{' ...' * (len(names) > 3)})"
            for what, names in wrong.items() if names]
    if said:
        raise UserError(f"--model {path}: its weights are not those that its config.json tells of: "
                        f"{', '.join(said)}; copy or download it again, or save it whole.")
    drop_nothing(model)
    return model


def drop_nothing(model):
    """Set each dropout probability, and the noise of routers, to 0 in modules and their configs.

    A sampler drops nothing, so what drops in training is not the policy that answered. The config
    as it was is kept for `export`.
    """
    model.source_config = copy.deepcopy(model.config)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for holder in (*model.modules(), *configs):
        layer = "Dropout" in type(holder).__name__
        for name, value in list(vars(holder).items()):
            chance = re.search("drop|jitter", name) or (layer and name == "p")
            if chance and (type(value) in (int, float) or value is None and "dropout" in name):
                setattr(holder, name, 0.0)


def twin(model, *where):
    """A copy of `model`, its weights moved `to(*where)`.

    Without, they stay in the same memory, which is for a twin that `shard` will take from there.
    HAZARD: `model.to(dtype)` would round float32 buffers too, RoPE's angles.
    """
    weights = {}
    for weight in model.parameters():
        data = weight.detach().to(*where, copy=True) if where else weight.detach()
        weights[id(weight)] = torch.nn.Parameter(data, weight.requires_grad)
    return copy.deepcopy(model, weights)  # takes what is given for what it has met


def compute_dtype(name):
    """The `--dtype` flag as a torch dtype; auto is bfloat16 on CUDA and float32 on a CPU."""
    auto = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, auto if name == "auto" else name)


def language_weights(model):
    """The parameters of the language model, its head included; the rest is vision's."""
    return {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}


def freeze(model, train_vision, train_connector, train_language):
    """Choose what trains; return the number of trainable weights. The paper: the language alone."""
    language = language_weights(model)
    for name, parameter in model.named_parameters():
        wanted = train_vision
        if parameter in language:
            wanted = train_language
        elif re.search("merger|projector|connector|aligner", name):
            wanted = train_connector
        parameter.requires_grad_(wanted)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if count == 0:
        raise UserError("nothing is left to train; give --train_language, --train_connector or "
                        "--train_vision.")
    return count


class LowRank(torch.nn.Linear):
    """A linear layer (W + scale B A) x + b, of which A (rank, in) and B (out, rank) train."""

    def forward(self, x):
        return super().forward(x) + self.scale * linear(linear(x, self.lora_a), self.lora_b)

    def merged(self):
        """The one weight (out, in), in float32, that computes the same. COLLECTIVE if sharded."""
        return whole(self.weight) + self.scale * whole(self.lora_b) @ whole(self.lora_a)


def add_lora(model, rank, alpha, seed):
    """Train low-rank updates in place of the language's weights; return how many numbers train.

    Each linear layer of the decoder gets one, scaled by alpha / rank. B is 0, so that nothing
    changes yet; A is uniform, as in the authors' code. LoRA, arXiv 2106.09685, section 4.1.
    """
    for parameter in language_weights(model):
        if not parameter.requires_grad:
            raise UserError(f"--lora_rank {rank} is for the language model: give --train_language.")
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # each rank shards one and the same A
    for layer in model.get_decoder().layers.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__, layer.scale = LowRank, alpha / rank  # weights keep their names
            bound = layer.in_features ** -0.5
            a = torch.rand(rank, layer.in_features, generator=generator) * 2 * bound - bound
            layer.lora_a = torch.nn.Parameter(a)
            layer.lora_b = torch.nn.Parameter(torch.zeros(layer.out_features, rank))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def whole(weight):
    """A weight in one piece on this rank's device, however it is sharded and wherever it waits."""
    if not isinstance(weight, DTensor):
        return weight.to(device())
    local = weight.to_local().to(device())  # of the host, if offloaded: NCCL gathers, not gloo
    return DTensor.from_local(local, weight.device_mesh, weight.placements, shape=weight.shape,
                              stride=weight.stride()).full_tensor()


def whole_weights(model):
    """Yield (name, weight) of the plain model, updates merged, on this rank's device. COLLECTIVE.

    Each is gathered as it is drawn: the model is never held twice.
    """
    for name, parameter in model.named_parameters():
        place, _, kind = name.rpartition(".")
        layer = model.get_submodule(place)
        if not isinstance(layer, LowRank) or kind == "bias":
            yield name, whole(parameter)
        elif kind == "weight":
            yield name, layer.merged()


# ---------------------------------------------------------------------------------------------
# Batches: answered samples to tensors


@functools.lru_cache(maxsize=64)
def image_inputs(processor, source):
    """One image's tensors (`pixel_values`, its grid, ...), remembered for the G completions.

    The processor is asked, since it may tell its image processor to tile, whatever the files say.
    """
    asked = processor(text=[processor.image_token], images=[open_image(source)],
                      return_tensors="pt", **BARE)
    text = {*processor.tokenizer.model_input_names, "token_type_ids", "mm_token_type_ids"}
    return {name: value for name, value in asked.items() if name not in text}


def padded(lists, value):
    """Lists of numbers as a tensor on this rank's device, filled up with `value` on the right."""
    width = max(1, max(map(len, lists)))
    return torch.tensor([x + [value] * (width - len(x)) for x in lists], device=device())


def collate(samples, processor, look=None):
    """Samples to tensors on this rank's device; a row is prompt, completion, padding on the right.

    Masks come from lengths, never from token ids: padding and EOS may share one. Returns `inputs`
    (the model's own arguments), `images` and, each (B, C) with C the longest completion,
    `completion_ids`, `mask` and `predictors`. A token's predictor is the place of the token before
    it when the rows of `inputs` are laid end to end. `look` stands in for the processor where a
    cache has an image's features; then `images` lists the images, else it is empty.
    """
    rows = [s.prompt_ids + s.completion_ids for s in samples]
    # any id but an image's; some tokenizers have none for padding
    ids = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id, *range(9)
    pad = next(i for i in ids if i is not None and i not in banned_ids(processor))
    inputs = {"input_ids": padded(rows, pad)}
    inputs["attention_mask"] = padded([[1] * len(r) for r in rows], 0)
    # 1 on an image's placeholders: for M-RoPE, or since they see each other, later ones too
    for name in {"mm_token_type_ids", "token_type_ids"} & {*processor.model_input_names}:
        inputs[name] = padded(processor.create_mm_token_type_ids(rows), 0)
    images = [i for s in samples for i in s.images]  # in reading order
    find = look or functools.partial(image_inputs, processor)
    parts = [find(i) for i in images]
    for name in parts[0] if parts else ():  # joined along the first axis
        values = [p[name] for p in parts]
        if len({v.shape[1:] for v in values}) > 1:  # fewer tiles are filled up, with zeros
            values = [pad_sequence([row for v in values for row in v], batch_first=True)]
        inputs[name] = torch.cat(values).to(device())
    completions = [s.completion_ids for s in samples]
    width = inputs["input_ids"].shape[1]
    places = [[i * width + len(s.prompt_ids) + k - 1 for k in range(len(s.completion_ids))]
              for i, s in enumerate(samples)]
    return {"inputs": inputs, "images": images if look else [],
            "completion_ids": padded(completions, pad),
            "mask": padded([[True] * len(c) for c in completions], False),
            "predictors": padded(places, 0)}


def split_rows(samples, budget):
    """Lists of samples, alike in length, that `collate` makes at most `budget` tokens of.

    Each costs as much as the longest beside it; a sample above the budget goes alone.
    """
    parts = []
    for s in sorted(samples, key=Sample.length):
        if parts and (len(parts[-1]) + 1) * s.length() <= budget:
            parts[-1].append(s)
        else:
            parts.append([s])
    return parts


# ---------------------------------------------------------------------------------------------
# The policy


class Policy(torch.nn.Module):
    """A model behind one forward: batch in, log-probabilities of the completion tokens out.

    FSDP2 gathers weights in the forward of the module they belong to. All that touches weights runs
    inside this one forward; a call of the inner model or the head from outside would meet shards.
    """

    def __init__(self, model, processor, sharing=None):
        super().__init__()
        self.model, self.processor = model, processor
        self.banned = banned_ids(processor)
        self.sharing = sharing  # of siblings.py; None: each row is computed by itself

    def batch(self, samples):
        """Tensors of answered samples, in the form that this policy computes."""
        if self.sharing:
            return self.sharing.batch(samples, self.model)
        return collate(samples, self.processor)

    def micro_batches(self, samples, budget):
        """Samples split by tokens; empty lists last: ranks have equally many. COLLECTIVE."""
        parts = (self.sharing.split if self.sharing else split_rows)(samples, budget)
        return parts + [[]] * (max(1, *utils.gather([len(parts)])) - len(parts))

    def forward(self, batch, temperature):
        """Log-probabilities and entropies of the completion tokens: (B, C), nats, 0 on padding.

        `batch` comes from `batch` or from `collate`. The distribution is softmax(logits /
        temperature) without the banned ids, in float32: what an engine samples from at top_p = 1.
        """
        mask, targets = batch["mask"], batch["completion_ids"][batch["mask"]]  # (B, C), (N,)
        base, images = self.model.base_model, batch["images"]
        with self.sharing.remembered(base, images) if images else nullcontext():
            out = base(**batch["inputs"], use_cache=False)
        # (rows, L, H) to (N, H): a token is predicted at the one before it, wherever that stands
        hidden = out.last_hidden_state.flatten(0, 1)[batch["predictors"][mask]]
        size = max(1, HEAD_NUMBERS // len(self.model.get_output_embeddings().weight))
        head = self.token_logprobs
        if len(hidden) > size:  # recomputed in backward: [tokens, vocabulary] never exists whole
            head = functools.partial(checkpoint, head, use_reentrant=False)
        parts = [head(h, t, temperature) for h, t in zip(hidden.split(size), targets.split(size))]
        blank = torch.zeros(mask.shape, device=mask.device)
        logprobs, entropies = (blank.masked_scatter(mask, torch.cat(p)) for p in zip(*parts))
        if "pixel_values" not in batch["inputs"]:
            # HAZARD: FSDP reduces the same gradients on every rank, and this batch has none for a
            # vision tower that trains: its weights are touched with weight 0
            language = language_weights(self.model)
            idle = [p for p in self.model.parameters() if p.requires_grad and p not in language]
            logprobs = logprobs + 0.0 * sum(p.sum() for p in idle)
        return logprobs, entropies

    def token_logprobs(self, hidden, targets, temperature):
        """(N, H) hidden states and (N,) targets to (N,) log-probabilities and (N,) entropies."""
        logits = self.model.get_output_embeddings()(hidden).float() / temperature  # (N, V)
        with torch.no_grad():  # what has no chance has no gradient
            logits[:, self.banned] = torch.finfo(logits.dtype).min
        logprobs = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy

    def export(self, folder, dtype, weights=True):
        """Write a Hugging Face folder whose weights are in `dtype` and say so. COLLECTIVE.

        Without `weights`, the other files alone. A tied head is written once, low-rank updates are
        merged. The generation config is the source's even where transformers would not save it:
        vicuna's and LLaVA's have a temperature without do_sample.
        """
        model, kept = self.model, {}
        for name, weight in whole_weights(model) if weights else ():
            if rank() == 0:  # on its host
                kept[name] = weight.detach().to("cpu", dtype)
        if rank() > 0:
            return
        buffers = dict(model.named_buffers())  # those that are saved stay as they are
        kept |= {name: buffers[name] for name in model.state_dict() if name in buffers}
        config, generation = model.config, model.generation_config
        model.config = getattr(model, "source_config", config)
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder, state_dict=kept)
        finally:
            model.config, model.generation_config = config, generation
        generation.to_json_file(folder / "generation_config.json")
        self.processor.save_pretrained(folder)
        name = {"dtype": str(dtype).removeprefix("torch.")}  # not that of the master weights
        said = json.loads((folder / "config.json").read_text(),
                          object_hook=lambda part: part | name if "dtype" in part else part)
        utils.write_json(folder / "config.json", said)
        for path in folder.glob("*.safetensors"):  # written for their owner alone
            path.chmod((folder / "config.json").stat().st_mode)


def shard(policy, dtype, offload=False):
    """Bring `policy` from the host to this rank's device, sharded over the ranks by FSDP2.

    What trains becomes float32 master weights, the rest stays in `dtype`, in which all computes;
    with `offload` both wait on the host, the optimiser's state beside them. A decoder layer is a
    group, and no device holds more of the model unsharded than one; the rest is the root's: tied
    embeddings and head, which must share a group, and the vision tower, which a rank without images
    never calls (see Policy.forward). One rank in float32 has nothing to share out or to cast.
    """
    alone = world_size() == 1 and dtype == torch.float32 and not offload
    mesh = None if alone else init_device_mesh(device().type, (world_size(),))  # not a Mac's mps
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
               "reshard_after_forward": True}  # the root too: no pass leaves it gathered
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for group in (*policy.model.get_decoder().layers, policy):
        for weight in group.parameters():
            if not isinstance(weight, DTensor):
                master = torch.promote_types(weight.dtype, torch.float32)
                kind = master if weight.requires_grad else dtype
                weight.data = weight.data.to(device(), kind, copy=True)
        if not alone:
            fully_shard(group, mesh=mesh, **options)
    return policy.to(device()) if alone else policy
