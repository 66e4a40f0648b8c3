"""The scripts on encoder-decoders: records, losses and answers are those of transformers."""

import json
import re

import numpy as np
import pytest

from experiments import evaluate, generate, preference, reinforce, sft
from experiments.cli import flags
from jaxft import train
from jaxft.checkpoints import load_tokenizer
from tests.checkpoints.small_bert import quiet

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")
from tests.data.small_tokenizers import WORDS, word_tokenizer  # noqa: E402

oracles = pytest.importorskip("tests.checkpoints.encoder_decoders")

FORMS = {"bart": "<s> $A </s>", "t5": "$A </s>"}


@pytest.fixture(scope="module", params=list(FORMS))
def files(request, tmp_path_factory):
    """(folder of a model, file of questions and answers, its rows)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = oracles.torch_model(request.param)
    model.generation_config.eos_token_id = model.config.eos_token_id = 2
    with quiet():
        model.save_pretrained(folder / "model")
    tokenizer = word_tokenizer(FORMS[request.param])
    if request.param == "bart":
        tokenizer.mask_token = WORDS[-1]
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    draw = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 6)))
    rows = [{"question": draw(), "answer": draw()} for _ in range(24)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", path, rows


def answer_of(theirs, tokenizer, question, new):
    """transformers' greedy answer of `new` tokens, after those that it forces."""
    source = tokenizer(question, return_tensors="pt")["input_ids"]
    forced = 1 + (theirs.generation_config.forced_bos_token_id is not None)
    options = dict(max_length=forced + new, num_beams=1, do_sample=False, use_cache=False)
    ids = theirs.generate(input_ids=source, **options)
    return tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_loss_and_answers_are_those_of_transformers(files):
    model, path, rows = files
    given = dict(model=str(model), data=str(path), max_length=24, max_new_tokens=4)
    metrics = evaluate.main(flags.replace(evaluate.Config(), **given))
    with quiet():
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
    asked = tuple(row["question"] for row in rows[:2])
    sampling = dict(model=str(model), prompt=asked, max_new_tokens=5)
    found = generate.main(flags.replace(generate.Config(), **sampling))
    assert found == [answer_of(theirs, tokenizer, question, 5) for question in asked]


def test_sft_renders_texts_to_restore(files, tmp_path):
    model, _, rows = files
    texts = tmp_path / "texts.jsonl"
    lines = (json.dumps({"text": f"{row['question']} {row['answer']}"}) for row in rows)
    texts.write_text("\n".join(lines))
    given = dict(model=str(model), data=(str(texts),), max_length=16, preview=True)
    run = lambda **more: sft.main(flags.replace(sft.Config(), **given, **more))
    if "bart" in str(model):
        assert run(denoise="infill")["records"] == len(rows)
        with pytest.raises(ValueError, match="--mask all has no effect with --denoise infill"):
            run(denoise="infill", mask="all")
    else:
        with pytest.raises(ValueError, match="no <extra_id_0>, which T5's have"):
            run(denoise="span")


@pytest.mark.parametrize("files", ["bart"], indirect=True)
def test_sft_trains_an_adapter_that_peft_opens(files, tmp_path):
    model, path, rows = files
    given = dict(
        model=str(model), data=(str(path),), output_dir=str(tmp_path), max_steps=3, batch_size=4,
        max_length=24, learning_rate=1e-2, eval_steps=3, rank=2, accuracy=False,
    )  # fmt: skip
    metrics = sft.main(flags.replace(sft.Config(), **given))
    assert metrics["last_loss"] < metrics["first_loss"]
    peft = pytest.importorskip("peft")
    with quiet():
        base = hf.AutoModelForSeq2SeqLM.from_pretrained(model)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    asked = dict(model=str(model), adapter=str(tmp_path / "adapter"), max_new_tokens=5)
    question = rows[0]["question"]
    found = generate.main(flags.replace(generate.Config(), **asked, prompt=(question,)))
    assert found == [answer_of(theirs, load_tokenizer(model), question, 5)]


@pytest.mark.parametrize("files", ["bart"], indirect=True)
@pytest.mark.parametrize(
    "main, config, given, message",
    [
        (sft.main, sft.Config(), dict(max_length=64), "64 is more than the 24 positions"),
        (
            sft.main,
            sft.Config(),
            dict(context=8, max_length=24),
            "rows of an encoder-decoder such as",
        ),
        (sft.main, sft.Config(), dict(template="chatml"), "'chatml' does not apply to bart"),
        (
            sft.main,
            sft.Config(),
            dict(adapter="prompt", max_length=24),
            "--adapter prompt: .* encoder-decoder, which has no place",
        ),
        (
            preference.main,
            preference.Config(),
            dict(loss="reward"),
            "--loss reward does not support",
        ),
        (
            reinforce.main,
            reinforce.Config(),
            dict(algorithm="ppo"),
            "encoder-decoder, which --algorithm",
        ),
        (reinforce.main, reinforce.Config(), dict(turns=2), "encoder-decoder, which --turns 2"),
    ],
)
def test_what_an_encoder_decoder_lacks_is_refused(
    files, tmp_path, capsys, main, config, given, message
):
    """Runs as from the command line, where errors of the training loop have a traceback."""
    model, path, _ = files
    data = str(path) if config.data is None or isinstance(config.data, str) else (str(path),)
    if main is reinforce.main:
        data = "rg:chain_sum?size=8"
    if main is preference.main:
        data = (str(path.with_name("pairs.jsonl")),)
        pairs = [{"prompt": f"w{i}", "chosen": "w1", "rejected": "w2"} for i in range(9)]
        path.with_name("pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    given = dict(model=str(model), data=data, output_dir=str(tmp_path)) | given
    with pytest.raises(SystemExit) as ended:
        train.run_main(main, flags.replace(config, **given))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and re.search(message, line), line
