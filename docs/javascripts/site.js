// What the theme leaves out for those who use a keyboard or a screen reader.
addEventListener("load", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  const scrolled = "pre > code, .md-typeset__scrollwrap"; // the arrow keys scroll what has the focus
  for (const area of document.querySelectorAll(scrolled)) area.setAttribute("tabindex", "0");
});
