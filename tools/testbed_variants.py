"""The kinds of teacher of the quickstart and the testbed; examples/testbed/README.md describes them."""

from quickstart_task import RunningSums
from string_task import StringRewriting
from warm_up_rows import Variant

from megatron_paint.config.domains import DomainSettings

SUMS, STRINGS = RunningSums(), StringRewriting()
# An answer is a string, which is right to the letter. A line of a solution is a call, as in code.
DOMAINS = {"strings": DomainSettings(anchors="code", grader="exact")}
OF_STRINGS = (
    "data.columns.domain=domain",
    "evaluation.columns.domain=domain",
    "domains={strings: {anchors: code, grader: exact}}",
)
VARIANTS = {
    "own": Variant(task=SUMS),
    "terse": Variant(task=SUMS, start="own", terse=True),
    "leaky": Variant(task=SUMS, start="own", jump_share=0.3),
    "weak": Variant(task=SUMS, start="own", hidden_forget_share=0.5),
    "leaky_weak": Variant(task=SUMS, start="own", jump_share=0.3, hidden_forget_share=0.5),
    "terse_leaky_weak": Variant(task=SUMS, start="own", terse=True, jump_share=0.3, hidden_forget_share=0.5),
    "strings": Variant(task=STRINGS, domain="strings", settings=OF_STRINGS),
    "strings_leaky_weak": Variant(
        task=STRINGS,
        start="strings",
        jump_share=0.3,
        hidden_forget_share=0.5,
        domain="strings",
        settings=OF_STRINGS,
    ),
}
