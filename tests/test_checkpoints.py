"""Tier 3: what a checkpoint's files can say. The toy, one field changed at a time: the same run to the bit, or
a sentence before step 1. What defines a model (its sizes, its RoPE, its normalisation) is not varied here."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies
from PIL import Image

import doctor
import rollout
import utils
from conftest import branching
from data import load_samples
from policy import collate, freeze, load_model, load_processor, Policy
from train_sft import with_golden_responses

TOY = Path(__file__).parents[1] / "toy_model"
ARGS = rollout.Args(dtype="float32")
DROP = object()  # the field is taken out


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Four prompts of the toy's kind: two sizes of picture, two pictures, none; with golden responses."""
    folder = tmp_path_factory.mktemp("rows")
    for name, size in (("a", (84, 84)), ("b", (112, 56))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    rows = [{"question": "<image>How many red?", "images": ["a.png"]},
            {"question": "<image>How many blue?", "images": ["b.png"]},
            {"question": "<image>and<image>: same?", "images": ["a.png", "b.png"]},
            {"question": "What is 2 + 3?", "images": []}]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(
        row | {"id": str(i), "answer": "5", "solution": " 2 , 3 . So \\boxed{5}"}) + "\n" for i, row in enumerate(rows)))
    return path


def changed(folder, file, keys, value, source=TOY):
    """A copy of a checkpoint in which one field of one file is another; the weights are linked."""
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            os.symlink(path, folder / path.name)
        elif path.is_file():
            shutil.copy(path, folder)
    *parents, last = keys.split(".")
    whole = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    place = whole
    for key in parents:
        place = place.setdefault(key, {})
    if value is DROP:
        place.pop(last, None)
    else:
        place[last] = value
    (folder / file).write_text(json.dumps(whole))
    return folder


def journey(path, rows):
    """All that a run of this checkpoint would do with its rows, as values that compare: what the trainer and the
    sampler read, say, think of it and train on; and what the first checkpoint's files hold."""
    path = str(path)
    processor = load_processor(path)
    samples = load_samples(rows, processor, 512)
    model = load_model(path)
    freeze(model, True, True, True)
    policy = branching(model, processor).train()
    engine = rollout.make_engine("hf", model, processor, ARGS, policy.sharing)
    doctor.rehearse(engine, samples, replace(ARGS, model=path), policy)
    done = engine.generate(samples, 2, 1.0, 1.0, 12, 0)
    logprobs, entropies = policy(policy.batch(done), 1.0)
    plain, _ = Policy(model, processor)(collate(done, processor), 1.0)
    plain.sum().backward()
    golden = with_golden_responses(samples, processor, 96, rollout.end_ids(rollout.generation_config(path), processor)[0])
    return {"read": [(s.prompt_text, s.prompt_ids) for s in samples],
            "said": [(s.completion_ids, s.completion_text, s.finish_reason, s.sampler_logprobs) for s in done],
            "thought": [x.tolist() for x in (logprobs, entropies, plain)],
            "gradients": [(n, p.grad.double().norm().item()) for n, p in model.named_parameters() if p.grad is not None],
            "golden": [s.completion_ids for s in golden]}


@pytest.fixture(scope="module")
def plain(rows, one_rank):
    """The journey of the toy as it is; its samples end by themselves now and then."""
    return journey(TOY, rows)


TOKENS = {token["content"]: token["id"] for token in json.loads((TOY / "tokenizer.json").read_text())["added_tokens"]}
END, PAD = TOKENS["<|im_end|>"], TOKENS["<|endoftext|>"]


def around(before, after):
    """A tokenizer's post-processor that writes tokens around every text."""
    def special(token):
        return {"SpecialToken": {"id": token, "type_id": 0}}
    single = [*map(special, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, after)]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {t: {"id": t, "ids": [TOKENS[t]], "tokens": [t]} for t in (*before, *after)}}


FIELDS = [  # (file, field, value)
    # the tokenizer: what a trainer or a converter leaves behind
    ("tokenizer.json", "truncation", {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}),
    ("tokenizer.json", "truncation", {"direction": "Left", "max_length": 40, "strategy": "LongestFirst", "stride": 0}),
    ("tokenizer.json", "padding", {"strategy": {"Fixed": 300}, "direction": "Left", "pad_to_multiple_of": None,
                                   "pad_id": PAD, "pad_type_id": 0, "pad_token": "<|endoftext|>"}),
    ("tokenizer.json", "padding", {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 64,
                                   "pad_id": PAD, "pad_type_id": 0, "pad_token": "<|endoftext|>"}),
    ("tokenizer.json", "post_processor", around([], ["<|im_end|>"])),
    ("tokenizer.json", "post_processor", around(["<|im_start|>"], [])),  # not its BOS, and the template's first mark
    ("tokenizer_config.json", "model_max_length", 16),
    ("tokenizer_config.json", "model_max_length", [16]),
    ("tokenizer_config.json", "max_length", 16),
    ("tokenizer_config.json", "truncation", True),
    ("tokenizer_config.json", "padding", "max_length"),
    ("tokenizer_config.json", "padding_side", "left"),
    ("tokenizer_config.json", "truncation_side", "left"),
    ("tokenizer_config.json", "pad_token", DROP),
    ("tokenizer_config.json", "pad_token", "<|im_end|>"),
    ("tokenizer_config.json", "add_eos_token", True),
    ("tokenizer_config.json", "add_bos_token", True),
    ("tokenizer_config.json", "clean_up_tokenization_spaces", True),
    ("tokenizer_config.json", "split_special_tokens", True),
    ("tokenizer_config.json", "add_prefix_space", True),
    ("tokenizer_config.json", "spaces_between_special_tokens", True),
    ("tokenizer_config.json", "eos_token", DROP),
    ("tokenizer_config.json", "eos_token", "<|endoftext|>"),  # the generation config's is trained and stops
    # the processor
    ("processor_config.json", "padding", "max_length"),
    ("processor_config.json", "truncation", True),
    ("processor_config.json", "max_length", 16),
    ("processor_config.json", "image_processor.return_tensors", "np"),
    ("processor_config.json", "image_processor.do_convert_rgb", False),  # pictures come as RGB
    # the generation config: sampling is the flags', an end of a response is from either file
    ("generation_config.json", "eos_token_id", [END]),
    ("generation_config.json", "eos_token_id", DROP),
    ("generation_config.json", "eos_token_id", -1),
    ("generation_config.json", "eos_token_id", [END, "<|im_end|>"]),
    ("generation_config.json", "pad_token_id", DROP),
    ("generation_config.json", "temperature", 0.2),
    ("generation_config.json", "do_sample", True),
    ("generation_config.json", "top_k", 1),
    ("generation_config.json", "top_p", 0.001),
    ("generation_config.json", "repetition_penalty", 1.5),
    ("generation_config.json", "no_repeat_ngram_size", 1),
    ("generation_config.json", "suppress_tokens", [20, 21, 22]),
    ("generation_config.json", "max_length", 8),
    ("generation_config.json", "max_new_tokens", 2),
    ("generation_config.json", "num_beams", 4),
    ("generation_config.json", "num_return_sequences", 3),
    ("generation_config.json", "use_cache", False),
    ("generation_config.json", "cache_implementation", "static"),
    ("generation_config.json", "output_scores", True),
    # the model's config: what is no part of its function
    ("config.json", "text_config.attention_dropout", 0.5),
    ("config.json", "vision_config.attention_dropout", 0.5),
    ("config.json", "text_config.hidden_dropout", 0.5),
    ("config.json", "text_config.use_cache", False),
    ("config.json", "use_cache", False),
    ("config.json", "output_attentions", True),
    ("config.json", "output_hidden_states", True),
    ("config.json", "return_dict", False),
    ("config.json", "dtype", "bfloat16"),
    ("config.json", "torch_dtype", "float16"),
    ("config.json", "text_config.dtype", "bfloat16"),
    ("config.json", "text_config.pad_token_id", None),
    ("config.json", "text_config.eos_token_id", PAD),
    ("config.json", "text_config.bos_token_id", 1),
    ("config.json", "text_config.sliding_window", 4096),
    ("config.json", "text_config.use_sliding_window", True),
    ("config.json", "text_config.layer_types", ["sliding_attention"] * 4),
    ("config.json", "text_config.max_window_layers", 0),
    ("config.json", "text_config.initializer_range", 5.0),
    ("config.json", "attn_implementation", "flash_attention_2"),
    ("config.json", "attn_implementation", "eager"),
    ("config.json", "architectures", ["Qwen2VLForConditionalGeneration"]),
    ("config.json", "tie_word_embeddings", False),
    ("config.json", "text_config.vocab_size", 400),
    ("config.json", "text_config.num_hidden_layers", 5),
    ("config.json", "text_config.num_hidden_layers", 3),
    ("config.json", "image_token_id", 4),
    ("config.json", "model_type", "glassbox_vl"),
    ("config.json", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("config.json", "quantization_config", {"quant_method": "gptq", "bits": 4}),
]


def outcome(path, rows):
    """The journey, or the sentence that it ended in."""
    try:
        return journey(path, rows)
    except utils.UserError as error:
        assert str(error).count("\n") == 0 and len(str(error)) > 30
        return str(error)



SAME, SENTENCE, EITHER = "the same to the bit", "a sentence", "the same to the bit, or a sentence"


@pytest.mark.parametrize("file, field, value", FIELDS, ids=[f"{f.split('.')[0]}-{n}-{str(v)[:24]}" for f, n, v in FIELDS])
def test_one_field_changes_nothing_or_is_refused(file, field, value, plain, rows, tmp_path):
    """The stories: prompts cut to 40 tokens, dropout in training, ends that nothing stops at (faults of many peers)."""
    got = outcome(changed(tmp_path, file, field, value), rows)
    if not isinstance(got, str):
        assert [name for name in plain if got[name] != plain[name]] == []


def test_the_journey_sees_a_difference(plain, rows, tmp_path):
    """What defines the model does change it: each part of the journey can tell."""
    turned = journey(changed(tmp_path, "config.json", "text_config.rope_parameters.rope_theta", 10.0), rows)
    assert turned["read"] == plain["read"] and turned["said"] != plain["said"]
    assert turned["thought"] != plain["thought"] and turned["gradients"] != plain["gradients"]


def leaves(tree, above=""):
    """Every field of a JSON document, by its path."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield above + key


FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json")
EVERYWHERE = [(f, field) for f in FILES for field in leaves(json.loads((TOY / f).read_text()))]
VALUES = [None, True, False, 0, 1, -1, 3, 0.5, "", "a", "float16", [], [1], {}, {"a": 1}, DROP]


@pytest.mark.parametrize("examples", [25, pytest.param(250, marks=pytest.mark.slow)])
def test_no_field_ends_in_a_traceback(examples, rows, one_rank, tmp_path_factory):
    """Whatever stands anywhere: a run, or a sentence."""
    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(where=strategies.sampled_from(EVERYWHERE), value=strategies.sampled_from(VALUES))
    def any_field(where, value):
        outcome(changed(tmp_path_factory.mktemp("checkpoint"), *where, value), rows)

    any_field()
