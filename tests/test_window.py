"""The window: what is longer is counted and told, and where nothing is left it is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from harness import UsageError, chat, window
from harness.window import Window


@pytest.fixture(scope="module")
def own():
    return chat.tokenizer()


@pytest.fixture(scope="module")
def data():
    return chat.dataset("shipped", "eval")


def test_all_of_them_longer_than_the_window_are_refused(own, data):
    """Some too long are let through; all too long cannot be trained on."""
    found = window.lengths(data, own)

    window.check(found, max(found))
    window.check(found, min(found))
    with pytest.raises(UsageError, match=r"every example is longer than the window of 8 tokens"):
        window.check(found, 8)


def test_lengths_are_counted_a_batch_at_a_time(own, data, monkeypatch):
    """No more tokens are held at once than a batch's, and none of the conversations is left out."""
    real, asked = own.apply_chat_template, []

    def counted(messages, **given):
        asked.append(len(messages))
        return real(messages, **given)

    monkeypatch.setattr(own, "apply_chat_template", counted)
    monkeypatch.setattr(window, "BATCH", 10)

    found = window.lengths(data.select(range(25)), own)

    assert asked == [10, 10, 5]
    assert len(found) == 25


@pytest.mark.parametrize(
    ("lengths", "left", "said"),
    [
        ([9, 10], 2, []),
        (
            [9, 10, 11],
            3,
            [
                (
                    "data: 1 of 3 conversations to train on is longer than the window of 10 tokens "
                    "(training_config.max_length) and is cut there"
                )
            ],
        ),
        (
            [9, 11, 12, 13],
            3,
            [
                (
                    "data: 3 of 4 conversations to train on are longer than the window of 10 tokens "
                    "(training_config.max_length) and are cut there; 1 has no word of the assistant's "
                    "left and is left out"
                )
            ],
        ),
        (
            [*[9] * 2000, 11, 12],
            2000,
            [
                (
                    "data: 2 of 2,002 conversations to train on are longer than the window of 10 tokens "
                    "(training_config.max_length) and are cut there; 2 have no word of the assistant's "
                    "left and are left out"
                )
            ],
        ),
    ],
)
def test_what_is_cut_is_told(lengths, left, said):
    """How many are cut, and how many have nothing to learn from after it; nothing where none is."""
    assert window.told(lengths, left, Window(10, packs=False), "train") == said


def test_rows_of_several_conversations_are_not_taken_for_what_is_left():
    """Packed, two rows of twenty conversations have lost none."""
    (said,) = window.told([9] * 19 + [11], 2, Window(10, packs=True), "train")

    assert said.endswith("and is cut there")


def test_nothing_left_is_refused():
    """The trainer would divide by no batches."""
    with pytest.raises(UsageError, match=r"no conversation to evaluate on has a word of the"):
        window.told([11, 12], 0, Window(10, packs=False), "evaluate")


@pytest.mark.parametrize(
    ("config", "evaluating", "size"),
    [
        ({"max_length": 10, "packing": False}, False, 10),
        ({"max_length": None, "packing": False}, False, None),
        ({"max_seq_length": 10, "packing": False}, False, 10),
        ({"max_length": 10, "packing": True, "packing_strategy": "bfd"}, False, 10),
        ({"max_length": 10, "packing": True, "packing_strategy": "wrapped"}, False, None),
        ({"max_length": 10, "packing": True, "packing_strategy": "bfd_split"}, False, None),
        ({"max_length": 10, "packing": True}, False, None),
        (
            {
                "max_length": 10,
                "packing": True,
                "packing_strategy": "wrapped",
                "eval_packing": False,
            },
            True,
            10,
        ),
    ],
)
def test_the_window_is_the_trainers_own(config, evaluating, size):
    """By today's name or an older one; none where what is longer goes on in the next row."""
    assert window.of(SimpleNamespace(**config), evaluating=evaluating).size == size


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of what it renamed
def test_a_recipe_without_a_window_has_trls(tmp_path):
    """TRL cuts at a length of its own where none is given."""
    from trl import SFTConfig

    default = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)

    assert window.of(default) == Window(default.max_length, packs=False)
