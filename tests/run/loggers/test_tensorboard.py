"""What TensorBoard's own reader finds in the files."""

import pytest

from megatron_paint.run.loggers.interface import SampleTable
from megatron_paint.run.loggers.loggers import Loggers
from megatron_paint.run.loggers.tensorboard import TensorBoardLogger, markdown
from tests.run.loggers.stand_ins import evaluation, info, report


def test_it_holds_what_was_logged(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    opened = Loggers([TensorBoardLogger(info(tmp_path))], samples_every=2)
    opened.open()
    assert not (tmp_path / "tensorboard").exists()
    for step in (1, 2, 3):
        opened.step(*report(step, loss=1 / step, **{"overlap/mean": float("nan" if step == 1 else step)}))
    opened.evaluation(evaluation(3))
    opened.close("finished")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *[(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    ]
    assert [event.step for event in events.Scalars("overlap/mean")] == [2, 3]
    assert events.Scalars("eval/tiny/avg")[0].value == 1.0
    (texts,) = [events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.startswith("samples")]
    assert [event.step for event in texts] == [1, 2]
    shown = texts[0].tensor_proto.string_val[0].decode()
    assert "1 + 1?" in shown
    assert "a &#124; &#60;b&#62;bold&#60;/b&#62;<br># two" in shown


def test_hyperparameters(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    opened = Loggers([TensorBoardLogger(info(tmp_path))])
    opened.open()
    opened.step(*report(1))
    opened.close("finished")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = parse_session_start_info_plugin_data(content).hparams
    assert values["optimizer.lr"].number_value == 5.0e-6
    assert values["optimizer.name"].string_value == "adam"
    assert values["model.lora"].string_value == "null"
    assert values["run.loggers"].string_value == "['wandb']"


@pytest.mark.parametrize(("resumed", "again", "kept"), [(1, (2,), [(1, 0.5), (2, 0.25)]), (0, (1,), [(1, 0.25)])])
def test_steps_after_a_checkpoint_are_hidden_on_resuming(tmp_path, resumed, again, kept):
    """0: the first start ended before its first checkpoint. Its evaluation before step 1 counts."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps, loss in ((0, (1, 2, 3), 0.5), (resumed, again, 0.25)):
        opened = Loggers([TensorBoardLogger(info(tmp_path, resume_step=start))])
        opened.open()
        if loss == 0.5:
            opened.evaluation(evaluation(0))
        for step in steps:
            opened.step(*report(step, loss=loss))
        opened.close("stopped")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == kept
    assert [event.step for event in events.Scalars("eval/tiny/avg")] == [0]


def test_texts_stay_in_their_cell():
    table = SampleTable(columns=("id", "text"), rows=[("a", "x|y\n```\n[l](u) \0*b*"), (None, 0.123456)])
    assert markdown(table).splitlines() == [
        "| id | text |",
        "| --- | --- |",
        "| a | x&#124;y<br>&#96;&#96;&#96;<br>&#91;l&#93;&#40;u&#41; &#42;b&#42; |",
        "|  | 0.1235 |",
    ]
