"""The tokenizer in an exported adapter's folder."""

from megatron_paint.checkpoints.peft import copy_tokenizer


def test_the_second_folder_wins_and_both_may_have_further_templates(tmp_path):
    for name in ("base", "start"):
        folder = tmp_path / name / "additional_chat_templates"
        folder.mkdir(parents=True)
        (folder / "tool_use.jinja").write_text(name)
        (folder / f"{name}.jinja").write_text(name)
    out = tmp_path / "out"
    out.mkdir()
    copy_tokenizer(tmp_path / "base", out)
    copy_tokenizer(tmp_path / "start", out)
    found = {path.name: path.read_text() for path in (out / "additional_chat_templates").iterdir()}
    assert found == {"tool_use.jinja": "start", "base.jinja": "base", "start.jinja": "start"}
