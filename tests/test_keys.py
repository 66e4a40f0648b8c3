import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.keys import stream

ROOT = pathlib.Path(__file__).parents[1]
# Where numbers are folded into a key, or it is split: that key is a stream's, of a single use.
FOLDS = {
    "jaxft/adapters/intrinsic_dimension.py": "(None, 0))(key, seeds)",  # saved adapters have this key
    "jaxft/adapters/rewrite.py": "keys = jax.random.split(key, stack)",
    "jaxft/adapters/soft.py": "build(jax.random.split(key, stack)",
    "jaxft/analysis/sharpness.py": "jax.random.split(key, len(leaves))",
    "jaxft/generation/requests.py": "(jnp.asarray(ids))|(jnp.arange(samples))",
    "jaxft/generation/sampler.py": "(state.keys, state.step)",
    "jaxft/generation/server.py": "jax.random.fold_in(key, i)",
    "jaxft/keys.py": "jax.random.fold_in(key, number)|no key of jax.random.split(key)|name), n)[i]",
    "jaxft/optim/zeroth_order.py": "jax.random.split(direction_key(args), samples)",
    "jaxft/rl/on_device.py": "(jnp.arange(len(chosen)))",
    "jaxft/weights/random_maps.py": "jax.random.split(key, 3)",
    "jaxft/weights/hadamard.py": "jax.random.split(key",
    "jaxft/weights/monarch.py": "jax.random.split(key)",
    "jaxft/weights/prefix.py": "jax.random.split(key, 3)",
}


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def names():
    """The names of all streams in jaxft and experiments; of an f-string, what is constant."""
    text = "".join(path.read_text() for path in sources("jaxft", "experiments"))
    return sorted(set(re.findall(r'\bstream[(,][^"\n]*?"([^"{]+)', text)))


def test_all_streams_of_a_run_are_distinct_at_every_step():
    key, steps = jax.random.key(0), jnp.arange(1001)
    at = lambda name: [
        stream(key, name)[None],
        jax.vmap(lambda i: stream(key, name, i))(steps),
    ]
    assert {"objective", "collect", "try", "transform", "evaluation", "microbatch", "noise"} <= set(
        names()
    )
    keys = [part for name in names() for part in at(name)]
    # What a user may derive from the run's key besides.
    keys += [key[None], jax.vmap(lambda i: jax.random.fold_in(key, i))(steps)]
    data = np.concatenate([jax.random.key_data(part) for part in keys])
    assert len(np.unique(data, axis=0)) == len(data)


def test_a_stream_of_a_stream_and_of_several_steps_is_folds_in_order():
    key = stream(jax.random.key(1), "rollout", 3, 4)
    by_hand = jax.random.fold_in(stream(jax.random.key(1), "rollout", 3), 4)
    assert key == by_hand
    assert key == jax.jit(lambda i: stream(jax.random.key(1), "rollout", i, 4))(3)
    assert stream(key, "rollout", 3, 4) != key


def test_keys_are_folded_and_split_only_where_they_are_streams():
    for path in sources("jaxft"):
        allowed = FOLDS.get(str(path.relative_to(ROOT)), "").split("|")
        for line in path.read_text().splitlines():
            if re.search(r"jax\.random\.(fold_in|split)\b", line):
                assert any(a and a in line for a in allowed), f"{path}: {line.strip()}; use stream"


def test_nothing_but_a_stream_draws_from_the_key_of_the_state():
    passed_on = (
        "key=state.key|key_data(state.key)|key_impl(state.key)|state.key.sharding|place(state.key"
    )
    for path in sources("jaxft"):
        for line in path.read_text().splitlines():
            if re.search(r"\bstate\.key\b", line):
                known = ["stream(state.key, ", *passed_on.split("|")]
                assert any(k in line for k in known), f"{path}: {line.strip()}; use stream"
