"""Every model family and weight, trained over each kind of mesh, equals one device."""

import functools

import jax
import pytest

from jaxft import adapters
from jaxft.adapters import adapt
from jaxft.parallel import make_mesh
from tests.parallel.training import DECODERS, ENCODERS, MEDIA, assert_equal, family, three_steps

# Over eight shards of a projection, a key head of these models lies on four devices.
MESHES = {
    "fsdp": dict(fsdp=8),
    "tensor": dict(tensor=8),
    "fsdp+tensor": dict(fsdp=4, tensor=2),
}


# Three tokens on a device: windows and segments reach over several. The other families attend as one of
# these do: learned positions, windows in all layers or some, two rotary bases, soft caps.
CONTEXT = [(name, dict(context=8)) for name in ("llama", "mistral", "gemma2", "gemma3", "gpt2")]
CONTEXT += [("gemma2", dict(fsdp=2, tensor=2, context=2))]


@functools.cache
def one_device(name):
    return three_steps(*family(name))


# Rules of both axes at once for every family; a single axis where its rules differ in kind.
ALONE = [
    ("llama", "fsdp"),
    ("llama", "tensor"),
    ("gpt2", "tensor"),
]
# These have the rules and tensors of another: Llama's with tied embeddings as Qwen 2's, BERT's.
ALIKE = {"smollm2", "mistral", "roberta"}
FAMILY_MESHES = [
    (name, "fsdp+tensor") for name in (*DECODERS, *ENCODERS) if name not in ALIKE
] + ALONE


@pytest.mark.parametrize("name, mesh", FAMILY_MESHES)
def test_a_family_trains_as_on_one_device(name, mesh):
    assert_equal(three_steps(*family(name), make_mesh(**MESHES[mesh])), one_device(name))


@pytest.mark.parametrize("name", MEDIA)
def test_a_model_with_images_or_clips_trains_alike_in_microbatches_on_a_mesh(name):
    mesh = make_mesh(**MESHES["fsdp+tensor"])
    assert_equal(three_steps(*family(name), mesh, microbatches=2), one_device(name))


SPLIT = ".*/(out|up)/kernel"  # by inputs and by outputs


@pytest.mark.parametrize("name, sizes", CONTEXT, ids=str)
def test_a_decoder_trains_alike_with_the_tokens_of_a_row_over_several_devices(name, sizes):
    assert_equal(three_steps(*family(name), make_mesh(**sizes)), one_device(name))


WEIGHTS = {
    "paca": adapters.paca(4),
    "monarch": adapters.monarch(blocks=2),
    "dora": adapters.dora(4),
    "lora over nf4": adapters.lora(4),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_structured_weight_trains_as_on_one_device(name):
    model, params, objective, batch = family("llama")
    if name.endswith("nf4"):
        params = adapt(jax.random.key(3), params, {SPLIT: adapters.quantised("nf4", 16)})
    params = adapt(jax.random.key(4), params, {SPLIT: WEIGHTS[name]})
    run = functools.partial(three_steps, model, params, objective, batch)
    assert_equal(run(make_mesh(fsdp=4, tensor=2)), run())
