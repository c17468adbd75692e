"""The converter's commands on tiny models: both directions, refusals, interruptions, damage."""

import json
import os
import pickle
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from transformers import AutoModelForCausalLM

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hf_reader import INDEX
from megatron_paint.checkpoints.torch_dist import METADATA, CheckpointReader, PieceWriter
from megatron_paint.cli.main import main
from megatron_paint.convert import work
from megatron_paint.convert.check import compare
from megatron_paint.convert.to_hf import ToHuggingFace
from megatron_paint.convert.to_megatron import ToMegatron
from megatron_paint.convert.work import convert
from tests.convert.family import MEMBERS, TOKENS, make_member
from tests.support.exports import same, weights

DAMAGES = [400, pytest.param(int(os.environ.get("CONVERT_DAMAGES", "2000")), marks=pytest.mark.long)]  # are tried


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folder with a bfloat16 model of each member in several files, and its conversion."""
    folder = tmp_path_factory.mktemp("family")
    for member in MEMBERS:
        make_member(folder / member, member, shard="60KB")
        (folder / member / "chat_template.jinja").write_text("{{ messages }}")
        assert (
            main(["convert", "to-megatron", str(folder / member), str(folder / f"{member}-megatron"), "--quiet"]) == 0
        )
    return folder


@pytest.mark.parametrize("member", MEMBERS)
def test_there_and_back(member, family, tmp_path, capsys):
    megatron, back = family / f"{member}-megatron", tmp_path / "back"
    assert main(["convert", "check", str(family / member), str(megatron), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"]
    arguments = ["--base", str(family / member), "--shard-size", "100KB", "--json"]
    assert main(["convert", "to-hf", str(megatron), str(back), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == len(weights(back))
    assert same(weights(back), weights(family / member))
    assert len(list(back.glob("*.safetensors"))) > 1
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
    model, source = (AutoModelForCausalLM.from_pretrained(path) for path in (back, family / member))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    answers = [m.generate(torch.tensor([TOKENS]), max_new_tokens=20, do_sample=False).tolist() for m in (model, source)]
    assert answers[0] == answers[1]
    assert len(set(answers[0][0])) > len(TOKENS) // 2


def test_another_type(family, tmp_path):
    source, out, back = family / "dense-tied", tmp_path / "out", tmp_path / "back"
    assert main(["convert", "to-megatron", str(source), str(out), "--dtype", "float32", "--quiet"]) == 0
    assert {t.dtype for t in CheckpointReader(out).tensors.values()} == {torch.float32}
    assert main(["convert", "to-hf", str(out), str(back), "--base", str(source), "--quiet"]) == 0
    assert same(weights(back), weights(source))
    assert (
        main(["convert", "to-hf", str(out), str(tmp_path / "wide"), "--base", str(source), "--dtype", "float32"]) == 0
    )
    assert same(weights(tmp_path / "wide"), {name: tensor.float() for name, tensor in weights(source).items()})
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_an_existing_folder_is_kept(family, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    arguments = ["convert", "to-megatron", str(family / "dense-tied"), str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 2
    assert "has no checkpoint, so --overwrite does not remove it" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    (tmp_path / "out" / "config.json").write_text("{}")
    assert main([*arguments, "--overwrite"]) == 0
    assert compare(family / "dense-tied", tmp_path / "out").equal


def test_an_interrupted_conversion_resumes(family, tmp_path, monkeypatch):
    """After the interruption there is no output. The second attempt does only the rest."""
    monkeypatch.setattr(work, "TASK_BYTES", 20_000)
    job, done = ToMegatron(source=family / "dense-untied"), []
    right = ToMegatron.worker

    def worker(self, folder):
        do = right(self, folder)

        def work_until_interrupted(task):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(task.number)
            return do(task)

        return work_until_interrupted

    monkeypatch.setattr(ToMegatron, "worker", worker)
    with pytest.raises(KeyboardInterrupt):
        convert(job, tmp_path / "out", processes=1, overwrite=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ToMegatron, "worker", right)
    steps = []
    convert(job, tmp_path / "out", processes=1, overwrite=False, progress=steps.append)
    assert done == [0, 1, 2]
    tasks = job.tasks()
    assert steps[0] == sum(task.nbytes for task in tasks[:3])  # done before the interruption
    assert steps[1:] == [task.nbytes for task in tasks[3:]]
    assert compare(family / "dense-untied", tmp_path / "out").equal
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_changed_source_is_not_mixed_with_the_old_one(family, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "TASK_BYTES", 20_000)
    source = shutil.copytree(family / "dense-untied", tmp_path / "source")
    monkeypatch.setattr(ToMegatron, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(ToMegatron(source=source), tmp_path / "out", processes=1, overwrite=False)
    monkeypatch.undo()
    shutil.rmtree(source)
    torch.manual_seed(99)
    make_member(source, "dense-untied", dtype=torch.float32)
    convert(ToMegatron(source=source), tmp_path / "out", processes=1, overwrite=False)
    assert compare(source, tmp_path / "out").equal


def test_check_names_the_place_of_a_difference(family, tmp_path, capsys):
    megatron = shutil.copytree(family / "dense-tied-megatron", tmp_path / "megatron")
    file = megatron / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    value = weights(family / "dense-tied")["model.norm.weight"]
    at = content.rindex(value.view(torch.uint8).numpy().tobytes())
    content[at + 2 * 5] ^= 1
    file.write_bytes(content)
    assert main(["convert", "check", str(family / "dense-tied"), str(megatron), "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"model\.norm\.weight: 1 number differs; the largest difference is .*, at \[5\]\n", printed)
    assert f"model.norm.weight: {megatron} differs from its manifest" in printed
    assert main(["convert", "to-hf", str(megatron), str(tmp_path / "out"), "--base", str(family / "dense-tied")]) == 2
    assert "model.norm.weight differs from what was converted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_check_compares_an_export_with_its_manifest(family, tmp_path, capsys):
    """If a number changes after the export, the number and the checksum differ."""
    megatron, back = family / "dense-tied-megatron", tmp_path / "back"
    assert main(["convert", "to-hf", str(megatron), str(back), "--base", str(family / "dense-tied"), "--quiet"]) == 0
    assert main(["convert", "check", str(back), str(megatron), "--json"]) == 0
    tensors = weights(back)
    assert json.loads(capsys.readouterr().out)["checksums"] == 2 * len(tensors)
    tensors["model.norm.weight"][7] += 1
    save_file(tensors, back / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "check", str(back), str(megatron)]) == 1
    printed = capsys.readouterr().out
    assert f"model.norm.weight: {back} differs from its manifest" in printed
    assert "not equal: 1 of" in printed


def test_a_tied_output_layer_must_equal_the_embedding(family, tmp_path, capsys):
    source = shutil.copytree(family / "dense-tied", tmp_path / "source")
    tensors = weights(source)
    for file in (*source.glob("*.safetensors"), source / INDEX):
        file.unlink()
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    assert main(["convert", "to-megatron", str(source), str(tmp_path / "out"), "--quiet"]) == 0
    assert main(["convert", "inspect", str(source), "--json"]) == 0
    (odd,) = json.loads(capsys.readouterr().out)["odd"]
    assert "lm_head.weight is stored although" in odd
    head[3, 4] += 1
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    assert main(["convert", "to-megatron", str(source), str(tmp_path / "other"), "--quiet"]) == 2
    assert "set tie_word_embeddings to false" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_numbers_that_another_type_cannot_represent(tmp_path, capsys):
    source = make_member(tmp_path / "source", "dense-tied", dtype=torch.float32)
    tensors = weights(source)
    tensors["model.norm.weight"][5] = 7e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    command = ["convert", "to-megatron", str(source), str(tmp_path / "out"), "--quiet", "--dtype"]
    assert main([*command, "float16"]) == 2
    assert "model.norm.weight has numbers up to 7e+04, which float16 cannot represent" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "bfloat16"]) == 0


def test_inspect_reports_odd_findings(family, tmp_path, capsys):
    source = shutil.copytree(family / "moe", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "moe_intermediate_size": 23}))
    assert main(["convert", "inspect", str(source), "--json"]) == 0
    odd = json.loads(capsys.readouterr().out)["odd"]
    assert "model.layers.3.mlp.gate.weight does not belong to the model of the config" in odd
    assert any("experts.0.down_proj.weight has shape (48, 24), but the config expects (48, 23)" in line for line in odd)
    assert main(["convert", "inspect", str(family / "moe-megatron"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layers"], found["tensor_parallel"], found["odd"]) == (4, 1, [])
    assert found["parameters"] == sum(tensor.numel() for tensor in weights(family / "moe").values())


def test_inspect_prints_names_as_they_are(family, tmp_path, capsys):
    source = shutil.copytree(family / "dense-tied", tmp_path / "source")
    for file in (*source.glob("*.safetensors"), source / INDEX):
        file.unlink()
    save_file(weights(family / "dense-tied") | {"x[red]y[/]": torch.zeros(1)}, source / "model.safetensors")
    assert main(["convert", "inspect", str(source)]) == 0
    assert "x[red]y[/]" in capsys.readouterr().out


def test_another_model_is_refused(family, tmp_path, capsys):
    arguments = ["convert", "to-hf", str(family / "dense-tied-megatron"), str(tmp_path / "out")]
    assert main([*arguments, "--base", str(family / "dense-untied"), "--quiet"]) == 2
    assert "output_layer.weight is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_checkpoint_is_executed(family, tmp_path):
    megatron = shutil.copytree(family / "dense-tied-megatron", tmp_path / "megatron")
    content = pickle.dumps(Payload(tmp_path / "touched"))
    (megatron / METADATA).write_bytes(content)
    with pytest.raises(UserError, match="describes no checkpoint"):
        CheckpointReader(megatron)
    assert not (tmp_path / "touched").exists()
    pickle.loads(content)
    assert (tmp_path / "touched").exists()  # what another reader would have run


def test_overlapping_pieces_are_refused(family, tmp_path):
    """The number of elements is right, but some exist twice and others are missing."""
    megatron = shutil.copytree(family / "dense-tied-megatron", tmp_path / "megatron")
    described = pickle.loads((megatron / METADATA).read_bytes())
    key = "decoder.final_layernorm.weight"
    writer = PieceWriter(megatron / "__9_0.distcp")
    for start in (0, 8):
        writer.write(key, [48], [start], torch.zeros(24, dtype=torch.bfloat16))
    writer.close()
    described.state_dict_metadata[key].chunks = []
    for piece in writer.written:
        chunk = ChunkStorageMetadata(torch.Size(piece["offsets"]), torch.Size(piece["sizes"]))
        described.state_dict_metadata[key].chunks.append(chunk)
        index = MetadataIndex(key, chunk.offsets)
        described.storage_data[index] = _StorageInfo(piece["file"], piece["start"], piece["length"])
    (megatron / METADATA).write_bytes(pickle.dumps(described))
    with pytest.raises(UserError, match="overlap"):
        CheckpointReader(megatron).read(key, (), slice(0, 48))


@pytest.mark.parametrize("place", ["itself", "around", "inside"])
def test_the_source_is_never_overwritten(place, family, tmp_path, capsys):
    source = shutil.copytree(family / "dense-tied", tmp_path / "parent" / "source")
    out = {"itself": source, "around": source.parent, "inside": source / "out"}[place]
    before = sorted(source.iterdir())
    assert main(["convert", "to-megatron", str(source), str(out), "--overwrite", "--quiet"]) == 2
    assert "are the same folder, or one contains the other" in capsys.readouterr().err
    assert sorted(source.iterdir()) == before


def test_several_processes_make_the_same(family, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "TASK_BYTES", 20_000)
    source = family / "dense-untied"
    convert(ToMegatron(source=source), tmp_path / "megatron", processes=2, overwrite=False)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3
    assert compare(source, tmp_path / "megatron").equal
    job = ToHuggingFace(source=tmp_path / "megatron", base=source, shard_bytes=100_000)
    convert(job, tmp_path / "back", processes=2, overwrite=False)
    assert same(weights(tmp_path / "back"), weights(source))


def test_other_tasks_are_another_conversion(family, tmp_path, monkeypatch):
    """A version that cuts the work in another way starts again from the beginning."""
    monkeypatch.setattr(work, "TASK_BYTES", 20_000)
    job = ToHuggingFace(source=family / "dense-untied-megatron", base=family / "dense-untied")
    monkeypatch.setattr(ToHuggingFace, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(job, tmp_path / "out", processes=1, overwrite=False)
    monkeypatch.undo()
    convert(job, tmp_path / "out", processes=1, overwrite=False)
    assert same(weights(tmp_path / "out"), weights(family / "dense-untied"))


def test_paths_stay_in_the_folder(family, tmp_path):
    megatron = shutil.copytree(family / "dense-tied-megatron", tmp_path / "megatron")
    file = megatron / "__0_0.distcp"
    outside = "../" + file.name
    content = (megatron / METADATA).read_bytes()
    described = pickle.loads(content)  # our own
    for stored in described.storage_data.values():
        stored.relative_path = outside
    (megatron / METADATA).write_bytes(pickle.dumps(described))
    with pytest.raises(UserError, match="outside its folder"):
        CheckpointReader(megatron)


@pytest.mark.parametrize("damages", DAMAGES)
@pytest.mark.parametrize("side", ["hugging face", "megatron"])
def test_damage_never_passes(side, damages, family, tmp_path):
    """Cut, flipped and overwritten files give a UserError or a right output, and never a partial output."""
    generator = random.Random(5)
    source = family / "dense-tied" if side == "hugging face" else family / "dense-tied-megatron"
    right = weights(family / "dense-tied")
    refused = 0
    for _ in range(damages // 2):
        damaged, out = tmp_path / "damaged", tmp_path / "out"
        shutil.copytree(source, damaged)
        victims = sorted(
            p for p in damaged.iterdir() if p.suffix in (".safetensors", ".distcp", ".json", "") and p.is_file()
        )
        damage(generator.choice(victims), generator)
        try:
            if side == "hugging face":
                convert(ToMegatron(source=damaged), out, processes=1, overwrite=False)
                assert compare(damaged, out).equal  # the output equals what was read
            else:
                assert same(exported(damaged, family, tmp_path), right)
        except UserError:
            refused += 1
            assert not out.exists()
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert refused > damages // 8


def exported(megatron, family, tmp_path):
    convert(ToHuggingFace(source=megatron, base=family / "dense-tied"), tmp_path / "back", processes=1, overwrite=False)
    return weights(tmp_path / "back")


def damage(path, generator):
    content = bytearray(path.read_bytes())
    kind = generator.choice(("cut", "flip", "overwrite", "empty", "grow"))
    at = generator.randrange(len(content))
    if kind == "cut":
        content = content[:at]
    elif kind == "flip":
        content[at] ^= 1 << generator.randrange(8)
    elif kind == "overwrite":
        content[at : at + 16] = generator.randbytes(16)
    elif kind == "empty":
        content = b""
    else:
        content += generator.randbytes(16)
    path.write_bytes(content)
