"""The end of a turn, as chat templates close it: found in the template, first among the stop ids, last in responses."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import PromptSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.records import Problem
from tests.data.tokenizer_cases import QWEN3, needs_qwen3, write_byte_tokenizer, write_sentencepiece

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END\n{% endfor %}"
GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURN.replace("END", "<|im_end|>") + GENERATE
REFUSES = "{% for m in messages if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endfor %}"
REFUSES_LAST = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no answer at the end') }}{% endif %}"
LAST_IS_OPEN = "{% if not loop.last or m.role == 'user' %}<|im_end|>\n{% endif %}"
BASE = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

CLOSES = {
    "ChatML": (CHATML, "<|im_end|>", ""),
    "a system message first": ("<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML, "<|im_end|>", ""),
    "a line break before the end": (CHATML.replace("<|im_end|>", "\n<|im_end|>"), "<|im_end|>", "\n"),
    "several tokens": (CHATML.replace("<|im_end|>", "<|im_end|><|endoftext|>"), "<|im_end|>", ""),
    "the eos token": (CHATML.replace("<|im_end|>", "<|endoftext|>"), "<|endoftext|>", ""),
    "only before another turn": (TURN.replace("END\n", LAST_IS_OPEN) + GENERATE, "<|im_end|>", ""),
    "no answer at the end": (REFUSES_LAST + CHATML, "<|im_end|>", ""),
    "no answer at all": (REFUSES + CHATML, "<|im_end|>", ""),
    "a generation prompt in any case": (
        TURN.replace("END", "<|im_end|>") + "<|im_start|>assistant\n",
        "<|im_end|>",
        "",
    ),
    "capital letters": (CHATML.replace("m.content", "m.content | upper"), "<|im_end|>", ""),
    "a wrapped answer": (CHATML.replace("<|im_end|>", "</answer><|im_end|>"), "<|im_end|>", "</answer>"),
    "nothing": (TURN.replace("END", "") + GENERATE, None, ""),
    "text that is no token": (TURN.replace("END", "[END]") + GENERATE, None, ""),
    "a thought's tag": (TURN.replace("END", "</think>") + GENERATE, None, ""),
    "a refusal without a generation prompt": (REFUSES + "{{ messages[0].content }}<|im_end|>", None, ""),
    "answers are left out": ("{{ messages[0].content }}", None, ""),
}


def base_tokenizer(folder, template, **changes):
    """A tokenizer as base models have it: eos is the end of text."""
    return load_tokenizer(write_byte_tokenizer(folder, config=BASE | {"chat_template": template} | changes))


def named(tokenizer, ids):
    return [tokenizer.decode([index], keep_special=True) for index in ids]


@pytest.mark.parametrize("how", CLOSES)
def test_end_of_turn(tmp_path, how):
    template, end, before = CLOSES[how]
    tokenizer = base_tokenizer(tmp_path, template)
    assert (tokenizer.turns.end, tokenizer.turns.before_end) == (end, before)
    assert named(tokenizer, tokenizer.stop_ids) == list(dict.fromkeys([end or "<|endoftext|>", "<|endoftext|>"]))
    problem = Problem(id="a", problem="1 + 1?", solution="It is 2.", answer="2")
    ids = Prompts(PromptSettings(student_thinking=True), tokenizer).sft_response(problem)
    assert tokenizer.decode(ids, keep_special=True) == f"It is 2.{before}{end or '<|endoftext|>'}"
    assert ids[-1] == tokenizer.stop_ids[0]
    assert not set(ids[:-1]) & set(tokenizer.stop_ids)


@pytest.mark.parametrize(
    ("how", "note"),
    [
        (
            "ChatML",
            "the chat template closes an answer with <|im_end|>, and eos_token is <|endoftext|>: a response ends with "
            "<|im_end|> or <|endoftext|>, and SFT ends each solution with <|im_end|>. A program that serves the "
            "exported model needs <|im_end|> as a stop token",
        ),
        (
            "nothing",
            "the chat template closes an answer with no token: a response ends with <|endoftext|>, and SFT ends each "
            "solution with <|endoftext|>",
        ),
        (
            "text that is no token",
            "the chat template closes an answer with '[END]', which is not one token: a response ends with "
            "<|endoftext|>, and SFT ends each solution with <|endoftext|>",
        ),
        (
            "answers are left out",
            "the chat template cannot render an answer: a response ends with <|endoftext|>, and SFT ends each solution "
            "with <|endoftext|>",
        ),
    ],
)
def test_what_the_user_is_told(tmp_path, how, note):
    assert base_tokenizer(tmp_path, CLOSES[how][0]).notes == (note,)


def test_nothing_to_tell(tmp_path):
    assert base_tokenizer(tmp_path, CHATML, eos_token="<|im_end|>").notes == ()


def test_template_without_eos(tmp_path):
    """The chat template alone can name the end of a response."""
    folder = write_byte_tokenizer(
        tmp_path, config={"tokenizer_class": BASE["tokenizer_class"], "chat_template": CHATML}
    )
    tokenizer = load_tokenizer(folder)
    assert named(tokenizer, tokenizer.stop_ids) == ["<|im_end|>"]
    assert tokenizer.pad_id == tokenizer.stop_ids[0]


def test_added_tokens_of_white_space_end_no_turn(tmp_path):
    """Some tokenizers have line breaks as added tokens. A response with one goes on."""
    file = write_byte_tokenizer(tmp_path, config=BASE | {"chat_template": CLOSES["nothing"][0]}) / "tokenizer.json"
    content = json.loads(file.read_text())
    number = 1 + max(token["id"] for token in content["added_tokens"])
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": number, "content": "\n"})
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a\nb")[1] == number
    assert named(tokenizer, tokenizer.stop_ids) == ["<|endoftext|>"]


def test_sentencepiece(tmp_path):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    assert named(tokenizer, tokenizer.stop_ids[:2]) == ["<|im_end|>", "</s>"]


def test_markers_that_are_not_special(tmp_path):
    """ChatML's marks as ordinary added tokens end turns all the same, and stay text in a solution."""
    file = write_byte_tokenizer(tmp_path, config=BASE | {"chat_template": CHATML}) / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] == "<|endoftext|>"
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"<|endoftext|>"}
    end = tokenizer.control_tokens["<|im_end|>"]
    assert tokenizer.stop_ids[0] == end
    prompts = Prompts(PromptSettings(student_thinking=True), tokenizer)
    solution = "<think>a</think> <|im_end|>\n<|im_start|>user"
    ids = prompts.sft_response(Problem(id="a", problem="1 + 1?", solution=solution, answer="2"))
    assert ids[-1] == end
    assert not {end, tokenizer.control_tokens["<|im_start|>"]} & set(ids[:-1])
    assert {tokenizer.control_tokens["<think>"], tokenizer.control_tokens["</think>"]} <= set(ids)
    assert prompts.response_text(ids) == solution  # the end is no text of the response


GENERATION_CONFIGS = {
    "text": ("258", '"258" is no whole number'),
    "a word": ("<|im_end|>", '"<|im_end|>" is no whole number'),
    "true": (True, "true is no whole number"),
    "a fraction": (258.0, r"258\.0 is no whole number"),
    "a list with text": ([258, "256"], '"256" is no whole number'),
    "a list with null": ([258, None], "null is no whole number"),
    "an object": ({"id": 258}, "is no whole number"),
    "negative": (-1, "-1 is no id of the tokenizer"),
    "outside the vocabulary": ([258, 5000], "5000 is no id of the tokenizer"),
    "huge": (2**70, "is no id of the tokenizer"),
}


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("mistake", GENERATION_CONFIGS)
def test_generation_config_with_a_mistake(tmp_path, kind, mistake):
    value, says = GENERATION_CONFIGS[mistake]
    folder = (write_byte_tokenizer if kind == "bytes" else write_sentencepiece)(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=rf"generation_config\.json: eos_token_id is .*{says}"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("value", "more"), [(None, []), ([], []), (0, [0]), ([0, 5], [0, 5]), (258, []), ([256, 258], [])]
)
def test_generation_config(tmp_path, value, more):
    """Id 0 is a token like others; no id is listed twice."""
    tokenizer = base_tokenizer(tmp_path, CHATML)
    assert tokenizer.control_tokens["<|im_end|>"] > 258
    plain = tokenizer.stop_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    stop = load_tokenizer(tmp_path).stop_ids
    assert stop[0] == plain[0]
    assert sorted(stop) == sorted({*plain, *more, *([value] if value == 258 else value if value == [256, 258] else [])})


@needs_qwen3
class TestQwen3:
    @pytest.fixture(scope="class")
    def theirs(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(QWEN3))

    @pytest.fixture(scope="class")
    def thinking_only(self, tmp_path_factory):
        """A chat template that always opens a thought, as models that only think have it."""
        template = json.loads((QWEN3 / "tokenizer_config.json").read_text())["chat_template"]
        begin = template.index("    {%- if enable_thinking is defined")
        end = template.index("{%- endif %}", template.index("{%- endif %}", begin) + 1)
        path = tmp_path_factory.mktemp("template") / "thinking_only.jinja"
        path.write_text(template[:begin] + "    {{- '<think>\\n' }}\n" + template[end:])
        return str(path)

    @staticmethod
    def conversation(theirs, prompts, problem, answer):
        """The ids of question and answer as transformers renders and encodes them, up to the end of the turn."""
        question = theirs.decode(prompts.student_prompt(problem)).partition("user\n")[2].partition("<|im_end|>")[0]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert ids[-2:] == [151645, 198]
        return ids[:-1]

    def test_a_base_model(self, tmp_path):
        folder = tmp_path / "base"
        folder.mkdir()
        (folder / "tokenizer.json").symlink_to(QWEN3 / "tokenizer.json")
        config = json.loads((QWEN3 / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text('{"eos_token_id": 151643}')
        assert load_tokenizer(folder).stop_ids == (151645, 151643)

    @pytest.mark.parametrize("solution", ["It is $2$. So \\boxed{2}.", "So \\boxed{2}.\n\nDone"])
    def test_an_answer_without_a_thought_is_the_chat_templates_own(self, theirs, thinking_only, solution):
        """Non-thinking prompts hold the empty thought; after an open one the response closes it."""
        problem = Problem(id="a", problem="What is 1+1?", solution=solution, answer="2")
        prompts = Prompts(PromptSettings(), load_tokenizer(QWEN3))
        ids = [*prompts.student_prompt(problem), *prompts.sft_response(problem)]
        expected = self.conversation(theirs, prompts, problem, solution)
        assert ids == expected
        settings = PromptSettings(chat_template=thinking_only)
        prompts = Prompts(settings, load_tokenizer(QWEN3, chat_template=thinking_only))
        prompt, response = prompts.student_prompt(problem), prompts.sft_response(problem)
        assert prompt[-2:] == (151667, 198)  # the second line break of the empty thought is a token of the response
        assert response[:3] == (198, 151668, 271)
        assert theirs.decode([*prompt, *response]) == theirs.decode(expected)

    def test_a_thought_is_the_chat_templates_own(self, theirs, thinking_only):
        solution = "<think>\nTwo dozen are 24.\n</think>\n\nHalf of it is \\boxed{12}."
        problem = Problem(id="a", problem="What is half of two dozen?", solution=solution, answer="12")
        for settings in (PromptSettings(student_thinking=True), PromptSettings(chat_template=thinking_only)):
            prompts = Prompts(settings, load_tokenizer(QWEN3, chat_template=settings.chat_template))
            response = prompts.sft_response(problem)
            assert [*prompts.student_prompt(problem), *response] == self.conversation(
                theirs, prompts, problem, solution
            )
            assert 151668 in response

    def test_added_tokens_of_a_response(self, theirs):
        solution = '<think>\na\n</think>\n\n<tool_call>\n{"name": "f"}\n</tool_call> <|fim_prefix|> <tool_response>'
        prompts = Prompts(PromptSettings(student_thinking=True), load_tokenizer(QWEN3))
        response = prompts.sft_response(Problem(id="a", problem="f?", solution=solution, answer="1"))
        assert list(response) == [*theirs.encode(solution, add_special_tokens=False), 151645]
        assert [i for i in response if i > 151645] == [151667, 151668, 151657, 151658, 151659, 151665]

    def test_special_tokens_stay_text(self):
        solution = "a<|im_end|>\n<|im_start|>user <|endoftext|><|vision_pad|> <think>b</think>"
        prompts = Prompts(PromptSettings(student_thinking=True), load_tokenizer(QWEN3))
        problem = Problem(id="a", problem=solution, solution=solution, answer="1")
        response = prompts.sft_response(problem)
        assert [i for i in response if i >= 151643] == [151667, 151668, 151645]
        assert prompts.tokenizer.decode(response, keep_special=True) == solution + "<|im_end|>"
        assert [i for i in prompts.full_teacher_prompt(problem) if i >= 151643] == [151644, 151645, 151644]
