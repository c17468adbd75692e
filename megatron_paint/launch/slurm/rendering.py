"""Renders the batch script of a run from the options."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_paint.base.errors import UserError
from megatron_paint.launch.rank_environment import PORTS, STEPS_PER_JOB
from megatron_paint.launch.slurm.options import DEPENDENCY, TEMPLATE, SlurmOptions, as_dict, check_shell
from megatron_paint.runtime.stop import STOPPED

RESUME = "run.resume=auto"  # every job except the first one resumes from a checkpoint


def render(
    options: SlurmOptions,
    *,
    settings_file: str,
    overrides: Sequence[str],
    run_dir: str,
    title: str | None = None,
    plan: Sequence[str] = (),
    code: str | None = None,
) -> str:
    """The script. Paths stay as given; relative paths are relative to the folder in which the job is submitted.

    title: what the first comment names; None: the settings file. plan: lines that are written as comments. code: a
    folder with a copy of the package, which the job uses. UserError: the template of the user has a mistake.
    """
    environment = _jinja()
    values = dict(
        as_dict(options),
        settings_file=settings_file,
        title=title or settings_file,
        plan=[_one_line(line) for line in plan],
        code=code,
        run=run_dir,
        ports=PORTS,
        ports_per_job=STEPS_PER_JOB,
        directives=_directives(options, run_dir),
        step_flags=_step_flags(options, code=code),
        in_container=_in_container(options),
        rank_python=options.container_python if options.container else options.python,
        train_arguments=["train", _plain_path(settings_file), *overrides, RESUME],
    )
    if options.template is None:
        return environment.get_template(TEMPLATE.name).render(values)
    return _render_own(environment, options.template, values)


def render_worker(
    options: SlurmOptions, *, arguments: Sequence[str], out: str, title: str, code: str | None = None
) -> str:
    """The script of one worker of a search, which runs on one node and starts the ranks of its trials itself.

    arguments: those of `megatron-paint`. out: the folder of the search; paths as in `render`. title: what the first
    comment names.
    """
    values = dict(
        as_dict(options),
        arguments=arguments,
        title=title,
        code=code,
        directives=_directives(options, out),
        in_container=_in_container(options),
        rank_python=options.container_python if options.container else options.python,
        stopped=STOPPED,
    )
    return _jinja().get_template("search.jinja").render(values)


def _jinja() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(quote=shlex.quote, path=_path, line=_one_line)
    return environment


def _render_own(environment: jinja2.Environment, path: str, values: dict[str, Any]) -> str:
    """The script from a template of the user, checked as far as that is possible."""
    try:
        script = environment.from_string(Path(path).read_text(encoding="utf-8")).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"--template={path}, line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, OSError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"--template={path}: {error}; compare it with {TEMPLATE}") from None
    if not script.startswith("#!"):
        raise UserError(f"--template={path}: its first line is not #!/bin/bash, which sbatch needs")
    if "bash" in script.splitlines()[0]:
        check_shell(script, f"--template={path}: the script")
    return script


def log_file(run_dir: str | Path, job: str) -> Path:
    """The console file of a job. job: its id, or Slurm's %j."""
    return Path(run_dir) / "logs" / f"{job}.out"


def _directives(options: SlurmOptions, run_dir: str) -> list[str]:
    """The options of all #SBATCH lines."""
    lines = [f"--job-name={options.job_name}"]
    lines += [f'--{name}="{value}"' if " " in value else f"--{name}={value}" for name, value in options.placing.items()]
    lines += [f"--nodes={options.nodes}", f"--ntasks-per-node={options.tasks_per_node}"]
    if options.gpus_per_node and not re.search(r"(^|,)gpu(:|,|$)", options.placing.get("gres", "")):
        lines.append(f"--gpus-per-node={options.gpus_per_node}")
    if options.cpus_per_task is not None:
        lines.append(f"--cpus-per-task={options.cpus_per_task}")
    lines.append(f"--mem={options.mem}")
    if options.exclusive:
        lines.append("--exclusive")
    # A requeued job appends to its log.
    lines += [f'--output="{log_file(run_dir, "%j")}"', "--open-mode=append", "--requeue"]
    lines.append(f"--signal=B:USR1@{options.signal_seconds}")
    # Two jobs of a run never train at the same time. Of several dependency lines Slurm would use only the last one.
    given = [match[1] for line in options.sbatch if (match := DEPENDENCY.fullmatch(line))]
    lines.append(f"--dependency={','.join(['singleton', *given])}")
    # Only names: sbatch takes the values from its own environment. NIL: no variables.
    lines.append(f"--export={','.join(options.env) or 'NIL'}")
    return [*lines, *(line for line in options.sbatch if not DEPENDENCY.fullmatch(line))]


def _step_flags(options: SlurmOptions, *, code: str | None) -> list[str]:
    """Flags of every srun. srun does not inherit --cpus-per-task and --export=ALL from the job."""
    cpus = "--cpu-bind=none" if options.cpus_per_task is None else f"--cpus-per-task={options.cpus_per_task}"
    flags = [f"--nodes={options.nodes}", "--export=ALL", "--kill-on-bad-exit=1", cpus]
    if options.container and options.container_runtime == "pyxis":
        flags += [
            f"--container-image={shlex.quote(options.container)}",
            f'--container-mounts="{",".join(["$PWD:$PWD", *map(_escape, options.mounts)])}"',
            '--container-workdir="$PWD"',
        ]
        # Variables of the image win over those of the job, except these.
        names = [*options.env, *(("PYTHONPATH", "PYTHONSAFEPATH") if code else ())]
        if names:
            flags.append(f'--container-env="{",".join(names)}"')
    return flags


def _in_container(options: SlurmOptions) -> str:
    """The words before a command of the ranks."""
    if not options.container or options.container_runtime != "apptainer":
        return ""
    words = ["apptainer", "exec", *(["--nv"] if options.gpus_per_node else []), '--bind "$PWD" --pwd "$PWD"']
    words += [f"--bind {shlex.quote(mount)}" for mount in options.mounts]
    return " ".join([*words, shlex.quote(options.container), ""])


def _escape(text: str) -> str:
    """For use between double quotes."""
    return re.sub(r'(["$`\\])', r"\\\1", text)


def _one_line(text: str) -> str:
    """For a comment: a line break would end the comment, so each character that is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain_path(path: str) -> str:
    """The path in a form that cannot be an option."""
    return f"./{path}" if path.startswith("-") else path


def _path(path: str) -> str:
    """Quoted for the shell. `source` would search PATH for a name without a slash, so this adds one."""
    return shlex.quote(path if "/" in path else f"./{path}")
