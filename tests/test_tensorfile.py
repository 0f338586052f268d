"""andromeda.tensorfile, with the safetensors library as the oracle."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.tensorfile import DTYPES, METADATA, RESERVED, TensorFile, load_tensors, save_tensors

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All there is to a tensor: NaN payloads and the sign of zero included."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(tensors: dict[str, Tensor]) -> dict[str, object]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


@st.composite
def tensor(draw: st.DrawFn) -> Tensor:
    """Any bits of any type, sometimes not contiguous."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    made = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)
    return made.mT if made.dim() >= 2 and draw(st.booleans()) else made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@quick
@given(
    tensors=st.dictionaries(st.text(min_size=1).filter(lambda name: name != METADATA), tensor(), max_size=5),
    metadata=st.dictionaries(st.text().filter(lambda name: name not in RESERVED), st.text()),
)
def test_comes_back_bit_for_bit(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    digest = save_tensors(path, tensors, metadata)
    loaded, loaded_metadata = load_tensors(path)
    assert all_bits(loaded) == all_bits(tensors)
    assert loaded_metadata == metadata
    assert TensorFile.open(path).digest == digest
    assert all_bits(load_file(path)) == all_bits(tensors)  # the library reads the same
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "sha256": digest, **metadata}


def test_equal_tensors_give_equal_bytes(path: Path) -> None:
    one, other = torch.ones(3), torch.zeros(2, dtype=torch.bfloat16)
    save_tensors(path, {"one": one, "other": other}, {"a": "1", "b": "2"})
    first = path.read_bytes()
    save_tensors(path, {"other": other.clone(), "one": one.clone()}, {"b": "2", "a": "1"})
    assert path.read_bytes() == first


def test_shared_memory_and_gradients(path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3).requires_grad_()
    views = {"whole": whole, "again": whole, "row": whole[1], "column": whole[:, 1], "wide": whole[0].expand(4, 3)}
    save_tensors(path, views)
    loaded, _ = load_tensors(path)
    assert all_bits(loaded) == all_bits({name: view.detach() for name, view in views.items()})
    assert len({view.data_ptr() for view in loaded.values()}) == len(views)


def test_files_of_the_library_are_read(path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4)}
    save_file(tensors, path, metadata={"by": "another"})
    loaded, metadata = load_tensors(path)
    assert all_bits(loaded) == all_bits(tensors)
    assert metadata == {"by": "another"}


@quick
@given(data=st.data())
def test_a_flipped_bit_is_noticed_or_harmless(path: Path, data: st.DataObject) -> None:
    tensors = {"weight": torch.arange(40.0), "bias": torch.arange(7, dtype=torch.int8)}
    save_tensors(path, tensors, {"step": "12"})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    try:
        loaded, _ = load_tensors(path)
    except AndromedaError:
        return
    assert b'"sha256"' not in content  # only where the flip hit this name itself
    assert all_bits(loaded) == all_bits(tensors)


def test_a_flipped_weight_is_noticed_unless_told_not_to_look(path: Path) -> None:
    save_tensors(path, {"weight": torch.arange(40.0)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AndromedaError, match=r"corrupt.*checksum.*copy it again"):
        load_tensors(path)
    assert len(load_tensors(path, verify=False)[0]["weight"]) == 40


def test_a_file_cut_short_anywhere_is_noticed(path: Path) -> None:
    save_tensors(path, {"weight": torch.arange(40.0)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(AndromedaError, match="cut short"):
            load_tensors(path, verify=False)


def test_a_file_cut_short_after_its_header_was_read(path: Path) -> None:
    save_tensors(path, {"weight": torch.arange(40.0)})
    file = TensorFile.open(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AndromedaError, match="cut short in tensor 'weight'"):
        file.load()


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match=r"none\.safetensors: no such file"):
        load_tensors(tmp_path / "none.safetensors")
    with pytest.raises(AndromedaError, match="cannot be read"):
        load_tensors(tmp_path)
    save_file({"z": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "complex.safetensors")
    with pytest.raises(AndromedaError, match="tensor 'z' is C64; it must be one of F64, F32"):
        load_tensors(tmp_path / "complex.safetensors")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3, "a int"),
        (torch.zeros(2, device="meta"), "without data"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_writing(path: Path, value: Tensor, what: str) -> None:
    with pytest.raises(AndromedaError, match=f"cannot store 'it'.*{what}"):
        save_tensors(path, {"good": torch.ones(1), "it": value})
    with pytest.raises(AndromedaError, match="cannot store '__metadata__'"):
        save_tensors(path, {"__metadata__": torch.ones(1)})
    with pytest.raises(AndromedaError, match="metadata 'sha256'"):
        save_tensors(path, {}, {"sha256": "0"})
    assert not path.exists()


def test_floating_point_tensors_are_converted_and_others_are_not(path: Path) -> None:
    save_tensors(path, {"x": torch.randn(4), "n": torch.arange(4)})
    loaded = TensorFile.open(path).load(dtype=torch.bfloat16)
    assert loaded["x"].dtype is torch.bfloat16
    assert loaded["n"].dtype is torch.int64
