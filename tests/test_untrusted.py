"""Files from strangers run no code, write nowhere else, and do not fill the memory.

YAML of strangers is tested in tests/recipe/test_yaml.py.
"""

import gzip
import io
import os
import pickle
import struct
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sslrun.backbones import weights
from sslrun.data.control import files as trajectories
from sslrun.data.graph.files import _load_pyg
from sslrun.data.image.images import Decoder, EncodedFiles
from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.training import checkpoint


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def proof(tmp_path):
    """The folder that exists if code of a file has run."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def test_the_malicious_object_would_run(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


def test_weights_are_no_code(tmp_path, proof):
    for name, write in {"zip.pt": torch.save, "raw.pt": _save_raw}.items():
        write({"x": Malicious(proof)}, tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: not a checkpoint"):
            weights.read(tmp_path / name)


def _save_raw(value, path):
    path.write_bytes(pickle.dumps(value))


def test_a_checkpoint_is_no_code(tmp_path, proof, monkeypatch):
    folder = tmp_path / "step-000000001"
    folder.mkdir()
    torch.save({"optimizer": Malicious(proof)}, folder / checkpoint.STATE)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: None)

    device = SimpleNamespace(device=torch.device("cpu"))
    training = SimpleNamespace(learner=None, compute=device, load_state_dict=None)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.restore(training, folder)


def test_graphs_of_other_libraries_are_no_code(tmp_path, proof):
    pytest.importorskip("torch_geometric", reason="reads the data sets of PyTorch Geometric")
    torch.save((Malicious(proof), {}), tmp_path / "data.pt")
    with pytest.raises(UserError, match=r"data\.pt: cannot be read"):
        _load_pyg(tmp_path / "data.pt")


def test_arrays_are_no_objects(tmp_path, proof):
    path, npz = tmp_path / "images.npz", sources["npz"]
    np.savez(path, x_train=np.array([Malicious(proof)], dtype=object))
    with pytest.raises(UserError, match=r"images\.npz: cannot be read as \.npz: Object arrays"):
        npz(npz.Options(path=path)).load("train")
    np.savez(path, observations=np.array([Malicious(proof)], dtype=object))
    with pytest.raises(UserError, match="cannot be read as trajectories: Object arrays"):
        trajectories._read(path)


def test_names_in_an_archive_are_no_paths(tmp_path):
    """Members are read into memory by name, and never extracted."""
    path, npz = tmp_path / "inner" / "images.npz", sources["npz"]
    path.parent.mkdir()
    content = io.BytesIO()
    np.save(content, np.zeros((4, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../escaped.npy", "/tmp/sslrun-escaped.npy", "x_train.npy"):
            archive.writestr(name, content.getvalue())
    npz(npz.Options(path=path)).load("train")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["images.npz", "inner"]
    assert not os.path.exists("/tmp/sslrun-escaped.npy")


def _write_png(path, side):
    """A PNG file of a few kB that claims to hold side x side pixels."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))


def test_an_image_that_unpacks_to_gigabytes_is_named(tmp_path):
    _write_png(tmp_path / "bomb.png", 60_000)
    with pytest.raises(UserError, match=r"bomb\.png: cannot be decoded \(.*decompression bomb"):
        Decoder(8)(EncodedFiles([str(tmp_path / "bomb.png")]), 0)


def test_a_text_in_an_image_that_unpacks_to_gigabytes_is_named(tmp_path):
    """Pillow limits the text of a PNG file, which is compressed, too."""
    path = tmp_path / "text.png"
    _write_png(path, 4)
    packed = b"key\0\0" + zlib.compress(bytes(2**22), 9)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed
    content = path.read_bytes()
    start = content.index(b"IDAT") - 4
    checksum = struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    path.write_bytes(content[:start] + chunk + checksum + content[start:])
    with pytest.raises(UserError, match=r"text\.png: cannot be decoded"):
        Decoder(8)(EncodedFiles([str(path)]), 0)


def test_packed_text_is_not_unpacked(tmp_path):
    (tmp_path / "bomb.txt").write_bytes(gzip.compress(bytes(2**20)))
    text = sources["text"]
    with pytest.raises(UserError, match=r"bomb\.txt.* not (UTF-8 )?text"):
        list(text(text.Options(path=tmp_path / "bomb.txt")).documents())


def test_models_of_strangers_bring_no_code(tmp_path, proof):
    pytest.importorskip("transformers")
    from sslrun.backbones.base import backbones

    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.M"}}'
    )
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    cls = backbones["hf"]
    from sslrun.data.image.images import ImageSpec

    with pytest.raises(UserError) as error:
        cls(cls.Options(model=str(tmp_path)), ImageSpec(32))
    assert "\n" not in str(error.value)
