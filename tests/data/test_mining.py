"""Alignment against brute force and worked examples; filters, files and lexicons."""

import itertools

import numpy as np
import pytest

from jaxft.data import DataError, mining, temperature_weights

HOT = np.eye(6)
A = [[0], [1, 2], [3]]
B = [[0], [1], [2], [5], [3]]


def sums(sentences):
    words = dict(enumerate(HOT))
    return mining.sum_vectors(sentences, words, 6)


def aligned(a, b, **more):
    """The alignment under an error-free translation."""
    a, b = sums(a), sums(b)
    return mining.align(a, b, b, a, **more)


@pytest.mark.parametrize(
    "a, b, pairs, score",
    [
        (A, B, [((0,), (0,)), ((1,), (1, 2)), ((2,), (4,))], 3.0),
        (B, A, [((0,), (0,)), ((1, 2), (1,)), ((4,), (2,))], 3.0),
        (A, A, [((i,), (i,)) for i in range(3)], 3.0),
        (A, [], [], 0.0),
        ([], [], [], 0.0),
        ([[0], [1]], [[2], [3], [4]], [], 0.0),  # unrelated
        ([[9], []], [[0], [7, 8]], [], 0.0),  # unknown words and no words: zero vectors
        # Word 0 twice, as one sentence of A and as two of B: 1-2 and 1-1 have the same score.
        ([[0]], [[0], [0]], [((0,), (0, 1))], 1.0),
        ([[0], [0]], [[0]], [((0, 1), (0,))], 1.0),
    ],
)
def test_worked_examples(a, b, pairs, score):
    found = aligned(a, b)
    assert found.pairs == pairs and found.score == pytest.approx(score)


def brute(tables, n, m, i=0, j=0):
    """(score, pairs) of the first best sequence of moves in the order of preference."""
    if i == n or j == m:
        return 0.0, []
    options = []
    for (p, q), table in tables.items():
        if i + p <= n and j + q <= m and table[i, j] > 0:
            score, pairs = brute(tables, n, m, i + p, j + q)
            block = tuple(range(i, i + p)), tuple(range(j, j + q))
            options.append((score + table[i, j], [block, *pairs]))
    options += [brute(tables, n, m, i, j + 1), brute(tables, n, m, i + 1, j)]
    return max(options, key=lambda option: option[0])  # the first of equal ones


@pytest.mark.parametrize("whole", [False, True])
def test_the_best_path_is_that_of_all_monotone_sequences(whole):
    # Whole numbers make ties.
    for seed, (n, m) in enumerate(itertools.product(range(5), repeat=2)):
        rng = np.random.default_rng(seed)
        draw = lambda *shape, r=rng: r.integers(-1, 3, shape) / 1 if whole else r.normal(size=shape)
        tables = {(p, q): draw(max(n - p + 1, 0), max(m - q + 1, 0)) for p, q in mining.MOVES}
        score, pairs = brute(tables, n, m)
        found = mining.best_path(tables, n, m)
        assert found.score == pytest.approx(score) and found.pairs == pairs


def test_similarities_are_cosines_of_means_over_all_words_of_both_directions():
    rng = np.random.default_rng(0)
    words = {name: rng.normal(size=(50, 4)) for name in "ab"}
    draw = lambda count: [rng.integers(0, 50, rng.integers(1, 5)) for _ in range(count)]
    texts = {"a": draw(3), "b": draw(4), "a_from_b": draw(4), "b_from_a": draw(3)}
    mean = lambda name, *places: words[name[0]][
        np.concatenate([texts[name][i] for i in places])
    ].mean(axis=0)
    cos = lambda x, y: x @ y / np.sqrt((x @ x) * (y @ y))
    arrays = [np.array([words[name[0]][s].sum(0) for s in texts[name]]) for name in texts]
    tables = mining.block_similarities(*arrays)
    assert {move: table.shape for move, table in tables.items()} == {
        (1, 2): (3, 3), (2, 1): (2, 4), (1, 1): (3, 4)
    }  # fmt: skip
    for (i, j), move in [((1, 2), (1, 2)), ((0, 3), (2, 1)), ((2, 1), (1, 1))]:
        left, right = range(i, i + move[0]), range(j, j + move[1])
        there = cos(mean("a", *left), mean("a_from_b", *right))
        back = cos(mean("b", *right), mean("b_from_a", *left))
        np.testing.assert_allclose(tables[move][i, j], (there + back) / 2)
    # Swapping the languages swaps the pairs.
    found = mining.align(*arrays)
    swapped = mining.align(arrays[1], arrays[0], arrays[3], arrays[2])
    assert [pair[::-1] for pair in swapped.pairs] == found.pairs
    assert swapped.score == pytest.approx(found.score)


def test_long_documents_and_larger_blocks():
    vectors = np.random.default_rng(0).normal(size=(1000, 8))
    long = mining.align(*[vectors] * 4)  # no recursion
    assert long.pairs == [((i,), (i,)) for i in range(1000)] and long.score == pytest.approx(1000)
    found = aligned([[0], [1], [2], [3]], [[0, 1, 2], [3]], moves=((3, 1), (1, 1)))
    assert found.pairs == [((0, 1, 2), (0,)), ((3,), (1,))]
    with pytest.raises(ValueError, match=r"moves must be at least \(1, 1\), got \[\(0, 1\)\]"):
        mining.best_path({(0, 1): np.zeros((1, 1))}, 1, 1)


def test_the_greedy_baseline_uses_each_sentence_once():
    table = np.array([[0.9, 0.8, 0.1], [0.7, 0.2, -0.3]])
    assert mining.greedy_pairs(table) == [((0,), (0,)), ((1,), (1,))]
    assert mining.greedy_pairs(table, least=0.5) == [((0,), (0,))]


@pytest.mark.parametrize(
    "change, message",
    [
        ({2: np.ones((4, 6))}, "lecture 7: B has 5 sentences but 4 translations"),
        ({3: np.ones((2, 6))}, "lecture 7: A has 3 sentences but 2 translations"),
        ({3: np.ones((3, 2))}, "lecture 7: B and its translations have vectors of sizes 6 and 2"),
        ({0: np.full((3, 6), np.nan)}, "lecture 7: the vectors of A must be finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_the_documents_name(change, message):
    arrays = [sums(A), sums(B), sums(B), sums(A)]
    for place, value in change.items():
        arrays[place] = value
    with pytest.raises(DataError, match=message):
        mining.align(*arrays, name="lecture 7")


def test_pairs_of_the_gold_file_and_their_texts():
    pairs = mining.parse_pairs("1 1\n5,6 5\n\n17,18,19 16\n")
    assert pairs == [((0,), (0,)), ((4, 5), (4,)), ((16, 17, 18), (15,))]
    joined = mining.join_pairs([((0, 1), (0,)), ((2,), (1, 2))], ["a ", "b", "c"], ["x", "y", "z"])
    assert joined == [("a b", "x"), ("c", "y z")]


@pytest.mark.parametrize("line", ["1", "1 2 3", "0 1", "1,x 2", "1, 2", "-1 2"])
def test_bad_lines_of_a_gold_file(line):
    with pytest.raises(DataError, match="gold alignment, line 2: .* is not two lists"):
        mining.parse_pairs(f"1 1\n{line}\n")


def test_filters_and_their_counts():
    pairs = [("a b", "x y"), ("A, b!", "X Y"), ("a", "x y z"), ("cp(1)", "CP (1)"), ("", "x")]
    filters = {"ratio": mining.length_ratio(2.0), "same": mining.translated}
    assert mining.clean(pairs, filters) == (pairs[:2], {"ratio": 2, "same": 1})
    assert mining.without_duplicates(pairs[:3]) == [pairs[0], pairs[2]]
    assert mining.length_ratio(4.0, len)("cats", "猫") and not mining.length_ratio(3.9, len)(
        "cats", "猫"
    )
    assert not mining.translated("---", "---") and mining.translated("---", "!!!")
    with pytest.raises(ValueError, match="most must be at least 1, got 0.5"):
        mining.length_ratio(0.5)


def test_a_document_is_in_one_split():
    mining.check_disjoint({"train": ["a", "b"], "dev": ["c"], "test": ["d"]})
    with pytest.raises(DataError, match=r"1 documents are in both train and test \(b\)"):
        mining.check_disjoint({"train": ["a", "b"], "dev": [], "test": ["b"]})


def test_files_are_utf_8_with_a_sentence_a_line(tmp_path):
    path = tmp_path / "doc.ja"
    path.write_bytes("\ufeffＡＢＣ １\r\n\n猫。\n".encode())
    assert mining.read_sentences(path) == ["ABC 1", "", "猫。"]
    path.write_bytes("猫".encode("shift_jis"))
    with pytest.raises(DataError, match=r"doc.ja: not UTF-8 \(byte 0\)"):
        mining.read_sentences(path)
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        mining.read_sentences(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One two.  Three?\nFour", ["One two.", "Three?", "Four"]),
        (
            "Words, e.g. this, stay. Version 1.2 too.",
            ["Words, e.g. this, stay.", "Version 1.2 too."],
        ),
        ("猫。犬！「鳥。」魚", ["猫。", "犬!", "「鳥。」", "魚"]),
        ("  ", []),
    ],
)
def test_sentences_of_running_text(text, sentences):
    assert mining.split_sentences(text) == sentences


def test_model_1_finds_the_dictionary_and_its_first_step_is_by_hand():
    # Pairs "a b : x y" and "a : x". One round from uniform t: each word of a pair gets half, or all.
    source, target = np.array([[1, 1], [1, 0]]), np.array([[1, 1], [1, 0]])
    np.testing.assert_allclose(
        mining.fit_lexicon(source, target, iterations=1), [[0.75, 0.25], [0.5, 0.5]]
    )
    rng = np.random.default_rng(0)
    bags = (rng.random((60, 8)) < 0.3).astype(float)
    found = mining.fit_lexicon(bags, bags[:, ::-1], iterations=20)
    assert (found.argmax(axis=1) == np.arange(8)[::-1]).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    with pytest.raises(ValueError, match="one row of counts of either side per pair"):
        mining.fit_lexicon(source, target[:1])


def test_weights_of_a_mixture_by_temperature():
    sizes = [20_000, 600]
    out, inside = temperature_weights(sizes, np.inf)
    assert (out, inside) == (0.5, 0.5)
    # A record of the small source is seen 33.33 times as often as one of the large source.
    assert (inside / sizes[1]) / (out / sizes[0]) == pytest.approx(100 / 3)
    assert temperature_weights(sizes, 1) == pytest.approx([20_000 / 20_600, 600 / 20_600])
    small, large = temperature_weights([100, 10_000], 2)
    assert large / small == pytest.approx(10)
    for bad in ([0.5, sizes], [2, []], [2, [3, 0]], [float("nan"), sizes]):
        with pytest.raises(
            DataError, match="temperature_weights: expected a temperature of at least"
        ):
            temperature_weights(bad[1], bad[0])
