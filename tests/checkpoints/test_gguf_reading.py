"""Contents of GGUF files: every type of tensor, parts, and keys that are honoured or refused."""

import shutil

import gguf
import numpy as np
import pytest

from jaxft.checkpoints import CheckpointError, resolve
from jaxft.checkpoints.gguf import GgufFile
from jaxft.models import FAMILIES
from jaxft.models.gguf_keys import KEYS

KINDS = gguf.GGMLQuantizationType
BASE = {
    "vocab_size": 61, "block_count": 1, "context_length": 64, "embedding_length": 32,
    "feed_forward_length": 48, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e4,
}  # fmt: skip
SHAPES = {
    "token_embd": (61, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
    "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32),
    "blk.0.ffn_down": (32, 48),
}  # fmt: skip
TENSORS = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def write(path, keys=(), tensors=TENSORS, architecture="llama", **options):
    """A GGUF file; keys beyond BASE without the architecture, or in full with a leading dot."""
    writer = gguf.GGUFWriter(str(path), architecture, **options)
    for key, value in (BASE | dict(keys)).items():
        name = key[1:] if key.startswith(".") else f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            add = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
            getattr(writer, f"add_{add}")(name, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", list(KINDS), ids=lambda kind: kind.name)
def test_a_type_that_the_package_dequantises_is_read_and_another_is_named(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    width = -(-64 // block) * block
    if kind.name in ("F16", "F32", "F64", "I8", "I16", "I32", "I64"):
        dtype = {"F": "float", "I": "int"}[kind.name[0]] + kind.name[1:]
        stored = 3 * np.ones((8, width), dtype)
        tensor, expected = stored, stored if kind.name[0] == "F" else None
    else:
        stored = rng.integers(0, 60, (8, width // block * size), np.uint8)
        tensor = stored, kind
        try:
            expected = gguf.dequantize(stored, kind)
        except NotImplementedError:
            expected = None
    name = "blk.0.attn_q.weight"
    file = write(tmp_path / "m.gguf", tensors=TENSORS | {name: tensor})
    if expected is None:
        with pytest.raises(CheckpointError, match=f"'{name}' is stored as {kind.name}, which"):
            GgufFile(file)
        return
    read = GgufFile(file).read(name)
    np.testing.assert_array_equal(read[...], expected)
    part = read[np.array([5, 2]), slice(width // 2 - 3, width // 2 + 3)]
    np.testing.assert_array_equal(part, expected[[5, 2], width // 2 - 3 : width // 2 + 3])


@pytest.fixture
def parts(tmp_path):
    write(tmp_path / "m.gguf", split_max_tensors=4)
    return sorted(tmp_path.glob("*.gguf"))


def test_a_split_model_is_read_from_any_part_and_from_its_directory(tmp_path, parts):
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in (*parts, resolve(tmp_path)):
        assert GgufFile(path).names == set(TENSORS)
    write(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 .gguf models \(m-0000.*other.gguf\)"):
        resolve(tmp_path)


def test_big_endian_files_and_pointers_are_named(tmp_path):
    """The package reads a big-endian file's F32 tensors as they lie there, with other values."""
    file = write(tmp_path / "m.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="big-endian.*gguf-convert-endian"):
        GgufFile(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid x")
    with pytest.raises(CheckpointError, match="a Git LFS pointer"):
        GgufFile(file)


def test_a_missing_or_foreign_part_is_named(tmp_path, parts):
    third = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(CheckpointError, match="of which m-00003-of-00003.gguf is missing"):
        GgufFile(parts[0])
    shutil.copyfile(parts[1], parts[2])
    with pytest.raises(
        CheckpointError, match="m-00003-of-00003.gguf: not part 3 of 3.*part 2 of 3"
    ):
        GgufFile(parts[1])
    extra = {f"x{i}": np.ones(1, np.float32) for i in range(20)}
    write(tmp_path / "o.gguf", tensors=extra, split_max_tensors=7)
    shutil.copyfile(tmp_path / "o-00003-of-00003.gguf", parts[2])
    with pytest.raises(CheckpointError, match="split.tensors.count is 11, but its 3 parts hold 14"):
        GgufFile(parts[0])
    parts[2].write_bytes(third)
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="renamed.gguf: not part 1 of 1.*part 1 of 3"):
        GgufFile(renamed)


def test_the_table_of_keys_has_all_of_the_package():
    def strings(table):
        for value in vars(table).values():
            if isinstance(value, type):
                yield from strings(value)
            elif isinstance(value, str) and value.startswith("{arch}."):
                yield value.removeprefix("{arch}.")

    theirs = set(strings(gguf.Keys))
    theirs -= {key for key in theirs if "{dense}" in key}
    assert len(theirs) > 100 and theirs <= KEYS.keys()
    read = {key for f in FAMILIES if f.gguf is not None for key in f.gguf.reads}
    assert read <= KEYS.keys()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"attention.sliding_window": 32}, "the key 'attention.sliding_window' is 32"),
        ({"attn_logit_softcapping": 30.0}, "'attn_logit_softcapping' is 30.0"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
        ({"expert_count": 8, "expert_used_count": 2}, "'expert_count' is 8"),
        ({"attention.causal": False}, "'attention.causal' is False"),
        ({"attention.scale": 0.5}, "'attention.scale' is 0.5"),
        ({"embedding_scale": 12.0}, "'embedding_scale' is 12.0"),
        ({"residual_scale": 0.22}, "'residual_scale' is 0.2"),
        ({"logit_scale": 0.1}, "'logit_scale' is 0.1"),
        ({"rope.freq_base_swa": 1e4}, "'rope.freq_base_swa' is 10000.0"),
        ({"use_parallel_residual": True}, "'use_parallel_residual' is True"),
        ({"attention.value_length": 16}, "attention.value_length is 16 for heads of 8"),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4 for heads of 8"),
        ({"vocab_size": 64}, "vocab_size is 64, but token_embd.weight has 61 rows"),
        (
            {".tokenizer.ggml.tokens": ["a", "b"]},
            "its tokenizer has 2 tokens, token_embd.weight 61",
        ),
        ({"feed_forward_length": [48, 64]}, "feed_forward_length differs by layer"),
        ({"attention.layer_norm_rms_epsilon": None}, "rms_epsilon' is missing"),
        ({"rope.scaling.type": "longrope"}, "unsupported rope.scaling.type 'longrope'"),
        ({"rope.scaling.attn_factor": 1.2}, "attn_factor 1.2.* without rope.scaling.type yarn"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5},
            "yarn_ext_factor 0.5 is not supported",
        ),
        ({".general.type": "adapter"}, "general.type is 'adapter', expected a model"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_key_that_changes_the_computation_is_honoured_or_named(tmp_path, keys, message):
    with pytest.raises(CheckpointError, match=message):
        GgufFile(write(tmp_path / "m.gguf", keys))


def test_keys_at_neutral_values_and_unknown_ones_change_nothing(tmp_path):
    plain = GgufFile(write(tmp_path / "plain.gguf")).config
    keys = {
        "attention.sliding_window": 0, "expert_count": 0, "expert_used_count": 2, "logit_scale": 1.0,
        "attention.causal": True, "rope.scaling.finetuned": False, "attention.value_length": 8,
        "rope.dimension_count": 8, "rope.scaling.type": "none", "rope.scaling.factor": 4.0,
        "tensor_data_layout": "Meta AI original pth", "of_somebody": 7,
    }  # fmt: skip
    assert GgufFile(write(tmp_path / "m.gguf", keys)).config == plain


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"rope.scale_linear": 2.0}, {"scaling": "linear", "factor": 2.0}),
        ({"rope.scaling.factor": 4.0}, {"scaling": "linear", "factor": 4.0}),  # type absent: linear
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, {"factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 16, "rope.scaling.yarn_beta_fast": 30.0},
            {"scaling": "yarn", "factor": 4.0, "original_max_length": 16, "beta_fast": 30.0},
        ),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {"original_max_length": 64}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0},
            {"attention_factor": 2 * (0.1 * np.log(4) + 1)},
        ),
    ],
)  # fmt: skip
def test_rotary_scaling_is_llama_cpps(tmp_path, keys, expected):
    rope = GgufFile(write(tmp_path / "m.gguf", keys)).config.rope
    assert {name: getattr(rope, name) for name in expected} == pytest.approx(expected)


def test_rotary_factors_are_those_of_llama_alone(tmp_path):
    tensors = TENSORS | {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}
    keys = {"rope.scaling.factor": 2.0}
    config = GgufFile(write(tmp_path / "m.gguf", keys, tensors)).config
    assert config.rope.factors == (2, 4, 6, 8)  # llama.cpp divides by both
    qwen = GgufFile(write(tmp_path / "q.gguf", {}, tensors, "qwen2"))
    assert "rope_freqs.weight" in qwen.names  # surplus


@pytest.mark.parametrize(
    "architecture, keys, windows, theta",
    [
        ("gemma2", {}, (4096, None, 4096), None),
        ("gemma2", {"attention.sliding_window": 9, "rope.freq_base_swa": 2e4}, (9, None, 9), 2e4),
        ("gemma2", {"attention.sliding_window_pattern": 3}, (4096, 4096, None), None),
        ("gemma3", {}, (), 1e4),
        ("gemma3", {"attention.sliding_window": 9, "rope.freq_base_swa": 2e4}, (9, 9, 9), 2e4),
        (
            "gemma3",
            {"attention.sliding_window": 9, "attention.sliding_window_pattern": [True, False, False]},
            (9, None, None),
            1e4,
        ),
    ],
)  # fmt: skip
def test_gemmas_windows_are_llama_cpps(tmp_path, architecture, keys, windows, theta):
    file = write(tmp_path / "m.gguf", keys | {"block_count": 3}, architecture=architecture)
    config = GgufFile(file).config
    assert config.windows == windows
    assert (config.local_rope and config.local_rope.theta) == theta
    caps = (config.attention_softcap, config.final_softcap)
    assert caps == ((50, 30) if architecture == "gemma2" else (None, None))


class Header:
    """Metadata that keeps the names of the keys that are looked at."""

    file = "header"

    def __init__(self, keys):
        self.keys, self.seen = keys, set()

    def get(self, key, default=None):
        self.seen.add(key)
        return self.keys.get(key, default)

    def has(self, name):
        return False

    def read(self, name):
        return np.zeros((61, 1))


READABLE = [family for family in FAMILIES if family.gguf is not None]


@pytest.mark.parametrize("family", READABLE, ids=lambda family: family.name)
def test_a_codec_reads_the_keys_that_it_lists(family):
    seen = set()
    for keys in ({}, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}):
        header = Header(BASE | {"attention.layer_norm_epsilon": 1e-5} | keys)
        header.keys |= {"attention.head_count_kv": 4}
        family.gguf.read(header)
        seen |= header.seen
    assert seen == family.gguf.reads
