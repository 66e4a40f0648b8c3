"""The scripts on models that hear: losses and transcripts are those of transformers."""

import json

import numpy as np
import pytest

from experiments import evaluate, generate, sft, transcribe
from experiments.cli import flags
from experiments.cli.models import renderer_of
from jaxft import data
from jaxft.checkpoints import load_tokenizer
from jaxft.data import __main__ as inspection
from tests.checkpoints.small_bert import quiet
from tests.data.test_audio import RATE, tone, wav

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")
from tests.data.small_tokenizers import WORDS, word_tokenizer  # noqa: E402

# Ids of the small tokenizer: 0 <s>, 1 padding, 2 </s>; the last stands for texts without timestamps.
SIZES = dict(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=20, num_mel_bins=8, max_source_positions=50, max_target_positions=32,
    decoder_start_token_id=0, pad_token_id=1, bos_token_id=0, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(directory of a model, file of clips and texts, transformers' model, its features)."""
    folder = tmp_path_factory.mktemp("speech")
    tokenizer = word_tokenizer("<s> $A </s>")
    torch.manual_seed(0)
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(vocab_size=len(tokenizer), **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    ids = dict(decoder_start_token_id=0, eos_token_id=2, pad_token_id=1, max_length=32)
    rules = dict(no_timestamps_token_id=36, is_multilingual=False, suppress_tokens=[5])
    model.generation_config = hf.GenerationConfig(**ids, **rules)
    extract = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    with quiet():
        for part in (model.eval(), tokenizer, extract):
            part.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        text = " ".join(rng.choice(WORDS[:-1], rng.integers(2, 6)))
        (folder / f"{i}.wav").write_bytes(wav(tone(0.9, hertz=200 + 90 * i)))
        rows.append({"audio": f"{i}.wav", "text": text})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", path, model, extract


def features(extract, path):
    samples = data.read_clip(str(path))
    return extract(samples, sampling_rate=RATE, return_tensors="pt").input_features


def test_losses_and_transcripts_are_those_of_transformers(files, tmp_path):
    model, path, theirs, extract = files
    metrics = evaluate.main(
        flags.replace(evaluate.Config(), model=str(model), data=str(path), max_length=16)
    )
    tokenizer, total, count = load_tokenizer(model), 0, 0
    for row in map(json.loads, path.read_text().splitlines()):
        ids = tokenizer.encode(f" {row['text']}", add_special_tokens=False)
        # Two ids begin the text and do not train.
        labels = torch.tensor([[-100, *ids, 2]])
        given = torch.tensor([[0, 36, *ids]])
        with torch.no_grad():
            sound = features(extract, path.parent / row["audio"])
            loss = theirs(sound, decoder_input_ids=given, labels=labels).loss
        total, count = total + float(loss) * (len(ids) + 1), count + len(ids) + 1
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)
    clips = tuple(str(path.parent / f"{i}.wav") for i in range(3))
    given = dict(model=str(model), audio=clips, max_new_tokens=6, batch_size=2)
    output = tmp_path / "texts.jsonl"
    texts = transcribe.main(flags.replace(transcribe.Config(), **given, output=str(output)))
    with quiet():
        wanted = [theirs.generate(features(extract, clip), max_new_tokens=6)[0] for clip in clips]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [{"audio": c, "text": t} for c, t in zip(clips, texts, strict=True)]


def test_sft_learns_the_texts_of_clips(files, tmp_path):
    model, path, _, _ = files
    given = dict(model=str(model), data=(str(path),), eval_data=str(path), max_length=16)
    given |= dict(max_steps=8, eval_steps=8, batch_size=6, adapter="full", learning_rate=1e-2)
    with pytest.raises(data.DataError, match="every held-out record is also in the training data"):
        sft.main(flags.replace(sft.Config(), **given, output_dir=str(tmp_path / "a")))
    given |= dict(eval_data=None, validation=0.25, output_dir=str(tmp_path / "b"))
    sft.main(flags.replace(sft.Config(), **given))
    rows = [
        json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]  # each batch holds all records
    with quiet():
        again = hf.WhisperForConditionalGeneration.from_pretrained(tmp_path / "b" / "model")
    assert again.generation_config.suppress_tokens == [5]


SLOW, STEREO = wav(tone(0.5, rate=8000), rate=8000), wav(np.stack([tone(0.5)] * 2, axis=1))
BAD = [
    (SLOW, "has 8000 samples per second, expected 16000; convert it: --resample"),
    (STEREO, "has 2 channels, expected one; mix them: --mix"),
    (wav(tone(1.2)), "lasts 1.2 s, and the model reads 1 s at a time"),
    (b"", "is empty: it has no bytes"),
    (b"RIFF" + b"?" * 60, "a damaged WAV file"),
]


@pytest.mark.parametrize("content, message", BAD)
def test_bad_clips_end_a_script_before_the_model_is_loaded(
    files, tmp_path, content, message, monkeypatch
):
    for script in (transcribe, sft.shared):
        name = "load_trained" if script is transcribe else "load_base"
        monkeypatch.setattr(script, name, None)
    (tmp_path / "a.wav").write_bytes(content)
    given = dict(model=str(files[0]), audio=(str(tmp_path / "a.wav"),))
    with pytest.raises(data.DataError, match=message):
        transcribe.main(flags.replace(transcribe.Config(), **given))
    rows = [{"audio": str(tmp_path / "a.wav"), "text": "a b"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = dict(model=str(files[0]), data=(str(tmp_path / "rows.jsonl"),), preview=True)
    with pytest.raises(data.DataError, match=f"line 1: .*{message}"):
        sft.main(flags.replace(sft.Config(), **given))


def test_flags_and_records_that_do_not_fit_are_refused(files, tmp_path):
    model, path, _, _ = files
    run = lambda **given: transcribe.main(flags.replace(transcribe.Config(), **given))
    with pytest.raises(ValueError, match="--audio names no clip"):
        run(model=str(model))
    with pytest.raises(ValueError, match="--model tiny does not transcribe"):
        run(model="tiny", audio=("a.wav",))
    with pytest.raises(ValueError, match="have no effect with tiny unless it reads clips"):
        run(model="tiny", audio=("a.wav",), resample=True)
    with pytest.raises(ValueError, match="writes the texts of clips: use transcribe.py"):
        generate.main(flags.replace(generate.Config(), model=str(model), prompt=("a",)))
    with pytest.raises(ValueError, match="language 'de' is not in lang_to_id"):
        run(model=str(model), audio=("a.wav",), language="de")
    preview = dict(model=str(model), preview=True)
    for row, message in [
        ({"text": "a b"}, "has 0 clips, expected one in the column 'audio'"),
        ({"audio": ["0.wav", "1.wav"], "text": "a"}, "has 2 clips, expected one"),
        (
            {"audio": str(path.parent / "0.wav"), "prompt": "who", "completion": "a"},
            "'who' stands beside",
        ),
    ]:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        given = preview | dict(data=(str(tmp_path / "rows.jsonl"),))
        with pytest.raises(data.DataError, match=message):
            sft.main(flags.replace(sft.Config(), **given))
    with pytest.raises(data.DataError, match="reads sound, not texts to restore"):
        sft.main(flags.replace(sft.Config(), **preview, data=(str(path),), denoise="span"))


def test_other_commands_on_models_that_hear(files, capsys):
    """The inspection of data renders clips; scripts that do not take them say so."""
    model, path, _, _ = files
    inspection.main(inspection.Config(str(path), str(model), max_length=16))
    assert "<s> w32" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="writes the texts of clips, which this script does not take"
    ):
        renderer_of(flags.Model(model=str(model)))
