"""Makes trl_pairs.json: what TRL's own functions make of preference records.

    TRL_EXPERIMENTAL_SILENCE=1 python tests/data/make_trl_fixture.py

Made with trl 1.16 (extra `bench`); tests read the file.
"""

import json
import pathlib

import datasets
from trl import extract_prompt, unpair_preference_dataset

IMPLICIT = (
    ("The sky is blue.", "The sky is green."),  # the blank goes to the completions
    ("The sky is blue.", "The skin is soft."),
    ("\n\nHuman: hi\n\nAssistant: hello", "\n\nHuman: hi\n\nAssistant: go away"),
)
PAIRS = [
    {"prompt": "q", "chosen": " right", "rejected": " wrong", "note": 1},
    {"prompt": "a", "chosen": " right", "rejected": " wrong", "note": 2},
]


def main():
    """Writes the file."""
    implicit = [
        {
            "given": {"chosen": c, "rejected": r},
            "expected": extract_prompt({"chosen": c, "rejected": r}),
        }
        for c, r in IMPLICIT
    ]
    unpaired = unpair_preference_dataset(datasets.Dataset.from_list(PAIRS)).to_list()
    made = {"implicit": implicit, "pairs": PAIRS, "unpaired": unpaired}
    path = pathlib.Path(__file__).with_name("trl_pairs.json")
    path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
