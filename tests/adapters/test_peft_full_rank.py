"""OFT, BOFT and RandLoRA: PEFT's products and gradients, and its files both ways."""

import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import AdapterError, adapt, boft, load_adapter, oft, randlora, save_adapter
from jaxft.weights import matmul, nearest_divisor, to_dense

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
transformers = pytest.importorskip("transformers", reason="pip install 'jaxft[test]'")
peft = pytest.importorskip("peft", reason="parity tests need peft: pip install 'jaxft[test]'")
peft_base = pytest.importorskip("tests.adapters.peft_base")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what it is asked for here.
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def butterflies(monkeypatch):
    """The work of PEFT's CUDA extension, which several butterfly factors need, in torch."""
    import peft.tuners.boft.layer as layer

    diagonals = lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", types.SimpleNamespace(apply=diagonals))


INPUTS, OUTPUTS = 24, 5
# (the type, PEFT's options, ours)
SERIES = [
    ("oft", dict(oft_block_size=5, num_cayley_neumann_terms=2), dict(block_size=5, terms=2)),
    ("oft", dict(oft_block_size=4, num_cayley_neumann_terms=4), dict(block_size=4, terms=4)),
    ("oft", dict(oft_block_size=4, num_cayley_neumann_terms=7), dict(block_size=4, terms=7)),
]
EXACT = dict(use_cayley_neumann=False, coft=True)
ALL = [
    ("oft", dict(r=6, oft_block_size=0), dict(block_size=4)),
    (
        "oft", dict(oft_block_size=4, block_share=True, coft=True, eps=0.4),
        dict(block_size=4, share=True, eps=0.4),
    ),
    ("oft", dict(oft_block_size=4, eps=9.0, **EXACT), dict(block_size=4, terms=None, eps=9.0)),
    ("boft", dict(boft_block_size=2, boft_n_butterfly_factor=3), dict(block_size=2, factors=3)),
]  # fmt: skip


def both(kind, theirs, ours):
    """(PEFT's layer, its parameters, ours, its fields), away from their start."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(INPUTS, OUTPUTS)
    if kind == "oft":
        config = peft.OFTConfig(target_modules=["x"], **theirs)
        layer = peft.tuners.oft.layer.Linear(linear, "default", config, r=config.r)
        parameters = {"skew": layer.oft_R["default"].weight}
    else:
        config = peft.BOFTConfig(target_modules=["x"], **theirs)
        layer = peft.tuners.boft.layer.Linear(linear, "default", config)
        parameters = {"blocks": layer.boft_R["default"], "scale": layer.boft_s["default"]}
    weight = (oft if kind == "oft" else boft)(**ours)(None, jnp.asarray(linear.weight.detach().T))
    np.testing.assert_allclose(to_dense(weight), linear.weight.detach().T, atol=1e-6)
    fields = {}
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
        value = parameter.detach().numpy().copy()
        fields[name] = jnp.asarray(value).reshape(getattr(weight, name).shape)
    return layer, parameters, weight, fields


close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", SERIES)
def test_products_are_pefts(case):
    layer, _, weight, fields = both(*case)
    x = torch.randn(3, INPUTS)
    dense = to_dense(dataclasses.replace(weight, **fields))
    bias = layer.get_base_layer().bias.detach().numpy()[None]
    close(x.numpy() @ np.asarray(dense) + bias, layer(x).detach())


@pytest.mark.parametrize("case", ALL)
def test_products_and_gradients_are_pefts(case):
    layer, parameters, weight, fields = both(*case)
    x = torch.randn(2, 3, INPUTS, requires_grad=True)
    y = layer(x)
    torch.sin(y).sum().backward()
    bias = layer.get_base_layer().bias.detach().numpy()[None, None]

    @jax.jit
    def run(fields, x):
        def loss(fields, x):
            product = matmul(x, dataclasses.replace(weight, **fields)) + bias
            return jnp.sum(jnp.sin(product)), product

        return jax.grad(loss, (0, 1), has_aux=True)(fields, x)

    (gradients, at_x), product = run(fields, jnp.asarray(x.detach()))
    close(product, y.detach())
    close(at_x, x.grad)
    for name, parameter in parameters.items():
        close(gradients[name], parameter.grad.reshape(gradients[name].shape))


def test_blocks_are_cut_as_peft_cuts_them():
    adjust = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    for size in range(1, 80):
        for wanted in range(1, 90):
            theirs = wanted if size % wanted == 0 else adjust(None, size, wanted)
            assert nearest_divisor(size, wanted) == theirs, (size, wanted)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = transformers.LlamaConfig(**peft_base.SIZES | dict(num_hidden_layers=1))
    return peft_base.Base(tmp_path_factory.mktemp("base"), config)


TARGETS = ["q_proj", "down_proj", "lm_head"]  # of 24 and 40 inputs
FILES = {
    "oft": ("OFT", dict(oft_block_size=7)),
    "oft, shared": (
        "OFT", dict(r=4, oft_block_size=0, block_share=True, eps=0.5, **EXACT)
    ),
    "boft": ("BOFT", dict(boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2)),
    "randlora": ("RandLora", dict(r=5, randlora_alpha=3)),
}  # fmt: skip
WRITTEN = {  # of a file written here and PEFT's, whose other options are training's or say the same
    "OFT": "coft block_share use_cayley_neumann peft_type target_modules bias".split(),
    "BOFT": "boft_block_size boft_block_num boft_n_butterfly_factor peft_type".split(),
    "RANDLORA": "r randlora_alpha save_projection peft_type".split(),
}


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """name -> PEFT's file, made once."""

    @functools.cache
    def write(name):
        path, (kind, options) = tmp_path_factory.mktemp("peft"), FILES[name]
        make = getattr(peft, f"{kind}Config")
        base.write(path, make(task_type="CAUSAL_LM", target_modules=TARGETS, **options))
        return path

    return write


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_and_written_as_pefts(name, base, written, tmp_path):
    path = written(name)
    theirs = base.pefts(path)
    adapted = load_adapter(path, base.model.config, base.params)
    peft_base.close(base.logits(path), theirs)
    assert np.abs(theirs - np.asarray(base.apply(base.params))).max() > 0.02
    save_adapter(tmp_path, base.model.config, adapted)
    ours, file = load_file(tmp_path / FILE), load_file(path / FILE)
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, file[key])
    # PEFT keeps the base of an adapted head, and each layer's copy of the bases that all share.
    more = re.compile(r".*\.(base_layer\.weight|(q_proj|down_proj|lm_head)\.randlora_[AB])")
    assert all(map(more.fullmatch, file.keys() - ours.keys()))
    settings, wanted = (json.loads((p / CONFIG).read_text()) for p in (tmp_path, path))
    for option in WRITTEN[settings["peft_type"]]:
        pick = sorted if option == "target_modules" else lambda value: value
        assert pick(settings[option]) == pick(wanted[option]), option
    peft_base.close(base.pefts(tmp_path), theirs)


def changed(path, tmp_path, **settings):
    given = json.loads((path / CONFIG).read_text()) | settings
    given = {name: value for name, value in given.items() if value is not ...}
    (tmp_path / CONFIG).write_text(json.dumps(given))
    (tmp_path / FILE).write_bytes((path / FILE).read_bytes())
    return tmp_path


REFUSED = {
    "old series": ("oft", dict(peft_version="0.17.1"), "peft_version='0.17.1': PEFT 0.18 changed"),
    "no version": ("oft", dict(peft_version=...), "peft_version=None: PEFT 0.18 changed the series"),
    "one term": ("oft", dict(num_cayley_neumann_terms=1), "terms=1 must be an integer of at least 2"),
    "before 0.14": ("oft", dict(oft_block_size=...), "no 'oft_block_size': the file is of PEFT before"),
    "both": ("oft", dict(r=3), "r=3 and oft_block_size=7: one must be a positive integer, the other 0"),
    "no radius": ("oft", dict(coft=True, eps=0), "eps=0 must be a positive number"),
    "other blocks": ("oft", dict(oft_block_size=4), r"has shape \(4, 15\), .* need \(6, 6\)"),
    "neither": ("boft", dict(boft_block_num=0), "boft_block_num=0 and boft_block_size=0: one must"),
    "too many": ("boft", dict(boft_n_butterfly_factor=4), "q_proj': 4 factors of block_size 6 need a"),
    "odd": (
        "boft", dict(boft_block_size=3, boft_block_num=0), "q_proj': more than one factor needs an even"
    ),
    "no division": (
        "boft", dict(boft_block_num=7), "boft_block_num=7 does not divide the 24"
    ),
    "no factors": ("boft", dict(boft_n_butterfly_factor=0), "factor=0 must be a positive integer"),
    "no bases": ("randlora", dict(save_projection=False), "save_projection=false leaves the random"),
    "no alpha": ("randlora", dict(randlora_alpha=None), "randlora_alpha=None must be a number"),
    "biases": ("boft", dict(bias="boft_only"), "bias='boft_only' is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_its_name(name, base, written, tmp_path):
    file, settings, message = REFUSED[name]
    path = changed(written(file), tmp_path, **settings)
    with pytest.raises(AdapterError, match=message):
        load_adapter(path, base.model.config, base.params)


def test_embeddings_and_tied_heads_are_refused(base, written, tmp_path):
    tied = dataclasses.replace(base.model.config, tie_embeddings=True)
    params = {name: node for name, node in base.params.items() if name != "head"}
    path = changed(written("oft"), tmp_path)
    with pytest.raises(AdapterError, match="lm_head.* is not the embedding.*untie the base first"):
        load_adapter(path, tied, params)
    tensors = {n: t for n, t in load_file(path / FILE).items() if "base_layer" not in n}
    save_file(tensors, path / FILE)
    with pytest.raises(AdapterError, match="OFT is only on lm_head.*untie the base first"):
        load_adapter(path, tied, params)
    key = "base_model.model.model.embed_tokens.oft_embedding_R.weight"
    save_file(load_file(path / FILE) | {key: np.zeros((6, 6), np.float32)}, path / FILE)
    with pytest.raises(AdapterError, match="OFT on the embedding 'model.embed_tokens'"):
        load_adapter(path, base.model.config, base.params)


def test_what_one_file_cannot_hold_is_refused(base, tmp_path):
    """Other block sizes than those of one option, and other series."""
    save = lambda rules: save_adapter(
        tmp_path, base.model.config, adapt(jax.random.key(0), base.params, rules)
    )
    up, q = "layers/.*/up/kernel", "layers/.*/query/kernel"
    with pytest.raises(AdapterError, match="no single oft_block_size of PEFT cuts"):
        save({up: oft(4), q: oft(6)})
    with pytest.raises(AdapterError, match="PEFT has one value of `terms` for all kernels"):
        save({up: oft(4), q: oft(4, terms=None)})
    with pytest.raises(AdapterError, match="BOFT has one block size for all kernels"):
        save({up: boft(4), q: boft(2)})
    with pytest.raises(AdapterError, match="does not share the bases, rank and alpha"):
        save({up: randlora(4), q: randlora(4, seed=1)})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: oft(1), "oft: block_size must be at least 2, got 1"),
        (lambda: oft(4, eps=0.0), "oft: eps must be positive"),
        (lambda: boft(4, 0), "boft: block_size must be at least 2 and factors at least 1"),
        (lambda: oft(4, terms=1)(None, jnp.ones((8, 2))), "oft: terms must be at least 2"),
        (lambda: oft(2)(None, jnp.ones((7, 2))), "nearest to blocks of one of the 7 inputs"),
        (lambda: oft(2)(None, jnp.ones(4)), "oft: needs a matrix"),
        (lambda: boft(2)(None, jnp.ones(4)), "boft: needs a matrix"),
        (
            lambda: boft(4, 2)(None, jnp.ones((12, 2))),
            "boft: 2 factors of block_size 4 need a multiple",
        ),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
