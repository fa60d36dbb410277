"""What all tests share: pytest's settings, three tiny random models and a small, nasty data set.

Nothing here needs a network, a GPU or trained weights. The models are transformers' own classes
with about 100,000 random weights: enough to be right or wrong, too few to be clever.
"""

import copy
import functools
import gc
import io
import json
import os
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageDraw

import doctor
import toy
import utils
from data import load_samples
from policy import load_model, load_processor, Policy
from rollout import HFEngine
from runs import resumable_throughout, TINY, run, splits
from siblings import Sharing

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


# ---------------------------------------------------------------------------------------------
# Settings


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: learns to a threshold; only with -m slow")
    config.addinivalue_line("markers", "vllm: needs requirements.txt's; skips without it, but fails with -m vllm")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    torch.set_num_threads(1)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # a fifth of all time went into looking for garbage among what the imports made


@pytest.fixture(scope="session")
def one_rank():
    """A process group of one: `update` and its like issue collectives on one rank too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Models: hidden size 128, two layers of language and two of vision, in three families. As in real
# checkpoints several query heads share a key-value head, of which there are several; the head is
# tied to the embeddings (as in Qwen2.5-VL 3B), in Qwen3-VL a matrix of its own (as in its 8B)


@functools.cache
def trained_processor():
    return toy.build_processor()  # which trains a tokenizer, for a second


def toy_processor():
    """The toy's, to be changed by whoever asks."""
    return copy.deepcopy(trained_processor())


def build_processor(family):
    """The family's own processor class around the toy's tokenizer; Qwen3-VL has patches of 16."""
    base = toy_processor()
    patch = 16 if family == "qwen3_vl" else 14
    cell = 2 * patch  # two by two patches become one token
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch, min_pixels=cell**2, max_pixels=16 * cell**2)
    Processor, Videos = {
        "qwen2_vl": (transformers.Qwen2VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen3_vl": (transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor)}[family]
    return Processor(images, base.tokenizer, Videos(), chat_template=toy.CHAT_TEMPLATE)


def build_model(family, processor, heads=(4, 2), head_dim=32, **more):
    """A random model; weights larger than usual, so that its distributions are far from uniform.

    `heads` are query heads and key-value heads; `more` goes into the config of the language model.
    vLLM has no kernel for heads below 32 on a CPU.
    """
    ids = processor.tokenizer.convert_tokens_to_ids
    hidden, part, tied = heads[0] * head_dim, 3 * head_dim // 16, family != "qwen3_vl"
    rope = {"rope_type": "default", "rope_theta": 100.0,
            "mrope_section": [head_dim // 2 - 2 * part, part, part]}
    text = {"vocab_size": len(processor.tokenizer), "hidden_size": hidden, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
            "max_position_embeddings": 4096, "tie_word_embeddings": tied,
            "initializer_range": 1.6 / hidden**0.5,
            "bos_token_id": None, "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"), "rope_parameters": rope}
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32, "initializer_range": 0.2}
    if family == "qwen2_vl":  # here hidden_size is what comes out
        vision |= {"hidden_size": hidden, "embed_dim": 32, "mlp_ratio": 2, "patch_size": 14}
        Config, Model = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        vision |= {"out_hidden_size": hidden, "intermediate_size": 64, "patch_size": 14,
                   "window_size": 56, "fullatt_block_indexes": [1]}
        Config = transformers.Qwen2_5_VLConfig
        Model = transformers.Qwen2_5_VLForConditionalGeneration
    else:
        text |= {"head_dim": head_dim}
        rope |= {"mrope_interleaved": True}
        vision |= {"out_hidden_size": hidden, "intermediate_size": 64, "patch_size": 16,
                   "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        Config, Model = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    return Model(Config(
        text_config=text | more, vision_config=vision, tie_word_embeddings=tied,
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>")))


def save_tiny(family, folder):
    processor = build_processor(family)
    build_model(family, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_paths(tmp_path_factory):
    """Family name to a saved checkpoint folder, model and processor."""
    return {f: save_tiny(f, tmp_path_factory.mktemp(f)) for f in FAMILIES}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tiny(family, tiny_paths, data_path):
    """`model` (fresh for every test), `processor` and `samples`, for each family in turn."""
    return fresh(tiny_paths[family], data_path)


@pytest.fixture
def qwen(tiny_paths, data_path):
    """The same for Qwen2.5-VL alone, where the family makes no difference."""
    return fresh(tiny_paths["qwen2_5_vl"], data_path)


def fresh(path, data):
    """What `load_tiny` gives, loaded once."""
    return copy.deepcopy(loaded(path, data))


@functools.cache
def loaded(path, data):
    return load_tiny(path, data)


def load_tiny(path, data):
    processor = load_processor(path)
    samples = load_samples(data, processor, 2048)
    model = load_model(path)
    return SimpleNamespace(path=path, model=model, processor=processor, samples=samples)


def branching(model, processor, megabytes=0):
    """A policy whose answers share their prompt, and their images' features within `megabytes`."""
    return Policy(model, processor, Sharing(model, processor, megabytes))


def sampler(model, processor, batch_size, sharing=None):
    """The embedded engine, with a shared prompt cache as the stages make it."""
    return HFEngine(model, processor, batch_size, sharing or Sharing(model, processor, 0))


def examined(engine, policy, processor, samples, args, seed):
    """The doctor's rows that failed, where the seed chose the prompts, and what is drawn."""
    samples = random.Random(seed).sample(samples, len(samples))
    other = SimpleNamespace(sync=engine.sync, generate=lambda *words: engine.generate(*words[:-1], f"doctor {seed}"))
    return [row for row in doctor.doctor(other, policy, samples, processor, args) if not row[1]]


# ---------------------------------------------------------------------------------------------
# Data: every image mode and shape that real data sets were seen to hold


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rows = [{"id": name, "question": "<image>What is it?", "answer": str(i),
             "solution": f"\\boxed{{{i}}}", "image": save_image(folder, name)}
            for i, name in enumerate(IMAGES)]
    rows.append({"id": "two", "question": "<image>or<image>: which is larger?", "answer": "2",
                 "solution": "\\boxed{2}", "images": [rows[0]["image"], rows[3]["image"]]})
    rows.append({"id": "text", "question": "What is 2 + 3?", "answer": "5",
                 "solution": "2 + 3 = \\boxed{5}"})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


IMAGES = {  # name: (mode, width, height, file ending)
    "rgb": ("RGB", 60, 60, "png"),
    "rgba": ("RGBA", 90, 40, "png"),
    "palette": ("P", 56, 84, "png"),
    "grey": ("L", 100, 100, "png"),
    "cmyk": ("CMYK", 70, 50, "jpg"),
    "rotated": ("RGB", 112, 56, "jpg"),
    "line": ("RGB", 150, 1, "png"),
    "dot": ("RGB", 3, 2, "png"),
}


def save_image(folder, name):
    """Left half red, right half white or transparent black; "rotated" has an EXIF quarter turn."""
    mode, width, height, ending = IMAGES[name]
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    ImageDraw.Draw(picture).rectangle((0, 0, width // 2 - 1, height), fill=(200, 30, 30, 255))
    options = {}
    if mode == "P":
        picture = picture.quantize(8)
        options = {"transparency": picture.getpixel((width - 1, 0))}
    elif mode != "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert(mode)
    if name == "rotated":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # orientation: turn a quarter clockwise to show
    picture.save(folder / "images" / f"{name}.{ending}", **options)
    return f"images/{name}.{ending}"


def png(colour):
    """The bytes of a 56 x 56 picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(file, "png")
    return file.getvalue()


# ---------------------------------------------------------------------------------------------
# Runs that several files look at


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The toy's three splits, cut to 16 rows each."""
    folder = shutil.copytree(ROOT / "toy_data", tmp_path_factory.mktemp("data") / "toy")
    for path in folder.glob("*.jsonl"):
        utils.write_jsonl(path, utils.read_jsonl(path)[:16])
    return folder


@pytest.fixture(scope="session")
def grpo_run(data, tmp_path_factory):
    """Four steps of GRPO on one rank, a checkpoint after each; words, folder, result, stderr."""
    out = tmp_path_factory.mktemp("runs") / "grpo"
    words = ["train_grpo.py", *TINY, *splits(data), "--epochs", 1, "--out", out]
    return words, out, *run(*words, fault=resumable_throughout)


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """The same without evaluations, to be copied and disturbed: the words but --out, and the run folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    words = ["train_grpo.py", *TINY, "--max_steps", "4", "--validation_data=", "--test_data=", *splits(data)[:2]]
    run(*words, "--out", out, fault=resumable_throughout)
    return words, out


# ---------------------------------------------------------------------------------------------
# Completions to train on


def answered(samples, processor, seed=0):
    """Samples completed by 1 to 9 random tokens, every second one ended by EOS: ready for
    `update`."""
    generator = torch.Generator().manual_seed(seed)
    done = []
    for i, sample in enumerate(samples):
        count = int(torch.randint(1, 10, (1,), generator=generator))
        words = (len(toy.SPECIAL), len(processor.tokenizer))
        ids = torch.randint(*words, (count,), generator=generator).tolist()
        ids += [processor.tokenizer.eos_token_id] * (i % 2)
        done.append(replace(sample, completion_ids=ids, sampler_logprobs=[-1.0] * len(ids),
                            finish_reason="stop" if i % 2 else "length",
                            advantage=(-1.0) ** i * (1 + i)))
    return done
