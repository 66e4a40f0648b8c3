"""Makes trl_gkd.json: what TRL's GKDTrainer.generalized_jsd_loss gives on random logits, with its gradient.

    TRL_EXPERIMENTAL_SILENCE=1 python tests/losses/make_gkd_fixture.py

"tokens" are the values of single tokens, "mean" is the mean over those that labels count ("batchmean"), and
"gradient" that of the mean by the student's logits. Made with trl 1.16 and torch 2.13.
"""

import json
import pathlib

import torch
from trl.experimental.gkd import GKDTrainer

SHAPE = 2, 3, 7
CASES = [(0.0, 1.0), (0.0, 2.5), (0.1, 1.0), (0.5, 1.0), (0.5, 0.7), (0.9, 2.5), (1.0, 1.0)]


def main():
    """Writes the file beside this one."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(SHAPE, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    found = []
    for beta, temperature in CASES:
        logits, options = student.clone().requires_grad_(), dict(beta=beta, temperature=temperature)
        mean = GKDTrainer.generalized_jsd_loss(logits, teacher, labels=labels, **options)
        mean.backward()
        each = GKDTrainer.generalized_jsd_loss(logits, teacher, reduction="none", **options)
        results = {"tokens": each.sum(-1), "mean": mean, "gradient": logits.grad}
        found.append(options | {name: x.tolist() for name, x in results.items()})
    whole = {
        "student": student.tolist(),
        "teacher": teacher.tolist(),
        "counted": (labels != -100).tolist(),
        "cases": found,
    }
    text = json.dumps(whole, indent=1)
    pathlib.Path(__file__).with_name("trl_gkd.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
