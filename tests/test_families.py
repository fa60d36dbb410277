"""Families beyond Qwen's: what they compute here is what their own forward says, or they are refused."""

import copy
import functools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

import doctor
import rollout
import toy
import utils
from conftest import branching, build_processor, FAMILIES, fresh, sampler, toy_processor
from data import BARE, banned_ids, load_samples, repeats_placeholders, tokenise, with_placeholders
from pictures import open_image
from policy import freeze, image_inputs, load_processor, Policy
from runs import run, TINY
from siblings import Sharing

# which SmolVLM's processor asks for videos alone, and a package of that name is no requirement
transformers.models.smolvlm.processing_smolvlm.num2words = str
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = VISION | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "bos_token_id": None, "max_position_embeddings": 4096}


def tokenizer(**names):
    """The toy's, with the family's own marks."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=toy_processor().tokenizer.backend_tokenizer, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", extra_special_tokens=names)


def language(tokens, kind, **more):
    ids = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    return TEXT | ids | {"model_type": kind, "vocab_size": len(tokens)} | more


def llava_processor(Processor, Images, **more):
    """A tokenizer whose image token is the mark of our data sets, and a LLaVA's processor around it."""
    tokens = tokenizer(image_token="<image>")
    images = Images(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **more)
    template = toy.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    return tokens, Processor(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template)


def llava(kind="llama", **more):
    """LLaVA 1.5: no M-RoPE, and its image token is the mark of our data sets. Its language may be any."""
    tokens, processor = llava_processor(transformers.LlavaProcessor, transformers.LlavaImageProcessor)
    return processor, transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        text_config=language(tokens, kind, **more), vision_config=CLIP, image_seq_length=4,
        image_token_index=tokens.convert_tokens_to_ids("<image>")))


def qwen3_5():
    """Qwen3.5: M-RoPE as its forerunners, but every second layer is recurrent."""
    base = toy_processor()
    images = transformers.Qwen2VLImageProcessor(patch_size=16, min_pixels=32**2, max_pixels=16 * 32**2)
    processor = transformers.Qwen3VLProcessor(
        images, base.tokenizer, transformers.Qwen3VLVideoProcessor(), chat_template=toy.CHAT_TEMPLATE)
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 100.0, "mrope_interleaved": True,
            "partial_rotary_factor": 1.0}
    text = language(base.tokenizer, "qwen3_5_text", layer_types=["linear_attention", "full_attention"],
                    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
                    linear_value_head_dim=16, rope_parameters=rope)
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 64,
              "patch_size": 16, "num_position_embeddings": 64}
    ids = base.tokenizer.convert_tokens_to_ids
    return processor, transformers.Qwen3_5ForConditionalGeneration(transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"), vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>")))


def gemma3():
    """Gemma 3: the tokens of an image see each other, later ones too."""
    tokens = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    ids = {name: tokens.convert_tokens_to_ids(getattr(tokens, name)) for name in ("boi_token", "eoi_token", "image_token")}
    images = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    template = toy.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>")
    processor = transformers.Gemma3Processor(images, tokens, template, image_seq_length=4)
    vision = VISION | {"image_size": 56, "patch_size": 14, "vision_use_head": False}
    text = language(tokens, "gemma3_text", query_pre_attn_scalar=32, sliding_window=16,
                    layer_types=["sliding_attention", "full_attention"])
    return processor, transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"], image_token_index=ids["image_token"]))


def llava_next():
    """LLaVA-NeXT: as many tiles as a picture's shape asks for, so that two pictures are no tensor."""
    pins = [[28, 56], [56, 28], [56, 56]]
    tokens, processor = llava_processor(
        transformers.LlavaNextProcessor, transformers.LlavaNextImageProcessor, image_grid_pinpoints=pins)
    return processor, transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(
        text_config=language(tokens, "llama"), vision_config=CLIP, image_grid_pinpoints=pins, image_seq_length=4,
        image_token_index=tokens.convert_tokens_to_ids("<image>")))


def internvl():
    """InternVL: tiles as well, which its processor asks its image processor for, whatever the files say."""
    tokens = tokenizer(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                       video_token="<video>")
    images = transformers.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=False)
    template = toy.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>")
    processor = transformers.InternVLProcessor(
        images, tokens, transformers.InternVLVideoProcessor(), image_seq_length=1, chat_template=template)
    vision = VISION | {"image_size": [28, 28], "patch_size": [14, 14]}
    return processor, transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(
        text_config=language(tokens, "qwen2"), vision_config=vision, image_seq_length=1, downsample_ratio=0.5,
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>")))


def smolvlm():
    """SmolVLM: tiles whose number the prompt's text tells by marks for rows and columns."""
    tokens = tokenizer(image_token="<image>", fake_image_token="<fake_token_around_image>",
                       global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>")
    tokens.add_tokens([f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)], special_tokens=True)
    images = transformers.SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    template = toy.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    processor = transformers.SmolVLMProcessor(
        images, tokens, transformers.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=template)
    return processor, transformers.SmolVLMForConditionalGeneration(transformers.SmolVLMConfig(
        text_config=language(tokens, "llama"), vision_config=VISION | {"image_size": 56, "patch_size": 14},
        scale_factor=2, image_token_id=tokens.convert_tokens_to_ids("<image>"), pad_token_id=tokens.pad_token_id))


def glm4v():
    """GLM-4V: M-RoPE, and one placeholder for images and the frames of videos."""
    names = ["image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video"]
    names = {name: f"<|{name}|>" for name in names}
    tokens = tokenizer(image_token=names["image"], video_token=names["video"], **names)
    ids = {name: tokens.convert_tokens_to_ids(mark) for name, mark in names.items()}
    images = transformers.Glm4vImageProcessor(size={"shortest_edge": 2 * 28**2, "longest_edge": 32 * 28**2})
    marks = "<|begin_of_image|><|image|><|end_of_image|>"
    template = toy.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", marks)
    processor = transformers.Glm4vProcessor(images, tokens, transformers.Glm4vVideoProcessor(), chat_template=template)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 64,
              "patch_size": 14, "image_size": 56}
    return processor, transformers.Glm4vForConditionalGeneration(transformers.Glm4vConfig(
        text_config=language(tokens, "glm4v_text", rope_parameters=rope), vision_config=vision,
        image_token_id=ids["image"], video_token_id=ids["video"], image_start_token_id=ids["begin_of_image"],
        image_end_token_id=ids["end_of_image"], video_start_token_id=ids["begin_of_video"],
        video_end_token_id=ids["end_of_video"]))


TILED = [llava_next, internvl, smolvlm]


@pytest.fixture(scope="module")
def unlike_data(data_path, tmp_path_factory):
    """The nasty data set, and a prompt whose two pictures are cut into unlike numbers of tiles."""
    folder = shutil.copytree(data_path.parent, tmp_path_factory.mktemp("unlike") / "data")
    row = {"id": "unlike", "question": "<image>or<image>?", "answer": "1", "solution": "\\boxed{1}",
           "images": ["images/line.png", "images/rgb.png"]}
    with (folder / data_path.name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    return folder / data_path.name


def save(build, folder):
    """A random checkpoint; weights larger than usual, so that no answer looks like another."""
    processor, model = build()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of a family its folder, which nobody changes."""
    return functools.cache(lambda build: save(build, tmp_path_factory.mktemp(build.__name__)))


def reference(tiny, sample):
    """Log-probabilities of a completion by the model's own forward on its own processor's output, alone."""
    images = [open_image(image) for image in sample.images] or None
    inputs = tiny.processor(text=[sample.prompt_text], images=images, return_tensors="pt")
    tail = torch.tensor([sample.completion_ids])
    for name, more in (("input_ids", tail), ("attention_mask", tail**0), ("mm_token_type_ids", tail * 0),
                       ("token_type_ids", tail * 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], more], 1)
    logits = tiny.model(**inputs).logits[0, -tail.shape[1] - 1 : -1]
    logits[:, banned_ids(tiny.processor)] = -torch.inf
    return logits.log_softmax(-1).gather(1, tail.T).squeeze(1)


def windows():
    """Mistral's language: its config has no layer types, a window alone."""
    return llava("mistral", sliding_window=8)


def chunks():
    """Llama 4's: layers that see no further than the beginning of their chunk."""
    return llava("llama4_text", attention_chunk_size=8, layer_types=["chunked_attention", "full_attention"],
                 no_rope_layers=[1, 0], intermediate_size_mlp=64, moe_layers=[])


# recurrences add up rounding
@pytest.mark.parametrize("build, tolerance", [
    (llava, 1e-4), (qwen3_5, 2e-3), (windows, 1e-4), (chunks, 1e-4), (gemma3, 1e-4), (llava_next, 1e-4),
    (internvl, 1e-4), (smolvlm, 1e-4), (glm4v, 1e-4)])
@torch.no_grad()
def test_sampler_and_trainer_are_the_models_own_forward(build, tolerance, saved, unlike_data):
    """Prompts of unlike lengths, with images and without, in one batch of each.

    The story: positions of the embedded sampler counted the padding on the left of a LLaVA prompt, and
    were 7 nats off; a packed row let the state of a recurrent layer run from one prompt into the next.
    """
    tiny = fresh(saved(build), unlike_data)
    tiny.model.eval()
    freeze(tiny.model, False, False, True)
    banned = banned_ids(tiny.processor)
    tiny.model.get_output_embeddings().weight[banned] *= 8  # it wishes to say placeholders
    engine = sampler(copy.deepcopy(tiny.model), tiny.processor, 256)
    policy = branching(tiny.model, tiny.processor, 1)
    if build in TILED:
        tiles = [image_inputs(tiny.processor, i)["pixel_values"].flatten(0, -4) for i in tiny.samples[-1].images]
        assert len(tiles[0]) != len(tiles[1])
    assert (policy.sharing.vision is None) == (build not in (glm4v, qwen3_5))
    assert engine.sharing.can_branch == policy.sharing.can_branch == (build is glm4v)
    drawn = engine.generate(tiny.samples, 2, 1.0, 1.0, 8, 0)
    policy.model.train()
    trained, _ = policy(policy.batch(drawn), 1.0)
    policy.model.eval()
    assert len({len(s.prompt_ids) for s in drawn}) > 2
    assert not {*banned} & {i for s in drawn for i in s.completion_ids}
    for s, ours in zip(drawn, trained):
        theirs = reference(tiny, s)
        assert (ours[: len(theirs)] - theirs).abs().max() < tolerance, s.id
        assert (torch.tensor(s.sampler_logprobs) - theirs).abs().max() < tolerance, s.id


@pytest.mark.parametrize("template_writes_it", [True, False])
def test_a_prompt_begins_once(data_path, saved, template_writes_it):
    """A template that writes BOS and a tokenizer that adds it made two; unlike chats as they were trained on."""
    processor = load_processor(saved(llava))
    tokens = processor.tokenizer
    tokens.add_special_tokens({"bos_token": "<s>"})
    plain = [s.prompt_ids for s in load_samples(data_path, processor, 2048)]
    tokens.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", tokens.bos_token_id), ("<|im_end|>", tokens.eos_token_id)])
    assert tokens("a")["input_ids"][:: 2] == [tokens.bos_token_id, tokens.eos_token_id]
    if template_writes_it:
        processor.chat_template = "<s>" + processor.chat_template
    samples = load_samples(data_path, processor, 2048)
    assert [s.prompt_ids for s in samples] == [[tokens.bos_token_id, *ids] for ids in plain]
    for s in samples:  # the text is complete: a sampler that adds nothing reads the same
        assert s.images or tokenise(tokens, s.prompt_text) == s.prompt_ids


def rehearsal(tiny):
    """What every stage does before it writes anything, with the tiny model at hand."""
    engine = sampler(copy.deepcopy(tiny.model), tiny.processor, 256)
    policy = branching(tiny.model, tiny.processor)
    return doctor.rehearse(engine, tiny.samples, rollout.Args(model=str(tiny.path), dtype="float32"), policy)


@pytest.mark.parametrize("build", [gemma3, glm4v, *TILED])
def test_the_rehearsal_passes(build, saved, unlike_data, one_rank, caplog):
    """What was refused once, since pictures are cut into tiles or seen in both directions; without a warning a prompt."""
    assert any(s.images for s in rehearsal(fresh(saved(build), unlike_data)))
    assert "processor_kwargs" not in caplog.text


@pytest.mark.parametrize("name", ["sliding_window", "attention_chunk_size", "use_bidirectional_attention"])
def test_who_sees_otherwise_than_causally_has_no_branches(qwen, name):
    """A packed row, and a prompt's cache for all its answers, know of no window and of no look ahead."""
    assert Sharing(qwen.model, qwen.processor).can_branch
    setattr(qwen.model.config.text_config, name, 8)
    assert not Sharing(qwen.model, qwen.processor).can_branch


# ---------------------------------------------------------------------------------------------
# Placeholders by a formula of a picture's size, without its pixels


def said(act, *values):
    """What `act` gives, or the sentence by which it refuses."""
    try:
        return list(act(*values))
    except ValueError as error:  # a picture 200 times as wide as high
        return str(error)


FORMULAS = [*FAMILIES, glm4v, llava, llava_next]
SIDE = st.one_of(st.integers(1, 70), st.integers(1, 500), st.sampled_from([1, 2, 3, 27, 28, 29, 199, 200, 201, 1999]))
SIZE = st.one_of(st.tuples(SIDE, SIDE), st.sampled_from([(3000, 2000), (1, 1), (2000, 10), (3, 600), (1201, 2999)]))


@pytest.mark.parametrize("examples, pixels", [(25, 150_000), pytest.param(100, 10**7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", FORMULAS)
def test_placeholders_by_formula(build, examples, pixels):
    """As many, in the same places, as the processor makes of the pictures; or both refuse in the same words.

    It is the processor that takes the time, by the pixel: here pictures are small, in the slow tier as users' are.
    """
    processor = build_processor(build) if build in FAMILIES else build()[0]
    mark, images = processor.image_token, processor.image_processor
    seen = set()

    def theirs(text, sizes):
        return processor(text=[text], images=[Image.new("RGB", size) for size in sizes], **BARE)["input_ids"][0]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(sizes=st.lists(SIZE.filter(lambda size: math.prod(size) <= pixels), min_size=1, max_size=3),
           glue=st.sampled_from(["", " ", "\n", "\n\n", "a", "<|im_end|>"]),
           least=st.sampled_from([0, 28**2, 64**2, 300**2]), times=st.sampled_from([1, 2, 16, 1000]))
    def holds(sizes, glue, least, times):
        if least and hasattr(images, "merge_size"):
            images.size = {"shortest_edge": least, "longest_edge": max(2 * 32**2, least) * times}
        text = glue + glue.join(mark + "b" for _ in sizes)
        ours = said(with_placeholders, tokenise(processor.tokenizer, text), sizes, processor)
        assert ours == said(theirs, text, sizes)
        seen.add(ours if type(ours) is str else len(ours))

    assert repeats_placeholders(processor)
    holds()
    assert len(seen) > (2 if build is llava else 5)


@pytest.mark.parametrize("build", [gemma3, internvl, smolvlm])
def test_some_families_have_no_formula(build):
    """Marks of rows, or newlines that tokenise together: here the processor is asked about each picture."""
    assert not repeats_placeholders(build()[0])


@pytest.mark.parametrize("build, marks", [
    (toy_processor, ["<|image_pad|>", "<|video_pad|>"]), (llava, ["<image>"]), (smolvlm, ["<image>"]),
    (glm4v, ["<|image|>", "<|video|>"]), (internvl, ["<IMG_CONTEXT>", "<img>", "</img>"]),
    (gemma3, ["<start_of_image>", "<image_soft_token>"])])
def test_what_is_never_sampled(build, marks):
    """All that stands for a picture, in a prompt's text or in its ids, in the family's own words."""
    processor = build() if build is toy_processor else build()[0]
    assert processor.tokenizer.convert_ids_to_tokens(banned_ids(processor)) == marks


def no_more():
    """Of a forked run, which imports this file to find it: what stands at its top."""


def trained_twice(model, data, folder, fault=no_more):
    """Two steps of each trainer on a data set; the checkpoints."""
    words = ["--model", model, "--max_new_tokens", "16", "--warmup_steps", "0", "--max_steps", "2",
             "--train_data", data, "--validation_data", data, "--test_data="]
    (folder / "odd.py").write_text("def odd(samples): return [float(s.completion_ids[0] % 2) for s in samples]")
    grpo = [*TINY, "--group_size", "4", "--rewards", f"{folder / 'odd.py'}:odd:1.0"]
    for stage, more in (("train_sft.py", ["--batch_size", "4"]), ("train_grpo.py", grpo)):
        run(stage, *more, *words, "--out", folder / stage, fault=fault)
        yield max((folder / stage / "checkpoints").iterdir())


def test_unlike_prompts_by_hand():
    """First, shortest and longest with images, most images (neither longest nor shortest), none; each once."""
    rows = [("first", 1, 20), ("short", 1, 10), ("long", 1, 90), ("many", 5, 50), ("plain", 0, 5), ("other", 0, 6)]
    samples = [SimpleNamespace(id=i, images=["x"] * n, prompt_ids=[0] * length) for i, n, length in rows]
    assert [s.id for s in doctor.unlike(samples)] == ["first", "short", "long", "many", "plain"]
    assert [s.id for s in doctor.unlike(samples[1:2])] == ["short"]
    assert [s.id for s in doctor.unlike(samples[4:])] == ["plain", "other"]


def test_the_rehearsal_asks_unlike_prompts_and_hears_a_stranger(tiny, one_rank):
    """Shortest and longest, several images and none; and a sampler of other weights does not pass it."""
    asked = [s.id for s in doctor.unlike(tiny.samples)]
    assert {"two", "text"} <= {*asked} and len(asked) == len({*asked}) <= 5
    assert [(s.id, len(s.completion_ids) > 0) for s in rehearsal(tiny)] == [(i, True) for i in asked for _ in "ab"]
    engine = sampler(copy.deepcopy(tiny.model), tiny.processor, 256)
    for weight in engine.model.get_decoder().layers[0].parameters():
        weight.data *= 2
    with pytest.raises(utils.UserError, match="^--model .*: sampler and trainer are .* nats apart on the prompts .*rows"):
        doctor.rehearse(engine, tiny.samples, rollout.Args(dtype="float32"), Policy(tiny.model, tiny.processor))


# ---------------------------------------------------------------------------------------------
# Models of text alone


def text_model(Model, Config):
    """A tokenizer with a template that wants a message's text in one piece, and a model around it."""
    tokens = tokenizer()
    tokens.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    return tokens, Model(Config(**TEXT, vocab_size=len(tokens), eos_token_id=tokens.eos_token_id,
                                pad_token_id=tokens.pad_token_id))


def qwen2():
    return text_model(transformers.Qwen2ForCausalLM, transformers.Qwen2Config)


def llama():
    return text_model(transformers.LlamaForCausalLM, transformers.LlamaConfig)


@pytest.fixture(scope="module")
def text_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    utils.write_jsonl(path, [{"question": f"What is {'1 + ' * i}2?", "answer": str(i + 2), "id": str(i),
                              "solution": f"It is \\boxed{{{i + 2}}}."} for i in range(8)])
    return path


@pytest.mark.parametrize("build", [qwen2, pytest.param(llama, marks=pytest.mark.slow)])
def test_a_model_of_text_goes_through_every_stage(build, saved, tmp_path, text_rows):
    """Sampled from, trained by both trainers for two steps; what is saved is a plain folder of its kind."""
    model = saved(build)
    result, _ = run("rollout.py", "--model", model, "--data", text_rows, "--n", "2", "--max_new_tokens", "16",
                    "--out", tmp_path / "rollout")
    assert result["completions"] == 16
    run("doctor.py", "--model", model, "--data", text_rows)
    for folder in trained_twice(model, text_rows, tmp_path, fault=None):
        trained, before = map(transformers.AutoModelForCausalLM.from_pretrained, (folder, model))
        assert type(trained) is type(build()[1])
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
        assert any((a != b).any() for a, b in zip(trained.parameters(), before.parameters()))


def test_a_model_of_text_refuses_a_picture_by_its_row(saved, data_path, text_rows):
    processor = load_processor(saved(qwen2))
    samples = load_samples(text_rows, processor, 2048)
    asked = processor.tokenizer.decode(samples[1].prompt_ids)
    assert asked.startswith("<|im_start|>user\nWhat is 1 + 2?\nThink step") and asked.endswith("<|im_start|>assistant\n")
    with pytest.raises(utils.UserError, match="line 1: .*its files have no image processor, and the row has a picture"):
        load_samples(data_path, processor, 2048)


@pytest.mark.slow
@pytest.mark.parametrize("build", [gemma3, glm4v, *TILED])
def test_a_family_is_trained_by_both(build, saved, tmp_path, unlike_data):
    """Two steps with pictures of all shapes, whose mark the sampler may not say; the doctor finds nothing."""
    model = saved(build)
    run("doctor.py", "--model", model, "--data", unlike_data, fault=no_more)
    for folder in trained_twice(model, unlike_data, tmp_path):
        assert transformers.AutoProcessor.from_pretrained(folder).chat_template
        assert transformers.AutoModelForImageTextToText.from_pretrained(folder)
