"""Would this have caught it? Ten public reports about images in training or serving, each played here.

The bug of a report is put into our code, or into what stands in for another program; a check that a run makes
by itself, or the doctor, must see it, and must say nothing where the bug is taken out. LESSON.md has the table.
"""

import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import doctor
import policy
import rollout
import siblings
from conftest import png
from data import load_samples, make_sample
from pictures import as_png, open_image
from policy import bound_pixels, Policy
from rollout import HFEngine
from siblings import Sharing
from test_engines import IMAGE, reads, served  # noqa: F401  (served is a fixture)
from test_museum import strayed
from test_pages import LESSON, section
from utils import RunError, UserError

ARGS = rollout.Args(dtype="float32", max_new_tokens=4)


def by_colour(processor):
    """Three prompts alike in every token, whose pictures of one size have a colour each."""
    row = {"question": "<image>Which colour?", "answer": "1"}
    return [make_sample(row | {"images": [png(colour)]}, Path("."), colour, processor)
            for colour in ("white", "red", "blue")]


@pytest.fixture
def pair(qwen, one_rank):
    """A policy, a sampler with a copy of its weights, and prompts of every kind; nothing is shared."""
    qwen.model.requires_grad_(False)
    qwen.policy = Policy(qwen.model, qwen.processor)
    qwen.engine = HFEngine(copy.deepcopy(qwen.model), qwen.processor, 64)
    return qwen


def refused(pair):
    """What the rehearsal, which every run of a trainer begins with, says; None where nothing is wrong."""
    try:
        doctor.rehearse(pair.engine, pair.samples, ARGS, pair.policy)
    except UserError as error:
        return str(error)


def failed(pair):
    """The names of the doctor's rows that failed."""
    rows = doctor.doctor(pair.engine, pair.policy, pair.samples, pair.processor, ARGS)
    return {name for name, passed, _ in rows if not passed}


@torch.no_grad()
def stopped(pair):
    """What the guard of every step says of answers to all prompts; None where the run goes on."""
    done = pair.engine.generate(pair.samples, 2, 1.0, 1.0, 8, "step")
    theirs = doctor.trainer_logprobs(pair.policy, done)
    return strayed(torch.cat([torch.tensor(a) - torch.tensor(s.sampler_logprobs) for a, s in zip(theirs, done)]))


def samples_changed(change):
    """`collate`, of changed samples."""
    honest = policy.collate
    return lambda samples, *rest: honest(change(samples), *rest)


def inputs_changed(change):
    """`collate`, and what it gives the model is changed."""
    honest = policy.collate

    def collate(samples, *rest):
        batch = honest(samples, *rest)
        return batch | {"inputs": change(batch["inputs"])}
    return collate


# ---------------------------------------------------------------------------------------------
# A prompt on its way to the sampler


class OtherVLLM:
    """How vLLM reads a prompt: the first placeholder that is left for an image becomes as many as its own
    processor says. Its answers are one token."""

    def __init__(self, processor):
        self.processor = processor

    def generate(self, prompts, params, use_tqdm):
        word = SimpleNamespace(token_ids=(20,), logprobs=[{20: SimpleNamespace(logprob=-1.0)}])
        return [SimpleNamespace(prompt_token_ids=self.read(p), outputs=[word] * q.n) for p, q in zip(prompts, params)]

    def read(self, prompt):
        ids, start = list(prompt["prompt_token_ids"]), 0
        for image in prompt.get("multi_modal_data", {}).get("image", ()):
            asked = self.processor(text=[self.processor.image_token], images=[image])
            start = ids.index(IMAGE, start)
            ids[start : start + 1] = own = [i for i in asked["input_ids"][0] if i == IMAGE]
            start += len(own)
        return ids


def test_trl_6294_placeholders_expanded_twice(served, monkeypatch):
    """Ids whose placeholders the processor had expanded went to vLLM together with the image, and it expanded
    them again; half of the answers came out empty."""
    served.engine.llm = OtherVLLM(served.processor)
    done = served.engine.generate(served.prompts, 2, 1.0, 1.0, 8, 0)
    assert [s.id for s in done] == [s.id for s in served.prompts for _ in "ab"]
    expanded = {s.prompt_text: s.prompt_ids for s in served.prompts}
    monkeypatch.setattr(rollout, "tokenise", lambda tokenizer, text: expanded[text])
    with pytest.raises(RunError, match=r"vLLM reads the prompt two as \d+ image placeholders, the trainer as \d+"):
        served.engine.generate(served.prompts, 2, 1.0, 1.0, 8, 0)


def test_trl_6401_two_pipelines_that_disagree(served):
    """The trainer's processor made the ids, vLLM's own made the features of the raw image: where the two did not
    agree on an image's placeholders, ids and features were of different places."""
    other = copy.deepcopy(served.processor)
    bound_pixels(other, served.path, 0, 4 * 28**2)
    served.engine.llm = OtherVLLM(other)
    with pytest.raises(RunError, match="image placeholders, the trainer as .*: their processors differ"):
        served.engine.generate(served.prompts, 2, 1.0, 1.0, 8, 0)


def test_trl_6401_as_many_placeholders_in_another_grid(pair):
    """The same where counts cannot tell: the sampler reads a picture as wide that the trainer reads as high."""
    assert refused(pair) is None
    pair.samples = [s for s in pair.samples if s.id in ("palette", "rotated", "text")]
    honest, turned = pair.engine.generate, {}
    for s in pair.samples:
        for image in s.images:
            turned[image] = as_png(open_image(image).transpose(Image.Transpose.ROTATE_90))
    wide = reads(lambda s: replace(s, images=[turned[i] for i in s.images]))
    pair.engine.generate = lambda *words: wide(honest, *words)
    assert "nats apart" in refused(pair) and "log-probabilities, images" in failed(pair)


def test_trl_5041_prompts_that_had_been_through_the_template(pair):
    """A crash, none that is silent: with images, a prompt that was already text broke the trainer's template."""
    row = {"question": "<image>Which colour?", "answer": "1", "images": [png("red")]}
    assert make_sample(row, Path("."), "here", pair.processor).prompt_ids.count(IMAGE) == 4
    done = make_sample(row, Path("."), "here", pair.processor).prompt_text.replace("<|image_pad|>", "<image>")
    with pytest.raises(UserError, match=r"^here: the question holds the model's mark <\|im_start\|>; remove it"):
        make_sample(row | {"question": done}, Path("."), "here", pair.processor)
    message = [{"role": "user", "content": "<image>Which colour?"}]
    with pytest.raises(UserError, match='^here: field "question" is missing, empty or no text'):
        make_sample(row | {"question": message}, Path("."), "here", pair.processor)


def test_trl_5285_the_end_of_a_prompt_that_was_kept(pair, data_path, monkeypatch, capsys):
    """Truncation that keeps the end of a sequence cut off all of an image's placeholders; nothing failed, and the
    loss went down."""
    honest, limit = data.tokenise, 40
    samples = load_samples(data_path, pair.processor, limit)
    assert all(s in pair.samples for s in samples) and len(samples) < len(pair.samples)  # whole, or said
    assert f"left out {len(pair.samples) - len(samples)} of {len(pair.samples)}" in capsys.readouterr().err
    monkeypatch.setattr(data, "tokenise", lambda tokenizer, text: honest(tokenizer, text)[-8:])
    with pytest.raises(UserError, match="template loses"):
        load_samples(data_path, pair.processor, limit)
    monkeypatch.undo()
    pair.samples = [replace(s, prompt_ids=s.prompt_ids[-8:]) for s in pair.samples]
    assert not any(IMAGE in s.prompt_ids for s in pair.samples) and "fails (ValueError" in refused(pair)


# ---------------------------------------------------------------------------------------------
# What the trainer computes


def test_trl_5785_token_types_padded_on_the_other_side(pair, monkeypatch):
    """Ids were padded on one side and mm_token_type_ids on the other: an image's marks fell on padding, and its
    placeholders were text to the positions."""
    pair.samples = [s for s in pair.samples if s.id in ("grey", "rgb")]
    assert refused(pair) is None and stopped(pair) is None and not failed(pair)

    def roll(inputs):
        lengths = inputs["attention_mask"].sum(1, keepdim=True)
        index = (torch.arange(inputs["input_ids"].shape[1]) + lengths) % inputs["input_ids"].shape[1]
        return inputs | {"mm_token_type_ids": inputs["mm_token_type_ids"].gather(1, index)}
    for room in (policy, doctor):
        monkeypatch.setattr(room, "collate", inputs_changed(roll))
    assert "nats apart" in refused(pair) and "strayed" in stopped(pair)


def test_areal_217_packed_rows_without_mrope(pair, monkeypatch):
    """Packed rows got the positions of a language model, 0, 1, 2, ..., where Qwen2.5-VL has three axes."""
    pair.policy = Policy(pair.model, pair.processor, Sharing(pair.model, pair.processor, 0))
    assert refused(pair) is None and stopped(pair) is None
    honest = siblings.pack

    def pack(samples, *rest):
        batch = honest(samples, *rest)
        places = [i for s in {s.id: s for s in samples}.values() for i in range(len(s.prompt_ids))]
        places += [len(s.prompt_ids) + i for s in samples for i in range(len(s.completion_ids))]
        batch["inputs"]["position_ids"] = torch.tensor(places).expand(3, 1, -1)
        return batch
    monkeypatch.setattr(siblings, "pack", pack)
    assert "nats apart" in refused(pair) and "strayed" in stopped(pair)
    pair.samples = [s for s in pair.samples if not s.images]
    assert refused(pair) is None  # text has but one axis


def test_agent_lightning_559_pixels_that_never_arrive(pair, monkeypatch):
    """The sampler saw the images, the trainer's batch had token ids alone; loss looked normal."""
    assert refused(pair) is None and stopped(pair) is None

    def blind(inputs):
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return kept | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    for room in (policy, doctor):
        monkeypatch.setattr(room, "collate", inputs_changed(blind))
    assert "nats apart" in refused(pair) and "strayed" in stopped(pair)
    assert "log-probabilities, images" in failed(pair) and "log-probabilities, text" not in failed(pair)


def test_vlm_r1_263_the_last_rows_images_for_all(pair, monkeypatch):
    """A variable that outlived its loop: every prompt of a batch got the images of the batch's last one, for
    sampler and trainer alike."""
    pair.samples = by_colour(pair.processor)
    assert refused(pair) is None and not failed(pair)

    def last(samples):
        image = [i for s in samples for i in s.images][-1:]
        return [replace(s, images=image * len(s.images)) for s in samples]
    for room in (policy, doctor, rollout):
        monkeypatch.setattr(room, "collate", samples_changed(last))
    assert {"trainer: padding", "sampler: padding"} & failed(pair)
    assert "nats apart" in refused(pair)


# ---------------------------------------------------------------------------------------------
# What a sampler remembers


def test_vllm_44910_features_that_outlive_their_weights(pair):
    """New weights came, and features that the old vision tower had made of the same image were used on."""
    pair.engine.sharing = sharing = Sharing(pair.engine.model, pair.processor, 64)
    sync = pair.engine.sync
    pair.engine.sync = lambda model: sharing.vision.kept.clear() or sync(model)
    assert not failed(pair)
    pair.engine.sync = sync
    assert refused(pair) is None and failed(pair) == {"changed vision weights arrive"}


def test_sglang_omni_258_a_cache_that_knows_images_by_their_placeholders(pair):
    """Keys and values of a prompt were found by its token ids, which are the same for every image of a size: the
    second request was answered from the first one's image."""
    pair.samples = by_colour(pair.processor)
    assert len({*(tuple(s.prompt_ids) for s in pair.samples)}) == 1 and refused(pair) is None
    assert stopped(pair) is None and not failed(pair)
    honest, known = pair.engine.generate, {}
    cached = reads(lambda s: replace(s, images=known.setdefault(tuple(s.prompt_ids), s.images)))
    pair.engine.generate = lambda *words: cached(honest, *words)
    assert "nats apart" in refused(pair) and "strayed" in stopped(pair)
    assert "log-probabilities, images" in failed(pair)


# ---------------------------------------------------------------------------------------------
# The table


def test_the_lessons_table_is_these_tests():
    """A report a row, each with its address; its tests bear its number, and no test here is without a row."""
    rows = re.findall(r"^\| \[([\w-]+)#(\d+)\]\(https://github\.com/[\w-]+/\1/issues/\2\) \| .+ \| .+ \| (.+) \|$",
                      section("Would this have caught it?", LESSON), re.M)
    named = {}
    for name, number, tests in rows:
        for test in re.findall(r"`(\w+)`", tests):
            assert test.startswith(f"test_{name.lower().replace('-', '_')}_{number}_"), test
            named[test] = number
    here = {name for name in globals() if re.match(r"test_\w+_\d+_", name)}
    assert {*named} == here and len(rows) == len({*named.values()}) == 10
