"""The scripts on encoder-decoders: records, losses and answers are those of transformers."""

import json

import numpy as np
import pytest

from experiments import evaluate, generate, sft
from experiments.cli import flags
from jaxft.checkpoints import load_tokenizer

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")
from tests.data.small_tokenizers import WORDS, word_tokenizer  # noqa: E402

oracles = pytest.importorskip("tests.checkpoints.encoder_decoders")

FORMS = {"bart": "<s> $A </s>", "t5": "$A </s>"}


@pytest.fixture(scope="module", params=list(FORMS))
def files(request, tmp_path_factory):
    """(folder of a model, file of questions and answers)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = oracles.torch_model(request.param)
    model.generation_config.eos_token_id = model.config.eos_token_id = 2
    model.save_pretrained(folder / "model")
    word_tokenizer(FORMS[request.param]).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    draw = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 6)))
    rows = [{"question": draw(), "answer": draw()} for _ in range(24)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": draw(), "chosen": draw(), "rejected": draw()} for _ in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder / "model", path, rows


def replaced(config, **changes):
    return flags.replace(config, **changes)


def test_loss_and_answers_are_those_of_transformers(files, capsys):
    model, path, rows = files
    given = dict(model=str(model), data=str(path), max_length=24)
    metrics = evaluate.main(replaced(evaluate.Config(), **given))
    theirs = hf.AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    tokenizer = load_tokenizer(model)
    total = count = 0
    for row in rows:
        labels = tokenizer(text_target=row["answer"], return_tensors="pt")["input_ids"]
        source = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(theirs(source, labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)
    asked = [row["question"] for row in rows[:2]]
    sampling = dict(model=str(model), prompt=tuple(asked), max_new_tokens=5)
    found = generate.main(replaced(generate.Config(), **sampling))
    for question, answer in zip(asked, found, strict=True):
        source = tokenizer(question, return_tensors="pt")["input_ids"]
        given = 1 + (theirs.generation_config.forced_bos_token_id is not None)
        ids = theirs.generate(
            source, max_length=given + 5, num_beams=1, do_sample=False, use_cache=False
        )
        assert answer == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_sft_trains_saves_and_generates_with_its_adapter(files, tmp_path):
    model, path, rows = files
    given = dict(
        model=str(model), data=(str(path),), output_dir=str(tmp_path), max_steps=3, batch_size=4,
        max_length=24, learning_rate=1e-2, eval_steps=3, rank=2,
    )  # fmt: skip
    metrics = sft.main(replaced(sft.Config(), **given))
    assert metrics["last_loss"] < metrics["first_loss"]
    peft = pytest.importorskip("peft")
    base = hf.AutoModelForSeq2SeqLM.from_pretrained(model)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    asked = dict(model=str(model), adapter=str(tmp_path / "adapter"), max_new_tokens=4)
    (answer,) = generate.main(replaced(generate.Config(), **asked, prompt=(rows[0]["question"],)))
    tokenizer = load_tokenizer(model)
    source = tokenizer(rows[0]["question"], return_tensors="pt")["input_ids"]
    given = 1 + (theirs.generation_config.forced_bos_token_id is not None)
    ids = theirs.generate(
        input_ids=source, max_length=given + 4, num_beams=1, do_sample=False, use_cache=False
    )
    assert answer == tokenizer.decode(ids[0], skip_special_tokens=True).strip()
