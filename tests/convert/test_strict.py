"""What a converter must refuse: mixed types, sources that change, damage of every kind, numbers that are lost."""

import enum
import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.manifest import MANIFEST
from megatron_paint.checkpoints.torch_dist import METADATA, CheckpointReader
from megatron_paint.cli.main import main
from megatron_paint.convert import work
from megatron_paint.convert.check import compare
from megatron_paint.convert.to_hf import ToHuggingFace
from megatron_paint.convert.to_megatron import ToMegatron
from megatron_paint.convert.work import RECORDS, convert
from megatron_paint.models.qwen3.shape import read_shape
from tests.convert.family import make_member


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a bfloat16 model and its conversion."""
    folder = tmp_path_factory.mktemp("model")
    make_member(folder / "hf", "dense-untied")
    convert(ToMegatron(source=folder / "hf"), folder / "megatron", processes=1, overwrite=False)
    return folder


def changed(model, tmp_path, change):
    """A copy of the model whose weights went through `change`."""
    source = shutil.copytree(model / "hf", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def to_hf(model, megatron, out, *arguments):
    return main(["convert", "to-hf", str(megatron), str(out), "--base", str(model / "hf"), "--quiet", *arguments])


@pytest.mark.parametrize(
    "odd", ["model.layers.3.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"]
)
def test_types_that_megatron_cannot_keep_apart(odd, model, tmp_path, capsys):
    def widen(tensors):
        tensors[odd] = tensors[odd].float()

    source = changed(model, tmp_path, widen)
    command = ["convert", "to-megatron", str(source), str(tmp_path / "out"), "--quiet"]
    if odd == "lm_head.weight":  # a separate tensor
        assert main(command) == 0
    else:
        assert main(command) == 2
        assert f"{odd} float32, but Megatron keeps both in one tensor" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert main([*command, "--dtype", "float32"]) == 0
    assert compare(source, tmp_path / "out").equal


@pytest.mark.parametrize("processes", [1, 2])
def test_a_source_that_changes_meanwhile(processes, model, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "TASK_BYTES", 20_000)
    source = shutil.copytree(model / "hf", tmp_path / "source")
    make_member(tmp_path / "other", "dense-untied", dtype=torch.bfloat16)
    steps = []

    def change_once(nbytes):
        steps.append(nbytes)
        if len(steps) == 3:
            os.replace(tmp_path / "other" / "model.safetensors", source / "model.safetensors")

    job = ToMegatron(source=source)
    with pytest.raises(UserError, match="changed while it was read"):
        convert(job, tmp_path / "out", processes=processes, overwrite=False, progress=change_once)
    assert not (tmp_path / "out").exists()
    convert(ToMegatron(source=source), tmp_path / "out", processes=processes, overwrite=False)
    assert compare(source, tmp_path / "out").equal


@pytest.mark.parametrize("apart", [23, pytest.param(3, marks=pytest.mark.long)])
def test_any_flipped_bit_of_a_piece(apart, model, tmp_path):
    """The result is a UserError or numbers, and never another exception. apart: one of so many bits is flipped."""
    megatron = shutil.copytree(model / "megatron", tmp_path / "megatron")
    key = "decoder.final_layernorm.weight"
    (piece,) = CheckpointReader(megatron).tensors[key].pieces
    path = megatron / piece.file
    content = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * piece.length, apart):
        damaged = bytearray(content)
        damaged[piece.start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            CheckpointReader(megatron).read(key, (), slice(0, 48))
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda manifest: "{", "is damaged"),
        (lambda manifest: "[" * 10_000, "is damaged"),
        (lambda manifest: {"tensors": {}}, "is damaged"),
        (lambda manifest: manifest | {"tensors": {}}, "lists other tensors"),
        (lambda manifest: with_norm(manifest, dtype="bfloat17"), "model.norm.weight has no type"),
        (lambda manifest: with_norm(manifest, sha256="0"), "the checksum of model.norm.weight is not a SHA-256"),
        (lambda manifest: with_norm(manifest, shape=[47]), "lists other tensors"),
        (lambda manifest: with_norm(manifest, sha256="0" * 64), "model.norm.weight differs from what was converted"),
    ],
)
def test_a_damaged_manifest(content, message, processes, model, tmp_path, capfd):
    megatron = shutil.copytree(model / "megatron", tmp_path / "megatron")
    written = content(json.loads((megatron / MANIFEST).read_text()))
    (megatron / MANIFEST).write_text(written if isinstance(written, str) else json.dumps(written))
    assert to_hf(model, megatron, tmp_path / "out", "--processes", str(processes)) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def with_norm(manifest, **values):
    tensors = manifest["tensors"]
    return manifest | {"tensors": tensors | {"model.norm.weight": tensors["model.norm.weight"] | values}}


def test_an_error_of_a_worker_is_printed_once(model, tmp_path, monkeypatch, capfd):
    """Both of two processes find the source damaged. One line reports it and does not mention memory."""
    monkeypatch.setattr(work, "TASK_BYTES", 20_000)
    megatron = shutil.copytree(model / "megatron", tmp_path / "megatron")
    (path,) = {megatron / p.file for t in CheckpointReader(megatron).tensors.values() for p in t.pieces}
    path.write_bytes(bytes(path.stat().st_size))
    assert to_hf(model, megatron, tmp_path / "out", "--processes", "2") == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "cannot be read" in line


def test_a_type_that_was_narrowed_is_compared_in_it(model, tmp_path, capsys):
    wide = changed(model, tmp_path, lambda tensors: tensors.update({n: t.float() * 1.001 for n, t in tensors.items()}))
    convert(ToMegatron(source=wide), tmp_path / "megatron", processes=1, overwrite=False)
    assert to_hf(model, tmp_path / "megatron", tmp_path / "narrow", "--dtype", "bfloat16") == 0
    assert main(["convert", "check", str(tmp_path / "narrow"), str(tmp_path / "megatron")]) == 0
    assert "after rounding" in capsys.readouterr().out


def test_check_names_the_largest_difference(model, tmp_path):
    """Equal infinities do not hide it, and a zero of the other sign differs."""

    def spoil(tensors):
        tensors["model.norm.weight"][3] = torch.inf
        tensors["model.layers.0.input_layernorm.weight"][7] = 0.0

    source = changed(model, tmp_path, spoil)
    convert(ToMegatron(source=source), tmp_path / "megatron", processes=1, overwrite=False)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][5] += 1
    tensors["model.layers.0.input_layernorm.weight"][7] = -0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = {difference.name: difference for difference in compare(source, tmp_path / "megatron").differences}
    assert found.keys() == {"model.norm.weight", "model.layers.0.input_layernorm.weight"}
    assert found["model.norm.weight"].where == (5,)
    assert 0.9 < found["model.norm.weight"].largest < 1.1
    assert found["model.layers.0.input_layernorm.weight"].where == (7,)


def test_nan_and_infinity(model, tmp_path, capsys):
    source = changed(
        model, tmp_path, lambda tensors: tensors["model.norm.weight"].index_fill_(0, torch.tensor(2), torch.nan)
    )
    command = ["convert", "to-megatron", str(source), str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--dtype", "float32"]) == 2
    assert "model.norm.weight has infinite numbers or NaN" in capsys.readouterr().err
    assert main(command) == 0  # bits are copied without a change
    assert compare(source, tmp_path / "out").equal


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_links_and_files_are_not_replaced(kind, model, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "target").mkdir()
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / ("target" if kind == "link" else "nowhere"))
    command = ["convert", "to-megatron", str(model / "hf"), str(out), "--quiet", "--overwrite"]
    for _ in range(2):
        assert main(command) == 2
        assert f"{out} is a {'file' if kind == 'file' else 'link'}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]


def test_records_without_their_files_are_ignored(model, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "TASK_BYTES", 20_000)
    monkeypatch.setattr(ToMegatron, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(ToMegatron(source=model / "hf"), tmp_path / "out", processes=1, overwrite=False)
    monkeypatch.undo()
    monkeypatch.setattr(work, "TASK_BYTES", 20_000)
    unfinished = tmp_path / ".out.unfinished"
    (unfinished / "__2_0.distcp").unlink()
    (unfinished / RECORDS / "1.json").write_text("{}")
    (unfinished / RECORDS / "x.json").write_text("{}")
    steps = []
    convert(ToMegatron(source=model / "hf"), tmp_path / "out", processes=1, overwrite=False, progress=steps.append)
    assert len(steps) == 1 + 2
    assert compare(model / "hf", tmp_path / "out").equal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling beside rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "RoPE scaling"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotary embedding of only a part"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters has rope_theta nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ({"hidden_size": 48.5}, "hidden_size is 48.5, not a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads is True, not a whole number"),
    ],
)
def test_unsupported_configs(change, message, model, tmp_path):
    config = json.loads((model / "hf" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        read_shape(tmp_path)


def test_a_missing_file_is_reported_once(model, tmp_path):
    megatron = shutil.copytree(model / "megatron", tmp_path / "megatron")
    (megatron / "__0_0.distcp").unlink()
    with pytest.raises(UserError) as caught:
        CheckpointReader(megatron)
    assert str(caught.value) == f"{megatron / '__0_0.distcp'} is missing; copy the checkpoint again"


def test_every_layer_of_a_tensor_has_its_type(model):
    described = pickle.loads((model / "megatron" / METADATA).read_bytes())  # our own
    stored = {name: t for name, t in described.state_dict_metadata.items() if "_extra_state" not in name}
    assert {t.properties.dtype for t in stored.values()} == {torch.bfloat16}
    assert ToHuggingFace(source=model / "megatron", base=model / "hf").layout.nbytes == sum(
        t.properties.dtype.itemsize * t.size.numel() for t in stored.values()
    )


def test_a_description_of_a_few_bytes_takes_no_memory(model, tmp_path):
    """A memo index of 200 million makes Python's unpickler reserve gigabytes before it reads the rest."""
    megatron = shutil.copytree(model / "megatron", tmp_path / "megatron")
    (megatron / METADATA).write_bytes(b"N" + pickle.LONG_BINPUT + (200_000_000).to_bytes(4, "little") + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="memo index 200000000 in 7 bytes"):
        CheckpointReader(megatron)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; 3 GiB before


class _OfPython3112(pickle.Pickler):
    """Stores members of enumerations as Python 3.11.2 does: as an attribute of their class."""

    def reducer_override(self, value):
        if isinstance(value, enum.Enum):
            return getattr, (type(value), value.name)
        return NotImplemented


def test_a_checkpoint_that_python_3_11_2_wrote(model, tmp_path):
    shutil.copytree(model / "megatron", tmp_path / "megatron")
    file = tmp_path / "megatron" / METADATA
    wanted = CheckpointReader(tmp_path / "megatron").tensors
    with file.open("rb") as stream:
        stored = pickle.load(stream)
    with file.open("wb") as stream:
        _OfPython3112(stream).dump(stored)
    assert b"getattr" in file.read_bytes()
    assert CheckpointReader(tmp_path / "megatron").tensors == wanted
