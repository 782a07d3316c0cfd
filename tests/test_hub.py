"""What is on this machine already is read without the hub."""

from __future__ import annotations

import hashlib
import json

import datasets
import huggingface_hub.constants
import pytest
from datasets.packaged_modules.json.json import Json

from harness import UsageError, chat, hub

NAME = "someone/Harbour_Chats"
ROWS = {
    split: [
        {
            "messages": [
                {"role": "user", "content": f"{split} {k}?"},
                {"role": "assistant", "content": f"{k}."},
            ]
        }
        for k in range(count)
    ]
    for split, count in (("train_sft", 6), ("test_sft", 3))
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A machine with empty caches and the hub switched off."""
    home = tmp_path / ".cache" / "huggingface"  # hidden, as it is in a user's home
    home.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    return home


def loaded_before(home):
    """What `load_dataset` leaves of a set of the hub, by the builder that it takes."""
    files = {}
    for split, rows in ROWS.items():
        files[split] = str(home / f"{split}.jsonl")
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Json(
        cache_dir=str(home / "datasets"),
        dataset_name="harbour_chats",
        config_name="default",
        config_id="default",
        hash="0123456789abcdef",
        data_files=files,
    ).download_and_prepare()
    # A builder of local files may not bear the name of a repository: its folder is given it here.
    (home / "datasets" / "harbour_chats").rename(home / "datasets" / "someone___harbour_chats")


def downloaded_before(home, parts=2):
    """What `hf download --repo-type dataset` leaves: blobs, and a folder of links to them."""
    root = home / "hub" / "datasets--someone--Harbour_Chats"
    commit = "8049631c405ae6576f93f445c6b8166f76f5505a"
    data = root / "snapshots" / commit / "data"
    for folder in (root / "refs", root / "blobs", data):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for split, rows in ROWS.items():
        half = len(rows) // 2
        for k, part in list(enumerate((rows[:half], rows[half:])))[:parts]:
            made = home / "part.parquet"
            datasets.Dataset.from_list(part).to_parquet(made)
            mark = hashlib.sha256(made.read_bytes()).hexdigest()
            made.rename(root / "blobs" / mark)
            (data / f"{split}-0000{k}-of-00002.parquet").symlink_to(f"../../../blobs/{mark}")


@pytest.mark.parametrize("kept", [loaded_before, downloaded_before])
def test_a_set_that_is_kept_here_needs_no_hub(home, kept):
    """Loaded once or only downloaded: both splits, every conversation, in its order."""
    kept(home)

    train, evaluation = chat.dataset(NAME, "train"), chat.dataset(NAME, "eval")

    assert train["messages"][:] == [row["messages"] for row in ROWS["train_sft"]]
    assert evaluation["messages"][:] == [row["messages"] for row in ROWS["test_sft"]]
    assert datasets.config.HF_HUB_OFFLINE is False, "as it was"


def test_half_a_set_is_not_taken_for_the_whole(home):
    """A download that was cut short is told, with the first part that it lacks."""
    downloaded_before(home, parts=1)

    with pytest.raises(UsageError) as found:
        chat.dataset(NAME, "train")

    assert str(found.value) == (
        f"data {NAME}: no such file, and the hub did not give it (HF_HUB_OFFLINE is set, and what is "
        "kept of it here lacks data/test_sft-00001-of-00002.parquet); go online, check the id, or give "
        "a local file"
    )


def test_a_set_that_is_not_here_is_told():
    """One line, with the switch that is off."""
    with pytest.raises(UsageError) as found:
        chat.dataset("someone/nothing", "train")

    assert str(found.value) == (
        "data someone/nothing: no such file, and the hub did not give it (HF_HUB_OFFLINE is set, and "
        "nothing of it is kept on this machine); go online, check the id, or give a local file"
    )


def test_a_hub_in_reach_is_asked_by_the_id(monkeypatch):
    """What is kept here may be old: it is looked at only where the hub cannot be."""
    monkeypatch.setattr(hub, "check_reachable", lambda: None)

    with hub.data(NAME) as name:
        assert name == NAME
        assert datasets.config.HF_HUB_OFFLINE is False
