"""Vocabularies agree where both models use an id; padding belongs to neither."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.vocabulary import (
    first_difference,
    hash_with_padding,
    used_tokens,
    vocabulary_hash,
    vocabulary_size,
)


def names(size: int, **changes: str) -> dict[str, int]:
    """Tokens t0, t1, …, with some replaced, by ``t3="other"``."""
    return {changes.get(f"t{token_id}", f"t{token_id}"): token_id for token_id in range(size)}


def padded(size: int, padded_size: int) -> dict[str, int]:
    return names(size) | {f"[PAD{token_id}]": token_id for token_id in range(size, padded_size)}


def test_padding_leaves_size_and_hash() -> None:
    plain = names(165)
    for size in (165, 200, 436):
        assert vocabulary_size(padded(165, size)) == 165
        assert vocabulary_hash(padded(165, size)) == vocabulary_hash(plain)
        assert first_difference(padded(165, size), plain) is first_difference(plain, padded(165, size)) is None
    assert hash_with_padding(padded(165, 200)) != hash_with_padding(plain)


def test_only_the_name_of_its_own_id_is_padding() -> None:
    assert vocabulary_size({"a": 0, "[PAD7]": 1}) == 2
    assert vocabulary_size({"a": 0, "[PAD]": 1, "[PAD2]x": 2}) == 3
    assert vocabulary_size({}) == vocabulary_size({"[PAD0]": 0}) == 0


def test_the_first_token_that_differs_is_named() -> None:
    assert first_difference(names(9), names(12, t4="x", t7="y")) == (4, "t4", "x")
    assert first_difference(names(12, t10="x"), names(9)) is None
    without = names(9)
    del without["t3"]
    assert first_difference(without, names(9)) == (3, "", "t3")


def test_spaces_are_the_same_however_they_are_written() -> None:
    assert used_tokens({"  ": 0, "▁a": 1}) == used_tokens({"▁▁": 0, "▁a": 1})
    assert vocabulary_hash({"two words": 0}) == vocabulary_hash({"two▁words": 0})


@given(size=st.integers(1, 40), more=st.integers(0, 9), unused=st.integers(0, 9))
def test_the_hash_of_a_smaller_model_is_that_of_the_targets_first_tokens(size: int, more: int, unused: int) -> None:
    target = padded(size + more, size + more + unused)
    draft = padded(size, size + unused)
    assert vocabulary_hash(target, vocabulary_size(draft)) == vocabulary_hash(draft)
    assert vocabulary_hash(target, vocabulary_size(target)) == vocabulary_hash(target)


@given(size=st.integers(2, 40), data=st.data())
def test_a_token_that_differs_changes_the_hash(size: int, data: st.DataObject) -> None:
    changed = data.draw(st.integers(0, size - 1))
    other = names(size, **{f"t{changed}": "another"})
    assert vocabulary_hash(other) != vocabulary_hash(names(size))
    assert first_difference(other, names(size)) == (changed, "another", f"t{changed}")


@given(st.permutations(list(names(12).items())))
def test_the_order_of_the_vocabulary_does_not_count(items: list[tuple[str, int]]) -> None:
    assert vocabulary_hash(dict(items)) == vocabulary_hash(names(12))
    assert vocabulary_size(dict(items)) == 12
