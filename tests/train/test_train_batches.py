"""The order of batches: every chunk once in each epoch, and the same from any state on."""

from itertools import islice

import numpy as np
import pytest

from equigemma import train


def examples(*sizes: int) -> list[train.Example]:
    """Texts whose tokens tell which text they are of, and where they stand in it."""
    return [
        train.Example([1000 * index + at for at in range(size)], [1.0] * size)
        for index, size in enumerate(sizes)
    ]


TEXTS = examples(5, 4, 11, 2, 7, 3, 1, 6)


def learned(batch: train.Batch) -> list[int]:
    """Every target that counts."""
    return np.asarray(batch.targets)[np.asarray(batch.weights) > 0].tolist()


def batches_of(**options):
    return train.batches(TEXTS, length=6, rows=2, **options)


def test_each_token_that_has_a_predecessor_is_learned_once_in_each_epoch():
    expected = sorted(token for text in TEXTS for token in text.tokens[1:])
    for epoch in range(3):
        start = train.DataState(epoch)
        batches = batches_of(seed=3, start=start, epochs=epoch + 1)
        assert sorted(token for batch, _ in batches for token in learned(batch)) == expected


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        start = train.DataState(epoch)
        batches = batches_of(seed=seed, start=start, epochs=epoch + 1)
        return [token for batch, _ in batches for token in learned(batch)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_feed_goes_on_from_every_place():
    whole = list(islice(batches_of(seed=1), 17))
    assert {data_state.epoch for _, data_state in whole} >= {0, 1, 2}
    for index, (_, data_state) in enumerate(whole[:-1]):
        # What a checkpoint keeps of a data state is JSON.
        start = train.DataState(**{key: int(value) for key, value in data_state._asdict().items()})
        rest = islice(batches_of(seed=1, start=start), len(whole) - index - 1)
        for (batch, after), (expected, expected_after) in zip(
            rest, whole[index + 1 :], strict=True
        ):
            assert after == expected_after
            for name in vars(batch):
                np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name))


def test_batches_are_counted_without_being_made():
    for epochs in (1, 3):
        count = train.count_batches(TEXTS, length=6, rows=2, seed=4, epochs=epochs)
        assert count == sum(1 for _ in batches_of(seed=4, epochs=epochs))


def test_padding_is_what_no_token_is_in():
    for epochs in (1, 3):
        options = {"length": 6, "rows": 2, "seed": 4, "epochs": epochs}
        shares = [(batch.positions < 0).mean() for batch, _ in train.batches(TEXTS, **options)]
        assert 0 < np.mean(shares) < 0.5
        np.testing.assert_allclose(
            train.padding_fraction(TEXTS, **options), np.mean(shares), rtol=1e-6
        )


def test_prompts_without_an_answer_in_the_same_piece_are_left_out():
    prompt = train.Example(range(13), [0.0] * 9 + [1.0] * 4)
    (batch,) = (batch for batch, _ in train.batches([prompt], length=5, rows=3, epochs=1))
    assert learned(batch) == [9, 10, 11, 12]
    assert int((batch.segments >= 0).sum()) == 5


def test_a_split_holds_out_a_share_of_all_chunks():
    (text,) = examples(101)
    train_chunks, validation = train.split([text], 0.2, length=6, seed=5)
    starts = [int(chunk.tokens[0]) for chunk in train_chunks + validation]
    assert sorted(starts) == list(range(0, 100, 5))
    assert len(validation) == 4
    again = train.split([text], 0.2, length=6, seed=5)[1]
    assert [list(chunk.tokens) for chunk in again] == [list(chunk.tokens) for chunk in validation]
    other = train.split([text], 0.2, length=6, seed=6)[1]
    assert [list(chunk.tokens) for chunk in other] != [list(chunk.tokens) for chunk in validation]
    assert train.split([text], 0.0, length=6)[1] == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: next(train.batches([], length=6, rows=2)), "nothing to train on"),
        (lambda: next(train.batches(examples(1), length=6, rows=2)), "nothing to train on"),
        (
            lambda: next(train.batches(TEXTS, length=6, rows=2, vocab=7005)),
            "Example 7 has the token id 7005, and the model.s vocabulary ends at 7004",
        ),
        (lambda: next(train.batches(TEXTS, length=1, rows=2)), "at least 2 tokens, got length=1"),
        (lambda: next(train.batches(TEXTS, length=6, rows=0)), "at least 1 row, got rows=0"),
        (lambda: train.split(TEXTS, 1.0, length=6), r"in \[0, 1\), got 1.0"),
        (lambda: train.split(examples(5), 0.1, length=6), "1 chunks of text, too few"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
