"""Rewards of text answers about images: closed forms, worked numbers, brute force, and refusals."""

import itertools

import numpy as np
import pytest

from jaxft import rewards
from jaxft.data import DataError
from jaxft.rewards import boxes, visual

TWO = [(1, 2, 3, 4), (5, 6, 7, 8)]


def given(make, answer, *texts, **more):
    """The rewards of texts for one answer."""
    record = {"answer": answer}
    return make([record], **more)(list(texts), [record] * len(texts))


def random_boxes(rng, count, size=8):
    """Boxes with whole corners within a square."""
    corners = np.sort(rng.integers(0, size + 1, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4)


def test_iou_is_the_share_of_grid_cells():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 30), random_boxes(rng, 20)
    cells = np.arange(8) + 0.5

    def inside(box):
        x = (box[0] < cells) & (cells < box[2])
        y = (box[1] < cells) & (cells < box[3])
        return x[:, None] & y[None]

    expected = [
        [(inside(p) & inside(q)).sum() / max((inside(p) | inside(q)).sum(), 1) for q in b]
        for p in a
    ]
    np.testing.assert_allclose(boxes.ious(a, b), expected, atol=1e-12)
    assert rewards.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert rewards.iou((1, 2, 5, 7), (1, 2, 5, 7)) == 1
    assert rewards.iou((0, 0, 1, 1), (1, 0, 2, 1)) == rewards.iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0
    with pytest.raises(ValueError, match="x1 <= x2"):
        rewards.iou((2, 0, 0, 2), (0, 0, 1, 1))


def test_matching_is_the_best_of_all_permutations():
    rng = np.random.default_rng(1)
    for n, m in [(1, 1), (2, 3), (4, 3), (3, 3)] * 5:
        scores = rng.random((n, m)).round(1)
        wide = scores if n <= m else scores.T
        rows = range(len(wide))
        best = max(
            sum(wide[i, j] for i, j in zip(rows, chosen, strict=True))
            for chosen in itertools.permutations(range(wide.shape[1]), len(wide))
        )
        found = boxes.matched(scores)
        assert found.shape == (min(n, m),) and found.sum() == pytest.approx(best)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[1, 2, 3, 4]", [(1, 2, 3, 4)]),
        ("1 2 3 4", [(1, 2, 3, 4)]),
        ("The box is (1.5, 2, 3, 4).", [(1.5, 2, 3, 4)]),
        ("<box>(1,2),(3,4)</box>", [(1, 2, 3, 4)]),
        ("<|box_start|>(1,2),(3,4)<|box_end|> <|box_start|>(5,6),(7,8)<|box_end|>", TWO),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8]}]\n```', TWO),
        ('{"box": [[1, 2, 3, 4], [0, 0, 1, 1]]}', [(1, 2, 3, 4), (0, 0, 1, 1)]),
        ("<loc0256><loc0512><loc0768><loc1023> cat", [(0.5, 0.25, 1023 / 1024, 0.75)]),
        ("<think>[9, 9, 10, 10]</think> <answer>[1, 2, 3, 4]</answer>", [(1, 2, 3, 4)]),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("[3, 2, 1, 4]", []),
        ("[1, 2, 3]", []),
        ("no box", []),
        ('{"bbox_2d": [1, 2, NaN, 4]}', []),
    ],
)  # fmt: skip
def test_boxes_are_read_in_the_usual_forms(text, expected):
    assert rewards.read_boxes(text) == expected


def test_four_numbers_mean_what_their_form_says():
    assert rewards.read_boxes("[1, 2, 4, 6]", rewards.from_width) == [(1, 2, 5, 8)]
    assert rewards.read_boxes("[3, 5, 4, 6]", rewards.from_centre) == [(1, 2, 5, 8)]
    assert rewards.read_boxes("[2, 1, 8, 5]", rewards.from_rows) == [(1, 2, 5, 8)]
    assert rewards.read_boxes("(1,2),(5,8)", rewards.from_width) == [(1, 2, 5, 8)]
    assert given(rewards.iou_reward, [1, 2, 4, 6], "[1,2,4,6]", form=rewards.from_width) == [1]


def test_iou_reward_of_one_and_several_boxes():
    assert given(rewards.iou_reward, [0, 0, 2, 2], "[1,1,3,3]", "[0, 0, 2, 2]", "none") == [
        pytest.approx(1 / 7),
        1,
        0,
    ]
    two = [[0, 0, 2, 2], [4, 4, 6, 6]]
    swapped, one, extra = "[[4,4,6,6],[0,0,2,2]]", "[0,0,2,2]", "[[4,4,6,6],[0,0,2,2],[8,8,9,9]]"
    assert given(rewards.iou_reward, two, swapped, one, extra) == [1, 0.5, 1]
    assert given(rewards.iou_reward, two, extra, penalty=0.5) == [0.75]
    assert given(
        rewards.iou_reward, "[0,0,2,2]", "[[0,0,2,2]" + ",[8,8,9,9]" * 9 + "]", penalty=0.5
    ) == [0]
    # IoU 1/7 and 1/2, against a threshold of one half.
    assert given(rewards.iou_reward, [0, 0, 2, 2], "[1,1,3,3]", "[0,0,2,1]", threshold=0.5) == [
        0,
        1,
    ]


def test_points_hit_boxes_and_masks():
    record = [[0, 0, 2, 2], [4, 4, 6, 6]]
    texts = [
        "(1, 1)",
        "<answer>5 6</answer>",
        '{"point_2d": [2, 0]}',
        "(3, 3)",
        "click",
        "(7,7) then (5,5)",
    ]
    assert given(rewards.point_reward, record, *texts) == [1, 1, 1, 0, 0, 1]
    mask = np.zeros((2, 3), bool)
    mask[1, 2] = True
    hits = [rewards.in_mask(mask, (x, y)) for y in (-1, 0, 1.9, 2) for x in (-1, 2.5, 3)]
    assert hits == [False] * 7 + [True] + [False] * 4


def test_dice():
    a = np.array([1, 1, 0, 0], bool)
    assert (
        rewards.dice(a, a) == 1 and rewards.dice(a, ~a) == 0 and rewards.dice(a & ~a, a & ~a) == 1
    )
    assert rewards.dice(a, [1, 0, 0, 0]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="shapes"):
        rewards.dice(a, a[:3])


def test_counts():
    texts = [
        "3",
        "four",
        "There are 5 shapes.",
        "8",
        "9",
        "3 or 5",
        "many",
        "<answer>4</answer>",
        "-4",
    ]
    assert given(rewards.count_reward, 4, *texts) == [0.75, 1, 0.75, 0, 0, 0, 0, 1, 0]
    assert given(rewards.count_reward, "0", "0", "1", "none") == [1, 0, 0]


def recursive(a, b):
    """The edit distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    same = recursive(a[1:], b[1:]) + (a[0] != b[0])
    return min(same, recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1)


def test_edit_distance_is_the_recursive_definition():
    rng = np.random.default_rng(2)
    words = ["".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(40)]
    for a, b in itertools.pairwise(words):
        assert rewards.edit_distance(a, b) == recursive(a, b)
    assert rewards.edit_distance("kitten", "sitting") == 3


def test_text_that_was_read():
    reward = given(
        rewards.edit_distance_reward,
        "sitting",
        "kitten",
        "<answer>sitting</answer>",
        " sitting\n",
        "SITTING",
    )
    assert reward == [pytest.approx(1 - 3 / 7), 1, 1, 0]
    assert given(rewards.edit_distance_reward, "STOP", "stop", fold_case=True) == [1]
    assert given(rewards.edit_distance_reward, ["12", "twelve"], "twelve", "") == [1, 0]
    assert visual.similarity("", "") == 1


def test_choices():
    texts = ["B", "(b)", "The answer is B.", "A or B", "C", "<think>C</think> B, as it is red"]
    assert given(rewards.choice_reward, "B", *texts, options="ABC") == [1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    "text, accuracy, form",
    [
        ("<answer>dog</answer>", 1, 1),
        ("<answer> dog\n</answer>", 1, 1),
        ("dog", 1, 0),  # without tags the whole text is the answer
        ("<answer>Dog</answer>", 0, 1),
        ("<answer>a dog</answer>", 0, 1),
        ("<answer>dog</answer> It barks.", 1, 0),
        ("<think>cat</think><answer>dog</answer>", 1, 0),
        ("<think>dog</think><answer>cat</answer>", 0, 0),
    ],
)
def test_options_and_form_are_the_two_rewards_of_r1_aqa(text, accuracy, form):
    assert given(rewards.option_reward, "dog", text) == [accuracy]
    assert rewards.tag_format_reward(("answer",))([text], [{}]) == [form]


def test_options_are_compared_with_case_unless_it_is_folded():
    texts = ["<answer>DOG</answer>", "<answer>dog</answer>", "<answer>a dog</answer>"]
    assert given(rewards.option_reward, "Dog", *texts) == [0, 0, 0]
    assert given(rewards.option_reward, "Dog", *texts, fold_case=True) == [1, 1, 0]
    assert given(rewards.option_reward, ["cat", "dog"], *texts) == [0, 1, 0]


def test_each_record_has_the_reward_of_its_kind():
    records = [
        {"kind": "count", "answer": 4},
        {"kind": "read", "answer": "12"},
        {"kind": "count", "answer": 2},
    ]
    each = {
        "count": rewards.count_reward([records[0], records[2]]),
        "read": rewards.edit_distance_reward(records[1:2]),
    }
    assert rewards.by_kind(each)(["3", "13", "2"], records).tolist() == [0.75, 0.5, 1]
    with pytest.raises(DataError, match="there are rewards for"):
        rewards.by_kind(each)(["3"], [{"kind": "box"}])


@pytest.mark.parametrize(
    "make, answer, message",
    [
        (rewards.iou_reward, [3, 0, 1, 2], "record 1: a box .3, 0, 1, 2.: expected x1 <= x2"),
        (rewards.iou_reward, [1, 2, 3], "record 1: the answer .* holds no box"),
        (rewards.iou_reward, [[1, 2, 3, float("nan")]], "finite"),
        (rewards.iou_reward, "somewhere", "holds no box"),
        (rewards.iou_reward, None, "holds no box"),
        (rewards.point_reward, [], "holds no box"),
        (rewards.count_reward, -1, "not a whole number"),
        (rewards.count_reward, "several", "not a whole number"),
        (rewards.count_reward, None, "cannot be compared"),
        (rewards.edit_distance_reward, " ", "cannot be compared"),
        (rewards.choice_reward, "Paris", "is not one of the letters A"),
        (rewards.choice_reward, "E", "is not one of"),
        (rewards.option_reward, "", "cannot be compared"),
    ],
)
def test_malformed_references_are_refused_before_work(make, answer, message):
    fine = {"iou_reward": [0, 0, 1, 1], "point_reward": [0, 0, 1, 1], "count_reward": 1}
    more = {"options": "ABCD"} if make is rewards.choice_reward else {}
    with pytest.raises(DataError, match=message):
        make([{"answer": fine.get(make.__name__, "A")}, {"answer": answer}], **more)


def test_settings_are_refused():
    record = {"answer": [0, 0, 1, 1]}
    for wrong in (dict(threshold=0), dict(threshold=1.5), dict(penalty=-1)):
        with pytest.raises(ValueError, match="threshold"):
            rewards.iou_reward([record], **wrong)
    with pytest.raises(ValueError, match="begin A, B"):
        rewards.choice_reward([{"answer": "A"}], options="BC")
    with pytest.raises(DataError, match="no records"):
        rewards.iou_reward([])
