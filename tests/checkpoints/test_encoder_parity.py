"""Hidden states, pooled outputs, gradients and files of encoders against transformers' own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import ALL_LINEAR, adapt, combine, lora, partition
from jaxft.checkpoints import load_model, load_tokenizer, resolve, save_model
from jaxft.checkpoints.assemble import disassemble
from jaxft.checkpoints.tensor_files import open_tensors
from jaxft.models import family_of, mean_pool, stack_layers

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")

BASE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
MODELS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(vocab_size=50, **BASE)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(vocab_size=50, **BASE)),
    "bare": lambda: hf.BertModel(hf.BertConfig(vocab_size=50, **BASE), add_pooling_layer=False),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **BASE)),
}
LENGTHS = (7, 4)


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    theirs = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(path)
    return theirs, path, *load_model(path)


def inputs(theirs):
    """(our arguments, their keyword arguments, [B, T] mask)."""
    rng = np.random.default_rng(0)
    if theirs.config.model_type == "vit":
        images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
        channels_first = torch.tensor(np.moveaxis(images, -1, 1))
        return (images,), {"pixel_values": channels_first}, np.ones((2, 5))
    mask = (np.arange(7) < np.array(LENGTHS)[:, None]).astype(int)
    tokens = np.where(mask, rng.integers(3, 50, (2, 7)), theirs.config.pad_token_id)
    types = (np.arange(7) > 2).astype(int)[None].repeat(2, 0)
    types = types if theirs.config.model_type == "bert" else np.zeros_like(types)
    keywords = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
    return (tokens, mask, types), {k: torch.tensor(v) for k, v in keywords.items()}, mask


def close(ours, theirs):
    chex.assert_trees_all_close(np.asarray(ours), theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_outputs(pair):
    theirs, _, model, params = pair
    arguments, keywords, mask = inputs(theirs)
    with torch.no_grad():
        expected = theirs(**keywords)
    for tree in (params, stack_layers(params)):
        output = jax.jit(lambda p: model.apply({"params": p}, *arguments))(tree)
        keep = mask[..., None] > 0
        close(output.hidden * keep, expected.last_hidden_state.numpy() * keep)
        if expected.pooler_output is None:
            assert output.pooled is None
        else:
            close(output.pooled, expected.pooler_output.numpy())


def test_gradients(pair, tmp_path):
    theirs, _, model, params = pair
    arguments, keywords, mask = inputs(theirs)
    theirs.zero_grad()
    wanted = theirs(**keywords)
    pooled = 0.0 if wanted.pooler_output is None else wanted.pooler_output.sum()
    (torch.sin(wanted.last_hidden_state) * torch.tensor(mask[..., None])).sum().add(
        pooled
    ).backward()

    def loss(params):
        output = model.apply({"params": params}, *arguments)
        pooled = 0.0 if output.pooled is None else output.pooled.sum()
        return jnp.sum(jnp.sin(output.hidden) * mask[..., None]) + pooled

    entries = family_of(model.config).huggingface.entries(model.config)
    grads = dict(disassemble(entries, jax.jit(jax.grad(loss))(params)))
    # As a model whose weights are the gradients, to have them under the names of the files.
    copy = type(theirs)(
        theirs.config, **({} if model.config.pooler else {"add_pooling_layer": False})
    )
    with torch.no_grad():
        for target, source in zip(copy.parameters(), theirs.parameters(), strict=True):
            target.copy_(source.grad)
    copy.save_pretrained(tmp_path)
    for name, gradient in open_tensors(tmp_path).items():
        ours = grads.pop(name)
        if name == "embeddings.word_embeddings.weight":
            # torch gives the padding token no gradient.
            keep = np.arange(len(ours)) != theirs.config.pad_token_id
            ours, gradient = ours[keep], gradient[keep]
        # A key's bias shifts all scores alike: its gradient is rounding around 0.
        scale = max(np.abs(gradient).max(), 1e-2)
        chex.assert_trees_all_close(ours, np.asarray(gradient), rtol=0, atol=2e-4 * scale)
    assert not grads


def test_files_survive_a_round_trip(pair, tmp_path):
    theirs, _, model, params = pair
    save_model(tmp_path, model, params)
    again, params_again = load_model(tmp_path)
    assert again.config == model.config
    chex.assert_trees_all_equal(params_again, params)
    options = {} if model.config.pooler else {"add_pooling_layer": False}
    reopened = type(theirs).from_pretrained(tmp_path, **options)
    for (name, mine), (_, original) in zip(
        reopened.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, original), name


def test_adapters_train(pair):
    theirs, _, model, params = pair
    arguments, _, _ = inputs(theirs)
    trainable, frozen = partition(adapt(jax.random.key(0), params, {ALL_LINEAR: lora(2)}))
    loss = lambda t: jnp.mean(model.apply({"params": combine(t, frozen)}, *arguments).hidden[:, 0])
    step = jax.jit(lambda t: jax.tree.map(lambda w, g: w - 0.5 * g, t, jax.grad(loss)(t)))
    before = loss(trainable)
    for _ in range(5):
        trainable = step(trainable)
    assert loss(trainable) < before - 1e-3


def test_minilm_sentence_embeddings():
    """The real model, fetched through pip."""
    model, params = load_model("minilm")
    tokenizer = load_tokenizer("minilm")
    sentences = ["A cat sits on the mat.", "There is a cat upon a rug.", "Stocks fell sharply."]
    batch = tokenizer(sentences, padding=True, return_tensors="np")
    hidden = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"]).hidden
    ours = np.asarray(mean_pool(hidden, batch["attention_mask"]))
    theirs = hf.BertModel.from_pretrained(resolve("minilm"))
    with torch.no_grad():
        states = theirs(**{k: torch.tensor(v) for k, v in batch.items()}).last_hidden_state
        mask = torch.tensor(batch["attention_mask"])[..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        expected = torch.nn.functional.normalize(means).numpy()
    close(ours, expected)
    assert ours[0] @ ours[1] > 0.5 > ours[0] @ ours[2]


def test_wrong_images_and_configs_are_explained():
    from jaxft.models import Encoder, EncoderConfig

    config = EncoderConfig(32, 48, 1, 4, 5, pre_norm=True, image_size=8, patch_size=4, family="vit")
    with pytest.raises(ValueError, match=r"images are \(6, 8, 3\), the model takes \(8, 8, 3\)"):
        Encoder(config).init(jax.random.key(0), jnp.zeros((1, 6, 8, 3)))
    with pytest.raises(ValueError, match=r"hidden_size \(30\) must be a multiple"):
        EncoderConfig(30, 48, 1, 4, 5)
    with pytest.raises(ValueError, match=r"image_size \(9\) must be a multiple of patch_size"):
        EncoderConfig(32, 48, 1, 4, 5, image_size=9, patch_size=4)
