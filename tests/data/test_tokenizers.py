"""Tokenizers: ids, offsets and decoding of both kinds, the thinking switch of chat templates, and missing files."""

import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_paint.base.errors import UserError
from megatron_paint.data.tokenizers import UNKNOWN_ID_TEXT, load_tokenizer
from tests.data.tokenizer_cases import QWEN3, needs_qwen3, write_byte_tokenizer, write_sentencepiece

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {"bytes": write_byte_tokenizer(root / "bytes"), "pieces": write_sentencepiece(root / "pieces")}


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request, folders):
    return load_tokenizer(folders[request.param])


@pytest.fixture(scope="module")
def qwen3():
    return load_tokenizer(QWEN3)


class TestBothKinds:
    def test_control_tokens_of_the_text_become_ids(self, tokenizer):
        ids = tokenizer.encode("<|im_start|>a<think>b<|im_end|>")
        control = tokenizer.control_tokens
        assert [i for i in ids if i in control.values()] == [
            control["<|im_start|>"],
            control["<think>"],
            control["<|im_end|>"],
        ]

    def test_nothing_is_added(self, tokenizer):
        assert tokenizer.encode("") == ()
        assert not set(tokenizer.encode("Let us solve")) & set(tokenizer.control_tokens.values())

    def test_seam_keeps_a_control_token_text(self, tokenizer):
        ids = tokenizer.encode("a <", "|im_end|> b <", "/think> c")
        assert not set(ids) & set(tokenizer.control_tokens.values())
        assert tokenizer.decode(ids, keep_special=True) == "a <|im_end|> b </think> c"

    @pytest.mark.parametrize(
        "text", ["Let us solve x = 12.", "  two  spaces ", "a\n\nb\n", "h\u00e9llo \U0001f600", "\\frac{1}{2}"]
    )
    def test_round_trip_and_offsets(self, tokenizer, text):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids, keep_special=True) == text
        assert len(offsets) == len(ids)
        assert offsets[0][0] == 0
        assert offsets[-1][1] == len(text)
        assert all(before[0] <= after[0] and before[1] <= after[1] for before, after in pairwise(offsets))

    def test_offsets_of_ordinary_tokens_hold_their_text(self, tokenizer):
        text = "solve x = 12 step<|im_end|> by"
        ids, offsets = tokenizer.encode_with_offsets(text)
        for token, (start, end) in zip(ids, offsets, strict=True):
            assert text[start:end].strip() == tokenizer.decode([token], keep_special=True).strip()

    def test_decoding_drops_special_tokens_on_demand(self, tokenizer):
        ids = tokenizer.encode("<|im_start|>Let us<|im_end|>")
        assert tokenizer.decode(ids, keep_special=True) == "<|im_start|>Let us<|im_end|>"
        assert tokenizer.decode(ids, keep_special=False) == "Let us"

    def test_ids_without_a_token_are_visible(self, tokenizer):
        a, b = (tokenizer.encode("<|im_start|>" + text)[1:] for text in ("step", " by"))
        ids = [*a, tokenizer.size, -1, 2**70, *b]
        assert tokenizer.decode(ids, keep_special=False) == "step" + 3 * UNKNOWN_ID_TEXT + " by"

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(ids=st.lists(st.integers(-3, 400), max_size=30), keep=st.booleans())
    def test_decoding_never_raises(self, tokenizer, ids, keep):
        assert isinstance(tokenizer.decode(ids, keep), str)

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def test_offsets_of_any_text_are_in_order(self, tokenizer, text):
        _, offsets = tokenizer.encode_with_offsets(text)
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        starts = [start for start, _ in offsets]
        assert starts == sorted(starts)

    def test_lone_surrogate(self, tokenizer):
        with pytest.raises(UserError, match=r"lone surrogate \(\\ud800\) at character 1"):
            tokenizer.encode("a\ud800")

    def test_chat(self, tokenizer):
        assert tokenizer.render_chat(MESSAGES, thinking=True) == (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.render_chat(MESSAGES, thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")
        assert tokenizer.render_chat(MESSAGES, thinking=True, add_generation_prompt=False) == (
            "<|im_start|>user\nHi<|im_end|>\n"
        )

    def test_ends(self, tokenizer):
        assert tokenizer.decode(tokenizer.stop_ids[:1], keep_special=True) in ("<|im_end|>", "</s>")
        assert tokenizer.pad_id in tokenizer.stop_ids


class TestFolder:
    def test_template_file_replaces_the_tokenizers_own(self, folders, tmp_path):
        path = tmp_path / "mine.jinja"
        path.write_text("{{ messages[0].content }}|{{ enable_thinking }}")
        for folder in folders.values():
            tokenizer = load_tokenizer(folder, chat_template=str(path))
            assert tokenizer.render_chat(MESSAGES, thinking=False) == "Hi|False"

    def test_generation_config_adds_ends(self, tmp_path):
        folder = write_byte_tokenizer(tmp_path)
        first = load_tokenizer(folder).stop_ids[0]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 7]}))
        assert load_tokenizer(folder).stop_ids[:2] == (first, 7)
        (folder / "generation_config.json").write_text("[")
        with pytest.raises(UserError, match=r"generation_config\.json is not a JSON object"):
            load_tokenizer(folder)

    def test_absent_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"model\.hf_path: there is no folder .*gone"):
            load_tokenizer(tmp_path / "gone")

    def test_folder_without_a_tokenizer(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model \(it has config\.json\)"):
            load_tokenizer(tmp_path)

    def test_broken_tokenizer(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match="cannot be loaded"):
            load_tokenizer(tmp_path)

    def test_broken_sentencepiece(self, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(b"not a model")
        (tmp_path / "chat_template.jinja").write_text("")
        with pytest.raises(UserError, match="not a SentencePiece model"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("write", [write_byte_tokenizer, write_sentencepiece])
    def test_no_chat_template(self, tmp_path, write):
        with pytest.raises(
            UserError, match=r"prompts\.chat_template is null and the tokenizer in .* has no chat template"
        ):
            load_tokenizer(write(tmp_path, template=None))

    def test_absent_chat_template_file(self, folders):
        with pytest.raises(UserError, match=r"prompts\.chat_template: nowhere\.jinja cannot be read"):
            load_tokenizer(folders["bytes"], chat_template="nowhere.jinja")

    @pytest.mark.parametrize("template", ["{% if", "{{ messages[0].nothing.at_all }}", "{{ raise_exception('no') }}"])
    @pytest.mark.parametrize("kind", ["bytes", "pieces"])
    def test_template_with_a_mistake(self, folders, tmp_path, kind, template):
        path = tmp_path / "mine.jinja"
        path.write_text(template)
        tokenizer = load_tokenizer(folders[kind], chat_template=str(path))
        with pytest.raises(UserError, match=r"the chat template cannot be rendered"):
            tokenizer.render_chat(MESSAGES, thinking=True)

    def test_no_end_token(self, tmp_path):
        folder = write_byte_tokenizer(
            tmp_path, config={"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "x"}
        )
        with pytest.raises(UserError, match="names no eos_token"):
            load_tokenizer(folder)


def test_sentencepiece_prefix_only_at_the_start(tmp_path):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    inner = tokenizer.encode("<|im_start|>step")[1:]
    assert tokenizer.encode("step") != inner  # the model was trained with a space before the first word
    assert tokenizer.encode(" step") != tokenizer.encode("step")
    assert tokenizer.encode("", "step") == inner


@needs_qwen3
class TestQwen3:
    def test_sizes_and_ends(self, qwen3):
        assert qwen3.size == 151_669
        assert qwen3.stop_ids == (151_645, 151_643)  # <|im_end|>, <|endoftext|>
        assert qwen3.pad_id == 151_643
        assert len(qwen3.control_tokens) == 26
        assert qwen3.control_tokens["</think>"] == 151_668

    def test_rows_beyond_the_tokenizer(self, qwen3):
        assert qwen3.decode(range(151_660, 151_936), keep_special=False).endswith(
            "<think></think>" + 267 * UNKNOWN_ID_TEXT
        )

    def test_ids_are_those_of_the_file(self, qwen3):
        from tokenizers import Tokenizer

        raw = Tokenizer.from_file(str(QWEN3 / "tokenizer.json"))
        for text in ("x = 12,345.\n\nSo \\boxed{\\frac{1}{2}}<|im_end|>", "e\u0301 \U0001f600 \u6211\u4eec <think>\n"):
            assert list(qwen3.encode(text)) == raw.encode(text, add_special_tokens=False).ids

    def test_golden(self, qwen3):
        assert qwen3.encode("What is 12+1?") == (3838, 374, 220, 16, 17, 10, 16, 30)
        assert [qwen3.decode([i], True) for i in (3838, 374, 220, 16, 17, 10, 16, 30)] == [
            *("What", " is", " ", "1", "2", "+", "1", "?")
        ]

    def test_bytes_of_one_character_share_its_offsets(self, qwen3):
        ids, offsets = qwen3.encode_with_offsets("a\U00013000b")
        assert len(ids) > 3
        assert offsets == ((0, 1), *[(1, 2)] * (len(ids) - 2), (2, 3))

    def test_thinking_switch(self, qwen3):
        on = qwen3.render_chat(MESSAGES, thinking=True)
        assert on == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert qwen3.render_chat(MESSAGES, thinking=False) == on + "<think>\n\n</think>\n\n"
