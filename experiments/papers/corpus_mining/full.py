"""Translation with a model from the hub and line-parallel text files: corpus_mining's --preset full."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments import sft
from experiments.cli import flags
from experiments.cli import training as shared
from experiments.cli.models import renderer_of, stop_ids
from experiments.papers.corpus_mining import tasks
from jaxft import data
from jaxft.data import mining
from jaxft.generation import Beams, SamplingConfig, beam_search
from jaxft.parallel import mesh_context

# Some epochs of 50 000 mined pairs in batches of 32 packed rows; rates of fine-tuning, not the paper's.
SIZES = dict(
    seeds=1, steps=(10_000, 5_000, 2_000), learning_rates=(2e-5, 1e-5, 5e-6), evaluate_every=500,
    batch_size=32, max_length=512, dev=555, held_out=2068, num_beams=4,
)  # fmt: skip
SMOKE = dict(model="tiny", fsdp=1, microbatches=1, max_new_tokens=4, max_length=64)
FILES = ("ood", "in_domain", "dev_set", "test_set")


@flags.without_prefix
@dataclasses.dataclass(frozen=True)
class Source:
    """The model and the text files of --preset full; the flags have no effect without it.

    A set is SOURCE,TARGET: two UTF-8 files, line i of one the translation of line i of the other.
    """

    model: str = "Helsinki-NLP/opus-mt-ja-en"  # directory, .gguf file or hub id; all params train
    ood: tuple[str, ...] = ()  # out-of-domain sets, such as ASPEC and TED
    in_domain: tuple[str, ...] = ()  # mined sets
    dev_set: tuple[str, ...] = ()  # in-domain pairs that select checkpoints
    test_set: tuple[str, ...] = ()  # in-domain pairs that measure BLEU
    # the prompt, with {} for the source; for a decoder such as "Translate into English: {}\n"
    request: str = "{}"
    tokenize: str = "13a"  # sacrebleu's tokenizer of the target language: ja-mecab, zh, ...
    max_new_tokens: int = 128  # maximum tokens of a translation
    microbatches: int = 4  # parts of a batch that are processed in turn
    fsdp: int = -1  # shards of the params and the batch; -1: as many as the devices allow
    tensor: int = 1  # shards of each projection


def read_pairs(specs: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    """Returns the pairs of all sets, without those with an empty line.

    Raises:
        DataError: for a set that is not two files with the same number of lines.
    """
    pairs = []
    for spec in specs:
        source, _, target = spec.partition(",")
        if not target:
            raise data.DataError(f"{option} {spec}: expected two files, SOURCE,TARGET.")
        sides = [mining.read_sentences(path) for path in (source, target)]
        if len(sides[0]) != len(sides[1]):
            raise data.DataError(
                f"{option} {spec}: {len(sides[0])} lines and {len(sides[1])} lines; line i of one file must "
                "be the translation of line i of the other."
            )
        pairs += [pair for pair in zip(*sides, strict=True) if all(pair)]
    return pairs


def opened(config: Any) -> Callable[[int], tasks.Task]:
    """Reads files and model; returns seed -> the task, whose start all seeds share.

    Raises:
        ValueError: if a set is missing; DataError for its files, before the model is read.
    """
    source = config.source
    option = lambda name: f"--{name.replace('_', '-')}"
    if lacking := [option(name) for name in FILES if not getattr(source, name)]:
        raise ValueError(
            f"--preset full: {', '.join(lacking)} missing; give each as SOURCE,TARGET, two text files with "
            "one sentence a line (the authors' repository, shyyhs/CourseraParallelCorpusMining, has the "
            "mined, development and test sets)."
        )
    sets = {name: read_pairs(getattr(source, name), option(name)) for name in FILES}
    apart = {pair for name in FILES[2:] for pair in sets[name]}
    for name in FILES[:2]:
        kept = [pair for pair in sets[name] if pair not in apart]
        print(f"{name}: {len(kept)} pairs; {len(sets[name]) - len(kept)} are in the other sets")
        sets[name] = kept
    settings = flags.replace(
        sft.Config(), model=source.model, adapter="full", batch_size=config.batch_size,
        max_length=config.max_length, fsdp=source.fsdp, tensor=source.tensor, bfloat16=not config.smoke,
    )  # fmt: skip
    renderer = renderer_of(settings.base)
    record = lambda pair: {"prompt": source.request.format(pair[0]), "completion": pair[1]}
    parts = [
        data.render(list(map(record, sets[name])), renderer, config.max_length, too_long="drop")
        for name in FILES[:2]
    ]
    mesh = shared.mesh_of(settings.mesh)
    model, base = shared.load_base(settings, mesh, keeps_start=True)
    start = shared.adapt_params(settings, model, base, mesh)
    rules = SamplingConfig(
        source.max_new_tokens, temperature=0.0, stop_ids=stop_ids(renderer, model)
    )

    def translate(params, sentences, beams):
        asked = [{"prompt": source.request.format(text)} for text in sentences]
        prompts, found = data.render_prompts(asked, renderer), []
        with mesh_context(mesh):
            for i in range(0, len(prompts), config.batch_size):
                part = prompts[i : i + config.batch_size]
                found += beam_search(model, params, part, Beams(beams), rules).completions
        decode = renderer.tokenizer.decode
        return [decode(ids, skip_special_tokens=True).strip() for ids in found]

    return lambda seed: tasks.Task(
        model.forward,
        start,
        lambda domain, seed: tasks.mixed(parts, domain, config.batch_size, config.max_length, seed),
        translate,
        sets["dev_set"][: config.dev],
        sets["test_set"][: config.held_out],
        {"pairs": len(parts[1])},
        source.tokenize,
        mesh,
        source.microbatches,
    )
