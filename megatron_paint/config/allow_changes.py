"""`run.allow_changes`: the settings that a start may change in a run that it resumes."""

from collections.abc import Sequence

from megatron_paint.base.errors import UserError
from megatron_paint.config import describe
from megatron_paint.config.saved import IN_CHECKPOINT


def check_allow_changes(names: Sequence[str]) -> None:
    """Raises UserError for a name that is no setting, or that of a setting which no resumed run can change."""
    sections = describe.sections()
    settings = {setting.key for section in sections for setting in section.settings}
    for name in names:
        if name in IN_CHECKPOINT:
            raise UserError(
                f"run.allow_changes: {name} cannot change when a run resumes, because its checkpoints hold it: leave "
                "it out, or start again in another run.dir"
            )
        if describe.general(name) in settings:
            continue
        if any(section.key == describe.general(name) for section in sections):
            raise UserError(f"run.allow_changes: {name} is a section: name its settings, such as optimizer.lr")
        raise UserError(f"run.allow_changes: {describe.unknown(name)}")


def may_be_allowed(name: str) -> bool:
    """Whether `run.allow_changes` accepts a setting; not one that only an earlier version had."""
    try:
        check_allow_changes([name])
    except UserError:
        return False
    return True
