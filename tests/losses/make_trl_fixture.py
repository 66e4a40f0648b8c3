"""Makes trl_losses.json: what TRL's own loss functions give on random log-probs, with their gradients.

    TRL_EXPERIMENTAL_SILENCE=1 python tests/losses/make_trl_fixture.py

Each trainer's loss function is called unbound, on a stand-in that has the attributes it reads: no model is
involved. "losses" are those of single pairs (batches of one), "mean" that of the whole batch, "gradient" of
the mean by the log-probs of the completions, chosen first. Made with trl 1.16 and torch 2.13.
"""

import json
import pathlib
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

PAIRS, TOKENS = 5, 9
DPO = {
    "dpo": dict(loss_types=["sigmoid"], beta=0.3),
    "hinge": dict(loss_types=["hinge"], beta=0.3),
    "ipo": dict(loss_types=["ipo"], beta=0.3),
    "exo": dict(loss_types=["exo_pair"], beta=0.3, label_smoothing=0.01),
    "nca": dict(loss_types=["nca_pair"], beta=0.3),
    "robust": dict(loss_types=["robust"], beta=0.3, label_smoothing=0.2),
    "bco_pair": dict(loss_types=["bco_pair"], beta=0.3),
    "sppo": dict(loss_types=["sppo_hard"], beta=0.3),
    "aot": dict(loss_types=["aot"], beta=0.3, label_smoothing=0.1),
    "aot_unpaired": dict(loss_types=["aot_unpaired"], beta=0.3, label_smoothing=0.1),
    "apo_zero": dict(loss_types=["apo_zero"], beta=0.3),
    "apo_down": dict(loss_types=["apo_down"], beta=0.3),
    "discopop": dict(loss_types=["discopop"], beta=0.3),
    "normalised": dict(loss_types=["sigmoid_norm"], beta=3.0),
    "forward_kl": dict(loss_types=["sigmoid"], beta=0.3, f_divergence_type="forward_kl"),
    "jensen_shannon": dict(loss_types=["sigmoid"], beta=0.3, f_divergence_type="js_divergence"),
    "alpha_divergence": dict(
        loss_types=["sigmoid"], beta=0.3, f_divergence_type="alpha_divergence"
    ),
    "wpo": dict(loss_types=["sigmoid"], beta=0.3, use_weighting=True),
}
TRLS = {"jensen_shannon": "js_divergence"}  # its name of a divergence, where it is another
DPO |= {
    f"{name}, {divergence}": DPO[name] | {"f_divergence_type": TRLS.get(divergence, divergence)}
    for name, divergence in {
        "hinge": "forward_kl",
        "ipo": "jensen_shannon",
        "exo": "jensen_shannon",
        "robust": "alpha_divergence",
        "discopop": "jensen_shannon",
        "normalised": "alpha_divergence",
    }.items()
}
CPO = {
    "cpo_ipo": dict(loss_type="ipo", beta=0.3),
    "cpo": dict(loss_type="sigmoid", beta=0.3, label_smoothing=0.1),
    "slic": dict(loss_type="hinge", beta=0.3),
    "simpo": dict(loss_type="simpo", beta=2.5, simpo_gamma=0.7, label_smoothing=0.1),
    "alpha_po": dict(loss_type="simpo", beta=2.5, simpo_gamma=0.7, alpha=0.25),
}


def accelerator():
    same = lambda x: x
    return SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)


def draw():
    """Random log-probs of completions of 1 to TOKENS tokens after a prompt of one."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 4, 1, 6, 3, 2, 7, 5, 9, 8])  # chosen first
    mask = (torch.arange(TOKENS)[None] < lengths[:, None]).float()
    uniform = lambda *shape: torch.rand(*shape, generator=generator)
    log_probs = -2 * uniform(2 * PAIRS, TOKENS) * mask
    return SimpleNamespace(
        mask=mask,
        log_probs=log_probs,
        ref=log_probs.sum(1) + 4 * (uniform(2 * PAIRS) - 0.5),
        collision=-uniform(2 * PAIRS, TOKENS),
        kl=uniform(2 * PAIRS) + log_probs.sum(1),
    )


def dpo(data, rows, options):
    """(loss, gradient by the sums) of DPOTrainer on some pairs."""
    rows = torch.tensor([*rows, *[r + PAIRS for r in rows]])
    log_probs = data.log_probs[rows].clone().requires_grad_()
    mask = data.mask[rows]
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(
        log_probs=log_probs,
        log_sum_sq_probs=data.collision[rows],
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        label_smoothing=0.0,
        loss_weights=[1.0],
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    trainer.__dict__.update(options)
    first = torch.zeros(len(rows), 1)
    half = len(rows) // 2
    inputs = {
        "input_ids": torch.zeros(len(rows), TOKENS + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(rows), TOKENS + 1),
        "completion_mask": torch.cat([first, mask], 1).long(),
        "ref_chosen_logps": data.ref[rows[:half]],
        "ref_rejected_logps": data.ref[rows[half:]],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), log_probs.grad[:, 0].tolist()  # every row has a first token


def kto(data, rows, options):
    log_probs = data.log_probs[rows].clone().requires_grad_()
    kl_ref = data.log_probs.sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: data.kl[rows],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        loss_type="kto",
    )
    trainer.__dict__.update(options)
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    first = torch.zeros(len(rows), 1)
    inputs = {
        "input_ids": torch.zeros(len(rows), TOKENS + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(rows), TOKENS + 1),
        "completion_mask": torch.cat([first, data.mask[rows]], 1).long(),
        "label": torch.tensor([r < PAIRS for r in rows]),
        "ref_logps": data.ref[rows],
        "ref_KL_logps": kl_ref[rows],
    }
    loss = KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), log_probs.grad[:, 0].tolist()


def cpo(data, options):
    trainer = SimpleNamespace(accelerator=accelerator(), label_smoothing=0.0, alpha=0.0)
    trainer.__dict__.update(options)
    sums = data.log_probs.sum(1)
    means = options["loss_type"] in ("simpo", "ipo")
    scores = (sums / data.mask.sum(1) if means else sums).requires_grad_()
    losses = CPOTrainer.cpo_loss(trainer, *scores.chunk(2))[0]
    losses.mean().backward()
    scale = 1 / data.mask.sum(1) if means else torch.ones(2 * PAIRS)
    return losses.tolist(), losses.mean().item(), (scores.grad * scale).tolist()


def orpo(data, beta):
    scores = (data.log_probs.sum(1) / data.mask.sum(1)).requires_grad_()
    trainer = SimpleNamespace(beta=beta, accelerator=accelerator())
    losses = -ORPOTrainer.odds_ratio_loss(trainer, *scores.chunk(2))[0]
    losses.mean().backward()
    return losses.tolist(), losses.mean().item(), (scores.grad / data.mask.sum(1)).tolist()


def reward(data, coefficient):
    scores = data.ref.clone().requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, 2, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, 2),
        "margin": 0.1 * torch.arange(PAIRS).float(),
    }
    model = lambda **_: SimpleNamespace(logits=scores[:, None])
    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    return loss.item(), scores.grad.tolist()


def main():
    data, expected = draw(), {}
    everything = range(PAIRS)
    for name, options in DPO.items():
        losses = [dpo(data, [row], options)[0] for row in everything]
        mean, gradient = dpo(data, list(everything), options)
        expected[name] = dict(options, losses=losses, mean=mean, gradient=gradient)
    for name, options in CPO.items():
        losses, mean, gradient = cpo(data, options)
        expected[name] = dict(options, losses=losses, mean=mean, gradient=gradient)
    losses, mean, gradient = orpo(data, 0.3)
    expected["orpo"] = dict(beta=0.3, losses=losses, mean=mean, gradient=gradient)
    options = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    for name, rows in (("kto", list(range(2 * PAIRS))), ("kto_good", list(everything))):
        mean, gradient = kto(data, rows, options)
        expected[name] = dict(options, mean=mean, gradient=gradient)
    mean, gradient = reward(data, 0.02)
    expected["reward"] = dict(mean=mean, gradient=gradient, coefficient=0.02)
    inputs = {name: value.tolist() for name, value in vars(data).items()}
    path = pathlib.Path(__file__).with_name("trl_losses.json")
    path.write_text(json.dumps({"inputs": inputs, "expected": expected}, indent=1) + "\n")


if __name__ == "__main__":
    main()
