import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from steadynorm.errors import InputError
from steadynorm.weights import read_weights, weights_into


class Trap:
    """Pickles into an instruction to make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, name, writer):
    sprung = tmp_path / "sprung"
    content = {"weight": torch.zeros(2), "trap": Trap(sprung)}
    if writer == "torch":
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match="refused: it holds more than tensors, and opening it could run code"):
        read_weights(tmp_path / name)
    assert not sprung.exists()
    torch.load(tmp_path / name, weights_only=False) if writer == "torch" else pickle.loads(
        (tmp_path / name).read_bytes()
    )
    assert sprung.exists(), "the trap does spring where a file is opened without care"


def test_other_kinds_of_files_are_refused_with_the_reason(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(
        InputError, match=r"model\.pkl is refused: .*\.safetensors, \.pt or \.pth .* without running code"
    ):
        read_weights(tmp_path / "model.pkl")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04broken"])
def test_a_broken_file_is_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"there is no weights file .*gone\.pt"):
        read_weights(tmp_path / "gone.pt")


def test_both_formats_give_the_same_tensors(tmp_path):
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for read in (read_weights(tmp_path / "a.pt"), read_weights(tmp_path / "a.safetensors")):
        assert set(read) == set(state)
        assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_and_wrappers_are_unpacked(tmp_path, key, prefix):
    state = nn.Linear(3, 4).state_dict()
    torch.save({"epoch": 3, key: {prefix + name: value for name, value in state.items()}}, tmp_path / "a.pt")
    read = read_weights(tmp_path / "a.pt")
    assert set(read) == {"weight", "bias"}
    assert torch.equal(read["weight"], state["weight"])


@pytest.mark.parametrize(("content", "held"), [([1, 2], "list"), ({"epoch": 3}, "the keys epoch"), ({}, "nothing")])
def test_a_file_without_weights_says_what_it_holds(tmp_path, content, held):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"holds {held}: expected a state_dict"):
        read_weights(tmp_path / "a.pt")


def test_what_does_not_fit_names_the_first_few_keys():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 2)).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        weights_into(model, state, source="old.pt")
    assert str(caught.value) == (
        "the weights in old.pt do not fit the recipe's model: missing: 1.weight, 1.bias; not in the model: 2.weight, "
        "2.bias; of another shape: 0.weight (5, 3) for (4, 3), 0.bias (5,) for (4,); "
        "give weights that were saved from the same model."
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol_is_refused_without_a_warning(tmp_path, protocol):
    """Python pickles with protocol 4 or 5; torch warns of every one but 2 before it refuses."""
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=protocol))
    with pytest.raises(InputError, match="refused"):
        read_weights(path)
    assert not (tmp_path / "sprung").exists()


def test_without_safetensors_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"needs safetensors, the extra \[cli\]: pip install safetensors\.$"):
        read_weights(tmp_path / "a.safetensors")
