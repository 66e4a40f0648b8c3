"""Makes trl_policy.json: what TRL's GRPOTrainer gives on random log-probs, with its gradients.

    python tests/losses/make_trl_policy_fixture.py

`_compute_loss` is called unbound, on a stand-in that has the attributes it reads: no model is involved.
Made with the release of trl that the file names.
"""

import importlib.metadata
import json
import pathlib
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

ROWS, TOKENS = 4, 6
CASES = {
    "sapo": dict(loss_type="sapo"),
    "vespo": dict(loss_type="vespo"),
    "vespo, corrected": dict(loss_type="vespo", corrected=True),
    "luspo": dict(loss_type="luspo", level="sequence"),
    "cispo": dict(loss_type="cispo", epsilon_high=1.1),
    "off_policy_mask": dict(loss_type="dapo", threshold=0.01),
    "top_entropy": dict(loss_type="dapo", quantile=0.3),
    "corrected_kl": dict(loss_type="dapo", beta=0.2, corrects=True),
}


def draw():
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    lengths = torch.tensor([6, 3, 1, 5])
    mask = (torch.arange(TOKENS)[None] < lengths[:, None]).float()
    log_probs = -normal(ROWS, TOKENS).abs() * mask
    near = lambda: (log_probs + 0.3 * normal(ROWS, TOKENS)) * mask
    return {
        "mask": mask,
        "log_probs": log_probs,
        "old": near(),
        "sampler": near(),
        "ref": near(),
        "entropies": normal(ROWS, TOKENS).abs(),
        "advantages": torch.tensor([1.0, -0.5, 0.25, -1.5]),
    }


def loss_of(
    data,
    loss_type,
    level="token",
    epsilon_high=0.2,
    threshold=None,
    quantile=1.0,
    beta=0.0,
    corrects=False,
    corrected=False,
):
    log_probs = data["log_probs"].clone().requires_grad_()
    mask = data["mask"]
    args = SimpleNamespace(
        delta=None,
        steps_per_generation=1,
        use_bias_correction_kl=corrects,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    same = lambda x, **_: x
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            gather=same,
            reduce=same,
            num_processes=1,
            pad_across_processes=same,
            gather_for_metrics=same,
        ),
        model=SimpleNamespace(training=True),
        args=args,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        importance_sampling_level=level,
        top_entropy_quantile=quantile,
        off_policy_mask_threshold=threshold,
        max_completion_length=TOKENS,
        current_gradient_accumulation_steps=1,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *given: GRPOTrainer.get_high_entropy_mask(
        trainer, *given
    )
    known = (log_probs, data["entropies"], None)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: known
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1).long(),
        "prompt_mask": torch.ones(ROWS, 1),
        "completion_ids": torch.zeros(ROWS, TOKENS).long(),
        "completion_mask": mask,
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "sampling_per_token_logps": data["sampler"],
        "ref_per_token_logps": data["ref"],
        "num_items_in_batch": mask.sum(),
    }
    if corrected:
        ratio = torch.exp((data["old"] - data["sampler"]) * mask)
        inputs["importance_sampling_ratio"] = torch.clamp(ratio, max=1.2)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": log_probs.grad.tolist()}


if __name__ == "__main__":
    data = draw()
    found = {
        "trl": importlib.metadata.version("trl"),
        "inputs": {name: x.tolist() for name, x in data.items()},
        "cases": {name: loss_of(data, **case) for name, case in CASES.items()},
    }
    path = pathlib.Path(__file__).with_name("trl_policy.json")
    path.write_text(json.dumps(found) + "\n")
