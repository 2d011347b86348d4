"""Public names of the package, and `Model.generate` for one and for several prompts."""

from dataclasses import fields

import pytest
import torch
from conftest import packed_checkpoint

import gptq_belle
from gptq_belle import errors
from gptq_belle.engine.sampling_params import SamplingOptions


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    path = packed_checkpoint(tiny_llama, tmp_path_factory.mktemp("api") / "packed")
    return gptq_belle.load(path, device="cpu")


def test_dir_lists_the_public_names_and_each_resolves():
    assert dir(gptq_belle) == sorted(gptq_belle.__all__)
    assert all(getattr(gptq_belle, name) is not None for name in dir(gptq_belle))
    assert gptq_belle.UsageError is errors.UsageError
    assert not hasattr(gptq_belle, "absent")


def test_sampling_options_are_the_fields_of_sampling_params():
    assert SamplingOptions.__annotations__.keys() == {field.name for field in fields(gptq_belle.SamplingParams)}


def test_answers_to_several_prompts_equal_single_answers(model):
    prompts = ["北京", "写一首关于春天的诗", *(f"{number}+{number}=" for number in range(9))]
    options = {"temperature": 1.0, "seed": 4, "max_new_tokens": 12, "stop": ("的",)}
    answers = model.generate(prompts, prompt_style="auto", **options)
    assert len(set(answers)) > 5
    assert answers == [model.generate(prompt, prompt_style="auto", **options) for prompt in prompts]


def test_token_ids_of_two_dimensions_are_several_prompts(model):
    ids = torch.tensor([[5, 300, 17], [8, 250, 99]])
    expected = [model.generate(row.tolist(), max_new_tokens=6) for row in ids]
    assert expected[0] != expected[1]
    for prompts in (ids, ids.tolist(), list(ids)):
        assert model.generate(prompts, max_new_tokens=6) == expected
    assert model.generate(ids[:1], max_new_tokens=6) == expected[:1]
    assert model.generate(ids[0], max_new_tokens=6) == expected[0]


@pytest.mark.parametrize("prompt", [[], torch.zeros(1, 2, 3, dtype=torch.long), [[[1, 2]], [[3]]], [1, "two"], [0.5],
                                    ["北京", ""], [[1], [384]]])
def test_prompts_that_are_neither_text_nor_token_ids_are_refused(model, prompt):
    with pytest.raises(gptq_belle.UsageError):
        model.generate(prompt)


def test_an_unknown_sampling_option_is_refused_with_the_known_ones(model):
    with pytest.raises(gptq_belle.UsageError) as caught:
        model.generate("北京", max_tokens=5)
    assert "max_new_tokens" in caught.value.remedy


def test_options_replace_those_of_the_parameters(model):
    params = gptq_belle.SamplingParams(max_new_tokens=6, temperature=1.0, seed=7)
    assert model.generate("北京", params) == model.generate("北京", max_new_tokens=6, temperature=1.0, seed=7)
    assert model.generate("北京", params, temperature=0) == model.generate("北京", max_new_tokens=6)


def test_repr_names_folder_architecture_bits_device_and_context(model, tiny_bloom):
    assert repr(model) == (f"Model(path={str(model.path)!r}, architecture='llama', bits=4, group_size=32, "
                           "device='cpu', context=256)")
    assert "architecture='bloom', dtype='float32'" in repr(gptq_belle.load(tiny_bloom, device="cpu"))
