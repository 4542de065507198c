"""Files that are whole or not there, and execute nothing."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robust_app import checkpoint
from robust_app.errors import UserError

CONTENT = {"format": "robust-app 1", "numbers": torch.arange(3), "epoch": 4}


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(CONTENT, tmp_path / "a.pt")
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded["epoch"] == 4
    assert torch.equal(loaded["numbers"], torch.arange(3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


class Unwritable:
    def __reduce__(self):
        raise RuntimeError("stop here, in the middle of writing")


def test_a_save_that_fails_leaves_the_file_before(tmp_path):
    checkpoint.save(CONTENT, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="middle of writing"):
        checkpoint.save(CONTENT | {"bad": Unwritable()}, tmp_path / "a.pt")
    assert checkpoint.load(tmp_path / "a.pt")["epoch"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("size", [3, 1_000_000])  # told when the file is closed, and before
def test_a_full_disk_is_told_and_leaves_the_file_before(tmp_path, size):
    checkpoint.save(CONTENT, tmp_path / "a.pt")
    (tmp_path / "a.pt.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a\.pt: cannot be written \(No space left on device\)"):
        checkpoint.save(CONTENT | {"numbers": torch.rand(size)}, tmp_path / "a.pt")
    assert checkpoint.load(tmp_path / "a.pt")["epoch"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_file_and_name_are_on_the_disk_before_the_next_is_written(tmp_path, monkeypatch):
    synchronised = []
    monkeypatch.setattr(
        "os.fsync", lambda handle: synchronised.append(Path(f"/proc/self/fd/{handle}").readlink())
    )
    checkpoint.save(CONTENT, tmp_path / "a.pt")
    assert synchronised == [tmp_path / "a.pt.partial", tmp_path]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_payload_is_not_executed(tmp_path):
    for name, write in (("torch.pt", torch.save), ("plain.pt", None)):
        path = tmp_path / name
        content = CONTENT | {"payload": Payload(tmp_path / "executed")}
        if write:
            write(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="not a checkpoint"):
            checkpoint.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("cut", [0, 1, 100, 500])
def test_a_truncated_file_is_refused(tmp_path, cut):
    checkpoint.save(CONTENT, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.pt: not a checkpoint of robust-app"):
        checkpoint.load(tmp_path / "a.pt")


def test_a_changed_bit_of_a_number_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(CONTENT | {"numbers": torch.full((64,), 0.1)}, path)
    whole = path.read_bytes()
    number = np.float32(0.1).tobytes()
    first = whole.index(number * 64)
    for place in (first, first + 4 * 63 + 3):  # of a mantissa and of an exponent
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.pt: not .*, or damaged; put a copy back"):
            checkpoint.load(path)


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path)


def test_parameters_of_another_network_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="holds another network") as caught:
        checkpoint.restore(nn.Linear(2, 3), nn.Linear(3, 3).state_dict(), tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_damage_anywhere_is_refused_or_leaves_a_checkpoint(tmp_path):
    checkpoint.save(CONTENT, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), size=random.integers(1, 9)):
            damaged[place] = random.integers(256)
        (tmp_path / "b.pt").write_bytes(damaged)
        try:
            assert isinstance(checkpoint.load(tmp_path / "b.pt"), dict)
        except UserError:
            refused += 1
    assert refused > 100


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(CONTENT, tmp_path / "missing" / "a.pt")


def test_an_interruption_while_saving_stays_one_and_leaves_the_old_file(tmp_path, monkeypatch):
    path, content = tmp_path / "state.pt", {"format": "robust-app 1", "x": torch.zeros(100_000)}
    checkpoint.save(content, path)
    before = path.read_bytes()

    class Interrupted:
        def __init__(self, file):
            self.file, self.writes = file, 0

        def write(self, data):
            self.writes += 1
            if self.writes == 5:
                raise KeyboardInterrupt
            return self.file.write(data)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda what, file: save(what, Interrupted(file)))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(content, path)
    assert path.read_bytes() == before
