"""`megatron-paint report`: one HTML file about a run or several, or a page that follows them while they train."""

import argparse
from pathlib import Path

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.report.build import Written, write_report
from megatron_paint.report.live import address_of, make_server

REPORT = "report.html"


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Writes the report, or serves it until Ctrl-C; returns the exit status."""
    if options.serve:
        return _serve(options)
    if options.port is not None:
        raise UserError("--port belongs to --serve; add --serve, or leave --port out")
    out = options.out or (options.runs[0] / REPORT if len(options.runs) == 1 else Path(REPORT))
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; name a file in it, such as {out / REPORT}")
    for line in _lines(write_report(options.runs, out)):
        print(line)
    return 0


def _serve(options: argparse.Namespace) -> int:
    if options.out is not None:
        raise UserError("--out and --serve exclude each other: --serve writes no file; leave one of them out")
    server = make_server(options.runs, port=options.port or 0)
    try:
        print(f"{address_of(server)} follows {', '.join(map(str, options.runs))}; Ctrl-C ends it", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


def _lines(written: Written) -> list[str]:
    """What the command prints."""
    beside = "" if written.folder is None else f", with its samples in {written.folder} (keep both together)"
    size = f"{written.bytes / 1e6:.1f} MB, {count_text(written.samples, 'sample')}, {written.seconds:.1f} s"
    notices = [f"notice: {notice}" for notice in written.notices]
    return [*notices, f"{written.file}: {size}{beside}"]
