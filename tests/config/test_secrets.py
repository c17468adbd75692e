"""What is hidden where a run writes its settings, and what is not."""

import pytest

from megatron_paint.config.load import settings_of
from megatron_paint.config.secrets import (
    recorded_tree,
    without_credentials,
    without_secret_arguments,
    without_secret_options,
    without_secrets,
)
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.results import _has_same_settings

TREE = {
    "model": {"hf_path": "m"},
    "data": {"train": "https://me:p@pw@data.org/p.jsonl"},
    "rollout": {
        "engine": "vllm",
        "vllm": {
            "environment": {"HF_TOKEN": "hf_abc", "OMP_NUM_THREADS": "4"},
            "command": ["env", "HF_TOKEN=hf_ghi", "/envs/vllm", "serve", "--hf-token", "hf_def"],
            "extra_args": ["--api-key", "sk-1", "sk-3", "--api-key=sk-2", "--max-num-batched-tokens", "8192"],
        },
    },
}
SECRETS = ("me:p", "pw@", "hf_abc", "hf_def", "hf_ghi", "sk-1", "sk-2", "sk-3")


def settings(path, **run):
    return settings_of({**TREE, "run": {"dir": str(path), **run}})


def test_values_are_hidden_and_names_are_kept(tmp_path):
    made = settings(tmp_path)
    tree = recorded_tree(made)
    assert tree["rollout"]["vllm"]["environment"] == {"HF_TOKEN": "(hidden)", "OMP_NUM_THREADS": "(hidden)"}
    assert tree["rollout"]["vllm"]["command"] == [
        *("env", "HF_TOKEN=(hidden)", "/envs/vllm", "serve", "--hf-token", "(hidden)")
    ]
    assert tree["rollout"]["vllm"]["extra_args"] == [
        *("--api-key", "(hidden)", "(hidden)", "--api-key=(hidden)", "--max-num-batched-tokens", "8192")
    ]
    assert tree["data"]["train"] == "https://(hidden)@data.org/p.jsonl"
    assert made.rollout.vllm.environment["HF_TOKEN"] == "hf_abc"  # the servers still get it
    assert settings_of(tree).rollout.vllm.requests == 256  # what is written can be read again


def test_a_run_folder_has_no_secret_and_resumes(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings(folder.path))
    text = folder.config_file.read_text()
    assert not [secret for secret in SECRETS if secret in text]
    again = settings(folder.path, resume="auto")
    assert folder.check(again) == 0
    assert _has_same_settings(folder, again)


def test_a_folder_of_an_earlier_version_which_has_them_resumes_too(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings(folder.path))
    folder.config_file.write_text(folder.config_file.read_text().replace("(hidden)@", "me:p@pw@"))
    assert folder.check(settings(folder.path, resume="auto")) == 0


@pytest.mark.parametrize(
    ("argument", "written"),
    [
        ("rollout.vllm.environment.HF_TOKEN=hf_abc", "rollout.vllm.environment.HF_TOKEN=(hidden)"),
        ("rollout.vllm.environment={HF_TOKEN: hf_abc}", "rollout.vllm.environment=(hidden)"),
        ("rollout.vllm={environment: {HF_TOKEN: hf_abc}}", "rollout.vllm=(hidden)"),
        ("rollout.vllm.extra_args=[--api-key, sk-1]", "rollout.vllm.extra_args=(hidden)"),
        ("rollout.vllm.servers=2", "rollout.vllm.servers=2"),
        ("data.train=s3://me:pw@bucket/x", "data.train=s3://(hidden)@bucket/x"),
        ("run.dir=runs/me@home", "run.dir=runs/me@home"),
        ("my settings.yaml", "my settings.yaml"),
    ],
)
def test_arguments_of_a_command(argument, written):
    assert without_secret_arguments(["train", argument]) == ["train", written]


def test_an_error_message_keeps_its_address():
    text = "API request to http://me:pw@host:5000/api failed, mail a@b.org"
    assert without_credentials(text) == "API request to http://(hidden)@host:5000/api failed, mail a@b.org"


def test_words_of_a_command():
    words = [
        "bash",
        "-c",
        "HF_TOKEN='a b' vllm --max-num-seqs=8",
        "--env=API_KEY=sk-1",
        "--api-key",
        "x",
    ]
    assert without_secret_options(words) == [
        *("bash", "-c", "HF_TOKEN=(hidden) vllm --max-num-seqs=8", "--env=API_KEY=(hidden)"),
        *("--api-key", "(hidden)"),
    ]


@pytest.mark.parametrize(
    ("word", "written"),
    [
        (
            "module load cuda; exec vllm serve --api-key sk-1 --port 1",
            "module load cuda; exec vllm serve --api-key (hidden) --port 1",
        ),
        ("vllm --api-key sk-1 'sk 2' && echo --hf-token=hf_1", "vllm --api-key (hidden) && echo --hf-token=(hidden)"),
        ("vllm --hf_token \\\n  hf_1 --seed 1", "vllm --hf_token \\\n  (hidden) --seed 1"),
        ("--api-key sk-1", "--api-key (hidden)"),
        ("--hf-overrides.hf_token=hf_1", "--hf-overrides.hf_token=(hidden)"),
        ("HF_TOKEN='a b'c vllm", "HF_TOKEN=(hidden) vllm"),
        ('{"hf_token":"hf_1", "a": {"apiKey": "sk-\\"1"}}', '{"hf_token":"(hidden)", "a": {"apiKey": "(hidden)"}}'),
        ('{"secret": ["a", "b"], "password": 12, "x": 1}', '{"secret": "(hidden)", "password": "(hidden)", "x": 1}'),
        (
            r"""vllm --hf-overrides "{\"hf_token\": \"hf_1\"}" --seed 1""",
            r"""vllm --hf-overrides "{\"hf_token\": \"(hidden)\"}" --seed 1""",
        ),
        ("--url=http://h:1/v1?a=b&token=x&c=d", "--url=http://h:1/v1?a=b&token=(hidden)"),
        ("vllm --tokenizer a --max-num-batched-tokens 8192", "vllm --tokenizer a --max-num-batched-tokens 8192"),
        ('{"num_key_value_heads": 8, "eos_token_id": 3}', '{"num_key_value_heads": 8, "eos_token_id": 3}'),
    ],
)
def test_secrets_inside_a_word(word, written):
    assert without_secret_options(["serve", word]) == ["serve", written]
    assert without_secret_options(["serve", written]) == ["serve", written]  # a resumed run compares both


def test_keys_of_addresses():
    assert without_credentials("[http://h:1/v1?api_key=k1&a=1#b]") == "[http://h:1/v1?api_key=(hidden)&a=1#b]"
    tree = without_secrets({"rollout": {"vllm": {"urls": ["http://h:1/v1?api_key=SECRET7"]}}})
    assert tree == {"rollout": {"vllm": {"urls": ["http://h:1/v1?api_key=(hidden)"]}}}
