"""Sphinx reads what docs/reference.py wrote; `make docs` runs both."""

project = "Ferrum"
copyright = "the Ferrum authors"
html_theme = "furo"
html_title = "Ferrum"
html_show_sphinx = False
html_copy_source = False

extensions = ["myst_parser"]
myst_enable_extensions = ["fieldlist"]
# Docstrings hold formulas: `*`, `_` and `<` outside backticks are themselves.
myst_disable_syntax = ["emphasis", "html_block", "html_inline"]

add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
smartquotes = False  # "int8" is a value

# Every name that a docstring's link points at must have an entry; types in signatures need none.
nitpicky = True
nitpick_ignore_regex = [("py:(class|exc)", ".*")]
