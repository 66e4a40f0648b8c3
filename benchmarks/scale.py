"""Memory and times of train steps, compiled for slices that are not here: writes docs/scale.md.

make scale                                              all rows, about two hours and 20 GB
.venv/bin/python -m benchmarks.scale --rows 0 3         some rows of the first table
.venv/bin/python -m benchmarks.scale --papers           the second table, row by row into the page
.venv/bin/python -m benchmarks.scale --papers lion dco  some rows of it
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping

from jaxft.compile import Config, main

PAGE = pathlib.Path(__file__).parents[1] / "docs/scale.md"
HEAD = """# What fits where

Real train steps, compiled ahead of time by `python -m jaxft.compile` for devices that were not here: no
weights, no run. `make scale` writes this page again.

Memory is what one device needs, of what it has. Exchanged is what the collectives of a step give to one
device, its own share included (an all-reduce counts twice). The number in brackets divides it by what plain
FSDP gathers: all params twice and, if all of them train, their gradients, in bfloat16. It is below 1 where
embeddings are looked up instead of gathered. With experts split over `expert` it divides by what three parts
exchange: other params over all devices, a device's own experts over `fsdp`, k rows of each token in two
all-to-alls, forward and backward. A device is assumed to receive as many rows as it sends; its memory has
room for the rows of all. The bound is the longest of three times: computing at the peak rate, reading memory,
and exchanging at the full rate of the links. A real step takes longer.

Collectives that a TPU overlaps with other work are counted since 2026-11-30. The rows of llama3-70b and
that of rows of 65,536 tokens were compiled before, and may exchange more than they say.

Rows of models that read images have one image each, whose tokens are part of theirs: 224 x 224 pixels (256
tokens) with PaliGemma, 896 x 896 (1,024) with Qwen2.5-VL. Adapters are on the text part; the part for
images is frozen, and FSDP gathers it once.

"""
COLUMNS = (
    "| model | trains | objective | hardware | mesh | tokens per step "
    "| memory, GiB | exchanged, GiB | bound, s |"
)

# The results of products are kept ("dots"): recomputing them would gather the kernels a third time.
_8B = dict(model="llama3-8b", rows=1, remat="dots")
_MOE = dict(model="qwen3-30b-a3b", rows=1, expert=16, remat="dots")
# A row is a group: a prompt of 1,536 tokens and 8 responses of 512.
_GROUP = dict(objective="grpo", length=2048, response=512, share_prompts=8)
CASES = [
    *(
        Config(**_8B, adapter=adapter, topology=topology)
        for adapter in ("lora", "paca")
        for topology in ("v5e:4x4", "v5p:2x2x4", "h100:8")
    ),
    Config(**_8B, adapter="lora", topology="v5e:4x4", objective="grpo"),
    Config(**_8B, adapter="full", topology="v5p:2x2x4"),
    Config(**_8B, adapter="lora", quantise="nf4", topology="v5e:2x2"),
    Config(model="qwen3-8b", rows=1, adapter="lora", topology="v6e:2x4"),
    Config(model="gemma3-27b", rows=1, adapter="lora", topology="v6e:4x4"),
    Config(model="llama3-70b", rows=1, adapter="lora", topology="v5p:2x4x4"),
    Config(model="llama3-70b", rows=1, adapter="full", topology="v5p:4x4x8"),
    Config(model="llama3-70b", rows=1, adapter="full", topology="v5p:4x4x8", fsdp=32, tensor=4),
    Config(rows=1, adapter="lora", topology="v5e:4x4", fsdp=4, context=4, length=65536),
    Config(model="llama3-8b", rows=1, adapter="full", topology="2*v5p:2x2x4", data=2),
    # Eight of 128 experts for a token: 16 devices along `expert` exchange half of what gathering moves.
    Config(**_MOE, adapter="lora", topology="v5p:4x4x4"),
    Config(**_MOE, adapter="full", topology="v5p:4x4x4"),
    Config(**_MOE, adapter="lora", topology="v6e:4x4"),
    Config(**_MOE, adapter="full", topology="v6e:4x4"),
    # On v5e the results of products of 5,632 tokens do not fit.
    Config(**_8B | _GROUP | dict(remat="full"), adapter="lora", topology="v5e:4x4"),
    Config(**_8B, **_GROUP, adapter="lora", topology="h100:8"),
    Config(
        model="qwen2.5-vl-7b", adapter="lora", target="language", topology="v5e:4x4", rows=1,
        media=1024, remat="dots",
    ),
    Config(
        model="paligemma-3b", adapter="lora", target="language", topology="v5e:4x4", rows=4,
        length=512, media=1, remat="dots",
    ),
]  # fmt: skip

PAPERS_TITLE = "## Full presets of the papers\n"
PAPERS_HEAD = """
The step that `--preset full` of each paper's script takes: its model, what trains, and its objective, which
`python -m jaxft.compile --objective` names. Sampling is not part of a step.

- monarch: the full preset projects the kernels of SmolLM2 and trains a small network; the row fine-tunes
  SmolLM2 with all kernels projected.
- intrinsic-dimension: all tensors train in one random subspace of 1000 dimensions.
- tram: the step takes a second gradient, and a distance of predictions. On one H100 its 16 rows need 87 GiB;
  the script splits them over all devices.
- echo-chamber: GRPO's update; the model has SmolLM2's architecture.
- reft: PPO's update with a value head; products by cuBLAS, since Triton has no tiles for its rows untuned.
- reasoning-survey: GRPO's update, one of the two trainings; verifiers train on fewer tokens.
- rlgf: PPO's update; the second critic is one more value head, and the guide is not part of the step.
- mrt, nft, otr, ppe, reft, rft-multimodal and rif-rft: each microbatch gathers the params again, which the
  ratio counts as if once; with long responses also the output projection for each part of the tokens.
- nft: 72.5 GiB leave nothing for the CUDA runtime; take half the rows and twice the microbatches.
- hypo: pairs, and as many samples of the policy, which the step gets as tokens.
- corpus-mining: all params of a decoder train on packed pairs; the preset's own model, OPUS-MT, is an
  encoder-decoder of half the size.
- patent-summarization: LoRA of a decoder of BART-base's size, with description and abstract in one row.
- cxr-preference: DPO, one of five losses, of Qwen2.5-VL-3B with one image of 1,024 tokens in a row; the part
  for images is frozen.
- facttune: DPO's step of a model of Llama 2's size; sampling, splitting and checking responses take most
  of the time.
- value-drifts: DPO of the second stage; SFT before it has half of its rows and no reference.
- r1-aqa: GRPO's update of a language model of the size of Qwen2-Audio's; there is no encoder of sound.
- rft-multimodal: GRPO's update of the language model of Qwen2.5-VL-3B; there is no vision tower.

"""
MISSING_CASE = "not compiled yet: python -m benchmarks.scale --rows"
PAPERS_COLUMNS = f"| paper {COLUMNS}"
MISSING = "not compiled yet: python -m benchmarks.scale --papers"
_SMALL = dict(float32=True, remat="none")
# In order of size. Lengths, batches and adapters are those of the scripts or of the papers.
PAPERS = {
    "lion": Config(
        model="smollm2-135m", adapter="lora", rank=8, optimizer="lion", topology="h100:1", rows=16,
        length=64, **_SMALL,
    ),
    "corpus-mining": Config(
        model="smollm2-135m", adapter="full", topology="h100:1", rows=32, length=512, remat="none"
    ),
    "patent-summarization": Config(
        model="smollm2-135m", adapter="lora", rank=16, topology="h100:1", rows=72, length=1280,
        remat="full",
    ),
    "intrinsic-dimension": Config(
        model="roberta-base", adapter="full", objective="classify", rank=1000, topology="h100:1",
        data=-1, fsdp=1, rows=32, length=128, **_SMALL,
    ),
    "adaptive-elicitation": Config(
        model="gpt2", adapter="full", topology="h100:1", rows=9, microbatches=4, length=1024,
        **_SMALL,
    ),
    "monarch": Config(model="smollm2-135m", adapter="monarch", topology="h100:1", rows=16, length=512),
    "tram": Config(
        model="gpt2", adapter="full", objective="tram", topology="h100:2", rows=8, length=1024,
        **_SMALL,
    ),
    "echo-chamber": Config(
        model="smollm2-135m", adapter="full", objective="grpo", topology="h100:1", rows=128,
        microbatches=4, length=1536, response=1024,
    ),
    "rlgf": Config(
        model="qwen2.5-0.5b", adapter="full", objective="ppo", topology="h100:1", rows=32, length=1024,
        response=512, triton=False,
    ),
    "reasoning-survey": Config(
        model="qwen2.5-1.5b", adapter="full", objective="grpo", topology="h100:8", rows=16,
        length=1536, response=1024, remat="full",
    ),
    "cxr-preference": Config(
        model="qwen2.5-vl-3b", adapter="full", target="language", objective="dpo", topology="h100:8",
        rows=1, length=2048, media=1024,
    ),
    "value-drifts": Config(
        model="llama3-3b", adapter="full", objective="dpo", topology="h100:8", rows=2, length=1024,
        remat="dots",
    ),
    "hypo": Config(
        model="llama3-8b", adapter="lora", objective="hypo", topology="h100:8", rows=1, length=1024,
        remat="dots",
    ),
    "paca": Config(
        model="llama3-8b", adapter="paca", topology="v5p:2x2x4", rows=1, length=2048, remat="lean"
    ),
    "dco": Config(
        model="llama3-8b", adapter="full", objective="dco", topology="h100:8", rows=4, length=1024,
        remat="dots",
    ),
    "facttune": Config(
        model="codellama-7b", adapter="full", objective="dpo", topology="h100:8", rows=1, length=512,
        remat="dots",
    ),
    "reft": Config(
        model="codellama-7b", adapter="full", objective="ppo", topology="h100:8", rows=3,
        microbatches=2, length=1212, response=700, triton=False,
    ),
    "mrt": Config(
        model="r1-distill-qwen-1.5b", adapter="full", objective="grpo", topology="h100:8", rows=1,
        microbatches=32, length=16896, response=16384,
    ),
    "nft": Config(
        model="qwen2.5-7b", adapter="full", objective="nft", topology="h100:8", rows=8, microbatches=8,
        length=4096, response=3584,
    ),
    "rif-rft": Config(
        model="qwen2.5-1.5b", adapter="full", objective="grpo", topology="h100:8", rows=8, microbatches=16,
        length=1024, response=512,
    ),
    "rft-multimodal": Config(
        model="qwen2.5-3b", adapter="full", objective="grpo", topology="h100:8", rows=4, microbatches=16,
        length=3072, response=2048,
    ),
    "r1-aqa": Config(
        model="qwen2.5-7b", adapter="full", objective="grpo", topology="h100:8", rows=4, microbatches=4,
        length=768, response=256,
    ),
    "ppe": Config(
        model="qwen2.5-7b", adapter="full", objective="grpo", topology="h100:8", rows=4, microbatches=32,
        length=4864, response=4096,
    ),
    "otr": Config(
        model="qwen2.5-7b", adapter="full", objective="otr", topology="h100:8", rows=1,
        microbatches=16, length=8192,
    ),
}  # fmt: skip


def row(config: Config, figures: dict) -> str:
    """One line of the table."""
    mesh = [
        f"{axis} {size}"
        for axis in ("data", "fsdp", "tensor", "expert", "context")
        if (size := getattr(config, axis)) != 1
    ]
    mesh = ", ".join(mesh).replace("fsdp -1", "fsdp").replace("data -1", "data")
    mesh += f"; rows of {config.length:,}" if config.length != Config().length else ""
    mesh += f"; groups of {config.share_prompts}" if config.share_prompts > 1 else ""
    mesh += "; with images" if config.media else ""
    trains = "subspace" if config.objective == "classify" else config.adapter
    trains += f" of {config.target}" if config.target != Config().target else ""
    trains += f" over {config.quantise}" if config.quantise else ""
    head = [config.model, trains, config.objective, config.topology, mesh]
    if not figures["fits"]:
        reason = figures.get("reason") or f"needs {figures['peak_bytes'] / 2**30:.1f} GiB"
        return f"| {' | '.join(head)} | does not fit: {reason} | | | |"
    exchanged = sum(size for _, size in figures["collectives"].values())
    bound = max(figures[f"{what}_s"] for what in ("compute", "memory", "exchange"))
    memory = f"{figures['peak_bytes'] / 2**30:.1f} of {figures['memory_bytes'] / 2**30:.0f}"
    ideal = figures["ideal_exchanged_bytes"]
    times = f" ({exchanged / ideal:.2f})" if ideal else ""
    moved = f"{exchanged / 2**30:.2f}{times}"
    cells = [*head, f"{figures['tokens']:,}", memory, moved, f"{bound:.3f}"]
    return f"| {' | '.join(cells)} |"


def table(columns: str, lines: list[str]) -> str:
    """A table of Markdown."""
    return "\n".join([columns, "|---" * columns.count(" |") + "|", *lines]) + "\n"


def papers_section(lines: Mapping[str, str]) -> str:
    """The second part of the page, from its lines by paper; papers without one are said to be missing."""
    rows = [lines.get(slug) or f"| {slug} | {MISSING} |" + " |" * 8 for slug in sorted(PAPERS)]
    return PAPERS_TITLE + PAPERS_HEAD + table(PAPERS_COLUMNS, rows)


def papers_lines(page: str) -> dict[str, str]:
    """{paper: its line} of the compiled rows in a page."""
    rows = [line for line in page.partition(PAPERS_TITLE)[2].splitlines() if line.startswith("| ")]
    named = {line.split("|")[1].strip(): line for line in rows if MISSING not in line}
    return {slug: line for slug, line in named.items() if slug in PAPERS}


def compile_papers(slugs: list[str]) -> None:
    """Compiles these papers' steps and writes each into the page."""
    for slug in slugs:
        write_paper(slug, main(dataclasses.replace(PAPERS[slug], json=True)))


def write_paper(slug: str, figures: dict) -> None:
    """Writes the line of a paper into the page, with the figures of its step."""
    page, line = PAGE.read_text("utf-8"), f"| {slug} {row(PAPERS[slug], figures)}"
    section = papers_section(papers_lines(page) | {slug: line})
    PAGE.write_text(page.partition(PAPERS_TITLE)[0].rstrip() + "\n\n" + section, "utf-8")
    print(line, flush=True)


def compile_cases(rows: list[int] | None) -> None:
    """Compiles rows of the first table, and without `rows` all, each into the page."""
    for i in range(len(CASES)) if rows is None else rows:
        line = row(CASES[i], main(dataclasses.replace(CASES[i], json=True)))
        print(line, flush=True)
        page = PAGE.read_text(
            "utf-8"
        )  # after each row: an hour's rows outlive a compiler that dies
        lines = cases_lines(page)
        lines[i] = line
        papers = papers_section(papers_lines(page))
        PAGE.write_text(HEAD + table(COLUMNS, lines) + "\n" + papers, "utf-8")


def cases_lines(page: str) -> list[str]:
    """The lines of the first table in a page; cases without one are said to be missing."""
    rows = [line for line in page.partition(PAPERS_TITLE)[0].splitlines() if line.startswith("| ")]
    rows = rows[1 : 1 + len(CASES)]
    return rows + [
        f"| {case.model} | {case.adapter} | {MISSING_CASE} |" + " |" * 6
        for case in CASES[len(rows) :]
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        help="numbers of the first table's cases, into the page; default: all",
    )
    parser.add_argument(
        "--papers", nargs="*", choices=list(PAPERS), metavar="SLUG",
        help="only the full presets of these papers, or of all, into the page",
    )  # fmt: skip
    args = parser.parse_args()
    if args.papers is None:
        compile_cases(args.rows)
    if args.papers is not None or args.rows is None:
        compile_papers(args.papers or list(PAPERS))
