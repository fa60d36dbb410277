"""What a run needs of a GPU's memory, and an update of its time, found without one: real code, tensors without numbers.

A fake tensor has a shape, a dtype and a device, and no memory. Here a rank's own functions (`shard`, `update`,
`save_checkpoint` ...) run on such tensors, on a made-up device, among ranks that do not exist; a ledger under them adds
up the bytes of what is alive. What is assumed:

- masks are full: prompts are alike in length, and so are answers, so that what depends on data has a shape (`answer`);
- attention is one kernel that keeps queries, keys, values, output and normaliser (`FlashAttention`), as flash and flex
  attention do, which cannot run here;
- images' features are known already: a frozen vision tower computes an image once, alone, in less than an update takes.

PyTorch's own FSDPMemTracker counts in the same way, but one forward and backward alone. `python tests/bench.py memory`
and `python tests/bench.py work` call this file.
"""

import contextlib
import copy
import functools
import itertools
import os
import re
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import FlopCounterMode

from bench import qwen_config, SECTIONS, SHAPES, VISION

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------
# The ledger: bytes that are alive, by device


class Ledger(TorchDispatchMode):
    """Within it, `held` and `peak` count the bytes of all storages that operations make, by type of device.

    It answers, too, where an operation asks what numbers a tensor holds.
    """

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known, self.paused = Counter(), Counter(), {}, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # which first makes ordinary tensors of itself
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # the short way: half of what is asked is this
        out = answer(func, args)
        out = func(*args, **kwargs or {}) if out is None else out
        for tensor in () if self.paused else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return out

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.known:
            ref = weakref.ref(storage, lambda _: self.add(self.known[key][1], -self.known.pop(key)[2]))
            self.known[key] = [ref, tensor.device.type, 0]
        self.resized(storage)

    def resized(self, storage):
        entry = self.known.get(id(storage))
        if entry and entry[2] != storage.nbytes():
            more, entry[2] = storage.nbytes() - entry[2], storage.nbytes()
            self.add(entry[1], more)

    def add(self, device, size):
        self.held[device] += size
        self.peak[device] = max(self.peak[device], self.held[device])

    def __enter__(self):
        resize = torch.UntypedStorage.resize_  # how FSDP frees what it gathered; no operation, so nobody dispatches it

        def resize_and_note(storage, size):
            resize(storage, size)
            self.resized(storage)

        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_note)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def measure(self, function, *arguments):
        """What a function returns, and the peaks by device while it ran."""
        self.peak = Counter(self.held)
        return function(*arguments), dict(self.peak)


def answer(func, args):
    """What an operation gives that depends on numbers, where each mask is full and each number is 1; else None."""
    if func is aten._local_scalar_dense.default:  # item(), bool(), float()
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    if func is aten.is_pinned.default:
        return True
    if func is aten._pin_memory.default:
        return torch.empty_like(args[0])
    if func is aten.nonzero.default:
        return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
    if func is aten.masked_select.default:
        return args[0].new_empty(args[0].numel())
    if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
        tensor, (mask,) = args
        return tensor.new_empty(mask.numel(), *tensor.shape[mask.dim():])
    return None


# ---------------------------------------------------------------------------------------------
# The machine: a made-up device "gpu", and a group of ranks of which this process is the first


class Nothing:
    """A stream, an event, a guard: whatever is asked of it, it does nothing."""

    def __init__(self, *_, **__):
        self.nothing = lambda *_, **__: self

    def __getattr__(self, name):
        return self.nothing

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class Module(_DummyBackendModule):
    """What `torch.cuda` is to "cuda"."""

    Stream = Event = stream = current_stream = device = Nothing

    def set_device(self, device):
        """There is one."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, *_):
        return None

    def set_rng_state(self, *_):
        """There are no numbers."""


GPU = torch.device("privateuseone", 0)  # CUDA's own name would start CUDA


@functools.cache
def install():
    """Make the device known to this process, for ever: a program that also computes should simulate in a child."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    _setup_privateuseone_for_python_backend("gpu", Module())
    make, data = torch.Tensor._make_subclass, torch._C.TensorBase.data

    def make_subclass(cls, data, requires_grad=False, **kwargs):
        # the keys by which operations are dispatched: those of a CPU, whose tensors can change into a GPU's in place
        if "device_for_backend_keys" in kwargs:
            kwargs["device_for_backend_keys"] = torch.device("cpu")
        return make(cls, data, requires_grad, **kwargs)

    def set_data(self, new):  # `weight.data = weight.data.to(device)` has to change the device
        data.__set__(self, new)
        self.fake_device = new.fake_device

    torch.Tensor._make_subclass = make_subclass
    FakeTensor.data = property(data.__get__, set_data)
    FakeTensor.is_cuda = property(lambda self: self.device.type == "gpu")


class FlashAttention(torch.autograd.Function):
    """The memory and the shapes of flash attention, and of flex attention compiled: no scores."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, total = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, total)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, total = ctx.saved_tensors
        delta = torch.empty_like(total)  # of each row, the product of output and its gradient
        gradients = tuple(map(torch.empty_like, (q, k, v)))
        del delta
        return gradients


def attention(query, key, value, *_, enable_gqa=False, **__):
    return FlashAttention.apply(query, key, value)


@contextlib.contextmanager
def machine(world_size, module_names=("utils", "policy", "siblings", "rollout", "train_grpo")):
    """Within, a rank of `world_size` GPUs that do not exist; yields the ledger of its bytes."""
    install()
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    ledger, propagate = Ledger(), ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate_unseen(*arguments):
        """Sharded tensors ask on fake ones of their own what shape an operation gives."""
        ledger.paused = True
        try:
            return propagate(*arguments)
        finally:
            ledger.paused = False

    modules = [__import__(name) for name in module_names]
    import policy
    import utils

    with contextlib.ExitStack() as stack:
        def put(target, name, value):
            stack.enter_context(mock.patch.object(target, name, value, create=True))

        stack.enter_context(mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": str(world_size)}))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        mesh = init_device_mesh("gpu", (world_size,))
        put(policy, "init_device_mesh", lambda *_: mesh)  # here, since it looks at numbers
        put(torch.cuda, "is_available", lambda: True)
        put(torch.cuda, "is_current_stream_capturing", lambda: False)
        put(fake_tensor, "init_gpu_context", lambda _: None)
        put(FakeTensorMode, "avoid_device_init", True)
        put(torch.utils, "swap_tensors", lambda old, new: setattr(old, "data", new.detach()))  # of `module.to`
        put(FakeTensorMode, "__deepcopy__", lambda self, memo: self)  # a model's copy is of the same mode
        put(torch.nn.functional, "scaled_dot_product_attention", attention)
        for module in modules:
            if hasattr(module, "device"):
                put(module, "device", lambda: GPU)
            if hasattr(module, "compiled_flex_attention"):
                put(module, "compiled_flex_attention", lambda: attention)
        put(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_unseen)
        put(FakeTensor, "tolist", lambda self: np.ones(self.shape).tolist())
        put(utils, "gather", lambda items: list(items) * world_size)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # a device's thread would ask the device
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(ledger)


# ---------------------------------------------------------------------------------------------
# The model, and somebody's answers


def published(name, processor):
    """The config of Qwen2.5-VL 3B or 7B, with the toy's special tokens."""
    return qwen_config(SHAPES[name], VISION, SECTIONS, processor)


def build_model(config, dtype):
    """What `load_model` gives of a checkpoint whose files are in `dtype`, on the host."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from policy import drop_nothing

    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    drop_nothing(model)
    return model


def answers(processor, prompt_tokens, completion_tokens, prompts, group):
    """`prompts` x `group` samples of that length; all but some 40 tokens of a prompt are its picture's."""
    from data import Sample

    side = int(max(1, prompt_tokens - 40) ** 0.5)  # merged patches
    word = len(processor.tokenizer) - 1
    ids = [word] * (prompt_tokens - side**2) + [processor.image_token_id] * side**2
    return [Sample(str(i), "?", "1", "", [str(side)], "", ids, [word] * completion_tokens, "",
                   "stop", [-1.0] * completion_tokens, advantage=1.0)
            for i in range(prompts) for _ in range(group)]


def without_data(policy, dtype, flex):
    """Let `policy.batch` look at its samples for real, on the host, and give fake tensors of what it made.

    Images' features are those that the vision tower would have left in the cache. `flex`: attend as on a GPU.
    """
    import siblings

    make, cache, base = policy.batch, policy.sharing.vision, policy.model.base_model
    rope_index, hidden = base.get_rope_index, policy.model.config.get_text_config().hidden_size

    def fake(value):
        if isinstance(value, torch.Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device=GPU)
        if isinstance(value, siblings.Branches):
            value = siblings.Branches(value.shape, fake(value.slots), value.tokens, fake(value.bias))
            if flex:
                value.mask_blocks()
        if isinstance(value, dict):
            return {key: fake(part) for key, part in value.items()}
        return value

    def batch(samples):
        for image in {image for s in samples for image in s.images} - cache.kept.keys():
            features = torch.empty(int(image) ** 2, hidden, dtype=dtype)
            with _disable_current_modes():
                cache.kept[image] = torch.tensor([[1, 2 * int(image), 2 * int(image)]]), [features]
        with _disable_current_modes(), contextlib.ExitStack() as stack:
            for module in ("policy", "siblings"):
                stack.enter_context(mock.patch.object(sys.modules[module], "device", lambda: torch.device("cpu")))
            made = make(samples)
        return fake(made)

    def positions(ids, *rest, **more):  # of rows that are not packed, the model asks by itself
        if isinstance(ids, FakeTensor):
            return ids.new_empty(3, *ids.shape), ids.new_empty(len(ids), 1)
        return rope_index(ids, *rest, **more)

    policy.batch, base.get_rope_index = batch, positions


# ---------------------------------------------------------------------------------------------
# Memory: a rank from its start to its resumption, as train_grpo.py's `main` has it


class Sampler:
    """What `VLLMEngine.sync` meets in vLLM: it draws the weights, one by one."""

    def __init__(self):
        self.llm_engine, self.wake_up = Nothing(), Nothing().nothing

    def collective_rpc(self, function, args):
        for _ in args[0]:
            self.drawn = True


def engine():
    """A VLLMEngine that sleeps, without a vLLM."""
    from rollout import VLLMEngine

    made = object.__new__(VLLMEngine)
    made.dtype, made.seconds, made.sleeps, made.asleep, made.llm = torch.bfloat16, 3600, True, True, Sampler()
    return made


def start(config, processor, args, dtype, files):
    """Policy and reference as `main` makes them; the latter is None without --kl_coef."""
    import policy as stage
    from siblings import Sharing

    model, reference = build_model(config, files), None
    stage.freeze(model, args.train_vision, args.train_connector, args.train_language)
    sharing = Sharing(model, processor)
    sharing.can_branch &= not args.plain
    if args.kl_coef:
        twin = stage.Policy(stage.twin(model), processor, sharing)
        reference = stage.shard(twin, dtype, args.offload)
    if args.lora_rank:
        stage.add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return stage.shard(stage.Policy(model, processor, sharing), dtype, args.offload).train(), reference


def moments(config, processor, args, gpus, prompts, dtype=torch.bfloat16, files=torch.bfloat16, flex=True):
    """The most bytes that a rank holds at each moment, by device; vLLM's are not among them.

    `args` are those of train_grpo.py, `files` is the checkpoint's dtype. "rest" is what stays between updates. There is
    an "update" for each length of `prompts`.
    """
    import train_grpo
    import utils

    found = {}
    with machine(gpus) as ledger, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        def at(moment, function, *arguments):
            out, found[moment] = ledger.measure(function, *arguments)
            return out

        policy, reference = at("start", start, config, processor, args, dtype, files)
        for each in filter(None, (policy, reference)):
            without_data(each, dtype, flex)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.95), weight_decay=args.weight_decay, fused=True)
        # files are written and read a tensor at a time, from and to where it lies
        stack.enter_context(mock.patch.multiple(utils.dcp, save=Nothing().nothing, load=Nothing().nothing))
        stack.enter_context(mock.patch.object(
            type(policy.model), "save_pretrained", lambda model, path, **_: model.config.save_pretrained(path)))
        at("resume", utils.load_resume_state, Path(folder) / "step_000001", policy, optimizer)
        found["rest"] = dict(ledger.held)
        for length in prompts:
            samples = answers(processor, length, args.max_new_tokens, 64, args.group_size)
            part = policy.micro_batches(samples, args.micro_batch_tokens)[0]
            if reference:
                at("logprobs", train_grpo.logprob_pass, reference, part, args)
            for p in trained:  # an update's later micro-batches find the gradients of its first
                p.grad = torch.zeros_like(p)
            take_step = optimizer.step

            def seen_step():
                found[f"update {length}"] = dict(ledger.peak)
                at("step", take_step)

            optimizer.step, ledger.peak = seen_step, Counter(ledger.held)
            known = reference and {id(s): [0.0] for s in part}
            train_grpo.update(policy, optimizer, part, None, known, args)
            optimizer.step = take_step
        at("sync", engine().sync, policy.model)
        at("save", utils.save_checkpoint, folder, 1, policy, optimizer, dtype)
    return found


# ---------------------------------------------------------------------------------------------
# Cards, and what fits on them

# bytes that PyTorch reports of an RTX 4090 (24 GB), an L40S (48), an H100 (80) and an H200 (141), rounded down
CARDS = {24: 25.3e9, 48: 47.5e9, 80: 84.9e9, 141: 150e9}
BESIDE = 2e9  # estimates: CUDA's context, vLLM's graphs, which stay while it sleeps, and what fragments
WORK = 3e9  # of vLLM's share, neither weights nor cache: activations of its largest batch, graphs (on small cards 2)


def size_of(config):
    """Bytes of all weights in bfloat16, and of a token in an attention cache."""
    text = config.get_text_config()
    with FakeTensorMode():
        weights = 2 * sum(p.numel() for p in build_model(config, torch.bfloat16).parameters())
    head = text.hidden_size // text.num_attention_heads
    return weights, 4 * text.num_hidden_layers * text.num_key_value_heads * head


def sampler_bytes(weights, token, args, card):
    """What the sampler holds of a GPU: (while it answers, asleep, while it takes over weights, tokens of its cache)."""
    if args.engine == "hf":  # rows of tokens, each with room up to a power of 2, and a prompt for each group
        room = 1 << (args.max_new_tokens - 1).bit_length()
        prompts = args.rollout_batch_size // args.group_size * args.max_prompt_tokens * 3 // 2  # their keys in float32
        tokens = args.rollout_batch_size * room + prompts
        logits = 24 * args.rollout_batch_size * 152000  # in bfloat16, float32 and float64
        return weights + tokens * token + logits, weights, weights, tokens
    share = args.vllm_memory * CARDS[card]
    cache = share - weights - (WORK if card >= 80 else WORK - 1e9)
    return share, 0, weights, max(0, int(cache // token))


def needs(row, args, card):
    """Bytes of a GPU by moment, the trainer's and the sampler's, and the tokens of the sampler's cache."""
    awake, asleep, taking, tokens = sampler_bytes(row["weights"], row["token"], args, card)
    of = {name: row["moments"][name].get("gpu", 0) for name in row["moments"]}
    update = max(value for name, value in of.items() if name.startswith(("update", "logprobs")))
    return {"start-up": (of["start"], asleep), "rollout": (of["rest"], awake), "update": (update, asleep),
            "optimiser's step": (of["step"], asleep), "sync": (of["sync"], taking), "save": (of["save"], awake),
            "resume": (of["resume"], asleep)}, tokens


def fits(row, args, card):
    """Whether every moment has room, and vLLM's cache holds one prompt and answer of the greatest length."""
    parts, tokens = needs(row, args, card)
    room = all(sum(part) + BESIDE <= CARDS[card] for part in parts.values())
    return room and tokens >= args.max_prompt_tokens + args.max_new_tokens


def largest_share(row, args, card):
    """The largest --vllm_memory, in hundredths, with which this fits on a card; 0: none."""
    shares = [n / 100 for n in range(90, 4, -1)]
    return next((share for share in shares if fits(row, replace(args, engine="vllm", vllm_memory=share), card)), 0)


def host_bytes(row):
    """The most that a rank needs of the host, and what all ranks of a machine share of it, the files' own pages."""
    held = {name: value.get("cpu", 0) for name, value in row["moments"].items()}
    held["start"] -= row["weights"]
    return max(held.values()) + row["weights"], row["weights"]  # a copy of them while vLLM sleeps


GRID = {  # flags beside --micro_batch_tokens 8192 --max_new_tokens 2048
    "": {}, "--gradient_checkpointing": {"gradient_checkpointing": True},
    "--gradient_checkpointing --offload": {"gradient_checkpointing": True, "offload": True},
    "--gradient_checkpointing --lora_rank 64": {"gradient_checkpointing": True, "lora_rank": 64},
    "--gradient_checkpointing --lora_rank 64 --offload": {
        "gradient_checkpointing": True, "lora_rank": 64, "offload": True}}
PROMPTS = [400, 1300]


def readme_commands():
    """Of each train_grpo.py command for a real model on the README: its words, model, GPUs, card and flags."""
    import train_grpo
    import utils

    found, text = [], (ROOT / "README.md").read_text().replace("\\\n", " ")
    start = r"^(python|torchrun .*?--nproc_per_node (\d+)) train_grpo\.py "
    for match in re.finditer(start + r"(--model \S+VL-(\dB)\S* .*)$", text, re.M):
        cards = [int(n) for n in re.findall(r"\b(\d+) GB", text[: match.start()]) if int(n) in CARDS]
        words = " ".join(match[3].split())
        found.append({"words": words, "model": match[4], "gpus": int(match[2] or 1), "card": cards[-1],
                      "args": utils.parse_args(train_grpo.Args, words.split())})
    return found


def toy_processor():
    import toy

    return toy.build_processor()


def row_of(model, gpus, args, processor):
    config = published(model, processor)
    weights, token = size_of(config)
    print(f"{model} on {gpus} ...", file=sys.stderr)
    return {"model": model, "gpus": gpus, "weights": weights, "token": token,
            "moments": moments(config, processor, args, gpus, PROMPTS)}


def memory():
    """Raw bytes of the README's commands and of a grid of flags: results/memory.json."""
    import train_grpo

    install()
    processor, found = toy_processor(), {"commands": [], "grid": []}
    for command in readme_commands():
        row = row_of(command["model"], command["gpus"], command["args"], processor)
        found["commands"].append({"words": command["words"], "card": command["card"]} | row)
    for model, gpus, flags in itertools.product(SHAPES, (1, 8), GRID):
        if gpus > 1 and "--lora_rank 64 --offload" in flags:
            continue  # who has eight needs no both
        args = train_grpo.Args(micro_batch_tokens=8192, max_new_tokens=2048, **GRID[flags])
        found["grid"].append({"flags": flags} | row_of(model, gpus, args, processor))
    print(*tables(found), sep="\n\n", file=sys.stderr)
    return found


def gigabytes(*parts):
    return " + ".join(f"{part / 1e9:.1f}" for part in parts if part >= 5e7) or "0"


def tables(found):
    """Two tables of what `memory` found, for results/README.md: the README's commands, and what fits where."""
    import report
    import train_grpo
    import utils

    heads = ["", *(f"{c['model']}, {c['gpus']} x {c['card']} GB" for c in found["commands"])]
    columns = []
    for row in found["commands"]:
        args = utils.parse_args(train_grpo.Args, row["words"].split())
        parts, _ = needs(row, args, row["card"])
        most = max(map(sum, parts.values())) + BESIDE
        columns.append({name: gigabytes(*parts[name]) for name in ("start-up", "rollout", "update", "sync", "resume")} | {
            f"the most, with {BESIDE / 1e9:.0f} GB beside": gigabytes(most),
            "fits on, GB": ", ".join(str(card) for card in CARDS if fits(row, args, card)) or "none",
            "host, a rank": gigabytes(host_bytes(row)[0])})
    rows = [heads] + [[name, *(column[name] for column in columns)] for name in columns[0]]
    grid = [["model", "GPUs", "flags", "between updates", *(f"update, P = {n:,}" for n in PROMPTS), "sync", "save",
             "resume", "host", *(f"{card} GB" for card in CARDS)]]
    for row in found["grid"]:
        args = train_grpo.Args(max_new_tokens=2048)
        of = {name: gigabytes(value.get("gpu", 0)) for name, value in row["moments"].items()}
        shares = [largest_share(row, args, card) for card in CARDS]
        grid.append([row["model"], str(row["gpus"]), f"`{row['flags']}`" if row["flags"] else "none", of["rest"],
                     *(of[f"update {n}"] for n in PROMPTS), of["sync"], of["save"], of["resume"],
                     gigabytes(host_bytes(row)[0]), *(f"{share:.2f}" if share else "no" for share in shares)])
    return [report.markdown_table(table) for table in (rows, grid)]


# ---------------------------------------------------------------------------------------------
# Work: operations and bytes of an update, with a copy of the prompt for each answer and with one for all


class Traffic(TorchDispatchMode):
    """`moved`: the bytes that operations read and write, each from and to memory; views and empty tensors are free."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        out = func(*args, **kwargs or {})
        if not func.is_view and "empty" not in func.__name__:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.moved += sum(t.numel() * t.itemsize for t in tensors)
        return out


def pairs(prompt, completion, group, plain):
    """How many pairs of tokens see each other, of one prompt and its answers: what no mask hides."""
    whole = prompt + completion
    if plain:
        return group * whole * (whole + 1) // 2
    return prompt * (prompt + 1) // 2 + group * (completion * prompt + completion * (completion + 1) // 2)


def count_pass(config, processor, layers, prompt, completion, group, plain):
    """Operations and bytes of one forward and backward over a group, layers recomputed; attention by its pairs."""
    import train_grpo

    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.layer_types = layers, ["full_attention"] * layers
    args = train_grpo.Args(gradient_checkpointing=True, plain=plain)
    with machine(1):
        policy, _ = start(config, processor, args, torch.bfloat16, torch.bfloat16)
        without_data(policy, torch.bfloat16, True)
        batch = policy.batch(answers(processor, prompt, completion, 1, group))
        with FlopCounterMode(display=False) as counter, Traffic() as traffic:
            policy(batch, 1.0)[0].sum().backward()
    # forward, again in backward, and backward's five products where forward has two
    width = text.hidden_size
    seen = pairs(prompt, completion, group, plain)
    attention = layers * 4 * width * seen * (1 + 1 + 2.5)
    tokens = batch["inputs"]["input_ids"].numel()
    traffic.moved += layers * 2 * width * tokens * (4 + 4 + 8)  # q, k, v, out; and with gradients
    return [counter.get_total_flops() + attention, traffic.moved]


def work():
    """Both ways' operations and bytes, and how many times less the shared one's are: results/work.json."""
    install()
    processor, rows = toy_processor(), []
    for model, group, prompt, completion in itertools.product(SHAPES, (8, 16), (400, 1300), (400, 1024, 2048)):
        config = published(model, processor)
        row = {"model": model, "group": group, "prompt_tokens": prompt, "completion_tokens": completion}
        for way, plain in (("plain", True), ("shared", False)):
            # both grow by the same for each layer
            one, two = (count_pass(config, processor, n, prompt, completion, group, plain) for n in (1, 2))
            more = SHAPES[model]["num_hidden_layers"] - 1
            row[way] = dict(zip(("operations", "bytes"), (a + more * (b - a) for a, b in zip(one, two))))
        for unit in ("operations", "bytes"):
            row[f"times_fewer_{unit}"] = round(row["plain"][unit] / row["shared"][unit], 2)
        rows.append(row)
    print(work_table(rows), file=sys.stderr)
    return rows


def work_table(rows):
    """results/README.md's table of `work`: a line for each length of prompt and answer, the models side by side."""
    import report

    kinds = list(itertools.product(SHAPES, (8, 16)))
    table = [["P", "C", *(f"{model}, G = {group}" for model, group in kinds)]]
    for prompt, completion in itertools.product((400, 1300), (400, 1024, 2048)):
        cells = []
        for model, group in kinds:
            row = next(r for r in rows if (r["model"], r["group"], r["prompt_tokens"], r["completion_tokens"])
                       == (model, group, prompt, completion))
            work = " to ".join(f"{row[way]['operations'] / 1e12:,.0f}" for way in ("plain", "shared"))
            cells.append(f"{row['times_fewer_operations']:.2f} ({work}), {row['times_fewer_bytes']:.2f}")
        table.append([f"{prompt:,}", f"{completion:,}", *cells])
    return report.markdown_table(table)
