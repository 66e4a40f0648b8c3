"""The tables of the scripts' choices: what an entry reads it says, and what it does not read is refused."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest

from experiments import preference, reinforce, sample_pairs, sft
from experiments.cli import choices, flags
from experiments.cli.algorithms import ALGORITHMS
from experiments.cli.optimizers import SHARPNESS
from experiments.cli.preference_losses import DIVERGENCES, LOSSES
from jaxft import losses, objectives

# Read around what an entry makes: by the data, the samples, or what adapts the weight of a KL.
AROUND = {"kl_target", "kl_horizon", "too_long", "ref_model_sync_steps", "ref_model_mixup_alpha"}
AROUND |= {"prompt_embedder", "min_density_ratio", "max_density_ratio", "max_new_tokens"}
AROUND |= {"online_samples", "f_alpha"}
AROUND |= {"off_policy_mask_threshold", "top_entropy_quantile"}
COMMON = {
    "group_size",
    "turns",
    "correction",
    "correction_min",
    "correction_max",
}  # read by all of --algorithm
TABLES = {
    "algorithm": (reinforce.Config, ALGORITHMS),
    "loss": (preference.Config, LOSSES),
    "f_divergence": (preference.Config, DIVERGENCES),
    "sharpness": (sft.Config, SHARPNESS),
}
ENTRIES = [(choice, name) for choice, (_, table) in TABLES.items() for name in table]


class Recorder:
    """A config that keeps the names of the flags that are read from it."""

    def __init__(self, config):
        self.config, self.read = config, set()

    def __getattr__(self, name):
        value = getattr(self.config, name)
        if dataclasses.is_dataclass(value):  # a group of flags
            group = Recorder(value)
            group.read = self.read
            return group
        self.read.add(name)
        return value

    def clips(self, *names):
        self.read.update(names or ("clip_low", "clip_high"))
        return self.config.clips(*names)


def of_table(table):
    """The flags that some entries of a table read."""
    return {flag for entry in table.values() for flag in entry.reads}


def another(config, flag):
    """A value of the flag that is not the default."""
    value = flags.flat(config)[flag]
    if isinstance(value, str) or value is None:
        return "another"
    return not value if isinstance(value, bool) else value + 1


@pytest.mark.parametrize("choice, name", [e for e in ENTRIES if e[0] != "sharpness"])
def test_an_entry_names_the_flags_that_it_reads(choice, name):
    script, table = TABLES[choice]
    config, entry = Recorder(script(**{choice: name})), table[name]
    if choice == "algorithm":
        entry.make(lambda *args, **kwargs: None, config)
    elif choice == "loss":
        entry.make(config)(None)  # of a forward, which no objective asks before it is called
    else:
        entry.make(config)
    assert config.read - AROUND - COMMON == {*entry.reads} - AROUND


@pytest.mark.parametrize("choice, name", ENTRIES)
def test_a_flag_that_an_entry_does_not_read_or_refuses_is_an_error(choice, name):
    script, table = TABLES[choice]
    config, entry = flags.replace(script(), **{choice: name}), table[name]
    check = functools.partial(choices.check, choice=choice, table=table)
    chosen = f"{choices.option(choice)} {name}"
    check(config)
    for flag in of_table(table):
        given = flags.replace(config, **{flag: another(config, flag)})
        if flag in entry.reads:
            check(given)
            continue
        with pytest.raises(ValueError, match=f"has no effect with {chosen}; use ") as error:
            check(given)
        assert str(error.value).startswith(choices.option(flag))
    for flag in entry.refuses:
        given = flags.replace(config, **{flag: another(config, flag)})
        with pytest.raises(ValueError, match=f"is refused by {chosen}, which .*; use "):
            check(given)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_reads_a_reference_can_have_one_that_moves(name, monkeypatch):
    entry, config = LOSSES[name], preference.Config(loss=name)
    monkeypatch.setattr(objectives, "preference", lambda forward, loss, **settings: loss)
    loss = entry.make(config)(None)
    moves = entry.trains == "policy" and entry.reference and not entry.online
    assert ("ref_model_sync_steps" in entry.reads) == moves
    if "ld_alpha" not in entry.reads:
        return
    one = jnp.ones(1)  # A loss of pairs, whose log-probs of the reference are left out.
    pairs = losses.Pairs(-one, -2 * one, None, None, one, one, -one, one)
    if entry.reference:
        with pytest.raises(ValueError, match="compares with a reference model"):
            loss(pairs)
    else:
        assert jnp.isfinite(loss(pairs)).all()


def test_a_flag_without_its_companion_is_an_error():
    with pytest.raises(ValueError, match="--feedback no has no effect without --turns; "):
        choices.check_companions(
            flags.replace(reinforce.Config(), feedback="no"), {"feedback": "turns"}
        )
    choices.check_companions(
        flags.replace(reinforce.Config(), feedback="no", turns=2), {"feedback": "turns"}
    )


def test_names_are_shown_as_they_are_typed():
    assert choices.shown("push_every", 2) == "--push-every 2"
    assert choices.shown("stop", ("a", "b")) == "--stop a b"
    assert choices.shown("use_weighting", True) == "--use-weighting"
    assert choices.one_of(["a"]) == "a" and choices.one_of(["a", "b", "c"]) == "a, b or c"


def test_a_flag_is_found_in_whichever_group_it_lies():
    config = flags.replace(reinforce.Config(), fsdp=2, rank=3, judge="a:b", algorithm="rloo")
    assert (config.mesh.fsdp, config.kernels.rank) == (2, 3)
    assert config.rewards.numbers and config.optimisation == reinforce.Config().optimisation
    assert choices.given(config) == {"fsdp": 2, "rank": 3, "judge": "a:b", "algorithm": "rloo"}
    small = flags.with_small(config, {"rank": 1, "max_steps": 2})
    assert (small.kernels.rank, small.optimisation.max_steps) == (3, 2)
    with pytest.raises(TypeError, match="rnk"):
        flags.replace(config, rnk=1)


@pytest.mark.parametrize("script", [preference, reinforce, sample_pairs, sft])
def test_no_flag_lies_in_two_groups(script):
    config = script.Config()
    groups = [getattr(config, field.name) for field in dataclasses.fields(config)]
    count = sum(len(dataclasses.fields(g)) if dataclasses.is_dataclass(g) else 1 for g in groups)
    assert count == len(flags.flat(config))
