"""Random texts for the masker: any characters, and pieces of LaTeX in any order."""

from hypothesis import strategies as st

any_text = st.text(st.characters(), max_size=200)
LATEX = [
    *"x12.,{}$%&/=+ \n\\",
    *("\\boxed{", "\\frac", "\\[", "\\]", "\\(", "\\)", "$$", "\\\\", "\\left", "\\$", "{,}", "\\,", "345"),
    *("\\begin{align}", "\\end{align}", "\\begin{pmatrix}", "\\end{pmatrix}", "\u00e9", "\ud800"),
]
latex_text = st.lists(st.sampled_from(LATEX), max_size=60).map("".join)
