"""Random texts for the anchors of code and of prose: any characters, and pieces of both in any order."""

from hypothesis import strategies as st

CODE = [
    *"ax1_()[]{}:;,.=+'\"#\\\n \t`$?!/",
    *("'''", '"""', "```", "```python\n", "```js\n", "~~~", "def ", "return ", "for x in ", "f'{", "r'", "0x1f", "1e5"),
    *(
        "\n    ",
        "\r\n",
        "\x00",
        "\x0c",
        "\u00e9",
        "\u2028",
        "\ud800",
        "\\boxed{",
        "${",
        "*/",
        "/*",
        "//",
        "1_000",
        "lambda ",
    ),
]
PROSE = [
    *"aB1.,:;!?'\"()-\n $%",
    *(
        "The ",
        "Paris ",
        "of ",
        "New York ",
        "Dr. ",
        "March ",
        "5th ",
        "2020",
        "1945-10-24",
        "3/4/2020",
        "1,500 ",
        "km ",
    ),
    *(
        "12%",
        "$3",
        " million",
        "\u201c",
        "\u201d",
        "\u2019s ",
        "`",
        "\u00c9mile ",
        "\u0130",
        "\ud800",
        "\\boxed{",
        "}",
        "\u0663",
    ),
]
any_code = st.one_of(st.text(st.characters(), max_size=150), st.lists(st.sampled_from(CODE), max_size=60).map("".join))
any_prose = st.one_of(
    st.text(st.characters(), max_size=150), st.lists(st.sampled_from(PROSE), max_size=60).map("".join)
)
