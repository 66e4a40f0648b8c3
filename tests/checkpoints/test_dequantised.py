"""Checkpoints in MXFP4 and FP8: their numbers bit for bit as transformers reads them, or an error."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.checkpoints import CheckpointError, load_model, save_model
from jaxft.checkpoints.fp8 import Fp8Tensor
from jaxft.checkpoints.mxfp4 import Mxfp4Tensor

torch = pytest.importorskip("torch", reason="needs torch: pip install 'jaxft[test]'")
families = pytest.importorskip("tests.checkpoints.families")
MXFP4, FILE = {"quant_method": "mxfp4"}, "model.safetensors"
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "dynamic"}
rng = np.random.default_rng(0)


def test_mxfp4_equals_transformers_for_every_scale():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = rng.integers(0, 256, (2, 64, 4, 16)).astype(np.uint8)
    scales = rng.permutation(512).reshape(2, 64, 4).astype(np.uint8)  # each of the 256 twice
    given = torch.tensor(blocks), torch.tensor(scales)
    expected = convert_moe_packed_tensors(*given).view(torch.int16).numpy()
    whole = Mxfp4Tensor(blocks, scales)
    assert whole.shape == expected.shape == (2, 128, 64)
    np.testing.assert_array_equal(whole[...].view(np.int16), expected)
    part = (slice(1, 2), slice(37, 101), slice(3, 60))  # across blocks
    ours = whole[part]
    np.testing.assert_array_equal(ours.view(np.int16), whole[...][part].view(np.int16))


def test_fp8_equals_transformers_and_blocks_at_the_end_may_be_smaller():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = rng.normal(size=(64, 96)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.1, 2, (4, 4)).astype(np.float32)
    theirs = torch.tensor(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    wanted = Fp8Dequantize(None)._dequantize_one(theirs, torch.tensor(scales), torch.float32)
    whole = Fp8Tensor(weight, scales, (16, 24))
    np.testing.assert_array_equal(whole[...], wanted.numpy())
    np.testing.assert_array_equal(whole[5:37, 20:90], wanted.numpy()[5:37, 20:90])
    ragged = Fp8Tensor(weight[:50, :90], scales, (16, 24))
    np.testing.assert_array_equal(ragged[...], wanted.numpy()[:50, :90])


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A gpt-oss whose experts are random codes."""
    path = tmp_path_factory.mktemp("gpt_oss")
    families.torch_model("gpt_oss").save_pretrained(path)
    tensors = load_file(path / FILE)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (*shape, 16)).astype(np.uint8)
        tensors[f"{name}_scales"] = rng.integers(123, 127, shape).astype(np.uint8)
    save_file(tensors, path / FILE, {"format": "pt"})
    edit(path, quantization_config=MXFP4)
    return path


def edit(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_gpt_oss_in_mxfp4_is_read_as_transformers_reads_it(gpt_oss, tmp_path):
    from transformers import AutoModelForCausalLM

    model, params = load_model(gpt_oss, dtype=np.float32)
    theirs = AutoModelForCausalLM.from_pretrained(gpt_oss, dtype=torch.float32)
    for i, layer in enumerate(theirs.model.layers):
        ours = params["layers"][str(i)]["mlp"]["experts"]
        for name in ("gate_up", "down"):
            wanted = getattr(layer.mlp.experts, f"{name}_proj").detach().float().numpy()
            np.testing.assert_array_equal(ours[name]["kernel"], wanted)
    save_model(tmp_path, model, params)  # whole
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load_model(tmp_path)[1]
    kernel = lambda p: p["layers"]["1"]["mlp"]["experts"]["down"]["kernel"]
    np.testing.assert_array_equal(kernel(again), kernel(params))


def drop(ending):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ending)}


def halved(ending):
    return lambda tensors: {n: t[:1] if n.endswith(ending) else t for n, t in tensors.items()}


PATH = "model.layers.0.self_attn.q_proj.weight"


def eighth(shape, dtype=ml_dtypes.float8_e4m3fn):
    """Adds scales of this shape to one weight, which becomes FP8."""
    return lambda tensors: tensors | {
        PATH: tensors[PATH].astype(dtype), f"{PATH}_scale_inv": np.ones(shape, np.float32)
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings, change, message",
    [
        (MXFP4, drop("_scales"), "down_proj_blocks'.* scales are missing: expected uint8"),
        (MXFP4, halved("_scales"), r"down_proj_blocks'.* scales \(1, "),
        (MXFP4, drop(("_blocks", "_scales")), "no tensor is in MXFP4"),
        ({"quant_method": "fp8"}, lambda t: t, r"quantised \(FP8"),
        (FP8, drop(("_blocks", "_scales")), "no weight has scales"),
        (FP8, eighth((2, 1)), r"has shape \(2, 1\), expected \(2, 2\)"),
        (FP8, eighth((2, 2), np.float32), "is float32 .*, expected a matrix in FP8"),
    ],
)
def test_damaged_files_are_refused_by_the_tensor(gpt_oss, tmp_path, settings, change, message):
    shutil.copytree(gpt_oss, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, quantization_config=settings)
    save_file(change(load_file(tmp_path / FILE)), tmp_path / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
